"""The Triton kernels on a CUDA device: python -m pytest -m gpu"""

import copy

import pytest
import torch
from helpers import Products

from llama_flex.checkpoint.quantization import Quantization, assign
from llama_flex.engine.graphs import Graphs
from llama_flex.kernels.weight import Weight, pack, unpack
from llama_flex.layers import Linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
INT4 = [Quantization("int4", size, symmetric) for size in (32, 128) for symmetric in (False, True)]
FORMATS = {"none": None, "int8": Quantization("int8"), "fp8": Quantization("fp8")}
FORMATS |= {f"int4-{x.group_size}-{'symmetric' if x.symmetric else 'zeros'}": x for x in INT4}
FORMATS |= {x.name: x for x in (Quantization("int8", 32), Quantization("int8", 128), Quantization("int8", 64, True))}
FORMATS |= {f"nf4-{size}": Quantization("nf4", size) for size in (32, 64, 128)}
SHAPES = [(509, 96), (1536, 576), (256, 14336)]
CASES = [("none", rows, dtype) for rows in (1, 2, 32) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [(name, rows, torch.bfloat16) for name in FORMATS for rows in (1, 20, 40) if name != "none"]
CASES += [(name, 1, dtype) for name in FORMATS for dtype in (torch.float32, torch.float16) if name != "none"]
CASES += [(name, 8, torch.float16) for name in FORMATS if name != "none"]


def linears(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def quantised(products, quantization, reordered=False):
    """Quantise the weights of a model; return it with the weights that they stand for, and with those in float64.

    reordered: with their columns in another order.
    """
    plain, truth = copy.deepcopy(products), copy.deepcopy(products).double()
    for ours, floats, exact in zip(*map(linears, (products, plain, truth)), strict=True):
        if quantization is not None:
            weight = quantization.quantise(ours.weight, ours.weight.dtype)
            if reordered:
                weight = weight._replace(order=torch.randperm(weight.shape[1], device="cuda"))
            assign(ours, weight)
            floats.weight.copy_(weight.floats(ours.weight.dtype))
            exact.weight.copy_(weight._replace(scale=weight.scale.double()).floats())
    return plain, truth


def errors(products, plain, truth, x, residual):
    """Return, for each product, how much further from float64 it is than torch's, compiled and with plain weights, in
    terms of what is allowed."""
    found = Graphs().of()("products", Products.forward, products, x, residual)
    theirs, exact = plain(x, residual), truth(x.double(), residual.double())
    for y, other, z in zip(found, theirs, exact, strict=True):
        unit = torch.finfo(x.dtype).eps * z.abs().max()
        yield ((y - z).abs().max() / (1.25 * (other - z).abs().max() + unit)).item()


def inputs(n, k, rows, dtype):
    draws = torch.Generator("cuda").manual_seed(0)
    return (torch.randn(rows, 1, size, device="cuda", generator=draws).to(dtype) for size in (k, n))


@pytest.mark.parametrize(("name", "rows", "dtype"), CASES)
@torch.no_grad()
def test_a_product_of_few_rows_is_no_further_from_float64_than_torchs(name, rows, dtype):
    quantization = FORMATS[name]
    for n, k in SHAPES:
        size = 1 if quantization is None else quantization.group_size or 1
        k = -(-k // size) * size
        products = Products(n, k).to("cuda", dtype)
        plain, truth = quantised(products, quantization)
        assert max(errors(products, plain, truth, *inputs(n, k, rows, dtype))) <= 1, (n, k)


def _swapped(weight):
    numbers = unpack(weight.numbers.view(torch.int32)).unflatten(1, (-1, 8, 4))
    swapped = pack(numbers[:, :, [1, 0, 3, 2, 5, 4, 7, 6]].flatten(1))
    return weight._replace(numbers=swapped.view(weight.numbers.dtype))


MUTATIONS = {
    "a zero point off by one": ("int4-32-zeros", lambda w: w._replace(zero=w.zero + 1)),
    "groups shifted": ("int4-128-symmetric", lambda w: w._replace(scale=w.scale.roll(1, 1))),
    "numbers of a byte swapped": ("int4-32-symmetric", _swapped),
    "a neighbour's scales": ("int4-32-symmetric", lambda w: w._replace(scale=w.scale.roll(1, 0))),
    "groups of NF4 shifted": ("nf4-64", lambda w: w._replace(scale=w.scale.roll(1, 1))),
    "numbers of a byte of NF4 swapped": ("nf4-64", _swapped),
    "NF4 taken for whole numbers": ("nf4-64", lambda w: Weight(w.numbers.view(torch.int32), w.scale.bfloat16())),
    "another zero point of int8": ("int8-128", lambda w: w._replace(zero=w.zero ^ 16)),
    "groups of int8 shifted": ("int8-64-symmetric", lambda w: w._replace(scale=w.scale.roll(1, 1))),
    "a neighbour's scale of int8": ("int8", lambda w: w._replace(scale=w.scale.roll(1, 0))),
    "a neighbour's scale of fp8": ("fp8", lambda w: w._replace(scale=w.scale.roll(1, 0))),
}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", MUTATIONS)
@torch.no_grad()
def test_a_wrong_number_would_be_found(name, rows):
    quantization, mutate = MUTATIONS[name]
    products = Products(96, 256).to("cuda", torch.bfloat16)
    plain, truth = quantised(products, FORMATS[quantization])
    for module in linears(products):
        assign(module, Weight(*(None if x is None else x.contiguous() for x in mutate(module.matrix))))
    assert min(errors(products, plain, truth, *inputs(96, 256, rows, torch.bfloat16))) > 1


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("name", ["int4-32-zeros", "int8"])
@torch.no_grad()
def test_columns_may_be_in_another_order(name, rows):
    products = Products(96, 256).to("cuda", torch.bfloat16)
    plain, truth = quantised(products, FORMATS[name], reordered=True)
    assert max(errors(products, plain, truth, *inputs(96, 256, rows, torch.bfloat16))) <= 1
    for module in linears(products):
        module.weight_order = None
    assert min(errors(products, plain, truth, *inputs(96, 256, rows, torch.bfloat16))) > 1
