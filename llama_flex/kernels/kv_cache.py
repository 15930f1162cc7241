"""A layer's cached keys and values: in the model's dtype, or in 8 bits with a scale for each head.

8 bits are float8_e4m3fn: 3 bits after the leading one, from 2**-6 to 448, and coarser down to 2**-9. A number is stored
divided by its head's scale, a power of two. So scaling is exact, and moves from keys and values to queries and output,
of which there are few: q (s k) = (s q) k.

The scales follow from the weights, not from the tokens: numbers are the same however tokens are fed, and prefixes can
be shared. A row w of a weight and a normalised x, whose norm is at most sqrt(E), give |w x| <= sqrt(E) |w|; a head's
scale is the least power of two with which that bound is at most 448. Where modules are not this package's own, with
weights to read, it is 1. Beyond 448 times the scale, which takes an edit, a hook, an adapter or new weights, numbers
are cut off.

A checkpoint may give scales of its own (the `kv_cache_scheme` of compressed-tensors): an attention's `k_scale` and
`v_scale`, any positive numbers. The rule of that library is that rotated keys, and values, are rounded whenever the
model runs: so all its caches are in 8 bits, and without a cache keys and values are rounded, too. Such quotients are
computed in float32 or wider; the library rounds them to 16 bits, as with `activations`.

Dimension letters: see `layers`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..usercode.arguments import check_choice
from ..usercode.modules import are_own
from .apart import keep_apart

KVDtype: TypeAlias = Literal["fp8"] | None  # None: the model's dtype
FP8 = torch.float8_e4m3fn
_MOST = torch.finfo(FP8).max
GIVEN = "k_scale", "v_scale"  # an attention's parameters, if a checkpoint gave them
_EXPONENTS = -14, 15  # of scales: those of float16


class Scales(NamedTuple):
    """The scales of a layer's keys and of its values, each `[K, 1, 1]`, in the model's dtype."""

    k: Tensor
    v: Tensor

    @staticmethod
    def given(attention: Any) -> Scales | None:
        """Return those of a `layers.Attention` that its checkpoint gave, or None."""
        k, v = map(attention._parameters.get, GIVEN)
        return None if k is None or v is None else Scales(k.detach(), v.detach())

    def round(self, k: Tensor, v: Tensor) -> KV:
        """Return k and v `[B, K, T, D]` in 8 bits. Raises ValueError if they require gradients."""
        if k.requires_grad or v.requires_grad:
            raise ValueError(
                "keys and values in 8 bits have no gradients: use torch.no_grad(), or set k_scale and v_scale of every "
                "layer's attention to None"
            )
        return KV(_rounded(_wide(k), self.k), _rounded(_wide(v), self.v), self)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-_MOST, _MOST).to(FP8)  # clamped, as what is beyond the largest number would become NaN


class KV(NamedTuple):
    """One layer's keys and values, each `[B, K, S, D]`; with scales, float8_e4m3fn to be multiplied by them."""

    k: Tensor
    v: Tensor
    scales: Scales | None = None

    @property
    def kv_dtype(self) -> KVDtype:
        """The `kv_dtype` of `Llama.new_cache` that makes such."""
        return None if self.scales is None else "fp8"

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the model that they belong to."""
        return self.k.dtype if self.scales is None else self.scales.k.dtype

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> KV:
        """Write k and v `[B, K, T, D]` of new tokens into slots `[B, T]`, in place; return this KV.

        Raises ValueError for keys or values that require gradients, which would be lost.
        """
        if k.requires_grad or v.requires_grad:
            raise ValueError("a cache does not support gradients: use torch.no_grad(), or run without a cache")
        if self.scales is not None:
            k, v = (_rounded(new, scale) for new, scale in zip((k, v), self.scales, strict=True))
        row = torch.arange(slots.shape[0], device=slots.device)[:, None] % len(self.k)  # all rows may share one pool
        for held, new in zip((self.k, self.v), (k, v), strict=True):
            held[row, :, slots] = new.transpose(1, 2)  # the index dimensions come first: [B, T, K, D]
        return self

    def copy(self, rows: Tensor | None = None) -> KV:
        """Return a copy, or one of some rows."""
        if rows is None:
            return KV(self.k.clone(), self.v.clone(), self.scales)
        k, v = (as_bytes(x)[rows].view(x.dtype) for x in (self.k, self.v))
        return KV(k, v, self.scales)

    def move(self, rows: Tensor, slots: Tensor) -> KV:
        """Replace what each row holds in slots `[B, N]` by what row `rows[i]`, `[B]`, holds there, in place; return
        this KV."""
        row = torch.arange(len(rows), device=rows.device)[:, None]
        for held in (self.k, self.v):
            held[row, :, slots] = as_bytes(held)[rows[:, None], :, slots].view(held.dtype)
        return self

    def zero(self, slots: Tensor) -> None:
        """Zero slots, booleans `[B, 1, S, 1]`, in place."""
        for held in (self.k, self.v):
            as_bytes(held).masked_fill_(slots, 0)

    def scale_queries(self, q: Tensor) -> Tensor:
        """Multiply queries `[B, H, T, D]` by the scales of the keys that they meet."""
        return q if self.scales is None else _scaled(q, self.scales.k)

    def scale_output(self, z: Tensor) -> Tensor:
        """Multiply attention's output `[B, H, T, D]` by the scales of the values that it is made of."""
        return z if self.scales is None else _scaled(keep_apart(z), self.scales.v)


def keep(attention: Any, kv: KV | None, slots: Tensor | None, k: Tensor, v: Tensor) -> KV:
    """Write k and v `[B, K, T, D]` of new tokens into slots of a layer's cache, and return that; or return them alone
    if there is none, in 8 bits if the checkpoint gave scales. Raises ValueError as `KV.write` does."""
    given = Scales.given(attention)
    if kv is None or slots is None:
        return KV(k, v) if given is None else given.round(k, v)
    if given is not None:  # not powers of two: in 16 bits, quotients would be rounded before they become 8 bits
        k, v = _wide(k), _wide(v)
    return kv.write(slots, k, v)


def _scaled(heads: Tensor, scale: Tensor) -> Tensor:
    group = heads.shape[1] // len(scale)
    return heads * scale.expand(-1, group, -1).reshape(-1, 1, 1)  # Inductor's attention fails on 5 dimensions


def as_bytes(x: Tensor) -> Tensor:
    """Return numbers of 8 bits as bytes: torch lacks operations for them, such as filling on CUDA."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


class KVFormat(NamedTuple):
    """The form in which a cache keeps keys and values. scales: of each layer, for 8 bits; else None."""

    dtype: torch.dtype
    device: torch.device
    scales: Sequence[Scales] | None = None

    @staticmethod
    @torch.no_grad()
    def of(model: Any, kv_dtype: KVDtype) -> KVFormat:
        """Return that of a `Llama`, with scales of its checkpoint, or else of its weights as they are now. Raises
        ValueError as `check_kv_dtype` does."""
        kv_dtype = kv_dtype_of(model, kv_dtype)
        check_kv_dtype(kv_dtype, model.device)
        if kv_dtype is None:
            return KVFormat(model.dtype, model.device)
        state = [_state_of(block.attention) for block in model.blocks()]
        if (known := _known.get(model)) is None or known[0] != state:
            known = _known[model] = state, [_scales_of(block.attention, model) for block in model.blocks()]
        return KVFormat(FP8, model.device, known[1])

    def new_layers(self, shape: Sequence[int], count: int) -> list[KV]:
        """Allocate the keys and values of `count` layers, each of a shape: zeros, as a masked slot still takes part in
        products, and 0 * NaN is NaN."""
        if self.device.type == "cpu":  # whose zeros take no memory until they are written
            held = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2 * count)]
        else:
            held = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2 * count)]
            # A kernel for many layers: each would take the host longer than the GPU.
            torch._foreach_zero_([as_bytes(x) for x in held])
        return list(map(KV, held[::2], held[1::2], self.scales or itertools.repeat(None)))


def dtype_of(kv_dtype: KVDtype, model: torch.dtype) -> torch.dtype:
    """Return the dtype of keys and values. model: the model's dtype."""
    return model if kv_dtype is None else FP8


def given_scales(model: Any) -> list[Scales | None]:
    """Return the scales of each layer that a model's checkpoint gave, None for a layer without."""
    return [Scales.given(block.attention) for block in model.blocks()]


def kv_dtype_of(model: Any, kv_dtype: KVDtype = None) -> KVDtype:
    """Return the `kv_dtype` of a model's caches: the one asked for, but "fp8" if its checkpoint gave scales."""
    return "fp8" if kv_dtype is None and any(given_scales(model)) else kv_dtype


def check_kv_dtype(kv_dtype: KVDtype, device: torch.device) -> None:
    """Raise ValueError for anything but None and "fp8", and if a device has no kernels for it."""
    if kv_dtype is None:
        return
    check_choice("kv_dtype", kv_dtype, ("fp8",))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f'{name} does not compute with "fp8"; leave out kv_dtype (--kv-dtype)')


# The scales of models, and the state of their attention from which they follow; it takes much longer to find them.
_known: weakref.WeakKeyDictionary[Any, tuple[list[Any], list[Scales]]] = weakref.WeakKeyDictionary()


def _is_own(attention: Any) -> bool:
    return are_own(attention) and are_own(attention.norm, attention.qkv, attention.k_norm)


def _state_of(attention: Any) -> Any:
    """Return what changes whenever scales may: other modules, parameters, or numbers in them (but through `.data`)."""
    tensors = list(attention.parameters())
    if any(tensor.is_inference() for tensor in tensors):  # which count no changes
        return object()
    return _is_own(attention), [(tensor.data_ptr(), tensor.dtype, tensor._version) for tensor in tensors]


def _scales_of(attention: Any, model: Any) -> Scales:
    """Return the scales of a `layers.Attention` of a model."""
    if (given := Scales.given(attention)) is not None:
        return given
    if _is_own(attention):
        # Of zeros, and of damaged weights, no scale follows; it must not become 0 or NaN.
        bounds = _bounds(attention, model.rotary.rope.attention_scale)
        exponents = (bounds / _MOST).log2().ceil().nan_to_num(nan=0).clamp(*_EXPONENTS)
    else:
        exponents = torch.zeros(2, attention.num_kv_heads, device=model.device)
    return Scales(*exponents.exp2().to(model.dtype)[:, :, None, None])


def _bounds(attention: Any, rotated: float) -> Tensor:
    """Return numbers that no key and no value of each head exceeds, float32 `[2, K]`. rotated: the factor of cosine and
    sine; a rotation mixes a key's two halves."""
    rows = slice(attention.num_heads * attention.head_dim, None)
    matrix, bias = attention.qkv.matrix, attention.qkv.bias
    weight = matrix.of_rows(rows).floats().float()
    bound = torch.linalg.vector_norm(weight * attention.norm.weight.float(), dim=1) * weight.shape[1] ** 0.5
    if bias is not None:
        bound += bias[rows].float().abs()
    k, v = bound.view(2, attention.num_kv_heads, attention.head_dim)
    if attention.k_norm is not None:
        k = attention.k_norm.weight.float().abs().expand_as(k) * attention.head_dim**0.5
    return torch.stack((torch.hypot(*k.chunk(2, dim=-1)).amax(-1) * rotated, v.amax(-1)))
