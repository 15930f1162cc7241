"""Named masks: against rules over plain numbers, trees against powers of their matrices, and wrong parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_helpers import NAMED, SEGMENTS, tokens

from llama_flex import masks


@pytest.mark.parametrize("name", NAMED)
def test_named_masks_are_their_rules(name):
    mask, rule = NAMED[name]
    everyone = tokens(torch.arange(200).expand(2, -1), torch.tensor(SEGMENTS).expand(2, -1))
    cells = mask.dense(everyone, everyone, 1)
    for b in range(2):
        expected = [[rule(b, i, j, si, sj) for j, sj in enumerate(SEGMENTS)] for i, si in enumerate(SEGMENTS)]
        assert torch.equal(cells[b, 0], torch.tensor(expected))


def test_a_window_one_too_wide_would_be_noticed():
    index = tokens(torch.arange(200).expand(2, -1))
    rule = NAMED["sliding_window"][1]
    wrong = masks.sliding_window(101).dense(index, index, 1)[0, 0]
    assert not torch.equal(wrong, torch.tensor([[rule(0, i, j, 0, 0) for j in range(200)] for i in range(200)]))


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (masks.sliding_window, 0),
        (masks.bidirectional_window, -1),
        (masks.sink, -1),
        (masks.prefix_lm, -1),
        (masks.chunked, 0),
        (masks.dilated, 0),
        (masks.shared_prefix, -1),
    ],
)
def test_numbers_out_of_range_are_named(make, value):
    with pytest.raises(ValueError, match=f"{make.__name__} needs a number of at least {value + 1}, not {value}"):
        make(value)
    assert repr(make(5)) == f"{make.__name__}(5)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.global_tokens([]), r"indices of at least 0, not \[\]"),
        (lambda: masks.global_tokens([4, -1]), r"indices of at least 0, not \[4, -1\]"),
        (lambda: masks.global_tokens(torch.tensor([4])), r"booleans \[N\] or \[B, N\], not int64 \[1\]"),
        (lambda: masks.global_tokens(torch.ones(1, 1, 1).bool()), r"not bool \[1, 1, 1\]"),
        (lambda: masks.global_tokens(torch.ones(2, 0).bool()), r"not bool \[2, 0\]"),
        (lambda: masks.tree([]), r"a parent for each node, .* not float32 \[0\]"),
        (lambda: masks.tree(torch.zeros(1, 1, 1).int()), r"not int32 \[1, 1, 1\]"),
        (lambda: masks.tree([-1, 0.5]), r"not float32 \[2\]"),
        (lambda: masks.tree([-1, 1]), "node 1 has parent 1; a parent must be an earlier node, or -1"),
        (lambda: masks.tree([-1, 0, 5, 1]), "node 2 has parent 5"),
        (lambda: masks.tree([-1, -2]), "node 1 has parent -2"),
        (lambda: masks.tree(torch.tensor([[-1, 0], [0, 0]])), "node 0 has parent 0"),
        (lambda: masks.tree([-1, 0], start=-1), "not -1"),
    ],
)
def test_tables_that_make_no_mask_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_global_tokens_attend_to_all_and_all_to_them():
    everyone = tokens(torch.arange(9)[None])
    cells = masks.global_tokens([2, 7]).dense(everyone, everyone, 1)[0, 0]
    assert cells.tolist() == [[i in (2, 7) or j in (2, 7) for j in range(9)] for i in range(9)]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), nodes=st.integers(1, 14), start=st.integers(0, 4), after=st.integers(0, 3))
def test_trees_are_their_ancestor_matrices(data, nodes, start, after):
    """Compare two trees in a batch, with tokens before and after them, to powers of their parent matrices."""
    trees = [[data.draw(st.integers(-1, n - 1)) for n in range(nodes)] for _ in range(2)]
    count = start + nodes + after
    everyone = tokens(torch.arange(count).expand(2, -1))
    cells = masks.tree(torch.tensor(trees), start).dense(everyone, everyone, 1)
    for b, parents in enumerate(trees):
        step = torch.zeros(nodes, nodes)
        for node, parent in enumerate(parents):
            if parent >= 0:
                step[node, parent] = 1
        expected = torch.ones(count, count).tril().bool()
        within = torch.linalg.matrix_power(step + torch.eye(nodes), nodes) > 0
        expected[start : start + nodes, start : start + nodes] = within
        assert torch.equal(cells[b, 0], expected)
        alone = masks.tree(parents, start).dense(everyone, everyone, 1)
        assert torch.equal(alone[b, 0], expected)
