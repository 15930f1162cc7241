"""Functions of a query and a key token evaluated for every cell, and the count of full, partial and empty blocks."""

import pytest
import torch
from mask_helpers import per_head, tokens

from llama_flex import Mask, masks
from llama_flex.masks.cells import each_cell
from llama_flex.tokens import Tokens


@pytest.mark.parametrize(
    ("mask", "count", "kinds", "computed"),
    [
        (masks.causal(), 1000, (28, 8, 28), "56.2%"),  # the last block of slots is cut short, and is on the diagonal
        (masks.causal(), 1024, (28, 8, 28), "56.2%"),
        (masks.bidirectional(), 1000, (56, 8, 0), "100.0%"),  # a block that is cut short needs its bounds
        (masks.sliding_window(1), 1000, (0, 8, 56), "12.5%"),
        (masks.sliding_window(100), 1000, (0, 15, 49), "23.4%"),
        (masks.sliding_window(256), 1000, (7, 14, 43), "32.8%"),
        (masks.sliding_window(256) | masks.sink(4), 1000, (7, 19, 38), "40.6%"),
        (masks.document(), 1024, (16, 0, 48), "25.0%"),
        (masks.document(), 1000, (14, 2, 48), "25.0%"),
        (masks.document() & masks.causal(), 1000, (4, 8, 52), "18.8%"),
    ],
)
def test_sparsity_counts_blocks(mask, count, kinds, computed):
    everyone = tokens(torch.arange(count)[None], torch.arange(count)[None] // 256)
    sparsity = mask.sparsity(everyone)
    assert sparsity == kinds
    full, partial, empty = kinds
    assert str(sparsity) == f"{full} full, {partial} partial, {empty} empty blocks: {computed} computed"
    assert sparsity.computed == (full + partial) / sum(kinds)


def test_sparsity_of_a_decoding_step_and_of_rows_and_heads():
    index = torch.arange(1024)
    slots = tokens(torch.where(index < 1000, index, -1).expand(2, -1))  # a cache with free slots
    step = tokens(torch.tensor([[999], [999]]))
    assert masks.causal().sparsity(step, slots) == (14, 2, 0)  # two rows of eight blocks each
    assert masks.sliding_window(torch.tensor([100, 300])).sparsity(step, slots) == (1, 3, 12)
    by_head = Mask(lambda q, kv: q.index - kv.index < per_head[q.head]) & masks.causal()
    assert sum(by_head.sparsity(step, slots, num_heads=4)) == 2 * 4 * 8


def test_every_cell_is_the_function_of_its_query_and_its_key():
    q = Tokens(torch.tensor([[4, 5], [7, -1]]), torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 2).int())
    kv, heads = Tokens.arriving(3, batch=2), torch.tensor([2, 0])

    def of_all(q, kv):
        return 1000 * q.batch + 100 * q.head + 10 * q.index + kv.index + q.position

    expected = [
        [[[1000 * b + 100 * h + 10 * i + p + j for j in range(3)] for i, p in row] for h in (2, 0)]
        for b, row in enumerate((((4, 0), (5, 1)), ((7, 2), (-1, 3))))
    ]
    assert each_cell(of_all, q, kv, heads).tolist() == expected
    chosen = each_cell(of_all, q, kv, heads, rows=torch.tensor([1, 1]), slots=torch.tensor([2]))
    assert chosen.tolist() == [[[[row[1][2]]] * 2 for row in heads_of] for heads_of in expected]
    scores = torch.rand(2, 2, 2, 3)
    assert torch.equal(
        each_cell(lambda score, q, kv: score + kv.index, q, kv, heads, scores=scores), scores + torch.arange(3)
    )


def test_dimensions_that_the_function_does_not_read_take_no_memory():
    everyone, heads = Tokens.arriving(5, batch=2), torch.arange(4)
    cells = each_cell(lambda q, kv: kv.segment == q.segment, everyone, everyone, heads)
    assert cells.shape == (2, 4, 5, 5)
    assert cells.stride(1) == 0
