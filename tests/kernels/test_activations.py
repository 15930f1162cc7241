"""Inputs in 8 bits: numbers and scales are the library's, and products with them are exact but for rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex.checkpoint.quantization import Quantization
from llama_flex.kernels import activations, cpu, linear
from llama_flex.kernels.weight import Weight

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
random_inputs = {
    "form": st.sampled_from(["int8", "fp8"]),
    "inputs": st.sampled_from(["dynamic", "static"]),
    "rows": st.integers(1, 40),
    "k": st.sampled_from([1, 7, 64, 131]),
    "size": st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    "seed": st.integers(0, 2**31),
}


def draw(form, inputs, rows, k, size, seed, dtype) -> tuple[torch.Tensor, Weight]:
    """Return random x `[1, rows, k]`, of rows of different sizes and one of zeros, and a weight `[9, k]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, rows, k, generator=generator) * torch.rand(1, rows, 1, generator=generator) * size
    x[:, 0] = 0
    weight = Quantization(form, inputs=inputs).quantise(torch.randn(9, k, generator=generator), dtype)
    if inputs == "static":
        weight.input_scale.fill_(size / (127 if form == "int8" else 448))
    return x.to(dtype), weight


@given(**random_inputs, dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=200, deadline=None)
def test_numbers_and_scales_are_those_of_the_library(form, inputs, rows, k, size, seed, dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x, weight = draw(form, inputs, rows, k, size, seed, dtype)
    kind, dynamic = "int" if form == "int8" else "float", inputs == "dynamic"
    args = QuantizationArgs(num_bits=8, type=kind, strategy="token" if dynamic else "tensor", dynamic=dynamic)
    scale, zero = weight.input_scale[:1, 0] if not dynamic else None, None
    if dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    numbers, ours = activations.quantise(x, weight)
    assert numbers.dtype == weight.numbers.dtype
    assert ours.dtype == dtype
    same = fake_quantize(x, scale, zero, args) == numbers.to(dtype) * ours
    # A row's largest number, if negative, is -127.5 steps: ours rounds to even; theirs as the last bit has it.
    assert (same | (x == x.amin(-1, keepdim=True))).all()
    assert (numbers[x == -x.abs().amax(-1, keepdim=True)][k:] == activations.LEAST[numbers.dtype]).all() or not dynamic


def exact(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Return the product by definition, in float64, of the numbers that the rule gives."""
    numbers, scale = activations.quantise(x, weight)
    return (numbers.double() * scale.double()) @ (weight.numbers.double() * weight.scale.double()).T


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the greatest error, in terms of rounding a row once to the dtype, and summing in float32 or wider."""
    wide = torch.promote_types(found.dtype, torch.float32)
    unit = torch.finfo(found.dtype).eps + 16 * torch.finfo(wide).eps
    off = (found.double() - expected).abs().amax(-1)
    return (off / (unit * expected.abs().amax(-1) + torch.finfo(found.dtype).tiny)).max().item()


@given(**random_inputs, dtype=st.sampled_from(DTYPES))
@settings(max_examples=200, deadline=None)
@torch.no_grad()
def test_products_are_those_of_float64(form, inputs, rows, k, size, seed, dtype):
    size = max(size, 1e-3) if inputs == "static" and dtype == torch.float16 else size  # which has no smaller scale
    x, weight = draw(form, inputs, rows, k, size, seed, dtype)
    size = torch.finfo(dtype).max
    for given_ in (x, x[:, :16]):
        expected, found = exact(given_, weight), linear.matmul(given_, weight, None)
        assert found.dtype == dtype
        assert error(found, expected.clamp(-size, size)) <= 1
        bias = torch.randn(9).to(dtype)
        assert error(linear.matmul(given_, weight, bias), expected + bias.double()) <= 1


FAULTS = {
    "the rule dropped": lambda x, w: linear.matmul(x, w._replace(input_scale=None), None),
    "a neighbour's scale": lambda x, w: linear.matmul(x, w._replace(scale=w.scale.roll(1, 0)), None),
    "a neighbour of x": lambda x, w: linear.matmul(x, w, None).roll(1, 1),
    "the scale doubled": lambda x, w: linear.matmul(x, w._replace(input_scale=w.input_scale * 2), None),
}


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("inputs", ["dynamic", "static"])
@pytest.mark.parametrize("form", ["int8", "fp8"])
@torch.no_grad()
def test_the_comparison_finds_faults(form, inputs, rows):
    x, weight = draw(form, inputs, rows, 64, 1.0, 0, torch.float32)
    assert error(linear.matmul(x, weight, None), exact(x, weight)) <= 1
    for fault in FAULTS if inputs == "static" else (*FAULTS,)[:-1]:  # the last needs a scale
        assert error(FAULTS[fault](x, weight), exact(x, weight)) > 10, fault


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("form", ["int8", "fp8"])
@torch.no_grad()
def test_the_kernel_makes_the_same_numbers_of_all_inputs(form, dtype):
    if not cpu.load(dtype):
        pytest.skip("no kernels")
    columns = 2**16 // 64
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()
    every[~every.isfinite()] = 0
    x = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))].view(1, 64, columns).to(dtype)
    eye = torch.eye(columns)
    for inputs in ("dynamic", "static"):
        weight = Quantization(form, inputs=inputs).quantise(eye, dtype)
        weight = weight._replace(numbers=eye.to(weight.numbers.dtype), scale=torch.ones_like(weight.scale))
        if inputs == "static":
            weight.input_scale.fill_(2**-3)
        numbers, scale = activations.quantise(x, weight)
        for rows in range(0, 64, cpu.ROWS):
            part = slice(rows, rows + cpu.ROWS)
            found = cpu.few_rows(x[:, part], weight, None)
            assert torch.equal(found, (numbers.float() * scale).to(dtype)[:, part])


@torch.no_grad()
def test_a_row_gets_the_same_bits_in_any_company():
    if not cpu.load(torch.bfloat16):
        pytest.skip("no kernels")
    x, weight = draw("int8", "dynamic", 16, 131, 1.0, 0, torch.bfloat16)
    together = cpu.few_rows(x, weight, None)
    for row in range(16):
        assert torch.equal(cpu.few_rows(x[:, row : row + 1], weight, None), together[:, row : row + 1])


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("form", ["int8", "fp8"])
@torch.no_grad()
def test_rows_that_are_not_finite_stay_so_and_others_are_not_touched(form, rows):
    x, weight = draw(form, "dynamic", rows, 64, 1.0, 0, torch.float32)
    expected = linear.matmul(x, weight, None)
    x[0, 0, 5] = torch.nan
    found = linear.matmul(x, weight, None)
    assert found[0, 0].isnan().all()
    assert torch.equal(found[0, 1:], expected[0, 1:])


def test_gradients_that_rounding_does_not_let_through_are_refused():
    x, weight = draw("int8", "dynamic", 3, 64, 1.0, 0, torch.float32)
    expected = linear.matmul(x, weight, None)
    assert not expected.requires_grad
    with pytest.raises(ValueError, match=r"inputs in 8 bits have no gradients; set input_scale to None in the layers"):
        linear.matmul(x.requires_grad_(), weight, None)
    with torch.no_grad():
        torch.testing.assert_close(linear.matmul(x, weight, None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("inputs", ["dynamic", "static"])
@pytest.mark.parametrize("form", ["int8", "fp8"])
@torch.no_grad()
def test_columns_may_be_in_another_order(form, inputs, rows, dtype):
    x, weight = draw(form, inputs, rows, 64, 1.0, 0, dtype)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    other = weight._replace(order=order)
    expected = linear.matmul(x[..., order], weight, None)
    assert torch.equal(linear.matmul(x, other, None), expected)
    norm = torch.rand(64, generator=torch.Generator().manual_seed(2)).to(dtype)
    if linear.can_fuse(x, other, None, norm):
        fused = linear.fused_linear(x, other, None, norm, 1e-5)
        assert torch.equal(fused, linear.fused_linear(x[..., order], weight, None, norm[order], 1e-5))
    else:
        assert rows > cpu.ROWS
    # And the comparison finds another order.
    assert rows == 1 or not torch.equal(linear.matmul(x, weight._replace(order=order.argsort()), None), expected)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("name", ["int8-32", "int8-64-symmetric", "int4", "nf4"])
@torch.no_grad()
def test_a_scale_of_inputs_beside_scales_of_groups_is_refused(name, rows):
    weight, x = Quantization.of(name).quantise(torch.randn(9, 128), torch.float32), torch.randn(1, rows, 128)
    assert weight.fits(x)
    for columns in (0, 1):
        other = weight._replace(input_scale=torch.ones(9, columns))
        assert not other.fits(x)
        with pytest.raises(
            ValueError, match=r"an input_scale belongs to .* with a scale for each row, not to (one|torch)"
        ):
            linear.matmul(x, other, None)


@pytest.mark.parametrize("weight", [Weight(torch.zeros(9, 64), None), Weight(torch.zeros(9, 64), torch.ones(9, 1))])
@torch.no_grad()
def test_a_scale_of_inputs_of_floats_is_refused(weight):
    with pytest.raises(
        ValueError, match=r"an input_scale belongs to a weight of int8 or fp8 with a scale for each row, not to torch.f"
    ):
        linear.matmul(torch.zeros(1, 2, 64), weight._replace(input_scale=torch.zeros(9, 0)), None)
