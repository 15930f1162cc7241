"""Requests with adapters: in streams and submitted, several in a batch, each gets the tokens that it gets alone."""

import copy
import itertools

import pytest
import torch
from adapter_helpers import ADAPTERS, CONFIGS, NAMES, OPTIONS, PROMPTS, peft_adapter
from helpers import few

from llama_flex import Capture, Engine, Ensemble, Llama, Sampling, edits, fuse, masks, score
from llama_flex.kernels.lora import LoRA, lora_in


@pytest.fixture(scope="module")
def loaded(tiny_pair, tmp_path_factory) -> Llama:
    """A model with several adapters, none active; to be copied before it is changed."""
    reference, model = tiny_pair("gqa")
    model, folder = copy.deepcopy(model), tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate([*NAMES, "saved modules"]):
        peft_adapter(reference, folder / name, seed, **CONFIGS[name])
        model.adapters.load(folder / name)
    return model


@pytest.fixture(scope="module")
def alone(loaded) -> dict[tuple[int, str], list[int]]:
    """The tokens of each prompt under each adapter, which is the active one then, by the plain forward."""
    found, model = {}, copy.deepcopy(loaded)
    for name in (*NAMES, "__base__"):
        model.adapters.activate(None if name == "__base__" else name)
        for n, prompt in enumerate(PROMPTS):
            ids = list(prompt)
            for _ in range(OPTIONS["max_new_tokens"]):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids]), logits_to_keep=1, backend="dense").argmax()))
            found[n, name] = ids[len(prompt) :]
    return found


@pytest.fixture
def expected(alone) -> list[list[int]]:
    each = [alone[n, name] for n, name in enumerate(ADAPTERS)]
    assert len({tuple(alone[0, name]) for name in (*NAMES, "__base__")}) == 4  # a neighbour's would be noticed
    return each


def engine_of(model: Llama, **options) -> Engine:
    return Engine(model, **{"backend": "dense", "max_slots": 4096} | options)


def run_all(engine: Engine, prompts=PROMPTS, adapters=ADAPTERS, **options) -> list:
    """Submit prompts, each with an adapter, and run them; return the requests."""
    requests = [
        engine.submit(prompt, adapter=name, **OPTIONS, **options)
        for prompt, name in zip(prompts, adapters, strict=True)
    ]
    engine.run()
    assert [request.error for request in requests] == [None] * len(requests)
    return requests


def tokens(requests) -> list[list[int]]:
    return [[step.token for step in request.steps] for request in requests]


def test_a_batch_with_an_adapter_each_gets_what_each_gets_alone(loaded, expected):
    engine = engine_of(loaded)
    assert [c.tokens for c in engine.generate(PROMPTS, adapter=ADAPTERS, **OPTIONS)] == expected
    for prompt, name, each in zip(PROMPTS, ADAPTERS, expected, strict=True):
        assert engine.generate([prompt], adapter=name, **OPTIONS)[0].tokens == each
    # The mutation: a neighbour's adapter.
    turned = [*ADAPTERS[1:], ADAPTERS[0]]
    assert [c.tokens for c in engine.generate(PROMPTS, adapter=turned, **OPTIONS)] != expected


def test_submitted_requests_share_prefixes_with_the_same_adapter_only(loaded, expected):
    engine = engine_of(loaded, prefill_tokens=64)
    first = run_all(engine)
    assert tokens(first) == expected
    again = run_all(engine)
    assert tokens(again) == expected
    assert [request.num_cached_tokens > 0 for request in again] == [True, True, True, False, True]
    other = run_all(engine, PROMPTS[:1], ["vocabulary"])
    assert not other[0].num_cached_tokens


@pytest.mark.exhaustive
def test_compiled_steps_give_the_same_and_another_adapter_compiles_nothing(loaded, alone):
    engine = engine_of(loaded, backend="flex", compile=True, max_slots=256, max_length=128, max_batch_size=2)
    pairs = [("patterns", "vocabulary"), ("vocabulary", "patterns"), ("patterns", "__base__")]  # no ties
    counts = set()
    for names in pairs:
        assert tokens(run_all(engine, [PROMPTS[3]] * 2, names)) == [alone[3, name] for name in names]
        counts.add(engine.graphs.count)
    assert len(counts) == 1


def test_a_request_without_an_adapter_runs_as_if_none_were_loaded(loaded, alone, monkeypatch):
    monkeypatch.setattr(LoRA, "forward", lambda *_: pytest.fail("an update was computed"))
    engine = engine_of(loaded)
    base = [alone[n, "__base__"] for n in range(len(PROMPTS))]
    assert [c.tokens for c in engine.generate(PROMPTS, **OPTIONS)] == base
    assert tokens(run_all(engine, PROMPTS, [None] * len(PROMPTS))) == base
    with pytest.raises(pytest.fail.Exception):
        engine.generate(PROMPTS[:1], adapter="patterns", **OPTIONS)


def test_the_active_adapter_is_that_of_all_that_name_none(loaded, alone):
    model = copy.deepcopy(loaded)
    engine = engine_of(model)
    stream = engine.stream(PROMPTS[:1], **OPTIONS)
    found = [next(stream).token]
    model.adapters.activate("patterns")
    request = engine.submit(PROMPTS[0], **OPTIONS)
    fixed = engine.submit(PROMPTS[0], adapter="__base__", **OPTIONS)
    engine.step()
    assert engine.generate(PROMPTS[:1], **OPTIONS)[0].tokens == alone[0, "patterns"]
    likely = score(engine, PROMPTS[0], [alone[0, "patterns"], alone[0, "__base__"]])
    assert likely[0].greedy.all()
    assert not likely[1].greedy.all()
    assert f"{', '.join(NAMES)}, saved modules; active: patterns)" in engine.explain()
    model.adapters.activate("vocabulary")
    engine.run()
    assert tokens([request, fixed]) == [alone[0, "patterns"], alone[0, "__base__"]]
    assert found + [step.token for step in stream] == alone[0, "__base__"]
    assert engine.generate(PROMPTS[:1], **OPTIONS)[0].tokens == alone[0, "vocabulary"]


def test_changed_factors_are_noticed_by_requests_that_follow(loaded):
    model = copy.deepcopy(loaded)
    engine = engine_of(model)
    before = run_all(engine, PROMPTS[:2], ["patterns"] * 2)
    with torch.no_grad():
        lora_in(model.layers[0].attention.qkv).down.mul_(-1)
    after = run_all(engine, PROMPTS[:1], ["patterns"])
    assert not after[0].num_cached_tokens
    assert tokens(after) != tokens(before[:1])
    assert tokens(after)[0] == engine.generate(PROMPTS[:1], adapter="patterns", **OPTIONS)[0].tokens
    model.adapters.activate("patterns")
    model.adapters.merge("patterns")
    merged = run_all(engine, PROMPTS[:1], [None])
    assert not merged[0].num_cached_tokens
    assert tokens(merged) == tokens(after)


def test_requests_whose_adapter_is_removed_end_in_an_error(loaded, alone):
    model = copy.deepcopy(loaded)
    engine = engine_of(model, max_batch_size=1)
    stream = engine.stream(PROMPTS[:1], adapter="patterns", **OPTIONS)
    next(stream)
    requests = [engine.submit(PROMPTS[0], adapter=name, **OPTIONS) for name in ("patterns", "patterns", "q and v")]
    engine.step()
    model.adapters.remove("patterns")
    engine.run()
    assert [str(r.error) for r in requests[:2]] == [
        "adapter 'patterns' was removed before the request had finished"
    ] * 2
    assert tokens(requests[2:]) == [alone[0, "q and v"]]
    with pytest.raises(ValueError, match="adapter 'patterns' was removed"):
        list(stream)
    with pytest.raises(ValueError, match="no adapter 'patterns'; loaded: q and v, vocabulary"):
        engine.submit(PROMPTS[0], adapter="patterns")
    with pytest.raises(ValueError, match="2 adapters for 1 prompts"):
        engine.generate(PROMPTS[:1], adapter=["q and v", "q and v"])


def test_weights_that_are_replaced_as_a_whole_are_so_for_all_requests(loaded):
    model = copy.deepcopy(loaded)
    engine = engine_of(model)
    with pytest.raises(ValueError, match=r"adapter 'saved modules' replaces .*lm_head.weight.* as a whole"):
        engine.generate(PROMPTS[:1], adapter="saved modules", **OPTIONS)
    model.adapters.activate("saved modules")
    found = run_all(engine, PROMPTS, [None, "saved modules"] * 2 + [None])
    assert tokens(found) == [c.tokens for c in engine.generate(PROMPTS, **OPTIONS)]
    for name in ("__base__", "patterns"):
        with pytest.raises(ValueError, match="for all requests at a time"):
            engine.submit(PROMPTS[0], adapter=name)
    request = engine.submit(PROMPTS[0], **OPTIONS)
    engine.step()
    model.adapters.activate(None)
    engine.run()
    assert "is no longer active" in str(request.error)


@pytest.mark.parametrize("way", few(["mask", "capture"], ["edit", "rolling", "samples", "fp8", "ensemble", "fused"]))
def test_adapters_go_with_every_way_of_running(loaded, way):
    options, extra = {"adapter": "patterns"}, {}
    if way == "mask":
        options["mask"] = masks.sliding_window(60) | masks.sink(3)
    elif way == "edit":
        options["edit"] = edits.scale("z", 0.5)
    elif way == "fp8":
        extra["kv_dtype"] = "fp8"
    engine, active = engine_of(loaded, **extra), copy.deepcopy(loaded)
    active.adapters.activate("patterns")
    plain = engine_of(active, **extra)
    without = {key: value for key, value in options.items() if key != "adapter"}
    for prompt in PROMPTS[2:4]:
        if way == "capture":
            options["capture"], without["capture"] = Capture("resid_post"), Capture("resid_post")
        if way == "ensemble":
            prompt = Ensemble([prompt, prompt[-3:]], "mean")
        elif way == "fused":
            prompt = fuse([prompt, prompt[-3:]], suffix=[9, 10])
        caches = [each.new_rolling_cache(1, 40, 2) for each in (loaded, active)] if way == "rolling" else [None] * 2
        if way == "samples":
            sampling = Sampling(temperature=1.0, seed=3)
            requests = engine.submit_samples(prompt, 3, sampling=sampling, **OPTIONS, **options)
            others = plain.submit_samples(prompt, 3, sampling=sampling, **OPTIONS)
            engine.run(), plain.run()
            assert tokens(requests) == tokens(others)
            continue
        request = engine.submit(prompt, cache=caches[0], **OPTIONS, **options)
        engine.run()
        if way == "capture":
            found = options["capture"]["resid_post", 1]
        (other,) = plain.generate([prompt], cache=caches[1], **OPTIONS, **without)
        assert tokens([request]) == [other.tokens]
        if way == "capture":
            assert (found - without["capture"]["resid_post", 1]).abs().max() < 1e-3


def test_recorded_steps_on_a_cpu_are_those_of_the_adapter(loaded, alone):
    engine = engine_of(loaded, compile="auto")
    for name, _ in itertools.product(("patterns", "__base__", "q and v"), range(2)):
        assert engine.generate(PROMPTS[:1], adapter=name, **OPTIONS)[0].tokens == alone[0, name]
        assert tokens(run_all(engine, PROMPTS[:1], [name])) == [alone[0, name]]
