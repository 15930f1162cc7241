"""Masks and score functions, alone and combined: dense = eager = chunks and steps = ragged batches = compiled.

By default all masks and score functions are compiled at least once, several in a graph; `-m slow` compiles each alone,
and every combination.
"""

import itertools
import random
from typing import NamedTuple

import pytest
import torch
from helpers import TINY, compiled_forward, tiny_reference
from torch._dynamo.utils import counters

from llama_flex import Engine, Llama, Mask, ScoreMod, masks, scores
from llama_flex.attention import LayerAttention, attend, build_attention_metadata
from llama_flex.masks.block_mask import BlockLists
from llama_flex.tokens import Tokens

HEADS = TINY["gqa"]["num_attention_heads"]
# Twice what the reference (eager, float32) differs by between a whole text of 140 tokens and its tokens one by one:
# 7.3e-5 with two layers, 3.0e-4 with four. Its eager and sdpa attention differ by less, at up to 1000 tokens.
ATOL = {2: 1.5e-4, 4: 6e-4}
NOTICED = 1e-2  # what a mistake changes at least; logits are of the size of 10


class Parameters:
    """Draws the tensors of a rule for some rows of the batch: each row has the same ones, whatever rows are with it."""

    def __init__(self, seed: int, rows: tuple[int, ...] = (0, 1)) -> None:
        self.draws, self.rows = torch.Generator().manual_seed(seed), list(rows)

    def number(self, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (2,), generator=self.draws)[self.rows]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draws)

    def by_row(self, count: int) -> torch.Tensor:
        return self.normal(2, count)[self.rows]

    def trees(self, nodes: int) -> torch.Tensor:
        rows = torch.rand(2, nodes, generator=self.draws) * torch.arange(nodes)
        return (rows.ceil().int() - 1)[self.rows]


def window_of_each_head(p: Parameters) -> Mask:
    widths = torch.randint(1, 150, (HEADS,), generator=p.draws)
    return Mask.from_mask_mod(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < widths[h]))


def slope_of_each_head(p: Parameters) -> ScoreMod:
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
# A token may only come with those after it that it sees: see `masks.bidirectional`.
IN_ONE_PIECE = {"bidirectional"}


def combination(seed: int):
    """A random way to attend, a function from Parameters to the options of a forward.

    causal() is outside, so that it holds in pieces of any size.
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
        inner, itself = expression(2), r.random() < 0.7  # else some tokens may see nothing, not even themselves
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
    """Two rows of tokens in segments: the shared one first, then some with positions that start anew, and generated
    tokens last."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor

    @classmethod
    def of(cls, count: int) -> "Text":
        index = torch.arange(count)
        segments = torch.stack([(index + offset) // 45 for offset in (0, 17)])
        positions = torch.stack([(index + offset) % 45 + 3 * index.ge(90) for offset in (0, 17)])
        segments[:, max(count - 10, 1) :] = masks.GENERATED
        ids = torch.randint(512, (2, count), generator=torch.Generator().manual_seed(count))
        return cls(ids, positions, segments)

    def part(self, start, stop) -> dict:
        return {name: x[:, start:stop] for name, x in self._asdict().items()}

    def row(self, b: int, stop: int) -> dict:
        return {name: x[b : b + 1, :stop] for name, x in self._asdict().items()}


def pieces(count: int) -> list[tuple[int, int]]:
    """Chunks of up to 128, and the last two tokens one by one."""
    long = max(count - 2, 1)
    cuts = [*range(0, long, 128), *range(long, count + 1)]
    return list(itertools.pairwise(cuts))


def in_pieces(forward, model: Llama, text: Text, **options) -> torch.Tensor:
    """The logits of a text that is appended to a cache."""
    count = text.input_ids.shape[1]
    cache = model.new_cache(2, count)
    parts = [text.part(a, b) for a, b in pieces(count)]
    return torch.cat([forward(part.pop("input_ids"), **part, cache=cache, **options) for part in parts], dim=1)


def ragged(forward, model: Llama, text: Text, lengths: tuple[int, int], sizes, **options) -> list[torch.Tensor]:
    """Both rows appended to one cache, each only as far as its length: chunks of the given sizes, the last ones of both
    rows two single tokens; the logits `[1, length, V]` of each row."""
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


def close(found: torch.Tensor, expected: torch.Tensor, layers: int = 2) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[layers])


def check_eager(model: Llama, make, count: int, whole: bool = False) -> None:
    text, options = Text.of(count), make(Parameters(count))
    dense = model(**text._asdict(), backend="dense", **options)
    close(model(**text._asdict(), **options), dense)
    if not whole:
        close(in_pieces(model, model, text, **options), dense)
    lengths = (count, max(count - 2 - count // 5, 1))
    together = model(**text._asdict(), lengths=torch.tensor(lengths), **options)
    alone = [model(**text.row(b, n), backend="dense", **make(Parameters(count, (b,)))) for b, n in enumerate(lengths)]
    for b, n in enumerate(lengths):
        close(together[b : b + 1, :n], alone[b])
    if not whole and count > 10:
        sizes = [128] * ((count - 3) // 128 + 1) + [1, 1]
        for found, expected in zip(ragged(model, model, text, lengths, sizes, **options), alone, strict=True):
            close(found, expected)


def check_compiled(model: Llama, forward, make, seed: int, whole: bool = False) -> None:
    """A ragged batch in two chunks and two steps; a mask that holds only in one piece: in one."""
    layers, text = model.config.num_hidden_layers, Text.of(258)
    options = make(Parameters(seed))
    if whole:
        part = {name: x.contiguous() for name, x in text.part(0, 128).items()}
        dense = model(**part, backend="dense", **options)
        close(forward(part.pop("input_ids"), **part, **options), dense, layers)
        return
    lengths = (258, 203)
    for b, found in enumerate(ragged(forward, model, text, lengths, (128, 128, 1, 1), **options)):
        own = make(Parameters(seed, (b,)))
        close(found, model(**text.row(b, lengths[b]), backend="dense", **own), layers)


def unique_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def model(tiny_pair) -> Llama:
    return tiny_pair("gqa")[1]


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Llama:
    """As `model`, of four layers."""
    folder = tmp_path_factory.mktemp("deep")
    tiny_reference(**TINY["gqa"], head_dim=32, hidden_size=32 * HEADS, num_hidden_layers=4).save_pretrained(folder)
    return Llama.from_pretrained(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("name", ALONE)
def test_eager_pieces_and_ragged_batches_equal_dense(model, name, count):
    check_eager(model, ALONE[name], count, name in IN_ONE_PIECE)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] * (n >= 16)) for n in range(COMBINATIONS)])
def test_combinations_in_eager_pieces_and_ragged_batches_equal_dense(model, seed):
    for count in (300, (1, 127, 128, 129)[seed % 4]):
        check_eager(model, combination(seed), count)


@pytest.mark.parametrize("make", [ALONE["tree"], ALONE["temperature"], combination(0), combination(1)])
def test_long_texts_too(model, make):
    check_eager(model, make, 1000)


def test_eager_masks_of_different_make_follow_each_other(model):
    """With a cache and without: eager FlexAttention, too, has torch compile its call, keeps what it compiled, and then
    failed with 'NoneType' object is not subscriptable when a tensor that used to be two was one."""
    torch._dynamo.reset()
    width = torch.tensor([3, 4])
    mask = masks.causal() & (masks.sliding_window(width) | masks.sink(width.clone()))
    for count in (5, 200):
        model(Text.of(count).input_ids, mask=mask, cache=model.new_cache(2, count))
    ids = Text.of(150).input_ids
    close(model(ids, mask=masks.document()), model(ids, mask=masks.document(), backend="dense"))


def test_combinations_are_many_and_not_all_causal():
    """What is drawn is worth testing: distinct, of every kind, and seldom the same as plain causal attention."""
    made = [combination(seed)(Parameters(0)) for seed in range(COMBINATIONS)]
    names = [str(options) for options in made]
    assert len(set(names)) == COMBINATIONS
    for kind in ("|", "~", ">>", "causal", "sliding_window", "tree", "fused", "alibi", "segment_weights"):
        assert sum(kind in name for name in names) >= 3
    assert sum(isinstance(options["mask"], list) for options in made) >= 8
    segments = Text.of(300).segments
    everyone = Tokens.arriving(300, batch=2, segments=segments)
    causal = masks.causal().dense(everyone, everyone, HEADS)
    flat = [
        m for options in made for m in (options["mask"] if isinstance(options["mask"], list) else [options["mask"]])
    ]
    same = [bool((m.dense(everyone, everyone, HEADS) == causal).all()) for m in flat]
    assert sum(same) <= len(same) // 5


def test_positions_go_on_by_themselves_in_pieces(model):
    text, options = Text.of(200), combination(3)(Parameters(0))
    dense = model(text.input_ids, backend="dense", **options)
    cache = model.new_cache(2, 200)
    close(torch.cat([model(text.input_ids[:, a:b], cache=cache, **options) for a, b in pieces(200)], 1), dense)


def all_at_once(p: Parameters) -> dict:
    """Every mask and every score function, in four layers."""
    return {
        "mask": [
            MASKS["sliding_window"](p) | MASKS["sink"](p) | MASKS["global_tokens"](p),
            MASKS["shared_prefix"](p) | MASKS["chunked"](p) & ~MASKS["dilated"](p) | MASKS["from_mask_mod"](p),
            MASKS["tree"](p) & (MASKS["bidirectional"](p) | MASKS["document"](p)),
            MASKS["fused"](p) | MASKS["prefix_lm"](p) & ~MASKS["causal"](p),
        ],
        "score_mod": [
            SCORES["alibi"](p),
            SCORES["softcap"](p) >> SCORES["relative_bias"](p),
            SCORES["temperature"](p) >> SCORES["from_score_mod"](p),
            SCORES["segment_weights"](p),
        ],
    }


def test_everything_compiled_equals_dense_and_new_tensors_compile_nothing(deep):
    forward, before = compiled_forward(deep), unique_graphs()
    for seed in range(3):
        check_compiled(deep, forward, all_at_once, seed)
        assert len(forward.steps) == 2  # a chunk and a step
        # Each has what comes before the layers, and a layer of each pattern.
        assert unique_graphs() == before + 2 * (1 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_each_rule_compiled_equals_dense(model, name):
    forward, before, whole = compiled_forward(model), unique_graphs(), name in IN_ONE_PIECE
    for seed in range(2):
        check_compiled(model, forward, ALONE[name], seed, whole)
        assert len(forward.steps) == 2 - whole
        assert unique_graphs() == before + 2 * (2 - whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(COMBINATIONS))
def test_combinations_compiled_equal_dense(model, seed):
    forward, before = compiled_forward(model), unique_graphs()
    for draw in range(2):
        check_compiled(model, forward, combination(seed), draw)
        assert len(forward.steps) == 2
        assert unique_graphs() == before + 2 * 2


def test_engine_shares_compiled_steps_between_masks_of_the_same_code(model):
    """Whatever the values of tensors, however long the text grows: past the border of a block here."""
    prompts = [Text.of(120).input_ids[0].tolist(), Text.of(40).input_ids[1].tolist()]

    def options(p: Parameters) -> dict:
        mask = masks.sliding_window(p.number(3, 100)) | MASKS["global_tokens"](p) & ~MASKS["dilated"](p)
        return {"mask": mask, "score_mod": SCORES["alibi"](p) >> SCORES["temperature"](p), "stop_token_ids": ()}

    engine, before = Engine(model, compile=True), unique_graphs()
    completions = engine.generate(prompts, max_new_tokens=12, **options(Parameters(0)))
    assert len(engine.steps) == 2
    assert unique_graphs() == before + 2 * 2 + 1
    others = engine.generate(prompts, max_new_tokens=25, **options(Parameters(1)))
    assert len(engine.steps) == 2
    assert unique_graphs() == before + 2 * 2 + 1
    assert others[0].tokens[:12] != completions[0].tokens

    for b, prompt in enumerate(prompts):  # what the dense definition predicts
        ids = torch.tensor([prompt + others[b].tokens])
        own = options(Parameters(1, (b,)))
        own.pop("stop_token_ids")
        predicted = model(ids, backend="dense", **own)[0, len(prompt) - 1 : -1].argmax(-1)
        assert predicted.tolist() == others[b].tokens


def test_each_layer_has_its_own_pattern(model):
    """Against the layers run one by one."""
    text = Text.of(60)
    local, far = masks.sliding_window(5), masks.causal() & ~masks.sliding_window(9) | masks.sink(1)
    cap = scores.softcap(1.0)
    tokens = Tokens(torch.arange(60).int().expand(2, -1), text.positions.int(), text.segments.int())
    rotary = model.rotary(tokens)
    x = model.embed(text.input_ids)
    for block, pattern in zip(model.blocks(), (LayerAttention(local), LayerAttention(far, cap)), strict=True):
        x = block(x, rotary, pattern, build_attention_metadata(pattern, tokens, tokens, HEADS, "dense"), None, None)
    expected = torch.nn.functional.linear(model.norm(x), model.lm_head.weight)
    found = model(**text._asdict(), mask=[local, far], score_mod=[None, cap])
    close(found, expected)
    for mask, score_mod in (([far, local], [None, cap]), ([local, far], [cap, None]), ([local, far], None)):
        other = model(**text._asdict(), mask=mask, score_mod=score_mod)
        assert (other - expected).abs().max() > NOTICED


def test_none_is_causal_for_a_layer(model):
    text, local = Text.of(60), masks.sliding_window(5)
    expected = model(**text._asdict(), mask=[masks.causal(), local])
    assert torch.equal(model(**text._asdict(), mask=[None, local], score_mod=[None, None]), expected)


def test_blocks_are_listed_once_for_each_distinct_mask(deep, monkeypatch):
    calls = []
    listed = Mask.block_lists
    monkeypatch.setattr(Mask, "block_lists", lambda self, *args: calls.append(str(self)) or listed(self, *args))
    width = torch.tensor([5, 9])

    def alternating(make_a, make_b):
        return [make_a(), make_b(), make_a(), make_b()]

    text = Text.of(140)
    for mask, distinct in (
        (alternating(lambda: masks.sliding_window(5), masks.causal), 2),
        (alternating(lambda: masks.sliding_window(width) | masks.sink(1), masks.fused), 2),
        (alternating(lambda: masks.sliding_window(width.clone()), masks.causal), 3),  # tensors are not compared
        ([masks.sliding_window(w) for w in (5, 6, 5, 7)], 3),
        (masks.document() & masks.causal(), 1),
    ):
        calls.clear()
        in_pieces(deep, deep, text, mask=mask)
        assert len(calls) == distinct * len(pieces(140))
    calls.clear()
    cap, mask = scores.softcap(3.0), masks.causal()
    deep(text.input_ids, mask=mask, score_mod=[cap, None, cap, None])
    assert len(calls) <= 2


@pytest.mark.parametrize(("window", "differs"), [(100, False), (101, True), (99, True)])
def test_a_window_off_by_one_would_be_noticed(model, window, differs):
    text = Text.of(300)
    dense = model(**text._asdict(), mask=masks.sliding_window(100), backend="dense")
    found = in_pieces(model, model, text, mask=masks.sliding_window(window))
    assert ((found - dense).abs().max() > NOTICED) == differs


@pytest.mark.parametrize("mistake", [None, "positions", "segments", "index"])
def test_attributes_off_by_one_in_cached_decoding_would_be_noticed(model, mistake):
    text, cache = Text.of(140), model.new_cache(2, 140)
    options = {"mask": masks.shared_prefix(4) | masks.chunked(50), "score_mod": scores.alibi(HEADS)}
    dense = model(**text._asdict(), backend="dense", **options)
    model(**text.part(0, 128), cache=cache, **options)
    part = text.part(128, 140)
    if mistake == "index":
        cache.tokens.index.add_(cache.tokens.index.ge(0))
    elif mistake is not None:
        part[mistake] = part[mistake] + 1
    found = model(**part, cache=cache, **options)
    assert ((found - dense[:, 128:]).abs().max() > NOTICED) == (mistake is not None)


@pytest.mark.parametrize("score_mod", [None, scores.alibi(HEADS)])
def test_positions_that_do_not_start_anew_would_be_noticed(model, score_mod):
    text, options = Text.of(140), {"mask": masks.shared_prefix(30), "score_mod": score_mod}
    dense = model(**text._asdict(), backend="dense", **options)
    assert (model(text.input_ids, segments=text.segments, **options) - dense).abs().max() > NOTICED


def test_a_wrong_block_list_would_be_noticed():
    """Compiled, FlexAttention believes the lists: a missing block is not seen, a full one is not masked."""
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 32, generator=draws) for heads in (8, 2, 2))
    everyone, mask = Tokens.arriving(300), masks.sliding_window(torch.tensor([150]))
    pattern, lists = LayerAttention(mask), mask.block_lists(everyone, everyone, 8)

    @torch.compile(fullgraph=True, dynamic=False)
    def compiled(q, k, v, *lists):
        return attend(q, k, v, pattern, View(everyone, everyone, BlockLists(*lists)))

    expected = attend(q, k, v, pattern, build_attention_metadata(pattern, everyone, everyone, 8, "dense"))
    assert lists[0].tolist() == [[[1, 2, 3]]]
    assert lists[2].tolist() == [[[0, 0, 0]]]
    torch.testing.assert_close(compiled(q, k, v, *lists), expected, rtol=0, atol=2e-6)

    def wrong_rows(*changed: torch.Tensor) -> list[bool]:
        difference = (compiled(q, k, v, *changed) - expected).abs().amax((0, 1, 3))
        return [bool(rows.max() > 1e-3) for rows in difference.split(128)]

    fewer = lists[0] - torch.tensor([0, 0, 1])  # the last row of blocks without its last block
    assert wrong_rows(fewer, *lists[1:]) == [False, False, True]
    more = lists[2] + torch.tensor([1, 0, 0])  # the first row of blocks with a block of tokens to come
    assert wrong_rows(*lists[:2], more, torch.ones_like(lists[3])) == [True, False, False]
