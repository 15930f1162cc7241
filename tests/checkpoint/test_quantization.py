"""Weights quantised while they are loaded: as near as 8 bits are, and computed as the dequantised ones would be."""

import copy
import warnings

import pytest
import torch
from helpers import TINY, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex import Engine, Llama, Sampling
from llama_flex.checkpoint import quantization
from llama_flex.checkpoint.quantization import to_int8
from llama_flex.layers import Linear
from llama_flex.weights import DTYPES


@given(
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    size=st.sampled_from([1e-7, 1e-5, 0.02, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_a_weight_is_at_most_half_a_step_from_its_numbers(stored, dtype, rows, columns, size, seed):
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size).to(stored)
    weight[0] = 0
    numbers, scale = to_int8(weight, dtype)
    assert numbers.dtype == torch.int8
    assert numbers.shape == weight.shape
    assert scale.dtype == dtype
    assert scale.shape == (rows, 1)
    assert numbers.abs().max() <= 127
    error = (numbers.double() * scale.double() - weight.double()).abs()
    assert (error <= scale.double() * (0.5 + 1e-4)).all()
    # No step is larger than 127 of them need, but for the rounding of a scale.
    most = weight.double().abs().amax(1, keepdim=True) / 127
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (scale.double() <= most * (1 + 2 * torch.finfo(dtype).eps + 1e-6) + least).all()


def dequantised(model: Llama) -> Llama:
    """Return the model with the weights that its int8 numbers and scales stand for."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear) and module.weight_scale is not None:
            assert module.weight.dtype == torch.int8
            module.weight = torch.nn.Parameter(module.weight.to(module.weight_scale.dtype) * module.weight_scale, False)
            module.weight_scale = None
    return model


def quantised(tiny_pair, tmp_path, name, **options) -> Llama:
    tiny_pair(name)[1].save_pretrained(tmp_path)
    return Llama.from_pretrained(tmp_path, device="cpu", quantize="int8", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_quantised_model_computes_what_its_dequantised_weights_do(tiny_pair, tmp_path, name, dtype):
    model = quantised(tiny_pair, tmp_path, name, dtype=dtype)
    plain, ids = dequantised(model), torch.tensor([random_ids(150)])
    assert model.dtype == dtype
    assert sum(p.numel() for p in model.parameters() if p.dtype == torch.int8) > 0
    exact = copy.deepcopy(plain).double()(ids, backend="dense")
    theirs = (plain(ids, backend="dense").double() - exact).abs()
    cache, cached = model.new_cache(1, 200), []
    for count in (100, 30, *[1] * 20):
        start = sum(x.shape[1] for x in cached)
        cached.append(model(ids[:, start : start + count], cache=cache, backend="dense"))
    for ours in (model(ids, backend="dense"), torch.cat(cached, 1)):
        error = (ours.double() - exact).abs()
        assert error.mean() <= 1.5 * theirs.mean()
        assert error.max() <= 3 * theirs.max()


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
    with pytest.raises(ValueError, match="weight_scale belongs to a weight of int8, not of"):
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


def test_the_layers_of_a_quantised_model_take_half_the_memory(demo_folder):
    model = Llama.from_pretrained(demo_folder, device="cpu", quantize="int8", dtype=torch.bfloat16)
    plain = Llama.from_pretrained(demo_folder, device="cpu", dtype=torch.bfloat16)
    size, whole = (sum(p.nbytes for p in m.parameters()) for m in (model, plain))
    layers = sum(p.nbytes for p in plain.layers.parameters())
    assert size < whole - 0.49 * layers


def test_what_cannot_be_quantised_or_saved_is_refused(tiny_pair, tmp_path, monkeypatch):
    model = quantised(tiny_pair, tmp_path, "gqa")
    with pytest.raises(ValueError, match="cannot be saved; save the one that it was made from"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="quantize 'int3' is not known; choose 'int8'"):
        Llama.from_pretrained(tmp_path, device="cpu", quantize="int3")
    monkeypatch.setattr(quantization, "model_device", torch.device)
    with pytest.raises(ValueError, match="kernels for a CPU only, not for cuda; use device='cpu', --device cpu"):
        Llama.from_pretrained("no/such", device="cuda", quantize="int8")  # refused before anything is fetched


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
