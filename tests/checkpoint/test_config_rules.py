"""What a config.json may say: values, architectures and files that are refused, each by name and with the way out."""

import json

import pytest
from config_helpers import read, write
from families import LLAMA_31_ROPE

from llama_flex import GenerationConfig, LlamaConfig
from llama_flex.checkpoint.architectures import ARCHITECTURES
from llama_flex.checkpoint.config_rules import ConfigError

WINDOWED = {"model_type": "qwen3", "num_hidden_layers": 2, "use_sliding_window": True}
COMPUTES = f"computes {', '.join(row.name for row in ARCHITECTURES.values())}$"
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "llama"}, "['MistralForCausalLM']"),
        ({"architectures": ["MistralForSequenceClassification"], "model_type": "mistral"}, "SequenceClassification"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": ["llama"]}, "['llama']"),
        ({"model_type": None}, "None"),
        ({"architectures": [], "model_type": None}, "architecture [] (model_type None)"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window"),
        ({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}, "Qwen2MoeForCausalLM"),
        ({"model_type": "qwen2_moe"}, "qwen2_moe"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
            "another head than the one that",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "quantised by 'hqq' to 4 bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 2}}, "quantization_config: bits=2 is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "activation_scheme is missing"),
        ({"quantization_config": {"load_in_8bit": True}}, "to 8 bits"),
        ({"quantization_config": {}}, "by a method it does not name"),
        ({"quantization_config": {"quant_method": "awq"}}, "give the checkpoint that they were made of"),
        ({"compression_config": {"format": "x"}}, "compression_config"),
        (
            {"quantization_config": {"quant_method": "fp8"}, "compression_config": {"quant_method": "x"}},
            "quantization_config and compression_config differ",
        ),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types must name 'full_attention' for each of 32 layers"),
        ({"layer_types": ["full_attention"]}, "layer_types must name 'full_attention' for each of 32 layers"),
        ({"layer_types": "full_attention"}, "layer_types must be a list of names, found 'full_attention'"),
        (WINDOWED | {"layer_types": ["full_attention"]}, "for each of 2 layers, found ['full_attention']"),
        (WINDOWED | {"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        (WINDOWED | {"layer_types": ["full_attention", 1]}, "found ['full_attention', 1]"),
        (WINDOWED | {"layer_types": ["full_attention", ["full_attention"]]}, "layer_types must name"),
        (WINDOWED | {"use_sliding_window": "false"}, "use_sliding_window must be true or false, found 'false'"),
        (WINDOWED | {"use_sliding_window": 1}, "use_sliding_window must be true or false, found 1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "by layer type ('full_attention') are not"),
        (WINDOWED | {"layer_types": {"0": "full_attention"}}, "layer_types must be a list of names"),
        (
            WINDOWED | {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2},
            "use_sliding_window is not",
        ),
        (WINDOWED | {"max_window_layers": "1"}, "max_window_layers must be a whole number, found '1'"),
        (WINDOWED | {"max_window_layers": True}, "max_window_layers"),
        (WINDOWED | {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than"),
        *(
            ({"model_type": kind, "num_hidden_layers": number}, "num_hidden_layers")
            for kind in ARCHITECTURES
            for number in ("32", 4.5, [2], {}, 10**30, 2**31 - 1)
        ),
        (WINDOWED | {"sliding_window": -1}, "sliding_window"),
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
        ({"rope_scaling": LLAMA_31_ROPE | {"high_freq_factor": None}}, "high_freq_factor"),
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
def test_configs_that_would_be_computed_wrongly_are_refused_by_name(raw, named, tmp_path):
    with pytest.raises(ValueError, match=r".") as caught:
        LlamaConfig.from_dict(raw)
    assert named in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_pretrained(write(tmp_path, raw))
    message = str(caught.value)
    assert named in message
    assert str(tmp_path / "config.json") in message
    assert "\n" not in message


@pytest.mark.parametrize("given", [None, 0, 1, "false"])
def test_a_config_on_which_transformers_attention_functions_disagree_is_refused(given):
    """Check values of is_causal on which transformers' attention functions disagree: with null eager attention looks
    both ways and sdpa, the default, one way; with 0 sdpa raises a TypeError."""
    with pytest.raises(ConfigError, match=f"is_causal must be true or false, found {given!r}"):
        read({"is_causal": given})


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
    # Making that many modules, even on the meta device, would fill the memory before any weight is looked at.
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        LlamaConfig.from_dict({"num_hidden_layers": 2**31 - 1})


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
        (
            "LlamaForCausalLMVec",
            "llama",
            COMPUTES,
        ),  # unknown
        (
            "LlamaBiModel",
            "llama",
            COMPUTES,
        ),
        (
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            COMPUTES,
        ),
        (
            "BertForQuestionAnswering",
            "bert",
            COMPUTES,
        ),
        (
            "Eagle2_5_VLForConditionalGeneration",
            "eagle_2_5_vl",
            COMPUTES,
        ),
        (
            "LlamaForCausalLM",
            "eagle",
            COMPUTES,
        ),
    ],
)
def test_another_architecture_is_refused_with_a_hint_from_its_name(named, model_type, said):
    with pytest.raises(ConfigError, match=rf"architecture \['{named}'\] \(model_type '{model_type}'\).*{said}"):
        read({"architectures": [named], "model_type": model_type})


# ---- files that are not configurations


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
        (absent, "y/config.json: no such file or folder"),
        (tmp_path / "gone" / "x", "x/config.json: no such file or folder"),
        ("a\0b", "no such file or folder"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            LlamaConfig.from_pretrained(path)
        assert str(caught.value).isprintable()
