"""Requests with captures, edits or a cache of the caller's: each gives what it gives alone, beside all others."""

import asyncio
import gc
import random
import weakref

import pytest
import torch
from helpers import few
from request_helpers import (
    NEW,
    check_empty,
    new_engine,
    random_ids,
    random_model,
    submit_and_run,
    tokens_alone,
    tokens_of,
)

from llama_flex import Capture, Engine, Ensemble, Mask, Sampling, edits, fuse, masks, scores
from llama_flex.cache import Cache
from llama_flex.engine.fusion import AnyPrompt
from llama_flex.engine.request import Request
from llama_flex.engine.stream import Stream
from llama_flex.masks.layout import BLOCK

CANCEL = []  # what an edit calls; what it captures would be copied with its tensors
SITES = "resid_post", "z", "k", "attention"


def new_capture() -> Capture:
    """Return a capture of some tokens."""
    return Capture(*SITES, layers=1, where=lambda t: t.index % 7 == 0)


def check_same(found: Capture, expected: Capture) -> None:
    """Check that two captures hold the same, up to rounding: the largest are about 30."""
    assert found.tokens.index.tolist() == expected.tokens.index.tolist()
    assert found.tokens.position.tolist() == expected.tokens.position.tolist()
    for site in SITES:
        torch.testing.assert_close(found[site, 1], expected[site, 1], atol=2e-4, rtol=1e-4)


def kinds(seed: int) -> list[tuple[AnyPrompt, dict]]:
    """Return prompts and options of many kinds; all have edits that change the text."""
    ids = [random_ids(n, seed) for n in (300, 140, 129, 20, 128, 1)]
    steering = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return [
        (ids[0], {"edit": edits.add("resid_mid", steering, layers=0)}),
        (ids[1], {"edit": [edits.scale("z", 0.3), edits.ablate([1, 2], layers=1)]}),
        (Ensemble([ids[3], ids[4]], "max"), {"edit": edits.scale("resid_pre", torch.tensor([[[0.2]], [[1.5]]]))}),
        (fuse([ids[3], ids[2]], positions="parallel", weights=[2, 1]), {"edit": edits.add("v", 0.7)}),
        (ids[2], {"mask": masks.sliding_window(40), "edit": edits.add("mlp_post", 0.5, where=lambda t: t.index > 60)}),
        (ids[4], {"score_mod": scores.softcap(2.0), "edit": edits.replace("q", 0.1, layers=0, where=[3, 5])}),
        (
            ids[5],
            {
                "sampling": Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=seed),
                "edit": edits.scale("k", 0.5),
            },
        ),
    ]


@pytest.mark.parametrize(
    ("backend", "compile"),
    [
        ("dense", False),
        pytest.param("flex", False, marks=pytest.mark.exhaustive),
        pytest.param("flex", True, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("pages", few([12], [60]))
def test_requests_with_captures_and_edits_give_what_each_gives_alone(
    dense, request, preempted, backend, compile, pages
):
    engine = new_engine(
        request.getfixturevalue(backend),
        compile=compile,
        max_batch_size=8,
        max_slots=pages * BLOCK,
        max_length=384,
        prefill_tokens=128,
    )
    rng, submitted = random.Random(pages), []
    for prompt, options in kinds(1) + kinds(2):
        options |= {"max_new_tokens": rng.choice([1, 9, 20, 70]), "stop_token_ids": range(3, 160, 60)}
        captures = [new_capture(), new_capture()]
        submitted.append((prompt, options, captures, engine.submit(prompt, capture=captures[0], **options)))
        plain = options | {"edit": None}
        submitted.append((prompt, plain, None, engine.submit(prompt, priority=rng.choice([0, 0, 1]), **plain)))
        for _ in range(rng.choice([0, 0, 3])):
            engine.step()
    engine.run()
    changed = 0
    for prompt, options, captures, done in submitted:
        if captures is None:
            assert tokens_of(done) == tokens_alone(dense, prompt, **options)
        else:
            assert tokens_of(done) == tokens_alone(dense, prompt, capture=captures[1], **options)
            check_same(*captures)
            changed += tokens_of(done) != tokens_alone(dense, prompt, **options | {"edit": None})
    assert changed > 7
    assert bool(preempted) == (pages < 60)
    check_empty(engine)


@pytest.mark.exhaustive
def test_requests_of_the_same_structure_share_compiled_steps_whatever_their_values(flex):
    engine = new_engine(flex, compile=True, max_batch_size=2, max_slots=6 * BLOCK, prefill_tokens=128)

    def run(factor: float, seed: int) -> None:
        edit = edits.scale("z", torch.tensor(factor), layers=1)
        expected = tokens_alone(flex, random_ids(150, seed), **NEW, edit=edit)
        given = {"edit": edit, "capture": Capture("z", layers=0)}
        assert submit_and_run(engine, random_ids(150, seed), max_new_tokens=6, **given) == expected

    run(0.3, 1)
    count = engine.graphs.count
    for n in range(2, 6):
        run(0.3 * n, n)
    assert engine.graphs.count == count


def turns_of(model, rolling: bool, run) -> tuple[list[list[int]], Cache]:
    """Run three turns on one cache, as `run(ids, cache, cached)` does."""
    cache = model.new_rolling_cache(1, 60, 3, largest_append=128) if rolling else model.new_cache(1, 700)
    turns, cached = [], []
    for n, length in enumerate((200, 30, 140)):
        ids = [*(turns[-1][-1:] if turns else []), *random_ids(length, n)]
        turns.append(run(ids, cache, cached))
        cached += ids + turns[-1][:-1]
    return turns, cache


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("compile", few([False], [True]))
def test_a_request_goes_on_after_the_tokens_of_a_cache(dense, flex, rolling, compile):
    engine = new_engine(flex if compile else dense, compile=compile, max_batch_size=2, max_slots=512)
    options = NEW | {"sampling": Sampling(repetition_penalty=1.5), "score_mod": scores.softcap(4.0)}
    beside = [engine.submit(random_ids(100), max_new_tokens=40, stop_token_ids=()) for _ in range(2)]

    def alone(ids, cache, cached):
        return tokens_alone(dense, ids, cache=cache, cached_ids=[cached], **options)

    def submitted(ids, cache, cached):
        request = engine.submit(ids, cache=cache, cached_ids=cached, **options, priority=1)
        engine.run()
        return tokens_of(request)

    turns, reference = turns_of(dense.model, rolling, alone)
    others, cache = turns_of(engine.model, rolling, submitted)
    assert others == turns
    assert cache.length.tolist() == reference.length.tolist()
    held = reference.tokens.index >= 0
    found, expected = (c.layers[1][0].transpose(1, 2)[held] for c in (cache, reference))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(
        tokens_of(r) == tokens_alone(dense, random_ids(100), max_new_tokens=40, stop_token_ids=()) for r in beside
    )
    # The mutation: the penalty forgets what the cache holds.
    assert turns_of(dense.model, rolling, lambda ids, cache, cached: alone(ids, cache, []))[0] != turns
    check_empty(engine)


def test_an_ensemble_goes_on_after_the_rows_of_a_cache(dense):
    engine, caches = new_engine(dense, max_batch_size=2, max_slots=512), [dense.model.new_cache(2, 300) for _ in "ab"]
    for prompts in ([random_ids(20), random_ids(130)], [random_ids(5), random_ids(2)]):
        prompt = Ensemble(prompts, "mean")
        expected = tokens_alone(dense, prompt, cache=caches[0], **NEW)
        assert submit_and_run(engine, prompt, cache=caches[1], max_new_tokens=6) == expected
    check_empty(engine)


def test_what_an_unfinished_request_holds_is_refused_to_others(dense):
    engine, cache, capture = (
        new_engine(dense, max_batch_size=2, max_slots=512),
        dense.model.new_cache(1, 100),
        new_capture(),
    )
    first = engine.submit(random_ids(9), **NEW, cache=cache, capture=capture)
    for options, what in (({"cache": cache}, "cache"), ({"capture": [new_capture(), capture]}, "capture")):
        for _ in range(2):
            with pytest.raises(
                ValueError, match=f"the {what} belongs to request 0, which is not finished; give another"
            ):
                engine.submit([5], **options)
            engine.step()
    engine.cancel(first)
    engine.submit([5], **NEW, capture=capture)
    engine.run()
    check_empty(engine)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"edit": 5}, "edit takes one Edit"),
        ({"capture": "z"}, "capture takes one Capture"),
        ({"edit": edits.ablate(9)}, "the model has heads 0 to 3, not 9"),
        ({"edit": edits.scale("z", 2.0, layers=7)}, "the model has layers 0 to 1"),
        ({"cache": 5}, "cache must be made with model.new_cache"),
        ({"cached_ids": [5]}, "cached_ids needs the cache"),
        ({"cache": "two rows"}, "2"),
        ({"cache": "small"}, "cache of 128 tokens"),
        ({"cache": "ok", "cached_ids": [[5]]}, "cached_ids must hold a list of token ids"),
    ],
)
def test_wrong_captures_edits_and_caches_are_refused(dense, options, match):
    engine = new_engine(dense, max_batch_size=2, max_slots=512)
    caches = {"two rows": (2, 300), "small": (1, 128), "ok": (1, 300)}
    if options.get("cache") in caches:
        options = options | {"cache": dense.model.new_cache(*caches[options["cache"]])}
    with pytest.raises(ValueError, match=match):
        engine.submit(random_ids(128), max_new_tokens=9, **options)
    check_empty(engine)


def test_a_request_goes_on_after_what_its_cache_holds_when_it_begins(dense):
    engine, caches = new_engine(dense, max_batch_size=2, max_slots=512), [dense.model.new_cache(1, 100) for _ in "ab"]
    request = engine.submit(random_ids(9), **NEW, cache=caches[0])
    for cache in caches:
        dense.model(torch.tensor([[5, 6]]), cache=cache)
    full = engine.submit(random_ids(70), max_new_tokens=30, cache=(late := dense.model.new_cache(1, 128)))
    dense.model(torch.tensor([[5] * 40]), cache=late)
    engine.run()
    assert tokens_of(request) == tokens_alone(dense, random_ids(9), **NEW, cache=caches[1])
    assert caches[0].tokens.position.tolist() == caches[1].tokens.position.tolist()
    assert full.finish_reason == "error"
    assert "exceed the cache of 128 tokens" in str(full.error)
    check_empty(engine)


@pytest.mark.parametrize("chunks", [0, 1])
def test_a_request_that_is_cancelled_before_its_first_token_ends_so_and_frees_its_cache(dense, chunks):
    """Let a callback, or the request's own edit, cancel it before or within its prompt."""
    engine, cache = new_engine(dense, max_batch_size=4, max_slots=4096), dense.model.new_cache(1, 1000)
    again = []

    def cancel(step):
        if len(first.steps) == 2 - chunks:
            engine.cancel(second)
            again.append(engine.submit([5, 6], **NEW, cache=cache))

    def cancel_itself(x, tokens):
        if bool((tokens.index > 0).any()):
            CANCEL[0]()
        return x

    first = engine.submit(random_ids(10), **NEW, edit=edits.scale("z", 0.5), callback=cancel)
    second = engine.submit(random_ids(700), **NEW, cache=cache, priority=-1)
    third = engine.submit(random_ids(700), **NEW, edit=edits.Edit("z", cancel_itself))
    CANCEL[:] = [lambda: engine.cancel(third)]
    engine.run()
    assert [r.finish_reason for r in (first, second, third, *again)] == ["length", "cancelled", "cancelled", "length"]
    assert second.steps == third.steps == []
    held = int(cache.length) - 7
    reference = dense.model.new_cache(1, 1000)
    if held:
        dense.model(torch.tensor([random_ids(700)[:held]]), cache=reference)
    assert tokens_of(again[0]) == tokens_alone(dense, [5, 6], **NEW, cache=reference)
    check_empty(engine)


@pytest.mark.parametrize("how", ["preempted", "interrupted"])
def test_a_mask_that_looks_ahead_sees_no_more_when_a_request_is_computed_again(dense, preempted, how):
    engine = new_engine(dense, max_batch_size=2, max_slots=(3 if how == "preempted" else 20) * BLOCK)
    everything = Mask(lambda q, kv: kv.index >= 0)
    options = {"max_new_tokens": 20, "stop_token_ids": (), "mask": everything, "edit": edits.scale("z", 0.9)}
    raised = []

    def once(step):
        if how == "interrupted" and len(requests[1].steps) == 9 and not raised:
            raised.append(step)
            raise KeyboardInterrupt

    captures = [Capture("resid_post", "k"), Capture("resid_post", "k")]
    requests = [engine.submit(random_ids(n), **options, callback=once) for n in (120,)]
    requests.append(engine.submit(random_ids(121), **options, callback=once, capture=captures[0]))
    for _ in range(2):
        try:
            engine.run()
        except KeyboardInterrupt:
            assert how == "interrupted"
    assert tokens_of(requests[0]) == tokens_alone(dense, random_ids(120), **options)
    assert tokens_of(requests[1]) == tokens_alone(dense, random_ids(121), **options, capture=captures[1])
    for layer in range(2):
        found, expected = (capture["k", layer] for capture in captures)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert bool(preempted) == (how == "preempted")
    assert bool(raised) == (how == "interrupted")


def test_nothing_keeps_the_memory_of_a_stream_or_request_that_is_gone(dense):
    """Collect no cycles: on a GPU nothing would trigger that."""

    def left_early(start: int) -> weakref.ref:
        stream = dense.stream([random_ids(9)], **NEW)
        for _ in range(start):
            next(stream)
        (cache,) = (x for x in gc.get_objects() if isinstance(x, Cache) and x not in before)
        return weakref.ref(cache)

    def submitted(**options) -> list[weakref.ref]:
        engine = new_engine(dense, max_batch_size=2, max_slots=512)
        request = engine.submit(random_ids(9), **NEW, **options)
        engine.run()
        assert request.finished
        return [weakref.ref(x) for x in gc.get_objects() if isinstance(x, Stream)]

    def fails(x, tokens):
        if bool((tokens.index > 0).any()):
            raise ArithmeticError
        return x

    gc.collect()
    gc.disable()
    try:
        before = [x for x in gc.get_objects() if isinstance(x, Cache)]
        for start in (0, 1, 3):
            assert left_early(start)() is None
        cache = dense.model.new_cache(1, 100)
        alive = submitted(cache=cache) + submitted(edit=edits.scale("z", 0.5)) + submitted(edit=edits.Edit("z", fails))
        cache = weakref.ref(cache)
        assert [ref() for ref in alive] == []
        assert cache() is None
    finally:
        gc.enable()


def test_samples_cannot_share_a_cache_or_a_capture_and_none_is_submitted(dense):
    engine = new_engine(dense, max_batch_size=2, max_slots=512)
    sampling = Sampling(temperature=1.0, seed=1)
    with pytest.raises(ValueError, match="capture: only one request at a time can have it"):
        engine.submit_samples([5, 6], 2, sampling=sampling, capture=new_capture())
    assert not engine.scheduler.waiting
    capture = new_capture()
    (request,) = engine.submit_samples([5, 6], 1, sampling=sampling, capture=capture, max_new_tokens=3)
    engine.run()
    assert len(request.steps) == 3
    assert capture.count.tolist() == [1]


def test_a_cache_of_inference_mode_is_refused(dense):
    engine = new_engine(dense, max_batch_size=2, max_slots=512)
    with torch.inference_mode():
        cache = dense.model.new_cache(1, 100)
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode"):
        engine.submit([5, 6], cache=cache)


def test_an_edit_that_fails_or_makes_nan_ends_its_request_alone(dense):
    def failing(x, tokens):
        if bool((tokens.index > 100).any()):
            raise ArithmeticError("too far")
        return x

    engine = new_engine(dense, max_batch_size=4, max_slots=1024)
    requests = [
        engine.submit(random_ids(99), max_new_tokens=9, stop_token_ids=(), edit=edits.Edit("z", failing)),
        engine.submit(random_ids(99), **NEW, edit=edits.replace("z", torch.nan, where=[100])),
        engine.submit(random_ids(99), **NEW),
    ]
    engine.run()
    expected = tokens_alone(dense, random_ids(99), **NEW)
    assert [r.finish_reason for r in requests] == ["error", "error", "length"]
    assert "too far" in str(requests[0].error)
    assert "prompt 1 at new token 3" in str(requests[1].error)
    assert [tokens_of(r) for r in requests] == [expected[:3], expected[:2], expected]
    check_empty(engine)
    assert submit_and_run(engine, random_ids(99), max_new_tokens=6) == expected


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_fails_is_captured_once(dense, monkeypatch, read_later, ahead, error):
    """Let a step fail before or after it is computed: by an interrupt, the request goes on; by an error, it ends."""
    engine = new_engine(dense, max_batch_size=4, max_slots=1024)
    engine.scheduler._ahead = ahead
    step, calls, fails = engine.runner.step, 0, (2, 5, 9, 12)

    def failing(*given):
        nonlocal calls
        calls += 1
        found = step(*given) if calls % 2 or calls not in fails else None
        if calls in fails:
            raise error
        return found

    monkeypatch.setattr(engine.runner, "step", failing)
    caches = [dense.model.new_cache(1, 700), dense.model.new_rolling_cache(1, 60, 3, largest_append=128)]
    given = [{}, {"edit": edits.scale("z", 0.5)}, *({"cache": cache} for cache in caches)]
    expected, forks = [], [cache.fork() for cache in caches]
    captures = [(new_capture(), new_capture()) for _ in given]
    for options, (capture, _) in zip(given, captures, strict=True):
        cache = {"cache": forks[caches.index(options["cache"])]} if "cache" in options else {}
        expected.append(tokens_alone(dense, random_ids(150), **NEW, **options | cache, capture=capture))
    requests = [
        engine.submit(random_ids(150), **NEW, **options, capture=capture)
        for options, (_, capture) in zip(given, captures, strict=True)
    ]
    for _ in range(len(fails) + 1):
        try:
            engine.run()
        except KeyboardInterrupt:
            assert error is KeyboardInterrupt
    ended = [request.finish_reason for request in requests]
    assert (ended == ["length"] * 4) == (error is KeyboardInterrupt)
    for request, tokens, pair in zip(requests, expected, captures, strict=True):
        if request.finish_reason == "length":
            assert tokens_of(request) == tokens
            check_same(*pair)
        else:
            assert request.error is not None
            assert tokens_of(request) == tokens[: len(request.steps)]
    check_empty(engine)


def test_the_model_may_change_while_requests_run_alone():
    model = random_model()
    engine = Engine(model, backend="dense", max_batch_size=4, max_slots=1024)
    given = [{"edit": edits.add("z", torch.ones(16))}, {"cache": model.new_cache(1, 300)}]
    requests = [engine.submit(random_ids(140), **NEW, **options) for options in given]
    for _ in range(4):
        engine.step()
    before = [tokens_of(request) for request in requests]
    assert all(0 < len(tokens) < 6 for tokens in before)
    model.to(torch.float64)
    engine.run()
    assert [r.finish_reason for r in requests] == ["length", "error"]
    assert "float64" in str(requests[1].error)
    alone = Engine(model, backend="dense")
    assert tokens_of(requests[0]) == tokens_alone(alone, random_ids(140), **NEW, **given[0])
    check_empty(engine)


@pytest.mark.parametrize("compile", few([False], [True]))
def test_weights_that_are_replaced_are_seen_by_requests_that_run_alone(compile):
    model = random_model()
    engine = Engine(model, backend="dense", compile=compile, max_batch_size=4, max_slots=1024)
    requests = [
        engine.submit(random_ids(20), max_new_tokens=12, stop_token_ids=(), edit=edits.scale("z", s)) for s in (1, 2)
    ]
    for _ in range(6):
        engine.step()
    model.norm.weight = torch.nn.Parameter(-model.norm.weight)
    engine.run()
    for request in requests:
        tokens, logprobs = [step.token for step in request.steps], [step.logprob for step in request.steps]
        edit = edits.scale("z", request.number + 1)
        logits = model(torch.tensor([random_ids(20) + tokens[:-1]]), edit=edit, backend="dense")[0, 19:].log_softmax(-1)
        assert logits[6:].argmax(-1).tolist() == tokens[6:]
        assert logits[:6].argmin(-1).tolist() == tokens[:6]
        torch.testing.assert_close(logits[6:].amax(-1), torch.tensor(logprobs)[6:], atol=1e-4, rtol=0)


def test_a_mask_that_looks_ahead_sees_the_whole_prompt_of_a_request_that_runs_alone(dense):
    engine = new_engine(dense, max_batch_size=2, max_slots=1024, prefill_tokens=128)
    options = NEW | {"mask": masks.prefix_lm(200)}
    expected = tokens_alone(dense, random_ids(300), **options)
    request = engine.submit(random_ids(300), **options, capture=new_capture())
    engine.run()
    assert tokens_of(request) == expected


def test_steps_come_asynchronously_and_an_error_is_raised_after_them(dense):
    engine = new_engine(dense, max_batch_size=2, max_slots=512)

    async def tokens(request: Request) -> list[int]:
        return [step.token async for step in request]

    async def both() -> list:
        given = ({"edit": edits.scale("z", 0.5)}, {"edit": edits.replace("z", torch.nan, where=[20])})
        return await asyncio.gather(
            *(tokens(engine.submit(random_ids(19), **NEW, **options)) for options in given), return_exceptions=True
        )

    found, error = asyncio.run(both())
    assert found == tokens_alone(dense, random_ids(19), **NEW, edit=edits.scale("z", 0.5))
    assert "NaN" in str(error)
    check_empty(engine)


def test_the_captures_test_fails_if_tokens_that_are_computed_again_are_captured_twice(dense, monkeypatch):
    """The mutation: a request that was interrupted keeps what it had captured."""
    monkeypatch.setattr(Capture, "rewind", lambda self, parts, lengths: None)
    with pytest.raises(AssertionError):
        test_a_step_that_fails_is_captured_once(dense, monkeypatch, None, False, KeyboardInterrupt)
