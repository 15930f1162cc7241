"""Weights in 8 bits: whole numbers from -127 to 127, with a scale for each row. Dimensions: N rows, K columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..usercode.arguments import check_choice, model_device

Quantization: TypeAlias = Literal["int8"]
SCALE = "weight_scale"  # the name of the parameter, and of the tensor in a checkpoint
_MOST = 127  # -128 is not used, so that a weight and its negative are as exact


def device_for(quantization: Quantization | None, device: torch.device | str | None) -> torch.device:
    """Return the device for a model, as `model_device` does.

    Raises ValueError for an unknown quantization, and for a device that has no kernels for it.
    """
    found = model_device(device)
    if quantization is not None:
        check_choice("quantize", quantization, get_args(Quantization))
        if found.type != "cpu":
            raise ValueError(
                f"quantize {quantization!r} has kernels for a CPU only, not for {found}; use device='cpu', --device cpu"
            )
    return found


def prepare(layers: nn.Module, quantization: Quantization | None) -> None:
    """Give the linear layers of a model on the meta device weights as `quantization` says, unless it is None."""
    for module in layers.modules() if quantization else ():
        if hasattr(module, "parts"):
            make_int8(module)


def make_int8(linear: nn.Module) -> None:
    """Replace a linear layer's weight by an empty one of int8, and give it a scale, in the dtype of the former."""
    weight = linear.get_parameter("weight")
    scale = torch.empty(len(weight), 1, dtype=weight.dtype, device=weight.device)
    linear.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))
    linear.register_parameter("weight", nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False))


def fill(places: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    """Copy a tensor of a checkpoint to its place, quantised if that is of int8."""
    place = places[name]
    if place.dtype == torch.int8:
        scale = places[f"{name}_scale"]
        tensor, found = to_int8(tensor, scale.dtype)
        scale.copy_(found)
    place.copy_(tensor)


def to_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the nearest `numbers * scale` to a weight `[N, K]`: int8 `[N, K]`, and `[N, 1]` in `dtype`."""
    most = weight.abs().amax(1, keepdim=True).to(torch.promote_types(weight.dtype, torch.float32)) / _MOST
    scale = most.to(dtype)
    # Rounded up, so that the largest weight of a row is not beyond the largest number.
    scale = torch.where(scale < most, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    numbers = weight / torch.where(scale == 0, 1, scale).to(most.dtype)
    return numbers.round_().clamp_(-_MOST, _MOST).to(torch.int8), scale
