"""Where tokens lie in memory: slots in pages and back, and rows without their padding."""

import torch

from llama_flex.masks.layout import BLOCK, PackedRows, PageTable, slot_mapping

# Two rows of up to two blocks in a pool of five pages, the last of which takes padding. Row 0 has its first block in
# page 3 and its second in page 0; row 1 has one block, in page 2.
TABLE = torch.tensor([[3, 0], [2, 4]], dtype=torch.int32)
PAGES = PageTable(TABLE, torch.tensor([[1, -1, -1, 0, -1], [-1, -1, 0, -1, -1]], dtype=torch.int32))


def test_slots_are_found_in_the_pool_and_places_of_the_pool_are_found_as_slots():
    slots = torch.tensor([[0, BLOCK - 1, BLOCK, BLOCK + 5], [1, 2, 3, BLOCK - 1]])
    places = slot_mapping(TABLE, slots)
    assert places.tolist() == [
        [3 * BLOCK, 4 * BLOCK - 1, 0, 5],
        [2 * BLOCK + 1, 2 * BLOCK + 2, 2 * BLOCK + 3, 3 * BLOCK - 1],
    ]
    rows = torch.arange(2)[:, None].expand(-1, 4)
    assert torch.equal(PAGES.slot_of(rows, places).long(), slots)
    # In row 0 a page that no row has, in row 1 a page of row 0.
    assert PAGES.slot_of(torch.tensor([0, 1]), torch.tensor([BLOCK, 3 * BLOCK])).lt(0).all()


def test_gathered_rows_are_their_pages_in_order_and_zeros_where_no_page_is():
    pool = torch.arange(5 * BLOCK).float()[None, None, :, None].repeat(1, 3, 1, 2)
    pool[:, :, 4 * BLOCK :] = torch.nan  # padding
    place = torch.arange(BLOCK)
    expected = torch.stack([torch.cat([3 * BLOCK + place, place]), torch.cat([2 * BLOCK + place, 0 * place])]).float()
    assert torch.equal(PAGES.gather(pool), expected[:, None, :, None].expand(-1, 3, -1, 2))


def test_packed_rows_hold_the_chosen_tokens_and_are_laid_out_again():
    x = torch.arange(2 * 3 * 4).view(2, 3, 4)
    packed = PackedRows.of(torch.tensor([0, 1, 3, 5]), (2, 3))  # rows of 2 and of 1 token, and one of padding
    assert torch.equal(packed.pack(x), torch.stack([x[0, 0], x[0, 1], x[1, 0], x[1, 2]])[None])
    rows = packed.unpack(packed.pack(x))
    assert rows.shape == x.shape
    assert torch.equal(rows[0, :2], x[0, :2])
    assert torch.equal(rows[1, 0], x[1, 0])
