"""A text appended to a cache piece by piece, cut anywhere, gives the logits of the whole."""

import pytest
import torch
from helpers import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex import Llama, Mask


@st.composite
def pieces(draw, most: int) -> list[list[int]]:
    """Draw, for every piece, how many tokens each row gets; rows get different numbers, and may get none."""
    rows = draw(st.integers(1, 3))
    count = st.one_of(st.integers(0, 9), st.sampled_from([0, 1, 63, 127, 128, 129]))
    return draw(st.lists(st.lists(count, min_size=rows, max_size=rows), min_size=1, max_size=most))


def check_pieces(model: Llama, pieces: list[list[int]], padding: list[int], seed: int, backend: str) -> None:
    """Append random texts to a cache in these pieces, padded, and check the logits of every token."""
    totals = [sum(counts) for counts in zip(*pieces, strict=True)]
    widths = [max(1, max(counts) + pad) for counts, pad in zip(pieces, padding, strict=False)]
    rows = [random_ids(total, seed + i) for i, total in enumerate(totals)]
    cache = model.new_cache(len(rows), sum(widths))
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    with torch.no_grad():
        for counts, width in zip(pieces, widths, strict=False):
            ids = torch.full((len(rows), width), 499)
            for row, count in enumerate(counts):
                ids[row, :count] = torch.tensor(rows[row][done[row] : done[row] + count])
            logits = model(ids, cache=cache, lengths=torch.tensor(counts), backend=backend)
            for row, count in enumerate(counts):
                found[row].append(logits[row, :count])
                done[row] += count
        assert cache.length.tolist() == totals
        for row, parts in zip(rows, found, strict=True):
            if row:
                expected = model(torch.tensor([row]), backend="dense")[0]
                spread = (expected.max() - expected.min()).item()
                torch.testing.assert_close(torch.cat(parts), expected, atol=2e-5 * spread, rtol=0)


@pytest.mark.exhaustive
@settings(max_examples=25, deadline=None)
@given(pieces=pieces(5), padding=st.lists(st.integers(0, 40), min_size=5, max_size=5), seed=st.integers(0, 99))
def test_a_text_split_at_random_gives_the_logits_of_the_whole(tiny_pair, pieces, padding, seed):
    check_pieces(tiny_pair("gqa")[1], pieces, padding, seed, "dense")


@settings(max_examples=5, deadline=None)
@given(pieces=pieces(3), padding=st.lists(st.integers(0, 40), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_text_split_at_random_gives_the_logits_of_the_whole_in_flex_attention(tiny_pair, pieces, padding, seed):
    check_pieces(tiny_pair("gqa")[1], pieces, padding, seed, "flex")


# --- A step that fails ---


def test_a_failed_step_leaves_the_cache_as_it_was(tiny_pair):
    _, model = tiny_pair("gqa")
    cache = model.new_cache(1, 128)
    model(torch.tensor([[3, 4, 5]]), cache=cache, backend="dense")
    before = [x.clone() for x in cache.tokens]

    def broken(q, kv):
        if kv._tokens.index.numel() > 1:  # not where it is tried on one token, before any work
            raise KeyboardInterrupt
        return kv.index <= q.index

    def interrupt(*_):
        raise KeyboardInterrupt

    for arguments, hook in (({"mask": Mask(broken)}, lambda *_: None), ({}, interrupt)):
        handle = model.layers[-1].mlp.register_forward_pre_hook(hook)
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([[5, 6]]), cache=cache, backend="dense", **arguments)
        handle.remove()
        assert cache.length.tolist() == [3]
        assert cache.reserved == 3
        assert torch.equal(cache.tokens.index, before[0])
