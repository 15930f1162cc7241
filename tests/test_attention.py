"""Attention: dense = eager = chunks and steps = ragged batches = compiled, for every mask and score function.

All masks and score functions are compiled at least once, several in a graph; `-m slow` compiles each alone, and every
combination.
"""

import pytest
import torch
from attention_helpers import (
    ALONE,
    COMBINATIONS,
    HEADS,
    IN_ONE_PIECE,
    MASKS,
    NOTICED,
    SCORES,
    Parameters,
    Text,
    assert_close,
    check_compiled,
    check_eager,
    combination,
    deep_model,
    in_pieces,
    pieces,
    unique_graphs,
)
from helpers import compiled_forward, few

from llama_flex import Engine, Llama, masks, scores
from llama_flex.attention import AttentionMetadata, LayerAttention, attend, build_attention_metadata
from llama_flex.masks.block_mask import BlockLists
from llama_flex.tokens import Tokens


@pytest.fixture(scope="module")
def model(tiny_pair) -> Llama:
    return tiny_pair("gqa")[1]


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Llama:
    return deep_model(tmp_path_factory.mktemp("deep"))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


SOME = ["tree", "fused", "temperature"]


@pytest.mark.parametrize("count", few([129], [1, 127, 128, 300]))
@pytest.mark.parametrize("name", few(SOME, [name for name in ALONE if name not in SOME]))
def test_eager_pieces_and_ragged_batches_equal_dense(model, name, count):
    check_eager(model, ALONE[name], count, name in IN_ONE_PIECE)


@pytest.mark.parametrize(
    "seed",
    [
        3,
        *(
            pytest.param(n, marks=pytest.mark.exhaustive if n < 16 else pytest.mark.slow)
            for n in range(COMBINATIONS)
            if n != 3
        ),
    ],
)
def test_combinations_in_eager_pieces_and_ragged_batches_equal_dense(model, seed):
    for count in (300, (1, 127, 128, 129)[seed % 4]):
        check_eager(model, combination(seed), count)


@pytest.mark.exhaustive
@pytest.mark.parametrize("make", [ALONE["tree"], ALONE["temperature"], combination(0), combination(1)])
def test_long_texts_too(model, make):
    check_eager(model, make, 1000)


def test_eager_masks_of_different_make_follow_each_other(model):
    """Eager FlexAttention has torch compile its call, with a cache and without, and keeps what it compiled. It once
    failed with "'NoneType' object is not subscriptable" where two tensors had become one."""
    torch._dynamo.reset()
    width = torch.tensor([3, 4])
    mask = masks.causal() & (masks.sliding_window(width) | masks.sink(width.clone()))
    for count in (5, 200):
        model(Text.of(count).input_ids, mask=mask, cache=model.new_cache(2, count))
    ids = Text.of(150).input_ids
    assert_close(model(ids, mask=masks.document()), model(ids, mask=masks.document(), backend="dense"))


def test_combinations_are_many_and_not_all_causal():
    """The combinations are distinct, of every kind, and seldom the same as plain causal attention."""
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
    assert_close(torch.cat([model(text.input_ids[:, a:b], cache=cache, **options) for a, b in pieces(200)], 1), dense)


def all_at_once(p: Parameters) -> dict:
    """Return every mask and every score function, in four layers."""
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


@pytest.mark.exhaustive
def test_everything_compiled_equals_dense_and_new_tensors_compile_nothing(deep):
    forward, before = compiled_forward(deep), unique_graphs()
    for seed in range(3):
        check_compiled(deep, forward, all_at_once, seed)
        assert len(forward.steps) == 2  # a chunk and a step
        # Each has a graph of what comes before the layers, and one for each of the four variants of a layer.
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


@pytest.mark.exhaustive
def test_engine_shares_compiled_steps_between_masks_of_the_same_code(model):
    """Whatever the values of tensors are, and however long the text grows: here past the border of a block."""
    prompts = [Text.of(120).input_ids[0].tolist(), Text.of(40).input_ids[1].tolist()]

    def options(p: Parameters) -> dict:
        mask = masks.sliding_window(p.number(3, 100)) | MASKS["global_tokens"](p) & ~MASKS["dilated"](p)
        return {"mask": mask, "score_mod": SCORES["alibi"](p) >> SCORES["temperature"](p), "stop_token_ids": ()}

    engine, before = Engine(model, compile=True), unique_graphs()
    completions = engine.generate(prompts, max_new_tokens=12, **options(Parameters(0)))
    assert len(engine.runner.shapes) == 2
    assert unique_graphs() == before + 2 * 2 + 1
    others = engine.generate(prompts, max_new_tokens=25, **options(Parameters(1)))
    assert len(engine.runner.shapes) == 2
    assert unique_graphs() == before + 2 * 2 + 1
    assert others[0].tokens[:12] != completions[0].tokens

    for b, prompt in enumerate(prompts):  # the dense definition predicts the same
        ids = torch.tensor([prompt + others[b].tokens])
        own = options(Parameters(1, (b,)))
        own.pop("stop_token_ids")
        predicted = model(ids, backend="dense", **own)[0, len(prompt) - 1 : -1].argmax(-1)
        assert predicted.tolist() == others[b].tokens


@pytest.mark.parametrize(
    ("window", "differs"), [(100, False), (101, True), pytest.param(99, True, marks=pytest.mark.exhaustive)]
)
def test_a_window_off_by_one_would_be_noticed(model, window, differs):
    text = Text.of(300)
    dense = model(**text._asdict(), mask=masks.sliding_window(100), backend="dense")
    found = in_pieces(model, model, text, mask=masks.sliding_window(window))
    assert ((found - dense).abs().max() > NOTICED) == differs


@pytest.mark.exhaustive
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


@pytest.mark.parametrize("score_mod", few([None], [scores.alibi(HEADS)]))
def test_positions_that_do_not_start_anew_would_be_noticed(model, score_mod):
    text, options = Text.of(140), {"mask": masks.shared_prefix(30), "score_mod": score_mod}
    dense = model(**text._asdict(), backend="dense", **options)
    assert (model(text.input_ids, segments=text.segments, **options) - dense).abs().max() > NOTICED


@pytest.mark.exhaustive
def test_a_wrong_block_list_would_be_noticed():
    """Compiled FlexAttention trusts the lists: a missing block is not seen, a full one is not masked."""
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 32, generator=draws) for heads in (8, 2, 2))
    everyone, mask = Tokens.arriving(300), masks.sliding_window(torch.tensor([150]))
    attention, lists = LayerAttention(mask), mask.block_lists(everyone, everyone, 8)

    @torch.compile(fullgraph=True, dynamic=False)
    def compiled(q, k, v, *lists):
        return attend(q, k, v, AttentionMetadata(attention, everyone, everyone, BlockLists(*lists)))

    expected = attend(q, k, v, build_attention_metadata(attention, everyone, everyone, 8, "dense"))
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
