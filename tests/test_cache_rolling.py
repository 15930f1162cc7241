"""Rolling caches: any number of tokens through a window and sinks, ragged, in generation, compiled, after failures."""

import functools
from functools import partial

import pytest
import torch
from cache_helpers import (
    CONTEXT,
    MODEL,
    Broken,
    Session,
    assert_close,
    broken,
    graph_count,
    held_attributes,
    random_ids,
    rolled,
    storage,
)
from helpers import compiled_forward, few

from llama_flex import Engine, Mask, masks
from llama_flex.cache import Cache


@pytest.mark.parametrize("top", few([None, masks.chunked(150)], [masks.dilated(2)]), ids=str)
@pytest.mark.parametrize("chunks", few([[1, 64, 2, 63]], [[64], [33]]), ids=str)
def test_3000_tokens_through_a_rolling_cache_are_a_forward_with_its_mask(chunks, top):
    ids, cache = random_ids(1, 3000), MODEL.new_rolling_cache(1, window=100, sinks=3, largest_append=64)
    before, found, start = storage(cache), [], 0
    while start < 3000:
        size = chunks[len(found) % len(chunks)]
        found.append(MODEL(ids[:, start : start + size], cache=cache, mask=top, backend="dense"))
        start += size
    assert storage(cache) == before
    assert cache.layers[0][0].shape[2] == 256 + 128  # 3 + 99 + 64 in whole blocks, and the spare block
    assert cache.room is None
    assert cache.length.tolist() == [3000]
    assert_close(torch.cat(found, dim=1)[:, -300:], tail_of_dense(top))


@functools.cache
def tail_of_dense(top: Mask | None) -> torch.Tensor:
    """Compute the logits of the last 300 of 3,000 tokens, without a cache."""
    rolling = masks.sliding_window(100) | masks.sink(3)
    mask = rolling if top is None else rolling & top
    return MODEL(random_ids(1, 3000), mask=mask, backend="dense", logits_to_keep=300)


@pytest.mark.exhaustive
def test_token_by_token_through_a_rolling_cache():
    session = rolled(90, chunk=40)
    for _ in range(150):
        session.append(1)
    session.check()


def test_ragged_rows_roll_each_at_its_own_pace():
    session = Session(MODEL.new_rolling_cache(3, 30, 3, largest_append=40))
    for lengths in ([40, 0, 1], [40, 3, 40], [0, 40, 40], [7, 1, 0], [40, 0, 40], [1, 1, 1], [0, 40, 33], [1, 1, 1]):
        session.append(40, lengths)
        session.check()


def test_a_rolling_cache_goes_back_as_far_as_it_holds():
    session = rolled(200)
    session.truncate(195)  # the last 40 came at once, so nothing that token 195 sees is gone
    session.append(9)
    session.truncate(190)
    session.append(40)
    session.truncate(190 - 30)
    session.append(1)
    lost = session.rows[0].rolled_out + 28
    before = held_attributes(session.cache, 0)
    for length in (lost, 100, 4):
        with pytest.raises(ValueError, match=f"cannot truncate to {length} tokens"):
            session.cache.truncate(length)
    assert held_attributes(session.cache, 0) == before
    session.truncate(lost + 1)
    session.append(3)


@pytest.mark.parametrize("length", [0, 2, 3])
def test_a_rolling_cache_goes_back_to_its_sinks(length):
    """Nothing before the sinks is ever lost."""
    session = rolled(200)
    session.truncate(length)
    for _ in range(5):
        session.append(10)
        session.check()


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("backend", ["flex", "dense"])
def test_a_rolling_cache_of_one_token_goes_back_by_one(window, sinks, backend):
    cache, ids = MODEL.new_rolling_cache(1, window, sinks), random_ids(1, 12)
    mask = masks.sliding_window(window) | masks.sink(sinks)
    for n in range(9):
        MODEL(ids[:, n : n + 1], cache=cache, backend=backend)
    cache.truncate(8)
    assert (cache.length.tolist(), cache.next_position.tolist()) == ([8], [8])
    logits = [MODEL(ids[:, n : n + 1], cache=cache, backend=backend) for n in range(8, 12)]
    assert_close(torch.cat(logits, 1), MODEL(ids, mask=mask, backend="dense")[:, 8:])


def test_a_row_without_new_tokens_keeps_its_length_though_its_window_has_passed_all():
    cache = MODEL.new_rolling_cache(2, 1, 4)
    MODEL(random_ids(2, 9), cache=cache)
    MODEL(random_ids(2, 1), cache=cache, lengths=torch.tensor([0, 1]))
    assert (cache.length.tolist(), cache.next_position.tolist()) == ([9, 10], [9, 10])
    cache.evict([0])  # a sink: the newest token is still there, so no index is given twice
    assert cache.length.tolist() == [9, 10]


@pytest.mark.parametrize("kept", few([3], [0, 85]))
def test_a_rolling_cache_goes_on_from_evicted_newest_tokens(kept):
    """Their indices are given again, and the tokens that get them roll out in their turn, not at once."""
    session = Session(MODEL.new_rolling_cache(1, 30, 3, largest_append=40), forward=partial(MODEL, backend="dense"))
    for _ in range(100):
        session.append(1)
    (row,) = session.rows
    row.forget((row.tokens.index >= 3) & (row.tokens.index < row.rolled_out))  # evicting brings nothing back
    session.evict(lambda t: t.index >= kept)
    for _ in range(8):
        session.append(1)
        session.check()


def test_a_failed_step_takes_nothing_from_a_rolling_cache_but_what_the_window_has_passed():
    session = rolled(120)
    before = held_attributes(session.cache, 0)
    with pytest.raises(Broken):
        MODEL(random_ids(1, 1), cache=session.cache, mask=Mask(broken))
    assert held_attributes(session.cache, 0) == [
        token for token in before if token[0] < session.cache.sinks or token[0] > 120 - session.cache.window
    ]
    session.append(1)
    session.check()


def test_a_rolling_cache_is_cheap_to_describe():
    cache = MODEL.new_rolling_cache(2, 100, 3, largest_append=64)
    assert (cache.window, cache.sinks, str(cache.mask)) == (100, 3, "(sliding_window(100) | sink(3))")
    assert cache.largest_append >= 64
    with pytest.raises(ValueError, match=r"holds 256 tokens per sequence.*append fewer at a time"):
        MODEL(random_ids(2, cache.largest_append + 1), cache=cache)
    MODEL(random_ids(2, cache.largest_append), cache=cache)
    MODEL(random_ids(2, cache.largest_append), cache=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"window": 2.5}, "window must be a whole number, not 2.5"),
        ({"window": 5, "sinks": -1}, "sinks must be at least 0, not -1"),
        ({"window": 5, "sinks": True}, "sinks must be a whole number, not True"),
        ({"window": 5, "largest_append": 2.5}, "largest_append must be a whole number, not 2.5"),
        ({"window": 129, "largest_append": 0}, "largest_append|at least one"),
        ({"window": 200, "largest_append": -1}, "largest_append|at least one"),
    ],
)
def test_wrong_sizes_of_rolling_caches_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MODEL.new_rolling_cache(1, **arguments)


def greedy(cache: Cache, prompt: list[int], count: int) -> list[int]:
    """Return the `count` likeliest tokens after a prompt."""
    tokens, ids = [], torch.tensor([prompt])
    for _ in range(count):
        ids = MODEL(ids, cache=cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize(
    ("length", "count"), [(CONTEXT - 12, 20), pytest.param(100, CONTEXT, marks=pytest.mark.exhaustive)]
)
def test_generation_in_a_rolling_cache_passes_the_context(length, count):
    prompt, engine = random_ids(1, length)[0].tolist(), Engine(MODEL)
    make = partial(MODEL.new_rolling_cache, 1, 30, 3, largest_append=128)
    cache = make()
    (one,) = engine.generate([prompt], max_new_tokens=count, stop_token_ids=[], cache=cache)
    assert one.tokens == greedy(make(), prompt, count)
    assert int(cache.length) == length + count - 1 > CONTEXT
    (more,) = engine.generate([one.tokens[-1:]], max_new_tokens=5, stop_token_ids=[], cache=cache)
    assert len(more.tokens) == 5


def test_a_prompt_longer_than_a_rolling_cache_takes_at_once_is_cut_up():
    """The cache has no slots to spare: 64 of the window and 64 of an append fill its 128."""
    prompt = random_ids(1, 150)[0].tolist()
    cache = MODEL.new_rolling_cache(1, 65, largest_append=64)
    (found,) = Engine(MODEL).generate([prompt], max_new_tokens=3, stop_token_ids=[], cache=cache)
    other = MODEL.new_rolling_cache(1, 65, largest_append=300)
    assert found.tokens == greedy(other, prompt, 3)


@pytest.mark.exhaustive
def test_a_compiled_step_serves_a_rolling_cache():
    forward = compiled_forward(MODEL)
    session = Session(MODEL.new_rolling_cache(2, 30, 3, largest_append=40), forward=forward)
    session.append(7)
    compiled = graph_count()
    for _ in range(40):
        session.append(7)
    session.truncate(283)
    session.append(7)
    session.reorder([1, 0])
    fork = session.fork()
    for each in (fork, session, fork):
        each.append(7)
        each.check()
    assert graph_count() == compiled


def widen_the_mask(cache):
    cache.mask = masks.sliding_window(cache.window + 1) | masks.sink(cache.sinks)


def narrow_the_mask(cache):
    cache.mask = masks.sliding_window(cache.window - 1) | masks.sink(cache.sinks)


def forget_too_early(cache):
    cache.window -= 1


@pytest.mark.parametrize("change", [widen_the_mask, narrow_the_mask, forget_too_early])
def test_a_rolling_window_of_another_width_would_be_noticed(change):
    session = rolled(80)
    change(session.cache)
    with pytest.raises(AssertionError, match="not close"):
        session.append(40)
