"""The rotary keys of a `config.json`, read with transformers' precedence, and the frequencies of every scaling type."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .files import one_line

_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """The `rope_parameters` of a config: the type, the base, and the type's other parameters (None if unused)."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    # The keys of config.json that are read here.
    CONFIG_KEYS: ClassVar[tuple[str, ...]] = (
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    )

    def __post_init__(self) -> None:
        if self.rope_type not in _TYPES:
            raise ValueError(f"rope_type {self.rope_type!r} is not supported; known types: {', '.join(_TYPES)}")
        kind = _TYPES[self.rope_type]
        for name in ("rope_theta", *kind.required, *kind.optional):
            value = getattr(self, name)
            if value is None and name in kind.optional:
                continue
            if name == "truncate":
                if not isinstance(value, bool):
                    raise ValueError(f"truncate must be true or false, found {value!r}")
            elif name in ("short_factor", "long_factor"):
                if not isinstance(value, list | tuple) or not all(map(_is_positive, value)):
                    raise ValueError(f"rope_type {self.rope_type!r} needs a list of positive numbers {name}")
                object.__setattr__(self, name, tuple(value))
            elif name in kind.any_number:
                if not _is_number(value):
                    raise ValueError(f"{name} must be a number, found {value!r}")
            elif not (_is_positive(value) or (name in kind.zero_is_unset and _is_number(value) and value == 0)):
                raise ValueError(f"rope_type {self.rope_type!r} needs a positive number {name}, found {value!r}")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:  # type: ignore[operator]
            warnings.warn(
                f"low_freq_factor={self.low_freq_factor} is not below high_freq_factor={self.high_freq_factor}: "
                "no frequency is interpolated",
                stacklevel=2,
            )
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_type 'yarn' needs a rope_theta above 1, found {self.rope_theta!r}")
        scaled = self.rope_type == "longrope" and self.attention_factor is None and self.factor > 1  # type: ignore[operator]
        if scaled and self.original_max_position_embeddings <= 1:  # type: ignore[operator]
            raise ValueError(
                "rope_type 'longrope' needs an original_max_position_embeddings above 1, or an attention_factor; "
                f"found {self.original_max_position_embeddings!r}"
            )

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> RopeParameters:
        """Read the rotary keys of a `config.json`, with transformers' precedence.

        Both spellings are understood: `rope_theta` beside `rope_scaling` (whose type may be called `type`), and
        `rope_parameters` that holds everything. A non-empty `rope_scaling` wins over `rope_parameters`.
        Raises ValueError naming an unknown type or a missing or malformed value; warns of keys the type does not use.
        """
        given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"rope_scaling / rope_parameters must be an object, found {given!r}")
        if nested := [key for key, value in given.items() if isinstance(value, Mapping)]:
            raise ValueError(f"rope_parameters by layer type ({', '.join(map(repr, nested))}) are not supported")
        given = dict(given)
        old_name = given.pop("type", "default")
        values = {"rope_type": given.pop("rope_type", old_name)}
        values["rope_theta"] = given.pop("rope_theta", raw.get("rope_theta", cls.rope_theta))
        if (partial := given.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))) not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor={partial!r} is not supported (only 1.0)")
        if not isinstance(values["rope_type"], str) or values["rope_type"] not in _TYPES:
            raise ValueError(f"rope_type {values['rope_type']!r} is not supported; known types: {', '.join(_TYPES)}")

        kind, context = _TYPES[values["rope_type"]], raw.get("max_position_embeddings")
        if "original_max_position_embeddings" in kind.required:
            # In the reference, a length beside rope_scaling, as in Phi-3's configs, wins; max_position_embeddings is
            # the fallback.
            fallback = given.get("original_max_position_embeddings", context)
            original = raw.get("original_max_position_embeddings", fallback)
            given["original_max_position_embeddings"] = original
            if (
                kind.factor_is_ratio
                and given.get("factor") is None
                and _is_positive(context)
                and _is_positive(original)
            ):
                given["factor"] = context / original
        values |= {name: given.pop(name) for name in (*kind.required, *kind.optional) if name in given}
        if "truncate" in values and values["truncate"] in (None, 0, 1):
            values["truncate"] = bool(values["truncate"])  # the reference reads null as false, not as the default
        if given:
            unused = one_line(", ".join(sorted(map(str, given))))
            warnings.warn(f"rope_type {values['rope_type']!r} does not use: {unused}", stacklevel=2)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the `rope_parameters` object of a `config.json`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if v is not None}

    def check(self, head_dim: int) -> None:
        """Raise ValueError if the type cannot rotate heads of this size."""
        if self.rope_type == "dynamic" and head_dim <= 2:
            raise ValueError(f"rope_type 'dynamic' needs a head_dim above 2, found {head_dim}")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != head_dim // 2:
                raise ValueError(f"{name} has {len(factors)} numbers; a head_dim of {head_dim} needs {head_dim // 2}")

    def limit(self, context: int) -> int | None:
        """Return the length beyond which a sequence's frequencies change, None if they do not depend on length.

        context: the model's `max_position_embeddings`.
        """
        return {"dynamic": context, "longrope": self.original_max_position_embeddings}.get(self.rope_type)

    def inverse_frequencies(
        self,
        head_dim: int,
        *,
        context: int | None = None,
        length: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the angle per position of each pair of dimensions, `[D/2]`, in radians.

        context: the model's `max_position_embeddings`, which "dynamic" needs. length `[B]`: the lengths of sequences
        beyond the `limit`; "dynamic" then returns a row for each, `[B, D/2]`.
        """
        device = "cpu" if length is None else length.device
        exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
        return _TYPES[self.rope_type].frequencies(self, exponent, context, length)

    @property
    def attention_scale(self) -> float:
        """The factor of cosine and sine, which makes attention sharper: 1, except for "yarn" and "longrope"."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.rope_type == "yarn":
            if self.mscale and self.mscale_all_dim:
                return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
            return _mscale(self.factor, 1.0)
        if self.rope_type == "longrope":
            assert self.factor is not None and self.original_max_position_embeddings is not None  # noqa: PT018
            if self.factor > 1:
                return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))
        return 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_FLOAT32


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _default(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    return 1.0 / p.rope_theta**exponent


def _linear(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """Interpolate positions (arXiv:2306.15595)."""
    assert p.factor is not None
    return 1.0 / p.rope_theta**exponent / p.factor


def _dynamic(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """Scale by dynamic NTK (described in arXiv:2309.00071): the base grows with sequences beyond the context."""
    assert p.factor is not None and context is not None  # noqa: PT018
    longest: Any = context if length is None else length.to(exponent.dtype).clamp(min=context)[:, None]
    growth = (p.factor * longest / context - (p.factor - 1)) ** (2 * len(exponent) / (2 * len(exponent) - 2))
    return 1.0 / (p.rope_theta * growth) ** exponent


def _yarn(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """Scale by YaRN (arXiv:2309.00071): stretch slow pairs by `factor`, keep fast ones, ramp over those in between."""
    assert p.factor is not None and p.original_max_position_embeddings is not None  # noqa: PT018
    pairs, trained = len(exponent), p.original_max_position_embeddings

    def pair(turns: float) -> float:
        """Return the (fractional) pair that makes this many turns within the trained context."""
        return pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(p.rope_theta)

    low, high = pair(p.beta_fast or 32), pair(p.beta_slow or 1)
    if p.truncate in (None, True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high += 0.001 if low == high else 0  # as the reference avoids dividing by zero
    slow = ((torch.arange(pairs, dtype=exponent.dtype, device=exponent.device) - low) / (high - low)).clamp(0, 1)
    fast = 1 - slow
    wavelength = p.rope_theta**exponent
    return 1.0 / (p.factor * wavelength) * (1 - fast) + 1.0 / wavelength * fast


def _longrope(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """Scale by LongRoPE (arXiv:2402.13753): a factor per pair, one list up to the trained context, one beyond."""
    factors = p.short_factor if length is None else p.long_factor
    return 1.0 / (torch.tensor(factors, dtype=exponent.dtype, device=exponent.device) * p.rope_theta**exponent)


def _llama3(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """Stretch wavelengths beyond the trained context by `factor`, keep short ones, ramp in between (Llama 3.1)."""
    assert p.factor is not None and p.low_freq_factor is not None and p.high_freq_factor is not None  # noqa: PT018
    assert p.original_max_position_embeddings is not None
    inv_freq = 1.0 / p.rope_theta**exponent
    wavelength = 2 * math.pi / inv_freq
    turns = p.original_max_position_embeddings / wavelength  # turns of the pair within the trained context
    ramp = (turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)
    blended = (1 - ramp) * inv_freq / p.factor + ramp * inv_freq
    slow = wavelength > p.original_max_position_embeddings / p.low_freq_factor
    fast = wavelength < p.original_max_position_embeddings / p.high_freq_factor
    return torch.where(slow, inv_freq / p.factor, torch.where(fast, inv_freq, blended))


def _mscale(factor: float | None, weight: float) -> float:
    assert factor is not None
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


class _Type(NamedTuple):
    """The required and optional keys of a type besides rope_theta, and its frequencies for exponents 2d/D `[D/2]`.

    Numbers must be positive, except those in any_number, and those in zero_is_unset, where 0 means a missing key.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    frequencies: Callable[[RopeParameters, Tensor, int | None, Tensor | None], Tensor]
    any_number: tuple[str, ...] = ()
    zero_is_unset: tuple[str, ...] = ()

    @property
    def factor_is_ratio(self) -> bool:
        """Whether a missing factor defaults to the ratio of the context to the trained one."""
        return "attention_factor" in self.optional


_TYPES: dict[str, _Type] = {
    "default": _Type((), (), _default),
    "linear": _Type(("factor",), (), _linear),
    "dynamic": _Type(("factor",), (), _dynamic, zero_is_unset=("factor",)),
    "yarn": _Type(
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        _yarn,
        any_number=("attention_factor", "mscale", "mscale_all_dim"),
        zero_is_unset=("beta_fast", "beta_slow"),
    ),
    "longrope": _Type(
        ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
        ("attention_factor",),
        _longrope,
        any_number=("factor", "attention_factor"),
    ),
    "llama3": _Type(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), (), _llama3),
}
