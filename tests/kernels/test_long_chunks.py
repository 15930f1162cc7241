"""Attention of long chunks on a CUDA device, whose tiles are other ones: python -m pytest -m gpu"""

import pytest
import torch

from llama_flex import Engine, Llama, LlamaConfig, Mask, Sampling, masks, scores
from llama_flex.attention import attend, build_attention_metadata
from llama_flex.kernels.flex_attention import has_flash, kernel_options
from llama_flex.masks.plan import AttentionPlan
from llama_flex.tokens import Tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
HELD, NEW, SLOTS, HEADS, KV_HEADS = 1100, 8192, 9472, 4, 2
MASKS = {
    "causal": masks.causal(),
    "bidirectional": masks.bidirectional(),
    "sliding_window": masks.sliding_window(1000),
    "bidirectional_window": masks.bidirectional_window(600),
    "sink": masks.sliding_window(300) | masks.sink(5),
    "prefix_lm": masks.prefix_lm(3000),
    "chunked": masks.chunked(1000),
    "dilated": masks.dilated(3),
    "global_tokens": masks.sliding_window(200) | masks.global_tokens([3, 900, 3500]),
    "document": masks.causal() & masks.document(),
    "shared_prefix": masks.shared_prefix(1500),
    "fused": masks.fused(),
    "tree": masks.tree([-1, *range(1500), 700, *range(1501, 1800)], 1000),
    "many together": (masks.fused() & masks.chunked(4000) | masks.sink(9) & masks.dilated(5))
    & (masks.shared_prefix(2000) | masks.prefix_lm(3000) & ~masks.bidirectional_window(40)),
    "own, by head": Mask(lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < 400 * (q.head + 1)), "by_head"),
}


def tokens(start: int, count: int, slots: int) -> Tokens:
    """Return tokens in documents of 700, and free slots after them."""
    index = torch.arange(start, start + slots, dtype=torch.int32, device="cuda")[None]
    index = torch.where(index < start + count, index, -1)
    return Tokens(index, index.clamp(min=0), (index // 700).clamp(min=0).to(torch.int32))


def plan_of(mask: Mask, score_mod=None) -> AttentionPlan:
    device = torch.device("cuda")
    plan = AttentionPlan.make(mask, score_mod, default=[masks.causal()], cache_mask=None, device=device)
    return plan.with_flash if has_flash(device) else plan


@torch.no_grad()
def check(mask: Mask, wanted: Mask, score_mod=None) -> None:
    """Compare a chunk's attention under a mask with float64's under the one that is wanted."""
    draws = torch.Generator("cuda").manual_seed(0)
    shapes = (HEADS, NEW), (KV_HEADS, SLOTS), (KV_HEADS, SLOTS)
    q, k, v = (torch.randn(1, *shape, 128, device="cuda", generator=draws).bfloat16() for shape in shapes)
    new, held = tokens(HELD, NEW, NEW), tokens(0, HELD + NEW, SLOTS)
    [attention], [truth] = plan_of(mask, score_mod).variants, plan_of(wanted, score_mod).variants

    torch._dynamo.reset()
    build = torch.compile(build_attention_metadata, dynamic=False)  # in a part of its own, as in an engine
    found = torch.compile(attend, dynamic=False)(q, k, v, build(attention, new, held, HEADS, "flex"))
    dense = build_attention_metadata(truth, new, held, HEADS, "dense")
    exact = attend(q.double(), k.double(), v.double(), dense)
    theirs = (attend(q, k, v, dense).double() - exact).abs()
    error = (found.double() - exact).abs()
    # The kernel rounds weights to 16 bits before it multiplies them; the definition keeps them in float32.
    assert error.mean() <= 2 * theirs.mean()
    assert error.max() <= 4 * theirs.max()


@pytest.mark.parametrize("name", MASKS)
def test_a_long_chunk_under_any_mask_is_attended_to_as_defined(name):
    check(MASKS[name], MASKS[name])


@pytest.mark.skipif(not torch.cuda.is_available() or not has_flash(torch.device("cuda")), reason="needs flash-attn-4")
def test_flash_computes_the_masks_that_look_up_no_table():
    q = torch.zeros(1, HEADS, NEW, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        flash = {
            name
            for name, mask in MASKS.items()
            if "BACKEND" in kernel_options(q, q, paged=False, plain=True, flash=plan_of(mask).variants[0].flash)
        }
    assert flash == MASKS.keys() - {"global_tokens", "tree", "own, by head"}


def test_the_check_finds_a_window_that_is_too_narrow():
    with pytest.raises(AssertionError):
        check(masks.sliding_window(999), masks.sliding_window(1000))


def test_scores_of_a_long_chunk_are_those_defined():
    check(masks.causal(), masks.causal(), scores.alibi(HEADS))


@torch.no_grad()
def test_a_prompt_of_several_large_chunks_is_continued_as_defined():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384}
    model = Llama(LlamaConfig(**sizes, **heads)).eval().requires_grad_(False).cuda()
    ids = torch.randint(96, (8900,)).tolist()
    [found] = Engine(model, compile=True).generate([ids], max_new_tokens=3, sampling=Sampling(), stop_token_ids=())
    logits = model(torch.tensor([ids + found.tokens[:-1]]), backend="dense", logits_to_keep=3)
    assert found.tokens == logits[0].argmax(-1).tolist()
