"""Choosing tokens: the same in streams, submitted, batched, preempted and compiled, and the same as transformers."""

import dataclasses
import json

import pytest
import torch
import transformers
from choosing_helpers import (
    SAMPLINGS,
    STOP,
    VOCAB,
    by_transformers,
    letters_tokenizer,
    no_even,
    requests,
    shifted,
)
from helpers import few
from request_helpers import check_empty, random_ids, random_model

from llama_flex import Capture, Engine, Ensemble, Grammar, Llama, Sampling, Tokenizer, edits
from llama_flex.engine import batch, slot_tables
from llama_flex.engine.kinds import Kinds, union
from llama_flex.engine.request import Request
from llama_flex.masks.layout import BLOCK

OPTIONS = {"max_new_tokens": 12, "stop_token_ids": [STOP]}


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return letters_tokenizer(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def engine(letters) -> Engine:
    return Engine(random_model(), letters, backend="dense")


@pytest.fixture(scope="module")
def alone(engine) -> list:
    """What each request gives alone, in a stream."""
    found = [engine.generate([prompt], **options)[0] for prompt, options in requests()]
    assert len({str(done.tokens) for done in found}) == len(found)
    return found


def new_engine(like: Engine, **options) -> Engine:
    return Engine(like.model, like.tokenizer, backend="dense", **options)


def assert_same(found, expected) -> None:
    assert (found.tokens, found.text, found.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
    torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(expected.logprobs), atol=2e-5, rtol=2e-5)
    assert [[id for id, _ in most] for most in found.top_logprobs] == [
        [id for id, _ in most] for most in expected.top_logprobs
    ]


def submit_all(engine: Engine, **more) -> list[Request]:
    return [engine.submit(prompt, **options, **more) for prompt, options in requests()]


# ---- parity


@pytest.mark.parametrize("name", ["plain", "bias", "penalties", "late", "ngrams", "function"])
def test_tokens_are_those_of_transformers_processors(engine, name):
    for prompt in (random_ids(9), random_ids(40, 1)):
        (done,) = engine.generate([prompt], sampling=SAMPLINGS[name], **OPTIONS)
        assert done.tokens == by_transformers(engine.model, prompt, 12, SAMPLINGS[name])


@pytest.mark.parametrize(
    ("name", "mutated"),
    [
        ("bias", {"banned_tokens": [64, 78]}),
        ("bias", {"logit_bias": {8: 12.0}}),
        ("penalties", {"presence_penalty": 0.0}),
        ("penalties", {"frequency_penalty": 0.0}),
        ("late", {"min_new_tokens": 8}),
        ("ngrams", {"no_repeat_ngram_size": 2}),
        ("function", {"processors": [no_even]}),
    ],
)
def test_comparison_with_transformers_catches(engine, name, mutated):
    other = dataclasses.replace(SAMPLINGS[name], **mutated)
    prompts = [random_ids(9), random_ids(40, 1), random_ids(20, 2)]
    found = [done.tokens for done in engine.generate(prompts, sampling=SAMPLINGS[name], **OPTIONS)]
    assert found != [by_transformers(engine.model, prompt, 12, other) for prompt in prompts]


@pytest.mark.parametrize("name", ["gqa", pytest.param("mha", marks=pytest.mark.exhaustive)])
def test_generate_of_transformers_gives_the_same(tiny_pair, name):
    reference, model = tiny_pair(name)
    ids = [*range(5, 25)]
    options = {"no_repeat_ngram_size": 2, "min_new_tokens": 10, "suppress_tokens": [9, 50], "repetition_penalty": 1.2}
    theirs = reference.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, 20, dtype=torch.int64),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
        sequence_bias=[[[2], 30.0], [[7], -4.0]],
        logits_processor=[lambda ids, scores: scores.roll(1, -1)],
        **options,
    )[0, 20:].tolist()
    sampling = Sampling(
        logit_bias={2: 30.0, 7: -4.0},
        banned_tokens=options.pop("suppress_tokens"),
        processors=[lambda ids, logits: logits.roll(1)],
        **options,
    )
    (done,) = Engine(model, backend="dense").generate([ids], max_new_tokens=16, sampling=sampling)
    assert done.tokens == theirs


# ---- every way of running


@pytest.mark.parametrize("pages", few([3], [60]))
def test_submitted_together_each_gives_what_it_gives_alone(engine, alone, preempted, pages):
    engine = new_engine(engine, max_batch_size=8, max_slots=pages * BLOCK)
    submitted = submit_all(engine)
    engine.run()
    for request, expected in zip(submitted, alone, strict=True):
        assert request.error is None
        assert_same(request.completion, expected)
    assert bool(preempted) == (pages < 10), preempted
    check_empty(engine)


def test_in_one_stream_each_gives_what_it_gives_alone(engine, alone):
    plain = [n for n, (_, options) in enumerate(requests()) if "mask" not in options and n != 13]  # 13: fused
    asked = [requests()[n] for n in plain]
    found = engine.generate(
        [prompt for prompt, _ in asked],
        sampling=[options["sampling"] for _, options in asked],
        max_new_tokens=14,
        stop_token_ids=[STOP],
    )
    for done, n in zip(found, plain, strict=True):
        assert_same(done, alone[n])


def test_in_steps_compiled_for_more_each_gives_what_it_gives_alone(engine, alone, monkeypatch):
    """Run every step as if requests of all kinds were in it."""
    kinds_of = batch.Batch.kinds_of

    def of_all(self, given, split=None):
        kinds = union(Kinds.of(s, several=True) for s in SAMPLINGS.values())
        self._make_tables(kinds)
        return kinds._replace(split=kinds_of(self, given, split).split)

    monkeypatch.setattr(batch.Batch, "kinds_of", of_all)
    engine = new_engine(engine, max_batch_size=3, max_slots=60 * BLOCK)
    submitted = submit_all(engine)
    engine.run()
    for request, expected in zip(submitted, alone, strict=True):
        assert_same(request.completion, expected)


@pytest.mark.exhaustive
def test_submitted_and_compiled_each_gives_what_it_gives_alone(engine, alone):
    names = "penalties", "functions", "grammar and more"
    engine = new_engine(engine, compile=True, max_batch_size=2, max_slots=60 * BLOCK, prefill_tokens=64)
    asked = [
        (*request, done) for request, name, done in zip(requests(), SAMPLINGS, alone, strict=False) if name in names
    ]
    submitted = [engine.submit(prompt, **options) for prompt, options, _ in asked]
    engine.run()
    for request, (_, _, expected) in zip(submitted, asked, strict=True):
        assert_same(request.completion, expected)


@pytest.mark.exhaustive
def test_compiled_it_is_the_same_and_compiles_nothing_again(engine):
    other = Engine(engine.model, engine.tokenizer, compile=True)
    sampling = [SAMPLINGS["functions"], SAMPLINGS["grammar"]]
    prompts = [random_ids(9), random_ids(40, 1)]
    expected = engine.generate(prompts, sampling=sampling, **OPTIONS)
    counts = []
    for _ in range(2):
        for found, done in zip(other.generate(prompts, sampling=sampling, **OPTIONS), expected, strict=True):
            assert_same(found, done)
        counts.append(other.graphs.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("ahead", few([True], [False]))
def test_requests_that_need_the_host_run_ahead_too(engine, alone, read_later, ahead):
    """Read tokens a step later, as on CUDA."""
    engine = new_engine(engine, max_batch_size=8, max_slots=60 * BLOCK)
    engine.scheduler._ahead = ahead
    waiting = []
    long = engine.submit(random_ids(9), max_new_tokens=90, stop_token_ids=())
    submitted = submit_all(engine)
    while not engine.scheduler.idle:
        engine.step()
        waiting.append((any(r.processors for r in engine.scheduler.running), bool(engine.scheduler._pending)))
    for request, expected in zip(submitted, alone, strict=True):
        assert_same(request.completion, expected)
    assert [step.token for step in long.steps] == engine.generate(
        [random_ids(9)], max_new_tokens=90, stop_token_ids=()
    )[0].tokens
    assert {(False, True), (True, True)} <= {*waiting} if ahead else not any(pending for _, pending in waiting)


def test_without_waiting_for_tokens_the_text_would_be_another(engine, alone, read_later, monkeypatch):
    monkeypatch.setattr(Request, "new_tokens", property(lambda self: [step.token for step in self.steps[:-1]]))
    engine = new_engine(engine, max_batch_size=8, max_slots=60 * BLOCK)
    submitted = submit_all(engine)
    engine.run()
    assert sum(r.completion.tokens != done.tokens for r, done in zip(submitted, alone, strict=True)) >= 4


@pytest.mark.parametrize("mutant", few(["stale bias"], ["stale counts", "no split"]))
def test_the_comparison_of_ways_catches(engine, alone, monkeypatch, mutant):
    if mutant == "stale bias":
        assign = slot_tables.SlotTables.assign

        def stale(self, request, slot):
            if request.kinds.bias:
                assign(self, request, slot)
            else:
                assign(self._replace(bias=None), request, slot)

        monkeypatch.setattr(slot_tables.SlotTables, "assign", stale)
    elif mutant == "stale counts":
        monkeypatch.setattr(slot_tables.np, "unique", lambda *a, **k: (batch.np.array([20]), batch.np.array([3])))
    else:
        kinds_of = batch.Batch.kinds_of
        monkeypatch.setattr(batch.Batch, "kinds_of", lambda *given: kinds_of(*given)._replace(split=False))
    engine = new_engine(engine, max_batch_size=2, max_slots=60 * BLOCK)
    submitted = submit_all(engine)
    engine.run()
    assert any(r.completion.tokens != done.tokens for r, done in zip(submitted, alone, strict=True))


def test_requests_without_processors_never_reach_the_host(engine, monkeypatch):
    calls = []
    monkeypatch.setattr(batch, "process", lambda *given: calls.append(given) or {})
    engine = new_engine(engine, max_batch_size=8, max_slots=60 * BLOCK)
    for n, name in enumerate(("plain", "bias", "penalties", "rewards", "typical", "late")):
        engine.submit(random_ids(20, n), sampling=SAMPLINGS[name], **OPTIONS)
    engine.run()
    engine.generate([random_ids(9)] * 2, sampling=[SAMPLINGS["late"], SAMPLINGS["typical"]], **OPTIONS)
    assert not calls


@pytest.mark.parametrize("way", few(["cache"], ["edit", "capture"]))
def test_requests_that_run_alone_choose_in_the_same_way(engine, way):
    prompt, before = random_ids(20), random_ids(9, 2)
    for name in ("functions", "penalties", "late", "ngrams", "grammar and more"):
        found = []
        for submitted in (False, True):
            given = {"edit": edits.scale("z", 0.5)} if way == "edit" else {"capture": Capture("z", layers=0)}
            if way == "cache":
                cache = engine.model.new_cache(1, 100)
                with torch.no_grad():
                    engine.model(torch.tensor([before]), cache=cache)
                given = {"cache": cache, "cached_ids": before if submitted else [before]}
            options = OPTIONS | {"sampling": SAMPLINGS[name]} | given
            if submitted:
                request = engine.submit(prompt, **options)
                engine.run()
                found.append(request.completion)
            else:
                found += engine.generate([prompt], **options)
        assert_same(*found)
        if way == "cache" and name in ("penalties", "ngrams"):  # of those tokens too
            assert found[0].tokens == by_transformers(engine.model, [*before, *prompt], 12, SAMPLINGS[name])


def test_of_several_prompts_functions_see_the_ids_of_the_first_and_the_combined_logits(engine):
    first, second, seen = random_ids(9), random_ids(20, 1), []

    def note(ids, logits):
        seen.append((ids, logits.clone()))
        return logits

    (done,) = engine.generate([Ensemble([first, second])], sampling=Sampling(processors=[note]), **OPTIONS)
    assert [ids for ids, _ in seen] == [[*first, *done.tokens[:n]] for n in range(len(done.tokens))]
    with torch.no_grad():
        each = [engine.model(torch.tensor([ids]))[0, -1].softmax(-1) for ids in (first, second)]
    torch.testing.assert_close(seen[0][1].softmax(-1), sum(each) / 2, atol=1e-5, rtol=1e-4)


# ---- log-probabilities


def test_top_logprobs_are_the_models_own_before_any_filter(engine):
    prompt = random_ids(20)
    sampling = Sampling(temperature=2.0, seed=1, top_logprobs=7, logit_bias={9: 9.0}, processors=[shifted])
    (done,) = engine.generate([prompt], sampling=sampling, **OPTIONS)
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*prompt, *done.tokens]]))[0, len(prompt) - 1 : -1]
    values, ids = logits.double().log_softmax(-1).topk(7)
    assert [[id for id, _ in most] for most in done.top_logprobs] == ids.tolist()
    found = torch.tensor([[value for _, value in most] for most in done.top_logprobs], dtype=torch.float64)
    torch.testing.assert_close(found, values, atol=2e-5, rtol=2e-5)
    beside = engine.generate([prompt, prompt], sampling=[sampling, Sampling(top_logprobs=VOCAB)], **OPTIONS)
    assert [len(most) for most in beside[1].top_logprobs] == [VOCAB] * 12
    assert [len(most) for most in beside[0].top_logprobs] == [7] * 12
    assert not engine.generate([prompt], **OPTIONS)[0].top_logprobs


# ---- a model of its own weights


@pytest.mark.exhaustive
@pytest.mark.weights
def test_a_real_model_chooses_as_generate_of_transformers(demo_folder):
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    engine = Engine(Llama.from_pretrained(demo_folder, device="cpu", dtype=torch.float32), tokenizer, backend="dense")
    reference = transformers.AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32)
    ids = tokenizer.encode("The capital of France is Paris. The capital of Italy is")
    common = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.1, "min_new_tokens": 12}
    found = []
    for bias, banned in (({}, [30]), ({7042: 3.0, 28: -5.0, 2: 9.0}, [30, 198])):
        theirs = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            generation_config=transformers.GenerationConfig(
                do_sample=False,
                max_new_tokens=24,
                eos_token_id=2,
                pad_token_id=0,
                suppress_tokens=banned,
                sequence_bias=[[[id], value] for id, value in bias.items()] or None,
                **common,
            ),
            logits_processor=[lambda ids, scores: scores - 0.5 * (torch.arange(scores.shape[-1]) % 7 == 0)],
        )[0, len(ids) :].tolist()
        sampling = Sampling(
            logit_bias=bias,
            banned_tokens=banned,
            processors=[lambda ids, logits: logits - 0.5 * (torch.arange(len(logits)) % 7 == 0)],
            **common,
        )
        (done,) = engine.generate([ids], sampling=sampling, max_new_tokens=24, stop_token_ids=[2])
        request = engine.submit(ids, sampling=sampling, max_new_tokens=24, stop_token_ids=[2])
        engine.run()
        assert done.tokens == request.completion.tokens == theirs
        found.append(theirs)
    assert found[0] != found[1]
    mutated = dataclasses.replace(sampling, no_repeat_ngram_size=0, repetition_penalty=1.0)
    assert engine.generate([ids], sampling=mutated, max_new_tokens=24, stop_token_ids=[2])[0].tokens != theirs


@pytest.mark.exhaustive
@pytest.mark.weights
def test_a_real_model_writes_json_that_conforms(demo_folder):
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    engine = Engine(Llama.from_pretrained(demo_folder, device="cpu"), tokenizer, backend="dense")
    properties = {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}}
    schema = {"type": "object", "properties": properties, "required": ["name", "age"], "additionalProperties": False}
    prompts = [tokenizer.encode(text) for text in ("A person as JSON:", "Once upon a time")]
    for n, request in enumerate(
        [
            engine.submit(
                prompt,
                sampling=Sampling(grammar=Grammar.json_schema(schema), temperature=1.0, top_p=0.9, seed=seed),
                max_new_tokens=200,
            )
            for prompt in prompts
            for seed in range(2)
        ]
    ):
        engine.run()
        written = json.loads(request.completion.text)
        assert written.keys() == {"name", "age"}, n
        assert len(written["name"]) <= 12
        assert type(written["age"]) is int
        assert written["age"] <= 150
