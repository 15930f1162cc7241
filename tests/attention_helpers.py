"""Masks and score functions of every kind, alone and combined at random, and comparisons of ways to compute them."""

import itertools
import random
from pathlib import Path
from typing import NamedTuple

import torch
from helpers import TINY, tiny_reference
from torch._dynamo.utils import counters

from llama_flex import Llama, Mask, ScoreMod, masks, scores

HEADS = TINY["gqa"]["num_attention_heads"]
# By number of layers, twice what the reference (eager, float32) differs by between 140 tokens at once and one by one:
# 7.3e-5 with two layers, 3.0e-4 with four. Its eager and sdpa attention differ by less, at up to 1000 tokens.
ATOL = {2: 1.5e-4, 4: 6e-4}
NOTICED = 1e-2  # the least that a mistake changes; logits are of the order of 10


class Parameters:
    """Draws the tensors of a mask or score function for some rows of a batch.

    A row has the same values, whatever rows are beside it.
    """

    def __init__(self, seed: int, rows: tuple[int, ...] = (0, 1)) -> None:
        self.draws, self.rows = torch.Generator().manual_seed(seed), list(rows)

    def number(self, low: int, high: int) -> torch.Tensor:
        """Draw a number for each row, from low to high."""
        return torch.randint(low, high + 1, (2,), generator=self.draws)[self.rows]

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw normal numbers for all rows."""
        return torch.randn(*shape, generator=self.draws)

    def by_row(self, count: int) -> torch.Tensor:
        """Draw `count` normal numbers for each row."""
        return self.normal(2, count)[self.rows]

    def trees(self, nodes: int) -> torch.Tensor:
        """Draw the parents of a tree for each row."""
        rows = torch.rand(2, nodes, generator=self.draws) * torch.arange(nodes)
        return (rows.ceil().int() - 1)[self.rows]


def window_of_each_head(p: Parameters) -> Mask:
    """Return a mask_mod with a window for each head."""
    widths = torch.randint(1, 150, (HEADS,), generator=p.draws)
    return Mask.from_mask_mod(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < widths[h]))


def slope_of_each_head(p: Parameters) -> ScoreMod:
    """Return a score_mod with a factor for each head."""
    slopes = p.normal(HEADS)
    return ScoreMod.from_score_mod(lambda score, b, h, q_idx, kv_idx: score + slopes[h] * torch.cos(q_idx - kv_idx))


MASKS = {
    "causal": lambda p: masks.causal(),
    "bidirectional": lambda p: masks.bidirectional(),
    "sliding_window": lambda p: masks.sliding_window(p.number(1, 150)),
    "sink": lambda p: masks.sink(p.number(1, 20)),
    "prefix_lm": lambda p: masks.prefix_lm(p.number(5, 90)),
    "chunked": lambda p: masks.chunked(p.number(20, 140)),
    "dilated": lambda p: masks.dilated(p.number(2, 7)),
    "global_tokens": lambda p: masks.causal() & masks.global_tokens(p.by_row(200) > 1),
    "document": lambda p: masks.causal() & masks.document(),
    "shared_prefix": lambda p: masks.shared_prefix(p.number(5, 60)),
    "fused": lambda p: masks.fused(),
    "tree": lambda p: masks.tree(p.trees(60), start=p.number(0, 100)),
    "from_mask_mod": window_of_each_head,
}
SCORES = {
    "alibi": lambda p: scores.alibi(p.normal(HEADS).abs()),
    "softcap": lambda p: scores.softcap(4.0),
    "relative_bias": lambda p: scores.relative_bias(p.normal(HEADS, 129)),
    "temperature": lambda p: scores.temperature(p.by_row(150).abs()),
    "segment_weights": lambda p: scores.segment_weights(p.by_row(6)),
    "from_score_mod": slope_of_each_head,
}
ALONE = {
    **{name: lambda p, make=make: {"mask": make(p)} for name, make in MASKS.items()},
    **{name: lambda p, make=make: {"score_mod": make(p)} for name, make in SCORES.items()},
}
COMBINATIONS = 32
# Masks that hold only in one piece: in a cache, a token cannot attend to tokens that have not arrived.
IN_ONE_PIECE = {"bidirectional"}


def combination(seed: int):
    """Draw a combination of masks and score functions: a function from Parameters to the options of a forward.

    The outermost mask is causal(), so that it holds in pieces of any size.
    """
    r = random.Random(seed)

    def expression(depth: int):
        kind = r.choice("&|~") if depth else ""
        if not kind:
            return MASKS[r.choice(list(MASKS))]
        left = expression(depth - 1)
        if kind == "~":
            return lambda p: ~left(p)
        right = expression(depth - 1)
        return (lambda p: left(p) & right(p)) if kind == "&" else (lambda p: left(p) | right(p))

    def mask():
        inner, itself = expression(2), r.random() < 0.7  # else some tokens see nothing, not even themselves
        return lambda p: masks.causal() & (inner(p) | masks.sliding_window(1) if itself else inner(p))

    def score_mod():
        made = [SCORES[name] for name in r.sample(list(SCORES), r.choice([0, 1, 1, 2]))]
        if not made:
            return lambda p: None
        return (lambda p: made[0](p)) if len(made) == 1 else (lambda p: made[0](p) >> made[1](p))

    layers = r.choice([1, 2])
    each_mask, each_score_mod = [mask() for _ in range(layers)], [score_mod() for _ in range(layers)]

    def make(p: Parameters) -> dict:
        chosen = {"mask": [m(p) for m in each_mask], "score_mod": [s(p) for s in each_score_mod]}
        return chosen if layers == 2 else {key: value[0] for key, value in chosen.items()}

    return make


class Text(NamedTuple):
    """Two rows of tokens in segments: the shared one first, then some whose positions start anew, then generated
    tokens."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor

    @classmethod
    def of(cls, count: int) -> "Text":
        """Make two rows of `count` tokens."""
        index = torch.arange(count)
        segments = torch.stack([(index + offset) // 45 for offset in (0, 17)])
        positions = torch.stack([(index + offset) % 45 + 3 * index.ge(90) for offset in (0, 17)])
        segments[:, max(count - 10, 1) :] = masks.GENERATED
        ids = torch.randint(512, (2, count), generator=torch.Generator().manual_seed(count))
        return cls(ids, positions, segments)

    def part(self, start, stop) -> dict:
        """Return the tokens from start to stop, as arguments of a forward."""
        return {name: x[:, start:stop] for name, x in self._asdict().items()}

    def row(self, b: int, stop: int) -> dict:
        """Return the first tokens of one row, as arguments of a forward."""
        return {name: x[b : b + 1, :stop] for name, x in self._asdict().items()}


def pieces(count: int) -> list[tuple[int, int]]:
    """Cut `count` tokens into chunks of up to 128, and the last two tokens one by one."""
    long = max(count - 2, 1)
    cuts = [*range(0, long, 128), *range(long, count + 1)]
    return list(itertools.pairwise(cuts))


def in_pieces(forward, model: Llama, text: Text, **options) -> torch.Tensor:
    """Compute the logits of a text that is appended to a cache in pieces."""
    count = text.input_ids.shape[1]
    cache = model.new_cache(2, count)
    parts = [text.part(a, b) for a, b in pieces(count)]
    return torch.cat([forward(part.pop("input_ids"), **part, cache=cache, **options) for part in parts], dim=1)


def ragged(forward, model: Llama, text: Text, lengths: tuple[int, int], sizes, **options) -> list[torch.Tensor]:
    """Append both rows to one cache, each up to its length, and return the logits `[1, length, V]` of each row.

    sizes: of the chunks; the last two are single tokens of both rows.
    """
    cache = model.new_cache(2, sum(sizes))
    done, logits = [0, 0], [[], []]
    for size in sizes:
        new = [min(size, length - 2 - d) if size > 1 else 1 for length, d in zip(lengths, done, strict=True)]
        places = torch.stack([torch.arange(d, d + size) for d in done]).clamp(max=text.input_ids.shape[1] - 1)
        part = {name: x.gather(1, places) for name, x in text._asdict().items()}
        out = forward(part.pop("input_ids"), **part, cache=cache, lengths=torch.tensor(new), **options)
        for b in range(2):
            logits[b].append(out[b : b + 1, : new[b]])
            done[b] += new[b]
    assert done == list(lengths)
    return [torch.cat(row, dim=1) for row in logits]


def assert_close(found: torch.Tensor, expected: torch.Tensor, layers: int = 2) -> None:
    """Compare logits of a model of so many layers."""
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[layers])


def check_eager(model: Llama, make, count: int, whole: bool = False) -> None:
    """Compare eager attention to the definition: at once, in pieces and in ragged batches. whole: not in pieces."""
    text, options = Text.of(count), make(Parameters(count))
    dense = model(**text._asdict(), backend="dense", **options)
    assert_close(model(**text._asdict(), **options), dense)
    if not whole:
        assert_close(in_pieces(model, model, text, **options), dense)
    lengths = (count, max(count - 2 - count // 5, 1))
    together = model(**text._asdict(), lengths=torch.tensor(lengths), **options)
    alone = [model(**text.row(b, n), backend="dense", **make(Parameters(count, (b,)))) for b, n in enumerate(lengths)]
    for b, n in enumerate(lengths):
        assert_close(together[b : b + 1, :n], alone[b])
    if not whole and count > 10:
        sizes = [128] * ((count - 3) // 128 + 1) + [1, 1]
        for found, expected in zip(ragged(model, model, text, lengths, sizes, **options), alone, strict=True):
            assert_close(found, expected)


def check_compiled(model: Llama, forward, make, seed: int, whole: bool = False) -> None:
    """Compare compiled steps to the definition: a ragged batch in two chunks and two steps. whole: in one piece."""
    layers, text = model.config.num_hidden_layers, Text.of(258)
    options = make(Parameters(seed))
    if whole:
        part = {name: x.contiguous() for name, x in text.part(0, 128).items()}
        dense = model(**part, backend="dense", **options)
        assert_close(forward(part.pop("input_ids"), **part, **options), dense, layers)
        return
    lengths = (258, 203)
    for b, found in enumerate(ragged(forward, model, text, lengths, (128, 128, 1, 1), **options)):
        own = make(Parameters(seed, (b,)))
        assert_close(found, model(**text.row(b, lengths[b]), backend="dense", **own), layers)


def unique_graphs() -> int:
    """Return how many graphs torch has compiled in this process."""
    return counters["stats"]["unique_graphs"]


def deep_model(folder: Path) -> Llama:
    """Return a model with grouped queries and four layers, saved to and loaded from a folder."""
    tiny_reference(**TINY["gqa"], head_dim=32, hidden_size=32 * HEADS, num_hidden_layers=4).save_pretrained(folder)
    return Llama.from_pretrained(folder, device="cpu", dtype=torch.float32)
