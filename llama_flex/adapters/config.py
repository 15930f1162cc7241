"""Rules for PEFT's `adapter_config.json`: the values accepted, and the modules, ranks and scales that follow.

A module's name here is the checkpoint's, such as "model.layers.0.self_attn.q_proj".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.config_rules import ConfigError, read_json, simple_pattern

CONFIG, ALL_LINEAR = "adapter_config.json", "all-linear"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MAX_RANK = 2**16
_NONE: tuple[Any, ...] = (None, False, [], {})
# Keys that change the computation, with the values that leave it LoRA's; unknown keys may have a value of _NONE.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none", None),
    # How the factors began. Of the others, some change the base model's weights too, which no file here holds.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Keys of no effect here: bookkeeping, training, and options of what another key would have to switch on.
_INERT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "revision"),
        *("corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "qalora_group_size"),
    }
)
_READ = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("modules_to_save", "layers_to_transform", "layers_pattern"),
)
_NAME = re.compile(r"\w+(\.\w+)*")
_MOST, _MOST_EXPRESSIONS = 20_000, 8  # entries of a list or pattern


class Pattern(NamedTuple):
    """Values by modules. named: the place in order and the value of names and ends of names, "^" before a whole name.
    expressions: those of regular expressions."""

    named: dict[str, tuple[int, Any]]
    expressions: list[tuple[re.Pattern[str], tuple[int, Any]]]

    @staticmethod
    def of(where: str, what: str, pattern: Any, read: Callable[[str, str, Any], Any]) -> Pattern:
        """Return the pattern of an object, its values read by a function. Raises ConfigError."""
        if not isinstance(pattern, Mapping) or len(pattern) > _MOST:
            raise ConfigError(f"{where}: {what} must be an object of names, found {pattern!r:.200}")
        found = Pattern({}, [])
        for n, (key, value) in enumerate(pattern.items()):
            entry = n, read(where, what, value)
            name = key.removesuffix("$").replace("\\.", ".")
            if _NAME.fullmatch(name.removeprefix("^")):
                found.named.setdefault(name, entry)
            else:
                simple_pattern(f"{where}: {what}", key)
                found.expressions.append((re.compile(rf"(.*\.)?({key})$"), entry))
        if len(found.expressions) > _MOST_EXPRESSIONS:
            raise ConfigError(
                f"{where}: {what} has more than {_MOST_EXPRESSIONS} regular expressions; name the modules"
            )
        return found

    def value_of(self, name: str, default: Any) -> Any:
        """Return the value of the first key that fits a module's name, as PEFT does."""
        entries = [self.named[key] for key in (f"^{name}", *_ends(name)) if key in self.named]
        entries += [entry for expression, entry in self.expressions if expression.match(name)]
        return min(entries, key=lambda entry: entry[0])[1] if entries else default


@dataclass(frozen=True)
class AdapterConfig:
    """An `adapter_config.json` that says what this package computes.

    raw: the whole object. rank, alpha: of all modules for which there is no pattern. rslora: scale by
    alpha / sqrt(rank), not alpha / rank. targets: the names or ends of names of the adapted modules; None: those in the
    file, as a regular expression of a stranger is not run. excluded: those left out of `targets`, None likewise. saved:
    ends of names of the modules that are replaced as a whole. layers: those adapted, None for all.
    """

    raw: Mapping[str, Any]
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern
    targets: frozenset[str] | None
    excluded: frozenset[str] | None
    saved: tuple[str, ...]
    layers: frozenset[int] | None

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read a folder's `adapter_config.json`. Raises ConfigError naming a key whose value is not supported."""
        path = folder / CONFIG
        return cls.of(read_json(path), str(path))

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str) -> AdapterConfig:
        """Return the config of an object. where: names it in errors. Raises ConfigError."""
        if "peft_type" not in raw:
            raise ConfigError(f"{where}: peft_type is missing; only LORA is supported")
        for key, value in raw.items():
            choices = _NEUTRAL.get(key, _NONE)
            if key not in _INERT and key not in _READ and not any(_is_same(value, choice) for choice in choices):
                raise ConfigError(f"{where}: {key}={value!r:.200} is not supported; only plain LoRA is")
        layers = raw.get("layers_to_transform")
        if layers is not None:
            numbers = _list(where, "layers_to_transform", layers if isinstance(layers, list) else [layers], int)
            pattern = raw.get("layers_pattern") or ["layers"]
            known = "layers" in _list(where, "layers_pattern", [pattern] if isinstance(pattern, str) else pattern, str)
            layers = (frozenset(numbers) if known else frozenset()) if numbers else None
        targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
        if not targets:
            raise ConfigError(f"{where}: target_modules must name the adapted modules, found {targets!r}")
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            names: frozenset[str] | None = frozenset({ALL_LINEAR})
        else:
            names = None if isinstance(targets, str) else frozenset(_list(where, "target_modules", targets, str))
        if isinstance(excluded, str) and excluded:
            left_out = None
        else:
            left_out = frozenset(_list(where, "exclude_modules", excluded or [], str))
        saved = _list(where, "modules_to_save", raw.get("modules_to_save") or [], str)
        if odd := [name for name in saved if not _NAME.fullmatch(name)]:
            raise ConfigError(f"{where}: modules_to_save: {odd[0]!r:.200} must be a name or the end of one")
        return cls(
            raw,
            _rank(where, "r", raw.get("r", 8)),
            _alpha(where, "lora_alpha", raw.get("lora_alpha", 8)),
            _one_of(where, "use_rslora", raw.get("use_rslora") or False, (True, False)),
            Pattern.of(where, "rank_pattern", raw.get("rank_pattern") or {}, _rank),
            Pattern.of(where, "alpha_pattern", raw.get("alpha_pattern") or {}, _alpha),
            names,
            left_out,
            tuple(saved),
            layers,
        )

    def is_saved(self, name: str) -> bool:
        """Return whether a module is replaced as a whole, by itself or with one that holds it."""
        parts = name.split(".")
        return any(".".join(parts[:n]).endswith(self.saved) for n in range(1, len(parts) + 1))

    def is_target(self, name: str, in_file: Container[str]) -> bool:
        """Return whether a module has an update. in_file: the modules of which the file holds one."""
        if self.targets is None or self.excluded is None:
            return name in in_file
        if not self.excluded.isdisjoint(_ends(name)) or any(f".{end}." in f".{name}." for end in self.saved):
            return False
        if ALL_LINEAR in self.targets:
            found = name not in (HEAD, EMBEDDING)
        else:
            found = not self.targets.isdisjoint(_ends(name))
        if self.layers is None or name in self.targets:
            return found
        parts = name.split(".")
        return found and parts[1:2] == ["layers"] and int(parts[2]) in self.layers

    def rank_of(self, name: str) -> int:
        """Return the rank of a module's update."""
        return self.rank_pattern.value_of(name, self.rank)

    def scale_of(self, name: str) -> float:
        """Return the factor of a module's update."""
        rank, alpha = self.rank_of(name), self.alpha_pattern.value_of(name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _ends(name: str) -> Iterator[str]:
    """Yield a name, and what follows each of its dots."""
    parts = name.split(".")
    return (".".join(parts[n:]) for n in range(len(parts)))


def _is_same(value: Any, choice: Any) -> bool:
    return type(value) is type(choice) and value == choice


def _one_of(where: str, key: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if not any(_is_same(value, choice) for choice in choices):
        raise ConfigError(f"{where}: {key} must be {' or '.join(map(repr, choices))}, found {value!r:.200}")
    return value


def _list(where: str, key: str, value: Any, kind: type) -> list[Any]:
    if not isinstance(value, list | tuple | set) or len(value) > _MOST or any(type(x) is not kind for x in value):
        raise ConfigError(f"{where}: {key} must be a list of {kind.__name__}, found {value!r:.200}")
    return list(value)


def _rank(where: str, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise ConfigError(f"{where}: {key} must be a rank from 1 to {MAX_RANK}, found {value!r:.200}")
    return value


def _alpha(where: str, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e6:
        raise ConfigError(f"{where}: {key} must be a number of at most a million, found {value!r:.200}")
    return float(value)
