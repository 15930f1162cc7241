"""Plans: each layer has its own mask and score function, and equal ones are computed once."""

import pytest
import torch
from attention_helpers import HEADS, NOTICED, Text, assert_close, deep_model, in_pieces, pieces
from helpers import few

from llama_flex import Llama, Mask, masks, scores
from llama_flex.attention import LayerAttention, build_attention_metadata
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


def test_each_layer_has_its_own_pattern(model):
    """Compare a forward to its layers run one by one."""
    text = Text.of(60)
    local, far = masks.sliding_window(5), masks.causal() & ~masks.sliding_window(9) | masks.sink(1)
    cap = scores.softcap(1.0)
    tokens = Tokens(torch.arange(60).int().expand(2, -1), text.positions.int(), text.segments.int())
    rotary = model.rotary(tokens)
    x = model.embed(text.input_ids)
    for block, attention in zip(model.blocks(), (LayerAttention(local), LayerAttention(far, cap)), strict=True):
        x = block(x, build_attention_metadata(attention, tokens, tokens, HEADS, "dense", rotary=rotary), None)
    expected = torch.nn.functional.linear(model.norm(x), model.lm_head.weight)
    found = model(**text._asdict(), mask=[local, far], score_mod=[None, cap])
    assert_close(found, expected)
    for mask, score_mod in (([far, local], [None, cap]), ([local, far], [cap, None]), ([local, far], None)):
        other = model(**text._asdict(), mask=mask, score_mod=score_mod)
        assert (other - expected).abs().max() > NOTICED


def test_none_is_causal_for_a_layer(model):
    text, local = Text.of(60), masks.sliding_window(5)
    expected = model(**text._asdict(), mask=[masks.causal(), local])
    assert torch.equal(model(**text._asdict(), mask=[None, local], score_mod=[None, None]), expected)


def alternating(make_a, make_b) -> list[Mask]:
    """Return four masks, each made anew."""
    return [make_a(), make_b(), make_a(), make_b()]


@pytest.fixture
def listed(monkeypatch) -> list[str]:
    """The name of each mask whose blocks are listed, in order."""
    calls, block_lists = [], Mask.block_lists
    monkeypatch.setattr(Mask, "block_lists", lambda self, *args: calls.append(str(self)) or block_lists(self, *args))
    return calls


WIDTH = torch.tensor([5, 9])
SEVERAL_MASKS = {  # masks of four layers, and how many of them are distinct
    "alternating": (alternating(lambda: masks.sliding_window(5), masks.causal), 2),
    "with one tensor": (alternating(lambda: masks.sliding_window(WIDTH) | masks.sink(1), masks.fused), 2),
    # the values of tensors are not compared
    "with copies of a tensor": (alternating(lambda: masks.sliding_window(WIDTH.clone()), masks.causal), 3),
    "of one kind": ([masks.sliding_window(w) for w in (5, 6, 5, 7)], 3),
    "one for all": (masks.document() & masks.causal(), 1),
}


@pytest.mark.parametrize("name", few(["of one kind"], [name for name in SEVERAL_MASKS if name != "of one kind"]))
def test_blocks_are_listed_once_for_each_distinct_mask(deep, listed, name):
    mask, distinct = SEVERAL_MASKS[name]
    in_pieces(deep, deep, Text.of(140), mask=mask)
    assert len(listed) == distinct * len(pieces(140))


@pytest.mark.exhaustive
def test_blocks_are_listed_at_most_once_for_each_score_function_of_a_mask(deep, listed):
    cap = scores.softcap(3.0)
    deep(Text.of(140).input_ids, mask=masks.causal(), score_mod=[cap, None, cap, None])
    assert 1 <= len(listed) <= 2
