"""Engines whose caches are in 8 bits give what keys and values give that were rounded beforehand; see
test_cache_8_bits.py."""

import pytest
import torch
from generation_helpers import assert_same, poisoned_model
from helpers import few
from kv_dtype_helpers import FAULTS, FP8, break_it, in_8_bits, rounding, uneven
from request_helpers import NEW, check_empty, random_ids, random_model, tokens_of

from llama_flex import Capture, Engine, Ensemble, Sampling, fuse, masks, score, scores
from llama_flex.engine import explain, model_runner
from llama_flex.engine.output import NonFiniteLogitsError
from llama_flex.engine.scheduler import _pages_that_fit
from llama_flex.masks.layout import BLOCK

MODEL = uneven(random_model())
SINGLE = uneven(random_model(), torch.float32)
RANDOM = Sampling(temperature=0.9, top_p=0.9, seed=5)
PROMPTS = [random_ids(300), random_ids(256) + random_ids(40, 1), random_ids(20), random_ids(129)]
FUSED = fuse([random_ids(60), random_ids(70)], prefix=random_ids(10), suffix=random_ids(3), weights=[1, 2])
CASES = [
    *((ids, {}) for ids in PROMPTS),
    (PROMPTS[0], {"sampling": RANDOM}),
    (PROMPTS[0], {"mask": masks.sliding_window(60), "score_mod": scores.softcap(3.0)}),
    (FUSED, {}),
    (Ensemble([random_ids(115), random_ids(50)], "max"), {}),
]


@pytest.fixture(scope="module")
def expected() -> list:
    """What each case gives alone with rounded keys and values."""
    engine = Engine(MODEL, backend="dense")
    return [engine.generate([ids], edit=rounding(MODEL), **NEW, **options)[0] for ids, options in CASES]


def engine_of(model=MODEL, **options) -> Engine:
    """Make an engine whose caches are in 8 bits."""
    return Engine(model, kv_dtype="fp8", **({"backend": "dense"} | options))


@pytest.mark.parametrize("backend", ["dense", "flex"])
def test_streams(expected, backend):
    engine = engine_of(backend=backend)
    assert engine.new_cache(1, 5).layers[0].k.dtype == FP8
    for (ids, options), one in zip(CASES, expected, strict=True):
        assert_same(engine.generate([ids], **NEW, **options)[0], one)


def submitted(engine: Engine) -> list:
    """Submit all cases, run them together, and return their completions."""
    requests = [engine.submit(ids, **NEW, **options) for ids, options in CASES]
    engine.run()
    return [request.completion for request in requests]


@pytest.mark.parametrize("backend", ["dense", "flex"])
def test_requests(expected, backend):
    engine = engine_of(backend=backend, max_batch_size=4, max_slots=8 * BLOCK, prefill_tokens=256)
    assert engine.scheduler.cache.layers[0].k.dtype == FP8
    for found, one in zip(submitted(engine), expected, strict=True):
        assert_same(found, one)
    check_empty(engine)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_of_requests_finds(expected, fault, monkeypatch):
    break_it(monkeypatch, fault)
    engine = engine_of(max_batch_size=8, max_slots=30 * BLOCK)
    found = submitted(engine)
    with pytest.raises(AssertionError):
        list(map(assert_same, found, expected))


def test_a_prefix_within_a_page_is_copied(prefilled):
    ids, sampling = random_ids(300), Sampling(temperature=1.0, seed=11)
    reference = Engine(MODEL, backend="dense")
    engine = engine_of(max_batch_size=4, max_slots=20 * BLOCK, prefill_tokens=1024)
    first = engine.submit(ids, **NEW, sampling=sampling)
    engine.run()
    prefilled.clear()
    longer = [ids[:290] + random_ids(20, n) for n in range(2)]
    requests = [engine.submit(each, **NEW, sampling=sampling) for each in longer]
    engine.run()
    assert min(start for _, start in prefilled) >= 256
    for request, prompt in zip([first, *requests], [ids, *longer], strict=True):
        (one,) = reference.generate([prompt], edit=rounding(MODEL), sampling=sampling, **NEW)
        assert_same(request.completion, one)


def test_a_request_alone_with_captures_or_a_cache(expected):
    engine = engine_of(max_batch_size=2, max_slots=8 * BLOCK)
    capture, cache = Capture("attention", where=[5]), engine.new_cache(1, 320)
    requests = [
        engine.submit(PROMPTS[0], capture=capture, **NEW),
        engine.submit(PROMPTS[0], cache=cache, **NEW),
        engine.submit(PROMPTS[2], **NEW),
    ]
    engine.run()
    for request, one in zip(requests, (expected[0], expected[0], expected[2]), strict=True):
        assert_same(request.completion, one)
    assert capture["attention", 0].sum(-1).allclose(torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("auto", few([True], [False]))
def test_compiled(auto, monkeypatch):
    """Streams and requests in float32; a stream that begins uncompiled too."""
    monkeypatch.setitem(model_runner.COMPILES_BY_ITSELF, "cpu", True)
    monkeypatch.setattr(model_runner, "UNCOMPILED_STEPS", 3)
    reference = Engine(SINGLE, backend="dense")
    alone = [reference.generate([ids], edit=rounding(SINGLE), **NEW)[0].tokens for ids in PROMPTS[2:3]]
    engine = Engine(SINGLE, kv_dtype="fp8", compile="auto" if auto else True, max_batch_size=2, max_slots=6 * BLOCK)
    for _ in range(2):  # compiled, then recorded and replayed
        assert [engine.generate([ids], **NEW)[0].tokens for ids in PROMPTS[2:3]] == alone
        if not auto:
            requests = [engine.submit(ids, **NEW) for ids in PROMPTS[2:3]]
            engine.run()
            assert [tokens_of(r) for r in requests] == alone
    assert "keys and values in fp8" in engine.explain()


def test_a_model_and_its_caches_in_8_bits_can_be_used_with_any_engine(expected):
    cache = in_8_bits(MODEL).new_cache(1, 320)
    (found,) = Engine(MODEL, backend="dense").generate([PROMPTS[0]], cache=cache, **NEW)
    assert_same(found, expected[0])


def test_scores():
    given = random_ids(30), [random_ids(40, 1), random_ids(25, 2)]
    found, plain = score(engine_of(), *given), score(Engine(MODEL, backend="dense"), *given)
    rounded = score(Engine(MODEL, backend="dense"), *given, edit=rounding(MODEL))
    for ours, theirs, other in zip(found, rounded, plain, strict=True):
        torch.testing.assert_close(ours.logprobs, theirs.logprobs)
        assert (ours.logprobs - other.logprobs).abs().max() > 1e-3


def test_pages_that_held_nan_are_zeroed():
    engine = Engine(poisoned_model(5), kv_dtype="fp8", backend="dense", max_batch_size=1, max_slots=BLOCK)
    poisoned = engine.submit([3, 5, 4], max_new_tokens=1)
    engine.run()
    assert isinstance(poisoned.error, NonFiniteLogitsError)
    assert any(kv.k.float().isnan().any() for kv in engine.scheduler.cache.layers)
    request = engine.submit([3], max_new_tokens=1)
    engine.run()
    assert tokens_of(request) == [4]


def test_twice_as_many_pages_fit(monkeypatch):
    monkeypatch.setattr("llama_flex.engine.scheduler._free_memory", lambda: 10**9)
    model = random_model().bfloat16()
    plain, found = (_pages_that_fit(model, kv_dtype, 0.5) for kv_dtype in (None, "fp8"))
    assert 1.9 * plain < found < 2 * plain
    assert explain.bytes_per_step(model, [100]) - explain.bytes_per_step(model, [100], "fp8") == 100 * 2 * 2 * 32


def test_a_model_of_another_dtype_gets_pages_with_scales_of_its_dtype():
    engine = Engine(random_model(), kv_dtype="fp8", backend="dense", max_batch_size=1, max_slots=BLOCK)
    for dtype in (torch.float32, torch.bfloat16):
        engine.model.to(dtype)
        engine.submit([5, 6, 7], **NEW)
        engine.run()
        (kv, *_) = engine.scheduler.cache.layers
        assert (kv.k.dtype, kv.model_dtype) == (FP8, dtype)


@pytest.mark.parametrize("wrong", ["int8", torch.float8_e4m3fn, True, ""])
def test_another_kv_dtype_is_refused(wrong):
    for make in (lambda: Engine(MODEL, kv_dtype=wrong), lambda: MODEL.new_cache(1, 5, kv_dtype=wrong)):
        with pytest.raises(ValueError, match=r"^kv_dtype .* is not known; choose 'fp8'$"):
            make()
