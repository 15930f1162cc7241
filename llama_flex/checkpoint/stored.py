"""What the formats of quantised checkpoints share: numbers of 4 or 8 bits in words, and strict reading of a config.

Dimensions: N rows, K columns, G groups of columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.weight import GROUP_SIZES, MIDDLE_8, reorder
from .config_rules import ConfigError
from .quantization import Quantization
from .shards import Stored

WAY = "give the checkpoint that they were made of (the model card names it), or dequantise them with that library"
ANY: Any = object()  # stands for all values of a key, where another check follows or nothing depends on it


@dataclass(frozen=True)
class Scheme:
    """The storage of a checkpoint's quantised matrices.

    method: the name of the format. quantization: the numbers they become. per_row: a scale of groups is for a whole
    row, and repeated for groups. ignores: tells by its name whether a module keeps floats. tensors: from the name and
    the shape `(N, K)` of a matrix to the tensors that it is stored in, by name. head: the storage of the output matrix,
    if it is another. of_attention: from an attention's name and its number of key/value heads to the tensors that it
    has itself, by name.
    """

    method: str
    quantization: Quantization
    per_row: bool
    ignores: Callable[[str], bool]
    tensors: Callable[[str, int, int], dict[str, Stored]]
    head: Scheme | None = None
    of_attention: Callable[[str, int], dict[str, Stored]] = lambda *_: {}


def kept(bits: int, words: Tensor) -> Tensor:
    """Return numbers of 4 or 8 bits in int32 `[N, K bits / 32]`, lowest first, as `kernels.weight` has them."""
    return interleaved(words) if bits == 4 else (_bytes_of(words) ^ MIDDLE_8).view(torch.int8)


def sorted_by_group(bits: int, size: int, words: Tensor, groups: Tensor) -> Tensor:
    """Return what `kept` does, with the columns sorted by group. groups: `[K]`, that of each column."""
    order, numbers = order_of(size, groups), kept(bits, words)
    return numbers if is_in_sequence(order) else reorder(numbers, order)


def unsigned(bits: int, words: Tensor) -> Tensor:
    """Return the numbers of 4 or 8 bits in int32 `[..., W]`, lowest first, as uint8 `[..., 32 W / bits]`."""
    return nibbles(words) if bits == 4 else _bytes_of(words)


def words_of(bits: int, numbers: Tensor) -> Tensor:
    """Return numbers of 4 or 8 bits `[..., 32 W / bits]` as int32 `[..., W]`, the inverse of `unsigned`."""
    numbers = numbers.to(torch.uint8)
    if bits == 4:
        pairs = numbers.unflatten(-1, (-1, 2))
        numbers = pairs[..., 0] | pairs[..., 1] << 4
    # `contiguous` would keep the strides of a single row, which no view of another dtype takes.
    return numbers.clone(memory_format=torch.contiguous_format).view(torch.int32)


def is_in_sequence(order: Tensor) -> bool:
    """Return whether an order of columns leaves them where they are."""
    return torch.equal(order, torch.arange(len(order), device=order.device))


def order_of(size: int, groups: Tensor) -> Tensor:
    """Return the columns sorted by group, int64 `[K]`, from the group of each. Raises ValueError for another size."""
    found, order = groups.long().sort(stable=True)
    if not torch.equal(found, torch.arange(len(groups), device=groups.device) // size):
        raise ValueError(f"does not give each group {size} columns, which is not supported; {WAY}")
    return order


def as_it_is(tensor: Tensor) -> Tensor:
    """Return the tensor."""
    return tensor


def floats_of_8_bits(numbers: Tensor) -> Tensor:
    """Return float8 numbers. Raises ValueError for NaN."""
    if numbers.isnan().any():
        raise ValueError("holds NaN; fetch the file again")
    return numbers


def nibbles(words: Tensor) -> Tensor:
    """Return the numbers of 4 bits in int32 `[..., W]`, lowest first, as uint8 `[..., 8 W]`."""
    pairs = _bytes_of(words)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def interleaved(words: Tensor) -> Tensor:
    """Return numbers of 4 bits in int32 `[N, K / 8]`, lowest first, in the order of `kernels.weight`.

    No number is unpacked: of 32 columns, the first and the second four of each eight change places with the even and
    the odd ones.
    """
    first, second = _bytes_of(words).unflatten(1, (-1, 4, 2, 2)).unbind(3)
    parts = (first & 15) | second << 4, first >> 4 | (second & 240)
    return torch.stack([part.transpose(2, 3) for part in parts], 3).flatten(1).view(torch.int32)


def written(numbers: Tensor) -> Tensor:
    """Return the numbers of a weight, int32 or int8, in words, lowest first: the inverse of `kept`."""
    if numbers.dtype == torch.int32:
        return lowest_first(numbers)
    return (numbers.contiguous().view(torch.uint8) ^ MIDDLE_8).view(torch.int32)


def lowest_first(words: Tensor) -> Tensor:
    """Return int32 `[N, K / 8]` in the order of `kernels.weight`, lowest first: the inverse of `interleaved`."""
    even, odd = _bytes_of(words).unflatten(1, (-1, 2, 2, 4)).unbind(3)
    parts = (even & 15) | odd << 4, even >> 4 | (odd & 240)
    return torch.stack([part.transpose(2, 3) for part in parts], 3).flatten(1).view(torch.int32)


def _bytes_of(words: Tensor) -> Tensor:
    if words.stride(-1) != 1:  # `contiguous` would keep it in a tensor of one column
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)


def check_keys(where: str, found: Any, known: Mapping[str, Any], inert: Container[str] = ()) -> Mapping[str, Any]:
    """Return an object of a config.json. Raises ConfigError naming a key that is not known, or a value that is not.

    known: for each key the values that it may have, or ANY.
    """
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where} must be an object, found {found!r:.200}; {WAY}")
    for key, value in found.items():
        choices = known.get(key, ANY if key in inert else ())
        if choices is not ANY and not any(type(value) is type(choice) and value == choice for choice in choices):
            reason = f"is not supported (only {' or '.join(map(repr, choices))})" if choices else "is not known"
            raise ConfigError(f"{where}: {key}={value!r:.200} {reason}; {WAY}")
    return found


def check_names(where: str, config: Mapping[str, Any], key: str) -> list[str]:
    """Return the list of names at a key, [] if it is missing. Raises ConfigError unless it is one."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > 1000:
        raise ConfigError(f"{where}: {key} must be a list of names, found {names!r:.200}; {WAY}")
    return names


def skipped(where: str, config: Mapping[str, Any], key: str) -> Callable[[str], bool]:
    """Return whether a module keeps floats, as transformers decides: by the start or the end of its name, among the
    names at a key, default the output matrix. Raises ConfigError for patterns."""
    entries = ["lm_head"] if config.get(key) is None else check_names(where, config, key)
    for entry in entries:
        if not re.fullmatch(r"[\w.-]{1,200}", entry):
            raise ConfigError(f"{where}: {key} has {entry!r:.200}, a pattern; name the modules")

    def is_skipped(name: str) -> bool:
        return any(name == entry or name.startswith(f"{entry}.") or name.endswith(entry) for entry in entries)

    return is_skipped


def require(where: str, config: Mapping[str, Any], *keys: str) -> None:
    """Raise ConfigError naming a key that is missing."""
    for key in keys:
        if key not in config:
            raise ConfigError(f"{where}: {key} is missing; {WAY}")


def check_group_size(where: str, size: Any, described: str | None = None) -> int:
    """Return the size of groups of columns. Raises ConfigError unless kernels take it. described: the setting."""
    if type(size) is not int or size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        described = described or f"group_size={size!r:.200}"
        raise ConfigError(f"{where}: {described} is not supported (only {sizes}); {WAY}")
    return size
