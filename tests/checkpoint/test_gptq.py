"""Checkpoints of GPTQ and AWQ: each number is the one that was stored, and other files are refused by name."""

import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_helpers import assert_same_tensors, load, load_quietly, refusal, rewrite, tensors_of
from compressed_helpers import floats_of, pack, quantise, same, write_floats

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
DOWN = "model.layers.1.mlp.down_proj"


class Case(NamedTuple):
    """A config, and how matrices are stored by it: below which zero points are stored, and the smallest of them."""

    config: dict
    minus: int = 0
    least: int = 0

    def store(self, name, shape, seed):
        """Return the tensors of a random matrix, by their names in the file, and its floats."""
        (rows, columns), draw = shape, np.random.default_rng(seed)
        size = columns if self.config["group_size"] == -1 else self.config["group_size"]
        numbers = draw.integers(0, 16, shape)
        zero = draw.integers(self.least, 16, (rows, columns // size))
        if self.config.get("sym"):
            zero[:] = 8
        scale = torch.tensor(draw.normal(size=zero.shape) * 0.03, dtype=torch.float32)
        stored = {f"{name}.scales": scale.T}
        if self.config["quant_method"] == "gptq":
            stored[f"{name}.qweight"] = pack(numbers, 4).T
            stored[f"{name}.qzeros"] = pack((zero - self.minus).T, 4)
            stored[f"{name}.g_idx"] = torch.arange(columns, dtype=torch.int32) // size
        else:
            stored[f"{name}.qweight"] = pack(interleaved(numbers.T), 4)
            stored[f"{name}.qzeros"] = pack(interleaved(zero.T), 4)
        steps = torch.tensor(numbers - np.repeat(zero, size, 1), dtype=torch.float32)
        return stored, steps * scale.repeat_interleave(size, 1)


def interleaved(numbers: np.ndarray) -> np.ndarray:
    """Return numbers `[X, N]` with each eight in the order that AWQ packs them."""
    return numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(numbers), -1)


CASES = {
    "gptq": Case(GPTQ, minus=1, least=1),
    "gptq, symmetric": Case(GPTQ | {"sym": True, "group_size": 64}, minus=1),
    "gptq, rows": Case(GPTQ | {"group_size": -1}, minus=1, least=1),
    "gptq, act-order of whole groups": Case(GPTQ | {"desc_act": True, "static_groups": True}, minus=1, least=1),
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
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
@pytest.mark.parametrize("name", ["gptq, v2", "awq"])
def test_the_comparison_finds_numbers_that_are_not_in_their_places(name, mutation, folder):
    expected = quantise(folder, CASES[name].config, CASES[name].store)
    rewrite(folder, mutation)
    assert not any(torch.equal(floats_of(load(folder))[name], floats) for name, floats in expected.items())


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
        (
            "gptq",
            lambda t: t[DOWN + ".g_idx"].copy_(t[DOWN + ".g_idx"].flip(0)),
            f"{DOWN}.g_idx reorders columns (desc_",
        ),
        ("gptq", lambda t: t.pop(DOWN + ".g_idx"), f"missing: {DOWN}.g_idx"),
        ("gptq", lambda t: t.update({DOWN + ".bias": torch.zeros(128)}), f"unexpected: {DOWN}.bias"),
        ("gptq", lambda t: t[DOWN + ".qzeros"].fill_(-1), f'{DOWN}.qzeros has a zero point of 15 in format "gptq"'),
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

    def apply(tensors):
        change(tensors)
        return tensors

    rewrite(folder, apply)
    refusal(folder, needle, str(folder))


@pytest.mark.parametrize(
    ("config", "needle"),
    [
        (GPTQ | {"bits": 8}, "bits=8 is not supported (only 4)"),
        (GPTQ | {"bits": 3}, "bits=3 is not supported (only 4)"),
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
