"""A cache that the caller gives: generation goes on from the tokens in it."""

import pytest
import torch
from generation_helpers import BANG, CAFE_AF, E1, E2, ONE, assert_same
from helpers import few, random_ids

from llama_flex import Sampling


@pytest.mark.parametrize("first", [5, 128, 200])
def test_two_calls_with_one_cache_are_one_call_on_the_whole(engine, first):
    cache = engine.model.new_cache(1, 512)
    start, more = random_ids(first, 18), random_ids(135, 19)
    (one,) = engine.generate([start], max_new_tokens=4, stop_token_ids=[], cache=cache)
    assert cache.length.tolist() == [first + 3]  # the last token was never fed
    (two,) = engine.generate([one.tokens[-1:] + more], max_new_tokens=4, stop_token_ids=[], cache=cache)
    (whole,) = engine.generate([start + one.tokens + more], max_new_tokens=4, stop_token_ids=[])
    assert_same(two, whole)


def test_a_ragged_batch_continues_in_its_cache(engine):
    cache = engine.model.new_cache(2, 512)
    starts, more = [random_ids(9, 20), random_ids(140, 20)], [random_ids(150, 21), random_ids(2, 21)]
    ones = engine.generate(starts, max_new_tokens=3, stop_token_ids=[], cache=cache)
    nexts = [one.tokens[-1:] + m for one, m in zip(ones, more, strict=True)]
    twos = engine.generate(nexts, max_new_tokens=3, stop_token_ids=[], cache=cache)
    for start, one, m, two in zip(starts, ones, more, twos, strict=True):
        (whole,) = engine.generate([start + one.tokens + m], max_new_tokens=3, stop_token_ids=[])
        assert_same(two, whole)


@pytest.mark.parametrize("kept", [0, 1, 127, 128, 150])
def test_a_truncated_cache_continues_as_a_fresh_one(engine, kept):
    cache = engine.model.new_cache(1, 256)
    start, more = random_ids(160, 22), random_ids(10, 23)
    engine.generate([start], max_new_tokens=3, cache=cache)
    cache.truncate(kept)
    (continued,) = engine.generate([more], max_new_tokens=4, cache=cache)
    (fresh,) = engine.generate([start[:kept] + more], max_new_tokens=4)
    assert_same(continued, fresh)


def test_an_interrupted_cache_is_good_again_once_truncated(engine, monkeypatch):
    cache = engine.model.new_cache(1, 256)
    prompt = random_ids(40, 24)
    step, calls = engine.model.step, []

    def interrupted(*args):
        logits = step(*args)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([prompt], max_new_tokens=9, cache=cache)
    cache.truncate(30)
    (continued,) = engine.generate([prompt[30:]], max_new_tokens=4, cache=cache)
    assert_same(continued, engine.generate([prompt], max_new_tokens=4)[0])


# --- The ids of the tokens in it ---


@pytest.mark.parametrize("penalty", few([1.4], [1.0]))
def test_cached_ids_count_for_the_repetition_penalty(engine, penalty):
    tiny, start, sampling = engine.model, random_ids(30, 5), Sampling(repetition_penalty=penalty)
    prompt = start + engine.generate([start], max_new_tokens=60)[0].tokens
    (whole,) = engine.generate([prompt], max_new_tokens=20, sampling=sampling)
    for cut in (1, 50, 89):
        cache = tiny.new_cache(1, 128)
        tiny(torch.tensor([prompt[:cut]]), cache=cache, backend="dense")
        options = {"max_new_tokens": 20, "sampling": sampling, "cache": cache}
        (done,) = engine.generate([prompt[cut:]], cached_ids=[prompt[:cut]], **options)
        assert done.tokens == whole.tokens
    cache = tiny.new_cache(1, 128)
    tiny(torch.tensor([prompt[:89]]), cache=cache, backend="dense")
    options = {"max_new_tokens": 20, "sampling": sampling, "cache": cache}
    (unnamed,) = engine.generate([prompt[89:]], **options)
    assert (unnamed.tokens == whole.tokens) == (penalty == 1)


def test_text_goes_on_from_what_is_in_the_cache(successor_engine):
    """Check that half a character in the cache is completed by the other half, which is no character by itself."""
    cache = successor_engine.model.new_cache(1, 128)
    with torch.no_grad():
        successor_engine.model(torch.tensor([[CAFE_AF]]), cache=cache, backend="dense")
    prompt = {"prompts": [[E1]], "max_new_tokens": 2, "cache": cache}
    (done,) = successor_engine.generate(cached_ids=[[CAFE_AF]], **prompt)
    assert done.tokens == [E2, BANG]
    assert done.text == successor_engine.generate([[CAFE_AF, E1]], max_new_tokens=2)[0].text


@pytest.mark.parametrize(
    ("cached_ids", "message"),
    [
        ([], "cached_ids must hold a list of token ids for each of 1 prompts"),
        (3, r", such as \[\[1, 2, 3\]\], not 3"),
        ([3], r"not \[3\]"),
        ([[True]], r"not \[\[True\]\]"),
        ([[1], [2]], r"not \[\[1\], \[2\]\]"),
        ([[999]], "cached_ids 0 has a token id"),
        ([["x"]], "ids"),
    ],
)
def test_wrong_ids_of_a_cache_are_named(successor_engine, cached_ids, message):
    with pytest.raises(ValueError, match=message):
        successor_engine.generate(
            [[ONE]], cache=successor_engine.model.new_cache(1, 20), cached_ids=cached_ids, max_new_tokens=1
        )


def test_ids_of_a_cache_need_one(successor_engine):
    with pytest.raises(ValueError, match="pass cache="):
        successor_engine.generate([[ONE]], cached_ids=[[1]])
