"""Rotary position embedding: inverse frequencies for every scaling type, and their application.

Su et al., "RoFormer" (arXiv:2104.09864), in the half-split layout of Hugging Face checkpoints: dimension d is paired
with d + D/2, not with its neighbour.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """The `rope_parameters` of a config: the type, the base, and what the type needs besides (None otherwise)."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

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
        required, _ = _TYPES[self.rope_type]
        for name in ("rope_theta", *required):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_FLOAT32:
                raise ValueError(f"rope_type {self.rope_type!r} needs a positive number {name}, found {value!r}")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:  # type: ignore[operator]
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}"
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
        given = dict(given)
        old_name = given.pop("type", "default")
        values = {"rope_type": given.pop("rope_type", old_name)}
        values["rope_theta"] = given.pop("rope_theta", raw.get("rope_theta", cls.rope_theta))
        if (partial := given.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))) not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor={partial!r} is not supported (only 1.0)")
        if not isinstance(values["rope_type"], str) or values["rope_type"] not in _TYPES:
            raise ValueError(f"rope_type {values['rope_type']!r} is not supported; known types: {', '.join(_TYPES)}")

        required, _ = _TYPES[values["rope_type"]]
        if "original_max_position_embeddings" in required:
            # A length beside rope_scaling, Phi-3's habit, wins in the reference; max_position_embeddings stands in
            # where there is none.
            fallback = given.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
            given["original_max_position_embeddings"] = raw.get("original_max_position_embeddings", fallback)
        values |= {name: given.pop(name) for name in required if name in given}
        if given:
            unused = ", ".join(sorted(map(str, given)))
            warnings.warn(f"rope_type {values['rope_type']!r} does not use: {unused}", stacklevel=2)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The `rope_parameters` object of a `config.json`."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def inverse_frequencies(self, head_dim: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Angle per position of each pair of dimensions, `[D/2]`, radians."""
        exponent = torch.arange(0, head_dim, 2, dtype=dtype, device="cpu") / head_dim
        _, scale = _TYPES[self.rope_type]
        return scale(1.0 / self.rope_theta**exponent, self)


def _default(inv_freq: Tensor, _: RopeParameters) -> Tensor:
    return inv_freq


def _linear(inv_freq: Tensor, p: RopeParameters) -> Tensor:
    """Position interpolation (arXiv:2306.15595)."""
    assert p.factor is not None
    return inv_freq / p.factor


def _llama3(inv_freq: Tensor, p: RopeParameters) -> Tensor:
    """Llama 3.1: stretch wavelengths beyond the trained context by `factor`, keep short ones, a ramp in between."""
    assert p.factor is not None and p.low_freq_factor is not None and p.high_freq_factor is not None  # noqa: PT018
    assert p.original_max_position_embeddings is not None
    wavelength = 2 * math.pi / inv_freq
    turns = p.original_max_position_embeddings / wavelength  # turns of the pair within the trained context
    ramp = (turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)
    blended = (1 - ramp) * inv_freq / p.factor + ramp * inv_freq
    slow = wavelength > p.original_max_position_embeddings / p.low_freq_factor
    fast = wavelength < p.original_max_position_embeddings / p.high_freq_factor
    return torch.where(slow, inv_freq / p.factor, torch.where(fast, inv_freq, blended))


# type -> (the keys it needs besides rope_theta, what it does to the inverse frequencies)
_TYPES: dict[str, tuple[tuple[str, ...], Callable[[Tensor, RopeParameters], Tensor]]] = {
    "default": ((), _default),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), _llama3),
}


def cos_sin(position: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: position `[B, T]` and inv_freq `[D/2]` -> two of `[B, 1, T, D/2]`.

    Computed in inv_freq's dtype, float32 in the model whatever its weights are: bfloat16 cannot tell positions beyond
    256 apart.
    """
    angle = position[:, None, :, None].to(inv_freq.dtype) * inv_freq
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x `[B, H, T, D]` by `cos`, `sin` `[B, 1, T, D/2]`; the arithmetic is theirs, the result in x's dtype."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
