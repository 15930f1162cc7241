"""Products with the weights: those of one row, compiled, for which the CPU has code of its own."""

import copy

import pytest
import torch
from helpers import Products, few

from llama_flex.engine.graphs import Graphs


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
