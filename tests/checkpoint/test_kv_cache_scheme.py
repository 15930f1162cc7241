"""Checkpoints of compressed-tensors with scales of keys and values: read, saved, and the library's rule, which rounds
keys and values whenever a model runs, with a cache or without."""

import copy
import re
import shutil

import pytest
import torch
from checkpoint_helpers import assert_same_tensors, load, load_quietly, logits, refusal, rewrite
from compressed_helpers import Kind, configured, floats_of, quantise, same
from helpers import compiled_forward, few, random_ids
from kv_dtype_helpers import FP8, rounding, scales_given, with_scales, without_scales
from test_quantised_inputs import difference, in_transformers

from llama_flex import Capture, Edit, Engine, Llama
from llama_flex.checkpoint.shards import CheckpointError
from llama_flex.engine.explain import bytes_per_step
from llama_flex.engine.scheduler import _pages_that_fit
from llama_flex.kernels import kv_cache
from llama_flex.kernels.kv_cache import KV, Scales

KIND = Kind("float-quantized", 8, "float", "channel", None, inputs="dynamic")
PLAIN = {"quant_method": "compressed-tensors", "format": "dense", "quantization_status": "frozen", "config_groups": {}}
TENSOR = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
KINDS = {
    f"{weights}, {strategy}": (config, TENSOR | {"strategy": strategy})
    for weights, config in (("fp8", KIND.config()), ("floats", PLAIN))
    for strategy in ("tensor", "attn_head")
}
KEYS = "model.layers.1.self_attn.k_scale"


def scales_of(strategy: str, layers: int = 2, heads: int = 2) -> dict[str, torch.Tensor]:
    """Return scales, other ones for each layer, by their names in a checkpoint."""
    each = torch.ones(1) if strategy == "tensor" else torch.arange(1.0, 1 + heads)[:, None, None] / 2
    return {
        f"model.layers.{n}.self_attn.{name}_scale": each * size * (1 + n)
        for n in range(layers)
        for name, size in (("k", 0.0123), ("v", 0.0037))
    }


def give_scales(folder, name: str) -> dict[str, torch.Tensor]:
    """Quantise the matrices of a folder, unless it is of floats, and add scales of keys and values; return these."""
    config, scheme = KINDS[name]
    if config is not PLAIN:
        quantise(folder, config, KIND.store)
    scales = scales_of(scheme["strategy"])
    rewrite(folder, lambda tensors: tensors | scales, quantization_config=config | {"kv_cache_scheme": scheme})
    return scales


@pytest.fixture
def folder(floats, tmp_path):
    """A copy of `floats` to change."""
    return shutil.copytree(floats, tmp_path / "model")


# ---- read and written


@pytest.mark.parametrize("name", KINDS)
def test_scales_are_read_saved_and_loaded_bit_by_bit(name, folder, tmp_path):
    expected = give_scales(folder, name)
    model = load_quietly(folder)
    found = [each for kv in model.new_cache(1, 8).layers for each in kv.scales]
    assert all(torch.equal(x, y.expand(2, 1, 1)) for x, y in zip(found, expected.values(), strict=True))
    model.save_pretrained(tmp_path / "again")
    again = load_quietly(tmp_path / "again")
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert configured(tmp_path / "again")["kv_cache_scheme"] == KINDS[name][1]
    assert torch.equal(logits(again, 48), logits(model, 48))
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "again").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()


def test_the_dtype_of_a_model_is_that_of_its_embedding(folder):
    scales = give_scales(folder, "floats, tensor")
    narrow = {name: tensor.bfloat16() for name, tensor in rewrite(folder).items()}
    rewrite(folder, lambda _: narrow | scales, dtype=None, torch_dtype=None)
    model = load(folder)
    assert {model.dtype, *(x.dtype for kv in model.new_cache(1, 8).layers for x in kv.scales)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", few([torch.float32], [torch.float64]))
@pytest.mark.parametrize("name", few(list(KINDS)[1:3], [*list(KINDS)[:1], *list(KINDS)[3:]]))
def test_logits_are_those_of_the_library(name, dtype, folder, tmp_path):
    give_scales(folder, name)
    model = load(folder, dtype=dtype)
    expected = logits(in_transformers(folder, dtype), 48)
    assert difference(logits(model, 48), expected) < 1e-4
    model.save_pretrained(tmp_path / "saved")
    assert difference(logits(in_transformers(tmp_path / "saved", dtype), 48), expected) < 1e-4


@pytest.mark.parametrize("name", few(list(KINDS)[1:2], [*list(KINDS)[:1], *list(KINDS)[2:]]))
def test_in_16_bits_a_model_is_no_further_from_float64_than_the_library(name, folder):
    give_scales(folder, name)
    truth = logits(load(folder, dtype=torch.float64), 48)
    ours, theirs = load(folder, dtype=torch.bfloat16), in_transformers(folder, torch.bfloat16)
    errors = [(logits(model, 48).double() - truth).abs().mean() for model in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]


def swapped(attention) -> None:
    attention.k_scale, attention.v_scale = attention.v_scale, attention.k_scale


def dropped(attention) -> None:
    attention.k_scale = attention.v_scale = None


def neighbours(attention) -> None:
    for scale in (attention.k_scale, attention.v_scale):
        scale.copy_(scale.roll(1, 0))


@pytest.mark.parametrize("change", [swapped, dropped, neighbours])
@torch.no_grad()
def test_the_comparison_finds_a_fault(change, folder):
    give_scales(folder, "floats, attn_head")
    model, expected = load(folder), logits(in_transformers(folder, torch.float32), 48)
    for block in model.blocks():
        change(block.attention)
    assert difference(logits(model, 48), expected) > 1e-3


# ---- the rule, whatever computes it


@pytest.fixture(scope="module")
def model(tiny_pair) -> Llama:
    """A model in float64 with a scale for each head."""
    return with_scales(tiny_pair("gqa")[1], per_head=True)


def by_edits(model: Llama, ids: torch.Tensor, **options) -> torch.Tensor:
    """Return logits of the model without scales, whose keys and values edits round."""
    edit = rounding(model, scales_given(model))
    return without_scales(model)(ids, edit=edit, backend="dense", **options)


IDS = torch.tensor([random_ids(60), random_ids(60, 1)])


@pytest.mark.parametrize("backend", ["dense", "flex"])
@torch.no_grad()
def test_however_tokens_are_computed_the_rule_holds(model, backend):
    """Without a cache, ragged, in chunks and one by one; in a rolling cache."""
    expected = by_edits(model, IDS)
    assert (without_scales(model)(IDS, backend="dense") - expected).abs().max() > 1e-2
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(model(IDS, backend=backend), expected, **close)
    ragged = model(IDS, lengths=torch.tensor([60, 7]), backend=backend)
    torch.testing.assert_close(ragged[1, :7], expected[1, :7], **close)
    for cache in (model.new_cache(2, 128), model.new_rolling_cache(2, 100), model.new_cache(2, 128, kv_dtype="fp8")):
        assert cache.layers[0].k.dtype == FP8
        parts = [model(part, cache=cache, backend=backend) for part in IDS.split([40, 18, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, **close)


@pytest.mark.exhaustive
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_compiled_code_computes_the_same_logits(tiny_pair, cached):
    model = with_scales(tiny_pair("gqa")[1], per_head=True, dtype=torch.float32)
    expected = by_edits(with_scales(tiny_pair("gqa")[1], per_head=True), IDS)
    forward, cache = compiled_forward(model), model.new_cache(2, 128) if cached else None
    assert difference(forward(IDS, cache=cache), expected) < 1e-5


@torch.no_grad()
def test_requests_and_streams_give_the_tokens_of_the_rule(model):
    plain, edit = Engine(without_scales(model), backend="dense"), rounding(model, scales_given(model))
    prompts, options = [random_ids(140), random_ids(20), random_ids(129)], {"max_new_tokens": 6, "stop_token_ids": ()}
    expected = [plain.generate([ids], edit=edit, **options)[0].tokens for ids in prompts]
    engine = Engine(model, backend="dense", max_batch_size=2, max_slots=1024)
    assert engine.kv_dtype == "fp8"
    assert [engine.generate([ids], **options)[0].tokens for ids in prompts] == expected
    requests = [engine.submit(ids, **options) for ids in prompts]
    engine.run()
    assert [request.completion.tokens for request in requests] == expected
    assert engine.scheduler.cache.layers[0].k.dtype == FP8
    assert "keys and values in fp8" in engine.explain()
    sizes = [bytes_per_step(model, [1000], kv_dtype) for kv_dtype in (engine.kv_dtype, "fp8", None)]
    assert sizes[0] == sizes[1] < sizes[2]
    assert _pages_that_fit(model, engine.kv_dtype, 0.001) > 2 * _pages_that_fit(model, None, 0.001)


@torch.no_grad()
def test_captures_are_of_keys_before_and_attention_after_rounding(model):
    """With a cache or without. An edit changes what is rounded."""
    captures = [Capture("k", "attention", where=range(60)) for _ in range(3)]
    model(IDS, capture=captures[0], backend="dense")
    model(IDS, capture=captures[1], cache=model.new_cache(2, 60), backend="dense")
    edit = rounding(model, scales_given(model))
    without_scales(model)(IDS, capture=captures[2], edit=edit, backend="dense")
    for layer in range(2):
        of_layer = [capture["attention", layer] for capture in captures]
        torch.testing.assert_close(of_layer[0], of_layer[2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(of_layer[1], of_layer[2], rtol=1e-9, atol=1e-9)
    keys = [capture["k", 0] for capture in captures]
    assert torch.equal(keys[0], keys[1])
    assert (keys[0] - keys[2]).abs().max() > 1e-3
    larger = Edit("k", lambda x, tokens: x * 1e6)
    assert model(IDS, edit=larger).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_quotients_are_not_rounded_to_16_bits_first(dtype, model):
    attention = next(with_scales(model, dtype=dtype).blocks()).attention
    k = torch.randn(1, 2, 999, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (k.double() / attention.k_scale.double()).clamp(-448, 448).float().to(FP8)
    twice = (k / attention.k_scale).clamp(-448, 448).to(FP8)
    cache = KV(*torch.zeros(2, 1, 2, 999, 4).to(FP8), Scales.given(attention))
    for kv in (
        kv_cache.keep(attention, None, None, k, k),
        kv_cache.keep(attention, cache, torch.arange(999)[None], k, k),
    ):
        assert (kv.k.float() != expected.float()).float().mean() < 1e-3
    assert (twice.float() != expected.float()).float().mean() > 3e-3


# ---- what is refused


def test_a_cache_in_the_models_dtype_is_refused(model):
    cache = without_scales(model).new_cache(1, 8)
    needle = (
        r"^the cache keeps keys and values in torch.float64, but the checkpoint has scales for them in 'fp8'; make it"
    )
    with pytest.raises(ValueError, match=needle):
        model(IDS[:1, :3], cache=cache)


def test_gradients_are_refused(model):
    wide = copy.deepcopy(model).requires_grad_()
    with pytest.raises(
        ValueError, match=r"^keys and values in 8 bits have no gradients: use torch.no_grad\(\), or set"
    ):
        wide(IDS, backend="dense")
    without_scales(wide)(IDS, backend="dense").sum().backward()


def test_half_of_the_scales_are_not_saved(model, tmp_path):
    changed = copy.deepcopy(model)
    changed.layers[1].attention.v_scale = None
    with pytest.raises(
        ValueError, match=r"cannot save scales of keys and values without model.layers.1.self_attn.v_sc"
    ):
        changed.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


WHERE = "quantization_config.kv_cache_scheme"


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"type": "int"}, f"{WHERE}: type='int' is not supported (only 'float')"),
        ({"num_bits": 4}, f"{WHERE}: num_bits=4 is not supported (only 8)"),
        ({"dynamic": True}, f"{WHERE}: dynamic=True is not supported (only False)"),
        ({"symmetric": False}, f"{WHERE}: symmetric=False is not supported (only True)"),
        ({"strategy": "channel"}, f"{WHERE}: strategy='channel' is not supported (only 'tensor' or 'attn_head' or"),
        ({"group_size": 128}, f"{WHERE}: group_size=128 is not supported"),
        ({"scale_dtype": "torch.float8_e4m3fn"}, f"{WHERE}: scale_dtype="),
        ({"surprise": 1}, f"{WHERE}: surprise=1 is not known"),
    ],
)
def test_other_schemes_are_refused_by_name(changes, needle, folder):
    give_scales(folder, "floats, tensor")
    rewrite(folder, quantization_config=PLAIN | {"kv_cache_scheme": TENSOR | changes})
    refusal(folder, needle, "; give the checkpoint that they were made of")


def test_a_scheme_that_is_no_object_or_has_no_type_is_refused(folder):
    for scheme, needle in (("fp8", "must be an object, found 'fp8'"), ({"num_bits": 8}, ": type is missing")):
        rewrite(folder, quantization_config=PLAIN | {"kv_cache_scheme": scheme})
        refusal(folder, f"{WHERE}{needle}" if needle[0] == ":" else f"{WHERE} {needle}")
    rewrite(folder, quantization_config=PLAIN | {"kv_cache_scheme": None})
    refusal(folder, "config_groups must be a single group")


def test_other_tensors_are_refused(folder):
    scales = give_scales(folder, "floats, attn_head")
    tensors = rewrite(folder)
    for tensor, needle in (
        (None, f"missing: {KEYS}"),
        (scales[KEYS][:1], f"shape: {KEYS} is [1, 1, 1], config.json says [2, 1, 1]"),
        (scales[KEYS].to(FP8), f"stored as F8_E4M3: {KEYS}"),
    ):
        rewrite(folder, lambda _, tensor=tensor: {k: v for k, v in (tensors | {KEYS: tensor}).items() if v is not None})
        refusal(folder, needle)
    for wrong in (0.0, -0.1, torch.inf, torch.nan):
        damaged = scales[KEYS].clone()
        damaged[1] = wrong
        rewrite(folder, lambda _, damaged=damaged: tensors | {KEYS: damaged})
        with pytest.raises(
            CheckpointError, match=re.escape(f"{KEYS} has a scale that is not a positive number; fetch")
        ):
            load(folder)
    rewrite(folder, lambda _: tensors, quantization_config=PLAIN | {"kv_cache_scheme": TENSOR})
    refusal(folder, f"shape: {KEYS} is [2, 1, 1], config.json says [1]")
    rewrite(folder, quantization_config=None)
    refusal(folder, f"unexpected: {KEYS}")


@pytest.mark.exhaustive
@pytest.mark.weights
def test_real_weights(demo_folder, tmp_path):
    """With scales that the largest keys and values of some tokens give, as the library measures them."""
    ids, capture = torch.tensor([[1, 4093, 260, 2240, 282, 4649, 314, 7042, 30]]), Capture("k", "v")
    plain = load(demo_folder, dtype=torch.float64)
    with torch.no_grad():
        floats = plain(ids, capture=capture)
    scales = {
        f"model.layers.{n}.self_attn.{name}_scale": (capture[name, n].abs().amax() / 448).float().reshape(1)
        for n in range(len(plain.layers))
        for name in "kv"
    }
    folder = shutil.copytree(demo_folder, tmp_path / "model")
    rewrite(folder, lambda tensors: tensors | scales, quantization_config=PLAIN | {"kv_cache_scheme": TENSOR})
    exact, found = load(folder, dtype=torch.float64), load(folder, dtype=torch.bfloat16)
    assert same(floats_of(exact), floats_of(plain))
    with torch.no_grad():
        expected = in_transformers(folder, torch.float64)(ids).logits
        truth, cached = exact(ids), exact(ids, cache=exact.new_cache(1, 16))
        assert difference(truth, expected) < 1e-3 < difference(floats, truth)
        torch.testing.assert_close(cached, truth, rtol=1e-8, atol=1e-8)
        assert difference(found(ids), truth) < 2 * difference(floats, truth)
