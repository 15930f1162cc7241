"""Checkpoints of GPTQ (AutoGPTQ, GPTQModel, optimum), in 4 or 8 bits, and of AWQ (AutoAWQ), in 4.

Dimensions: N rows, K columns, G groups of columns. Both store a matrix "x" transposed, with `x.scales` `[G, N]` and
`x.qzeros`, int32 `[G, N / 8]`. GPTQ: `x.qweight`, int32 `[K / 8, N]`, packed along the columns of the matrix, lowest
bits first; `x.g_idx` `[K]`, the group of each column, in any order (act-order, `desc_act`); of 8 bits, a word has
four numbers. AWQ: `x.qweight`, int32 `[K, N / 8]`, packed along its rows, and in each eight the even ones first.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config_rules import ConfigError
from .quantization import ORDER, SCALE, ZERO, Quantization, numbers_of
from .shards import Stored
from .stored import (
    ANY,
    WAY,
    Scheme,
    check_group_size,
    check_keys,
    check_names,
    interleaved,
    nibbles,
    order_of,
    require,
    sorted_by_group,
    unsigned,
    words_of,
)

_GPTQ_KEYS = {
    "quant_method": ("gptq",),
    "bits": (4, 8),
    "group_size": ANY,
    "sym": (True, False),
    "desc_act": (True, False),  # g_idx tells the group of each column
    "checkpoint_format": ("gptq", "gptq_v2", None),
    "format": ("gptq", "gptq_v2", None),
    "modules_in_block_to_quantize": (None,),
    "block_name_to_quantize": (None, "model.layers"),
    "dynamic": (None, {}),
    "lm_head": (None, False),
    "is_marlin_format": (None, False),
    "pack_dtype": (None, "int32"),
}
_GPTQ_INERT = frozenset(  # how the numbers were found, and how another library multiplies by them
    {
        *("act_group_aware", "backend", "batch_size", "cache_block_outputs", "damp_auto_increment", "damp_percent"),
        *("dataset", "disable_exllama", "exllama_config", "max_input_length", "meta", "model_file_base_name"),
        *("model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "mse", "pad_token_id"),
        *("static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama"),
    }
)
_AWQ_KEYS = {
    "quant_method": ("awq",),
    "bits": (4,),
    "group_size": ANY,
    "zero_point": (True,),
    "version": ("gemm", "GEMM"),
    "modules_to_not_convert": ANY,
}
_AWQ_INERT = frozenset({"backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse"})
_AWQ_COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]  # the place of each of eight columns among the four bits of a word


def gptq_scheme(where: str, config: Mapping[str, Any]) -> Scheme:
    """Return how GPTQ stored the weights. where: the key of config.json. Raises ConfigError for what is unsupported."""
    check_keys(where, config, _GPTQ_KEYS, _GPTQ_INERT)
    require(where, config, "bits", "group_size", "sym")
    versions = {config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None} or {"gptq"}
    if len(versions) > 1:
        raise ConfigError(f"{where}: format and checkpoint_format differ; {WAY}")
    size, bits = config["group_size"], config["bits"]
    per_row = type(size) is int and size == -1
    size = None if per_row else check_group_size(where, size)
    quantization = numbers_of(bits, size, config["sym"])
    first = 1 if "gptq" in versions else 0  # what a stored zero point of 0 means
    tensors = partial(_gptq, bits, size, config["sym"], first)
    return Scheme("gptq", quantization, per_row and quantization.group_size is not None, _is_head, tensors)


def awq_scheme(where: str, config: Mapping[str, Any]) -> Scheme:
    """Return how AWQ stored the weights. where: the key of config.json. Raises ConfigError for what is unsupported."""
    check_keys(where, config, _AWQ_KEYS, _AWQ_INERT)
    require(where, config, "bits", "group_size", "zero_point", "version")
    size = check_group_size(where, config["group_size"])
    kept = check_names(where, config, "modules_to_not_convert")
    return Scheme(
        "awq",
        Quantization("int4", size),
        False,
        lambda name: _is_head(name) or any(part in name for part in kept),
        partial(_awq, size),
    )


def _is_head(name: str) -> bool:
    return name == "lm_head"


def _gptq(
    bits: int, size: int | None, symmetric: bool, first: int, name: str, rows: int, columns: int
) -> dict[str, Stored]:
    """Return GPTQ's tensors of a matrix `[N, K]`, by their names in the file."""
    size = size or columns
    zeros = _stored_zeros(bits, symmetric, name, rows, columns // size)
    if columns % (32 // bits):
        raise ConfigError(
            f"{name} has {columns} columns, not a multiple of {32 // bits}, which cannot be packed; {WAY}"
        )
    groups, numbers = f"{name}.g_idx", partial(sorted_by_group, bits, size)
    return {
        f"{name}.qweight": Stored(
            [columns * bits // 32, rows], f"{name}.weight", lambda words, of: numbers(words.T, of), ("I32",), (groups,)
        ),
        f"{name}.qzeros": zeros._replace(read=partial(_gptq_zeros, bits, first, symmetric)),
        f"{name}.scales": Stored([columns // size, rows], f"{name}.{SCALE}", torch.t),
        groups: Stored([columns], f"{name}.{ORDER}", partial(order_of, size), ("I32", "I64")),
    }


def _awq(size: int, name: str, rows: int, columns: int) -> dict[str, Stored]:
    """Return AWQ's tensors of a matrix `[N, K]`, by their names in the file."""
    groups = columns // size
    return {
        f"{name}.qweight": Stored([columns, rows // 8], f"{name}.weight", _awq_numbers, ("I32",)),
        f"{name}.qzeros": _stored_zeros(4, False, name, rows, groups)._replace(read=_awq_rows),
        f"{name}.scales": Stored([groups, rows], f"{name}.{SCALE}", torch.t),
    }


def _stored_zeros(bits: int, symmetric: bool, name: str, rows: int, groups: int) -> Stored:
    each = 32 // bits
    if rows % each:
        raise ConfigError(f"{name} has {rows} rows, not a multiple of {each}, which cannot be packed; {WAY}")
    return Stored([groups, rows // each], "" if symmetric else f"{name}.{ZERO}", dtypes=("I32",))


def _gptq_zeros(bits: int, first: int, symmetric: bool, words: Tensor) -> Tensor:
    """Return zero points `[N, G]`."""
    zeros, middle, most = unsigned(bits, words).T.to(torch.int16) + first, 1 << (bits - 1), (1 << bits) - 1
    if symmetric and (zeros != middle).any():
        raise ValueError(f"has zero points other than {middle}, but config.json says sym; set it to false there")
    if (zeros > most).any():  # one more to some libraries, 0 to others
        raise ValueError(
            f'has a zero point of {most} in format "gptq", which libraries read differently; use "gptq_v2"'
        )
    return zeros


def _awq_numbers(words: Tensor) -> Tensor:
    return interleaved(words_of(4, _awq_rows(words)))


def _awq_rows(words: Tensor) -> Tensor:
    """Return numbers packed along rows, `[X, N / 8]`, as `[N, X]`."""
    return nibbles(words).unflatten(1, (-1, 8))[..., _AWQ_COLUMNS].flatten(1).T
