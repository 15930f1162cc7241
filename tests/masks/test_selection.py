"""Tokens chosen by their indices or by a function of their attributes."""

import pytest
import torch

from llama_flex.masks.selection import selection
from llama_flex.tokens import Tokens

TOKENS = Tokens(
    torch.tensor([[0, 1, 2, -1], [2, 0, 1, 3]]), *(torch.tensor([[5, 6, 7, 0], [0, 1, 2, 9]]) for _ in "ps")
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ([0, 2], [[True, False, True, False], [True, True, False, False]]),
        (torch.tensor([0, 2], dtype=torch.int32), [[True, False, True, False], [True, True, False, False]]),
        (torch.tensor([[1], [3]]), [[False, True, False, False], [False, False, False, True]]),
        (torch.tensor([[1, 99]]), [[False, True, False, False], [False, False, True, False]]),
        ([], [[False] * 4] * 2),
        (range(9), [[True, True, True, False], [True] * 4]),  # a free slot has no index
        (lambda t: t.position > 5, [[False, True, True, False], [False, False, False, True]]),
    ],
)
def test_tokens_are_chosen_in_every_row(where, expected):
    assert selection(where)(TOKENS).tolist() == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (3, "integers .N. or .B, N., or by a function, not 3"),
        ([0.5], "not torch.float32 .1."),
        ([-1], "not -1"),
        ("ab", "not 'ab'"),
        (torch.zeros(1, 1, 1).long(), r"not torch.int64 .1, 1, 1."),
        (torch.zeros(3, 1).long(), r"indices .N. or .2, N., not .3, 1."),
        (lambda t: t.index, r"must return booleans .2, 4., not torch.int64 .2, 4."),
        (lambda t: t.index[0] > 0, r"must return booleans .2, 4., not torch.bool .4."),
        (lambda t: True, "must return booleans .2, 4., not True"),
    ],
)
def test_invalid_selections_are_named(where, message):
    with pytest.raises(ValueError, match=message):
        selection(where)(TOKENS)
