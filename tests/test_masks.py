"""Masks over attributes: dense = eager = compiled, whatever the predicate captures or returns."""

import functools

import pytest
import torch

from llama_flex import Mask, masks
from llama_flex.engine import _compiled
from llama_flex.masks import Tokens


def tokens(index: torch.Tensor, segment: torch.Tensor | None = None) -> Tokens:
    index = index.to(torch.int32)
    return Tokens(index, index, torch.zeros_like(index) if segment is None else segment.to(torch.int32))


def block_kinds(block_mask, heads: int) -> torch.Tensor:
    """0 empty, 1 partial, 2 full; a block that both lists hold would be 3. [B, H, Tb, Sb]"""
    kinds = torch.zeros(block_mask.kv_indices.shape, dtype=torch.int)
    for num, indices, kind in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, 1),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, 2),
    ):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in num.shape)).view(-1, 3).tolist():
            b, h, row = place
            kinds[b, h, row, indices[b, h, row, : num[b, h, row]].long()] += kind
    return kinds


def causal(q, kv):
    return kv.index <= q.index


table = torch.rand(400, generator=torch.Generator().manual_seed(0)) > 0.4
per_head = torch.tensor([3, 50, 200, 1000])


class Window:
    """A predicate that is an object."""

    def __init__(self, width: torch.Tensor) -> None:
        self.width = width

    def __call__(self, q, kv):
        return q.index - kv.index < self.width[q.batch]


# A named mask, and the same rule over plain numbers: row b, query i, key j, their segments.
NAMED = {
    "bidirectional": (masks.bidirectional(), lambda b, i, j, si, sj: True),
    "sliding_window": (masks.sliding_window(100), lambda b, i, j, si, sj: 0 <= i - j < 100),
    "windows by row": (
        masks.sliding_window(torch.tensor([1, 150])),
        lambda b, i, j, si, sj: 0 <= i - j < (1, 150)[b],
    ),
    "sink": (masks.sink(4), lambda b, i, j, si, sj: j <= i and j < 4),
    "window and sink": (
        masks.sliding_window(30) | masks.sink(torch.tensor([2, 5])),
        lambda b, i, j, si, sj: j <= i and (i - j < 30 or j < (2, 5)[b]),
    ),
    "prefix_lm": (masks.prefix_lm(140), lambda b, i, j, si, sj: j <= i or (i < 140 and j < 140)),
    "chunked": (masks.chunked(64), lambda b, i, j, si, sj: j <= i and i // 64 == j // 64),
    "dilated": (masks.dilated(3), lambda b, i, j, si, sj: j <= i and (i - j) % 3 == 0),
    "document": (masks.document() & masks.causal(), lambda b, i, j, si, sj: j <= i and si == sj),
}

PREDICATES = {
    **{name: mask for name, (mask, _) in NAMED.items()},
    "causal": masks.causal(),
    "true": Mask(lambda q, kv: True) & masks.causal(),
    "false": Mask(lambda q, kv: False) | masks.causal(),
    "not false": ~Mask(lambda q, kv: False) & masks.causal(),
    "nothing": Mask(lambda q, kv: False),
    "everything": Mask(lambda q, kv: True),
    "captured table": Mask(lambda q, kv: table[kv.index] | (kv.index == q.index)) & masks.causal(),
    "per head": Mask(lambda q, kv: q.index - kv.index < per_head[q.head]) & masks.causal(),
    "per row": Mask(Window(torch.tensor([5, 200]))) & masks.causal(),
    "segments": Mask(lambda q, kv: q.segment == kv.segment) & masks.causal(),
    "inverted": ~(masks.causal() & Mask(lambda q, kv: q.index - kv.index > 130)) & masks.causal(),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_masks_are_their_rules(name):
    mask, rule = NAMED[name]
    index, segment = torch.arange(200).expand(2, -1), (torch.arange(200) // 70).expand(2, -1)
    cells = mask.dense(tokens(index, segment), tokens(index, segment), 1)
    for b in range(2):
        expected = [[rule(b, i, j, i // 70, j // 70) for j in range(200)] for i in range(200)]
        assert torch.equal(cells[b, 0], torch.tensor(expected))


def test_a_window_one_too_wide_would_be_noticed():
    index = tokens(torch.arange(200).expand(2, -1))
    rule = NAMED["sliding_window"][1]
    wrong = masks.sliding_window(101).dense(index, index, 1)[0, 0]
    assert not torch.equal(wrong, torch.tensor([[rule(0, i, j, 0, 0) for j in range(200)] for i in range(200)]))


@pytest.mark.parametrize(
    ("make", "value"),
    [(masks.sliding_window, 0), (masks.sink, -1), (masks.prefix_lm, -1), (masks.chunked, 0), (masks.dilated, 0)],
)
def test_numbers_out_of_range_are_named(make, value):
    with pytest.raises(ValueError, match=f"{make.__name__} needs a number of at least {value + 1}, not {value}"):
        make(value)
    assert repr(make(5)) == f"{make.__name__}(5)"


@pytest.mark.parametrize("t", [1, 100, 128, 129, 300])
@pytest.mark.parametrize("name", PREDICATES)
def test_block_lists_are_exact(name, t):
    """Against the cells themselves: full where all are allowed, partial where some, each block in one list only."""
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
    kinds = block_kinds(mask.block_mask(q, kv, 4), 4)
    # A row with nothing at all lists one block, for mask_mod to mask.
    nothing = ~some.any(-1)
    kinds[..., 0] -= nothing.int()
    assert torch.equal(kinds, expected)
    assert not cells[..., 310:].any()


@pytest.mark.parametrize("name", PREDICATES)
@torch.no_grad()
def test_dense_equals_eager_in_full_and_cached(tiny_pair, name):
    _, model = tiny_pair("mha")
    mask = PREDICATES[name]
    ids = torch.randint(512, (2, 150), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(150) // 40).expand(2, -1)
    dense = model(ids, segments=segments, mask=mask, backend="dense")
    torch.testing.assert_close(model(ids, segments=segments, mask=mask), dense, rtol=0, atol=2e-4)
    cache = model.new_cache(2, 150)
    if name not in (
        "everything",
        "nothing",
        "bidirectional",
        "prefix_lm",
    ):  # those are not causal, or attend to nothing
        steps = [
            model(ids[:, a:b], segments=segments[:, a:b], mask=mask, cache=cache)
            for a, b in ((0, 128), (128, 149), (149, 150))
        ]
        torch.testing.assert_close(torch.cat(steps, 1), dense, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["false", "captured table", "per head", "per row", "segments", "window and sink", "windows by row"]
)
@torch.no_grad()
def test_compiled_equals_dense_in_chunks_and_steps(tiny_pair, name):
    _, model = tiny_pair("mha")
    mask = PREDICATES[name]
    ids = torch.randint(512, (2, 258), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(258) // 60).expand(2, -1).contiguous()
    dense = model(ids, segments=segments, mask=mask, backend="dense")
    cache, graphs, parts = model.new_cache(2, 258), {}, []
    for a, b in ((0, 128), (128, 256), (256, 257), (257, 258)):
        cache.reserve(b - a)
        graph = graphs.setdefault(b - a, _compiled(model.step))
        chunk, named = (x[:, a:b].clone(memory_format=torch.contiguous_format) for x in (ids, segments))
        parts.append(graph(chunk, None, None, named, cache, mask, "flex", 0))
    torch.testing.assert_close(torch.cat(parts, 1), dense, rtol=0, atol=2e-4)
    wrong = model(ids, segments=segments, mask=masks.causal(), backend="dense")
    assert (wrong - dense).abs().max() > 1e-2 or name == "false"


def test_captured_tensors_follow_the_device():
    """Wherever a predicate holds them: closure, nested function, partial, object, other masks. The past failure was
    'Expected all tensors to be on the same device'."""
    width, allowed = torch.tensor([4]), torch.ones(9, dtype=torch.bool)

    def nested(q, kv):
        def inner():
            return width

        return q.index - kv.index < inner()[0]

    def bound(limit, q, kv, *, table):
        return table[kv.index] & (kv.index < limit[0])

    for predicate in (
        lambda q, kv: allowed[kv.index],
        nested,
        functools.partial(bound, width, table=allowed),
        Window(width),
    ):
        mask = Mask(predicate) & masks.causal() | ~Mask(predicate)
        moved = mask.to("meta")
        q = Tokens(*(torch.zeros(1, 9, dtype=torch.int32, device="meta") for _ in range(3)))
        assert moved.dense(q, q, 1).device.type == "meta"
        assert repr(moved) == repr(mask)
        assert mask.to("cpu") is mask  # nothing to move: the same object, so nothing compiles anew
        assert mask.dense(tokens(torch.arange(9)[None]), tokens(torch.arange(9)[None]), 1).device.type == "cpu"


def test_predicates_that_refer_to_themselves_or_keep_tensors_elsewhere_move_too():
    limit = torch.tensor([4])

    def recursive(q, kv, depth=1, *, bound=limit):
        return recursive(q, kv, depth - 1, bound=bound) if depth else q.index - kv.index < bound[0]

    class Holder:
        def __init__(self):
            self.limits = [limit]

        def predicate(self, q, kv):
            return q.index - kv.index < self.limits[0]

    def before_it_is_set(q, kv):
        return unset if q is None else kv.index < limit

    meta = Tokens(*(torch.zeros(1, 9, dtype=torch.int32, device="meta") for _ in range(3)))
    for predicate in (recursive, Holder().predicate, before_it_is_set):
        assert Mask(predicate).to("meta").dense(meta, meta, 1).device.type == "meta"
    unset = True


def test_masks_say_what_they_are():
    window = Mask(lambda q, kv: q.index - kv.index < 4, "window(4)")
    assert repr(masks.causal() & window | ~window) == "((causal() & window(4)) | ~window(4))"
    assert repr(Mask(causal)) == "causal"


@pytest.mark.parametrize("answer", [1, 1.0, None, torch.ones(()), torch.ones((), dtype=torch.int32)])
def test_an_answer_that_is_no_boolean_is_named(answer):
    q = tokens(torch.arange(3)[None])
    with pytest.raises(ValueError, match="a predicate returns booleans"):
        Mask(lambda q, kv: answer).dense(q, q, 1)
