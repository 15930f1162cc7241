"""The families of checkpoints that are covered: config.json of one checkpoint each, and tiny models of the same kind.

Each is as published, without the keys that say nothing about the mathematics.
"""

import copy
from typing import Any

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}
LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def sizes(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, context: int, eps: float = 1e-5
) -> dict[str, Any]:
    """Return the keys of the sizes."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
    }


def _without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


# name -> (what is special, config.json)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 1 7B": (
        "no num_key_value_heads; rms_norm_eps 1e-6",
        LLAMA | _without(sizes(4096, 32, 32, 32, 11008, 32000, 2048, 1e-6), "num_key_value_heads"),
    ),
    "Llama 2 7B": (
        "rope_scaling null",
        LLAMA | sizes(4096, 32, 32, 32, 11008, 32000, 4096) | {"rope_scaling": None},
    ),
    "Llama 2 70B": ("groups of 8 heads", LLAMA | sizes(8192, 80, 64, 8, 28672, 32000, 4096)),
    "Llama 3 8B": (
        "rope_theta 500,000; a vocabulary of 128,256",
        LLAMA
        | sizes(4096, 32, 32, 8, 14336, 128256, 8192)
        | {"rope_theta": 500000.0, "eos_token_id": [128001, 128009]},
    ),
    "Llama 3.1 8B": (
        'rope_scaling "llama3"',
        LLAMA
        | sizes(4096, 32, 32, 8, 14336, 128256, 131072)
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA_31_ROPE, "attention_bias": False, "mlp_bias": False},
    ),
    "Llama 3.2 1B": (
        "tied embeddings; head_dim 64 written out; factor 32",
        LLAMA
        | sizes(2048, 16, 32, 8, 8192, 128256, 131072)
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA_31_ROPE | {"factor": 32.0}}
        | {"head_dim": 64, "tie_word_embeddings": True},
    ),
    "Llama 3.2 3B": (
        "groups of 3 heads (24/8)",
        LLAMA
        | sizes(3072, 28, 24, 8, 8192, 128256, 131072)
        | {"rope_parameters": LLAMA_31_ROPE | {"factor": 32.0, "rope_theta": 500000.0}}
        | {"head_dim": 128, "tie_word_embeddings": True},
    ),
    "Llama 3.3 70B": (
        "groups of 8 heads and llama3 scaling",
        LLAMA
        | sizes(8192, 80, 64, 8, 28672, 128256, 131072)
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA_31_ROPE, "head_dim": 128},
    ),
    "CodeLlama 7B": (
        "rope_theta 1,000,000; a vocabulary of 32,016",
        LLAMA | sizes(4096, 32, 32, 32, 11008, 32016, 16384) | {"rope_theta": 1000000, "rope_scaling": None},
    ),
    "TinyLlama 1.1B": ("groups of 8 heads (32/4)", LLAMA | sizes(2048, 22, 32, 4, 5632, 32000, 2048)),
    "SmolLM 135M": (
        "9 heads of 64, 3 of keys; tied",
        LLAMA | sizes(576, 30, 9, 3, 1536, 49152, 2048) | {"rope_theta": 10000.0, "tie_word_embeddings": True},
    ),
    "SmolLM2 135M": (
        "rope_theta 100,000; rope_interleaved false; is_llama_config",
        LLAMA
        | sizes(576, 30, 9, 3, 1536, 49152, 8192)
        | {"rope_theta": 100000, "tie_word_embeddings": True, "rope_interleaved": False, "is_llama_config": True},
    ),
    "OpenLLaMA 3B": (
        "head_dim 100",
        LLAMA | _without(sizes(3200, 26, 32, 32, 8640, 32000, 2048, 1e-6), "num_key_value_heads"),
    ),
    "Vicuna 13B v1.5 16k": (
        'rope_scaling "linear" in the old spelling',
        LLAMA | sizes(5120, 40, 40, 40, 13824, 32000, 4096) | {"rope_scaling": {"factor": 4.0, "type": "linear"}},
    ),
    "Yi 34B": (
        "groups of 7 heads (56/8); rope_theta 5,000,000",
        LLAMA | sizes(7168, 60, 56, 8, 20480, 64000, 4096) | {"rope_theta": 5000000.0},
    ),
    "DeepSeek-LLM 67B": (
        "95 layers; a vocabulary of 102,400",
        LLAMA | sizes(8192, 95, 64, 8, 22016, 102400, 4096, 1e-6) | {"rope_theta": 10000.0},
    ),
    "DeepSeek-Coder 6.7B": (
        "linear scaling of a large rope_theta",
        LLAMA
        | sizes(4096, 32, 32, 32, 11008, 32256, 16384, 1e-6)
        | {"rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    ),
    "Llama with dynamic NTK": (
        'rope_scaling "dynamic"',
        LLAMA | sizes(4096, 32, 32, 32, 11008, 32000, 4096) | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "YaRN Llama 2 7B 64k": (
        'rope_scaling "yarn"; its attention factor',
        LLAMA
        | sizes(4096, 32, 32, 32, 11008, 32000, 65536)
        | {"rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}},
    ),
    "Llama with LongRoPE": (
        'rope_scaling "longrope"; the trained length beside it, as Phi-3 has it',
        LLAMA
        | sizes(3072, 32, 32, 32, 8192, 32064, 131072)
        | {"original_max_position_embeddings": 4096}
        | {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1 + 0.01 * p for p in range(48)],
                "long_factor": [1 + 0.5 * p for p in range(48)],
            }
        },
    ),
    "Mistral 7B v0.1": (
        "a sliding window of 4,096",
        MISTRAL | sizes(4096, 32, 32, 8, 14336, 32000, 32768) | {"rope_theta": 10000.0, "sliding_window": 4096},
    ),
    "Mistral 7B v0.2": (
        "sliding_window null; rope_theta 1,000,000",
        MISTRAL | sizes(4096, 32, 32, 8, 14336, 32000, 32768) | {"rope_theta": 1000000.0, "sliding_window": None},
    ),
    "Mistral 7B v0.3": (
        "a vocabulary of 32,768; head_dim null",
        MISTRAL
        | sizes(4096, 32, 32, 8, 14336, 32768, 32768)
        | {"rope_theta": 1000000.0, "sliding_window": None, "head_dim": None},
    ),
    "Ministral 8B": (
        "layer_types with and without the window",
        MISTRAL
        | sizes(4096, 36, 32, 8, 12288, 131072, 32768)
        | {"rope_theta": 100000000.0, "sliding_window": 32768, "head_dim": 128}
        | {"layer_types": ["full_attention", *["sliding_attention"] * 3] * 9},
    ),
    "Qwen2 0.5B": (
        "biases of q, k and v; tied; groups of 7 heads (14/2); a window that is not used",
        QWEN2
        | sizes(896, 24, 14, 2, 4864, 151936, 131072, 1e-6)
        | {"rope_theta": 1000000.0, "tie_word_embeddings": True}
        | {"sliding_window": 131072, "max_window_layers": 24, "use_sliding_window": False},
    ),
    "Qwen2.5 7B": (
        "untied; a vocabulary of 152,064",
        QWEN2
        | sizes(3584, 28, 28, 4, 18944, 152064, 131072, 1e-6)
        | {"rope_theta": 1000000.0, "tie_word_embeddings": False}
        | {"sliding_window": 131072, "max_window_layers": 28, "use_sliding_window": False},
    ),
    "DeepSeek-R1-Distill-Qwen 1.5B": (
        "use_mrope false; groups of 6 heads (12/2)",
        QWEN2
        | sizes(1536, 28, 12, 2, 8960, 151936, 131072, 1e-6)
        | {"rope_theta": 10000, "tie_word_embeddings": False, "use_mrope": False}
        | {"sliding_window": 4096, "max_window_layers": 21, "use_sliding_window": False},
    ),
    "Qwen2.5 with YaRN": (
        'rope_scaling "yarn" over biases',
        QWEN2
        | sizes(3584, 28, 28, 4, 18944, 152064, 32768, 1e-6)
        | {"rope_theta": 1000000.0, "use_sliding_window": False}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    ),
    "Qwen2 with a window above": (
        "use_sliding_window; the window is that of the layers from max_window_layers on",
        QWEN2
        | sizes(3584, 28, 28, 4, 18944, 152064, 131072, 1e-6)
        | {"rope_theta": 1000000.0, "sliding_window": 4096, "max_window_layers": 14, "use_sliding_window": True},
    ),
    "Qwen3 0.6B": (
        "q and k norms; head_dim 128 of a hidden size of 1,024; tied",
        QWEN3
        | sizes(1024, 28, 16, 8, 3072, 151936, 40960, 1e-6)
        | {"rope_theta": 1000000, "head_dim": 128, "attention_bias": False, "tie_word_embeddings": True}
        | {"sliding_window": None, "max_window_layers": 28, "use_sliding_window": False, "rope_scaling": None},
    ),
    "Qwen3 8B": (
        "q and k norms; untied",
        QWEN3
        | sizes(4096, 36, 32, 8, 12288, 151936, 40960, 1e-6)
        | {"rope_theta": 1000000, "head_dim": 128, "attention_bias": False, "tie_word_embeddings": False}
        | {"sliding_window": None, "max_window_layers": 36, "use_sliding_window": False},
    ),
    "Qwen3 saved by transformers 5": (
        "layer_types written out",
        QWEN3
        | sizes(2560, 36, 32, 8, 9728, 151936, 262144, 1e-6)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000000}, "head_dim": 128}
        | {"sliding_window": None, "max_window_layers": 36, "use_sliding_window": False}
        | {"layer_types": ["full_attention"] * 36, "tie_word_embeddings": True},
    ),
    "Qwen3 with a window in some layers": (
        "layer_types with both; biases of q, k, v and o",
        QWEN3
        | sizes(2560, 36, 32, 8, 9728, 151936, 262144, 1e-6)
        | {"rope_theta": 5000000, "head_dim": 128, "attention_bias": True}
        | {"sliding_window": 4096, "use_sliding_window": True}
        | {"layer_types": ["sliding_attention", "full_attention"] * 18},
    ),
}
TRAINED, WINDOW, CONTEXT = 128, 96, 512  # tokens, of the tiny twins


def tiny(name: str) -> dict[str, Any]:
    """Return a family's config.json for two small layers and short lengths.

    It keeps the family's keys, how many heads share a key, and whether the vocabulary is a multiple of 64.
    """
    config = copy.deepcopy(FAMILIES[name][1])
    heads = config["num_attention_heads"]
    group = heads // config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    few = max(config.get("num_key_value_heads", heads) % 4, 2)  # 3 of SmolLM's, 2 of others'
    small = {100: 36, 96: 48}.get(head_dim, 32)
    config |= sizes(small * few * group, 2, few * group, few, 160, 256 + config["vocab_size"] % 64, CONTEXT)
    config["rms_norm_eps"] = FAMILIES[name][1]["rms_norm_eps"]
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    if "num_key_value_heads" not in FAMILIES[name][1]:
        del config["num_key_value_heads"]
    if config.get("head_dim"):
        config["head_dim"] = small
    if config.get("sliding_window"):
        config["sliding_window"] = WINDOW
    if "max_window_layers" in config:
        config["max_window_layers"] = 1
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for place in (config, scaling):
        if "original_max_position_embeddings" in place:
            place["original_max_position_embeddings"] = TRAINED
    for key in ("short_factor", "long_factor"):
        if key in scaling:
            scaling[key] = scaling[key][: small // 2]
    return config


def shape(heads: int, kv_heads: int, head_dim: int, **others: Any) -> dict[str, Any]:
    """Return a tiny config.json with these heads."""
    config = LLAMA | sizes(16 * heads, 2, heads, kv_heads, 96, 200, CONTEXT) | {"head_dim": head_dim}
    return config | {"bos_token_id": 1, "eos_token_id": 2} | others


# Shapes that kernels have to divide and to pad.
SHAPES: dict[str, dict[str, Any]] = {
    **{f"head_dim {d}": shape(4, 2, d) for d in (36, 48, 72, 80, 96, 112, 160, 192, 256)},
    **{f"groups of {g}": shape(g * k, k, 32) for g, k in ((1, 3), (3, 2), (4, 2), (7, 2), (8, 2), (32, 1))},
    "a vocabulary of 509": shape(4, 2, 32, vocab_size=509),
    "tied, a vocabulary of 510": shape(4, 2, 32, vocab_size=510, tie_word_embeddings=True),
    "biases": shape(4, 2, 32, attention_bias=True, mlp_bias=True),
    "odd sizes": shape(5, 5, 34, intermediate_size=97, vocab_size=131, hidden_size=75),
}
