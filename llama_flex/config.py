"""The configuration of a model: `config.json`, read strictly, and the sizes that follow from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import config_rules, formats
from .checkpoint.architectures import ARCHITECTURES, Architecture
from .checkpoint.config_rules import ConfigError, token_ids
from .checkpoint.rope_scaling import RopeParameters


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The hyperparameters of a model, under Hugging Face's key names and with LLaMA's defaults.

    If None, `num_key_value_heads` and `head_dim` are derived as in the reference (`num_attention_heads`,
    `hidden_size // num_attention_heads`). `layer_types`, where an architecture has it, names the layers with the window
    ("sliding_attention") and without it ("full_attention"). `is_causal=False` lets every token attend to every other.
    `dtype` is the checkpoint's own, as a string. `other` holds the keys of a config.json that have no effect here, so
    that `save_pretrained` can write them back. Raises ConfigError for malformed or unsupported values.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # derived in __post_init__
    head_dim: int = None  # type: ignore[assignment]  # derived in __post_init__
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    is_causal: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    dtype: str | None = None
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise ConfigError(f"model_type {self.model_type!r} is not supported; known: {', '.join(ARCHITECTURES)}")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", config_rules.derived_head_dim(self))
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
        config_rules.check_values(self, self.architecture.refused + self.architecture.ignored)
        self.rope_parameters.check(self.head_dim)

    @property
    def architecture(self) -> Architecture:
        """The architecture of this model type."""
        return ARCHITECTURES[self.model_type]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, `[L]`; None for those without."""
        types = self.layer_types or ("sliding_attention",) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in types)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a text; () if the checkpoint names none."""
        return token_ids("eos_token_id", self.eos_token_id)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LlamaConfig:
        """Read `folder/config.json`. Raises ConfigError naming what is malformed or unsupported."""
        path = Path(folder) / "config.json"
        raw = config_rules.read_config(path)
        try:
            return cls.from_dict(raw)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Build a config from the object in a `config.json`, with the rotary keys in either spelling.

        Raises ConfigError for an unsupported architecture or quantisation, and for a known key whose value would change
        the computation. Warns of keys that transformers' config class does not know either.
        """
        architecture = config_rules.architecture_of(raw)
        config_rules.check_supported(raw)
        formats.scheme_of(raw)

        names = {f.name for f in dataclasses.fields(cls)} - {"other", *architecture.ignored}
        fields = {**architecture.defaults, **{key: raw[key] for key in names if raw.get(key) is not None}}
        fields["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "num_key_value_heads"):
            if key in raw:  # an explicit null means none, not the default
                fields[key] = tuple(raw[key]) if isinstance(raw[key], list) else raw[key]
        fields |= config_rules.layer_types(raw, architecture, {"num_hidden_layers": cls.num_hidden_layers} | fields)
        fields["is_causal"] = raw.get("is_causal", True)  # null is refused: the reference's kernels disagree on it
        context = fields.get("max_position_embeddings", cls.max_position_embeddings)
        fields["rope_parameters"] = RopeParameters.from_config({**raw, "max_position_embeddings": context})

        read = {*names, *RopeParameters.CONFIG_KEYS, "torch_dtype"} - ({"is_causal"} if raw.get("is_causal") else set())
        fields["other"] = {key: value for key, value in raw.items() if key not in read}
        config_rules.warn_of_unknown(fields["other"], architecture)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the object to write as `config.json`; transformers and this package read it back."""
        known = self.architecture
        out: dict[str, Any] = {**self.other, "architectures": [known.name], "hidden_act": "silu"}
        unwritten = {"other", *known.refused, *known.ignored}
        unwritten |= {
            name for name, default in (("is_causal", True), ("layer_types", None)) if getattr(self, name) is default
        }
        out |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in unwritten}
        if self.layer_types is not None:
            out["layer_types"] = list(self.layer_types)
        if known.use_sliding_window:
            out["use_sliding_window"] = self.sliding_window is not None
            if self.layer_types is None and self.sliding_window is not None:
                out["max_window_layers"] = 0
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        return out | {"rope_parameters": self.rope_parameters.to_dict()}


class Dimensions(NamedTuple):
    """The sizes of a model, read from its modules: a tensor-parallel rank holds fewer heads than its config says."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    mlp_size: int
    vocab_size: int

    @property
    def kv_numbers_per_token(self) -> int:
        """The number of key and value elements per token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
