"""Checkpoints of bitsandbytes (transformers' load_in_4bit, QLoRA): weights in NF4.

Dimensions: N rows, K columns. A matrix "x" is stored as `x.weight`, uint8 `[N K / 2, 1]`, two columns' numbers in a
byte, the first in the higher bits; `x.weight.quant_map`, the 16 values that they stand for; `x.weight.absmax`, a
scale for each `blocksize` numbers; and `x.weight.quant_state.bitsandbytes__nf4`, the bytes of a JSON object. Scales
are float32, or, if they are quantised once more ("double quantisation"), bytes: the places of values in
`x.weight.nested_quant_map`, each times one of `x.weight.nested_absmax`, float32, for each `nested_blocksize` of them,
plus `nested_offset`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.weight import NF4
from .quantization import SCALE, Quantization
from .shards import Stored
from .stored import ANY, WAY, Scheme, as_it_is, check_keys, interleaved, require, skipped

METHOD = "bitsandbytes"
_GROUP_SIZE = 64
_MOST_BYTES = 4096  # of the JSON object, which has 200

_KEYS = {
    "quant_method": (METHOD,),
    "load_in_4bit": (True,),
    "load_in_8bit": (False,),
    "_load_in_4bit": (True,),
    "_load_in_8bit": (False,),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_quant_storage": ("uint8",),
    "llm_int8_skip_modules": ANY,
}
_INERT = frozenset(  # how another library multiplies by the weights
    {
        *("bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
        "llm_int8_threshold",
    }
)
_BLOCKS = tuple(_GROUP_SIZE << i for i in range(7))  # 64 to 4,096
_STATE = {
    "quant_type": ("nf4",),
    "blocksize": _BLOCKS,
    "dtype": ANY,
    "shape": ANY,
    "nested_blocksize": _BLOCKS,
    "nested_dtype": ("float32",),
    "nested_offset": ANY,
}


def scheme(where: str, config: Mapping[str, Any]) -> Scheme:
    """Return how the weights are stored. where: the key of config.json. Raises ConfigError for what is unsupported."""
    check_keys(where, config, _KEYS, _INERT)
    require(where, config, "load_in_4bit", "bnb_4bit_quant_type")
    is_skipped = skipped(where, config, "llm_int8_skip_modules")
    nested = config.get("bnb_4bit_use_double_quant", False)
    return Scheme(METHOD, Quantization("nf4"), False, is_skipped, partial(_tensors, nested))


def _tensors(nested: bool, name: str, rows: int, columns: int) -> dict[str, Stored]:
    """Return the tensors of a matrix `[N, K]`, by their names in the file."""
    weight = f"{name}.weight"
    state, absmax = f"{weight}.quant_state.bitsandbytes__nf4", f"{weight}.absmax"
    codes = (f"{weight}.nested_absmax", f"{weight}.nested_quant_map") if nested else ()
    scales = partial(_scales, rows, columns)
    return {
        weight: Stored([rows * columns // 2, 1], weight, partial(_numbers, rows), ("U8",)),
        absmax: Stored([-1], f"{name}.{SCALE}", scales, ("U8" if nested else "F32",), (state, *codes)),
        state: Stored([-1], "", partial(_state, nested, rows, columns), ("U8",)),
        f"{weight}.quant_map": Stored([len(NF4)], "", _check_values, ("F32",)),
    } | {code: Stored([-1], "", as_it_is, ("F32",)) for code in codes}


def _numbers(rows: int, pairs: Tensor) -> Tensor:
    pairs = pairs.view(rows, -1)
    return interleaved((pairs >> 4 | pairs << 4).view(torch.int32)).view(torch.uint8)


def _check_values(values: Tensor) -> Tensor:
    if not torch.equal(values.cpu(), torch.tensor(NF4)):
        raise ValueError(f"has other values than NF4, which is not supported; {WAY}")
    return values


def _scales(rows: int, columns: int, absmax: Tensor, state: Tensor, *codes: Tensor) -> Tensor:
    """Return scales `[N, K / 64]`, computed in float32 as bitsandbytes does."""
    found = _settings(bool(codes), rows, columns, state)
    if codes:
        (steps, values), size = codes, found["nested_blocksize"]
        if len(steps) != -(-len(absmax) // size) or len(values) != 256:
            raise ValueError(f"does not fit {len(steps)} nested scales of {len(values)} values; fetch the file again")
        offset = torch.tensor(found["nested_offset"], dtype=torch.float32, device=absmax.device)
        absmax = values[absmax.long()] * steps.repeat_interleave(size)[: len(absmax)] + offset
    if len(absmax) != -(-rows * columns // found["blocksize"]):
        raise ValueError(f"has {len(absmax)} scales, which do not fit blocks of {found['blocksize']}; fetch it again")
    groups = absmax.repeat_interleave(found["blocksize"] // _GROUP_SIZE)
    return groups[: rows * columns // _GROUP_SIZE].view(rows, -1)


def _state(nested: bool, rows: int, columns: int, state: Tensor) -> Tensor:
    _settings(nested, rows, columns, state)
    return state


def _settings(nested: bool, rows: int, columns: int, state: Tensor) -> Mapping[str, Any]:
    """Return the JSON object in a tensor. Raises ValueError unless it says what is supported."""
    try:
        found = json.loads(bytes(state[:_MOST_BYTES].tolist()))
    except (ValueError, RecursionError):
        raise ValueError("holds no JSON object; fetch the file again") from None
    check_keys("says", found, _STATE)
    require("says", found, "quant_type", "blocksize", "shape")
    if found["shape"] != [rows, columns]:
        raise ValueError(f"says: shape={found['shape']!r:.200}, not {[rows, columns]}, the shape by config.json")
    size, offset = found.get("nested_blocksize"), found.get("nested_offset")
    if nested and not (size is not None and type(offset) is float and math.isfinite(offset)):
        raise ValueError(f"says: nested_blocksize={size!r:.50}, nested_offset={offset!r:.50}; fetch the file again")
    return found
