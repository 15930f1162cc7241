"""The supported architectures, a row each: the keys of config.json, their defaults, the names of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """The differences between an architecture and LLaMA.

    weights: for each module, the checkpoint's modules that are stacked in its weight, in this order of rows
    (`layers.Linear.parts`). defaults: values of config.json that differ from LlamaConfig's. refused, ignored: keys that
    neither it nor transformers reads. A config.json that sets a refused key raises ConfigError, since its author would
    expect an effect. qkv_bias: q, k and v have biases, whatever `attention_bias` says. qk_norm: queries and keys are
    normalised, each head by itself. layer_types: config.json may have that key; without it, every layer has the window.
    use_sliding_window: the window applies only if that key is true, and from layer `max_window_layers` on.
    """

    name: str
    weights: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any] = {}
    refused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    layer_types: bool = False
    use_sliding_window: bool = False

    def modules(self, num_layers: int, tied: bool) -> list[tuple[str, list[str]]]:
        """Return the path of each module with weights, and the checkpoint's names of the modules stacked in it."""
        in_layers = [(layer, path) for layer in range(num_layers) for path in self.weights if "{}" in path]
        head = [] if tied else [(0, "lm_head")]
        return [
            (path.format(layer), [name.format(layer) for name in self.weights[path]])
            for layer, path in ((0, "embed"), (0, "norm"), *in_layers, *head)
        ]


_LLAMA = {
    "embed": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "layers.{}.attention": ("model.layers.{}.self_attn",),  # scales of keys and values, which few checkpoints have
    "layers.{}.attention.norm": ("model.layers.{}.input_layernorm",),
    "layers.{}.mlp.norm": ("model.layers.{}.post_attention_layernorm",),
    "layers.{}.attention.qkv": tuple(f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
    "layers.{}.attention.o": ("model.layers.{}.self_attn.o_proj",),
    "layers.{}.mlp.gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "layers.{}.mlp.down": ("model.layers.{}.mlp.down_proj",),
    "lm_head": ("lm_head",),
}
_QK_NORM = {f"layers.{{}}.attention.{name}": (f"model.layers.{{}}.self_attn.{name}",) for name in ("q_norm", "k_norm")}
_MISTRAL = Architecture(
    "MistralForCausalLM",
    _LLAMA,
    {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    ignored=("attention_bias", "mlp_bias"),
    layer_types=True,
)
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}
# By model_type.
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", _LLAMA, refused=("sliding_window",), ignored=("layer_types",)),
    "mistral": _MISTRAL,
    "ministral": _MISTRAL._replace(name="MinistralForCausalLM"),  # as transformers saves a Mistral with layer_types
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        _LLAMA,
        _QWEN,
        ignored=("attention_bias", "mlp_bias"),
        qkv_bias=True,
        layer_types=True,
        use_sliding_window=True,
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        _LLAMA | _QK_NORM,
        _QWEN | {"head_dim": 128},
        ignored=("mlp_bias",),
        qk_norm=True,
        layer_types=True,
        use_sliding_window=True,
    ),
}
