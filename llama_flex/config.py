"""What a checkpoint says about itself: `config.json` and `generation_config.json`, read strictly."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from . import files
from .rope import RopeParameters

# config.json is a few kilobytes; anything much larger is not one, and takes 25 times its size when parsed.
MAX_JSON_BYTES = 4 * 2**20
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 512  # making the modules of so many takes a second

# Keys that say nothing about what is computed at inference: bookkeeping, training, or the way transformers runs it.
_INERT_KEYS = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token",
        "chunk_size_feed_forward",
        "eos_token",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
        "use_return_dict",
    }
)
# Keys that change the mathematics: accepted only with the values under which they change nothing.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "compression_config": (None,),
    "layer_types": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
}


# model_type -> (the architecture of a language model, its keys' defaults where they differ from LlamaConfig's)
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": (
        "MistralForCausalLM",
        {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
}
# The keys that only one of them reads.
_ONLY_LLAMA, _ONLY_MISTRAL = ("attention_bias", "mlp_bias"), ("sliding_window",)


class ConfigError(files.FolderError):
    """A configuration that is malformed, or describes a model this package would not compute exactly."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError naming the file if it is absent, too large or not an object."""
    try:
        value = json.loads(files.read(path, MAX_JSON_BYTES).decode("utf-8"))
    except files.FolderError as error:
        raise ConfigError(error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The numbers that define a LLaMA or Mistral, under Hugging Face's key names and with LLaMA's defaults.

    `num_key_value_heads` and `head_dim` may be None and are then derived as the reference derives them
    (`num_attention_heads`, `hidden_size // num_attention_heads`). `dtype` is the checkpoint's own, as a string.
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
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.model_type not in _ARCHITECTURES:
            raise ConfigError(f"model_type {self.model_type!r} is not supported; known: {', '.join(_ARCHITECTURES)}")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            _require_size(name, getattr(self, name))
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; give head_dim explicitly"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
            _require_size(name, getattr(self, name))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")
        self.rope_parameters.check(self.head_dim)
        if self.sliding_window is not None:
            _require_size("sliding_window", self.sliding_window)
        for name in self._unread:
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not supported for model_type {self.model_type!r}")
        if not _is_number(self.rms_norm_eps) or not 0 <= self.rms_norm_eps < 1:
            raise ConfigError(f"rms_norm_eps must be a small number, found {self.rms_norm_eps!r}")
        _token_ids("eos_token_id", self.eos_token_id)
        for name in ("bos_token_id", "pad_token_id"):
            if not isinstance(getattr(self, name), int | None):
                raise ConfigError(f"{name} must be a token id, found {getattr(self, name)!r}")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ConfigError(f"num_hidden_layers={self.num_hidden_layers} is more than {MAX_LAYERS}")
        if not isinstance(self.dtype, str | None):
            raise ConfigError(f"dtype must be a name, found {self.dtype!r}")

    @property
    def _unread(self) -> tuple[str, ...]:
        """Keys that the architecture does not read."""
        return _ONLY_MISTRAL if self.model_type == "llama" else _ONLY_LLAMA

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a text; () if the checkpoint names none."""
        return _token_ids("eos_token_id", self.eos_token_id)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LlamaConfig:
        """Read `folder/config.json`. Raises ConfigError naming what is malformed or not supported."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Build from the object in a `config.json`, in either spelling of the rotary keys.

        Raises ConfigError for another architecture and for every known key whose value would change the
        mathematics. Keys that transformers' LlamaForCausalLM does not know either are named in a warning.
        """
        model_type, architectures = raw.get("model_type", "llama"), raw.get("architectures")
        architecture, defaults = _ARCHITECTURES.get(str(model_type), ("", {}))
        if not architecture or (architectures or [architecture]) != [architecture]:
            supported = " and ".join(name for name, _ in _ARCHITECTURES.values())
            raise ConfigError(
                f"architecture {architectures} (model_type {model_type!r}) is not supported; this package computes "
                f"{supported}"
            )
        for key, neutral in _NEUTRAL_VALUES.items():
            if key in raw and raw[key] not in neutral:
                raise ConfigError(f"{key}={raw[key]!r} is not supported (only {neutral[0]!r})")

        ignored = _ONLY_LLAMA if model_type == "mistral" else ()
        names = [f.name for f in dataclasses.fields(cls) if f.name not in ignored]
        fields = defaults | {name: raw[name] for name in names if raw.get(name) is not None}
        fields["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "num_key_value_heads"):
            if key in raw:  # an explicit null means none, not the default
                fields[key] = tuple(raw[key]) if isinstance(raw[key], list) else raw[key]
        context = fields.get("max_position_embeddings", cls.max_position_embeddings)
        fields["rope_parameters"] = RopeParameters.from_config({**raw, "max_position_embeddings": context})

        known = {*names, *_INERT_KEYS, *_NEUTRAL_VALUES, *RopeParameters.CONFIG_KEYS, "torch_dtype"}
        if unknown := sorted(set(raw) - known):
            named = files.one_line(", ".join(unknown))
            warnings.warn(f"config.json has keys {architecture} does not use: {named}", stacklevel=2)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The object to write as `config.json`; transformers and this package read it back."""
        architecture, _ = _ARCHITECTURES[self.model_type]
        out: dict[str, Any] = {"architectures": [architecture], "hidden_act": "silu"}
        out |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self._unread}
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        return out | {"rope_parameters": self.rope_parameters.to_dict()}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The defaults a checkpoint recommends in `generation_config.json`; None where it says nothing."""

    eos_token_id: int | tuple[int, ...] | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    # Keys whose other values would change the generated text in ways this package does not offer.
    _NEUTRAL: ClassVar[dict[str, Any]] = {
        "num_beams": 1,
        "num_beam_groups": 1,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "penalty_alpha": None,
        "min_length": 0,
        "min_new_tokens": None,
        "bad_words_ids": None,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "sequence_bias": None,
        "guidance_scale": None,
        "top_h": None,
        "stop_strings": None,
        "exponential_decay_length_penalty": None,
    }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GenerationConfig:
        """Read `folder/generation_config.json`; all defaults if there is none. Warns of settings it cannot honour."""
        path = Path(folder) / "generation_config.json"
        if not os.path.lexists(path):
            return cls()
        raw = read_json(path)
        ignored = [key for key, neutral in cls._NEUTRAL.items() if raw.get(key) not in (None, neutral)]
        if ignored:
            warnings.warn(f"{path}: not supported and ignored: {', '.join(ignored)}", stacklevel=2)
        values = {f.name: raw[f.name] for f in dataclasses.fields(cls) if raw.get(f.name) is not None}
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        try:
            _token_ids("eos_token_id", values.get("eos_token_id"))
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
                if not _is_number(values.get(name, 0)):
                    raise ConfigError(f"{name} must be a number, found {values[name]!r}")
            if "max_new_tokens" in values:
                _require_size("max_new_tokens", values["max_new_tokens"])
        except (ConfigError, RecursionError) as error:
            raise ConfigError(f"{path}: {error}") from None
        return cls(**values)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a text; () if the file names none."""
        return _token_ids("eos_token_id", self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The object to write as `generation_config.json`: only what is set."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if v is not None and v is not False
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise ConfigError(f"{name} must be a whole number from 1 to {MAX_SIZE}, found {value!r}")


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = () if value is None else value if isinstance(value, tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{name} must be a token id or a list of them, found {value!r}")
    return ids
