"""The Triton kernels on a CUDA device: python -m pytest -m gpu"""

import copy

import pytest
import torch
from helpers import Products, compiled_forward, random_ids

from llama_flex import Llama
from llama_flex.checkpoint.quantization import Quantization, assign, to_fp8
from llama_flex.engine.graphs import Graphs
from llama_flex.kernels import activations, linear
from llama_flex.kernels.modules import Embedding
from llama_flex.kernels.weight import Weight, in_chunks, pack, unpack
from llama_flex.layers import Linear, RMSNorm, apply_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
INT4 = [Quantization("int4", size, symmetric) for size in (32, 128) for symmetric in (False, True)]
FORMATS = {"none": None, "int8": Quantization("int8"), "fp8": Quantization("fp8")}
FORMATS |= {f"int4-{x.group_size}-{'symmetric' if x.symmetric else 'zeros'}": x for x in INT4}
FORMATS |= {x.name: x for x in (Quantization("int8", 32), Quantization("int8", 128), Quantization("int8", 64, True))}
FORMATS |= {f"nf4-{size}": Quantization("nf4", size) for size in (32, 64, 128)}
SHAPES = [(509, 96), (1536, 576), (256, 14336), (17, 160)]
CASES = [("none", rows, dtype) for rows in (1, 2, 32) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [(name, rows, torch.bfloat16) for name in FORMATS for rows in (1, 20, 40, 300) if name != "none"]
CASES += [("int4-32-zeros", rows, torch.bfloat16) for rows in (2, 12, 64, 100, 512, 600)]
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
            dtype = ours.weight.dtype
            weight = quantization.quantise(ours.weight, dtype)
            if reordered:
                weight = weight._replace(order=torch.randperm(weight.shape[1], device="cuda"))
            assign(ours, weight)
            floats.weight.copy_(weight.floats(dtype))
            exact.weight.copy_(weight._replace(scale=weight.scale.double()).floats())
    return plain, truth


def errors(products, plain, truth, *given):
    """Return, for each product, how much further from float64 it is than torch's, compiled and with plain weights, in
    terms of what is allowed. given: pairs of x and residual."""
    run, each = Graphs().of(), []
    for x, residual in given:
        wide = x.double(), None if residual is None else residual.double()
        found = run("products", type(products).forward, products, x, residual)
        each.append(
            [
                torch.stack([y.double() for y in same])
                for same in zip(found, plain(x, residual), truth(*wide), strict=True)
            ]
        )
    for results in zip(*each, strict=True):
        y, other, z = torch.cat(results, 1)
        unit = torch.finfo(given[0][0].dtype).eps * z.abs().max()
        yield ((y - z).abs().max() / (1.25 * (other - z).abs().max() + unit)).item()


def inputs(n, k, rows, dtype, count=1):
    """Return pairs of x `[rows, 1, k]` and residual `[rows, 1, n]`."""
    draws = torch.Generator("cuda").manual_seed(0)
    sizes = [(k, n)] * count
    return [tuple(torch.randn(rows, 1, x, device="cuda", generator=draws).to(dtype) for x in pair) for pair in sizes]


class Head(torch.nn.Module):
    """The norm and the output matrix of a large vocabulary."""

    def __init__(self, n, k):
        super().__init__()
        self.norm, self.product = RMSNorm(k, 1e-5), Linear(k, [n])
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator(parameter.device).manual_seed(0))
        self.requires_grad_(False)

    def forward(self, x, residual=None):
        return (apply_linear(self.product, x, norm=self.norm),)


def head_errors(name, rows, compile, mutate=lambda weight: weight):
    """Return by how much more than allowed the logits of 128,256 tokens differ from float64, as `errors` does."""
    with torch.device("cuda"):
        head = Head(128_256, 1536).to(torch.bfloat16)
    plain, truth = quantised(head, FORMATS[name])
    assign(head.product, mutate(head.product.matrix))
    ((x, _),) = inputs(8, 1536, rows, torch.bfloat16)
    if compile:
        return max(errors(head, plain, truth, (x, None)))
    (y,), (other,), (z,) = head(x), plain(x), truth(x.double())
    unit = torch.finfo(x.dtype).eps * z.abs().max()
    return ((y - z).abs().max() / (1.25 * (other - z).abs().max() + unit)).item()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 40])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "none"])
@torch.no_grad()
def test_logits_of_a_large_vocabulary_are_no_further_from_float64_than_torchs(name, rows, compile):
    assert head_errors(name, rows, compile) <= 1


@pytest.mark.parametrize("rows", [1, 20, 40])
@torch.no_grad()
def test_scales_of_neighbours_would_be_found_in_a_large_vocabulary(rows):
    assert head_errors("int8", rows, True, lambda w: w._replace(scale=w.scale.roll(1, 0))) > 1


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "none"])
@torch.no_grad()
def test_embeddings_on_cuda_are_the_floats_of_the_rows(name, compile):
    with torch.device("cuda"):
        embedding = Embedding(509, 256).to(torch.bfloat16)
        assign(embedding, FORMATS[name].quantise(embedding.weight, torch.bfloat16))
        ids = torch.tensor([[508, 0, 3], [3, 77, 1]])
    run = torch.compile(embedding) if compile else embedding
    assert torch.equal(run(ids), embedding.matrix.floats()[ids])


@pytest.mark.parametrize(("name", "rows", "dtype"), CASES)
@torch.no_grad()
def test_a_product_of_few_rows_is_no_further_from_float64_than_torchs(name, rows, dtype):
    quantization = FORMATS[name]
    for n, k in SHAPES:
        size = 1 if quantization is None else quantization.group_size or 1
        k = -(-k // size) * size
        products = Products(n, k).to("cuda", dtype)
        plain, truth = quantised(products, quantization)
        # The largest of a row's few errors is a matter of luck.
        assert max(errors(products, plain, truth, *inputs(n, k, rows, dtype, 8 if rows == 1 else 1))) <= 1, (n, k)


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


# ---- inputs in 8 bits

INPUTS = [Quantization(form, inputs=inputs) for form in ("int8", "fp8") for inputs in ("dynamic", "static")]


def with_inputs(products, way):
    """Quantise the weights of a model, and its inputs; return a copy on the CPU, and one in float64."""
    for module in linears(products):
        weight = way.quantise(module.weight, module.weight.dtype)
        if way.inputs == "static":
            weight.input_scale.fill_(6 / (127 if way.format == "int8" else 448))
        assign(module, weight)
    return copy.deepcopy(products).cpu(), in_float64(products)


def in_float64(model):
    """Return a model in float64, with the same numbers of few bits."""
    wide = copy.deepcopy(model).double()
    for ours, exact in zip(linears(model), linears(wide), strict=True):
        if ours.weight_scale is not None:
            numbers, scale, _, inputs, _ = ours.matrix
            assign(exact, Weight(numbers, scale.double(), None, inputs.double()))
    return wide


def errors_of_inputs(found, other, truth, x, residual):
    """Return, for each product, how much further from float64 it is than on the CPU, in terms of what is allowed; at
    the median, as a number between two may be rounded either way."""
    theirs, exact = other(x.cpu(), residual.cpu()), truth(x.double(), residual.double())
    for y, near, z in zip(found, theirs, exact, strict=True):
        unit = torch.finfo(x.dtype).eps * z.abs().max()
        yield ((y - z).abs().median() / (1.25 * (near.to(z) - z).abs().median() + unit / 16)).item()


CASES_OF_INPUTS = [(rows, torch.bfloat16, False) for rows in (1, 2, 20, 32, 33, 64, 300)]
# In float32 a norm's last bit decides which way a number is rounded, and that alone is more than other errors.
CASES_OF_INPUTS += [(rows, torch.float16, False) for rows in (1, 20, 300)]
CASES_OF_INPUTS += [(rows, torch.bfloat16, True) for rows in (1, 20, 300)]


@pytest.mark.parametrize(("rows", "dtype", "compiled"), CASES_OF_INPUTS)
@pytest.mark.parametrize("way", INPUTS, ids=lambda way: way.name)
@torch.no_grad()
def test_a_product_of_inputs_in_8_bits_is_no_further_from_float64_than_on_a_cpu(way, rows, dtype, compiled):
    for n, k in SHAPES:  # 509 rows are for no matrix unit
        products = Products(n, k).to("cuda", dtype)
        other, truth = with_inputs(products, way)
        ((x, residual),) = inputs(n, k, rows, dtype)
        run = Graphs().of() if compiled else lambda _, function, *args: function(*args)
        found = run("products", Products.forward, products, x, residual)
        assert max(errors_of_inputs(found, other, truth, x, residual)) <= 1, (n, k)


def with_outliers(way, rows, dtype):
    """Return x `[rows, 1, 256]` whose first numbers make steps large, a weight, a bias, and the product in float64."""
    ((x, bias),) = inputs(96, 256, rows, dtype)
    x[..., 0] = 30 + torch.arange(rows, device=x.device)[:, None]
    weight = way.quantise(torch.randn(96, 256, device=x.device), dtype)
    if way.inputs == "static":
        weight.input_scale.fill_(0.3)
    numbers, scale = activations.quantise(x, weight)
    product = (numbers.double() * scale.double()) @ (weight.numbers.double() * weight.scale.double()).T
    return x, weight, bias[0, 0], product + bias[0, 0].double()


def error_of(y, exact, way):
    """Return the greatest error of a row, in terms of what rounding once and summing allow: in float32, or of fp8 in 14
    bits of partial sums, which tensor cores of an H200 keep."""
    unit = 0.55 * torch.finfo(y.dtype).eps + (2**-10 if way.format == "fp8" and y.dtype == torch.bfloat16 else 1e-5)
    return ((y - exact).abs().amax(-1) / (unit * exact.abs().amax(-1))).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 33, 64, 300])
@pytest.mark.parametrize("way", INPUTS, ids=lambda way: way.name)
@torch.no_grad()
def test_a_product_of_inputs_in_8_bits_is_rounded_once(way, rows, dtype, monkeypatch):
    x, weight, bias, exact = with_outliers(way, rows, dtype)
    assert error_of(linear.matmul(x, weight, bias), exact, way) <= 1
    # And the comparison finds faults.
    assert error_of(linear.matmul(x, weight._replace(input_scale=None), bias), exact, way) > 1
    assert error_of(linear.matmul(x, weight._replace(scale=weight.scale.roll(1, 0)), bias), exact, way) > 1
    if way.inputs == "static":
        assert error_of(linear.matmul(x, weight._replace(input_scale=3 * weight.input_scale), bias), exact, way) > 1
    elif rows > 1:
        rule = activations.quantise
        monkeypatch.setattr(activations, "quantise", lambda *given: (rule(*given)[0], rule(*given)[1].roll(1, 0)))
        assert error_of(linear.matmul(x, weight, bias), exact, way) > 1


def check_logits_of_pieces(model):
    """Assert that compiled logits, at once, in chunks and in steps, are as near to float64 as uncompiled dense ones."""
    ids = torch.tensor([random_ids(150), random_ids(150, 1)], device="cuda")
    truth = in_float64(model)(ids, backend="dense")
    plain = (model(ids, backend="dense").double() - truth).abs().median()
    assert plain < (1e-4 if model.dtype == torch.float32 else 0.1) * truth.abs().max()
    forward, cache, parts = compiled_forward(model), model.new_cache(2, 200), []
    for count in (128, 4, *[1] * 18):
        start = sum(x.shape[1] for x in parts)
        parts.append(forward(ids[:, start : start + count], cache=cache))
    for found in (torch.cat(parts, 1), compiled_forward(model)(ids)):
        assert (found.double() - truth).abs().median() <= 1.5 * plain + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["int8", "fp8"])
@torch.no_grad()
def test_a_model_of_inputs_in_8_bits_has_the_same_logits_compiled_in_chunks_and_steps(tiny_pair, form, dtype, tmp_path):
    tiny_pair("gqa")[1].save_pretrained(tmp_path)
    model = Llama.from_pretrained(tmp_path, device="cuda", dtype=dtype, quantize=f"{form}-dynamic")
    check_logits_of_pieces(model)


# ---- inputs in groups


def in_groups(matrix, size):
    """Return a weight of fp8 near to a matrix, with a scale for each group of columns, as have its inputs."""
    numbers, scale, *_ = to_fp8(matrix.reshape(-1, size), torch.float32)
    scale = scale.view(len(matrix), -1)
    return Weight(numbers.view(matrix.shape), scale, None, scale[:, :0])


CASES_OF_GROUPS = [(rows, torch.bfloat16, compiled) for rows in (1, 2, 20, 33, 300) for compiled in (False, True)]
CASES_OF_GROUPS += [(rows, torch.float16, False) for rows in (1, 20, 300)]


@pytest.mark.parametrize(("rows", "dtype", "compiled"), CASES_OF_GROUPS)
@pytest.mark.parametrize("size", [32, 64, 128])
@torch.no_grad()
def test_a_product_of_inputs_in_groups_is_no_further_from_float64_than_on_a_cpu(size, rows, dtype, compiled):
    for n, k in ((509, 256), (1536, 640), (256, 14336)):
        products = Products(n, k).to("cuda", dtype)
        for module in linears(products):
            assign(module, in_groups(module.weight, size))
        other, truth = copy.deepcopy(products).cpu(), in_float64(products)
        x, residual = inputs(n, k, rows, dtype)
        run = Graphs().of() if compiled else lambda _, function, *args: function(*args)
        found = run("products", Products.forward, products, x, residual)
        assert max(errors_of_inputs(found, other, truth, x, residual)) <= 1, (n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 33, 64, 300])
@pytest.mark.parametrize("size", [32, 64, 128])
@torch.no_grad()
def test_a_product_of_inputs_in_groups_is_rounded_once(size, rows, dtype, monkeypatch):
    way, (x, bias) = Quantization("fp8", inputs="dynamic"), inputs(96, 256, rows, dtype)
    x *= (1 + torch.arange(256, device="cuda") // size).to(dtype)
    weight, bias = in_groups(torch.randn(96, 256, device="cuda"), size), bias[0, 0]
    numbers, scale = activations.quantise(x, weight)
    rounded = (numbers.double().unflatten(-1, (256 // size, -1)) * scale.double()[..., None]).flatten(-2)
    exact = rounded @ weight.floats(torch.float64).T + bias.double()
    assert error_of(linear.matmul(x, weight, bias), exact, way) <= 1
    # And the comparison finds faults.
    assert error_of(linear.matmul(x, weight._replace(input_scale=None), bias), exact, way) > 1
    for by, dimension in ((1, 0), (1, 1)):
        shifted = weight._replace(scale=weight.scale.roll(by, dimension))
        assert error_of(linear.matmul(x, shifted, bias), exact, way) > 1
    rule = activations.quantise
    monkeypatch.setattr(activations, "quantise", lambda *given: (rule(*given)[0], rule(*given)[1].roll(1, -1)))
    assert error_of(linear.matmul(x, weight, bias), exact, way) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_model_of_inputs_in_groups_has_the_same_logits_compiled_in_chunks_and_steps(tiny_pair, dtype):
    model = copy.deepcopy(tiny_pair("gqa")[1]).to("cuda", dtype)
    for module in linears(model):
        assign(module, in_groups(module.weight, 32))
    check_logits_of_pieces(model)


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


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_the_kernel_of_one_row_and_4_bits_compiles_for_other_devices(capability):
    from llama_flex.kernels import int4_gemv

    assert int4_gemv.compiled(capability, 24, 160, 32, half=True, gated=True).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match=r"int4_gemv\.cu does not compile: .*zero"):
        int4_gemv.compiled(capability, 24, 160, 0, half=False, gated=False)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("m", [8, 70, 130, 300])
@torch.no_grad()
def test_blocks_that_share_the_columns_of_4_bits_add_up(m, split, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for devices of compute capability 9.0")
    from llama_flex.kernels import int4_matmul

    weight = Quantization("int4", 64).quantise(torch.randn(300, 704, device="cuda"), torch.bfloat16)
    x = torch.randn(m, 704, device="cuda").bfloat16()
    shape = int4_matmul.shape_of(m, 300, 704, 132)
    monkeypatch.setattr(int4_matmul, "shape_of", lambda *_: (*shape[:2], split, shape[3]))
    found = int4_matmul.matmul(in_chunks(x), m, *weight[:3], None, None, False).double()
    exact = x.double() @ weight.floats().double().T
    assert (found - exact).abs().max() <= torch.finfo(x.dtype).eps * exact.abs().max()
    assert torch.equal(found, int4_matmul.matmul(in_chunks(x), m, *weight[:3], None, None, False).double())
    wrong = int4_matmul.matmul(in_chunks(x.roll(4, 1)), m, *weight[:3], None, None, False).double()
    assert (wrong - exact).abs().max() > 0.1 * exact.abs().max()


@torch.no_grad()
def test_tensors_at_odd_addresses_are_multiplied_by_4_bits():
    weight = Quantization("int4").quantise(torch.randn(64, 96, device="cuda"), torch.bfloat16)
    wide, norm = (torch.randn(98, device="cuda").bfloat16() for _ in range(2))
    given = wide[1:97], norm[1:97], torch.randn(64, 2, device="cuda").bfloat16()[:, 0]
    found, plain = (
        linear.fused_linear(x[None, None], weight, None, norm, 1e-5, residual[None, None])
        for x, norm, residual in (given, [part.clone(memory_format=torch.contiguous_format) for part in given])
    )
    assert torch.equal(found, plain)
