"""What the mask tests share: named masks beside their rules over plain numbers, and predicates of every kind."""

import random

import torch

from llama_flex import Mask, masks
from llama_flex.tokens import Tokens


def tokens(index: torch.Tensor, segment: torch.Tensor | None = None) -> Tokens:
    """Make tokens of int32 attributes, with positions like their indices."""
    index = index.to(torch.int32)
    return Tokens(index, index, torch.zeros_like(index) if segment is None else segment.to(torch.int32))


def causal(q, kv):
    return kv.index <= q.index


table = torch.rand(400, generator=torch.Generator().manual_seed(0)) > 0.4
per_head = torch.tensor([3, 50, 200, 1000])


class Window:
    """A predicate that is an object, with a width for each row."""

    def __init__(self, width: torch.Tensor) -> None:
        self.width = width

    def __call__(self, q, kv):
        return q.index - kv.index < self.width[q.batch]


def random_tree(seed: int, nodes: int) -> list[int]:
    """Draw a parent for each node: often the node before it, so that some branches are deep."""
    r = random.Random(seed)
    return [r.choice([n - 1, r.randrange(-1, n)]) if n else -1 for n in range(nodes)]


def ancestors(parents: list[int]) -> list[set[int]]:
    """Return for each node the set of itself, its parent, its parent's parent, and so on."""
    lines = []
    for node, parent in enumerate(parents):
        lines.append({node} | (lines[parent] if parent >= 0 else set()))
    return lines


def tree_rule(parents: list[int], start: int):
    """Return the rule of a tree mask over plain numbers."""
    lines = ancestors(parents)

    def allowed(i: int, j: int) -> bool:
        if j > i or j < start or i >= start + len(parents):
            return j <= i
        return j - start in lines[i - start]

    return allowed


def marks(count: int, *true: int) -> torch.Tensor:
    """Return `count` booleans that are true at the given indices."""
    return torch.isin(torch.arange(count), torch.tensor(true))


TREES = random_tree(1, 90), random_tree(2, 90)
TREE_RULES = tree_rule(TREES[0], 40), tree_rule(TREES[0], 0), tree_rule(TREES[1], 75)
SEGMENTS = [i // 50 if i < 180 else masks.GENERATED for i in range(200)]  # 0 is the shared one

# A named mask, and the same as a rule over plain numbers: row b, query i, key j, and the segments of both.
NAMED = {
    "bidirectional": (masks.bidirectional(), lambda b, i, j, si, sj: True),
    "sliding_window": (masks.sliding_window(100), lambda b, i, j, si, sj: 0 <= i - j < 100),
    "windows by row": (
        masks.sliding_window(torch.tensor([1, 150])),
        lambda b, i, j, si, sj: 0 <= i - j < (1, 150)[b],
    ),
    "bidirectional_window": (masks.bidirectional_window(20), lambda b, i, j, si, sj: abs(i - j) <= 20),
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
    "global_tokens, marked": (  # tokens from 100 on, beyond the table, are not global
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
