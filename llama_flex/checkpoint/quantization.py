"""Weights in 8 or 4 bits: numbers with a scale for each row, or for each group of its columns.

Dimensions: N rows, K columns, G groups of columns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from ..kernels.kv_cache import GIVEN
from ..kernels.modules import MatrixModule
from ..kernels.weight import GROUP_SIZES, NF4, PARTS, RUN, Weight, pack
from ..usercode.arguments import check_choice, model_device

Format: TypeAlias = Literal["int8", "fp8", "int4", "nf4"]
Inputs: TypeAlias = Literal["dynamic", "static"]
_, SCALE, ZERO, INPUT, ORDER = PARTS
_GROUP_SIZES = {"int4": RUN, "nf4": 2 * RUN}  # the usual ones
_INT8 = 127  # the largest; -128 is not used, so that a weight and its negative are as exact
_FP8 = torch.float8_e4m3fn
_AT_ONCE = 2**18  # numbers that a CPU's cache holds in some copies
WIDE_AT_ONCE = 2**26  # numbers of a tensor that are quantised or become floats at a time, in copies as float32
_SHRUNK = 1.0, 0.95, 0.9, 0.85, 0.8  # ranges of 4 bits that are tried: a smaller one cuts off some, and is finer


@dataclass(frozen=True)
class Quantization:
    """The numbers that weights are kept in, and perhaps their inputs.

    format: "fp8", float8_e4m3fn, with a scale for each row; "int8", whole numbers, with one for each row, or, given a
    `group_size`, with a scale and a zero point for so many numbers of a row; "int4", whole numbers of 4 bits in
    groups, by default of 32; "nf4", the 16 values of bitsandbytes, with a scale in float32 for each group, by default
    of 64. symmetric: no zero points. inputs: those of a product become numbers of the same format, "dynamic", with a
    scale for each token, or "static", with a checkpoint's scale for all. A checkpoint's "fp8" may have groups, with a
    scale in float32 for each, if inputs are "dynamic", with one for each group of a token. given_kv: the checkpoint has
    scales of keys and values, too.
    These are for the layers' matrices. vocabulary: the same for the output matrix and the embedding, tied or not; None
    leaves them floats, as logits suffer most from few bits, and in a large model these two are a small part.
    Raises ValueError for an unknown format or group size, for inputs of other weights than those of 8 bits with a scale
    for each row, and for a vocabulary that is no such object.
    """

    format: Format
    group_size: int | None = None
    symmetric: bool = False
    inputs: Inputs | None = None
    vocabulary: Quantization | None = None
    given_kv: bool = False

    def __post_init__(self) -> None:
        check_choice("quantize", self.format, get_args(Format))
        if self.group_size is None:
            object.__setattr__(self, "group_size", _GROUP_SIZES.get(self.format))
        elif self.format == "fp8" and self.inputs != "dynamic":
            raise ValueError(f"'fp8' has a scale for each row, not for groups of {self.group_size!r:.60}; leave it out")
        elif type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"{self.format}: group_size must be one of {sizes}, not {self.group_size!r:.60}")
        if type(self.symmetric) is not bool:
            raise ValueError(f"symmetric must be True or False, not {self.symmetric!r:.60}")
        if self.format == "nf4" or self.group_size is None:
            object.__setattr__(self, "symmetric", True)
        if self.inputs is not None:
            check_choice("inputs", self.inputs, get_args(Inputs))
            if self.group_size is not None and self.format != "fp8":
                other = f"{self.format}-{self.group_size}"
                only = 'for "int8" and "fp8" without groups'
                raise ValueError(f'{self.inputs!r} inputs are {only}, not for "{other}"; use "int8-dynamic"')
        own = self.vocabulary
        if own is not None and (not isinstance(own, Quantization) or own.vocabulary is not None):
            raise ValueError(f"vocabulary must be None or a Quantization without another inside, not {own!r:.60}")

    @classmethod
    def of(cls, value: Quantization | str | None) -> Quantization | None:
        """Return a quantization of floats, given as such or by its name: "int8", "int8-128", "fp8-dynamic", "nf4",
        "int4-64-symmetric"; with a vocabulary "int4+int8".

        Raises ValueError for anything else, for what only checkpoints have, and for a vocabulary in "nf4", whose scales
        do not tell the dtype of an embedding's floats.
        """
        made = value if value is None or isinstance(value, Quantization) else _named(value)
        if made is not None and any(x and x.format == "fp8" and x.group_size for x in (made, made.vocabulary)):
            raise ValueError(f"quantize {made.name!r}: only checkpoints have 'fp8' in groups; use 'fp8-dynamic'")
        if made is not None and "static" in (made.inputs, made.vocabulary and made.vocabulary.inputs):
            raise ValueError(f"quantize {made.name!r} needs scales of inputs, which floats do not have; use 'dynamic'")
        if made is not None and made.vocabulary is not None and made.vocabulary.format == "nf4":
            raise ValueError(f"quantize {made.name!r}: a vocabulary cannot be in 'nf4'; use 'int4' or 'int8' for it")
        return made

    @property
    def name(self) -> str:
        """The name, which `of` takes."""
        name: str = self.format
        if self.group_size is not None:
            name += f"-{self.group_size}" + "-symmetric" * (self.symmetric and self.format != "nf4")
        name += "" if self.inputs is None else f"-{self.inputs}"
        return name if self.vocabulary is None else f"{name}+{self.vocabulary.name}"

    def of_matrix(self, name: str) -> Quantization | None:
        """Return what becomes of a matrix, by its path or its name in a checkpoint; None if it stays floats."""
        return self if name.removeprefix("model.").startswith("layers.") else self.vocabulary

    def empty(self, weight: Tensor) -> Weight:
        """Return memory for a weight `[N, K]`, on its device. Raises ValueError if groups do not divide its rows."""
        rows, columns = weight.shape
        if self.group_size is None:
            numbers = torch.empty_like(weight, dtype=torch.int8 if self.format == "int8" else _FP8)
            scale = weight.new_empty(rows, 1)
            return Weight(numbers, scale, None, self._input_scale(scale))
        if columns % self.group_size:
            fitting = [str(size) for size in GROUP_SIZES if not columns % size]
            way = f"use {' or '.join(fitting)}" if fitting else 'use "int8" or "fp8"'
            raise ValueError(f"groups of {self.group_size} do not divide rows of {columns} numbers; {way}")
        scale = weight.new_empty(rows, columns // self.group_size)
        if self.format == "nf4":
            return Weight(weight.new_empty(rows, columns // 2, dtype=torch.uint8), scale.to(torch.float32))
        if self.format == "fp8":
            scale = scale.to(torch.float32)
            return Weight(torch.empty_like(weight, dtype=_FP8), scale, None, self._input_scale(scale))
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
            assert self.format != "fp8"  # `of` refuses it
            return to_groups(weight, int(self.format[-1]), self.group_size, self.symmetric, dtype)
        found = to_int8(weight, dtype) if self.format == "int8" else to_fp8(weight, dtype)
        return found._replace(input_scale=self._input_scale(found.scale))

    def _input_scale(self, scale: Tensor | None) -> Tensor | None:
        """Return memory for the scale of inputs, if they have any: as a weight's `scale`, or with no column."""
        if scale is None or self.inputs is None:
            return None
        return torch.empty_like(scale if self.inputs == "static" else scale[:, :0])


def _named(value: str) -> Quantization:
    """Return the quantization of a name. Raises ValueError for another."""
    made: Quantization | None = None
    for name in reversed(str(value).split("+")):  # the vocabulary's first
        found = re.fullmatch(r"(int8|fp8|int4|nf4)(?:-([0-9]{1,3}))?(-symmetric)?(-dynamic)?", name)
        if found is None or (made is not None and made.vocabulary is not None):
            break
        size, inputs = None if found[2] is None else int(found[2]), None if found[4] is None else "dynamic"
        made = Quantization(cast(Format, found[1]), size, found[3] is not None, cast(Inputs | None, inputs), made)
        if found[3] is not None and not made.name.partition("+")[0].endswith(found[3]):  # no zero points to leave out
            break
    else:
        assert made is not None
        return made
    known = "'int8', 'fp8', 'int4', 'int4-128' or the like, or two of them as in 'int4+int8'"
    raise ValueError(f"quantize {value!r:.60} is not known; use {known}")


def numbers_of(bits: int, group_size: int | None, symmetric: bool) -> Quantization:
    """Return the whole numbers that those of a checkpoint become. group_size: None for rows, which become groups if a
    kernel takes them in groups only; it is the smallest one then."""
    form: Format = "int4" if bits == 4 else "int8"
    return Quantization(form, group_size or (RUN if bits == 4 or not symmetric else None), symmetric)


def device_for(device: torch.device | str | None, quantization: Quantization | None) -> torch.device:
    """Return the device for a model, as `model_device` does. Raises ValueError if it has no kernels for a format."""
    found = model_device(device)
    given = () if quantization is None else (quantization, quantization.vocabulary)
    is_fp8 = any(each is not None and each.format == "fp8" for each in given)
    if is_fp8 and found.type == "cuda" and torch.cuda.get_device_capability(found) < (8, 9):
        raise ValueError(f'{torch.cuda.get_device_name(found)} does not compute with "fp8"; use "int8" or "int4"')
    return found


def prepare(model: nn.Module, quantization: Quantization | None, floats: Collection[str] = ()) -> None:
    """Give the matrices of a model on the meta device weights as a quantization says, unless it is None.

    floats: the paths of those left as they are. Raises ValueError for groups that do not divide rows.
    """
    if quantization is None:
        return
    for path, module in model.named_modules():
        if is_quantisable(module) and path not in floats and (each := quantization.of_matrix(path)) is not None:
            assign(module, each.empty(module.get_parameter("weight")))
        if quantization.given_kv and path.endswith(".attention"):
            weight = module.get_parameter("norm.weight")
            for name in GIVEN:
                scale = weight.new_empty(cast(Any, module).num_kv_heads, 1, 1)
                module.register_parameter(name, nn.Parameter(scale, requires_grad=False))


def quantise_beside(model: nn.Module, empty: nn.Module, quantization: Quantization) -> None:
    """Make a model on the meta device, `empty`, another one with quantised matrices, which shares all else with it.

    It lacks the model's adapters. Raises ValueError for a model whose matrices are quantised or whose modules were
    replaced, and for groups that do not divide rows.
    """
    modules = dict(model.named_modules())
    for path, module in empty.named_modules():
        if (own := modules.get(path)) is None:
            raise ValueError(f"the model has no module {path} any more, so there is no copy of it in few bits")
        for name, parameter in own.named_parameters(recurse=False):
            module.register_parameter(name, parameter)
        for name, buffer in own.named_buffers(recurse=False):
            module.register_buffer(name, buffer)
        if is_quantisable(own) and (each := quantization.of_matrix(path)) is not None:
            if own._parameters["weight_scale"] is not None:
                raise ValueError("the model is quantised already, so a copy of few bits is hardly faster")
            weight = own.get_parameter("weight").detach()
            each.empty(weight.to("meta"))  # raises if groups do not divide its rows
            assign(module, each.quantise(weight, weight.dtype))


def is_quantisable(module: nn.Module) -> bool:
    """Return whether a module holds a matrix, which may be quantised: unlike an output matrix that is the embedding."""
    return isinstance(module, MatrixModule) and "weight" in module._parameters


def assign(module: nn.Module, weight: Weight) -> None:
    """Make a weight that of a linear layer or an embedding."""
    for name, tensor in zip(PARTS, weight, strict=True):
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


def fill(places: Mapping[str, Tensor], name: str, tensor: Tensor, quantization: Quantization | None) -> None:
    """Copy a tensor of a checkpoint to its place, quantised if a scale belongs to it."""
    scale = places.get(f"{name}_scale")
    if scale is None:
        places[name].copy_(tensor)
        return
    assert quantization is not None
    each = quantization.of_matrix(name)
    assert each is not None
    whole = Weight(places[name], scale, places.get(f"{name}_zero_point"))
    start = 0
    for part in whole.split(WIDE_AT_ONCE):
        rows = tensor[start : (start := start + len(part.numbers))]
        for place, made in zip(part, each.quantise(rows.to(scale.device), scale.dtype), strict=True):
            if place is not None and made is not None:
                place.copy_(made)


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
        numbers, scale, zero, *_ = (None if parts[0] is None else torch.cat(parts) for parts in zip(*each, strict=True))
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
