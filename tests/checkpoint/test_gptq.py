"""Checkpoints of GPTQ and AWQ: each number is the one that was stored, and other files are refused by name."""

import itertools
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_helpers import assert_same_tensors, edited, load, load_quietly, refusal, rewrite, tensors_of
from compressed_helpers import dequantised, floats_of, pack, quantise, same, shuffled, write_floats
from helpers import random_ids

from llama_flex import Engine
from llama_flex.layers import Linear

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
EIGHT = GPTQ | {"bits": 8}
DOWN = "model.layers.1.mlp.down_proj"


class Case(NamedTuple):
    """A config, and how matrices are stored by it.

    minus: what is taken from zero points. least: the smallest of them. reordered: the groups of columns are shuffled.
    """

    config: dict
    minus: int = 0
    least: int = 0
    reordered: bool = False

    def store(self, name, shape, seed):
        """Return the tensors of a random matrix, by their names in the file, and its floats."""
        (rows, columns), draw = shape, np.random.default_rng(seed)
        size = columns if self.config["group_size"] == -1 else self.config["group_size"]
        bits = self.config.get("bits", 4)
        numbers = draw.integers(0, 1 << bits, shape)
        zero = draw.integers(self.least, 1 << bits, (rows, columns // size))
        if self.config.get("sym"):
            zero[:] = 1 << (bits - 1)
        scale = torch.tensor(draw.normal(size=zero.shape) * 0.03, dtype=torch.float32)
        of_column = np.arange(columns) // size
        if self.reordered:
            of_column = shuffled(of_column)
        stored = {f"{name}.scales": scale.T}
        if self.config["quant_method"] == "gptq":
            stored[f"{name}.qweight"] = pack(numbers, bits).T
            stored[f"{name}.qzeros"] = pack((zero - self.minus).T, bits)
            stored[f"{name}.g_idx"] = torch.tensor(of_column, dtype=torch.int32)
        else:
            stored[f"{name}.qweight"] = pack(interleaved(numbers.T), 4)
            stored[f"{name}.qzeros"] = pack(interleaved(zero.T), 4)
        steps = torch.tensor(numbers - zero[:, of_column], dtype=torch.float32)
        return stored, steps * scale[:, of_column]


def interleaved(numbers: np.ndarray) -> np.ndarray:
    """Return numbers `[X, N]` with each eight in the order that AWQ packs them."""
    return numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(numbers), -1)


CASES = {
    "gptq": Case(GPTQ, minus=1, least=1),
    "gptq, symmetric": Case(GPTQ | {"sym": True, "group_size": 64}, minus=1),
    "gptq, rows": Case(GPTQ | {"group_size": -1}, minus=1, least=1),
    "gptq, act-order of whole groups": Case(GPTQ | {"desc_act": True, "static_groups": True}, minus=1, least=1),
    "gptq, act-order": Case(GPTQ | {"desc_act": True, "format": "gptq_v2"}, reordered=True),
    "gptq, act-order, symmetric": Case(GPTQ | {"desc_act": True, "sym": True, "group_size": 64}, 1, reordered=True),
    "gptq, 8 bits": Case(EIGHT, minus=1, least=1),
    "gptq, 8 bits, v2": Case(EIGHT | {"format": "gptq_v2", "group_size": 64}),
    "gptq, 8 bits, symmetric": Case(EIGHT | {"sym": True}, minus=1),
    "gptq, 8 bits, rows": Case(EIGHT | {"group_size": -1}, minus=1, least=1),
    "gptq, 8 bits, rows, symmetric": Case(EIGHT | {"group_size": -1, "sym": True}, minus=1),
    "gptq, 8 bits, act-order": Case(EIGHT | {"desc_act": True, "format": "gptq_v2"}, reordered=True),
    "gptq, v1 by name": Case(GPTQ | {"checkpoint_format": "gptq"}, minus=1, least=1),
    "gptq, v2": Case(GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq, v2 symmetric": Case(GPTQ | {"format": "gptq_v2", "sym": True}),
    "awq": Case(AWQ),
    "awq, groups of 64": Case(AWQ | {"group_size": 64, "modules_to_not_convert": None}),
}


@pytest.fixture
def folder(floats, tmp_path):
    """A copy of `floats` to change."""
    return shutil.copytree(floats, tmp_path / "model")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_number_is_the_one_that_was_stored(case, folder, tmp_path):
    expected = quantise(folder, case.config, case.store)
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    assert (model.layers[0].mlp.down.weight_zero_point is None) == bool(case.config.get("sym"))
    assert model.layers[0].mlp.down.weight.dtype == (torch.int8 if case.config["bits"] == 8 else torch.int32)
    if case.reordered:
        with pytest.raises(ValueError, match=r"cannot save layers.0.attention.qkv, whose columns are reordered"):
            model.save_pretrained(tmp_path / "again")
        assert not (tmp_path / "again").exists()
        return
    model.save_pretrained(tmp_path / "again")  # as compressed-tensors
    again = load_quietly(tmp_path / "again")
    assert_same_tensors(tensors_of(again), tensors_of(model))


def swapped(words):
    """Return words with their lowest two numbers of 4 bits swapped."""
    return (words & ~255) | (words & 15) << 4 | (words >> 4 & 15)


def changed(suffix, change):
    """Return a change of the tensors whose names end in a suffix."""
    return lambda tensors: {key: change(t) if key.endswith(suffix) else t for key, t in tensors.items()}


MUTATIONS = {
    "numbers swapped": changed("qweight", swapped),
    "words swapped": changed("qweight", lambda t: t.roll(1, 0)),
    "a neighbour's numbers": changed("qweight", lambda t: t.roll(1, 1)),
    "a neighbour's scales": changed("scales", lambda t: t.roll(1, 1)),
    "scales shifted by a group": changed("scales", lambda t: t.roll(1, 0)),
    "zero points off by one": changed("qzeros", lambda t: t ^ 0x11111111),
    "a neighbour's zero points": changed("qzeros", swapped),
    "zero points shifted by a group": changed("qzeros", lambda t: t.roll(1, 0)),
    "the order of columns ignored": changed("g_idx", lambda t: t.sort()[0]),
    "the groups of neighbours": changed("g_idx", lambda t: t.roll(1, 0)),
}


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        *itertools.product(("gptq, v2", "awq"), list(MUTATIONS)[:-2]),
        *itertools.product(("gptq, act-order", "gptq, 8 bits, act-order"), MUTATIONS),
    ],
)
def test_the_comparison_finds_numbers_that_are_not_in_their_places(name, mutation, folder):
    expected = quantise(folder, CASES[name].config, CASES[name].store)
    rewrite(folder, MUTATIONS[mutation])
    assert not any(torch.equal(floats_of(load(folder))[name], floats) for name, floats in expected.items())


@pytest.fixture
def reordered(folder):
    """A model of a checkpoint with its columns in another order."""
    quantise(folder, CASES["gptq, act-order"].config, CASES["gptq, act-order"].store)
    return load_quietly(folder)


def stepwise(model, ids):
    """Return logits computed with a cache: of many tokens, then of a few, then of one at a time."""
    cache, found = model.new_cache(1, 64), []
    for part in ids.split([30, 3, 1, 1], 1):
        found.append(model(part, cache=cache, backend="dense"))
    return torch.cat(found, 1)


@torch.no_grad()
def test_a_model_with_columns_in_another_order_computes_what_its_floats_do(reordered):
    plain, ids = dequantised(reordered), torch.tensor([random_ids(35)]) % 48
    exact = plain.double()(ids, backend="dense")
    assert all(x.weight_order is not None for x in linears(reordered))
    for logits in (reordered(ids, backend="dense"), stepwise(reordered, ids)):
        torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-4)
    seen = []
    for module in linears(reordered):
        module.register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(stepwise(reordered, ids).double(), exact, rtol=1e-4, atol=1e-4)
    assert len(seen) == 4 * len(linears(reordered))


@torch.no_grad()
def test_the_comparison_of_logits_finds_columns_in_another_order(reordered):
    plain, ids = dequantised(reordered), torch.tensor([random_ids(35)]) % 48
    module = reordered.layers[1].mlp.down
    for order in (None, module.weight_order.roll(1), module.weight_order.argsort()):
        module.weight_order = None if order is None else torch.nn.Parameter(order, requires_grad=False)
        for logits in (reordered(ids, backend="dense"), stepwise(reordered, ids)):
            assert (logits - plain(ids, backend="dense")).abs().max() > 1e-3


def test_steps_give_the_same_tokens_with_columns_in_another_order_compiled_or_not(reordered):
    prompts, options = [[*range(3, 43)], [7, 8]], {"max_new_tokens": 8, "stop_token_ids": ()}
    expected = [c.tokens for c in Engine(dequantised(reordered), backend="dense").generate(prompts, **options)]
    for compile in (False, True, "auto"):
        engine = Engine(reordered, compile=compile, **{} if compile else {"backend": "dense"})
        assert [c.tokens for c in engine.generate(prompts, **options)] == expected
    assert "of the weights in int4" in engine.explain()


def linears(model):
    return [x for x in model.modules() if isinstance(x, Linear) and x.weight_scale is not None]


def test_the_two_conventions_of_zero_points_differ_by_one(folder):
    case = CASES["gptq"]
    expected = quantise(folder, case.config, case.store)
    rewrite(folder, quantization_config=case.config | {"checkpoint_format": "gptq_v2"})
    found = floats_of(load(folder))
    assert not any(torch.equal(found[name], floats) for name, floats in expected.items())


def test_modules_that_awq_does_not_convert_keep_floats(folder):
    case = Case(AWQ | {"modules_to_not_convert": ["down_proj", "layers.0.self_attn", "absent"]})
    keep = lambda name: "down_proj" in name or "layers.0.self_attn" in name  # noqa: E731
    expected = quantise(folder, case.config, case.store, keep)
    assert same(floats_of(load_quietly(folder)), expected)
    rewrite(folder, quantization_config=AWQ | {"modules_to_not_convert": ["q_proj"]})
    refusal(folder, "model.layers.0.self_attn.q_proj keeps floats, but model.layers.0.self_attn.k_proj does not")


@pytest.mark.parametrize(
    ("name", "change", "needle"),
    [
        ("gptq", lambda t: t[DOWN + ".g_idx"][:32].fill_(1), f"{DOWN}.g_idx does not give each group 32 columns"),
        ("gptq", lambda t: t[DOWN + ".g_idx"].add_(1), f"{DOWN}.g_idx does not give each group 32 columns"),
        (
            "gptq, act-order",
            lambda t: t["model.layers.0.self_attn.v_proj.g_idx"].copy_(t[DOWN + ".g_idx"].sort()[0][:128]),
            "model.layers.0.self_attn.v_proj has its columns in another order than model.layers.0.self_attn.q_proj (g_",
        ),
        ("gptq", lambda t: t.pop(DOWN + ".g_idx"), f"missing: {DOWN}.g_idx"),
        ("gptq", lambda t: t.update({DOWN + ".bias": torch.zeros(128)}), f"unexpected: {DOWN}.bias"),
        ("gptq", lambda t: t[DOWN + ".qzeros"].fill_(-1), f'{DOWN}.qzeros has a zero point of 15 in format "gptq"'),
        (
            "gptq, 8 bits",
            lambda t: t[DOWN + ".qzeros"].fill_(-1),
            f'{DOWN}.qzeros has a zero point of 255 in format "gptq"',
        ),
        (
            "gptq, 8 bits, symmetric",
            lambda t: t[DOWN + ".qzeros"][0].fill_(0),
            f"{DOWN}.qzeros has zero points other than 128, but config.json says sym",
        ),
        (
            "gptq, symmetric",
            lambda t: t[DOWN + ".qzeros"][0].fill_(0),
            f"{DOWN}.qzeros has zero points other than 8, but config.json says sym",
        ),
        ("gptq", lambda t: t.update({DOWN + ".qweight": torch.zeros(24, 128)}), f"as F32: {DOWN}.qweight (not I32)"),
        ("awq", lambda t: t.pop(DOWN + ".scales"), f"missing: {DOWN}.scales"),
        (
            "awq",
            lambda t: t.update({DOWN + ".qweight": torch.zeros(24, 128, dtype=torch.int32)}),
            f"shape: {DOWN}.qweight is [24, 128], config.json says [192, 16]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, needle, folder):
    quantise(folder, CASES[name].config, CASES[name].store)

    rewrite(folder, edited(change))
    refusal(folder, needle, str(folder))


@pytest.mark.parametrize(
    ("config", "needle"),
    [
        (GPTQ | {"bits": 3}, "bits=3 is not supported (only 4 or 8)"),
        (GPTQ | {"bits": True}, "bits=True is not supported"),
        (GPTQ | {"group_size": 16}, "group_size=16 is not supported (only 32, 64, 128)"),
        (
            GPTQ | {"checkpoint_format": "marlin"},
            "checkpoint_format='marlin' is not supported (only 'gptq' or 'gptq_v2'",
        ),
        (GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"}, "format and checkpoint_format differ"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format=True is not supported"),
        (GPTQ | {"lm_head": True}, "lm_head=True is not supported"),
        (GPTQ | {"dynamic": {"-:.*down": {}}}, "dynamic={'-:.*down': {}} is not supported"),
        (GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj"]]}, "modules_in_block_to_quantize=[['mlp.up_proj']]"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype='int16' is not supported"),
        (GPTQ | {"surprise": 1}, "surprise=1 is not known"),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config: group_size is missing"),
        (AWQ | {"bits": 8}, "bits=8 is not supported (only 4)"),
        (AWQ | {"version": "gemv"}, "version='gemv' is not supported (only 'gemm' or 'GEMM')"),
        (AWQ | {"zero_point": False}, "zero_point=False is not supported (only True)"),
        (AWQ | {"group_size": -1}, "group_size=-1 is not supported (only 32, 64, 128)"),
        (
            AWQ | {"modules_to_not_convert": "lm_head"},
            "modules_to_not_convert must be a list of names, found 'lm_head'",
        ),
        (AWQ | {"surprise": 1}, "surprise=1 is not known"),
        ({"quant_method": "awq", "bits": 4}, "quantization_config: group_size is missing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, needle, folder):
    rewrite(folder, quantization_config=config)
    refusal(folder, needle, str(folder / "config.json"), "; give the checkpoint that they were made of")


def test_groups_and_rows_that_cannot_be_packed_are_refused(tmp_path):
    folder = write_floats(tmp_path, intermediate_size=160)
    for config in (GPTQ, AWQ):
        rewrite(folder, quantization_config=config | {"group_size": 64})
        refusal(folder, "groups of 64 do not divide the 160 columns of model.layers.0.mlp.down_proj")
    folder = write_floats(tmp_path / "odd", head_dim=4, num_key_value_heads=1)
    rewrite(folder, quantization_config=GPTQ)
    refusal(folder, "has 4 rows, not a multiple of 8, which cannot be packed")
