"""Products with the weights: those of one row, compiled, for which the CPU has code of its own."""

import copy
import itertools

import pytest
import torch
from helpers import Products, few

from llama_flex.checkpoint.quantization import Quantization, assign
from llama_flex.engine.graphs import Graphs
from llama_flex.kernels.weight import apart, in_chunks, pack, reorder, tokens_of
from llama_flex.layers import Linear


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.float64, torch.float16]), ids=str)
@pytest.mark.parametrize("sizes", few([(509, 96)], [(1, 1), (96, 131), (1536, 576)]), ids=str)
@torch.no_grad()
def test_products_of_one_row_are_no_further_from_float64_than_torchs(sizes, dtype):
    n, k = sizes
    products = Products(n, k).to(dtype)
    x, residual = (torch.randn(1, 1, size).to(dtype) for size in (k, n))
    found = Graphs().of()("products", Products.forward, products, x, residual)
    plain, truth = products(x, residual), copy.deepcopy(products).double()(x.double(), residual.double())
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, dtype)
        error, their_error = (ours - exact).abs(), (theirs - exact).abs()
        # Rounding once, and summing k terms in another order.
        summed = torch.promote_types(dtype, torch.float32)
        allowed = 2 * torch.finfo(dtype).eps + k * torch.finfo(summed).eps
        assert error.max() <= 1.25 * their_error.max() + allowed * exact.abs().max()


def reordered(products: Products, quantization: Quantization) -> Products:
    """Quantise the weights of a model, with their columns in another order; return it with its weights in float64."""
    truth = copy.deepcopy(products).double()
    for ours, exact in zip(products.modules(), truth.modules(), strict=True):
        if isinstance(ours, Linear):
            made = quantization.quantise(ours.weight, ours.weight.dtype)
            order = torch.randperm(ours.in_features)
            assign(ours, made._replace(order=order))
            exact.weight[:, order] = made._replace(scale=made.scale.double()).floats()
    return truth


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("form", ["int4", "int8", "int8-32"])
@torch.no_grad()
def test_products_with_columns_in_another_order_are_those_of_float64(form, rows):
    products = Products(48, 96)
    truth = reordered(products, Quantization.of(form))
    x, residual = (torch.randn(rows, 1, size) for size in (96, 48))

    def errors():
        exact = truth(x.double(), residual.double())
        compiled = Graphs().of()("products", Products.forward, products, x, residual)
        for found in (products(x, residual), compiled):
            for y, z in zip(found, exact, strict=True):
                yield ((y - z).abs().max() / z.abs().max()).item()

    bound = (96 + 2) * torch.finfo(torch.float32).eps  # of summing in another order, and rounding
    assert max(errors()) < bound
    for module in products.modules():
        if isinstance(module, Linear):
            module.weight_order = None
    assert min(errors()) > 8 * bound


@torch.no_grad()
def test_a_weight_with_its_columns_in_another_order_stands_for_floats_in_theirs():
    weight, order = torch.randn(8, 64), torch.randperm(64)
    for form in ("int4", "int8", "int8-32"):
        plain = Quantization.of(form).quantise(weight, torch.float32)
        assert torch.equal(plain._replace(order=order).floats()[:, order], plain.floats())
        back = plain._replace(numbers=reorder(reorder(plain.numbers, order), order.argsort()))
        assert torch.equal(back.floats(), plain.floats())
    assert plain._replace(order=order).fits(weight)
    assert not plain._replace(order=order[:-1]).fits(weight)


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("name", ["int8", "fp8", "int8-32", "int8-64-symmetric", "int4", "int4-64-symmetric", "nf4"])
def test_rows_of_a_weight_are_those_of_its_floats(name, reordered):
    weight = Quantization.of(name).quantise(torch.randn(9, 128), torch.float32)
    weight = weight._replace(order=torch.randperm(128)) if reordered else weight
    floats, index = weight.floats(), torch.tensor([[8, 0, 3], [3, 7, 1]])
    assert torch.equal(weight.rows(index).floats(), floats[index])
    assert torch.equal(weight.of_rows(slice(2, 7)).floats(), floats[2:7])
    assert [part.shape for part in weight.split(4 * 128)] == [(4, 128), (4, 128), (1, 128)]
    assert torch.equal(torch.cat([part.floats() for part in weight.split(4 * 128)]), floats)
    assert not torch.equal(weight.rows(index.roll(1)).floats(), floats[index])


def test_columns_apart_are_those_of_the_bits_of_words():
    numbers, x = torch.randint(16, (3, 96)), torch.randn(2, 96)
    found = sum(
        part @ ((pack(numbers) >> 4 * i) & 15).float().T
        for i, part in enumerate(apart(x).unflatten(-1, (8, 12)).unbind(1))
    )
    torch.testing.assert_close(found, x @ numbers.float().T)


@pytest.mark.parametrize("m", [1, 8, 20, 300])
def test_x_in_chunks_is_in_the_order_of_tensor_cores(m):
    x = torch.randn(m, 160)
    parts = in_chunks(x).view(-(-m // tokens_of(m)), 2, 8, 2, tokens_of(m), 4, 2)
    for chunk, step, half, thread, pair in itertools.product(range(2), range(8), range(2), range(4), range(2)):
        word, product = divmod(step, 2)  # a product takes two bits of four of a thread's word, and two 16 bits further
        column = 128 * chunk + 32 * thread + word + 4 * (2 * product + half + 4 * pair)
        found = parts[:, chunk, step, half, :, thread, pair].flatten()
        assert torch.equal(found[:m], x[:, column] if column < 160 else torch.zeros(m))
        assert not found[m:].any()
