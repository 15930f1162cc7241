"""Checkpoints of transformers' "fp8": packed by its own quantiser, which runs without a GPU, unlike its products. These
are compared with the rule of its kernels, written out here block by block."""

import re
import shutil

import pytest
import torch
from checkpoint_helpers import edited, load, load_quietly, logits, refusal, rewrite, tensors_of
from compressed_helpers import floats_of, same, write_floats
from helpers import compiled_forward, few, random_ids
from torch import nn
from transformers import FineGrainedFP8Config, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from llama_flex import Engine
from llama_flex.checkpoint.quantization import Quantization
from llama_flex.checkpoint.shards import CheckpointError
from llama_flex.kernels import activations, cpu, linear
from llama_flex.layers import Linear

FP8 = torch.float8_e4m3fn
# Blocks of 128 do not divide the 96 rows of keys and values, and those of 80 x 64 no number of rows.
KINDS = {
    "128 x 128": {"weight_block_size": (128, 128)},
    "80 x 64": {"weight_block_size": (80, 64)},
    "dynamic": {"weight_block_size": None},
    "static": {"weight_block_size": None, "activation_scheme": "static"},
}
BLOCKS = [name for name in KINDS if "x" in name]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
}
DOWN = "model.layers.1.mlp.down_proj"


class Library:
    """The library's quantiser, as its operations need it."""

    def __init__(self, **settings) -> None:
        self.quantization_config = FineGrainedFP8Config(**settings)


def stored(library: Library, name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a matrix, by their names in the file. The library packs whole blocks only."""
    rows, settings = len(matrix), library.quantization_config
    size = rows if settings.weight_block_size is None else settings.weight_block_size[0]
    padded = nn.functional.pad(matrix.float(), (0, 0, 0, -rows % size))
    numbers, scale = Fp8Quantize(library)._quantize_one(f"{name}.weight", padded).values()
    found = {f"{name}.weight": numbers[:rows], f"{name}.weight_scale_inv": scale}
    if settings.weight_block_size is None:
        found[f"{name}.weight_scale_inv"] = scale.reshape(())
    if settings.activation_scheme == "static":
        found[f"{name}.activation_scale"] = torch.tensor(0.011 if "down" in name else 0.017)
    return found


def dequantised(library: Library, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a matrix as the library makes it of its tensors."""
    numbers, scale, block = (
        tensors[f"{name}.weight"].float(),
        *(
            tensors[f"{name}.weight_scale_inv"],
            library.quantization_config.weight_block_size,
        ),
    )
    padded = numbers if block is None else nn.functional.pad(numbers, (0, 0, 0, -len(numbers) % block[0]))
    return Fp8Dequantize(library)._dequantize_one(padded.to(FP8), scale, torch.float32)[: len(numbers)]


def quantise(folder, names=("model.layers.",), **settings) -> dict[str, torch.Tensor]:
    """Quantise the matrices of a checkpoint whose names begin so; return those that the library makes of them."""
    library, floats = Library(**settings), {}

    def change(tensors):
        for name in [name for name in tensors if name.startswith(names) and tensors[name].ndim == 2]:
            matrix = name.removesuffix(".weight")
            made = stored(library, matrix, tensors.pop(name))
            floats[matrix] = dequantised(library, matrix, made)
            tensors |= {key: value.contiguous() for key, value in made.items()}
        return tensors

    config = library.quantization_config.to_dict()
    rewrite(folder, change, quantization_config=config)
    return floats


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A checkpoint of floats; not to be changed."""
    return write_floats(tmp_path_factory.mktemp("floats"), **SIZES)


@pytest.fixture
def folder(floats, tmp_path):
    """A copy of `floats` to change."""
    return shutil.copytree(floats, tmp_path / "model")


def linears(model) -> list[Linear]:
    """Return the quantised layers of a model."""
    return [x for x in model.modules() if isinstance(x, Linear) and x.weight_scale is not None]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the median difference: now and then, a last bit decides which number an input becomes."""
    return (one.double() - other.double()).abs().median().item()


# ---- the rule


class ByTheRule(nn.Module):
    """A linear layer in float64, one block after the other: with a scale for each token and block of columns."""

    def __init__(self, library: Library, name: str, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.numbers = tensors[f"{name}.weight"].double()
        self.rows, self.columns = library.quantization_config.weight_block_size or self.numbers.shape
        self.scale = tensors[f"{name}.weight_scale_inv"].double().reshape(-(-len(self.numbers) // self.rows), -1)
        self.given = tensors.get(f"{name}.activation_scale")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(*x.shape[:-1], len(self.numbers))
        for k in range(self.scale.shape[1]):
            columns = slice(k * self.columns, (k + 1) * self.columns)
            part = x[..., columns]
            scale = part.abs().amax(-1, keepdim=True) / 448 if self.given is None else self.given.double()
            rounded = (part / scale.clamp(min=1e-12)).clamp(-448, 448).to(FP8).double()
            for n in range(self.scale.shape[0]):
                rows = slice(n * self.rows, (n + 1) * self.rows)
                y[..., rows] += rounded @ self.numbers[rows, columns].T * scale * self.scale[n, k]
        return y


def by_the_rule(floats, folder, **settings) -> LlamaForCausalLM:
    """Return transformers' model of `floats` in float64, with the quantised layers of `folder`."""
    library, tensors = Library(**settings), rewrite(folder)
    model = LlamaForCausalLM.from_pretrained(floats, dtype=torch.float64, attn_implementation="eager").eval()
    for name in [key.removesuffix(".weight_scale_inv") for key in tensors if key.endswith("scale_inv")]:
        model.set_submodule(name, ByTheRule(library, name, tensors))
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_read_and_computes_the_rule(name, floats, folder):
    expected = quantise(folder, **KINDS[name])
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    assert all(x.input_scale.shape[1] == ("static" in name) for x in linears(model))
    exact = logits(by_the_rule(floats, folder, **KINDS[name]), 48)
    for dtype in (torch.float32, torch.float64):  # in which the library still has norms in float32
        assert difference(logits(load(folder, dtype=dtype), 48), exact) < 1e-5


def shifted_columns(model) -> None:
    for module in linears(model):
        module.weight_scale.copy_(module.weight_scale.roll(1, 1))


def shifted_rows(model) -> None:
    for module in linears(model):
        module.weight_scale.copy_(module.weight_scale.roll(128, 0))


def plain_inputs(model) -> None:
    for module in linears(model):
        module.input_scale = None


def shifted_groups(monkeypatch) -> None:
    quantise = activations.quantise

    def run(x, weight):
        numbers, scale = quantise(x, weight)
        return numbers, scale.roll(1, -1)

    monkeypatch.setattr(activations, "quantise", run)


@pytest.mark.parametrize("change", [shifted_columns, shifted_rows, plain_inputs, shifted_groups])
@torch.no_grad()
def test_the_comparison_finds_a_fault(change, floats, folder, monkeypatch):
    quantise(folder, **KINDS["128 x 128"])
    exact, model = logits(by_the_rule(floats, folder, **KINDS["128 x 128"]), 48), load(folder, dtype=torch.float64)
    change(monkeypatch if change is shifted_groups else model)
    assert difference(logits(model, 48), exact) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", few([1, 16, 17], [3]))
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_products_are_as_near_to_the_rule_as_those_of_floats(gated, rows, dtype, floats, folder):
    """Of any number of rows, whichever kernel computes them: of inputs rounded once by the same rule."""
    quantise(folder, **KINDS["80 x 64"])
    model = load(folder, dtype=dtype)
    module, norm = model.layers[1].mlp.gate_up, model.layers[1].mlp.norm
    x = torch.randn(1, rows, 256, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight = module.matrix
    fuses = linear.can_fuse(x, weight, gated=gated)
    assert fuses == (rows <= 16 and cpu.load(dtype))
    found = linear.fused_linear(x, weight, None, gated=gated) if fuses else linear.matmul(x, weight, None)
    numbers, scale = activations.quantise(x.double(), weight)
    rounded = (numbers.double().unflatten(-1, (4, -1)) * scale[..., None]).flatten(-2)
    assert (scale.amax(-1) > scale.amin(-1)).all()
    exact = rounded @ weight.floats(torch.float64).T
    if gated and fuses:
        exact = nn.functional.silu(exact[..., :384]) * exact[..., 384:]
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 1.5 * unit + 3e-6 * exact.abs().max()
    wrong = (numbers.double().unflatten(-1, (4, -1)) * scale.roll(1, -1)[..., None]).flatten(-2)
    assert (wrong @ weight.floats(torch.float64).T).sub(rounded @ weight.floats(torch.float64).T).abs().max() > 4 * unit
    if fuses:
        with_norm = linear.fused_linear(x, weight, None, norm.weight, norm.eps, gated=gated)
        apart = linear.fused_linear(linear.rms_norm(x, norm.weight, norm.eps), weight, None, gated=gated)
        torch.testing.assert_close(with_norm, apart, rtol=0.02, atol=3e-2 * apart.abs().max().item())


@pytest.mark.parametrize("dtype", few([torch.float32], [torch.bfloat16, torch.float16]), ids=str)
@torch.no_grad()
def test_layers_in_one_kernel_compute_what_products_by_themselves_do(dtype, folder, monkeypatch):
    quantise(folder, **KINDS["128 x 128"])
    model = load(folder, dtype=dtype)
    if not cpu.load(dtype):
        pytest.skip("no kernels")
    ran, run = [], cpu.run_blocks

    def spy(*given):
        ran.append(result := run(*given))
        return result

    ids, found = torch.tensor([random_ids(3)]) % 48, []
    for each in (spy, lambda *given: None):
        monkeypatch.setattr(cpu, "run_blocks", each)
        found.append(model(ids, cache=model.new_cache(1, 8), backend="dense"))
    assert ran
    assert all(y is not None for y in ran)
    assert difference(*found) < (1e-5 if dtype == torch.float32 else 0.1)
    plain_inputs(model)
    monkeypatch.setattr(cpu, "run_blocks", run)
    assert difference(model(ids, cache=model.new_cache(1, 8), backend="dense"), found[0]) > 1e-3


@pytest.mark.parametrize("name", few(BLOCKS[:1], BLOCKS[1:]))
@torch.no_grad()
def test_however_tokens_are_computed_the_logits_are_the_same(name, folder):
    """At once, in chunks, one by one, ragged; and tokens in any company."""
    quantise(folder, **KINDS[name])
    ids = torch.tensor([random_ids(60), random_ids(60, 1)]) % 48
    model, exact = load(folder, dtype=torch.float32), load(folder, dtype=torch.float64)
    expected = exact(ids, backend="dense")
    cache, found = model.new_cache(2, 128), []
    for count in (40, 15, *[1] * 5):
        start = sum(x.shape[1] for x in found)
        found.append(model(ids[:, start : start + count], cache=cache, backend="dense"))
    assert difference(torch.cat(found, 1), expected) < 1e-5
    ragged = model(ids, lengths=torch.tensor([60, 7]))
    assert difference(ragged[1, :7], expected[1, :7]) < 1e-5
    prompts, options = [[x % 48 for x in random_ids(n)] for n in (50, 5)], {"max_new_tokens": 6, "stop_token_ids": ()}
    alone = [Engine(exact, backend="dense").generate([prompt], **options)[0].tokens for prompt in prompts]
    engine = Engine(exact, backend="dense", max_batch_size=2, max_slots=1024)
    requests = [engine.submit(prompt, **options) for prompt in prompts]
    engine.run()
    assert [request.completion.tokens for request in requests] == alone
    assert "of the weights in fp8, with inputs in fp8" in engine.explain()


@pytest.mark.exhaustive
@pytest.mark.parametrize("length", [5, 60])
@torch.no_grad()
def test_compiled_code_computes_the_same_logits(length, folder):
    quantise(folder, **KINDS["128 x 128"])
    ids = torch.tensor([random_ids(length), random_ids(length, 1)]) % 48
    model, expected = load(folder, dtype=torch.float32), load(folder, dtype=torch.float64)(ids, backend="dense")
    assert difference(compiled_forward(model)(ids), expected) < 1e-5


# ---- modules that keep floats, saving, what is refused


def test_modules_that_keep_floats(floats, folder):
    quantise(folder, ("model.layers.", "lm_head"), weight_block_size=(64, 64), modules_to_not_convert=[])
    assert load(folder, dtype=torch.float64).lm_head.matrix.is_fp8_in_groups
    exact = logits(by_the_rule(floats, folder, weight_block_size=(64, 64)), 48)
    assert difference(logits(load(folder, dtype=torch.float64), 48), exact) < 1e-5
    names = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkv"]
    kept = {"modules_to_not_convert": ["lm_head", "o_proj", *names]}
    rewrite(folder, lambda tensors: rewrite(floats))
    quantise(folder, ("model.layers.0.mlp", "model.layers.1.mlp"), **kept)
    assert load(folder).layers[0].attention.o.weight_scale is None
    rewrite(
        folder,
        quantization_config=Library(**kept | {"modules_to_not_convert": ["o_proj.*"]}).quantization_config.to_dict(),
    )
    refusal(folder, "modules_to_not_convert has 'o_proj.*', a pattern; name the modules")


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_saved_bit_by_bit_or_refused(name, folder, tmp_path):
    quantise(folder, **KINDS[name])
    model = load(folder)
    if name in BLOCKS:
        needle = r"^cannot save layers.0.attention.qkv, which is in groups of fp8, .* keep the folder that it was"
        with pytest.raises(ValueError, match=needle):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        return
    model.save_pretrained(tmp_path / "new")
    again = load(tmp_path / "new")
    assert same(tensors_of(again), tensors_of(model))
    assert torch.equal(logits(again, 48), logits(model, 48))


WHERE = "quantization_config: "


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"activation_scheme": "static"}, "activation_scheme='static' is not supported (with blocks only 'dynamic')"),
        ({"activation_scheme": "none"}, "activation_scheme='none' is not supported (only 'dynamic' or 'static')"),
        ({"activation_scheme": None}, "activation_scheme=None is not supported"),
        ({"weight_block_size": [128, 100]}, "blocks of 100 columns is not supported (only 32, 64, 128)"),
        ({"weight_block_size": [128, 256]}, "blocks of 256 columns is not supported (only 32, 64, 128)"),
        ({"weight_block_size": [0, 128]}, "weight_block_size must be two numbers or null, found [0, 128]"),
        ({"weight_block_size": [1.0, 128]}, "weight_block_size must be two numbers or null"),
        ({"weight_block_size": [128]}, "weight_block_size must be two numbers or null"),
        ({"weight_block_size": 128}, "weight_block_size must be two numbers or null"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0' is not supported (only None or 'float')"),
        ({"fmt": "e5m2"}, "fmt='e5m2' is not supported (only None or 'e4m3')"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported"),
        ({"dequantize": True}, "dequantize=True is not supported"),
        ({"modules_to_convert": ["embed_tokens"]}, "modules_to_convert=['embed_tokens'] is not supported"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of names"),
        ({"surprise": 1}, "surprise=1 is not known"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_by_name(changes, needle, folder):
    quantise(folder, **KINDS["128 x 128"])
    config = Library(**KINDS["128 x 128"]).quantization_config.to_dict() | changes
    rewrite(folder, quantization_config=config)
    message = refusal(folder, WHERE, needle)
    assert "give the checkpoint that they were made of" in message or "name the modules" in message


@pytest.mark.parametrize("key", ["activation_scheme", "weight_block_size"])
def test_settings_that_are_missing_are_refused(key, folder):
    config = Library().quantization_config.to_dict()
    del config[key]
    rewrite(folder, quantization_config=config)
    refusal(folder, f"{WHERE}{key} is missing")


def test_other_tensors_are_refused(folder):
    quantise(folder, **KINDS["128 x 128"])
    tensors = rewrite(folder)
    scale = f"{DOWN}.weight_scale_inv"
    for name, tensor, needle in (
        (scale, tensors[scale][:1], f"shape: {scale} is [1, 3], config.json says [2, 3]"),
        (scale, tensors[scale].to(torch.float8_e8m0fnu), f"stored as F8_E8M0: {scale}"),
        (f"{DOWN}.weight", tensors[f"{DOWN}.weight"].float(), f"stored as F32: {DOWN}.weight (not F8_E4M3)"),
        (f"{DOWN}.activation_scale", torch.ones(()), f"unexpected: {DOWN}.activation_scale"),
    ):
        rewrite(folder, lambda _, name=name, tensor=tensor: tensors | {name: tensor})
        refusal(folder, needle)
    damaged = tensors[f"{DOWN}.weight"].clone()
    damaged.view(torch.uint8)[3, 5] = 0x7F
    rewrite(folder, lambda _: tensors | {f"{DOWN}.weight": damaged})
    with pytest.raises(CheckpointError, match=rf"{re.escape(DOWN)}.weight holds NaN; fetch the file again"):
        load(folder)
    rewrite(folder, lambda _: tensors | {scale: torch.full_like(tensors[scale], torch.inf)})
    with pytest.warns(UserWarning, match=re.escape(f"NaN or infinity: {DOWN}.weight")):
        load(folder)
    for size, needle in (
        (400, "groups of 128 do not divide the 400 columns of model.layers.0.mlp.down_proj"),
        (128, "weight_block_size: model.layers.0.mlp.down_proj has one block of 128 columns, not several"),
    ):
        rewrite(folder, edited(lambda found: found.update(tensors)), intermediate_size=size)
        refusal(folder, needle)


def test_blocks_of_more_rows_than_a_matrix_has_take_no_memory(folder):
    quantise(folder, weight_block_size=(1024, 64))
    expected = logits(load(folder), 20)
    config = Library(weight_block_size=(10**30, 64)).quantization_config.to_dict()
    rewrite(folder, quantization_config=config)
    assert logits(load(folder), 20).equal(expected)


def test_gradients_and_floats(folder):
    """Rounding has no gradients; without it they go through the products. Floats are not quantised so on request."""
    quantise(folder, **KINDS["128 x 128"])
    model = load(folder)
    x = torch.randn(1, 2, 256, requires_grad=True)
    with pytest.raises(ValueError, match="inputs in 8 bits have no gradients; set input_scale to None"):
        model.layers[0].mlp.gate_up(x)
    plain_inputs(model)
    model.layers[0].mlp.gate_up(x).sum().backward()
    assert torch.equal(x.grad[0, 0], x.grad[0, 1])
    with pytest.raises(ValueError, match="only checkpoints have 'fp8' in groups; use 'fp8-dynamic'"):
        load(folder, quantize=Quantization("fp8", 128, inputs="dynamic"))
    with pytest.raises(ValueError, match="'fp8' has a scale for each row, not for groups of 128"):
        Quantization("fp8", 128)


@pytest.mark.exhaustive
@pytest.mark.weights
@torch.no_grad()
def test_products_of_real_weights(demo_folder, tmp_path):
    """Each by itself: through 30 layers, the last bit of a norm in float32, as the library has it, changes ever more
    of the numbers that inputs are rounded to."""
    folder, settings = shutil.copytree(demo_folder, tmp_path / "model"), {"weight_block_size": (64, 64)}
    floats = quantise(folder, **settings)
    model, tensors, library = load(folder, dtype=torch.float64), rewrite(folder), Library(**settings)
    assert same({name: x.float() for name, x in floats_of(model).items()}, floats)
    for path, names in model.config.architecture.modules(30, True):
        if isinstance(module := model.get_submodule(path), Linear) and path.startswith(("layers.0.", "layers.29.")):
            x = torch.randn(1, 3, module.in_features, dtype=torch.float64)
            x *= torch.linspace(0.1, 3, module.in_features)
            for name, found in zip(names, module(x).split(module.parts, -1), strict=True):
                expected = ByTheRule(library, name, tensors)(x)
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
                assert difference(x @ floats[name].T.double(), expected) > 1e-4
