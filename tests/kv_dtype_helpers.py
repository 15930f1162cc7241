"""What the tests of caches in 8 bits share: a model whose heads differ, and the reference, keys and values rounded by
edits in forwards without such a cache."""

import copy
import math

import pytest
import torch

from llama_flex import Edit, Llama
from llama_flex.kernels.kv_cache import KV, Scales

FP8 = torch.float8_e4m3fn


def uneven(model: Llama, dtype: torch.dtype = torch.float64) -> Llama:
    """Return a copy of a model in which keys and values have another size in every head, and so another scale."""
    model = copy.deepcopy(model).to(dtype)
    for n, block in enumerate(model.blocks()):
        attention = block.attention
        keys, values = attention.qkv.weight.unflatten(0, (-1, attention.head_dim))[attention.num_heads :].chunk(2)
        sizes = 2.0 ** torch.arange(-1, len(keys) - 1)
        keys *= (sizes * 2**n)[:, None, None]
        values *= (sizes.flip(0) / 2 ** (5 + n))[:, None, None]
        attention.o.weight *= 2 ** (5 + n)  # else what values change would be too little to see
    return model


def expected_scales(model: Llama) -> list[torch.Tensor]:
    """Return the scales of each layer, `[2, K]`, by their definition, one number at a time. For a model without biases
    and norms of keys."""
    found = []
    for block in model.blocks():
        a = block.attention
        weight = (a.qkv.weight * a.norm.weight).double()
        bounds = (
            (weight.square().sum(1) * weight.shape[1]).sqrt().unflatten(0, (-1, a.head_dim))[a.num_heads :].tolist()
        )
        half, most = a.head_dim // 2, 448
        keys = [max(math.hypot(head[d], head[d + half]) for d in range(half)) for head in bounds[: a.num_kv_heads]]
        values = [max(head) for head in bounds[a.num_kv_heads :]]
        found.append(torch.tensor([[2.0 ** math.ceil(math.log2(x / most)) for x in each] for each in (keys, values)]))
    return found


def rounding(model: Llama, scales: list[torch.Tensor] | None = None) -> list[Edit]:
    """Return the edits that round keys and values as a cache in 8 bits does."""
    edits = []
    for layer, each in enumerate(expected_scales(model) if scales is None else scales):
        for site, scale in zip("kv", each[:, :, None], strict=True):

            def rounded(x, tokens, scale=scale):
                scale = scale.to(x.dtype)
                return (x / scale).clamp(-448, 448).to(FP8).to(x.dtype) * scale

            edits.append(Edit(site, rounded, layer))
    return edits


def in_8_bits(model: Llama) -> Llama:
    """Return a copy of a model that makes caches in 8 bits by itself."""
    made = copy.copy(model)
    for name in ("new_cache", "new_rolling_cache"):
        make = getattr(Llama, name)
        made.__dict__[name] = lambda *args, make=make, **options: make(model, *args, kv_dtype="fp8", **options)
    return made


def is_near(found: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> bool:
    """Return whether logits are as near to those of float64 (exact) as the reference's in the same dtype, up to a
    factor of 3 and to a part of what rounding changes (plain: without it, in float64).

    In float32 one number in 30,000, near the middle between two of 8 bits, may go to either: too few to compare the
    largest errors of two ways to compute.
    """
    error, other, rounding = ((x.cpu().double() - exact).abs() for x in (found, reference, plain))
    near = error.mean() <= 3 * other.mean() + rounding.mean() / 20
    return bool(near and error.max() <= 3 * other.max() + rounding.max() / 4)


def _neighbours(scale: torch.Tensor) -> torch.Tensor:
    return scale.roll(1, 0)


_WRITE = KV.write
FAULTS = {
    "no scale of keys": ("scale_queries", lambda self, q: q),
    "no scale of values": ("scale_output", lambda self, z: z),
    "a neighbour's scale of keys": (
        "write",
        lambda self, *new: (
            _WRITE(self._replace(scales=Scales(_neighbours(self.scales.k), self.scales.v)), *new) and self
        ),
    ),
    "a neighbour's scale of values": (
        "write",
        lambda self, *new: (
            _WRITE(self._replace(scales=Scales(self.scales.k, _neighbours(self.scales.v))), *new) and self
        ),
    ),
}


def each_fault(names=tuple(FAULTS)):
    """Return the parameters of a test that a fault must make fail."""
    return pytest.mark.parametrize("fault", names)


def break_it(monkeypatch, fault: str) -> None:
    """Make a mistake in the cache."""
    name, function = FAULTS[fault]
    monkeypatch.setattr(KV, name, function)


def with_scales(model: Llama, per_head: bool = False, dtype: torch.dtype = torch.float64) -> Llama:
    """Return a copy of a model whose checkpoint gave scales: real numbers, others for each layer, for keys and values,
    and perhaps for each head."""
    model = copy.deepcopy(model).to(dtype)
    for n, block in enumerate(model.blocks()):
        for name, size in (("k_scale", 0.0123), ("v_scale", 0.0037)):
            scale = torch.full((block.attention.num_kv_heads, 1, 1), size * (1 + n))
            if per_head:
                scale *= torch.arange(1, 1 + len(scale))[:, None, None] / 2
            scale = torch.nn.Parameter(scale.to(model.device, dtype), requires_grad=False)
            block.attention.register_parameter(name, scale)
    return model


def scales_given(model: Llama) -> list[torch.Tensor]:
    """Return the scales of each layer that a model's checkpoint gave, `[2, K]`."""
    return [torch.stack((b.attention.k_scale, b.attention.v_scale)).flatten(1) for b in model.blocks()]


def without_scales(model: Llama) -> Llama:
    """Return a copy of a model whose checkpoint gave none."""
    model = copy.deepcopy(model)
    for block in model.blocks():
        block.attention.k_scale = block.attention.v_scale = None
    return model
