"""Block lists: each block in one list only, exactly where a mask allows all or some of its cells."""

import pytest
import torch
from mask_helpers import PREDICATES, tokens


def block_kinds(block_mask) -> torch.Tensor:
    """Return the kinds of blocks, `[B, H, Tb, Sb]`: 0 empty, 1 partial, 2 full; 3 would be a block in both lists."""
    kinds = torch.zeros(block_mask.kv_indices.shape, dtype=torch.int)
    for num, indices, kind in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, 1),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, 2),
    ):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in num.shape)).view(-1, 3).tolist():
            b, h, row = place
            kinds[b, h, row, indices[b, h, row, : num[b, h, row]].long()] += kind
    return kinds


@pytest.mark.parametrize("t", [1, 100, 128, 129, 300])
@pytest.mark.parametrize("name", PREDICATES)
def test_block_lists_are_exact(name, t):
    """Compare the lists to the cells: full where all are allowed, partial where some are, each block in one list."""
    mask, slots = PREDICATES[name], 384
    occupied = torch.stack([torch.arange(slots), torch.arange(slots)])
    occupied[:, 310:] = -1  # free slots
    segment = (torch.arange(slots) // 90).expand(2, -1)
    kv = tokens(occupied, segment)
    first = 310 - t
    q = tokens(torch.arange(first, 310).expand(2, -1), segment[:, first:310])
    cells = mask.dense(q, kv, 4)
    rows = -(-t // 128)
    padded_any = torch.zeros(2, cells.shape[1], rows * 128, slots, dtype=torch.bool)
    padded_any[:, :, :t] = cells
    padded_all = torch.ones_like(padded_any)
    padded_all[:, :, :t] = cells
    grid = (2, cells.shape[1], rows, 128, slots // 128, 128)
    some, every = padded_any.view(grid).any(5).any(3), padded_all.view(grid).all(5).all(3)
    expected = some.int() + every.int()
    kinds = block_kinds(mask.block_mask(q, kv, 4))
    # A row of blocks where nothing is allowed lists one block, for mask_mod to mask.
    nothing = ~some.any(-1)
    kinds[..., 0] -= nothing.int()
    assert torch.equal(kinds, expected)
    assert not cells[..., 310:].any()
