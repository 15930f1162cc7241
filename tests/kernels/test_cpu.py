"""The C++ kernels for products of few rows, dense attention and layers: exact, the same bits in any company, at any
width."""

import copy
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from llama_flex import Engine
from llama_flex import model as model_file
from llama_flex.attention import build_attention_metadata
from llama_flex.checkpoint.quantization import GROUP_SIZES, Quantization, assign
from llama_flex.config import LlamaConfig
from llama_flex.kernels import build, linear
from llama_flex.kernels import cpu as kernel
from llama_flex.kernels.cpu import Newest
from llama_flex.kernels.kv_cache import KV
from llama_flex.kernels.weight import MIDDLE, NF4, Weight, unpack
from llama_flex.layers import Block, Linear, RMSNorm, apply_linear, run_blocks
from llama_flex.masks.layout import PageTable
from llama_flex.masks.library import sliding_window
from llama_flex.masks.plan import LayerAttention
from llama_flex.rope import cos_sin
from llama_flex.tokens import Tokens

FORMATS = (
    None,
    Quantization("int8"),
    Quantization("fp8"),
    *(Quantization("int4", size, symmetric) for size in GROUP_SIZES for symmetric in (False, True)),
    *(Quantization("nf4", size) for size in GROUP_SIZES),
    *(Quantization("int8", size, symmetric) for size in GROUP_SIZES for symmetric in (False, True)),
)
CHECK = """
import torch
from llama_flex.kernels import build, linear
from llama_flex.kernels import cpu as kernel
from test_cpu import FORMATS, check_attention, check_block, check_product, check_rows
from test_reductions import check as check_reductions
torch.set_grad_enabled(False)
assert all(map(kernel.load, kernel.DTYPES)) and torch.backends.cpu.get_cpu_capability() == {capability!r}
check_reductions(9000, 3, 30.0, {{1: float("nan"), 2: -float("inf")}}, 0)
for n, dtype in enumerate(kernel.DTYPES):
    for rows, out, k in ((1, 1, 1), (3, 50, 127), (8, 33, 576), (5, 6, 65)):
        for gated in (False, True):
            parts = (n + rows) % 2 == 0, rows != 3, out != 50, gated
            for quantization in FORMATS:
                check_product(dtype, rows, 2 * out if gated else out, k, *parts, rows, quantization)
    for t, paged in ((1, False), (1, True), (45, False), (7, True)):
        check_attention(dtype, 2, t, 3, 2, 80, 300, paged, by_head=paged, seed=t)
    check_rows((3, 5, 83), n)
    for b, t in ((1, 1), (3, 1), (2, 7)):
        options = dict(paged=b == 3, biased=t == 1, head_norms=b != 1)
        for quantization in FORMATS[n::3]:
            check_block(dtype, b, t, 3, 2, 80, 200, **options, quantization=quantization, seed=t)
"""


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """Load the kernels, whichever test comes first."""
    assert all(map(kernel.load, kernel.DTYPES))


def exactly(weight: Weight) -> torch.Tensor:
    """Return a weight in float64."""
    return (weight if weight.scale is None else weight._replace(scale=weight.scale.double())).floats().double()


def fitting(k: int, quantization: Quantization | None) -> int:
    """Return the least number of columns from k on that has whole groups."""
    size = 1 if quantization is None else quantization.group_size or 1
    return -(-k // size) * size


def check_product(
    dtype: torch.dtype,
    rows: int,
    out: int,
    k: int,
    bias: bool,
    norm: bool,
    residual: bool,
    gated: bool,
    seed: int,
    quantization: Quantization | None = None,
) -> None:
    """Compare a product with float64: no further than rounding of what it reads, sums in float32, and one rounding.

    k: the least number of columns.
    """
    k = fitting(k, quantization)
    draws = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws).to(dtype)

    x, matrix = random(rows, k), (random(out, k) / math.sqrt(k)).to(dtype)
    b, n = random(out) if bias else None, random(k).abs() if norm else None
    r = random(rows, out // 2 if gated else out) if residual else None
    weight = Weight(matrix) if quantization is None else quantization.quantise(matrix, dtype)
    found = kernel.few_rows(x, weight, b, n, 1e-5, r, gated)
    weight, wide = exactly(weight), x.double()
    if n is not None:
        wide = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * n.double()).to(dtype).double()
    exact = wide @ weight.T + (0 if b is None else b.double())
    size = wide.abs() @ weight.abs().T + 1  # of what is summed
    if gated:
        gate, up = exact.chunk(2, -1)
        size = (size.chunk(2, -1)[0] + 1) * (size.chunk(2, -1)[1] + 1)
        exact = torch.nn.functional.silu(gate) * up
    exact = exact + (0 if r is None else r.double())
    # A norm may round to the number next to the one that float64 rounds to.
    unit = torch.finfo(torch.float32).eps * math.sqrt(k) + (torch.finfo(dtype).eps / 8 if norm else 0)
    bound = unit * size + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= bound).all()


@given(
    dtype=st.sampled_from(kernel.DTYPES),
    rows=st.integers(1, kernel.ROWS),
    out=st.integers(1, 70),
    k=st.integers(1, 700),
    bias=st.booleans(),
    norm=st.booleans(),
    residual=st.booleans(),
    gated=st.booleans(),
    seed=st.integers(0, 2**31),
    quantization=st.sampled_from(FORMATS),
)
@settings(max_examples=400, deadline=None)
def test_a_product_of_any_shape_is_that_of_float64(
    dtype, rows, out, k, bias, norm, residual, gated, seed, quantization
):
    check_product(dtype, rows, 2 * out if gated else out, k, bias, norm, residual, gated, seed, quantization)


FAULTS = {
    "the scale of a neighbour": lambda w: w._replace(scale=w.scale.roll(1, 0)),
    "the scale of the next group": lambda w: w._replace(scale=w.scale.roll(-1, 1)),
    "the zero point of the next group": lambda w: w._replace(zero=w.zero.roll(-1, 1)),
    "another zero point": lambda w: w._replace(zero=w.zero + 1),
    "no zero points": lambda w: w._replace(zero=None),
    "swapped numbers": lambda w: w._replace(numbers=swapped(w.numbers)),
    "the next word": lambda w: w._replace(numbers=w.numbers.roll(-1, 1)),
}


def swapped(words: torch.Tensor) -> torch.Tensor:
    """Swap the two numbers in each byte."""
    both = words.view(torch.uint8)
    return (both >> 4 | both << 4).view(words.dtype)


@pytest.mark.parametrize("dtype", kernel.DTYPES)
@pytest.mark.parametrize(
    ("fault", "quantization"),
    [
        ("the scale of a neighbour", Quantization("int8")),
        ("the scale of a neighbour", Quantization("fp8")),
        *((fault, Quantization("int4", size)) for fault in FAULTS for size in GROUP_SIZES),
        *((fault, Quantization("int8", size)) for fault in FAULTS if "swapped" not in fault for size in GROUP_SIZES),
        *((fault, Quantization("nf4", size)) for fault in FAULTS if "zero" not in fault for size in GROUP_SIZES),
    ],
)
def test_the_check_finds_a_fault_in_a_weight(monkeypatch, dtype, fault, quantization):
    few_rows = kernel.few_rows
    monkeypatch.setattr(kernel, "few_rows", lambda x, weight, *rest: few_rows(x, FAULTS[fault](weight), *rest))
    with pytest.raises(AssertionError):
        check_product(dtype, 2, 64, 640, False, False, False, False, 0, quantization)


@pytest.mark.parametrize("dtype", kernel.DTYPES)
@torch.no_grad()
def test_every_number_of_few_bits_is_read_as_it_is(dtype):
    """Check all numbers at all places of a row, times 1: exact."""
    places, draws = torch.eye(160, dtype=dtype)[:, None], torch.Generator().manual_seed(0)
    bytes_ = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 160).contiguous()
    one = torch.ones(256, 1, dtype=dtype)
    four_bits = torch.randint(-(2**31), 2**31, (256, 20), generator=draws).int()
    zero = torch.randint(0, 16, (256, 5), generator=draws, dtype=torch.uint8)
    ones = one.expand(-1, 5)
    eight = torch.randint(0, 256, (256, 1), generator=draws, dtype=torch.uint8).expand(-1, 5)
    numbers = unpack(four_bits)
    for weight, exact in (
        (Weight(bytes_.view(torch.int8), one), bytes_.view(torch.int8)),
        (Weight(bytes_.view(torch.float8_e4m3fn), one), bytes_.view(torch.float8_e4m3fn)),
        (Weight(bytes_.view(torch.int8), ones), bytes_.view(torch.int8)),
        (Weight(bytes_.view(torch.int8), ones, eight), bytes_.int() + 256 * (bytes_ < 128) - 128 - eight[:, :1].int()),
        (Weight(four_bits, ones), numbers - MIDDLE),
        (Weight(four_bits, ones, zero), numbers - zero.repeat_interleave(32, 1)),
        (Weight(four_bits.view(torch.uint8), torch.ones(256, 5)), torch.tensor(NF4)[numbers]),
    ):
        found = torch.cat([kernel.few_rows(x, weight, None) for x in places])
        known = exact.to(dtype).isfinite().T  # float8's two NaN are none of the quantiser's
        assert torch.equal(found[known], exact.to(dtype).T[known])


def test_the_check_finds_a_column_that_is_left_out(monkeypatch):
    few_rows = kernel.few_rows

    def without_the_last(x, weight, *rest):
        return few_rows(torch.cat((x[:, :-1], torch.zeros_like(x[:, :1])), 1), weight, *rest)

    monkeypatch.setattr(kernel, "few_rows", without_the_last)
    with pytest.raises(AssertionError):
        check_product(torch.bfloat16, 2, 64, 128, False, False, False, False, 0)


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_a_row_has_the_same_bits_in_any_company(dtype, quantization):
    k = fitting(577, quantization)
    x, matrix, norm = torch.randn(8, k).to(dtype), torch.randn(131, k).to(dtype), torch.rand(k).to(dtype)
    weight = Weight(matrix) if quantization is None else quantization.quantise(matrix, dtype)
    for gated in (False, True):
        weights = Weight(*(None if part is None else part[:130] for part in weight)) if gated else weight
        together = kernel.few_rows(x, weights, None, norm, 1e-6, None, gated)
        for first in range(8):
            for last in range(first + 1, 9):
                some = kernel.few_rows(x[first:last], weights, None, norm, 1e-6, None, gated)
                assert torch.equal(some, together[first:last])


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_nan_and_infinity_reach_the_rows_that_have_them_and_no_others(dtype, quantization):
    k = fitting(40, quantization)
    x, matrix = torch.ones(4, k, dtype=dtype), torch.ones(6, k, dtype=dtype)
    x[1, 3], x[2, 39] = torch.nan, torch.inf
    weight = Weight(matrix) if quantization is None else quantization.quantise(matrix, dtype)
    y = kernel.few_rows(x, weight, None)
    assert y.isnan().tolist() == [[n == 1] * 6 for n in range(4)]
    assert y.isinf().tolist() == [[n == 2] * 6 for n in range(4)]


def check_rows(shape: tuple[int, ...], seed: int) -> None:
    """Compare RMSNorm and SwiGLU with float64: float32's error, and one rounding."""
    draws, dtype = torch.Generator().manual_seed(seed), torch.bfloat16
    x, weight = (8 * torch.randn(size, generator=draws).to(dtype) for size in (shape, shape[-1:]))
    both = 8 * torch.randn(*shape[:-1], 2 * shape[-1], generator=draws).to(dtype)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    gate, up = both.double().chunk(2, -1)
    for found, truth in (
        (kernel.normalise(x, weight, 1e-5), exact),
        (kernel.swiglu(both), torch.nn.functional.silu(gate) * up),
    ):
        assert found.dtype == dtype
        assert found.shape == truth.shape
        bound = (torch.finfo(dtype).eps + 1e-6) * truth.abs() + 1e-30
        assert ((found.double() - truth).abs() <= bound).all()


@given(shape=st.lists(st.integers(1, 70), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_norm_and_swiglu_of_any_shape_are_those_of_float64(shape, seed):
    check_rows(shape, seed)


@torch.no_grad()
def test_norm_and_swiglu_keep_what_is_not_finite_and_leave_the_rest_to_torch(monkeypatch):
    x = torch.ones(3, 40, dtype=torch.bfloat16)
    x[0, 1], x[1, 20] = torch.nan, torch.inf
    assert kernel.swiglu(x).isfinite().logical_not().sum(-1).tolist() == [1, 1, 0]
    assert kernel.normalise(x, torch.ones_like(x[0]), 0.0).isnan().any(-1).tolist() == [True, True, False]
    assert kernel.swiglu(x[:2, :0]).shape == (2, 0)
    strided = torch.randn(6, 4).bfloat16().T
    assert torch.equal(kernel.swiglu(strided), kernel.swiglu(strided.contiguous()))
    for other in (x.half(), x.float(), x.to("meta")):
        assert kernel.swiglu(other) is None
        assert kernel.normalise(other, torch.ones(40, dtype=other.dtype), 0.0) is None
    for weight in (torch.ones(40), torch.ones(1).bfloat16(), torch.ones(40).bfloat16().to("meta")):
        assert kernel.normalise(x, weight, 0.0) is None
    with torch.enable_grad():
        assert kernel.swiglu(x) is None
    exact = kernel.swiglu
    monkeypatch.setattr(kernel, "swiglu", lambda x: exact(x.roll(1, -1)))
    with pytest.raises(AssertionError):
        check_rows((2, 6), 0)


def check_attention(
    dtype: torch.dtype, b: int, t: int, group: int, kv_heads: int, d: int, s: int, paged: bool, by_head: bool, seed: int
) -> None:
    """Compare attention of t new tokens in each of b rows of s slots, some of which see nothing, with float64."""
    draws = torch.Generator().manual_seed(seed)
    h, blocks = group * kv_heads, -(-s // 128)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws).to(dtype)

    q, k, v = random(b, t, h + 2 * kv_heads, d).split((h, kv_heads, kv_heads), 2)
    angles = torch.randn(b, 1, t, d // 2, generator=draws)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.stack([torch.randperm(s, generator=draws)[:t] for _ in range(b)])
    visible = torch.rand(b, h if by_head else 1, t, s, generator=draws) < 0.3
    visible[0, 0, -1] = False
    visible[-1, :, :, :128] = False
    table, held = None, slots
    if paged:
        table = torch.randperm(b * blocks, generator=draws).view(b, blocks).int()
        held = table.gather(1, slots // 128).long() * 128 + slots % 128
    kv = KV(*(random(1, kv_heads, (b * blocks + 1) * 128, d) for _ in range(2)))
    if table is None:
        kv = KV(*(random(b, kv_heads, s + 128, d) for _ in range(2)))
    found = kernel.attend_newest(q, k, v, Newest(cos, sin, held, visible, table), kv)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, -1)
        c, n = cos.transpose(1, 2), sin.transpose(1, 2)
        return torch.cat((first * c - second * n, second * c + first * n), -1).to(dtype)

    places = torch.arange(blocks * 128).expand(b, -1)
    if table is not None:
        places = table.gather(1, places // 128).long() * 128 + places % 128
    keys, values = (
        x.expand(b, -1, -1, -1)[torch.arange(b)[:, None], :, places[:, :s]].transpose(1, 2) for x in (kv.k, kv.v)
    )
    row = torch.arange(b)[:, None]
    unit = torch.finfo(torch.float32).eps
    assert torch.equal(values[row, :, slots], v)
    off = (keys[row, :, slots].double() - rotated(k).double()).abs()  # a product may be rounded once less
    assert (off <= torch.finfo(dtype).eps * rotated(k).double().abs() + 4 * unit).all()
    wide = [x.double().repeat_interleave(group, 1) for x in (keys, values)]
    scores = (rotated(q).double().transpose(1, 2) @ wide[0].transpose(-1, -2)) * d**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
    exact = (weights @ wide[1]).transpose(1, 2).flatten(2)
    bound = 1e-5 + torch.finfo(dtype).eps * (8 if dtype.itemsize == 2 else 1)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= bound).all()


@given(
    dtype=st.sampled_from(kernel.DTYPES),
    b=st.integers(1, 3),
    t=st.sampled_from([1, 1, 2, 31, 33, 70]),
    group=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    d=st.sampled_from([2, 16, 32, 64, 80, 96, 100, 128]),
    s=st.sampled_from([71, 128, 129, 300]),
    paged=st.booleans(),
    by_head=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_attention_of_any_shape_is_that_of_float64(dtype, b, t, group, kv_heads, d, s, paged, by_head, seed):
    check_attention(dtype, b, t, group, kv_heads, d, s, paged, by_head, seed)


@pytest.mark.parametrize("t", [1, 40])
def test_the_check_finds_a_slot_that_is_left_out(monkeypatch, t):
    attend_newest = kernel.attend_newest

    def without_the_last(q, k, v, newest, kv):
        visible = newest.visible & (torch.arange(newest.visible.shape[3]) < 299)
        return attend_newest(q, k, v, newest._replace(visible=visible), kv)

    monkeypatch.setattr(kernel, "attend_newest", without_the_last)
    with pytest.raises(AssertionError):
        check_attention(torch.float32, 2, t, 3, 2, 64, 300, False, False, 0)


@pytest.mark.parametrize("t", [1, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_is_seen(t, value):
    """Check that a query whose scores are NaN or infinite gets NaN, as by definition, alone."""
    q, k = torch.ones(1, t, 2, 32), torch.ones(1, t, 1, 32)
    q[0, 0, 1, 0] = value
    kv = KV(torch.ones(1, 1, 256, 32), torch.ones(1, 1, 256, 32))
    rotary = torch.ones(1, 1, t, 16), torch.zeros(1, 1, t, 16)
    seen = torch.ones(1, 1, t, 200, dtype=torch.bool)
    y = kernel.attend_newest(q, k, k, Newest(*rotary, torch.arange(t)[None], seen), kv).unflatten(-1, (2, 32))
    assert y.isnan().all(-1).flatten().nonzero()[:, 0].tolist() == [1]


@pytest.mark.parametrize("t", [1, 40])
def test_scores_that_are_all_minus_infinity_are_not_taken_for_nothing_to_see(t):
    q, k = torch.full((1, t, 2, 32), -1e30), torch.full((1, t, 1, 32), 1e30)
    kv = KV(torch.full((1, 1, 256, 32), 1e30), torch.ones(1, 1, 256, 32))
    rotary, seen = (torch.ones(1, 1, t, 16), torch.zeros(1, 1, t, 16)), torch.ones(1, 2, t, 200, dtype=torch.bool)
    seen[:, 1] = False
    y = kernel.attend_newest(q, k, k, Newest(*rotary, torch.arange(t)[None], seen), kv).unflatten(-1, (2, 32))
    assert y[:, :, 0].isnan().all()
    assert (y[:, :, 1] == 0).all()


@torch.no_grad()
def test_tensors_in_any_layout_are_read_as_they_are(tiny_pair):
    model, positions = tiny_pair("gqa")[1], torch.tensor([[0, 7], [1, 9], [2, 11]]).T
    ids, logits = torch.tensor([[5, 6, 7], [8, 9, 10]]), []
    for at in (positions, positions.contiguous()):
        logits.append(model(ids, positions=at, cache=model.new_cache(2, 8), backend="dense"))
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], model(ids, positions=positions, backend="dense"))
    heads = torch.randn(1, 2, 4, 16)
    rotary = torch.ones(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)
    kv = KV(torch.zeros(1, 4, 128, 16), torch.zeros(1, 4, 128, 16))
    seen = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    other = heads.transpose(1, 2).contiguous().transpose(1, 2)
    y = [kernel.attend_newest(x, x, x, Newest(*rotary, torch.arange(2)[None], seen), kv) for x in (heads, other)]
    assert torch.equal(*y)


@pytest.mark.parametrize("t", [1, 100])
def test_the_number_of_threads_changes_no_bit(t):
    q, k = torch.randn(2, t, 6, 64), torch.randn(2, t, 3, 64)
    rotary, slots = (torch.randn(2, 1, t, 32), torch.randn(2, 1, t, 32)), torch.arange(t).expand(2, -1).contiguous()
    kv, seen = KV(torch.randn(2, 3, 512, 64), torch.randn(2, 3, 512, 64)), torch.rand(2, 1, t, 500) < 0.5
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kernel.attend_newest(q, k, k, Newest(*rotary, slots, seen), kv))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def linears(block: Block) -> list[Linear]:
    """Return the linear layers of a block."""
    return [module for module in block.modules() if isinstance(module, Linear)]


def check_block(
    dtype: torch.dtype,
    b: int,
    t: int,
    group: int,
    kv_heads: int,
    d: int,
    s: int,
    *,
    paged: bool,
    biased: bool,
    head_norms: bool,
    quantization: Quantization | None = None,
    seed: int,
) -> None:
    """Compare a layer for t new tokens in each of b rows, which hold up to s others, with the definition in float64: no
    further from it than torch's operations are, by more than their own error."""
    torch.manual_seed(seed)
    config = {
        "architectures": ["Qwen3ForCausalLM" if head_norms else "LlamaForCausalLM"],
        "model_type": "qwen3" if head_norms else "llama",
        "vocab_size": 8,
        "hidden_size": fitting(72, quantization),
        "intermediate_size": fitting(100, quantization),
        "num_hidden_layers": 1,
        "num_attention_heads": group * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d,
        "rms_norm_eps": 1e-5,
        "attention_bias": biased,
    }
    config |= {} if head_norms else {"mlp_bias": biased}
    block = Block(LlamaConfig.from_dict(config), None).requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter) if parameter.dim() == 1 else 2 * parameter)
    block, blocks = block.to(dtype), -(-(s + t) // 128)
    for module in linears(block) if quantization else ():
        if fitting(module.in_features, quantization) == module.in_features:  # else the layer has both kinds
            assign(module, quantization.quantise(module.weight, dtype))
    held = torch.randint(0, s, (b, 1)) if s else torch.zeros(b, 1, dtype=torch.int64)
    index = (held + torch.arange(t)).int()
    kv = Tokens(torch.arange(blocks * 128).expand(b, -1).int(), *torch.zeros(2, b, blocks * 128).int())
    kv = kv._replace(index=torch.where(kv.index < held + t, kv.index, -1))
    pages, slots, rows = None, index.long(), b
    if paged:
        table = torch.randperm(b * blocks).view(b, blocks).int()
        inverse = torch.full((b, b * blocks + 1), -1, dtype=torch.int32)
        inverse.scatter_(1, table.long(), torch.arange(blocks).int().expand(b, -1))
        pages, rows = PageTable(table, inverse), 1
        slots = table.gather(1, slots // 128).long() * 128 + slots % 128
    shape = rows, kv_heads, (b * blocks + 1) * 128 if paged else blocks * 128, d
    q, x = Tokens(index, index, torch.zeros_like(index)), torch.randn(b, t, config["hidden_size"]).to(dtype)
    cache = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    def run(block: Block, dtype: torch.dtype, kernels: bool) -> tuple[torch.Tensor, ...]:
        rotary = cos_sin(index, torch.rand(d // 2, generator=torch.Generator().manual_seed(seed)).to(dtype))
        args = LayerAttention(sliding_window(150)), q, kv, group * kv_heads, "dense", pages
        metadata = build_attention_metadata(*args, rotary=rotary, slots=slots)
        kind = torch.float64 if dtype == torch.float64 else x.dtype
        kvs = [KV(*(each.to(kind, copy=True) for each in pair)) for pair in (cache, cache[::-1])]
        y = x.to(kind)
        if kernels:
            y = run_blocks(y, [(block, metadata, layer) for layer in kvs])
            assert y is not None
        else:
            for layer in kvs:
                y = block(y, metadata._replace(newest=None), layer)
        return y, *kvs[0][:2], *kvs[1][:2]

    found, plain = run(block, torch.float32, True), run(block, torch.float32, False)
    for module in linears(wide := copy.deepcopy(block)):
        assign(module, Weight(exactly(module.matrix)))
    exact = run(wide.double(), torch.float64, False)
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == truth.shape
        error = (theirs.double() - truth).abs().max()
        most = 3 * error + 8 * torch.finfo(dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= most


@given(
    dtype=st.sampled_from(kernel.DTYPES),
    rows=st.sampled_from([(1, 1), (1, 1), (2, 1), (16, 1), (1, 16), (3, 5), (2, 2)]),
    group=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    d=st.sampled_from([2, 16, 64, 80, 100, 128]),
    s=st.sampled_from([0, 1, 127, 128, 300]),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("paged", "biased", "head_norms")}),
    quantization=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
@torch.no_grad()
def test_a_layer_of_any_shape_is_that_of_float64(dtype, rows, group, kv_heads, d, s, options, quantization, seed):
    check_block(dtype, *rows, group, kv_heads, d, s, **options, quantization=quantization, seed=seed)


@pytest.mark.parametrize("fault", ["slots", "cos", "visible"])
@torch.no_grad()
def test_the_check_of_layers_finds_a_fault(monkeypatch, fault):
    run = kernel.run_blocks

    def faulty(x, layers):
        newest = layers[0].newest
        wrong = newest._replace(**{fault: getattr(newest, fault).roll(1, -1)})
        return run(x, [layer._replace(newest=wrong) for layer in layers])

    monkeypatch.setattr(kernel, "run_blocks", faulty)
    with pytest.raises(AssertionError):
        check_block(torch.float32, 2, 3, 2, 2, 64, 100, paged=False, biased=True, head_norms=False, seed=0)


@torch.no_grad()
def test_a_layer_that_the_kernel_has_no_code_for_is_left_to_torch(tiny_pair, monkeypatch):
    """Check odd modules, hooks, dtypes, shapes and many rows: the same logits, without the kernel."""
    model, ids, calls = copy.deepcopy(tiny_pair("gqa")[1]), torch.tensor([[7]]), []
    block = next(model.blocks())

    def logits() -> torch.Tensor:
        calls.clear()
        cache = model.new_cache(1, 8)
        model(torch.tensor([[5, 6]]), cache=cache, backend="dense")
        with monkeypatch.context() as patched:
            patched.setattr(model_file, "run_blocks", lambda *given: calls.append(run_blocks(*given)) or calls[-1])
            return model(ids, cache=cache, backend="dense")

    expected = logits()
    assert calls[0] is not None
    for module in (block, block.attention, block.mlp, block.attention.o, block.mlp.norm):
        handle = module.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(logits(), expected)
        assert calls == [None]
        handle.remove()
    for module in (block, block.attention, block.mlp, block.attention.o):
        module.forward = module.forward
        torch.testing.assert_close(logits(), expected)
        assert calls == [None]
        del module.forward
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        torch.testing.assert_close(logits(), expected)
        assert calls == [None]
    weight = block.mlp.down.weight
    del block.mlp.down.weight
    block.mlp.down.weight = weight.clone()  # no parameter
    torch.testing.assert_close(logits(), expected)
    assert calls == [None]
    del block.mlp.down.weight
    block.mlp.down.weight = torch.nn.Parameter(weight.T.contiguous().T, requires_grad=False)
    torch.testing.assert_close(logits(), expected)
    assert calls == [None]
    block.mlp.down.weight = weight
    scripted = torch.nn.Linear(*weight.shape[::-1], bias=False).requires_grad_(False)
    scripted.weight.copy_(weight)
    down, block.mlp.down = block.mlp.down, torch.jit.trace(scripted, torch.zeros(1, 1, weight.shape[1]))
    torch.testing.assert_close(logits(), expected)
    assert calls == [None]
    block.mlp.down, down.bias = down, torch.nn.Parameter(torch.zeros(0), requires_grad=False)
    with pytest.raises(RuntimeError, match="size"):  # it is not left out
        logits()
    down.bias = None
    block.mlp.norm.double()
    assert logits().shape == expected.shape
    assert calls == [None]


@torch.no_grad()
def test_what_is_traced_or_differentiated_is_left_to_torch(tiny_pair):
    model = tiny_pair("gqa")[1]
    norm, x = model.norm, torch.randn(2, 60, model.config.hidden_size)
    _, tangent = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
    step = 1e-3
    torch.testing.assert_close(tangent, (norm(x + step) - norm(x - step)) / (2 * step), atol=1e-2, rtol=1e-2)
    _, tangent = torch.func.jvp(lambda x: apply_linear(model.lm_head, x), (x[:, :3],), (x[:, :3],))
    torch.testing.assert_close(tangent, model.lm_head(x[:, :3]))
    rounded = copy.deepcopy(norm).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert rounded(mode.from_tensor(x.bfloat16())).shape == x.shape

    class Logits(torch.nn.Module):
        def forward(self, ids):
            return model(ids, backend="dense")

    ids = torch.tensor([[5, 6, 7]])
    exported = torch.export.export(Logits(), (ids,), strict=False)
    assert "llama_flex" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(ids), model(ids, backend="dense"))


@pytest.mark.parametrize("together", [False, True], ids=["stream", "submit"])
def test_uncompiled_steps_run_by_the_kernels_and_give_what_the_definition_gives(tiny_pair, monkeypatch, together):
    model, calls, tokens = tiny_pair("gqa")[1], {}, []
    prompts, options = [[5, 6, 7], [*range(9, 150)]], {"stop_token_ids": ()}

    def counted(name):
        function = getattr(kernel, name)

        def call(*args):
            result = function(*args)
            calls[name] = calls.get(name, 0) + (result is not None)
            return result

        monkeypatch.setattr(kernel, name, call)

    counted("attend_newest")
    counted("run_blocks")
    for newest in (kernel.Newest.of, lambda *_: None):
        monkeypatch.setattr(kernel.Newest, "of", newest)
        engine = Engine(model, compile="auto")
        if together:
            requests = [engine.submit(p, max_new_tokens=6, **options) for p in prompts]
            engine.run()
            tokens.append([r.completion.tokens for r in requests])
        else:
            tokens.append([c.tokens for c in engine.generate(prompts, max_new_tokens=6, **options)])
    assert tokens[0] == tokens[1]
    assert calls["run_blocks"] >= 2  # further steps are recordings of these
    assert calls["attend_newest"] >= len(model.layers)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_vectors_and_plain_code_give_the_same(capability):
    if sys.platform != "linux":
        pytest.skip("torch names other capabilities")
    folders = [os.path.dirname(__file__), os.getcwd()]
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(folders)}
    script = CHECK.format(capability=capability.upper())
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@torch.no_grad()
def test_what_the_kernel_has_no_code_for_is_left_to_torch():
    module, norm = Linear(8, [6]), RMSNorm(8, 1e-6)
    x = torch.randn(1, 2, 8)
    assert linear.can_fuse(x, module.matrix)
    assert not linear.can_fuse(x.double(), Weight(module.weight.double()))
    assert not linear.can_fuse(x.bfloat16(), module.matrix)
    assert not linear.can_fuse(x[:, :0], module.matrix)
    assert not linear.can_fuse(torch.randn(1, kernel.ROWS + 1, 8), module.matrix)
    with torch.enable_grad():
        assert not linear.can_fuse(x, module.matrix)
    assert apply_linear(module, x[:, :0], norm=norm).shape == (1, 0, 6)
    assert apply_linear(Linear(0, [4], bias=True), x[..., :0]).shape == (1, 2, 4)
    assert apply_linear(module, x[None], residual=torch.ones(6)).shape == (1, 1, 2, 6)  # which broadcasts
    for wrong in (4, 12):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            apply_linear(module, torch.ones(1, 2, wrong))
    assert apply_linear(module, torch.ones(1, 1, 1, 1, 1, 1, 1, 1, 8)).shape[-1] == 6
    torch.testing.assert_close(module.double()(x.double()), torch.nn.functional.linear(x.double(), module.weight))


def faults_of_shape(weight: Weight) -> list[Weight]:
    """Return weights like one of 4 bits `[64, 256]`, in groups of 32, for which there is no code."""
    one, zero = weight.scale[:, :1], weight.zero
    return [
        weight._replace(scale=one.contiguous(), zero=zero[:, :1].contiguous()),  # groups of 256
        weight._replace(scale=weight.scale[:, :7].contiguous()),
        weight._replace(scale=weight.scale[:-1]),
        weight._replace(scale=weight.scale.double()),
        weight._replace(scale=weight.scale.T.contiguous().T),
        weight._replace(zero=zero[:, :4].contiguous()),
        weight._replace(zero=zero[:-1]),
        weight._replace(zero=zero.int()),
        weight._replace(numbers=weight.numbers[:, :-4].contiguous()),
        weight._replace(numbers=weight.numbers.view(torch.int8), scale=one.contiguous()),
        weight._replace(numbers=weight.numbers.long()),
        weight._replace(scale=None, zero=None),
        Weight(torch.zeros(64, 256).to(torch.float8_e4m3fn), weight.scale[:, :7].contiguous()),
        Weight(torch.zeros(64, 256, dtype=torch.int8), weight.scale[:, :2].contiguous(), weight.zero),
        Weight(torch.zeros(64, 256, dtype=torch.uint8), one.contiguous()),
        Weight(torch.zeros(64, 256), None, zero),
    ]


@torch.no_grad()
def test_a_weight_of_few_bits_in_another_shape_has_no_code():
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "num_hidden_layers": 1}
    config |= {"hidden_size": 256, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 32}
    block, module = Block(LlamaConfig.from_dict(config), None), Linear(256, [64])
    weight, x = Quantization("int4").quantise(module.weight, torch.float32), torch.randn(1, 1, 256)
    index = torch.zeros(1, 1, dtype=torch.int32)
    q, kv = Tokens(index, index, index), torch.zeros(1, 2, 128, 32)
    held = Tokens(torch.arange(128)[None].int(), *torch.zeros(2, 1, 128).int())
    args = LayerAttention(sliding_window(150)), q, held, 2, "dense", None
    metadata = build_attention_metadata(*args, rotary=cos_sin(index, torch.ones(16)), slots=index.long())

    def runs() -> bool:
        return run_blocks(x, [(block, metadata, KV(kv.clone(), kv.clone()))]) is not None

    assert linear.can_fuse(x, weight)
    assign(block.mlp.gate_up, weight)
    assert runs()
    nf4 = Quantization("nf4").quantise(module.weight, torch.float32)
    assign(block.mlp.gate_up, nf4)
    assert runs()
    order = weight._replace(order=torch.randperm(256))
    int8 = Quantization("int8", 64).quantise(module.weight, torch.float32)
    assign(block.mlp.gate_up, int8)
    assert runs()
    faults = (
        nf4._replace(scale=nf4.scale.bfloat16()),
        nf4._replace(zero=weight.zero),
        order,
        int8._replace(zero=weight.zero),
    )
    for other in (*faults_of_shape(weight), *faults):
        assign(block.mlp.gate_up, other)
        assert not runs()
    with pytest.raises(RuntimeError, match="don't multiply up to the size"):
        Weight(torch.zeros(64, 256).to(torch.float8_e4m3fn), weight.scale[:, :7]).floats()
    large = faults_of_shape(weight)[0]
    assert not linear.can_fuse(x, large)
    torch.testing.assert_close(linear.matmul(x, large, None), x @ large.floats().T)


def test_a_strided_row_or_weight_is_read_as_it_is():
    weight, x = torch.randn(9, 7).T, torch.randn(9, 3).T
    with torch.no_grad():
        torch.testing.assert_close(linear.matmul(x[None], Weight(weight), None)[0], x @ weight.T)


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """Let the kernels be built anew, in a folder of their own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel, "loaded", set())
    monkeypatch.setattr(build, "_begun", {})  # an earlier test's may wait to be finished, in another folder
    kernel.load.cache_clear()
    yield tmp_path / "cache"
    kernel.load.cache_clear()
    monkeypatch.undo()
    assert all(map(kernel.load, kernel.DTYPES))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_computes_and_one_line_says_so(unloaded, monkeypatch, compiler, tiny_pair):
    monkeypatch.setenv("CXX", compiler)
    model = tiny_pair("gqa")[1]
    engine = Engine(model, backend="dense")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            (done,) = engine.generate([[5, 6, 7]], max_new_tokens=4, stop_token_ids=())
    (warning,) = [str(w.message) for w in caught if "few rows" in str(w.message)]
    assert warning.count("\n") == 0
    assert ("install g++, or set CXX" in warning) == (compiler != "false")
    assert not list(unloaded.rglob("*.so"))
    assert "torch's" in kernel.describe(torch.float32)
    logits = model(torch.tensor([[5, 6, 7, *done.tokens[:-1]]]), backend="dense")
    assert logits[0, 2:].argmax(-1).tolist() == done.tokens


def test_a_damaged_file_is_built_again_and_a_whole_one_is_kept(unloaded):
    path = build.finish("float32")
    made = path.stat().st_mtime_ns
    assert build.finish("float32") == path
    assert path.stat().st_mtime_ns == made
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.unlink()
    path.write_bytes(b"damaged")
    assert kernel.load(torch.float32)
    assert path.stat().st_size > 1000


def test_a_file_that_is_gone_is_built_again_and_arguments_of_the_compiler_are_kept(unloaded, monkeypatch):
    monkeypatch.setenv("CXX", "env g++")
    path = build.finish("float32")
    build.begin("float32")
    path.unlink()
    assert build.finish("float32") == path
    assert path.exists()
    assert kernel.load(torch.float32)
    path.unlink()
    assert "-bit vectors" in kernel.describe(torch.float32)
    monkeypatch.setenv("CXX", __file__)
    with pytest.raises(OSError, match=r"there is no C\+\+ compiler"):
        build.finish("bfloat16")
    assert not list(path.parent.iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="such systems have no owners of files")
def test_a_folder_that_others_may_write_to_is_not_used(unloaded):
    (unloaded / "llama_flex").mkdir(parents=True)
    (unloaded / "llama_flex").chmod(0o777)
    path = build.finish("float32")
    assert path.exists()
    assert unloaded not in path.parents
    assert not list((unloaded / "llama_flex").iterdir())


def test_building_begins_with_loading_and_leaves_nothing_if_nobody_waits_for_it(unloaded):
    given = torch.bfloat16, torch.device("cpu")
    kernel.prepare(*given)
    kernel.prepare(*given)
    (begun,) = build._begun.values()
    assert [p.is_dir() for p in begun.path.parent.iterdir()] == [True]
    begun.stop()
    assert begun._process.poll() is not None
    assert not list(begun.path.parent.iterdir())
    build._begun.clear()
    kernel.prepare(*given)
    assert kernel.load(torch.bfloat16)
    assert not build._begun
    kernel.prepare(*given)
    assert not build._begun


@pytest.mark.exhaustive
def test_a_compiled_step_reads_its_weights_by_the_kernel(tiny_pair, monkeypatch):
    model, calls = tiny_pair("gqa")[1], []
    few_rows = kernel.few_rows

    def counted(*given):
        calls.append(len(given[0]))
        return few_rows(*given)

    monkeypatch.setattr(kernel, "few_rows", counted)
    monkeypatch.setattr(kernel.Newest, "of", lambda *_: None)  # as in compiled code
    with torch.compiler.set_stance("force_eager"):
        Engine(model, compile=True, backend="dense").generate([[5, 6]], max_new_tokens=2, stop_token_ids=())
    assert calls.count(1) >= 4 * len(model.layers)
