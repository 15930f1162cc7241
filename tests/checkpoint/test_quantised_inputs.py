"""Checkpoints that quantise inputs, too: the library's arithmetic, the same however tokens are computed, and saved."""

import copy
import re
import shutil
import warnings

import pytest
import torch
import transformers
from checkpoint_helpers import assert_same_tensors, edited, load, load_quietly, logits, refusal, rewrite, tensors_of
from compressed_helpers import Kind, configured, floats_of, quantise, same, write_floats
from helpers import compiled_forward, few, random_ids

from llama_flex import Engine
from llama_flex.checkpoint.quantization import Quantization
from llama_flex.checkpoint.shards import CheckpointError
from llama_flex.kernels import activations, cpu, linear
from llama_flex.layers import Linear

KINDS = {
    f"{name}, {strategy}, {inputs}": Kind(f"{type}-quantized", 8, type, strategy, None, inputs=inputs)
    for name, type in (("int8", "int"), ("fp8", "float"))
    for strategy in ("channel", "tensor")
    for inputs in ("dynamic", "static")
}
FOUR = {name: kind for name, kind in KINDS.items() if kind.strategy == "channel"}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A checkpoint of floats, with biases, in which the largest input of each product is positive.

    Of a negative one, -127.5 in int8, the last bit of a quotient decides in the library what it becomes.
    """

    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("v_proj.bias", "gate_proj.bias", "up_proj.bias")):
                tensor[0] = 20
            if name.endswith("layernorm.weight"):
                tensor[0] = 4
        tensors["model.embed_tokens.weight"][:, 0] = 8
        return tensors

    folder = write_floats(tmp_path_factory.mktemp("biased"), attention_bias=True, mlp_bias=True)
    rewrite(folder, change)
    return folder


@pytest.fixture
def folder(biased, tmp_path):
    """A copy of `biased` to change."""
    return shutil.copytree(biased, tmp_path / "model")


def quantised(folder, kind, **options):
    """Quantise a folder; return the model."""
    quantise(folder, kind.config(), kind.store)
    return load_quietly(folder, **options)


def linears(model) -> list[Linear]:
    """Return the quantised layers of a model."""
    return [x for x in model.modules() if isinstance(x, Linear) and x.weight_scale is not None]


# ---- read and written


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_model_is_read_saved_and_loaded_bit_by_bit(kind, folder, tmp_path):
    expected = quantise(folder, kind.config(), kind.store)
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    assert {x.input_scale.shape[1] for x in linears(model)} == {kind.inputs == "static"}
    if kind.inputs == "static":
        scales = {k: v for k, v in tensors_of(model).items() if k.endswith("input_scale")}
        assert len(scales) == len(expected)
        assert all((v == kind.input_scale(k.removesuffix(".input_scale"))).all() for k, v in scales.items())
    model.save_pretrained(tmp_path / "again")
    again = load_quietly(tmp_path / "again")
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again, 48), logits(model, 48))
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "again").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_floats_are_quantised_with_their_inputs_on_request(name, biased, tmp_path):
    model, plain = load_quietly(biased, quantize=f"{name}-dynamic"), load_quietly(biased, quantize=name)
    assert same(floats_of(model), floats_of(plain))
    assert (logits(model, 48) - logits(plain, 48)).abs().median() > 1e-3
    model.save_pretrained(tmp_path)
    assert_same_tensors(load_quietly(tmp_path).state_dict(), model.state_dict())
    assert Quantization.of(f"{name}-dynamic") == Quantization(name, inputs="dynamic")
    assert Quantization(name, inputs="dynamic").name == f"{name}-dynamic"
    with pytest.raises(ValueError, match=f"quantize '{name}-static' needs scales of inputs, which floats do not have"):
        load(biased, quantize=Quantization(name, inputs="static"))
    with pytest.raises(ValueError, match=rf"quantize 'int4-32\+{name}-static' needs scales of inputs"):
        load(biased, quantize=Quantization("int4", vocabulary=Quantization(name, inputs="static")))
    assert f"of the weights in {name}, with inputs in {name}" in explained(model)


def explained(model) -> str:
    engine = Engine(model, compile=False, backend="dense")
    engine.generate([[5, 6]], max_new_tokens=2, stop_token_ids=())
    return engine.explain()


# ---- the library's arithmetic


def in_transformers(folder, dtype):
    """Return transformers' model of a folder, which must hold exactly the tensors that it expects."""
    pytest.importorskip("compressed_tensors")
    config = transformers.CompressedTensorsConfig(**configured(folder), dequantize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.LlamaForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            quantization_config=config,
            output_loading_info=True,
        )
    assert not any(info.values()), info
    return model.eval()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the median difference: now and then, a last bit decides which number an input becomes, and so changes all
    later tokens a little."""
    return (one.double() - other.double()).abs().median().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_logits_are_those_of_transformers(kind, dtype, folder, tmp_path):
    model = quantised(folder, kind, dtype=dtype)
    expected = logits(in_transformers(folder, dtype), 48)
    assert difference(logits(model, 48), expected) < 1e-4
    model.save_pretrained(tmp_path / "saved")
    assert difference(logits(in_transformers(tmp_path / "saved", dtype), 48), expected) < 1e-4


@pytest.mark.parametrize("kind", FOUR.values(), ids=FOUR)
def test_in_16_bits_a_model_is_no_further_from_float64_than_transformers(kind, folder):
    truth = logits(quantised(folder, kind, dtype=torch.float64), 48)
    ours, theirs = load(folder, dtype=torch.bfloat16), in_transformers(folder, torch.bfloat16)
    errors = [(logits(model, 48).double() - truth).abs().mean() for model in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]


def drop(model):
    for module in linears(model):
        module.input_scale = None


def doubled(model):
    for module in linears(model):
        module.input_scale *= 2


def neighbours(quantise):
    def run(x, weight):
        numbers, scale = quantise(x, weight)
        return numbers, scale.roll(1, -2)

    return run


FAULTS = [(name, "dropped") for name in FOUR]
FAULTS += [(name, "doubled" if "static" in name else "a neighbour's scale") for name in FOUR]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
@torch.no_grad()
def test_the_comparison_finds_a_fault(name, fault, folder, monkeypatch):
    model = quantised(folder, FOUR[name])
    expected = logits(in_transformers(folder, torch.float32), 48)
    if fault == "a neighbour's scale":
        monkeypatch.setattr(linear, "can_fuse", lambda *_: False)
        assert difference(logits(model, 48), expected) < 1e-4
        monkeypatch.setattr(activations, "quantise", neighbours(activations.quantise))
    else:
        (drop if fault == "dropped" else doubled)(model)
    assert difference(logits(model, 48), expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_each_product_is_that_of_the_librarys_layer(kind, floats, tmp_path):
    folder = shutil.copytree(floats, tmp_path / "model")
    model, theirs = quantised(folder, kind), in_transformers(folder, torch.float32)
    found = {}
    for name in floats_of(model):
        module = theirs.get_submodule(name)
        module.register_forward_hook(lambda _, given, result, name=name: found.update({name: (given[0], result)}))
    logits(theirs, 48)
    off = {}
    for path, names in model.config.architecture.modules(2, False):
        if path.startswith("layers.") and isinstance(module := model.get_submodule(path), Linear):
            for parts in zip(names, module(found[names[0]][0]).split(module.parts, -1), strict=True):
                x, expected = found[parts[0]]
                off[parts[0]] = (parts[1] - expected).abs().amax(-1) / expected.abs().amax(-1)
                if kind.type == "int" and kind.inputs == "dynamic":  # there, the library's -127.5 is not quite that
                    off[parts[0]] = off[parts[0]][x.amax(-1) > -x.amin(-1)]
    assert off.keys() == found.keys()
    assert max(error.max() for error in off.values()) < 1e-5


# ---- however tokens are computed


def as_in(folder, kind):
    """Return ids of two prompts, the model in float64, whose rounding changes no number of 8 bits, and its logits."""
    model = quantised(folder, kind, dtype=torch.float64)
    ids = torch.tensor([random_ids(150), random_ids(150, 1)]) % 48
    with torch.no_grad():
        return ids, model, model(ids, backend="dense")


@pytest.mark.parametrize("name", FOUR)
@torch.no_grad()
def test_a_prompt_at_once_in_chunks_and_token_by_token_has_the_same_logits(name, floats, tmp_path):
    folder = shutil.copytree(floats, tmp_path / "model")
    ids, model, expected = as_in(folder, FOUR[name])
    cache, found = model.new_cache(2, 200), []
    for count in (100, 30, *[1] * 20):
        start = sum(x.shape[1] for x in found)
        found.append(model(ids[:, start : start + count], cache=cache, backend="dense"))
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)
    lengths = torch.tensor([150, 7])
    ragged = model(ids, lengths=lengths, backend="dense")
    torch.testing.assert_close(ragged[1, :7], expected[1, :7], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", few(list(FOUR)[1:3], [*list(FOUR)[:1], *list(FOUR)[3:]]))
@torch.no_grad()
def test_kernels_and_compiled_code_compute_the_same_logits(name, dtype, floats, tmp_path):
    folder = shutil.copytree(floats, tmp_path / "model")
    ids, _, expected = as_in(folder, FOUR[name])
    model = load_quietly(folder, dtype=dtype)
    plain = model(ids, backend="dense")
    most = 1e-5 if dtype == torch.float32 else 1.5 * difference(plain, expected)
    assert difference(plain, expected) < most
    cache, found = model.new_cache(2, 200), []
    for count in (100, 15, 7, *[1] * 28):
        start = sum(x.shape[1] for x in found)
        found.append(model(ids[:, start : start + count], cache=cache, backend="dense"))
    assert difference(torch.cat(found, 1), expected) < most
    for length in (5, 150):
        found = compiled_forward(model)(ids[:, :length])
        assert difference(found, expected[:, :length]) < most
    if dtype == torch.float32:  # in 16 bits, rounding changes about as many numbers as the rule does
        drop(model)
        assert difference(model(ids, backend="dense"), expected) > 100 * most


@pytest.mark.parametrize("name", FOUR)
def test_an_engine_gives_the_same_tokens_in_any_company(name, floats, tmp_path):
    _, model, _ = as_in(shutil.copytree(floats, tmp_path / "model"), FOUR[name])
    prompts, options = [[x % 48 for x in random_ids(n)] for n in (140, 5)], {"max_new_tokens": 8, "stop_token_ids": ()}
    alone = [Engine(model, backend="dense").generate([prompt], **options)[0].tokens for prompt in prompts]
    assert [c.tokens for c in Engine(model, backend="dense").generate(prompts, **options)] == alone


@pytest.mark.parametrize("name", FOUR)
@torch.no_grad()
def test_layers_in_one_kernel_compute_what_products_by_themselves_do(name, folder, monkeypatch):
    model = quantised(folder, FOUR[name])
    if not cpu.load(torch.float32):
        pytest.skip("no kernels")
    ran, run = [], cpu.run_blocks

    def spy(*given):
        ran.append(result := run(*given))
        return result

    ids = torch.tensor([random_ids(3)]) % 48
    found = []
    for each in (spy, lambda *given: None):
        monkeypatch.setattr(cpu, "run_blocks", each)
        found.append(model(ids, cache=model.new_cache(1, 8), backend="dense"))
    assert all(y is not None for y in ran)
    assert ran
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    drop(model)
    assert difference(model(ids, cache=model.new_cache(1, 8), backend="dense"), found[0]) > 1e-3


# ---- what is refused

INPUTS = "quantization_config.config_groups.group_0.input_activations"
DYNAMIC, STATIC, FLOATS = (
    KINDS[f"{name}"] for name in ("int8, channel, dynamic", "fp8, tensor, static", "fp8, channel, dynamic")
)


def changed(kind: Kind, **changes) -> dict:
    """Return a config whose inputs differ."""
    config = copy.deepcopy(kind.config())
    config["config_groups"]["group_0"]["input_activations"] |= changes
    return config


def in_groups(kind: Kind) -> dict:
    """Return a config whose weights are in groups."""
    config = copy.deepcopy(kind.config())
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 32}
    return config


@pytest.mark.parametrize(
    ("config", "needle"),
    [
        (in_groups(DYNAMIC), f"{INPUTS} is not supported with strategy='group' (only with a scale for each row of a"),
        (
            changed(FLOATS, strategy="tensor"),
            f"{INPUTS}: strategy='tensor' with dynamic=True is not supported: a token's result would depend on those",
        ),
        (changed(FLOATS, strategy=None), f"{INPUTS}: strategy='tensor' with dynamic=True is not supported"),
        (changed(DYNAMIC, dynamic=False), f"{INPUTS}: strategy='token' with dynamic=False is not supported"),
        (changed(DYNAMIC, dynamic="local"), f"{INPUTS}: dynamic='local' is not supported"),
        (changed(DYNAMIC, symmetric=False), f"{INPUTS}: symmetric=False is not supported (only True)"),
        (changed(DYNAMIC, num_bits=4), f"{INPUTS}: num_bits=4 is not supported (only 8)"),
        (changed(DYNAMIC, type="float"), f"{INPUTS}: type='float' in format='int-quantized' is not supported"),
        (changed(FLOATS, type="int"), f"{INPUTS}: type='int' in format='float-quantized' is not supported"),
        (changed(FLOATS, type=None), f"{INPUTS}: type=None in format='float-quantized' is not supported"),
        (changed(DYNAMIC, strategy="group", group_size=128), f"{INPUTS}: strategy='group' is not supported"),
        (changed(DYNAMIC, group_size=128), f"{INPUTS}: group_size=128 is not supported"),
        (changed(DYNAMIC, scale_dtype="torch.float8_e4m3fn"), f"{INPUTS}: scale_dtype="),
        (changed(DYNAMIC, surprise=1), f"{INPUTS}: surprise=1 is not known"),
        (Kind("int-quantized", 8, strategy="channel", group_size=None, inputs="static").config(), "missing: "),
    ],
)
def test_inputs_that_are_not_supported_are_refused_by_name(config, needle, folder):
    kind = FLOATS if config["format"] == "float-quantized" else DYNAMIC
    quantise(folder, config, kind.store)
    assert refusal(folder, needle, str(folder)).isprintable()


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda t: t[f"{DOWN}.input_scale"].resize_(1, 1), f"{DOWN}.input_scale is [1, 1], config.json says [1]"),
        (lambda t: t.pop(f"{DOWN}.input_scale"), f"missing: {DOWN}.input_scale"),
        (lambda t: t.setdefault(f"{DOWN}.input_zero_point", torch.zeros(1)), f"unexpected: {DOWN}.input_zero_point"),
        (
            lambda t: t[DOWN.replace("down", "up") + ".input_scale"].mul_(2),
            f"{DOWN.replace('down', 'up')}.input_scale is ",
        ),
    ],
)
def test_scales_of_inputs_that_do_not_fit_are_named(change, needle, folder):
    quantise(folder, STATIC.config(), STATIC.store)
    rewrite(folder, edited(change))
    with pytest.raises(CheckpointError):
        load(folder)
    assert refusal(folder, needle).isprintable()


def test_a_scale_of_inputs_that_is_not_finite_is_named(folder):
    quantise(folder, STATIC.config(), STATIC.store)
    rewrite(folder, lambda tensors: tensors | {f"{DOWN}.input_scale": torch.tensor([torch.nan])})
    with pytest.warns(UserWarning, match=re.escape(f"NaN or infinity: {DOWN}.input_scale") + "$"):
        load(folder)


def test_a_model_whose_inputs_are_quantised_in_several_ways_is_not_saved(folder, tmp_path):
    model = quantised(folder, STATIC)
    scale = model.layers[0].attention.o.input_scale
    scale[3] *= 2
    with pytest.raises(ValueError, match=r"cannot save model.layers.0.self_attn.o_proj.input_scale, whose numbers dif"):
        model.save_pretrained(tmp_path / "new")
    model.layers[0].attention.o.input_scale = None
    with pytest.raises(ValueError, match=r"cannot save .* as fp8-static beside .*o_proj.weight as fp8;"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
