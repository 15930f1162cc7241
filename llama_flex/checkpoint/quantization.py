"""Weights in 8 or 4 bits: numbers with a scale for each row, or for each group of its columns.

Dimensions: N rows, K columns, G groups of columns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from ..kernels.weight import GROUP_SIZES, NF4, PARTS, RUN, Weight, pack
from ..usercode.arguments import check_choice, model_device

Format: TypeAlias = Literal["int8", "fp8", "int4", "nf4"]
SCALE, ZERO, ORDER = PARTS
_GROUP_SIZES = {"int4": RUN, "nf4": 2 * RUN}  # the usual ones
_INT8 = 127  # the largest; -128 is not used, so that a weight and its negative are as exact
_FP8 = torch.float8_e4m3fn
_AT_ONCE = 2**18  # numbers that a CPU's cache holds in some copies
_SHRUNK = 1.0, 0.95, 0.9, 0.85, 0.8  # ranges of 4 bits that are tried: a smaller one cuts off some, and is finer


@dataclass(frozen=True)
class Quantization:
    """The numbers that weights are kept in.

    format: "fp8", float8_e4m3fn, with a scale for each row; "int8", whole numbers, with one for each row, or, given a
    `group_size`, with a scale and a zero point for so many numbers of a row; "int4", whole numbers of 4 bits in
    groups, by default of 32; "nf4", the 16 values of bitsandbytes, with a scale in float32 for each group, by default
    of 64. symmetric: no zero points. Raises ValueError for an unknown format or group size.
    """

    format: Format
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_choice("quantize", self.format, get_args(Format))
        if self.group_size is None:
            object.__setattr__(self, "group_size", _GROUP_SIZES.get(self.format))
        elif self.format == "fp8":
            raise ValueError(f"'fp8' has a scale for each row, not for groups of {self.group_size!r:.60}")
        elif type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size must be one of {sizes}, not {self.group_size!r:.60}")
        if self.format == "nf4" or self.group_size is None:
            object.__setattr__(self, "symmetric", True)

    @classmethod
    def of(cls, value: Quantization | str | None) -> Quantization | None:
        """Return a quantization, given as such or by its name: "int8", "int8-128", "int4-64-symmetric", "nf4", "fp8".

        Raises ValueError for anything else.
        """
        if value is None or isinstance(value, Quantization):
            return value
        found = re.fullmatch(r"(fp8)|(int8|int4|nf4)(?:-([0-9]{1,3}))?(-symmetric)?", str(value))
        if found is None:
            raise ValueError(f"quantize {value!r:.60} is not known; use 'int8', 'fp8', 'int4', 'int4-128' or the like")
        size = None if found[3] is None else int(found[3])
        return cls(cast(Format, found[1] or found[2]), size, found[4] is not None)

    @property
    def name(self) -> str:
        """The name that `of` takes."""
        if self.group_size is None:
            return self.format
        return f"{self.format}-{self.group_size}" + ("-symmetric" if self.format != "nf4" and self.symmetric else "")

    def empty(self, weight: Tensor) -> Weight:
        """Return memory for a weight `[N, K]`, on its device. Raises ValueError if groups do not divide its rows."""
        rows, columns = weight.shape
        if self.group_size is None:
            numbers = torch.empty_like(weight, dtype=torch.int8 if self.format == "int8" else _FP8)
            return Weight(numbers, weight.new_empty(rows, 1))
        if columns % self.group_size:
            fitting = [str(size) for size in GROUP_SIZES if not columns % size]
            way = f"use {' or '.join(fitting)}" if fitting else 'use "int8" or "fp8"'
            raise ValueError(f"groups of {self.group_size} do not divide rows of {columns} numbers; {way}")
        scale = weight.new_empty(rows, columns // self.group_size)
        if self.format == "nf4":
            return Weight(weight.new_empty(rows, columns // 2, dtype=torch.uint8), scale.to(torch.float32))
        if self.format == "int8":
            numbers = torch.empty_like(weight, dtype=torch.int8)
        else:
            numbers = weight.new_empty(rows, columns // 8, dtype=torch.int32)
        return Weight(numbers, scale, None if self.symmetric else torch.empty_like(scale, dtype=torch.uint8))

    def quantise(self, weight: Tensor, dtype: torch.dtype) -> Weight:
        """Return the numbers nearest to a weight `[N, K]`, with scales of a dtype, or float32 for "nf4"."""
        if self.group_size is not None:
            if self.format == "nf4":
                return to_nf4(weight, self.group_size)
            return to_groups(weight, int(self.format[-1]), self.group_size, self.symmetric, dtype)
        return to_int8(weight, dtype) if self.format == "int8" else to_fp8(weight, dtype)


def numbers_of(bits: int, group_size: int | None, symmetric: bool) -> Quantization:
    """Return the whole numbers that those of a checkpoint become. group_size: None for rows, which become groups if a
    kernel takes them in groups only; it is the smallest one then."""
    form: Format = "int4" if bits == 4 else "int8"
    return Quantization(form, group_size or (RUN if bits == 4 or not symmetric else None), symmetric)


def device_for(device: torch.device | str | None, quantization: Quantization | None) -> torch.device:
    """Return the device for a model, as `model_device` does. Raises ValueError if it has no kernels for a format."""
    found = model_device(device)
    is_fp8 = quantization is not None and quantization.format == "fp8"
    if is_fp8 and found.type == "cuda" and torch.cuda.get_device_capability(found) < (8, 9):
        raise ValueError(f'{torch.cuda.get_device_name(found)} does not compute with "fp8"; use "int8" or "int4"')
    return found


def prepare(model: nn.Module, quantization: Quantization | None, floats: Collection[str] = ()) -> None:
    """Give the linear layers of a model on the meta device weights as a quantization says, unless it is None.

    floats: the paths of those left as they are. Raises ValueError for groups that do not divide rows.
    """
    if quantization is None:
        return
    for path, module in model.named_modules():
        if hasattr(module, "parts") and path.startswith("layers.") and path not in floats:
            assign(module, quantization.empty(module.get_parameter("weight")))


def assign(linear: nn.Module, weight: Weight) -> None:
    """Make a weight that of a linear layer."""
    for name, tensor in zip(("weight", *PARTS), weight, strict=True):
        linear.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


def fill(places: Mapping[str, Tensor], name: str, tensor: Tensor, quantization: Quantization | None) -> None:
    """Copy a tensor of a checkpoint to its place, quantised if a scale belongs to it."""
    scale = places.get(f"{name}_scale")
    if scale is None:
        places[name].copy_(tensor)
        return
    assert quantization is not None
    found = quantization.quantise(tensor.to(scale.device), scale.dtype)
    for place, part in zip((places[name], scale, places.get(f"{name}_zero_point")), found[:3], strict=True):
        if place is not None and part is not None:
            place.copy_(part)


def to_int8(weight: Tensor, dtype: torch.dtype) -> Weight:
    """Return the nearest whole numbers from -127 to 127 times a scale of each row to a weight `[N, K]`."""
    scale = _scale_of(weight, _INT8, dtype)
    return Weight(_divided(weight, scale).round_().clamp_(-_INT8, _INT8).to(torch.int8), scale)


def to_fp8(weight: Tensor, dtype: torch.dtype) -> Weight:
    """Return the nearest float8_e4m3fn numbers times a scale of each row to a weight `[N, K]`."""
    most = torch.finfo(_FP8).max
    scale = _scale_of(weight, most, dtype)
    return Weight(_divided(weight, scale).clamp_(-most, most).to(_FP8), scale)


def to_groups(weight: Tensor, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> Weight:
    """Return whole numbers of 4 or 8 bits near to a weight `[N, K]`, with the scale of each group, and unless symmetric
    its zero point: of a few ranges, those of the one with the least squared error."""
    middle, most = 1 << (bits - 1), (1 << bits) - 1
    rows = max(1, _AT_ONCE * (64 if weight.is_cuda else 1) // weight.shape[1])
    if len(weight) > rows:
        each = [to_groups(part, bits, group_size, symmetric, dtype) for part in weight.split(rows)]
        numbers, scale, zero, _ = (None if parts[0] is None else torch.cat(parts) for parts in zip(*each, strict=True))
        assert numbers is not None
        return Weight(numbers, scale, zero)
    groups = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, group_size))
    low, high = groups.amin(2, keepdim=True).clamp_(max=0), groups.amax(2, keepdim=True).clamp_(min=0)
    best: tuple[Tensor, ...] = ()
    for shrunk in _SHRUNK:
        if symmetric:  # -8 to 7: the sign of the scale lets the largest number be -8
            scale = torch.where(-low > high, -low, -high) * (shrunk / middle)
            zero = torch.full_like(scale, middle)
        else:
            scale = (high - low) * (shrunk / most)
            zero = (-low * shrunk / torch.where(scale == 0, 1, scale)).round_().clamp_(0, most)
        scale = scale.to(dtype).to(groups.dtype)
        numbers = (groups / torch.where(scale == 0, 1, scale)).round_().add_(zero).clamp_(0, most)
        error = ((numbers - zero) * scale - groups).square_().sum(2, keepdim=True)
        found = error, numbers, scale, zero
        best = tuple(torch.where(error < best[0], x, y) for x, y in zip(found, best, strict=True)) if best else found
    _, numbers, scale, zero = best
    held = None if symmetric else zero[..., 0].to(torch.uint8)
    numbers = numbers.flatten(1)
    return Weight(pack(numbers) if bits == 4 else (numbers - middle).to(torch.int8), scale[..., 0].to(dtype), held)


def to_nf4(weight: Tensor, group_size: int) -> Weight:
    """Return the values of NF4 nearest to a weight `[N, K]`, with a scale in float32 for each group."""
    groups = weight.float().unflatten(1, (-1, group_size))
    scale = groups.abs().amax(2)
    values = torch.tensor(NF4, device=weight.device)
    shares = groups / torch.where(scale == 0, 1, scale)[..., None]
    numbers = torch.bucketize(shares, (values[1:] + values[:-1]) / 2, out_int32=True)
    return Weight(pack(numbers.flatten(1)).view(torch.uint8), scale)


def _scale_of(weight: Tensor, most: float, dtype: torch.dtype) -> Tensor:
    """Return the scale of each row, `[N, 1]`, with which its largest number is `most`."""
    exact = weight.abs().amax(1, keepdim=True).to(torch.promote_types(weight.dtype, torch.float32)) / most
    scale = exact.to(dtype)
    # Rounded up, so that the largest weight of a row is not beyond the largest number.
    return torch.where(scale < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)


def _divided(weight: Tensor, scale: Tensor) -> Tensor:
    return weight / torch.where(scale == 0, 1, scale).to(torch.promote_types(weight.dtype, torch.float32))
