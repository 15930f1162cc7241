"""What a checkpoint says about itself: `config.json` and `generation_config.json`, read strictly."""

from __future__ import annotations

import dataclasses
import json
import math
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
# Keys that change the mathematics: accepted only with the values under which they change nothing. Some are read by no
# code of LLaMA, but by transformers' masks and caches (`attention_chunk_size`, `kv_sharing_modes`), or by every config
# (`per_layer_config`; `text_config` and its two other names, which would replace the whole of it).
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "layer_types": (None,),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None, {}),
    "text_config": (None,),
    "decoder": (None,),
    "generator": (None,),
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
# What other models of the same kinds are, and the way out.
OTHER_HEAD = "it ends in another head than the one that predicts tokens; give the model that it was made of"
DRAFT = "a draft model (EAGLE), which only proposes tokens to another; give the model that it drafts for"
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


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
    (`num_attention_heads`, `hidden_size // num_attention_heads`). `is_causal`: false lets every token attend to all
    others. `dtype` is the checkpoint's own, as a string. `other` holds the keys of a config.json that change nothing
    here, for `save_pretrained` to write back.
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
    is_causal: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    dtype: str | None = None
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "is_causal"):
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
        if not _is_number(self.rms_norm_eps) or not 0 <= self.rms_norm_eps < math.inf:
            raise ConfigError(f"rms_norm_eps must be a number of at least 0, found {self.rms_norm_eps!r}")
        _token_ids("eos_token_id", self.eos_token_id)
        for name in ("bos_token_id", "pad_token_id"):
            if type(getattr(self, name)) not in (int, type(None)):
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
        folder = Path(folder)
        path = folder / "config.json"
        if not folder.is_dir():
            raise ConfigError(
                f"{folder}: is a file; give the folder that holds config.json"
                if folder.exists()
                else f"{path}: no such file, nor its folder; give one that holds config.json"
            )
        if not os.path.lexists(path):
            raise ConfigError(f"{path}: no such file{files.what_it_is(files.names_in(folder))}")
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
        architecture = _architecture_of(raw)
        model_type = raw.get("model_type", "llama")
        for key in _QUANTIZATION_KEYS:
            if raw.get(key) is not None:
                raise ConfigError(_quantized(key, raw[key]))
        for key, neutral in _NEUTRAL_VALUES.items():
            if key in raw and raw[key] not in neutral:
                raise ConfigError(f"{key}={raw[key]!r} is not supported (only {neutral[0]!r})")

        ignored = _ONLY_LLAMA if model_type == "mistral" else ()
        names = {f.name for f in dataclasses.fields(cls)} - {"other", *ignored}
        fields = _ARCHITECTURES[model_type][1] | {name: raw[name] for name in names if raw.get(name) is not None}
        fields["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "num_key_value_heads"):
            if key in raw:  # an explicit null means none, not the default
                fields[key] = tuple(raw[key]) if isinstance(raw[key], list) else raw[key]
        fields["is_causal"] = raw.get("is_causal", True)  # null is neither, and the reference's kernels part over it
        context = fields.get("max_position_embeddings", cls.max_position_embeddings)
        fields["rope_parameters"] = RopeParameters.from_config({**raw, "max_position_embeddings": context})

        read = {*names, *RopeParameters.CONFIG_KEYS, "torch_dtype"} - ({"is_causal"} if raw.get("is_causal") else set())
        fields["other"] = {key: value for key, value in raw.items() if key not in read}
        inert = {*_INERT_KEYS, *_NEUTRAL_VALUES, *_QUANTIZATION_KEYS, "is_causal"}
        if unknown := sorted(fields["other"].keys() - inert):
            named = files.one_line(", ".join(unknown))
            warnings.warn(f"config.json has keys {architecture} does not use: {named}", stacklevel=2)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The object to write as `config.json`; transformers and this package read it back."""
        architecture, _ = _ARCHITECTURES[self.model_type]
        out: dict[str, Any] = {**self.other, "architectures": [architecture], "hidden_act": "silu"}
        unwritten = {"other", *self._unread, *(["is_causal"] if self.is_causal else [])}  # true is what all others are
        out |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in unwritten}
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        return out | {"rope_parameters": self.rope_parameters.to_dict()}


def _architecture_of(raw: Mapping[str, Any]) -> str:
    """The architecture that a config.json names. Raises ConfigError, with the way out, for one that is not computed.

    A base model, such as LlamaModel, is read as the causal one: whether an output matrix is there, its weights say.
    """
    model_type, architectures = raw.get("model_type", "llama"), raw.get("architectures")
    architecture, _ = _ARCHITECTURES.get(str(model_type), ("", {}))
    base = architecture.removesuffix("ForCausalLM") + "Model"
    if architecture and (architectures or [architecture]) in ([architecture], [base]):
        return architecture
    supported = " and ".join(name for name, _ in _ARCHITECTURES.values())
    reason = (
        f"architecture {architectures} (model_type {model_type!r}) is not supported; this package computes {supported}"
    )
    named = str(architectures[0]) if isinstance(architectures, list) else str(architectures)
    kin = [name.removesuffix("ForCausalLM") for name, _ in _ARCHITECTURES.values()]
    if "eagle" in named.lower() and any(name in named for name in kin):
        reason += f": {DRAFT}"
    elif named.startswith(tuple(kin)) and named.endswith(("Classification", "QuestionAnswering")):
        reason += f": {OTHER_HEAD}"
    elif architecture and (own := [kind for kind, (name, _) in _ARCHITECTURES.items() if name == named]):
        reason += f"; {named} goes with model_type {own[0]!r}"
    raise ConfigError(reason)


def _quantized(key: str, value: Any) -> str:
    """Why a quantised checkpoint is refused: its method, as far as the config says, and the way out."""
    value = value if isinstance(value, Mapping) else {}
    method = value.get("quant_method") or value.get("quant_type") or value.get("format")
    bits = value.get("bits") or next((n for n in (4, 8) if value.get(f"load_in_{n}bit")), None)
    kind = f"by {method!r}" * bool(method) + f" to {bits} bits" * bool(bits) or "by a method it does not name"
    return (
        f"{key}: the weights are quantised {kind}, which is not supported; give the checkpoint that they were made of "
        "(the model card names it), or dequantise them with the library that made them"
    )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The defaults a checkpoint recommends in `generation_config.json`; None where it says nothing.

    max_length: how many tokens a text may have in all, the prompt included; it caps the default number of new tokens.
    `other` holds all further keys, for `save_pretrained` to write back; None where there is no such file.
    """

    eos_token_id: int | tuple[int, ...] | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    other: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    # Keys whose other values would change the generated text in ways this package does not offer, with those that
    # change nothing besides null. What else transformers' GenerationConfig has is about beams, which num_beams turns
    # off, about what generate() returns, or about how it computes the same.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "num_return_sequences": (1,),
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1,),
        "typical_p": (1,),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "top_h": (),
        "penalty_alpha": (),
        "dola_layers": (),
        "diversity_penalty": (0,),
        "constraints": (),
        "force_words_ids": (),
        "min_length": (0,),
        "min_new_tokens": (0,),
        "max_time": (),
        "stop_strings": ([],),
        "bad_words_ids": (),
        "suppress_tokens": ([],),
        "begin_suppress_tokens": ([],),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "sequence_bias": (),
        "guidance_scale": (1,),
        "exponential_decay_length_penalty": (),
        "remove_invalid_values": (False,),
        "watermarking_config": (),
        "token_healing": (False,),
        "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window"),
        "is_assistant": (False,),
    }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GenerationConfig:
        """Read `folder/generation_config.json`; all defaults if there is none. Warns of settings it cannot honour."""
        path = Path(folder) / "generation_config.json"
        if not os.path.lexists(path):
            return cls()
        raw = read_json(path)
        if ignored := cls.not_neutral(raw):
            warnings.warn(f"{path}: not supported and ignored: {', '.join(ignored)}", stacklevel=2)
        names = {f.name for f in dataclasses.fields(cls)} - {"other"}
        values = {name: raw[name] for name in names if raw.get(name) is not None}
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        try:
            _token_ids("eos_token_id", values.get("eos_token_id"))
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
                if not _is_number(values.get(name, 0)):
                    raise ConfigError(f"{name} must be a number, found {values[name]!r}")
            for name in ("max_new_tokens", "max_length"):
                if name in values:
                    _require_size(name, values[name])
            if not isinstance(values.get("do_sample", False), bool):
                raise ConfigError(f"do_sample must be true or false, found {values['do_sample']!r}")
        except (ConfigError, RecursionError) as error:
            raise ConfigError(f"{path}: {error}") from None
        config = cls(**values)
        return dataclasses.replace(config, other={k: v for k, v in raw.items() if k not in config.to_dict()})

    @classmethod
    def not_neutral(cls, settings: Mapping[str, Any]) -> list[str]:
        """The keys of `settings` that would change generated text in ways this package does not offer."""
        return [key for key, neutral in cls.NEUTRAL.items() if settings.get(key) not in (None, *neutral)]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a text; () if the file names none."""
        return _token_ids("eos_token_id", self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The object to write as `generation_config.json`: what is set, and what was read but is not used here."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "other"}
        given = {
            n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if v is not None and v is not False
        }
        return {**(self.other or {}), **given}


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
