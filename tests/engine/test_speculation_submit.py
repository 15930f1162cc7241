"""Drafts of submitted requests change none of their tokens: batches that change, preemption, ends within drafts."""

import gc
import sys

import pytest
import torch
from generation_helpers import ONE, poisoned_model
from request_helpers import random_model
from speculation_helpers import model, oracle, small_model

from llama_flex import Capture, Engine, Sampling, masks, scores
from llama_flex.engine.batch import Batch

PROMPTS = [[3, 4, 5, 6, 3, 4, 5, 6, 3, 4], list(range(2, 32)), [9] * 20, [5], list(range(3, 33)) * 4]
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=0.8, top_p=0.9, seed=4),
    "all": Sampling(
        temperature=1.0,
        top_k=20,
        seed=3,
        repetition_penalty=1.1,
        frequency_penalty=0.3,
        top_logprobs=3,
        min_new_tokens=9,
    ),
}


def served(engine: Engine, count: int = len(PROMPTS), new: int = 40, **options):
    """Submit prompts, one with every step, and return the requests once all have ended."""
    requests = []
    while len(requests) < count or not engine.scheduler.idle:
        if len(requests) < count:
            requests.append(engine.submit(PROMPTS[len(requests)], max_new_tokens=new, **options))
        engine.step()
    return requests


def outcome(request):
    return (
        [s.token for s in request.steps],
        request.finish_reason,
        [s.top_logprobs and len(s.top_logprobs) for s in request.steps],
    )


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert outcome(a) == outcome(b)
        for x, y in zip(a.steps, b.steps, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=5e-4)


def right(requests, probability: float = 0.9):
    """Return a drafter that knows what requests got, and is right with a probability."""
    return oracle([[*p, *(s.token for s in r.steps)] for p, r in zip(PROMPTS, requests, strict=False)], probability)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("drafter", ["oracle", "lookup", "self"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_drafts_change_no_token(sampling, drafter, ahead, read_later):
    options = {"sampling": SAMPLINGS[sampling], "stop_token_ids": [7]}
    expected = served(Engine(model(), compile="auto"), **options)
    engine = Engine(model(), compile="auto", speculate=right(expected) if drafter == "oracle" else drafter)
    engine.scheduler._ahead = ahead
    assert_same(served(engine, **options), expected)
    if drafter == "oracle":
        assert engine.speculation.accepted > engine.speculation.drafted / 2
    assert engine.scheduler.block_manager.available == engine.scheduler.block_manager.num_pages


@pytest.mark.parametrize("mask", [masks.sliding_window(7), masks.bidirectional(), masks.prefix_lm(6)], ids=str)
def test_drafts_change_no_token_under_a_mask(mask):
    options = {"mask": mask, "score_mod": scores.alibi(4), "sampling": SAMPLINGS["sampled"], "stop_token_ids": ()}
    expected = served(Engine(model(), compile="auto"), 3, 20, **options)
    assert_same(served(Engine(model(), compile="auto", speculate=right(expected)), 3, 20, **options), expected)


def test_drafts_stay_within_the_pages_of_a_text():
    """So few pages that requests are preempted, and drafts end where a page does."""
    expected = served(Engine(model(), compile="auto"), new=150, sampling=Sampling(), stop_token_ids=())
    engine = Engine(model(), compile="auto", speculate=right(expected), max_slots=640, max_batch_size=4)
    assert_same(served(engine, new=150, sampling=Sampling(), stop_token_ids=()), expected)
    assert engine.speculation.accepted > 300


def test_requests_with_processors_run_beside_those_with_drafts():
    def plain(ids, logits):
        return logits

    expected = served(Engine(model(), compile="auto"), sampling=Sampling(), stop_token_ids=())
    engine = Engine(model(), compile="auto", speculate=right(expected))
    requests = []
    for number, prompt in enumerate(PROMPTS):
        sampling = Sampling(processors=[plain]) if number % 2 else Sampling()
        requests.append(engine.submit(prompt, max_new_tokens=40, sampling=sampling, stop_token_ids=()))
    engine.run()
    assert_same(requests, expected)
    assert [bool(r.drafts.steps) for r in requests] == [True, False, True, False, True]


def test_an_error_in_a_drafter_ends_its_request_only():
    def fails(ids, most):
        if ids[0] == 9:
            raise RuntimeError("no idea")
        return []

    engine = Engine(model(), compile="auto", speculate=fails)
    requests = served(engine, sampling=Sampling(), stop_token_ids=())
    assert [r.finish_reason for r in requests] == ["length", "length", "error", "length", "length"]
    assert "no idea" in str(requests[2].error)


@pytest.mark.parametrize("steps", [0, 4, 1000])
@pytest.mark.parametrize("capturing", [False, True])
def test_requests_go_on_after_the_model_was_moved(steps, capturing, monkeypatch):
    """Before the first step, in the middle, or after the last: of requests that run together, and of streams."""
    mine, unraisable = random_model(), []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    options = {"max_new_tokens": 20, "sampling": Sampling(), "stop_token_ids": ()}
    expected = Engine(mine).generate(PROMPTS[:1], **options)[0].tokens
    engine = Engine(mine, compile="auto", speculate="self", max_slots=512)
    first = engine.submit(PROMPTS[0], capture=Capture("resid_post") if capturing else None, **options)
    for _ in range(steps):
        engine.step()
    mine.to(torch.float64)
    second = engine.submit(PROMPTS[0], **options)
    engine.run()
    gc.collect()
    assert [r.completion.tokens for r in (first, second)] == [expected] * 2
    assert unraisable == []
    assert engine.speculation.drafted > 0


@pytest.mark.parametrize("capturing", [False, True])
def test_what_came_of_drafts_is_counted_once(capturing):
    def fails_in_the_end(step):
        if step.finish_reason is not None:
            raise RuntimeError("no idea")

    options = {"max_new_tokens": 30, "sampling": Sampling(), "stop_token_ids": ()}
    expected = served(Engine(model(), compile="auto"), 1, 30, sampling=Sampling(), stop_token_ids=())
    engine = Engine(model(), compile="auto", speculate=right(expected, 1.0))
    capture = Capture("resid_post") if capturing else None
    engine.submit(PROMPTS[0], callback=fails_in_the_end, capture=capture, **options)
    engine.run()
    assert (engine.speculation.decoded, engine.speculation.decode_steps) == (29, engine.speculation.steps)


def test_a_request_that_a_drafter_cancels_leaves_its_cache_as_it_is():
    def cancels(ids, most):
        if len(ids) == len(PROMPTS[0]) + 4:
            engine.cancel(request)
        return []

    engine = Engine(model(), compile="auto", speculate=cancels)
    cache = engine.new_cache(1, 128)
    request = engine.submit(PROMPTS[0], cache=cache, max_new_tokens=20, sampling=Sampling(), stop_token_ids=())
    engine.run()
    assert (request.finish_reason, len(request.steps)) == ("cancelled", 4)
    assert cache.length.tolist() == [cache.reserved] == [len(PROMPTS[0]) + 3]


def test_a_model_with_pages_of_its_own_is_refused():
    with pytest.raises(ValueError, match="speculate='self' or 'lookup'"):
        Engine(model(), speculate=small_model()).submit([1, 2])


@pytest.mark.parametrize("fault", ["none", "place", "noise"])
def test_a_fault_is_found(fault, monkeypatch):
    options = {"sampling": SAMPLINGS["sampled"], "stop_token_ids": ()}
    expected = served(Engine(model(), compile="auto"), **options)
    engine = Engine(model(), compile="auto", speculate=right(expected, 0.7))
    fill = Batch._fill_drafts

    def faulty(self, host, rows, drafts):
        fill(self, host, rows, drafts)
        if fault == "place":
            host["tokens"][1, :, 1:] += 1
        elif fault == "noise":
            host["ints"][3] += 1

    monkeypatch.setattr(Batch, "_fill_drafts", faulty)
    found = served(engine, **options)
    if fault == "none":
        assert_same(found, expected)
        return
    with pytest.raises(AssertionError):
        assert_same(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("drafter", ["oracle", "lookup", "self"])
def test_drafts_change_no_token_on_cuda(drafter):
    options = {"sampling": SAMPLINGS["sampled"], "stop_token_ids": [7]}
    expected = served(Engine(model(device="cuda"), compile=True), **options)
    made = right(expected) if drafter == "oracle" else drafter
    assert_same(served(Engine(model(device="cuda"), compile=True, speculate=made), **options), expected)


@pytest.mark.parametrize("backend", ["dense", "flex"])
@pytest.mark.parametrize("submitted", [False, True])
def test_drafts_that_are_not_finite_spoil_nothing(submitted, backend):
    """What a rejected draft leaves is multiplied by 0 later, and 0 * NaN is NaN."""
    poisoned = poisoned_model(1)
    options = {"max_new_tokens": 6, "sampling": Sampling(), "stop_token_ids": ()}

    def run(speculate):
        engine = Engine(poisoned, backend=backend, speculate=speculate)
        if not submitted:
            return engine, engine.generate([[ONE]], **options)[0].tokens
        request = engine.submit([ONE], **options)
        engine.run()
        return engine, request.new_tokens

    _, expected = run(None)
    engine, found = run(lambda ids, most: [1] * most)
    assert found == expected
    assert engine.speculation.steps == 1, "nobody drafts for this text any more"
    _, found = run(lambda ids, most: [expected[len(ids) - 1], 1])
    assert found == expected
