"""Rules for a `config.json`: the keys, values, architectures and formats accepted, and errors that say what to do."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES, Architecture
from .files import FolderError, names_in, one_line, read, what_it_is

# config.json is a few kilobytes; anything much larger is not one, and takes 25 times its size in memory when parsed.
MAX_JSON_BYTES = 4 * 2**20
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 512  # building the modules of so many takes a second
_MOST_REPEATS, _MOST_CHOICES = 3, 2  # in a pattern of a stranger's: with more, a match could take minutes
MAX_WEIGHTS = 2**48  # elements of one matrix; with more, counting bytes would overflow

# Keys that have no effect at inference: bookkeeping, training, or how transformers runs the model.
INERT_KEYS = frozenset(
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
# Keys that change the computation: accepted only with values that have no effect. Some are read not by LLaMA's code but
# by transformers' masks and caches (`attention_chunk_size`, `kv_sharing_modes`), or by every config
# (`per_layer_config`; `text_config` and its two other names, which would replace the whole config).
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
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
    "use_mrope": (False, None),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"  # of layer_types
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Explanations of related models that are refused, and what to give instead.
OTHER_HEAD = "it ends in another head than the one that predicts tokens; give the model that it was made of"
DRAFT = "a draft model (EAGLE), which only proposes tokens to another; give the model that it drafts for"


class ConfigError(FolderError):
    """A configuration that is malformed, or describes a model this package would not compute exactly."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises ConfigError naming it if it is absent, too large or not an object."""
    try:
        value = json.loads(read(path, MAX_JSON_BYTES).decode("utf-8"))
    except FolderError as error:
        raise ConfigError(error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def simple_pattern(where: str, pattern: str, prefix: str = "") -> re.Pattern[str]:
    """Compile a pattern that matches soon, whatever it is. Raises ConfigError for others, and for no pattern.

    where, prefix: name it in errors, and stand before it there.
    """
    simple = re.fullmatch(r"[\w .*+^$|()\[\]\\-]{,200}", pattern) and not re.search(r"\)[*+]|\[\[|--|\|\|", pattern)
    if not simple or sum(map(pattern.count, "*+")) > _MOST_REPEATS or pattern.count("(") > _MOST_CHOICES:
        raise ConfigError(f"{where} has '{prefix}{pattern:.200}', a pattern that is not supported; name the modules")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where} has '{prefix}{pattern:.200}', which is no pattern ({error})") from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json. Raises ConfigError, saying what the folder holds instead, if there is none."""
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: is a file; give the folder that holds config.json"
            if folder.exists()
            else f"{path}: no such file or folder; give a folder that holds config.json"
        )
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: no such file{what_it_is(names_in(folder))}")
    return read_json(path)


def derived_head_dim(config: Any) -> int:
    """Return the head dim of a LlamaConfig that has none. Raises ConfigError if heads do not divide the hidden size."""
    for name in ("hidden_size", "num_attention_heads"):
        require_size(name, getattr(config, name))
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_attention_heads}; "
            "give head_dim explicitly"
        )
    return int(config.hidden_size // config.num_attention_heads)


def check_values(config: Any, unread: Iterable[str]) -> None:
    """Raise ConfigError for malformed values of a LlamaConfig. unread: keys that its architecture does not read."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        require_size(name, getattr(config, name))
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        require_size(name, getattr(config, name))
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "is_causal"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be true or false, found {getattr(config, name)!r}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if config.head_dim % 2:
        raise ConfigError(f"head_dim={config.head_dim} is odd; rotary embeddings need an even number")
    if config.sliding_window is not None:
        require_size("sliding_window", config.sliding_window)
    for name in unread:
        if getattr(config, name):
            raise ConfigError(f"{name}={getattr(config, name)!r} is not supported for model_type {config.model_type!r}")
    if not is_number(config.rms_norm_eps) or not 0 <= config.rms_norm_eps < math.inf:
        raise ConfigError(f"rms_norm_eps must be a number of at least 0, found {config.rms_norm_eps!r}")
    token_ids("eos_token_id", config.eos_token_id)
    for name in ("bos_token_id", "pad_token_id"):
        if type(getattr(config, name)) not in (int, type(None)):
            raise ConfigError(f"{name} must be a token id, found {getattr(config, name)!r}")
    if config.num_hidden_layers > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers={config.num_hidden_layers} is more than {MAX_LAYERS}")
    if not isinstance(config.dtype, str | None):
        raise ConfigError(f"dtype must be a name, found {config.dtype!r}")
    if config.layer_types is not None:
        _check_layer_types(config.layer_types, config.num_hidden_layers, (_FULL, _SLIDING))
        if _SLIDING in config.layer_types and config.sliding_window is None:
            raise ConfigError(
                f"layer_types has {_SLIDING!r}, but sliding_window is null, or use_sliding_window is not true"
            )
    rows = max(config.vocab_size, 2 * config.intermediate_size, (heads + 2 * kv_heads) * config.head_dim)
    if rows * config.hidden_size > MAX_WEIGHTS:
        raise ConfigError(f"a weight of shape {rows} x {config.hidden_size} is too large for any memory")


def check_supported(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError for a known key whose value would change the computation."""
    for key, neutral in NEUTRAL_VALUES.items():
        if key in raw and raw[key] not in neutral:
            raise ConfigError(f"{key}={raw[key]!r} is not supported (only {neutral[0]!r})")


def layer_types(raw: Mapping[str, Any], architecture: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `layer_types`, and `sliding_window` where that depends on another key, as the reference derives them.

    fields: what has been read, defaults included. Raises ConfigError for malformed values, and for types that an
    architecture does not read, unless they change nothing.
    """
    types = None if raw.get("layer_types") is None else _renamed(raw["layer_types"])
    if not architecture.layer_types:
        if types is not None:
            _check_layer_types(types, fields["num_hidden_layers"], (_FULL,))
        return {}
    found: dict[str, Any] = {} if types is None else {"layer_types": types}
    if not architecture.use_sliding_window:
        return found
    if not isinstance(used := raw.get("use_sliding_window"), bool | None):
        raise ConfigError(f"use_sliding_window must be true or false, found {used!r}")
    if not used:
        found["sliding_window"] = None
    elif types is None and fields["sliding_window"] is not None:
        require_size("num_hidden_layers", fields["num_hidden_layers"])
        first = raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(f"max_window_layers must be a whole number, found {first!r}")
        if first > 0:  # else the window is that of all layers
            layers = range(min(fields["num_hidden_layers"], MAX_LAYERS + 1))  # more are refused later
            found["layer_types"] = tuple(_FULL if layer < first else _SLIDING for layer in layers)
    return found


def _renamed(types: Any) -> tuple[Any, ...]:
    """Return layer types under the names of transformers 5. Raises ConfigError for anything but a list."""
    if not isinstance(types, list):
        raise ConfigError(f"layer_types must be a list of names, found {types!r}")
    return tuple(_FULL if kind == "attention" else kind for kind in types)


def _check_layer_types(types: tuple[Any, ...], num_layers: Any, supported: tuple[str, ...]) -> None:
    """Raise ConfigError unless there is a supported type for each layer."""
    if len(types) != num_layers or not all(kind in supported for kind in types):
        names = " or ".join(map(repr, supported))
        raise ConfigError(f"layer_types must name {names} for each of {num_layers} layers, found {list(types)!r:.200}")


def warn_of_unknown(keys: Iterable[str], architecture: Architecture) -> None:
    """Warn of keys that no field reads and that transformers' config class does not know either."""
    known = {*INERT_KEYS, *NEUTRAL_VALUES, *QUANTIZATION_KEYS, "is_causal", "layer_types"}
    if architecture.use_sliding_window:
        known |= {"use_sliding_window", "max_window_layers"}
    if unknown := sorted(set(keys) - known):
        named = one_line(", ".join(unknown))
        warnings.warn(f"config.json has keys {architecture.name} does not use: {named}", stacklevel=3)


def architecture_of(raw: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json. Raises ConfigError, saying what to do, for one that is not known.

    A base model, such as LlamaModel, is read as its causal language model: the weights tell whether there is an output
    matrix.
    """
    model_type, architectures = raw.get("model_type", "llama"), raw.get("architectures")
    known = {kind: row.name for kind, row in ARCHITECTURES.items()}
    architecture = known.get(str(model_type), "")
    base = architecture.removesuffix("ForCausalLM") + "Model"
    if architecture and (architectures or [architecture]) in ([architecture], [base]):
        return ARCHITECTURES[str(model_type)]
    supported = ", ".join(known.values())
    reason = (
        f"architecture {architectures} (model_type {model_type!r}) is not supported; this package computes {supported}"
    )
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else str(architectures)
    kin = tuple(name.removesuffix("CausalLM") for name in known.values())  # "LlamaFor", ...
    if "eagle" in named.lower() and any(name in named for name in kin):
        reason += f": {DRAFT}"
    elif named.startswith(kin) and named.endswith(("Classification", "QuestionAnswering")):
        reason += f": {OTHER_HEAD}"
    elif architecture and (own := [kind for kind, name in known.items() if name == named]):
        reason += f"; {named} goes with model_type {own[0]!r}"
    raise ConfigError(reason)


def is_number(value: Any) -> bool:
    """Return whether a value is a JSON number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_size(name: str, value: Any) -> None:
    """Raise ConfigError unless a value is a whole number from 1 to MAX_SIZE."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise ConfigError(f"{name} must be a whole number from 1 to {MAX_SIZE}, found {value!r}")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return a token id, a tuple of them or None as a tuple. Raises ConfigError for anything else."""
    ids = () if value is None else value if isinstance(value, tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{name} must be a token id or a list of them, found {value!r}")
    return ids
