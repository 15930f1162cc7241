"""Weights quantised while they are loaded: as near as few bits are, and computed as the dequantised ones would be."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from checkpoint_helpers import rewrite
from compressed_helpers import dequantised
from helpers import TINY, few, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex import Engine, Llama, Sampling
from llama_flex.checkpoint import quantization
from llama_flex.checkpoint.quantization import GROUP_SIZES, Quantization, to_fp8, to_groups, to_int8
from llama_flex.engine.explain import bytes_per_step
from llama_flex.kernels import linear
from llama_flex.kernels.modules import MatrixModule
from llama_flex.kernels.weight import NF4, Weight, unpack
from llama_flex.layers import TiedLinear
from llama_flex.weights import DTYPES

WAYS = {
    "int8": Quantization("int8"),
    "fp8": Quantization("fp8"),
    "int4": Quantization("int4"),
    "int4, symmetric": Quantization("int4", symmetric=True),
    "nf4": Quantization("nf4", 32),
    "int8, groups": Quantization("int8", 32),
    "int8, symmetric groups": Quantization("int8", 32, symmetric=True),
}
WITH_VOCABULARY = {
    f"{name} + {of}": dataclasses.replace(WAYS[name], vocabulary=WAYS[of])
    for name, of in (
        *(("int4", "int8"), ("int8", "fp8"), ("int4, symmetric", "int4"), ("fp8", "int4, symmetric")),
        *(("nf4", "int8, groups"), ("int8, groups", "int8, symmetric groups")),
    )
}
DTYPE_OF = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.int32, "nf4": torch.uint8}
random_weights = {
    "stored": st.sampled_from(DTYPES),
    "dtype": st.sampled_from(DTYPES),
    "rows": st.integers(1, 9),
    "size": st.sampled_from([1e-7, 1e-5, 0.02, 1.0, 300.0]),
    "seed": st.integers(0, 2**31),
}


def random_weight(stored, rows, columns, size, seed) -> torch.Tensor:
    """Return a random weight whose first row is 0."""
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size).to(stored)
    weight[0] = 0
    return weight


@given(**random_weights, columns=st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_a_weight_is_at_most_half_a_step_from_its_numbers(stored, dtype, rows, columns, size, seed):
    weight = random_weight(stored, rows, columns, size, seed)
    numbers, scale, zero, *_ = to_int8(weight, dtype)
    assert numbers.dtype == torch.int8
    assert numbers.shape == weight.shape
    assert scale.dtype == dtype
    assert scale.shape == (rows, 1)
    assert zero is None
    assert numbers.abs().max() <= 127
    error = (numbers.double() * scale.double() - weight.double()).abs()
    assert (error <= scale.double() * (0.5 + 1e-4)).all()
    check_scale(scale, weight, 127)


def check_scale(scale: torch.Tensor, weight: torch.Tensor, largest: float) -> None:
    """Check that no step is larger than the largest number needs, but for the rounding of a scale."""
    most = weight.double().abs().amax(1, keepdim=True) / largest
    dtype = torch.finfo(scale.dtype)
    least = dtype.smallest_normal * dtype.eps
    assert (scale.double() <= most * (1 + 2 * dtype.eps + 1e-6) + least).all()


@given(**random_weights, columns=st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_a_weight_has_no_nearer_number_in_fp8(stored, dtype, rows, columns, size, seed):
    weight = random_weight(stored, rows, columns, size, seed)
    numbers, scale, zero, *_ = to_fp8(weight, dtype)
    assert numbers.dtype == torch.float8_e4m3fn
    assert zero is None
    assert not numbers.isnan().any()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    nearest = (every[~every.isnan()] * scale.double()[..., None] - weight.double()[..., None]).abs().amin(-1)
    error = (numbers.double() * scale.double() - weight.double()).abs()
    assert (error <= nearest + 1e-4 * scale.double() + 1e-6 * weight.double().abs()).all()
    check_scale(scale, weight, 448)


@given(
    **random_weights,
    bits=st.sampled_from((4, 8)),
    groups=st.integers(1, 3),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_weight_has_no_nearer_number_in_groups(stored, dtype, rows, bits, groups, group_size, symmetric, size, seed):
    weight = random_weight(stored, rows, groups * group_size, size, seed)
    held, scale, zero, *_ = to_groups(weight, bits, group_size, symmetric, dtype)
    assert (held.dtype, scale.dtype) == (torch.int32 if bits == 4 else torch.int8, dtype)
    assert held.shape == (rows, groups * group_size // (8 if bits == 4 else 1))
    numbers = unpack(held) if bits == 4 else held.int() + 128
    assert scale.shape == (rows, groups)
    assert (zero is None) == symmetric
    middle = torch.full((rows, groups), 1 << (bits - 1)) if zero is None else zero
    assert middle.max().item() < 1 << bits
    steps = numbers.unflatten(1, (groups, -1)) - middle[..., None].int()
    exact, step = weight.double().unflatten(1, (groups, -1)), scale.double()[..., None]
    every = (torch.arange(1 << bits) - middle[..., None].int()).double() * step
    nearest = (every[:, :, None] - exact[..., None]).abs().amin(-1)
    error = (steps * step - exact).abs()
    assert (error <= nearest + 1e-4 * step.abs() + 1e-6 * exact.abs()).all()
    assert (error[0] == 0).all()


@given(**random_weights, groups=st.integers(1, 3), group_size=st.sampled_from(GROUP_SIZES))
@settings(max_examples=100, deadline=None)
def test_a_weight_has_no_nearer_value_of_nf4(stored, dtype, rows, groups, group_size, size, seed):
    weight = random_weight(stored, rows, groups * group_size, size, seed)
    made = Quantization("nf4", group_size).quantise(weight, dtype)
    assert (made.numbers.dtype, made.scale.dtype, made.zero) == (torch.uint8, torch.float32, None)
    exact, scale = weight.double().unflatten(1, (groups, -1)), made.scale.double()[..., None]
    assert torch.equal(made.scale, weight.float().unflatten(1, (groups, -1)).abs().amax(2))
    nearest = (torch.tensor(NF4).double() * scale[..., None] - exact[..., None]).abs().amin(-1)
    found = made._replace(scale=made.scale.double()).floats().unflatten(1, (groups, -1))
    assert ((found - exact).abs() <= nearest + 1e-6 * scale).all()
    assert made.floats(torch.bfloat16).equal(found.float().flatten(1).bfloat16())


def quantised(tiny_pair, tmp_path, name, quantize="int8", **options) -> Llama:
    tiny_pair(name)[1].save_pretrained(tmp_path)
    return Llama.from_pretrained(tmp_path, device="cpu", quantize=quantize, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *few([torch.bfloat16], [torch.float16])])
@pytest.mark.parametrize("way", (WAYS | WITH_VOCABULARY).values(), ids=WAYS | WITH_VOCABULARY)
@pytest.mark.parametrize("name", few(["gqa", "biases", "tied"], sorted(TINY.keys() - {"gqa", "biases", "tied"})))
@torch.no_grad()
def test_a_quantised_model_computes_what_its_dequantised_weights_do(tiny_pair, tmp_path, name, way, dtype):
    model = quantised(tiny_pair, tmp_path, name, way, dtype=dtype)
    plain, ids = dequantised(model), torch.tensor([random_ids(150)])
    assert model.dtype == dtype
    assert sum(p.numel() for p in model.parameters() if p.dtype == DTYPE_OF[way.format]) > 0
    exact = copy.deepcopy(plain).double()(ids, backend="dense")
    theirs = (plain(ids, backend="dense").double() - exact).abs()
    cache, cached = model.new_cache(1, 200), []
    assert torch.equal(model.embed(ids), plain.embed(ids))
    for count in (100, 30, *[1] * 20):
        start = sum(x.shape[1] for x in cached)
        cached.append(model(ids[:, start : start + count], cache=cache, backend="dense"))
    for ours in (model(ids, backend="dense"), torch.cat(cached, 1)):
        error = (ours.double() - exact).abs()
        assert error.mean() <= 1.5 * theirs.mean()
        assert error.max() <= 3 * theirs.max()


# ---- embedding and output matrix


def logits_of(model: Llama, ids: torch.Tensor, compile: bool) -> list[torch.Tensor]:
    """Return embeddings and logits: of many rows, and of a few."""
    run = torch.compile(lambda x: (model.embed(x), model.head(model.embed(x)))) if compile else None
    with torch.no_grad():
        pairs = [(model.embed(x), model.head(model.embed(x))) if run is None else run(x) for x in (ids, ids[:, :3])]
    return [tensor for pair in pairs for tensor in pair]


def check_vocabulary(model: Llama, exact: Llama, compile: bool = False) -> None:
    """Check that embeddings are exactly those of a model of floats, and logits, on average, as near to float64."""
    ids = torch.tensor([random_ids(40)])
    found, theirs = logits_of(model, ids, compile), logits_of(exact, ids, False)
    truth = logits_of(copy.deepcopy(exact).double(), ids, False)
    assert torch.equal(found[0], theirs[0])
    assert torch.equal(found[2], theirs[2])
    for ours, other, z in zip(found[1::2], theirs[1::2], truth[1::2], strict=True):
        unit = torch.finfo(ours.dtype).eps * z.abs().max()
        assert (ours - z).abs().mean() <= 1.5 * (other - z).abs().mean() + unit / 4


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *few([torch.bfloat16], [torch.float16])])
@pytest.mark.parametrize("vocabulary", [way for way in WAYS.values() if way.format != "nf4"], ids=lambda way: way.name)
@pytest.mark.parametrize("name", ["gqa", "tied", "odd_vocab"])
def test_embeddings_and_logits_are_those_of_the_floats(tiny_pair, tmp_path, name, vocabulary, dtype, compile):
    way = Quantization("int8", vocabulary=vocabulary)
    model = quantised(tiny_pair, tmp_path, name, way, dtype=dtype)
    assert model.embed.weight.dtype == model.lm_head.matrix.numbers.dtype == DTYPE_OF[vocabulary.format]
    assert isinstance(model.lm_head, TiedLinear) == (name == "tied")
    check_vocabulary(model, dequantised(model), compile)


FAULTS = {
    "a neighbour's scale": lambda w: w._replace(scale=w.scale.roll(1, 0)),
    "a zero point off by one": lambda w: w._replace(zero=w.zero + 1),
    "the words of a neighbour": lambda w: w._replace(numbers=w.numbers.roll(1, 1)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("part", ["embed", "lm_head"])
@torch.no_grad()
def test_the_comparison_finds_faults_in_embedding_and_output_matrix(tiny_pair, tmp_path, part, fault):
    model = quantised(tiny_pair, tmp_path, "gqa", "int8+int4", dtype=torch.float32)
    exact, module = dequantised(model), model.get_submodule(part)
    quantization.assign(module, fault(module.matrix))
    with pytest.raises(AssertionError):
        check_vocabulary(model, exact)


LOOKUP_FAULTS = {
    "a neighbour's scale": lambda rows, neighbours: rows._replace(scale=neighbours.scale),
    "a zero point off by one": lambda rows, neighbours: rows._replace(zero=rows.zero + 1),
    "a neighbour's numbers": lambda rows, neighbours: rows._replace(numbers=neighbours.numbers),
}


@pytest.mark.parametrize("fault", LOOKUP_FAULTS.values(), ids=LOOKUP_FAULTS)
def test_the_comparison_finds_faults_in_a_lookup(tiny_pair, tmp_path, fault, monkeypatch):
    model = quantised(tiny_pair, tmp_path, "gqa", "int8+int4", dtype=torch.float32)
    exact, rows = dequantised(model), Weight.rows

    def mutant(weight, index):
        found = rows(weight, index)
        return found if weight.scale is None else fault(found, rows(weight, (index + 1) % 512))

    monkeypatch.setattr(Weight, "rows", mutant)
    with pytest.raises(AssertionError):
        check_vocabulary(model, exact)


def test_the_logits_of_a_few_rows_never_widen_the_output_matrix(tiny_pair, tmp_path, monkeypatch):
    model = quantised(tiny_pair, tmp_path, "tied", "int4+int4", dtype=torch.bfloat16)
    rows, floats = [], Weight.floats
    monkeypatch.setattr(Weight, "floats", lambda weight, *to: rows.append(len(weight.numbers)) or floats(weight, *to))
    Engine(model).generate([random_ids(20)], max_new_tokens=4, stop_token_ids=())
    assert max(rows) < model.dims.vocab_size


@torch.no_grad()
def test_a_large_matrix_becomes_floats_a_part_at_a_time(tiny_pair, tmp_path, monkeypatch):
    model = quantised(tiny_pair, tmp_path, "odd_vocab", "int4+int4", dtype=torch.float32)
    monkeypatch.setattr(linear, "AT_ONCE", 100 * 128)
    shapes, floats = [], Weight.floats
    monkeypatch.setattr(Weight, "floats", lambda weight, *to: shapes.append(weight.shape) or floats(weight, *to))
    x = torch.randn(1, 40, 128)
    found = model.lm_head(x)
    assert [rows for rows, _ in shapes] == [100] * 5 + [9]
    torch.testing.assert_close(found, torch.nn.functional.linear(x, floats(model.lm_head.matrix)))


@pytest.mark.parametrize("way", (WAYS | WITH_VOCABULARY).values(), ids=WAYS | WITH_VOCABULARY)
def test_a_large_tensor_is_quantised_a_part_at_a_time(tiny_pair, tmp_path, way, monkeypatch):
    model = quantised(tiny_pair, tmp_path, "tied", way)
    monkeypatch.setattr(quantization, "WIDE_AT_ONCE", 7 * 128)
    again = Llama.from_pretrained(tmp_path, device="cpu", quantize=way)
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_a_model_with_a_quantised_vocabulary_moves_and_is_copied(tiny_pair, tmp_path, name):
    model, ids = quantised(tiny_pair, tmp_path, name, "int8+int4", dtype=torch.float32), torch.tensor([random_ids(9)])
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert (model.dims.vocab_size, model.dims.hidden_size) == (512, model.config.hidden_size)
    assert model.new_cache(1, 9).layers[0][0].dtype == torch.float32
    with torch.no_grad():
        expected = model(ids, backend="dense")
        other = quantised(tiny_pair, tmp_path, name, "int8+int4", dtype=torch.float32)
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(model.state_dict())
        for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
            assert torch.equal(each(ids, backend="dense"), expected)
    half = model.to(torch.bfloat16)
    assert (half.dtype, half.embed.weight.dtype) == (torch.bfloat16, torch.int32)
    assert half.embed(ids).dtype == half(ids, backend="dense").dtype == torch.bfloat16


@torch.no_grad()
def test_an_embedding_of_floats_takes_the_place_of_a_quantised_one(tiny_pair, tmp_path):
    model, ids = quantised(tiny_pair, tmp_path, "tied", "int8+int8", dtype=torch.float32), torch.tensor([random_ids(9)])
    expected = dequantised(model)(ids, backend="dense")
    model.embed = torch.nn.Embedding.from_pretrained(model.embed.matrix.floats())
    torch.testing.assert_close(model(ids, backend="dense"), expected)
    model.save_pretrained(tmp_path / "saved")
    assert Llama.from_pretrained(tmp_path / "saved", device="cpu").config.tie_word_embeddings


@torch.no_grad()
def test_hooks_of_a_quantised_embedding_change_the_input_of_the_layers(tiny_pair, tmp_path):
    model, ids = quantised(tiny_pair, tmp_path, "tied", "int8+int8", dtype=torch.float32), torch.tensor([random_ids(9)])
    expected = model(ids.roll(1, 1), backend="dense")
    with model.embed.register_forward_hook(lambda module, args, output: output.roll(1, 1)):
        assert torch.equal(model(ids, backend="dense"), expected)


def test_a_tied_copy_beside_the_embedding_is_compared_as_floats(tiny_pair, tmp_path):
    tiny_pair("tied")[1].save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    Llama.from_pretrained(tmp_path, device="cpu", quantize="int8+int8")
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": t["lm_head.weight"] * (1 + 1e-6)})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        Llama.from_pretrained(tmp_path, device="cpu", quantize="int8+int8")


@pytest.mark.parametrize("tied", ["gqa", "tied"])
def test_a_step_reads_the_output_matrix_in_few_bits(tiny_pair, tmp_path, tied):
    model = quantised(tiny_pair, tmp_path, tied, "int8+int8", dtype=torch.bfloat16)
    plain = quantised(tiny_pair, tmp_path, tied, "int8", dtype=torch.bfloat16)
    assert bytes_per_step(plain, [0]) - bytes_per_step(model, [0]) == 512 * (model.config.hidden_size - 2)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_memory_is_given_for_what_the_numbers_of_a_weight_take(way):
    weight = torch.randn(5, 64)
    made, empty = way.quantise(weight, torch.float32), way.empty(weight)
    for one, other in zip(made, empty, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype)
    assert made.fits(weight)


@torch.no_grad()
def test_the_comparison_finds_the_scales_of_neighbours(tiny_pair, tmp_path):
    model = quantised(tiny_pair, tmp_path, "gqa", dtype=torch.float32)
    ids = torch.tensor([random_ids(20)])
    before = dequantised(model)(ids, backend="dense")
    scale = model.layers[0].attention.qkv.weight_scale
    scale.copy_(scale.roll(1, 0))
    assert (model(ids, backend="dense") - before).abs().max() > 1e-3


def test_steps_give_the_tokens_of_the_dequantised_weights_compiled_or_not(tiny_pair, tmp_path):
    model = quantised(tiny_pair, tmp_path, "gqa", dtype=torch.float32)
    prompts, options = [random_ids(140), random_ids(5)], {"max_new_tokens": 12, "stop_token_ids": ()}
    expected = [c.tokens for c in Engine(dequantised(model), backend="dense").generate(prompts, **options)]
    for engine in (Engine(model, compile="auto"), Engine(model, backend="dense"), Engine(model, compile=True)):
        assert [c.tokens for c in engine.generate(prompts, sampling=Sampling(), **options)] == expected
        requests = [engine.submit(prompt, sampling=Sampling(), **options) for prompt in prompts]
        engine.run()
        assert [r.completion.tokens for r in requests] == expected
    assert "of the weights in int8" in engine.explain()


@torch.no_grad()
def test_a_scale_is_not_applied_to_a_weight_that_replaces_the_int8_one(tiny_pair, tmp_path):
    model, ids = quantised(tiny_pair, tmp_path, "gqa", dtype=torch.float32), torch.tensor([random_ids(20)])
    expected, o = model(ids, backend="dense"), model.layers[0].attention.o
    o.weight = torch.nn.Parameter(o.weight * o.weight_scale, requires_grad=False)
    with pytest.raises(ValueError, match="weight_scale belongs to a weight of few bits, not of"):
        model(ids, backend="dense")
    o.weight_scale = None
    torch.testing.assert_close(model(ids, backend="dense"), expected)


def test_gradients_go_through_weights_of_8_bits(tiny_pair, tmp_path):
    model, ids = quantised(tiny_pair, tmp_path, "gqa", dtype=torch.float32), torch.tensor([random_ids(20)])
    found = []
    for each in (model, dequantised(model)):
        each.embed.weight.requires_grad_()
        each(ids, backend="dense").square().sum().backward()
        found.append(each.embed.weight.grad)
    torch.testing.assert_close(*found)


def test_gradients_go_through_a_quantised_vocabulary(tiny_pair, tmp_path):
    model, ids = (
        quantised(tiny_pair, tmp_path, "tied", "int8+int4", dtype=torch.float32),
        torch.tensor([random_ids(20)]),
    )
    found = []
    for each in (model, dequantised(model)):
        each.layers[0].mlp.norm.weight.requires_grad_()
        each(ids, backend="dense").square().sum().backward()
        found.append(each.layers[0].mlp.norm.weight.grad)
    torch.testing.assert_close(*found)


def test_the_layers_of_a_quantised_model_take_half_the_memory(demo_folder):
    model = Llama.from_pretrained(demo_folder, device="cpu", quantize="int8", dtype=torch.bfloat16)
    plain = Llama.from_pretrained(demo_folder, device="cpu", dtype=torch.bfloat16)
    size, whole = (sum(p.nbytes for p in m.parameters()) for m in (model, plain))
    layers = sum(p.nbytes for p in plain.layers.parameters())
    assert size < whole - 0.49 * layers


def test_what_cannot_be_quantised_is_refused(tiny_pair, tmp_path, monkeypatch):
    quantised(tiny_pair, tmp_path, "gqa")
    with pytest.raises(ValueError, match="quantize 'int3' is not known; use 'int8', 'fp8', 'int4', 'int4-128'"):
        Llama.from_pretrained(tmp_path, device="cpu", quantize="int3")
    nonsense = "int8-symmetric", "fp8-symmetric", "nf4-symmetric", "nf4-64-symmetric", "int8-dynamic-symmetric"
    for name in (*nonsense, "int4+", "+int8", "int4+int8+int8", "int4 + int8", "int8+none", "int8+int4-7"):
        with pytest.raises(
            ValueError, match=r"is not known; use 'int8', .* or two of them as in 'int4\+int8'|must be one of"
        ):
            Quantization.of(name)
    with pytest.raises(
        ValueError, match="vocabulary must be None or a Quantization without another inside, not 'int8'"
    ):
        Quantization("int4", vocabulary="int8")
    with pytest.raises(ValueError, match="vocabulary must be None or a Quantization without another inside, not Quant"):
        Quantization("int4", vocabulary=Quantization.of("int4+int8"))
    with pytest.raises(ValueError, match="groups of 64 do not divide rows of 160 numbers; use 32"):
        Llama.from_pretrained(tmp_path, device="cpu", quantize="int4-64+int8")
    with pytest.raises(ValueError, match="symmetric must be True or False, not 'yes'"):
        Quantization("int4", symmetric="yes")
    with pytest.raises(ValueError, match="group_size must be one of 32, 64, 128, not 48"):
        Quantization("int4", 48)
    for name in ("fp8-32", "int8+fp8-32"):
        with pytest.raises(ValueError, match="'fp8' has a scale for each row, not for groups of 32"):
            Quantization.of(name)
    for name in ("int8-32-dynamic", "int4-32-dynamic", "nf4-32-dynamic"):
        with pytest.raises(ValueError, match=f'\'dynamic\' inputs are .* not for "{name[:-8]}"; use "int8-dyn'):
            Quantization.of(name)
    for name in ("int4-32+nf4-64", Quantization("int4", vocabulary=Quantization("nf4"))):
        with pytest.raises(
            ValueError, match=r"quantize 'int4-32\+nf4-64': a vocabulary cannot be in 'nf4'; use 'int4'"
        ):
            Quantization.of(name)
    monkeypatch.setattr(quantization, "model_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match='A100 does not compute with "fp8"; use "int8" or "int4"'):
        Llama.from_pretrained("no/such", device="cuda", quantize="fp8")  # refused before anything is fetched
    with pytest.raises(ValueError, match='A100 does not compute with "fp8"; use "int8" or "int4"'):
        Llama.from_pretrained("no/such", device="cuda", quantize="int8+fp8")


@pytest.mark.parametrize(
    ("size", "columns", "way"),
    [(64, 160, "use 32"), (128, 160, "use 32"), (128, 192, "use 32 or 64"), (32, 72, 'use "int8" or "fp8"')],
)
def test_groups_that_do_not_divide_rows_are_refused(size, columns, way):
    with pytest.raises(ValueError, match=f"groups of {size} do not divide rows of {columns} numbers; {way}$"):
        Quantization("int4", size).empty(torch.empty(3, columns))


def test_weights_that_are_not_finite_are_named(tiny_pair, tmp_path):
    model = copy.deepcopy(tiny_pair("gqa")[1])
    with torch.no_grad():
        model.layers[1].mlp.down.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"NaN or infinity: model.layers.1.mlp.down_proj.weight$"):
        Llama.from_pretrained(tmp_path, device="cpu", quantize="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_pair("gqa")[1].save_pretrained(tmp_path / "whole")
        Llama.from_pretrained(tmp_path / "whole", device="cpu", quantize="int8")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "int8",
            "fp8",
            "int4-32",
            "int4-128",
            "int4-64-symmetric",
            "int4-32-symmetric",
            "int8-32",
            "int8-128-symmetric",
        ),
        *("nf4-64", "int8-dynamic", "fp8-dynamic", "int8+int4-64", "int4-32-symmetric+fp8", "nf4-32+int8-64-symmetric"),
        "int8-dynamic+int8-128",
    ],
)
def test_a_name_is_read_back(name):
    assert Quantization.of(Quantization.of(name).name) == Quantization.of(name)
    assert Quantization.of(name).name == name


@pytest.mark.parametrize("name", ["fp8-symmetric", "int4-9999", "int4-٣٢", "int4-", 4, True, "int4-128-x"])
def test_other_names_are_refused_in_a_line(name):
    with pytest.raises(ValueError, match="is not known; use 'int8', 'fp8', 'int4', 'int4-128' or the like"):
        Quantization.of(name)


def test_a_model_in_fp8_whose_dtype_changed_says_what_to_do(tiny_pair, tmp_path):
    model = quantised(tiny_pair, tmp_path, "gqa", "fp8").half()
    with pytest.raises(ValueError, match="if the dtype of a model in fp8 was changed, load it in that dtype"):
        model(torch.tensor([[1, 2]]), backend="dense")


def test_a_model_in_nf4_whose_dtype_changed_says_what_to_do(tiny_pair, tmp_path):
    model = quantised(tiny_pair, tmp_path, "gqa", Quantization("nf4", 32)).half()
    with pytest.raises(
        ValueError, match="scales of NF4 are float32; if the dtype of a model was changed, load it in that"
    ):
        model(torch.tensor([[1, 2]]), backend="dense")


@pytest.mark.parametrize("fault", ["zero of another dtype", "groups of another size"])
@torch.no_grad()
def test_parts_that_kernels_do_not_read_are_computed_by_definition(tiny_pair, tmp_path, fault):
    model = quantised(tiny_pair, tmp_path, "gqa", "int4")
    expected = model(torch.tensor([[1, 2]]), backend="dense")
    for module in (x for x in model.modules() if isinstance(x, MatrixModule) and x.weight_scale is not None):
        weight = module.matrix
        if fault == "zero of another dtype":
            quantization.assign(module, weight._replace(zero=weight.zero.int()))
        else:
            halves = (x.repeat_interleave(2, 1) for x in (weight.scale, weight.zero))
            quantization.assign(module, type(weight)(weight.numbers, *halves))
    torch.testing.assert_close(model(torch.tensor([[1, 2]]), backend="dense"), expected, rtol=1e-4, atol=1e-4)
