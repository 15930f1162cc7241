"""LlamaConfig: what is read of config.json and what it means, as transformers reads it, and what is written back."""

import dataclasses
import warnings

import pytest
import transformers
from config_helpers import assert_same_mathematics, read, reference_of
from families import LLAMA, LLAMA_31_ROPE
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex import LlamaConfig
from llama_flex.checkpoint.architectures import ARCHITECTURES

COMMON = LLAMA | {"use_cache": True}
# The config.json of these checkpoints, with every key that it really holds.
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
        "rope_scaling": LLAMA_31_ROPE,
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
        "rope_scaling": LLAMA_31_ROPE | {"factor": 32.0},
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


def test_defaults_are_those_of_transformers():
    ours, reference = LlamaConfig(), transformers.LlamaConfig()
    assert_same_mathematics(ours, reference)
    for f in dataclasses.fields(LlamaConfig):
        if f.name not in ("rope_parameters", "sliding_window", "layer_types", "is_causal", "other"):  # not LLaMA's keys
            assert getattr(ours, f.name) == getattr(reference, f.name), f.name
    assert LlamaConfig.from_dict({}) == ours


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_defaults_of_every_architecture_are_those_of_transformers(kind):
    ours, reference = LlamaConfig.from_dict({"model_type": kind}), transformers.AutoConfig.for_model(kind)
    named = {f.name: getattr(reference, f.name, None) for f in dataclasses.fields(LlamaConfig)}
    for name in named.keys() - {"rope_parameters", "layer_types", "is_causal", "other", *ours.architecture.ignored}:
        if named[name] is not None or name in ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window"):
            assert getattr(ours, name) == named[name], name
    window, types = getattr(reference, "sliding_window", None), getattr(reference, "layer_types", None)
    types = types or ["sliding_attention"] * reference.num_hidden_layers
    assert list(ours.windows) == [window if kind == "sliding_attention" else None for kind in types]


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
    assert set(written["rope_parameters"]) == {*LLAMA_31_ROPE, "rope_theta"}
    assert set(LlamaConfig().to_dict()["rope_parameters"]) == {"rope_type", "rope_theta"}
    assert set(written) <= set(transformers.LlamaConfig().to_dict())


@settings(max_examples=60, deadline=None)
@given(
    kv=st.integers(1, 4),
    groups=st.integers(1, 4),
    half=st.integers(1, 32),
    rope=st.sampled_from([None, {"type": "linear", "factor": 2.5}, LLAMA_31_ROPE]),
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


@pytest.mark.parametrize("causal", [True, False])
def test_is_causal_is_read_as_transformers_masks_read_it(causal):
    assert read({"is_causal": causal}).is_causal is causal
    assert read({}).is_causal is True
    assert read(read({"is_causal": causal}).to_dict()).is_causal is causal


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_has_two_spellings(key):
    assert read({key: "bfloat16"}).dtype == "bfloat16"
    assert read({}).dtype is None


def test_a_base_model_and_another_name_of_silu_are_read():
    assert read({"architectures": ["LlamaModel"], "model_type": "llama"}).to_dict()["architectures"] == [
        "LlamaForCausalLM"
    ]
    read({"hidden_act": "swish"})


def test_a_config_survives_a_round_trip():
    raw = REAL["Llama-2-7b-hf"] | {"mine": {"a": [1]}, "attention_dropout": 0.1}
    with pytest.warns(UserWarning, match="mine"):
        written = LlamaConfig.from_dict(raw).to_dict()
    for key, value in raw.items():
        if key not in ("rope_scaling", "torch_dtype"):  # spelled otherwise today
            assert written[key] == value, key
    assert written["dtype"] == "float16"


def test_unknown_keys_are_named_in_one_warning():
    with pytest.warns(UserWarning, match=r"attention_sinks, zebra$") as caught:
        LlamaConfig.from_dict({"zebra": 1, "attention_sinks": 4})
    assert len(caught) == 1
