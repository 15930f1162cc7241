"""Checkpoints of bitsandbytes in NF4: each value is the one that the library computes, and other files are refused."""

import copy
import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_helpers import edited, load, load_quietly, refusal, rewrite, shard
from compressed_helpers import dequantised, floats_of, quantise, same, write_floats
from helpers import random_ids

from llama_flex import Engine
from llama_flex.kernels.weight import NF4

BNB = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
}
# The bits of the library's values, float32, from the least.
BITS = (
    *(0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000),
    *(0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000),
)
VALUES = np.array(BITS, np.uint32).view(np.float32)
DOWN = "model.layers.1.mlp.down_proj.weight"
STATE = DOWN + ".quant_state.bitsandbytes__nf4"


class Case(NamedTuple):
    """How matrices are stored: whether scales are quantised, too, and the numbers that share one."""

    nested: bool = True
    blocks: int = 64

    @property
    def config(self):
        """The object for config.json."""
        return BNB | {"bnb_4bit_use_double_quant": self.nested}

    def store(self, name, shape, seed):
        """Return the tensors of a random matrix, by their names in the file, and its floats."""
        (rows, columns), draw = shape, np.random.default_rng(seed)
        numbers = draw.integers(0, 16, rows * columns).astype(np.uint8)
        count = -(-len(numbers) // self.blocks)
        state = {"quant_type": "nf4", "blocksize": self.blocks, "dtype": "bfloat16", "shape": shape}
        weight, stored = f"{name}.weight", {}
        if self.nested:
            steps = draw.normal(size=-(-count // 256)).astype(np.float32)
            codes = np.sort(draw.uniform(-1, 1, 256)).astype(np.float32)
            held, offset = draw.integers(0, 256, count).astype(np.uint8), np.float32(draw.normal())
            scales = codes[held] * np.repeat(steps, 256)[:count] + offset
            stored[f"{weight}.nested_absmax"], stored[f"{weight}.nested_quant_map"] = steps, codes
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        else:
            held = scales = draw.uniform(0.1, 1, count).astype(np.float32)
        stored |= {
            weight: (numbers[::2] << 4 | numbers[1::2])[:, None],
            f"{weight}.absmax": held,
            f"{weight}.quant_map": VALUES,
            f"{weight}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
        }
        floats = VALUES[numbers] * np.repeat(scales, self.blocks)[: len(numbers)]
        return {key: torch.tensor(value) for key, value in stored.items()}, torch.tensor(floats).view(shape)


CASES = {
    "nested scales": Case(),
    "scales": Case(nested=False),
    "blocks of 128": Case(blocks=128),
    "blocks longer than a row, the last cut": Case(blocks=4096),
}


@pytest.fixture
def folder(floats, tmp_path):
    """A copy of `floats` to change."""
    return shutil.copytree(floats, tmp_path / "model")


@pytest.fixture
def model(folder):
    quantise(folder, Case().config, Case().store)
    return load_quietly(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_value_is_the_one_that_was_stored(case, dtype, folder, tmp_path):
    expected = quantise(folder, case.config, case.store)
    shard(folder, 5)
    model = load_quietly(folder, dtype=dtype)
    found = {name: value.to(dtype) for name, value in floats_of(model).items()}
    assert same(found, {name: value.to(dtype) for name, value in expected.items()})
    assert model.layers[0].mlp.down.weight.dtype == torch.uint8
    assert (model.dtype, model.layers[0].mlp.down.weight_scale.dtype) == (dtype, torch.float32)
    with pytest.raises(ValueError, match=r"cannot save layers.0.attention.qkv, which is in NF4, as compressed-tensors"):
        model.save_pretrained(tmp_path / "again")


def test_the_table_is_that_of_the_library():
    assert torch.equal(torch.tensor(NF4), torch.tensor(VALUES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_what_the_library_quantises_becomes_what_it_dequantises(dtype, nested, folder):
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")

    def store(name, shape, seed):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        numbers, state = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
        tensors = {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return tensors | {f"{name}.weight": numbers}, bitsandbytes.dequantize_4bit(numbers, state)

    expected = quantise(folder, Case(nested).config, store)
    found = floats_of(load_quietly(folder, dtype=dtype))
    assert same({name: value.to(dtype) for name, value in found.items()}, expected)


def changed(suffix, change):
    """Return a change of the tensors whose names end in a suffix."""
    return lambda tensors: {key: change(t) if key.endswith(suffix) else t for key, t in tensors.items()}


def offset_by(more):
    """Return a change of the bytes of a JSON object: more is added to the offset in it."""

    def change(state):
        found = json.loads(bytes(state.tolist()))
        found["nested_offset"] += more
        return torch.tensor([*json.dumps(found).encode()], dtype=torch.uint8)

    return change


MUTATIONS = {
    "numbers swapped": changed("proj.weight", lambda t: t >> 4 | t << 4),
    "a neighbour's numbers": changed("proj.weight", lambda t: t.roll(1, 0)),
    "numbers off by one": changed("proj.weight", lambda t: t ^ 1),
    "scales of neighbours": changed("weight.absmax", lambda t: t.roll(1, 0)),
    "scales of other values": changed("nested_quant_map", lambda t: t.roll(1, 0)),
    "scales without their steps": changed("nested_absmax", torch.ones_like),
    "scales without their offset": changed("__nf4", offset_by(0.5)),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_the_comparison_finds_values_that_are_not_in_their_places(mutation, folder):
    expected = quantise(folder, Case().config, Case().store)
    rewrite(folder, mutation)
    found = floats_of(load(folder))
    assert not any(torch.equal(found[name], floats) for name, floats in expected.items())


def test_the_comparison_finds_values_of_the_table_swapped(folder, monkeypatch):
    expected = quantise(folder, Case().config, Case().store)
    model = load(folder)
    swapped = torch.tensor((*NF4[:3], NF4[4], NF4[3], *NF4[5:]))
    monkeypatch.setattr("llama_flex.kernels.weight.nf4_on", lambda device: swapped)
    found = floats_of(model)
    assert not any(torch.equal(found[name], floats) for name, floats in expected.items())


def stepwise(model, ids):
    """Return logits computed with a cache: of many tokens, then of a few, then of one at a time."""
    cache = model.new_cache(1, 64)
    return torch.cat([model(part, cache=cache, backend="dense") for part in ids.split([30, 3, 1, 1], 1)], 1)


@torch.no_grad()
def test_a_model_computes_what_its_floats_do(model):
    plain, ids = dequantised(model), torch.tensor([random_ids(35)]) % 48
    exact = plain.double()(ids, backend="dense")
    scale = model.layers[1].mlp.down.weight_scale
    for logits in (model(ids, backend="dense"), stepwise(model, ids)):
        torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-4)
    scale.copy_(scale.roll(1, 1))
    for logits in (model(ids, backend="dense"), stepwise(model, ids)):
        assert (logits - exact).abs().max() > 1e-2


def test_steps_give_the_tokens_of_the_floats_compiled_or_not(model):
    prompts, options = [[*range(3, 43)], [7, 8]], {"max_new_tokens": 8, "stop_token_ids": ()}
    expected = [c.tokens for c in Engine(dequantised(model), backend="dense").generate(prompts, **options)]
    for compile in (False, True, "auto"):
        engine = Engine(model, compile=compile, **{} if compile else {"backend": "dense"})
        assert [c.tokens for c in engine.generate(prompts, **options)] == expected
    assert "of the weights in nf4" in engine.explain()


@pytest.mark.parametrize(
    ("skipped", "keep"),
    [
        (["lm_head", "model.layers.1.mlp"], lambda name: ".1.mlp." in name),
        (["lm_head", "down_proj"], lambda name: "down_proj" in name),
        (["lm_head", "model.layers.0", "self_attn"], lambda name: ".0." in name),
        (["lm_head", "model.layers.1.mlp.down"], lambda name: False),
    ],
)
def test_modules_that_are_skipped_keep_floats(skipped, keep, folder):
    expected = quantise(folder, BNB | {"llm_int8_skip_modules": skipped}, Case().store, keep)
    assert same(floats_of(load_quietly(folder)), expected)


@torch.no_grad()
def test_an_output_matrix_may_be_quantised_too(folder):
    expected, floats = quantise(folder, BNB | {"llm_int8_skip_modules": []}, Case().store), []

    def change(tensors):
        stored, values = Case().store("lm_head", list(tensors.pop("lm_head.weight").shape), 7)
        floats.append(values)
        return tensors | stored

    rewrite(folder, change)
    model, ids = load_quietly(folder, dtype=torch.bfloat16), torch.tensor([random_ids(40)]) % 48
    head = model.lm_head.matrix
    assert (head.numbers.dtype, model.embed.weight.dtype, model.dtype) == (torch.uint8, torch.bfloat16, torch.bfloat16)
    assert torch.equal(head.floats(), floats[0])
    assert same(floats_of(model), expected)
    plain = dequantised(model)
    exact = copy.deepcopy(plain).double()(ids, backend="dense")
    allowed = 1.5 * (plain(ids, backend="dense") - exact).abs().mean()
    assert (model(ids, backend="dense") - exact).abs().mean() <= allowed
    model.lm_head.weight_scale.copy_(head.scale.roll(1, 0))
    assert (model(ids, backend="dense") - exact).abs().mean() > allowed


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda t: t.pop(DOWN + ".absmax"), f"missing: {DOWN}.absmax"),
        (lambda t: t.pop(DOWN + ".nested_absmax"), f"missing: {DOWN}.nested_absmax"),
        (lambda t: t.update({DOWN + ".absmax": torch.ones(384)}), f"stored as F32: {DOWN}.absmax (not U8)"),
        (lambda t: t.update({DOWN: torch.zeros(128, 192)}), f"stored as F32: {DOWN} (not U8)"),
        (lambda t: t.update({DOWN: t[DOWN][:-1]}), f"shape: {DOWN} is [12287, 1], config.json says [12288, 1]"),
        (lambda t: t.update({DOWN + ".absmax": t[DOWN + ".absmax"][None]}), f"shape: {DOWN}.absmax is [1, 384]"),
        (lambda t: t[DOWN + ".quant_map"].neg_(), f"{DOWN}.quant_map has other values than NF4"),
        (
            lambda t: t.update({DOWN + ".absmax": t[DOWN + ".absmax"][:-2]}),
            f"{DOWN}.absmax has 382 scales, which do not",
        ),
        (
            lambda t: t.update({DOWN + ".nested_absmax": torch.ones(3)}),
            f"{DOWN}.absmax does not fit 3 nested scales of 256 values",
        ),
        (lambda t: t.update({STATE: t[STATE][:-1]}), f"{STATE} holds no JSON object"),
        (lambda t: t.update({STATE: torch.full((9000,), 91, dtype=torch.uint8)}), f"{STATE} holds no JSON object"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, needle, folder):
    quantise(folder, Case().config, Case().store)

    rewrite(folder, edited(change))
    refusal(folder, needle, str(folder))


@pytest.mark.parametrize(
    ("state", "needle"),
    [
        ({"blocksize": 32}, "says: blocksize=32 is not supported (only 64 or 128 or"),
        ({"quant_type": "fp4"}, "says: quant_type='fp4' is not supported (only 'nf4')"),
        ({"shape": [192, 128]}, "says: shape=[192, 128], not [128, 192], the shape by config.json"),
        ({"nested_offset": float("nan")}, "says: nested_blocksize=256, nested_offset=nan"),
        ({"nested_offset": None}, "says: nested_blocksize=256, nested_offset=None"),
        ({"nested_blocksize": 2**60}, "says: nested_blocksize=1152921504606846976 is not supported"),
        ({"surprise": 1}, "says: surprise=1 is not known"),
    ],
)
def test_what_is_said_beside_a_matrix_must_be_supported(state, needle, folder):
    quantise(folder, Case().config, Case().store)

    def change(tensors):
        found = json.loads(bytes(tensors[STATE].tolist())) | state
        return tensors | {STATE: torch.tensor([*json.dumps(found).encode()], dtype=torch.uint8)}

    rewrite(folder, change)
    refusal(folder, needle, f"{folder}: {DOWN}")


@pytest.mark.parametrize(
    ("config", "needle"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit=False is not supported (only True)"),
        ({"load_in_8bit": True}, "load_in_8bit=True is not supported (only False)"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4' is not supported (only 'nf4')"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage='bfloat16' is not supported (only 'uint8')"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules must be a list of names, found 'lm_head'"),
        ({"llm_int8_skip_modules": ["lm_head", "mlp.*"]}, "llm_int8_skip_modules has 'mlp.*', a pattern; name the"),
        (
            {"llm_int8_skip_modules": ["lm_head", "q_proj"]},
            "self_attn.q_proj keeps floats, but model.layers.0.self_attn.k",
        ),
        ({"surprise": 1}, "surprise=1 is not known"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, needle, folder):
    rewrite(folder, quantization_config=BNB | config)
    refusal(folder, needle, str(folder / "config.json"))


def test_a_config_that_leaves_out_the_type_is_refused(folder):
    rewrite(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refusal(folder, "quantization_config: bnb_4bit_quant_type is missing")


def test_blocks_that_rows_cut_are_refused(tmp_path):
    folder = write_floats(tmp_path, intermediate_size=160)
    rewrite(folder, quantization_config=BNB)
    refusal(folder, "groups of 64 do not divide the 160 columns of model.layers.0.mlp.down_proj")
