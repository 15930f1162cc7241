"""config.json and generation_config.json: what is read, what it means, and what is refused by name."""

import dataclasses
import json
import os
import warnings

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_flex import GenerationConfig, LlamaConfig
from llama_flex.checkpoint.config_rules import ConfigError

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
# The keys that these checkpoints' config.json really hold.
REAL = {
    "Llama-2-7b-hf": COMMON
    | {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "vocab_size": 32000,
    },
    "Llama-3.1-8B-Instruct": COMMON
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3_SCALING,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "vocab_size": 128256,
    },
    "Llama-3.2-1B": COMMON
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3_SCALING | {"factor": 32.0},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "vocab_size": 128256,
    },
    "TinyLlama-1.1B-Chat-v1.0": COMMON
    | {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0",
        "vocab_size": 32000,
    },
    "SmolLM2-135M-Instruct": COMMON
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
        "vocab_size": 49152,
    },
    "vicuna-7b-v1.5-16k": COMMON
    | {
        "_name_or_path": "vicuna-7b-v1.5-16k",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "vocab_size": 32000,
    },
}
# The fields that decide what is computed, and which tokens end it.
MATHEMATICS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "bos_token_id", "pad_token_id"),
]


def as_list(ids):
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def assert_same_mathematics(ours: LlamaConfig, reference: transformers.LlamaConfig) -> None:
    for name in MATHEMATICS:
        assert getattr(ours, name) == getattr(reference, name), name
    assert as_list(ours.eos_token_id) == as_list(reference.eos_token_id)
    inv_freq = ours.rope_parameters.inverse_frequencies(ours.head_dim)
    assert torch.equal(inv_freq, LlamaRotaryEmbedding(reference).inv_freq)
    used = {k: v for k, v in reference.rope_parameters.items() if k != "type"}
    held = {k: v for k, v in dataclasses.asdict(ours.rope_parameters).items() if v is not None}
    assert held == used


def read(raw: dict) -> LlamaConfig:
    """from_dict, where any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LlamaConfig.from_dict(json.loads(json.dumps(raw)))


def reference_of(raw: dict) -> transformers.LlamaConfig:
    return transformers.LlamaConfig.from_dict(json.loads(json.dumps(raw)))


def write(folder, raw, name="config.json"):
    (folder / name).write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


# ---- what is read


def test_defaults_are_those_of_transformers():
    ours, reference = LlamaConfig(), transformers.LlamaConfig()
    assert_same_mathematics(ours, reference)
    for f in dataclasses.fields(LlamaConfig):
        if f.name not in ("rope_parameters", "sliding_window", "is_causal", "other"):  # not keys of every LLaMA
            assert getattr(ours, f.name) == getattr(reference, f.name), f.name
    assert LlamaConfig.from_dict({}) == ours


@pytest.mark.parametrize("name", REAL)
def test_real_config_is_read_without_warning_and_as_transformers_reads_it(name):
    assert_same_mathematics(read(REAL[name]), reference_of(REAL[name]))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10001.0},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": 1e-6},
        {"eos_token_id": 3},
        {"head_dim": 2},
        {"tie_word_embeddings": None},
        {"attention_bias": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_comparison_with_transformers_notices_a_changed_value(name, change):
    if change == {"tie_word_embeddings": None}:
        change = {"tie_word_embeddings": not REAL[name]["tie_word_embeddings"]}
    with pytest.raises(AssertionError):
        assert_same_mathematics(read(REAL[name] | change), reference_of(REAL[name]))


@pytest.mark.parametrize("name", REAL)
def test_config_written_by_the_newest_transformers_is_read_without_warning(name, tmp_path):
    reference = reference_of(REAL[name])
    reference.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_mathematics(LlamaConfig.from_pretrained(tmp_path), reference)
    assert_same_mathematics(read(reference.to_dict()), reference)


@pytest.mark.parametrize("name", REAL)
def test_round_trip_through_our_file_and_through_transformers_changes_nothing(name):
    config = read(REAL[name])
    assert read(config.to_dict()) == config
    reference = reference_of(config.to_dict())
    assert_same_mathematics(config, reference)
    assert read(reference.to_dict()) == config


def test_written_config_holds_no_key_that_is_not_a_setting():
    written = read(REAL["Llama-3.1-8B-Instruct"]).to_dict()
    assert set(written["rope_parameters"]) == {*LLAMA3_SCALING, "rope_theta"}
    assert set(LlamaConfig().to_dict()["rope_parameters"]) == {"rope_type", "rope_theta"}
    assert set(written) <= set(transformers.LlamaConfig().to_dict())


@settings(max_examples=60, deadline=None)
@given(
    kv=st.integers(1, 4),
    groups=st.integers(1, 4),
    half=st.integers(1, 32),
    rope=st.sampled_from([None, {"type": "linear", "factor": 2.5}, LLAMA3_SCALING]),
    theta=st.one_of(st.floats(100, 1e7), st.integers(100, 10**7)),
    eos=st.one_of(st.none(), st.integers(0, 50), st.lists(st.integers(0, 50), max_size=3)),
    switches=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_valid_config_means_the_same_here_and_in_transformers(kv, groups, half, rope, theta, eos, switches):
    raw = {
        "num_attention_heads": kv * groups,
        "num_key_value_heads": kv,
        "head_dim": 2 * half,
        "hidden_size": kv * groups * 8,
        "rope_theta": theta,
        "rope_scaling": rope,
        "eos_token_id": eos,
        "max_position_embeddings": 131072,
        **dict(zip(("tie_word_embeddings", "attention_bias", "mlp_bias"), switches, strict=True)),
    }
    config = read(raw)
    assert_same_mathematics(config, reference_of(raw))
    assert_same_mathematics(config, reference_of(config.to_dict()))
    assert read(config.to_dict()) == config


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("scaling", [{"factor": 4.0, "rope_type": "linear"}, LLAMA3_SCALING], ids=["linear", "llama3"])
def test_every_spelling_of_the_rotary_keys_is_the_same_config(type_key, scaling):
    values = {k: v for k, v in scaling.items() if k != "rope_type"} | {type_key: scaling["rope_type"]}
    spellings = [
        {"rope_theta": 500000.0, "rope_scaling": values},
        {"rope_parameters": values | {"rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_parameters": values},
        {"rope_theta": 1.5, "rope_parameters": values | {"rope_theta": 500000.0}},
        {"rope_scaling": values | {"rope_theta": 500000.0}, "rope_parameters": {"rope_type": "default"}},
    ]
    configs = [read(COMMON | {"max_position_embeddings": 131072} | spelling) for spelling in spellings]
    assert configs == [configs[0]] * len(spellings)
    for spelling in spellings:
        reference = reference_of({"max_position_embeddings": 131072} | spelling)
        assert_same_mathematics(configs[0], reference)


def test_both_type_keys_at_once_mean_rope_type_as_in_transformers():
    raw = {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}
    with pytest.warns(UserWarning, match="factor"):
        config = LlamaConfig.from_dict(raw)
    assert config.rope_parameters.rope_type == "default"
    assert reference_of(raw).rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("beside", [None, 4096], ids=["inside", "beside"])
def test_original_length_of_llama3_is_found_where_transformers_finds_it(beside):
    scaling = {k: v for k, v in LLAMA3_SCALING.items() if k != "original_max_position_embeddings"}
    raw = {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 65536}
    if beside:
        raw["original_max_position_embeddings"] = beside
    config = read(raw)
    assert config.rope_parameters.original_max_position_embeddings == (beside or 65536)
    assert_same_mathematics(config, reference_of(raw))


def test_head_dim_is_derived_unless_given():
    assert read({"hidden_size": 96, "num_attention_heads": 6}).head_dim == 16
    assert read({"hidden_size": 96, "num_attention_heads": 6, "head_dim": None}).head_dim == 16
    assert read({"hidden_size": 96, "num_attention_heads": 6, "head_dim": 64}).head_dim == 64
    assert read({"hidden_size": 100, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64}).head_dim == 64


@pytest.mark.parametrize(("value", "ids"), [(7, (7,)), (0, (0,)), ([7, 8], (7, 8)), ([7], (7,)), (None, ()), ([], ())])
def test_eos_may_be_a_number_a_list_or_null(value, ids):
    assert read({"eos_token_id": value}).eos_token_ids == ids
    assert read(read({"eos_token_id": value}).to_dict()).eos_token_ids == ids
    assert read({}).eos_token_ids == (2,)


@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_switches_are_read_and_written(name):
    for value in (True, False):
        config = read({name: value})
        assert getattr(config, name) is value
        assert config.to_dict()[name] is value


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_has_two_spellings(key):
    assert read({key: "bfloat16"}).dtype == "bfloat16"
    assert read({}).dtype is None


def test_unknown_keys_are_named_in_one_warning():
    with pytest.warns(UserWarning, match=r"attention_sinks, zebra$") as caught:
        LlamaConfig.from_dict({"zebra": 1, "attention_sinks": 4})
    assert len(caught) == 1


# ---- what is refused


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "llama"}, "['MistralForCausalLM']"),
        ({"architectures": ["MistralForSequenceClassification"], "model_type": "mistral"}, "SequenceClassification"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": ["llama"]}, "['llama']"),
        ({"model_type": None}, "None"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "Qwen2ForCausalLM"),
        ({"model_type": "qwen2"}, "qwen2"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
            "another head than the one that",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by 'gptq' to 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by 'fp8'"),
        ({"quantization_config": {"load_in_8bit": True}}, "to 8 bits"),
        ({"quantization_config": {}}, "by a method it does not name"),
        ({"quantization_config": {"quant_method": "awq"}}, "give the checkpoint that they were made of"),
        ({"compression_config": {"format": "x"}}, "compression_config"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "magic", "factor": 2.0}}, "'magic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.0}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "false"}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": "1"}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": True}}, "mscale"),
        ({"is_causal": "false"}, "is_causal"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size=8192"),
        ({"kv_sharing_modes": ["reuse"]}, "kv_sharing_modes"),
        ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config"),
        ({"text_config": {"hidden_size": 8}}, "text_config"),
        ({"bos_token_id": True}, "bos_token_id"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope_theta above 1"),
        ({"rope_scaling": LONGROPE | {"original_max_position_embeddings": 1}}, "embeddings above 1, or an attention_"),
        ({"rope_scaling": {"type": "dynamic"}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim above 2"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor has 1"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 63}}, "long_factor has 63 numbers"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0] * 63 + [0]}}, "short_factor"),
        ({"rope_scaling": LONGROPE | {"short_factor": 1.0}}, "short_factor"),
        ({"rope_scaling": LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings"),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope_type None"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor"),
        ({"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": None}}, "high_freq_factor"),
        ({"rope_scaling": "linear"}, "'linear'"),
        ({"rope_scaling": [1]}, "[1]"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"head_dim": 33}, "head_dim=33"),
        ({"hidden_size": 66, "num_attention_heads": 2}, "head_dim=33"),
        ({"hidden_size": 100, "num_attention_heads": 6}, "num_attention_heads=6"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"num_attention_heads": 4, "num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": False}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"mlp_bias": 0}, "mlp_bias"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": 2.0}, "eos_token_id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"dtype": {"default": "float16"}}, "dtype"),
        ({"dtype": 16}, "dtype"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_would_be_computed_wrongly_is_refused_by_name(raw, named, tmp_path):
    with pytest.raises(ValueError, match=r".") as caught:
        LlamaConfig.from_dict(raw)
    assert named in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_pretrained(write(tmp_path, raw))
    message = str(caught.value)
    assert named in message
    assert str(tmp_path / "config.json") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2**31, 10**30, 1.0, 4.5, True, "32", [32], {}, float("nan")], ids=repr)
def test_sizes_that_are_no_sizes_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        LlamaConfig.from_dict({name: value})
    with pytest.raises(ConfigError, match=name):
        LlamaConfig(**{name: value})


def test_a_number_of_layers_that_could_not_even_be_listed_is_refused():
    # Building the modules, though on the meta device, would fill the memory before any weight is looked at.
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        LlamaConfig.from_dict({"num_hidden_layers": 2**31 - 1})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("not json", "not readable as JSON"),
        ("\ufeff{}", "not readable as JSON"),
        ("[]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ('"x"', "expected a JSON object, found str"),
        ("[" * 200_000, "not readable as JSON"),
        ('{"a":' * 200_000, "not readable as JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", ""),
        (" " * (4 * 2**20 + 1), "larger than 4 MiB"),
    ],
    ids=["empty", "cut", "prose", "bom", "list", "null", "string", "deep list", "deep object", "long number", "large"],
)
@pytest.mark.parametrize("kind", [LlamaConfig, GenerationConfig])
def test_a_file_that_is_no_json_object_is_refused_by_name(kind, text, named, tmp_path):
    file = "config.json" if kind is LlamaConfig else "generation_config.json"
    write(tmp_path, text, file)
    with pytest.raises(ConfigError) as caught:
        kind.from_pretrained(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / file) in message
    assert named in message
    assert "\n" not in message


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        LlamaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "key", ["architectures", "hidden_act", "rope_scaling", "dtype", "eos_token_id", "rms_norm_eps"]
)
@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, json.dumps("x" * 10**6), json.dumps("a\nb\x1b[31m"), "1e999"])
def test_a_value_that_cannot_be_shown_is_shown_in_one_short_line(key, value, tmp_path):
    write(tmp_path, f'{{"{key}": {value}}}')
    try:
        LlamaConfig.from_pretrained(tmp_path)
    except ConfigError as error:
        message = str(error)
        assert str(tmp_path / "config.json") in message
        assert message.isprintable()
        assert len(message) < 2100


def test_keys_are_shown_in_warnings_of_one_short_line(tmp_path):
    write(tmp_path, {"a\nb\x1b[31m": 1, "c" * 10**6: 2, "rope_parameters": {"rope_type": "default", "d\ne": 3}})
    with pytest.warns(UserWarning, match="use") as caught:
        LlamaConfig.from_pretrained(tmp_path)
    assert len(caught) == 2
    for warning in caught:
        assert str(warning.message).isprintable()
        assert len(str(warning.message)) < 2100


@pytest.mark.parametrize("kind", [LlamaConfig, GenerationConfig])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "links to /dev/zero"),
        (lambda path: os.symlink("/etc/passwd", path), "links to /etc/passwd"),
        (lambda path: os.symlink(path.name, path), "cannot be opened"),
        (lambda path: os.symlink("gone", path), "no such file"),
    ],
    ids=["fifo", "directory", "device", "file elsewhere", "loop", "broken link"],
)
def test_only_a_regular_file_of_the_folder_is_opened(kind, make, named, tmp_path):
    path = tmp_path / ("config.json" if kind is LlamaConfig else "generation_config.json")
    make(path)
    with pytest.raises(ConfigError, match=named) as caught:
        kind.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        LlamaConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json"):
        LlamaConfig.from_pretrained(tmp_path)


def test_a_path_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "x.gguf").write_text("")
    absent = tmp_path / "x.gguf" / "y"
    for path, said in (
        (tmp_path / "x.gguf", "x.gguf: is a file; give the folder that holds config.json"),
        (absent, "y/config.json: no such file, nor its folder"),
        (tmp_path / "gone" / "x", "x/config.json: no such file, nor its folder"),
        ("a\0b", "no such file, nor its folder"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            LlamaConfig.from_pretrained(path)
        assert str(caught.value).isprintable()


def test_a_folder_that_cannot_be_listed_is_only_said_to_lack_the_file(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ConfigError, match=r"config\.json: no such file$"):
        LlamaConfig.from_pretrained(tmp_path)


# ---- generation_config.json


def generation(folder, raw) -> GenerationConfig:
    return GenerationConfig.from_pretrained(write(folder, raw, "generation_config.json"))


def test_generation_config_is_honoured(tmp_path):
    raw = {
        "bos_token_id": 128000,
        "do_sample": True,
        "eos_token_id": [128001, 128008, 128009],
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 77,
        "transformers_version": "4.42.3",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = generation(tmp_path, raw)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.do_sample is True
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"):
        assert getattr(config, name) == raw[name]


def test_without_generation_config_nothing_is_recommended(tmp_path):
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config == GenerationConfig()
    assert config.eos_token_ids == ()
    assert config.do_sample is False


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(eos_token_id=5),
        GenerationConfig(eos_token_id=0),
        GenerationConfig(eos_token_id=(0, 3)),
        GenerationConfig(do_sample=True, temperature=0.7, top_k=0, top_p=1.0, min_p=0.0),
        GenerationConfig(repetition_penalty=1.0, temperature=0.0, max_new_tokens=9),
    ],
    ids=repr,
)
def test_generation_config_round_trip(config, tmp_path):
    written = config.to_dict()
    assert not [key for key in written if key.startswith("_")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generation(tmp_path, written) == config
    reference = transformers.GenerationConfig.from_pretrained(tmp_path)
    for f in dataclasses.fields(config):
        value = None if f.name == "other" else getattr(config, f.name)
        if value not in (None, False) or value == 0:
            expected = list(value) if isinstance(value, tuple) else value
            # transformers leaves do_sample unset where the file does not say
            assert getattr(reference, f.name) == expected or (f.name, value) == ("do_sample", False), f.name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("typical_p", 0.9),
        ("bad_words_ids", [[3]]),
        ("min_new_tokens", 5),
        ("suppress_tokens", [1]),
        ("guidance_scale", 1.5),
        ("top_h", 0.4),
        ("stop_strings", ["###"]),
        ("exponential_decay_length_penalty", [10, 1.2]),
        ("max_time", 2.0),
        ("force_words_ids", [[[3]]]),
        ("constraints", [1]),
        ("watermarking_config", {"bias": 2.5}),
        ("encoder_repetition_penalty", 1.2),
        ("min_length", 9),
        ("token_healing", True),
        ("remove_invalid_values", True),
        ("num_return_sequences", 3),
        ("cache_implementation", "quantized"),
        ("forced_eos_token_id", 2),
        ("begin_suppress_tokens", [1]),
        ("sequence_bias", [[[8], 3.0]]),
        ("dola_layers", "low"),
        ("diversity_penalty", 0.5),
    ],
)
def test_generation_settings_that_cannot_be_honoured_are_named_in_a_warning(key, value, tmp_path):
    with pytest.warns(UserWarning, match=key):
        generation(tmp_path, {key: value})


def test_every_generation_setting_of_transformers_is_known_to_matter_or_not():
    """A new one in a new version of it must be looked at: does it change text?"""
    settings_ = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    ours = {f.name for f in dataclasses.fields(GenerationConfig)} | GenerationConfig.NEUTRAL.keys()
    of_beams = {"early_stopping", "length_penalty"}
    of_the_results = {name for name in settings_ if name.startswith("output_")} | {"return_dict_in_generate"}
    computing_the_same = {
        *("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size"),
        *("continuous_batching_config", "low_memory", "renormalize_logits", "use_mtp"),
    }
    of_drafts = {name for name in settings_ if "assistant" in name} | {
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "target_lookbehind", "speculation_type")
    }
    notes = {"transformers_version", "pad_token_id", "bos_token_id", "decoder_start_token_id"}
    assert settings_ - ours - of_beams - of_the_results - computing_the_same - of_drafts - notes == set()


def test_what_a_generation_config_holds_comes_back(tmp_path):
    raw = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "do_sample": False,
        "eos_token_id": [2, 3],
        "max_length": 4096,
        "pad_token_id": 0,
        "temperature": 0.6,
        "top_k": None,
        "transformers_version": "4.42.3",
        "mine": {"a": [1, None]},
    }
    config = generation(tmp_path, raw)
    assert config.to_dict() == raw
    assert dataclasses.replace(config, temperature=None, top_k=3).to_dict() == {
        key: value for key, value in (raw | {"top_k": 3}).items() if key != "temperature"
    }


def test_what_a_config_holds_comes_back():
    raw = REAL["Llama-2-7b-hf"] | {"mine": {"a": [1]}, "attention_dropout": 0.1}
    with pytest.warns(UserWarning, match="mine"):
        written = LlamaConfig.from_dict(raw).to_dict()
    for key, value in raw.items():
        if key not in ("rope_scaling", "torch_dtype"):  # spelled otherwise today
            assert written[key] == value, key
    assert written["dtype"] == "float16"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") for value in (None, 0, 0.0)),
        *(("attention_factor", value) for value in (None, 0, 0.0, -0.5)),
        *(("truncate", value) for value in (None, 0, 1, True, False)),
        ("factor", None),
        ("mscale", -0.3),
    ],
)
@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_an_optional_rotary_key_given_as_null_or_0_means_what_it_means_to_transformers(kind, key, value):
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.7}
    scaling |= {"mscale_all_dim": 1.0} if kind == "yarn" else {"short_factor": [1.5] * 16, "long_factor": [3.0] * 16}
    if kind == "longrope" and key not in ("factor", "attention_factor"):
        return
    scaling = {k: v for k, v in scaling.items() if kind == "yarn" or "mscale" not in k}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 2048}
    raw = sizes | {"rope_scaling": scaling | {key: value}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = LlamaConfig.from_dict(raw), LlamaRotaryEmbedding(reference_of(raw))
    rope = ours.rope_parameters
    assert torch.equal(rope.inverse_frequencies(ours.head_dim), theirs.inv_freq)
    assert rope.scale == theirs.attention_scaling
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = LlamaConfig.from_dict(ours.to_dict()).rope_parameters
    assert (again.scale, again.truncate) == (rope.scale, rope.truncate)


def test_frequencies_of_yarn_depend_on_truncate():
    """Else the parity above would show nothing."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    kept, cut = (read({"rope_scaling": scaling | {"truncate": t}, "head_dim": 32}) for t in (None, True))
    assert kept.rope_parameters.truncate is False
    frequencies = [c.rope_parameters.inverse_frequencies(32) for c in (kept, cut)]
    assert (frequencies[0] - frequencies[1]).abs().max() > 1e-3


@pytest.mark.parametrize("low", [4.0, 5.0, 100.0])
def test_bounds_of_llama3_in_the_wrong_order_are_warned_of_and_mean_what_they_mean_to_transformers(low):
    raw = {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": low}, "max_position_embeddings": 65536, "head_dim": 64}
    with pytest.warns(UserWarning, match=rf"low_freq_factor={low} is not below high_freq_factor=4.0"):
        ours = LlamaConfig.from_dict(raw)
    expected = LlamaRotaryEmbedding(reference_of(raw)).inv_freq
    assert torch.equal(ours.rope_parameters.inverse_frequencies(64), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_is_causal_is_read_as_transformers_masks_read_it(causal):
    assert read({"is_causal": causal}).is_causal is causal
    assert read({}).is_causal is True
    assert read(read({"is_causal": causal}).to_dict()).is_causal is causal


@pytest.mark.parametrize("given", [None, 0, 1, "false"])
def test_what_transformers_kernels_part_over_is_refused(given):
    """Of null its eager attention makes both directions and sdpa, its default, one; of 0 sdpa a TypeError."""
    with pytest.raises(ConfigError, match=f"is_causal must be true or false, found {given!r}"):
        read({"is_causal": given})


@pytest.mark.parametrize(
    ("named", "model_type", "said"),
    [
        ("LlamaForCausalLMEagle3", "llama", r": a draft model \(EAGLE\), .*; give the model that it drafts for$"),
        ("EagleLlamaForCausalLM", "llama", r": a draft model \(EAGLE\)"),
        ("LlamaForSequenceClassification", "llama", ": it ends in another head than the one that predicts tokens"),
        ("MistralForTokenClassification", "mistral", ": it ends in another head than the one that predicts tokens"),
        ("LlamaForQuestionAnswering", "llama", ": it ends in another head than the one that predicts tokens"),
        ("LlamaForCausalLM", "mistral", "; LlamaForCausalLM goes with model_type 'llama'$"),
        ("MistralForCausalLM", "llama", "; MistralForCausalLM goes with model_type 'mistral'$"),
        ("LlamaForCausalLMVec", "llama", "computes LlamaForCausalLM and MistralForCausalLM$"),  # who knows
        ("LlamaBiModel", "llama", "computes LlamaForCausalLM and MistralForCausalLM$"),
        ("Qwen2ForCausalLM", "qwen2", "computes LlamaForCausalLM and MistralForCausalLM$"),
        ("BertForQuestionAnswering", "bert", "computes LlamaForCausalLM and MistralForCausalLM$"),
        ("Eagle2_5_VLForConditionalGeneration", "eagle_2_5_vl", "computes LlamaForCausalLM and MistralForCausalLM$"),
        ("LlamaForCausalLM", "eagle", "computes LlamaForCausalLM and MistralForCausalLM$"),
    ],
)
def test_of_another_architecture_is_said_what_its_name_tells(named, model_type, said):
    with pytest.raises(ConfigError, match=rf"architecture \['{named}'\] \(model_type '{model_type}'\).*{said}"):
        read({"architectures": [named], "model_type": model_type})


def test_a_base_model_and_another_name_of_silu_are_read():
    assert read({"architectures": ["LlamaModel"], "model_type": "llama"}).to_dict()["architectures"] == [
        "LlamaForCausalLM"
    ]
    read({"hidden_act": "swish"})


@pytest.mark.parametrize(
    ("file", "way"),
    [
        ("adapter_config.json", "merge it into its base model"),
        ("model-Q4_K_M.gguf", "GGUF files"),
        ("params.json", "Meta's own format"),
    ],
)
def test_a_folder_of_another_kind_is_named_with_the_way_out(tmp_path, file, way):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError, match=f"config.json: no such file: .*{way}"):
        LlamaConfig.from_pretrained(tmp_path)


def test_generation_config_written_by_the_newest_transformers_is_read_without_warning(tmp_path):
    transformers.GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[3, 4]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.do_sample, config.temperature, config.eos_token_ids) == (True, 0.5, (3, 4))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_id", value) for value in (-1, "x", [1, "x"], 1.5, {"a": 1})),
        ("temperature", "hot"),
        ("top_k", [4]),
        ("top_p", {"p": 0.5}),
        ("max_new_tokens", "many"),
        ("max_new_tokens", -3),
        ("max_new_tokens", True),
        ("max_length", 0),
        ("do_sample", "true"),
        ("do_sample", 1),
    ],
)
def test_malformed_generation_settings_are_refused_by_name(key, value, tmp_path):
    with pytest.raises(ConfigError, match=key) as caught:
        generation(tmp_path, {"do_sample": True} | {key: value})
    assert "generation_config.json" in str(caught.value)
