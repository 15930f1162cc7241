"""Checkpoints of the library compressed-tensors (llm-compressor, vLLM): weights in 8 or 4 bits, read and written.

Dimensions: N rows, K columns, G groups of columns. A matrix "x" of 4 bits is stored as `x.weight_packed`, int32 `[N,
K / 8]`, lowest bits first, each number from 0 to 15 with 8 for 0; `x.weight_scale` `[N, G]`; perhaps
`x.weight_zero_point`, int32 `[N / 8, G]`, its rows packed in the same way; `x.weight_shape`, (N, K); and, written by
older versions of the library, `x.weight_g_idx` `[K]`, the group of each column. One of 8 bits is stored in the same
way, four numbers in a word, with 128 for 0, or as `x.weight`, int8 or float8_e4m3fn `[N, K]`, and `x.weight_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.weight import Weight
from .config_rules import ConfigError
from .quantization import ORDER, SCALE, ZERO, Format, Quantization, numbers_of
from .shards import Stored
from .stored import (
    ANY,
    WAY,
    Scheme,
    as_it_is,
    check_group_size,
    check_keys,
    kept,
    order_of,
    sorted_by_group,
    unsigned,
    words_of,
    written,
)

METHOD = "compressed-tensors"
PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
_NUMBERS, _SHAPE, _GROUPS = "weight_packed", "weight_shape", "weight_g_idx"  # of a matrix, beside SCALE and ZERO
# Of an ignore list: with more, a match could take minutes.
_MOST_PATTERNS, _MOST_REPEATS, _MOST_CHOICES = 16, 3, 2

_KEYS = {
    "quant_method": (METHOD,),
    "format": (PACKED, INTEGERS, FLOATS),
    "quantization_status": ("compressed", "frozen"),
    "config_groups": ANY,
    "ignore": ANY,
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "moe_sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_GROUP_KEYS = {"targets": (["Linear"],), "weights": ANY, "input_activations": (None,), "output_activations": (None,)}
_WEIGHT_KEYS = {
    "num_bits": ANY,
    "type": ANY,
    "symmetric": (True, False),
    "strategy": ("group", "channel", "tensor", None),
    "group_size": ANY,
    "block_structure": (None,),
    "dynamic": (False,),
    "actorder": (None, True, False, "group", "weight", "static"),  # but for "group", only the order of calibration
    "scale_dtype": (None, "torch.float16", "torch.bfloat16", "torch.float32"),
    "zp_dtype": (None, "torch.int8"),
}
# By format, type and bits: ours, the strategies, and whether there may be zero points.
_SUPPORTED: dict[tuple[Any, ...], tuple[Format, tuple[str, ...], bool]] = {
    (PACKED, "int", 4): ("int4", ("group", "channel"), True),
    (PACKED, "int", 8): ("int8", ("group", "channel"), True),
    (INTEGERS, "int", 8): ("int8", ("group", "channel", "tensor"), False),
    (FLOATS, "float", 8): ("fp8", ("channel", "tensor"), False),
}


def scheme(where: str, config: Mapping[str, Any]) -> Scheme:
    """Return how the weights are stored by the object in a config.json. Raises ConfigError for what is not supported.

    where: the key of config.json.
    """
    check_keys(where, config, _KEYS, inert=("global_compression_ratio", "version"))
    layout = config.get("format")
    if layout is None:
        raise ConfigError(f"{where}: format is missing; {WAY}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ConfigError(f"{where}: config_groups must be a single group, found {groups!r:.200}; {WAY}")
    [(name, group)] = groups.items()
    top, where = where, f"{where}.config_groups.{name}"
    check_keys(where, group, _GROUP_KEYS | {"format": (None, layout)})
    if "targets" not in group:
        raise ConfigError(f"{where}: targets are missing (only ['Linear']); {WAY}")
    weights = check_keys(f"{where}.weights", group.get("weights"), _WEIGHT_KEYS, inert=("observer", "observer_kwargs"))
    quantization, strategy = _quantization(f"{where}.weights", layout, weights)
    return Scheme(
        METHOD,
        quantization,
        strategy == "channel" and quantization.group_size is not None,
        _matcher(top, config.get("ignore")),
        partial(_tensors, layout, quantization, strategy, weights.get("actorder") in (True, "group")),
    )


def _quantization(where: str, layout: str, weights: Mapping[str, Any]) -> tuple[Quantization, str]:
    """Return the numbers and the strategy, with the library's defaults. Raises ConfigError for a combination."""
    bits, kind, size = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    found = _SUPPORTED.get((layout, kind, bits)) if isinstance(kind, str) and type(bits) is int else None
    if found is None:
        known = ", ".join(f"{b} bits of {k!r} in {f!r}" for f, k, b in _SUPPORTED)
        what = f"num_bits={bits!r:.50} of type={kind!r:.50} in format={layout!r}"
        raise ConfigError(f"{where}: {what} is not supported (only {known}); {WAY}")
    form, strategies, zeros = found
    if weights.get("actorder") in (True, "group") and (strategy, layout) != ("group", PACKED):
        raise ConfigError(f"{where}: actorder='group' does not go with strategy={strategy!r} in {layout!r}; {WAY}")
    if strategy not in strategies:
        only = f"with {bits} bits in {layout!r} only {' or '.join(map(repr, strategies))}"
        raise ConfigError(f"{where}: strategy={strategy!r} is not supported ({only}); {WAY}")
    symmetric = weights.get("symmetric", True)
    if not symmetric and not zeros:
        raise ConfigError(f"{where}: symmetric=False is not supported with {bits} bits (only True); {WAY}")
    if strategy == "group":
        return numbers_of(bits, check_group_size(where, size), symmetric), strategy
    if size not in (None, -1) or isinstance(size, float):
        raise ConfigError(f"{where}: group_size={size!r:.200} does not go with strategy={strategy!r}; {WAY}")
    return Quantization(form) if form == "fp8" else numbers_of(bits, None, symmetric), strategy


def _matcher(where: str, ignore: Any) -> Callable[[str], bool]:
    """Return whether a list of names, and patterns after "re:", has a module. Raises ConfigError for another list."""
    if not isinstance(ignore := ignore or [], list) or not all(isinstance(entry, str) for entry in ignore):
        raise ConfigError(f"{where}: ignore must be a list of names, found {ignore!r:.200}; {WAY}")
    patterns = [entry.removeprefix("re:") for entry in ignore if entry.startswith("re:")]
    if len(patterns) > _MOST_PATTERNS:
        raise ConfigError(f"{where}: ignore has {len(patterns)} patterns, more than {_MOST_PATTERNS}; name the modules")
    compiled, names = [_compiled(where, pattern) for pattern in patterns], {*ignore}
    return lambda name: name in names or any(pattern.match(name) for pattern in compiled)


def _compiled(where: str, pattern: str) -> re.Pattern[str]:
    """Compile a pattern that matches soon, whatever it is. Raises ConfigError for others, and for no pattern."""
    simple = re.fullmatch(r"[\w .*+^$|()\[\]\\-]{,200}", pattern) and not re.search(r"\)[*+]|\[\[|--|\|\|", pattern)
    if not simple or sum(map(pattern.count, "*+")) > _MOST_REPEATS or pattern.count("(") > _MOST_CHOICES:
        raise ConfigError(f"{where}: ignore has 're:{pattern:.200}', a pattern that is not supported; name the modules")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: ignore has 're:{pattern:.200}', which is no pattern ({error})") from None


# ---- read


def _tensors(
    layout: str, quantization: Quantization, strategy: str, reorders: bool, name: str, rows: int, columns: int
) -> dict[str, Stored]:
    """Return the tensors of a matrix `[N, K]`, by their names in the file."""
    size = (quantization.group_size or columns) if strategy == "group" else columns
    groups = columns // size
    numbers, scale, zero = (f"{name}.{part}" for part in ("weight", SCALE, ZERO))
    found = {scale: Stored([1] if strategy == "tensor" else [rows, groups], scale)}
    if layout == PACKED:
        bits = 4 if quantization.format == "int4" else 8
        read = partial(_packed, bits, columns)
        found[f"{name}.{_NUMBERS}"] = Stored([rows, -(-columns * bits // 32)], numbers, read, ("I32",))
        found[f"{name}.{_SHAPE}"] = Stored([2], "", partial(_check_shape, (rows, columns)), ("I64", "I32"))
        if not quantization.symmetric:
            found[zero] = Stored([-(-rows * bits // 32), groups], zero, partial(_zero_points, bits, rows), ("I32",))
        if reorders:
            groups_of, packed = f"{name}.{_GROUPS}", f"{name}.{_NUMBERS}"
            found[groups_of] = Stored([columns], f"{name}.{ORDER}", partial(order_of, size), ("I32", "I64"))
            found[packed] = found[packed]._replace(read=partial(sorted_by_group, bits, size), others=(groups_of,))
    elif quantization.format == "int8":
        found[numbers] = Stored([rows, columns], numbers, as_it_is, ("I8",))
    else:
        found[numbers] = Stored([rows, columns], numbers, _floats_of_8_bits, ("F8_E4M3",))
    return found


def _packed(bits: int, columns: int, words: Tensor) -> Tensor:
    """Return the numbers in words, of 8 bits without those that fill the last word."""
    return kept(bits, words) if bits == 4 else kept(bits, words)[:, :columns]


def _zero_points(bits: int, rows: int, words: Tensor) -> Tensor:
    return unsigned(bits, words.T)[:, :rows].T


def _floats_of_8_bits(numbers: Tensor) -> Tensor:
    if numbers.isnan().any():
        raise ValueError("holds NaN; fetch the file again")
    return numbers


def _check_shape(shape: tuple[int, int], found: Tensor) -> Tensor:
    if (listed := found.tolist()) != [*shape]:
        raise ValueError(f"is {listed}, not {[*shape]}, the shape by config.json")
    return found


# ---- written


def compress(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a model under the format's names, and what config.json says of them, {} for floats alone.

    Numbers of 4 bits stay as they are until `as_written`, so that no second copy of the model is in memory.
    Raises ValueError for matrices that are quantised in different ways, or not in a layer.
    """
    found: dict[str, Tensor] = {}
    kinds: dict[Quantization, str] = {}
    ignored = ["lm_head"]
    for name, tensor in tensors.items():
        matrix = name.removesuffix(".weight")
        if (scale := tensors.get(f"{matrix}.{SCALE}")) is not None and matrix != name:
            weight = Weight(tensor, scale, tensors.get(f"{matrix}.{ZERO}"))
            kinds.setdefault(_kind(weight), name)
            if not name.startswith("model.layers."):
                raise ValueError(f"cannot save {name} in few bits, only matrices of layers; keep floats in it")
            if _kind(weight).group_size is not None:
                found[f"{matrix}.{_SHAPE}"] = torch.tensor(weight.shape)
                name = f"{matrix}.{_NUMBERS}"
        elif matrix != name and tensor.ndim == 2 and name.startswith("model.layers."):
            ignored.append(matrix)
        if name.endswith(ZERO):
            bits = 4 if tensors[name.removesuffix(ZERO) + "weight"].dtype == torch.int32 else 8
            tensor = words_of(bits, _padded(tensor, 32 // bits).T).T
        found[name] = tensor
    if not kinds:
        return found, {}
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise ValueError(
            f"cannot save {first} as {one.name} beside {second} as {other.name}; quantise all in the same way"
        )
    return found, {"quantization_config": _described(next(iter(kinds)), ignored)}


def as_written(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of `compress` as it is written, a copy."""
    if not name.endswith(f".{_NUMBERS}"):
        return tensor.clone(memory_format=torch.contiguous_format)
    return written(tensor)


def _kind(weight: Weight) -> Quantization:
    """Return how a weight is quantised. Raises ValueError for groups that cannot be saved."""
    assert weight.scale is not None
    if weight.numbers.dtype == torch.float8_e4m3fn:
        return Quantization("fp8")
    groups, symmetric = weight.scale.shape[1], weight.zero is None
    if not weight.is_packed and groups == 1 and symmetric:
        return Quantization("int8")
    return Quantization("int4" if weight.is_packed else "int8", weight.shape[1] // groups, symmetric)


def _padded(zero: Tensor, each: int) -> Tensor:
    """Return zero points `[N, G]` with rows of 0 up to a multiple of `each`."""
    return torch.nn.functional.pad(zero, (0, 0, 0, -len(zero) % each))


def _described(quantization: Quantization, ignored: list[str]) -> dict[str, Any]:
    size = quantization.group_size
    layout = FLOATS if quantization.format == "fp8" else INTEGERS if size is None else PACKED
    weights = {
        "num_bits": 4 if quantization.format == "int4" else 8,
        "type": "float" if quantization.format == "fp8" else "int",
        "symmetric": quantization.symmetric,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    # The format is named in the group, too: without it, the library takes 8 bits for packed.
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": layout}},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
