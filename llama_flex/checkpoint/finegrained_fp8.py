"""Checkpoints of transformers' "fp8" (DeepSeek-V3, Qwen3-FP8, Ministral 3): weights and inputs in float8_e4m3fn.

Dimensions: N rows, K columns. A matrix "x" is stored as `x.weight`, float8_e4m3fn `[N, K]`, and `x.weight_scale_inv`,
by which the numbers are multiplied, whatever its name says: `[N / R, K / C]`, the first rounded up, one for each block
of R rows and C columns (`weight_block_size`), or, without blocks, one number. Inputs become numbers of the same dtype:
with blocks, each C columns of a token have a scale; without, each token has one, or all have `x.activation_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from .config_rules import ConfigError
from .quantization import INPUT, SCALE, Inputs, Quantization
from .shards import Stored
from .stored import ANY, WAY, Scheme, as_it_is, check_group_size, check_keys, floats_of_8_bits, require, skipped

METHOD = "fp8"

_KEYS = {
    "quant_method": (METHOD,),
    "activation_scheme": ("dynamic", "static"),
    "weight_block_size": ANY,
    "modules_to_not_convert": ANY,
    "ignored_layers": ANY,  # another name for the same
    "modules_to_convert": (None, []),
    "dequantize": (None, False),
    "scale_fmt": (None, "float"),
    "expert_dtype": (None, "fp8"),
    "fmt": (None, "e4m3"),
}


def scheme(where: str, config: Mapping[str, Any]) -> Scheme:
    """Return how the weights are stored. where: the key of config.json. Raises ConfigError for what is unsupported."""
    check_keys(where, config, _KEYS)
    require(where, config, "activation_scheme", "weight_block_size")
    inputs, block = config["activation_scheme"], config["weight_block_size"]
    names = "modules_to_not_convert" if config.get("modules_to_not_convert") is not None else "ignored_layers"
    is_skipped = skipped(where, config, names)
    if block is None:
        return Scheme(METHOD, Quantization("fp8", inputs=inputs), False, is_skipped, partial(_tensors, None, inputs))
    if not isinstance(block, list) or len(block) != 2 or type(block[0]) is not int or block[0] < 1:
        raise ConfigError(f"{where}: weight_block_size must be two numbers or null, found {block!r:.200}; {WAY}")
    size = check_group_size(where, block[1], f"weight_block_size={block!r:.200}: blocks of {block[1]!r:.50} columns")
    if inputs != "dynamic":
        only = "with blocks only 'dynamic'"
        raise ConfigError(f"{where}: activation_scheme={inputs!r} is not supported ({only}); {WAY}")
    quantization = Quantization("fp8", size, inputs=inputs)
    return Scheme(METHOD, quantization, False, is_skipped, partial(_tensors, (block[0], size), inputs))


def _tensors(block: tuple[int, int] | None, inputs: Inputs, name: str, rows: int, columns: int) -> dict[str, Stored]:
    """Return the tensors of a matrix `[N, K]`, by their names in the file. Raises ConfigError for a single block in a
    row, whose scale would be taken for that of a row, in the model's dtype."""
    if block is not None and columns == block[1]:
        raise ConfigError(f"weight_block_size: {name} has one block of {columns} columns, not several; {WAY}")
    numbers, scale = f"{name}.weight", f"{name}.{SCALE}"
    found = {numbers: Stored([rows, columns], numbers, floats_of_8_bits, ("F8_E4M3",))}
    if block is None:
        found[f"{scale}_inv"] = Stored([], scale, as_it_is)
    else:
        shape = [-(-rows // block[0]), columns // block[1]]
        found[f"{scale}_inv"] = Stored(shape, scale, partial(_of_rows, rows, block[0]))
    if inputs == "static":
        found[f"{name}.activation_scale"] = Stored([], f"{name}.{INPUT}", as_it_is)
    return found


def _of_rows(rows: int, each: int, scales: Tensor) -> Tensor:
    """Return the scales of blocks for each of their rows, `[N, K / C]`."""
    return scales.repeat_interleave(min(each, rows), 0)[:rows]
