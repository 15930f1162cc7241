"""The defaults that a checkpoint recommends for generation: `generation_config.json`, read strictly."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .config_rules import ConfigError, is_number, read_json, require_size, token_ids

_ALWAYS = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")  # apply with do_sample and without


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The defaults a checkpoint recommends in `generation_config.json`; None where it recommends nothing.

    max_length: how many tokens a text may have in all, the prompt included; it caps the default number of new tokens.
    `other` holds all further keys, for `save_pretrained` to write back; None if there is no such file.
    """

    eos_token_id: int | tuple[int, ...] | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    suppress_tokens: tuple[int, ...] | None = None
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    other: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    # Keys that can change the generated text in ways this package does not support, with the values besides null that
    # have no effect. All other keys of transformers' GenerationConfig are about beams, which num_beams turns off, about
    # what generate() returns, or about how it computes the same text.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "num_return_sequences": (1,),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1,),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "top_h": (),
        "penalty_alpha": (),
        "dola_layers": (),
        "diversity_penalty": (0,),
        "constraints": (),
        "force_words_ids": (),
        "min_length": (0,),
        "max_time": (),
        "stop_strings": ([],),
        "bad_words_ids": (),
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
        """Read `folder/generation_config.json`; use defaults if there is none. Warns of settings it cannot honour."""
        path = Path(folder) / "generation_config.json"
        if not os.path.lexists(path):
            return cls()
        raw = read_json(path)
        if ignored := cls.not_neutral(raw):
            warnings.warn(f"{path}: not supported and ignored: {', '.join(ignored)}", stacklevel=2)
        names = {f.name for f in dataclasses.fields(cls)} - {"other"}
        values = {name: raw[name] for name in names if raw.get(name) is not None}
        values |= {n: tuple(values[n]) for n in ("eos_token_id", "suppress_tokens") if isinstance(values.get(n), list)}
        try:
            for name in ("eos_token_id", "suppress_tokens"):
                token_ids(name, values.get(name))
            for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", *_ALWAYS):
                if not is_number(values.get(name, 0)):
                    raise ConfigError(f"{name} must be a number, found {values[name]!r}")
            for name in ("max_new_tokens", "max_length"):
                if name in values:
                    require_size(name, values[name])
            if not isinstance(values.get("do_sample", False), bool):
                raise ConfigError(f"do_sample must be true or false, found {values['do_sample']!r}")
        except (ConfigError, RecursionError) as error:
            raise ConfigError(f"{path}: {error}") from None
        config = cls(**values)
        return dataclasses.replace(config, other={k: v for k, v in raw.items() if k not in config.to_dict()})

    @classmethod
    def not_neutral(cls, settings: Mapping[str, Any]) -> list[str]:
        """Return the keys of `settings` that would change generated text in ways this package does not support."""
        return [key for key, neutral in cls.NEUTRAL.items() if settings.get(key) not in (None, *neutral)]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a text; () if the file names none."""
        return token_ids("eos_token_id", self.eos_token_id)

    def sampling_values(self) -> dict[str, Any]:
        """Return the sampling parameters that transformers would use, by name; others keep `Sampling`'s defaults."""
        names = ("top_k", "top_p", "min_p", "typical_p", "temperature") if self.do_sample else ()
        values = {n: getattr(self, n) for n in (*names, *_ALWAYS) if getattr(self, n) is not None}
        if self.suppress_tokens:
            values["banned_tokens"] = token_ids("suppress_tokens", self.suppress_tokens)
        return {"temperature": 1.0, "top_k": 50, **values} if self.do_sample else values

    def to_dict(self) -> dict[str, Any]:
        """Return the object to write as `generation_config.json`: the fields that are set, and the keys that were read
        but are not used here."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "other"}
        given = {
            n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if v is not None and v is not False
        }
        return {**(self.other or {}), **given}
