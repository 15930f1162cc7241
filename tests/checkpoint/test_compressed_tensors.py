"""Checkpoints of compressed-tensors: each number is the one that was stored, and other files are refused by name."""

import copy
import json
import shutil
import warnings

import pytest
import torch
import transformers
from checkpoint_helpers import (
    assert_same_tensors,
    edited,
    load,
    load_quietly,
    logits,
    refusal,
    rewrite,
    shard,
    tensors_of,
)
from compressed_helpers import Kind, configured, floats_of, quantise, same, write_floats
from compressed_helpers import pack as pack_lowest_first
from helpers import few
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama_flex.checkpoint import saving
from llama_flex.checkpoint.compressed_tensors import as_written, compress, scheme
from llama_flex.checkpoint.config_rules import ConfigError
from llama_flex.checkpoint.quantization import Quantization
from llama_flex.checkpoint.shards import CheckpointError
from llama_flex.checkpoint.stored import interleaved, lowest_first, nibbles, words_of
from llama_flex.kernels.weight import PARTS, pack

KINDS = {
    "4 bits": Kind(),
    "4 bits, zero points": Kind(symmetric=False),
    "4 bits, groups of 64": Kind(group_size=64, symmetric=False),
    "4 bits, rows": Kind(strategy="channel", group_size=None),
    "4 bits, rows, zero points": Kind(strategy="channel", group_size=-1, symmetric=False),
    "8 bits, packed": Kind(num_bits=8, strategy="channel", group_size=None),
    "8 bits, packed, groups": Kind(num_bits=8, group_size=64),
    "8 bits, packed, zero points": Kind(num_bits=8, symmetric=False),
    "8 bits, packed, rows, zero points": Kind(num_bits=8, strategy="channel", group_size=None, symmetric=False),
    "int8, groups": Kind("int-quantized", 8, group_size=64),
    "int8, rows": Kind("int-quantized", 8, strategy="channel", group_size=None),
    "int8, tensor": Kind("int-quantized", 8, strategy="tensor", group_size=None),
    "fp8, rows": Kind("float-quantized", 8, "float", "channel", None),
    "fp8, tensor": Kind("float-quantized", 8, "float", "tensor", None),
}
DOWN = "model.layers.1.mlp.down_proj.weight"
WAYS = {
    "int8": Quantization("int8"),
    "fp8": Quantization("fp8"),
    "int4": Quantization("int4"),
    "int4, symmetric": Quantization("int4", 64, symmetric=True),
    "int8, groups": Quantization("int8", 32),
    "int8, symmetric groups": Quantization("int8", 64, symmetric=True),
}


@pytest.fixture
def folder(floats, tmp_path):
    """A copy of `floats` to change."""
    return shutil.copytree(floats, tmp_path / "model")


# ---- read


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_number_is_the_one_that_was_stored(kind, folder, tmp_path):
    expected = quantise(folder, kind.config(), kind.store)
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    held = {p.dtype for p in model.layers.parameters()} - {torch.float32, torch.uint8}
    assert held == {torch.int32 if kind.num_bits == 4 else torch.float8_e4m3fn if kind.type == "float" else torch.int8}
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(load_quietly(tmp_path / "again")), tensors_of(model))


@pytest.mark.parametrize("actorder", ["group", True])
def test_columns_whose_groups_are_in_another_order_are_sorted(actorder, folder, tmp_path):
    kind = Kind(symmetric=False, actorder="group")
    expected = quantise(folder, kind.config(actorder=actorder), kind.store)
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    with pytest.raises(ValueError, match="whose columns are reordered"):
        model.save_pretrained(tmp_path / "again")
    rewrite(folder, lambda t: {k: v.sort()[0] if k.endswith("_g_idx") else v for k, v in t.items()})
    assert not any(torch.equal(floats_of(load(folder))[name], floats) for name, floats in expected.items())


ROWS_OF_8_BITS = [x for x in KINDS.values() if (x.num_bits, x.symmetric) == (8, True) and x.strategy != "group"]


@pytest.mark.parametrize("kind", ROWS_OF_8_BITS, ids=str)
def test_rows_of_8_bits_have_any_length(kind, tmp_path):
    folder = write_floats(tmp_path / "floats", intermediate_size=70)
    expected = quantise(folder, kind.config(), kind.store)
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(load_quietly(tmp_path / "again")), tensors_of(model))


def test_the_other_name_of_the_config_and_shards_that_part_a_matrix_are_read(folder):
    kind = KINDS["4 bits, zero points"]
    expected = quantise(folder, kind.config(), kind.store)
    rewrite(
        folder, quantization_config=None, compression_config=kind.config() | {"version": "0.9", "sparsity_config": {}}
    )
    shard(folder, 5)
    assert same(floats_of(load_quietly(folder)), expected)


def flipped(words):
    """Return words with the lowest two numbers of 4 bits swapped."""
    return (words & ~255) | (words & 15) << 4 | (words >> 4 & 15)


MUTATIONS = {
    "numbers swapped": lambda t: t | {k: flipped(v) for k, v in t.items() if k.endswith("_packed")},
    "words swapped": lambda t: t | {k: v.roll(1, 1) for k, v in t.items() if k.endswith("_packed")},
    "a neighbour's numbers": lambda t: t | {k: v.roll(1, 0) for k, v in t.items() if k.endswith("_packed")},
    "a neighbour's scales": lambda t: t | {k: v.roll(1, 0) for k, v in t.items() if k.endswith("_scale")},
    "scales shifted by a group": lambda t: t | {k: v.roll(1, 1) for k, v in t.items() if k.endswith("_scale")},
    "a zero point off by one": lambda t: t | {k: v ^ 1 for k, v in t.items() if k.endswith("_point")},
    "zero points shifted by a group": lambda t: t | {k: v.roll(1, 1) for k, v in t.items() if k.endswith("_point")},
    "a neighbour's zero points": lambda t: t | {k: flipped(v) for k, v in t.items() if k.endswith("_point")},
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_the_comparison_finds_numbers_that_are_not_in_their_places(mutation, folder):
    kind = KINDS["4 bits, zero points"]
    expected = quantise(folder, kind.config(), kind.store)
    rewrite(folder, mutation)
    assert not any(torch.equal(floats_of(load(folder))[name], floats) for name, floats in expected.items())


@pytest.mark.parametrize(
    ("name", "change", "needle"),
    [
        ("4 bits", lambda t: t.pop(DOWN + "_scale"), f"missing: {DOWN}_scale"),
        ("4 bits", lambda t: t.pop(DOWN + "_shape"), f"missing: {DOWN}_shape"),
        ("4 bits", lambda t: t.update({DOWN + "_g_idx": torch.zeros(192)}), f"unexpected: {DOWN}_g_idx"),
        ("4 bits", lambda t: t.update({DOWN + "_zero_point": torch.zeros(16, 6)}), f"unexpected: {DOWN}_zero_point"),
        ("4 bits", lambda t: t.update({DOWN: torch.zeros(128, 192)}), f"unexpected: {DOWN};"),
        ("4 bits", lambda t: t.update({DOWN + "_packed": torch.zeros(128, 24)}), f"as F32: {DOWN}_packed (not I32)"),
        (
            "4 bits",
            lambda t: t.update({DOWN + "_packed": t[DOWN + "_packed"].T.contiguous()}),
            f"shape: {DOWN}_packed is [24, 128], config.json says [128, 24]",
        ),
        ("4 bits", lambda t: t.update({DOWN + "_shape": torch.tensor([128, 191])}), f"{DOWN}_shape is [128, 191], not"),
        ("int8, rows", lambda t: t.update({DOWN: torch.zeros(128, 192)}), f"stored as F32: {DOWN} (not I8)"),
        (
            "int8, tensor",
            lambda t: t.update({DOWN + "_scale": torch.zeros(128, 1)}),
            f"shape: {DOWN}_scale is [128, 1]",
        ),
        ("fp8, rows", lambda t: t.update({DOWN: t[DOWN].view(torch.int8)}), f"stored as I8: {DOWN} (not F8_E4M3)"),
        ("fp8, rows", lambda t: t[DOWN].view(torch.uint8)[3, 4:].fill_(127), f"{DOWN} holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, needle, folder):
    quantise(folder, KINDS[name].config(), KINDS[name].store)
    rewrite(folder, edited(change))
    with pytest.raises(CheckpointError):
        load(folder)
    assert needle in refusal(folder, str(folder)) + ";"


def test_numbers_without_a_config_and_a_config_without_numbers_are_refused(folder):
    rewrite(folder, quantization_config=Kind().config())
    refusal(folder, "missing: model.layers.0.self_attn.q_proj.weight_packed")
    quantise(folder, Kind().config(), Kind().store)
    rewrite(folder, quantization_config=None)
    refusal(folder, "stored as I32: model.layers.0.mlp.down_proj.weight_packed (quantised; config.json says not)")


def test_what_is_already_quantised_is_not_quantised_again(folder):
    quantise(folder, Kind().config(), Kind().store)
    refusal(
        folder,
        "quantize='int8' is given, but the weights are already quantised, by 'compressed-tensors'",
        quantize="int8",
    )


def test_scales_that_are_not_finite_are_named(folder):
    quantise(folder, Kind().config(), Kind().store)
    rewrite(folder, edited(lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill_(torch.inf)))
    with pytest.warns(UserWarning, match=r"NaN or infinity: model.layers.0.mlp.up_proj.weight$"):
        load(folder)


# ---- modules that keep floats


def ignoring(folder, *ignore: str, keep) -> dict:
    """Quantise a folder, but for the modules to keep; return the floats."""
    kind = KINDS["4 bits, zero points"]
    return quantise(folder, kind.config() | {"ignore": ["lm_head", *ignore]}, kind.store, keep)


@pytest.mark.parametrize(
    ("ignore", "keep"),
    [
        (["model.layers.1.mlp.down_proj"], lambda name: name == "model.layers.1.mlp.down_proj"),
        ([r"re:.*\.down_proj$", "re:.*absent"], lambda name: name.endswith("down_proj")),
        ([r"re:model\.layers\.0\..*"], lambda name: ".0." in name),
        (
            [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"],
            lambda name: ".0.self_attn." in name and "o_" not in name,
        ),
        (["re:down_proj"], lambda name: False),  # patterns start at the start
        (["down_proj", "model.layers.0"], lambda name: False),
        (["re:.*"], lambda name: True),
    ],
)
def test_modules_in_the_ignore_list_keep_floats(ignore, keep, folder, tmp_path):
    expected = ignoring(folder, *ignore, keep=keep)
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    model.save_pretrained(tmp_path / "again")
    again = load_quietly(tmp_path / "again")
    assert_same_tensors(tensors_of(again), tensors_of(model))
    if not all(map(keep, expected)):
        assert sorted(configured(tmp_path / "again")["ignore"]) == sorted(["lm_head", *filter(keep, expected)])


def test_parts_of_one_matrix_of_which_some_keep_floats_are_refused(folder):
    ignoring(folder, "model.layers.0.mlp.up_proj", keep=lambda name: name == "model.layers.0.mlp.up_proj")
    refusal(folder, "model.layers.0.mlp.up_proj keeps floats, but model.layers.0.mlp.gate_proj does not")


# ---- the output matrix


def with_head(folder, kind: Kind, head: Kind, **changes) -> tuple[dict, torch.Tensor]:
    """Quantise a folder, the output matrix as `head`, in a group of its own if that differs; return their floats."""
    config = kind.config() | {"ignore": []}
    if head is not kind:
        config["config_groups"]["group_1"] = head_group(head)
        if head.format != kind.format:
            config["format"] = "mixed-precision"
            config["config_groups"]["group_0"]["format"] = kind.format
    expected, found = quantise(folder, config | changes, kind.store), []

    def change(tensors):
        stored, floats = head.store("lm_head", tuple(tensors.pop("lm_head.weight").shape), 7)
        found.append(floats)
        return tensors | {name: tensor.contiguous() for name, tensor in stored.items()}

    rewrite(folder, change)
    return expected, found[0]


def head_group(head: Kind, *targets: str) -> dict:
    return head.config()["config_groups"]["group_0"] | {
        "targets": list(targets or ["re:.*lm_head"]),
        "format": head.format,
    }


HEADS = [(kind, kind) for kind in KINDS.values()]
HEADS += [(KINDS["4 bits, zero points"], kind) for kind in KINDS.values()]
HEADS += [(KINDS["int8, rows"], KINDS["4 bits, rows, zero points"]), (KINDS["fp8, tensor"], KINDS["int8, tensor"])]


@pytest.mark.parametrize(("kind", "head"), HEADS, ids=str)
def test_each_number_of_an_output_matrix_is_the_one_that_was_stored(kind, head, folder, tmp_path):
    expected, floats = with_head(folder, kind, head)
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    assert torch.equal(model.lm_head.matrix.floats(), floats)
    assert model.lm_head.weight.dtype == DTYPE_OF[head.num_bits, head.type]
    assert (model.embed.weight.dtype, model.embed.weight_scale) == (torch.float32, None)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(load_quietly(tmp_path / "again")), tensors_of(model))


DTYPE_OF = {(4, "int"): torch.int32, (8, "int"): torch.int8, (8, "float"): torch.float8_e4m3fn}


def test_a_tied_output_matrix_is_the_embedding_whatever_the_list_says(tmp_path):
    kind = Kind()
    tied = write_floats(tmp_path / "tied", tie_word_embeddings=True)
    expected = quantise(tied, kind.config() | {"ignore": []}, kind.store)
    assert same(floats_of(load_quietly(tied)), expected)


def test_an_output_matrix_alone_is_quantised(folder, tmp_path):
    kind = KINDS["int8, rows"]
    expected, floats = with_head(folder, kind, kind, ignore=["re:model.layers.*"])
    rewrite(folder, lambda t: {k: v for k, v in t.items() if ".layers." not in k or "norm" in k} | weights_of(expected))
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    assert torch.equal(model.lm_head.matrix.floats(), floats)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(load_quietly(tmp_path / "again")), tensors_of(model))


def weights_of(floats: dict) -> dict:
    return {f"{name}.weight": tensor for name, tensor in floats.items()}


@pytest.mark.parametrize(
    ("groups", "needle"),
    [
        ({"group_0": head_group(Kind())}, "config_groups: no group has targets=['Linear']"),
        (
            {name: head_group(Kind(), "Linear") for name in ("group_0", "group_1")},
            "config_groups: two groups have targets=['Linear']",
        ),
        (
            {"a": head_group(Kind(), "Linear"), "b": head_group(Kind(), "Embedding")},
            "config_groups.b: targets=['Embedding'] is not supported (only ['Linear'] or ['re:.*lm_head']",
        ),
        (
            {"a": head_group(Kind(), "Linear"), "b": head_group(KINDS["int8, rows"])},
            "config_groups.b: format='int-quantized' is not supported (only None or 'pack-quantized')",
        ),
        ({"a": {}, "b": {}, "c": {}}, "config_groups must be a single group, or one and another for lm_head"),
    ],
)
def test_groups_of_other_modules_are_refused(groups, needle):
    with pytest.raises(ConfigError) as caught:
        scheme("quantization_config", Kind().config() | {"config_groups": groups})
    assert needle in str(caught.value)


def test_a_group_of_many_formats_must_name_its_own():
    with pytest.raises(ConfigError, match=r"config_groups\.group_0: format is missing"):
        scheme("quantization_config", Kind().config() | {"format": "mixed-precision"})


@pytest.mark.parametrize(
    ("ignore", "needle"),
    [
        ("lm_head", "ignore must be a list of names, found 'lm_head'"),
        (["lm_head", 3], "ignore must be a list of names, found ['lm_head', 3]"),
        (["re:(a+)+b"], "ignore has 're:(a+)+b', a pattern that is not supported; name the modules"),
        (["re:.*.*.*.*x"], "a pattern that is not supported"),
        (["re:(?!x)"], "a pattern that is not supported"),
        (["re:" + "(.|)" * 40 + "Z"], "a pattern that is not supported"),
        (["re:" + "(a|a)" * 30], "a pattern that is not supported"),
        (["re:a{9}"], "a pattern that is not supported"),
        (["re:[b-a]"], "which is no pattern (bad character range"),
        (["re:("], "which is no pattern"),
        (["re:x"] * 17, "ignore has 17 patterns, more than 16"),
    ],
)
def test_an_ignore_list_that_cannot_be_read_or_would_take_long_is_refused(ignore, needle):
    with pytest.raises(ConfigError) as caught:
        scheme("quantization_config", Kind().config() | {"ignore": ignore})
    assert f"quantization_config: {needle}" in str(caught.value) or needle in str(caught.value)


# ---- configs that are refused

WEIGHTS = "quantization_config.config_groups.group_0.weights"
GROUP = "quantization_config.config_groups.group_0"
ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def with_group(**changes) -> dict:
    """Return a config whose group differs."""
    config = copy.deepcopy(Kind().config())
    config["config_groups"]["group_0"] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "needle"),
    [
        (with_group(input_activations=ACTIVATIONS), f"{GROUP}.input_activations is not supported in format='pack-"),
        (with_group(output_activations=ACTIVATIONS), f"{GROUP}: output_activations={{'num_bits': 8"),
        (
            with_group(targets=["re:.*proj"]),
            f"{GROUP}: targets=['re:.*proj'] is not supported (only ['Linear'] or ['re",
        ),
        (with_group(format="int-quantized"), f"{GROUP}: format='int-quantized' is not supported (only None or 'pack-"),
        (with_group(weights=None), f"{WEIGHTS} must be an object, found None"),
        (with_group(x=1), f"{GROUP}: x=1 is not known"),
        (Kind().config() | {"kv_cache_scheme": ACTIVATIONS}, "kv_cache_scheme: type='int' is not supported"),
        (
            Kind().config() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config={'format': 'sparse-24",
        ),
        (Kind().config() | {"transform_config": {"config_groups": {}}}, "transform_config={'config_groups'"),
        (Kind().config() | {"format": "marlin-24"}, "format='marlin-24' is not supported (only 'pack-quantized' or"),
        (Kind().config() | {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' is not supported"),
        (Kind().config() | {"format": None}, "format=None is not supported"),
        (
            Kind().config() | {"quantization_status": "calibration"},
            "quantization_status='calibration' is not supported",
        ),
        (
            Kind().config() | {"config_groups": {}},
            "config_groups must be a single group, or one and another for lm_head",
        ),
        (Kind().config() | {"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 must be an object"),
        (Kind().config() | {"config_groups": {"a": {}, "b": {}}}, "config_groups.a: targets is missing"),
        (Kind().config() | {"surprise": 1}, "quantization_config: surprise=1 is not known"),
        (
            Kind(strategy="channel", group_size=None, actorder="group").config(),
            f"{WEIGHTS}: actorder='group' does not go with strategy='channel'",
        ),
        (Kind().config(dynamic=True), f"{WEIGHTS}: dynamic=True is not supported (only False)"),
        (Kind().config(block_structure=[128, 128]), f"{WEIGHTS}: block_structure=[128, 128] is not supported"),
        (Kind().config(num_bits=3), f"{WEIGHTS}: num_bits=3 of type='int' in format='pack-quantized' is not supported"),
        (Kind().config(num_bits=True), f"{WEIGHTS}: num_bits=True"),
        (Kind().config(type="float"), f"{WEIGHTS}: num_bits=4 of type='float'"),
        (
            Kind("float-quantized", 8, "float").config(),
            f"{WEIGHTS}: strategy='group' is not supported (with 8 bits in 'float-quantized' only",
        ),
        (Kind().config(strategy="tensor"), f"{WEIGHTS}: strategy='tensor' is not supported (with 4 bits"),
        (Kind().config(strategy="block"), f"{WEIGHTS}: strategy='block' is not supported"),
        (Kind().config(group_size=16), f"{WEIGHTS}: group_size=16 is not supported (only 32, 64, 128)"),
        (Kind().config(group_size=None), f"{WEIGHTS}: group_size=None is not supported"),
        (Kind().config(strategy="channel"), f"{WEIGHTS}: group_size=32 does not go with strategy='channel'"),
        (Kind("int-quantized", 8, strategy="channel", group_size=None, symmetric=False).config(), "symmetric=False"),
        (Kind().config(scale_dtype="torch.uint8"), f"{WEIGHTS}: scale_dtype='torch.uint8' is not supported"),
        (Kind().config(surprise=1), f"{WEIGHTS}: surprise=1 is not known"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, needle, folder):
    rewrite(folder, quantization_config=config)
    message = refusal(folder, needle, str(folder / "config.json"), "; give the checkpoint that they were made of")
    assert message.isprintable()


@pytest.mark.parametrize("size", [64, 128])
def test_groups_that_do_not_divide_the_columns_are_refused(size, tmp_path):
    folder = write_floats(tmp_path, intermediate_size=160)
    rewrite(folder, quantization_config=Kind(group_size=size).config())
    refusal(folder, f"groups of {size} do not divide the 160 columns of model.layers.0.mlp.down_proj")
    rewrite(folder, quantization_config=KINDS["4 bits, rows"].config())
    refusal(folder, "missing: ")  # groups of 32 do
    folder = write_floats(tmp_path / "odd", intermediate_size=72)
    rewrite(folder, quantization_config=KINDS["4 bits, rows"].config())
    refusal(folder, "no groups of 32 divide the 72 columns of model.layers.0.mlp.down_proj")


def test_keys_that_change_nothing_are_accepted(folder):
    kind = Kind()
    expected = quantise(folder, kind.config(), kind.store)
    config = kind.config(actorder="weight", observer="mse", observer_kwargs={}, zp_dtype=None, scale_dtype=None)
    config |= {
        "version": "0.12",
        "global_compression_ratio": 1.5,
        "quantization_status": "frozen",
        "kv_cache_scheme": None,
    }
    rewrite(folder, quantization_config=config | {"sparsity_config": {}, "transform_config": {}})
    assert same(floats_of(load_quietly(folder)), expected)


# ---- written


@given(rows=st.integers(1, 9), runs=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_numbers_in_words_change_places_as_if_they_were_unpacked(rows, runs, seed):
    numbers = torch.randint(0, 16, (rows, 32 * runs), generator=torch.Generator().manual_seed(seed))
    words = pack_lowest_first(numbers.numpy(), 4)
    assert torch.equal(nibbles(words), numbers)
    assert torch.equal(words_of(4, numbers), words)
    assert torch.equal(interleaved(words), pack(numbers))
    assert torch.equal(lowest_first(pack(numbers)), words)
    assert torch.equal(interleaved(words.T.contiguous().T), pack(numbers))


@given(
    form=st.sampled_from(["int8", "fp8", "int4-32", "int4-32-symmetric", "int8-32", "int8-32-symmetric"]),
    rows=st.integers(1, 21),
    runs=st.integers(2, 4),
    parts=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back_bit_by_bit(form, rows, runs, parts, seed):
    weight = torch.randn(rows * parts, 32 * runs, generator=torch.Generator().manual_seed(seed))
    name = "model.layers.0.mlp.x"
    made = Quantization.of(form).quantise(weight, torch.bfloat16)
    part = [tensor if tensor is None else tensor.split(rows)[-1] for tensor in made]
    given = {f"{name}.{kind}": t for kind, t in zip(PARTS, part, strict=True) if t is not None}
    tensors, config = compress(given)
    found = scheme("quantization_config", json.loads(json.dumps(config["quantization_config"])))
    expected = found.tensors(name, rows, 32 * runs)
    assert expected.keys() == tensors.keys()
    for key, stored in expected.items():
        tensor = as_written(key, tensors[key])
        assert list(tensor.shape) == stored.shape
        read = tensor if stored.read is None else stored.read(tensor)
        if stored.place:
            assert read.dtype == given[stored.place].dtype
            assert torch.equal(read.float(), given[stored.place].float())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("dtype", few([torch.float32], [torch.bfloat16, torch.float16]))
def test_a_quantised_model_is_saved_and_loaded_bit_by_bit(dtype, overrides, way, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 40_000)
    model = load(write_floats(tmp_path / "floats", **overrides), quantize=way, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    stored = {name: t for path in (tmp_path / "saved").glob("*.safetensors") for name, t in load_file(path).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    again = load_quietly(tmp_path / "saved")
    assert again.dtype == dtype
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again, 48), logits(model, 48))
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "saved").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()


def test_saving_floats_over_a_quantised_checkpoint_leaves_nothing_of_it(floats, tmp_path):
    load(floats, quantize="int4").save_pretrained(tmp_path)
    model = load(tmp_path)
    for module in model.modules():
        if getattr(module, "weight_scale", None) is not None:
            module.weight = torch.nn.Parameter(module.matrix.floats(), requires_grad=False)
            module.weight_scale = module.weight_zero_point = None
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_tensors(tensors_of(load_quietly(tmp_path)), tensors_of(model))


def test_a_model_quantised_in_several_ways_or_wrongly_is_not_saved(floats, tmp_path):
    model, other = load(floats, quantize="int4"), load(floats, quantize="int8")
    mixed = copy.deepcopy(model)
    mixed.layers[1].mlp.down = other.layers[1].mlp.down
    with pytest.raises(
        ValueError, match=r"cannot save model.layers.0.* as .*int4.* beside .*down_proj.weight as .*int8"
    ):
        mixed.save_pretrained(tmp_path / "new")
    wrong = copy.deepcopy(model)
    down = wrong.layers[0].mlp.down
    down.weight_scale = torch.nn.Parameter(down.weight_scale[:, :5], requires_grad=False)
    with pytest.raises(ValueError, match=r"unexpected: layers.0.mlp.down.weight_scale"):
        wrong.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- the library itself


@pytest.fixture
def library():
    """The library, if it is installed."""
    return pytest.importorskip("compressed_tensors")


def in_transformers(folder, dequantize: bool):
    """Return transformers' model of a folder, which must hold exactly the tensors that it expects."""
    config = transformers.CompressedTensorsConfig(**configured(folder), dequantize=dequantize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.LlamaForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            quantization_config=config,
            output_loading_info=True,
        )
    assert not any(info.values()), info
    return model.eval()


VOCABULARIES = [("int8", "int8"), ("fp8", "fp8"), ("int4", "int4"), ("int4-64-symmetric", "int4-64-symmetric")]
VOCABULARIES += [("int4-64-symmetric", "int8"), ("int8", "int4-32-symmetric"), ("int4-32", "fp8"), ("int4-128", "int4")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layers", "vocabulary"), VOCABULARIES)
@pytest.mark.parametrize("dtype", few([torch.bfloat16], [torch.float32, torch.float16]))
def test_a_quantised_vocabulary_is_saved_as_floats_to_look_up_and_few_bits_to_multiply(
    dtype, layers, vocabulary, tied, tmp_path
):
    overrides = {"intermediate_size": 256, "tie_word_embeddings": tied}
    floats = write_floats(tmp_path / "floats", **overrides)
    model = load(floats, quantize=f"{layers}+{vocabulary}", dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = load_quietly(tmp_path / "saved")
    assert torch.equal(again.embed.weight, model.embed.matrix.floats())
    for part, other in zip(again.lm_head.matrix, model.lm_head.matrix, strict=True):
        assert (part is None) == (other is None)
        assert part is None or torch.equal(part, other)
    assert same(floats_of(again), floats_of(model))
    ids = torch.arange(40)[None]
    for some in (ids, ids[:, :3]):  # widened, and by the kernels
        with torch.no_grad():
            assert torch.equal(again(some, backend="dense"), model(some, backend="dense"))
    assert not again.config.tie_word_embeddings
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "saved").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()


# transformers (5.23) does not load zero points unless it dequantises, and dequantises all groups as the first.
IN_TRANSFORMERS = [(name, name, way) for name in ("int8", "fp8", "int4-64-symmetric") for way in (True, False)]
IN_TRANSFORMERS += [("int4", "int4", True), ("int4-64-symmetric", "int8", False), ("int4-32-symmetric", "fp8", False)]
IN_TRANSFORMERS += [("int8", "int4-32-symmetric", False), ("int4-128-symmetric", "int4-32-symmetric", False)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layers", "vocabulary", "dequantize"), IN_TRANSFORMERS)
def test_transformers_computes_the_same_with_a_quantised_vocabulary(
    layers, vocabulary, dequantize, tied, library, tmp_path
):
    overrides = {"intermediate_size": 256, "tie_word_embeddings": tied}
    model = load(write_floats(tmp_path / "floats", **overrides), quantize=f"{layers}+{vocabulary}")
    model.save_pretrained(tmp_path / "saved")
    theirs = in_transformers(tmp_path / "saved", dequantize)
    torch.testing.assert_close(logits(theirs, 48), logits(model, 48), rtol=1e-4, atol=1e-4)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.matrix.floats())
    assert torch.equal(theirs.model.embed_tokens.weight, model.embed.matrix.floats())


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_transformers_computes_the_same_from_what_is_saved(way, dequantize, library, tmp_path):
    if not way.symmetric and not dequantize:
        pytest.skip("transformers refuses zero points there, also in checkpoints that the library writes")
    model = load(write_floats(tmp_path / "floats"), quantize=way)
    model.save_pretrained(tmp_path / "saved")
    theirs = in_transformers(tmp_path / "saved", dequantize)
    torch.testing.assert_close(logits(theirs, 48), logits(model, 48), rtol=1e-4, atol=1e-4)
    expected = {name: theirs.get_submodule(name).weight for name in floats_of(model)}
    assert same(floats_of(model), expected)


@given(rows=st.integers(1, 40), columns=st.integers(1, 5), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_words_are_packed_as_the_library_packs_them(rows, columns, bits, seed):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 16, (rows, 32 * columns), generator=draw)
    zeros = torch.randint(0, 16, (rows, columns), generator=draw)
    scale = torch.ones(rows, columns)
    name = "model.layers.0.x"
    given = {f"{name}.weight": pack(numbers), f"{name}.weight_scale": scale, f"{name}.weight_zero_point": zeros.byte()}
    tensors, _ = compress(given)
    found = {key: as_written(key, tensor) for key, tensor in tensors.items()}
    assert torch.equal(found[f"{name}.weight_packed"], pack_to_int32((numbers - 8).to(torch.int8), 4))
    assert torch.equal(found[f"{name}.weight_zero_point"], pack_to_int32((zeros - 8).to(torch.int8), 4, packed_dim=0))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_checkpoint_that_the_library_writes_is_read_exactly(kind, library, floats, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    config = kind.config()
    group = QuantizationScheme(**config["config_groups"]["group_0"], format=kind.format)
    library_format = BaseCompressor.get_value_from_registry(kind.format)
    source = load_file(floats / "model.safetensors")

    def store(name, shape, seed):
        weight = source[f"{name}.weight"]
        parts = weight.unflatten(1, (-1, kind.group_size)) if kind.strategy == "group" else weight[:, None]
        low, high = (weight.min()[None], weight.max()[None]) if kind.strategy == "tensor" else parts.aminmax(dim=-1)
        scale, zero = calculate_qparams(low, high, group.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = library_format.compress(state, group)
        restored = library_format.decompress(stored, group)["weight"]
        return {f"{name}.{key}": tensor for key, tensor in stored.items()}, restored

    folder = shutil.copytree(floats, tmp_path / "model")
    expected = quantise(folder, config, store)
    model = load_quietly(folder)
    assert same(floats_of(model), expected)
    assert not any(torch.equal(tensor, source[f"{name}.weight"]) for name, tensor in expected.items())
