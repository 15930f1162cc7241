"""Masks over attributes: dense = eager = compiled, whatever the predicate captures or returns."""

import functools
import random
from collections import OrderedDict

import pytest
import torch
from attn_gym import masks as gym
from attn_gym.masks.document_mask import length_to_offsets
from helpers import compiled_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, noop_mask

from llama_flex import Mask, masks, scores
from llama_flex.tokens import Tokens


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


def random_tree(seed: int, nodes: int) -> list[int]:
    """A parent for each node: often the node before it, so that some branches are deep."""
    r = random.Random(seed)
    return [r.choice([n - 1, r.randrange(-1, n)]) if n else -1 for n in range(nodes)]


def ancestors(parents: list[int]) -> list[set[int]]:
    """Of each node: the node itself, its parent, that one's parent, and so on."""
    lines = []
    for node, parent in enumerate(parents):
        lines.append({node} | (lines[parent] if parent >= 0 else set()))
    return lines


def tree_rule(parents: list[int], start: int):
    lines = ancestors(parents)

    def allowed(i: int, j: int) -> bool:
        if j > i or j < start or i >= start + len(parents):
            return j <= i
        return j - start in lines[i - start]

    return allowed


def marks(count: int, *true: int) -> torch.Tensor:
    return torch.isin(torch.arange(count), torch.tensor(true))


TREES = random_tree(1, 90), random_tree(2, 90)
TREE_RULES = tree_rule(TREES[0], 40), tree_rule(TREES[0], 0), tree_rule(TREES[1], 75)
SEGMENTS = [i // 50 if i < 180 else masks.GENERATED for i in range(200)]  # 0 is the shared one

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
    "global_tokens": (
        masks.causal() & masks.global_tokens([3, 150]),
        lambda b, i, j, si, sj: j <= i and (i in (3, 150) or j in (3, 150)),
    ),
    "global_tokens, marked": (  # nothing is said of tokens from 100 on, which are not global
        masks.causal() & (masks.sliding_window(5) | masks.global_tokens(marks(100, 0, 99))),
        lambda b, i, j, si, sj: j <= i and (i - j < 5 or i in (0, 99) or j in (0, 99)),
    ),
    "global_tokens by row": (
        masks.causal() & masks.global_tokens(torch.stack([marks(180, 7, 179), marks(180, 60)])),
        lambda b, i, j, si, sj: j <= i and any(x in ((7, 179), (60,))[b] for x in (i, j)),
    ),
    "shared_prefix": (masks.shared_prefix(20), lambda b, i, j, si, sj: j <= i and (si == sj or j < 20)),
    "shared prefixes by row": (
        masks.shared_prefix(torch.tensor([0, 130])),
        lambda b, i, j, si, sj: j <= i and (si == sj or j < (0, 130)[b]),
    ),
    "fused": (masks.fused(), lambda b, i, j, si, sj: j <= i and (si == sj or sj == 0 or si == -1)),
    "tree": (masks.tree(TREES[0], start=40), lambda b, i, j, si, sj: TREE_RULES[0](i, j)),
    "trees by row": (
        masks.tree(torch.tensor(TREES), start=torch.tensor([0, 75])),
        lambda b, i, j, si, sj: TREE_RULES[1 + b](i, j),
    ),
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
        (lambda: masks.tree([-1, 1]), "node 1 has parent 1; give an earlier node, or -1"),
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
    """Two trees in a batch, tokens before and after them, against powers of the matrix of parents."""
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
    cache, forward, parts = model.new_cache(2, 258), compiled_forward(model), []
    for a, b in ((0, 128), (128, 256), (256, 257), (257, 258)):
        parts.append(forward(ids[:, a:b], segments=segments[:, a:b], cache=cache, mask=mask))
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


N = 144  # tokens of the masks of attn-gym: a canvas of 12 x 12
OFFSETS = length_to_offsets([30, 64, 1, 49], "cpu")


def chosen_tiles() -> torch.Tensor:
    """Tiles of 16 tokens that each tile of queries sees, 4 of 9, other ones for each of 2 rows and 4 heads."""
    return torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :4].clone()


GYM = {
    "causal": gym.causal_mask,
    "sliding_window": gym.generate_sliding_window(20),
    "dilated_sliding_window": gym.generate_dilated_sliding_window(30, 4),
    "prefix_lm": gym.generate_prefix_lm_mask(50),
    "document": gym.generate_doc_mask_mod(gym.causal_mask, OFFSETS),
    "document, window": gym.generate_doc_mask_mod(gym.generate_sliding_window(7), OFFSETS),
    "packed documents": gym.generate_packed_causal_doc_mask_mod(OFFSETS),
    "shared_prefix": gym.generate_shared_prefix_mask_mod(OFFSETS, torch.tensor([0, 0, 2, 0])),
    "global_sliding_window": gym.generate_global_sliding_window(9, marks(N, 0, 70)),
    "batchify": gym.batchify_mask_mod(gym.generate_sliding_window(5), 25),
    "batchify, noop": gym.batchify_mask_mod(noop_mask, 48),
    "block_diffusion": gym.generate_block_diffusion_mask(72, 8),
    "natten": gym.generate_natten(12, 12, 5, 3),
    "tiled_natten": gym.generate_tiled_natten(12, 12, 5, 3, 4, 2),
    "morton_natten": gym.generate_morton_natten(8, 8, 3, 5),  # its canvas is a power of two: tokens beyond see nothing
    "sta_2d": gym.generate_sta_mask_mod_2d((12, 8), (6, 4), (2, 4), 48),
    "sta_3d": gym.generate_sta_mask_mod_3d((4, 4, 8), (2, 4, 4), (2, 2, 4), 16),
    "svg, spatial": gym.generate_spatial_head_mask_mod(14, 13, 10, 3, True, 8),
    "svg, temporal": gym.generate_temporal_head_mask_mod(14, 13, 10, 4),
    "vsa": gym.generate_vsa_mask_mod(chosen_tiles(), 16),
    "vsa, padded": gym.generate_vsa_mask_mod(chosen_tiles(), 16, torch.tensor([16] * 7 + [9, 5])),
    "flamingo": gym.generate_vision_cross_attention_mask_mod(torch.tensor([[0, 70], [10, 60], [70, N]]), N // 3),
}


@pytest.mark.parametrize("name", GYM)
def test_mask_mods_of_attn_gym_are_the_same_cells(name):
    everyone = Tokens.arriving(N, batch=2)
    mask = Mask.from_mask_mod(GYM[name])
    expected = create_mask(GYM[name], 2, 4, N, N, device="cpu")
    assert torch.equal(mask.dense(everyone, everyone, 4).expand(-1, 4, -1, -1), expected)
    assert expected.any()
    assert not expected.all()
    assert repr(mask) == GYM[name].__name__


@pytest.mark.parametrize("name", GYM)
@torch.no_grad()
def test_mask_mods_of_attn_gym_hold_in_cached_decoding(tiny_pair, name):
    _, model = tiny_pair("mha")
    mask = Mask.from_mask_mod(GYM[name]) & masks.causal()
    ids = torch.randint(512, (2, N), generator=torch.Generator().manual_seed(0))
    full = model(ids, mask=mask, backend="dense")
    cache = model.new_cache(2, N)
    parts = [model(part, mask=mask, cache=cache) for part in ids.split([128, 14, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=2e-4)


@pytest.mark.parametrize("seed", range(3))
def test_drafting_masks_of_attn_gym_are_the_same_cells(seed):
    """Their queries are numbered from the start of the tree or block, their keys from that of the prefix."""
    parents, prefix = [-1, *(max(p, 0) for p in random_tree(seed, 30)[1:])], 21
    matrix = gym.build_tree_ancestor_matrix(parents, "cpu")
    for mod in (
        gym.generate_jetspec_tree_causal_mask_mod(prefix, matrix),
        gym.generate_jetspec_training_mask_mod(21, 6),
    ):
        expected = create_mask(mod, 1, 1, 30, prefix + 30, device="cpu")
        assert torch.equal(Mask.from_mask_mod(mod).dense(Tokens.arriving(30), Tokens.arriving(51), 1), expected)
    expected = create_mask(gym.generate_jetspec_tree_causal_mask_mod(prefix, matrix), 1, 1, 30, 51, device="cpu")
    everyone = Tokens.arriving(51)
    assert torch.equal(masks.tree(parents, start=prefix).dense(everyone, everyone, 1)[:, :, prefix:], expected)


class Number(int):
    pass


class Slotted(list):
    __slots__ = ("more",)


@pytest.mark.parametrize(
    "kind", [int, Number, lambda n: OrderedDict(w=n), lambda n: {"w": n}, lambda n: [n], lambda n: Slotted([n])]
)
def test_rules_that_compute_different_things_are_told_apart(kind):
    """Layers with equal rules share one list of blocks; so what a predicate holds, in whatever, must count."""

    def window(width):
        return Mask(lambda q, kv: q.index - kv.index < (width["w"] if hasattr(width, "keys") else width))

    few, many = window(kind(2)), window(kind(9))
    assert few.identity() != many.identity()
    assert few.identity() == few.identity()


def test_functions_are_told_apart_by_their_attributes_and_keep_them():
    def make(width):
        def predicate(q, kv):
            return q.index - kv.index < predicate.width

        predicate.width = width
        return Mask(predicate)

    assert make(2).identity() != make(9).identity()
    moved = make(torch.tensor(3)).to("meta")
    assert moved.function.width.device.type == "meta"


def test_captured_tensors_that_share_memory_become_tensors_of_their_own():
    """Which of them share memory is nothing that compiled code should depend on."""
    table = torch.rand(8)
    views = [table, table.view(2, 4), table[:3]]
    moved = Mask(lambda q, kv: kv.index < views[0][0] + views[1][0, 0] + views[2][0]).to("cpu")
    memory = {t.untyped_storage().data_ptr() for t in moved.function.__closure__[0].cell_contents}
    assert len(memory) == 3


def test_only_rules_of_a_kind_combine():
    for wrong in (lambda: masks.causal() & (lambda q, kv: True), lambda: masks.causal() | scores.softcap(2.0)):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
