"""Checkpoints of the library compressed-tensors (llm-compressor, vLLM), read and written: weights in 8 or 4 bits, and
inputs in 8.

Dimensions: N rows, K columns, G groups of columns. A matrix "x" of 4 bits is stored as `x.weight_packed`, int32
`[N, K / 8]`, lowest bits first, each number from 0 to 15 with 8 for 0; `x.weight_scale` `[N, G]`; perhaps
`x.weight_zero_point`, int32 `[N / 8, G]`, its rows packed in the same way; `x.weight_shape`, (N, K); and, written by
older versions of the library, `x.weight_g_idx` `[K]`, the group of each column. One of 8 bits is stored in the same
way, four numbers in a word, with 128 for 0, or as `x.weight`, int8 or float8_e4m3fn `[N, K]`, and `x.weight_scale`
`[N, 1]`; the inputs of the latter may be numbers of the same kind, with a scale of their own, or with `x.input_scale`
`[1]`. An attention "a" may have `a.k_scale` and `a.v_scale`, of its keys and values in float8_e4m3fn, `[1]`, or, of
each head, `[heads, 1, 1]` (see `kernels.kv_cache`), with quantised matrices or without.

The output matrix may be quantised like the layers, or in another way, as a group of its own. An embedding is not: with
one of 4 bits, and one that is the output matrix too, transformers does not load (5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.kv_cache import GIVEN
from ..kernels.weight import PARTS, QUANTISED, Weight
from .config_rules import ConfigError, simple_pattern
from .quantization import INPUT, ORDER, SCALE, WIDE_AT_ONCE, ZERO, Format, Inputs, Quantization, numbers_of
from .shards import EMBEDDING, HEAD, Stored
from .stored import (
    ANY,
    WAY,
    Scheme,
    as_it_is,
    check_group_size,
    check_keys,
    floats_of_8_bits,
    kept,
    order_of,
    require,
    sorted_by_group,
    unsigned,
    words_of,
    written,
)

METHOD = "compressed-tensors"
PACKED, INTEGERS, FLOATS = _LAYOUTS = "pack-quantized", "int-quantized", "float-quantized"
_MIXED = "mixed-precision"  # each group names its own
_DENSE = "dense"  # of scales of keys and values alone
_LAYERS, _HEAD = ["Linear"], ["re:.*lm_head"]  # the targets of groups
_NUMBERS, _SHAPE, _GROUPS = "weight_packed", "weight_shape", "weight_g_idx"  # of a matrix, beside SCALE and ZERO
_MOST_PATTERNS = 16  # of an ignore list

_KEYS = {
    "quant_method": (METHOD,),
    "format": (*_LAYOUTS, _MIXED, _DENSE),
    "quantization_status": ("compressed", "frozen"),
    "config_groups": ANY,
    "ignore": ANY,
    "kv_cache_scheme": ANY,
    "sparsity_config": (None, {}),
    "moe_sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_GROUP_KEYS = {
    "targets": (_LAYERS, _HEAD, ["lm_head"], ["re:.*lm_head$"], ["re:lm_head"], ["re:lm_head.*"], ["re:.*lm_head.*"]),
    "weights": ANY,
    "input_activations": ANY,
    "output_activations": (None,),
}
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
_INPUT_KEYS = {
    "num_bits": (8,),
    "type": ANY,
    "symmetric": (True,),
    "strategy": ("token", "tensor", None),
    "group_size": (None,),
    "block_structure": (None,),
    "dynamic": (True, False),
    "actorder": (None,),
    "scale_dtype": (None,),
    "zp_dtype": ANY,  # of zero points, which there are none of
}
_KV_KEYS = _INPUT_KEYS | {
    "type": ("float",),
    "strategy": ("tensor", "attn_head", None),
    "dynamic": (False,),
    "scale_dtype": (None, "torch.float16", "torch.bfloat16", "torch.float32"),
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
    groups, of_attention = config.get("config_groups"), _of_attention(where, config.get("kv_cache_scheme"))
    if groups == {} and layout == _DENSE and of_attention is not None:
        plain = Quantization("fp8"), False, lambda name: True, partial(_tensors, layout, Quantization("fp8"), "", False)
        return Scheme(METHOD, *plain, of_attention=of_attention)
    if not isinstance(groups, Mapping) or len(groups) not in (1, 2):
        only = "a single group, or one and another for lm_head"
        raise ConfigError(f"{where}: config_groups must be {only}, found {groups!r:.200}; {WAY}")
    ignores, schemes = _matcher(where, config.get("ignore")), dict[bool, Scheme]()  # by whether it is for lm_head
    for name, group in groups.items():
        found = _group(f"{where}.config_groups.{name}", layout, group, ignores)
        if schemes.setdefault(group["targets"] != _LAYERS, found) is not found:
            raise ConfigError(f"{where}.config_groups: two groups have targets={group['targets']}; {WAY}")
    if False not in schemes:
        raise ConfigError(f"{where}.config_groups: no group has targets={_LAYERS}; {WAY}")
    found = replace(schemes[False], head=schemes.get(True))
    return found if of_attention is None else replace(found, of_attention=of_attention)


def _of_attention(where: str, kv: Any) -> Callable[[str, int], dict[str, Stored]] | None:
    """Return what gives the tensors of an attention, by their names in the file; None if it has none. Raises
    ConfigError."""
    if kv is None:
        return None
    where = f"{where}.kv_cache_scheme"
    check_keys(where, kv, _KV_KEYS, inert=("observer", "observer_kwargs"))
    require(where, kv, "type")

    def tensors(name: str, heads: int) -> dict[str, Stored]:
        shape = [heads, 1, 1] if kv.get("strategy") == "attn_head" else [1]
        return {f"{name}.{part}": Stored(shape, f"{name}.{part}", _positive) for part in GIVEN}

    return tensors


def _group(where: str, layout: str, group: Any, ignores: Callable[[str], bool]) -> Scheme:
    """Return how the weights of a group are stored. layout: that of all groups. Raises ConfigError."""
    layouts = _LAYOUTS if layout == _MIXED else (None, layout)
    check_keys(where, group, _GROUP_KEYS | {"format": layouts})
    for key in ("targets", *(["format"] if layout == _MIXED else [])):
        if key not in group:
            raise ConfigError(f"{where}: {key} is missing; {WAY}")
    layout = group.get("format") or layout
    weights = check_keys(f"{where}.weights", group.get("weights"), _WEIGHT_KEYS, inert=("observer", "observer_kwargs"))
    quantization, strategy = _quantization(f"{where}.weights", layout, weights)
    if group.get("input_activations") is not None:
        inputs = _inputs(f"{where}.input_activations", layout, group["input_activations"])
        if quantization.group_size is not None:
            only = "only with a scale for each row of a weight"
            raise ConfigError(f"{where}.input_activations is not supported with strategy={strategy!r} ({only}); {WAY}")
        quantization = replace(quantization, inputs=inputs)
    per_row, reorders = strategy == "channel" and quantization.group_size is not None, weights.get("actorder")
    tensors = partial(_tensors, layout, quantization, strategy, reorders in (True, "group"))
    return Scheme(METHOD, quantization, per_row, ignores, tensors)


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


def _inputs(where: str, layout: str, inputs: Any) -> Inputs:
    """Return which inputs a layer has, with the library's defaults. Raises ConfigError for others."""
    found = check_keys(where, inputs, _INPUT_KEYS, inert=("observer", "observer_kwargs"))
    kind, known = found.get("type", "int"), {INTEGERS: "int", FLOATS: "float"}.get(layout)
    if known is None:
        raise ConfigError(f"{where} is not supported in format={layout!r} (only in {INTEGERS!r} or {FLOATS!r}); {WAY}")
    if kind != known:
        raise ConfigError(f"{where}: type={kind!r:.50} in format={layout!r} is not supported (only {known!r}); {WAY}")
    dynamic, strategy = found.get("dynamic", False), found.get("strategy") or "tensor"
    if dynamic != (strategy == "token"):
        why = ": a token's result would depend on those computed with it" if dynamic else ""
        raise ConfigError(
            f"{where}: strategy={strategy!r} with dynamic={dynamic} is not supported{why} (only 'token' with True or "
            f"'tensor' with False); {WAY}"
        )
    return "dynamic" if dynamic else "static"


def _matcher(where: str, ignore: Any) -> Callable[[str], bool]:
    """Return whether a list of names, and patterns after "re:", has a module. Raises ConfigError for another list."""
    if not isinstance(ignore := ignore or [], list) or not all(isinstance(entry, str) for entry in ignore):
        raise ConfigError(f"{where}: ignore must be a list of names, found {ignore!r:.200}; {WAY}")
    patterns = [entry.removeprefix("re:") for entry in ignore if entry.startswith("re:")]
    if len(patterns) > _MOST_PATTERNS:
        raise ConfigError(f"{where}: ignore has {len(patterns)} patterns, more than {_MOST_PATTERNS}; name the modules")
    compiled = [simple_pattern(f"{where}: ignore", pattern, "re:") for pattern in patterns]
    names = {*ignore}
    return lambda name: name in names or any(pattern.match(name) for pattern in compiled)


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
        found[numbers] = Stored([rows, columns], numbers, floats_of_8_bits, ("F8_E4M3",))
    if quantization.inputs == "static":
        found[f"{name}.{INPUT}"] = Stored([1], f"{name}.{INPUT}")
    return found


def _packed(bits: int, columns: int, words: Tensor) -> Tensor:
    """Return the numbers in words, of 8 bits without those that fill the last word."""
    return kept(bits, words) if bits == 4 else kept(bits, words)[:, :columns]


def _zero_points(bits: int, rows: int, words: Tensor) -> Tensor:
    return unsigned(bits, words.T)[:, :rows].T


def _check_shape(shape: tuple[int, int], found: Tensor) -> Tensor:
    if (listed := found.tolist()) != [*shape]:
        raise ValueError(f"is {listed}, not {[*shape]}, the shape by config.json")
    return found


def _positive(scale: Tensor) -> Tensor:
    if not ((scale > 0) & scale.isfinite()).all():
        raise ValueError("has a scale that is not a positive number; fetch the file again")
    return scale


# ---- written


def compress(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a model under the format's names, and what config.json says of them, {} for floats alone.

    A quantised embedding becomes the floats that it stands for; a tied output matrix keeps its few bits, as an untied
    one. Numbers of 4 bits stay as they are until `as_written`, so that no second copy of the model is in memory.
    Raises ValueError for matrices of layers that are quantised in different ways.
    """
    tensors, changed = _with_floats_to_look_up(tensors)
    tensors, kv = _with_scales_as_stored(tensors)
    found: dict[str, Tensor] = {}
    kinds: dict[Quantization, str] = {}
    head: Quantization | None = None
    ignored = []
    for name, tensor in tensors.items():
        matrix = name.removesuffix(".weight")
        if (scale := tensors.get(f"{matrix}.{SCALE}")) is not None and matrix != name:
            weight = Weight(tensor, scale, *(tensors.get(f"{matrix}.{part}") for part in (ZERO, INPUT)))
            kind = _kind(weight)
            if name == HEAD:
                head = kind
            else:
                kinds.setdefault(kind, name)
            if kind.group_size is not None:
                found[f"{matrix}.{_SHAPE}"] = torch.tensor(weight.shape)
                name = f"{matrix}.{_NUMBERS}"
        elif matrix != name and tensor.ndim == 2 and name.startswith("model.layers."):
            ignored.append(matrix)
        if name.endswith(INPUT):
            if tensor.numel():
                found[name] = _one_of(name, tensor)
            continue
        if name.endswith(ZERO):
            bits = 4 if tensors[name.removesuffix(ZERO) + "weight"].dtype == torch.int32 else 8
            tensor = words_of(bits, _padded(tensor, 32 // bits).T).T
        found[name] = tensor
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise ValueError(
            f"cannot save {first} as {one.name} beside {second} as {other.name}; quantise all in the same way"
        )
    groups = [(kind, _LAYERS) for kind in kinds or filter(None, [head])]
    if head is None:
        ignored.insert(0, "lm_head")
    elif head not in (kind for kind, _ in groups):
        groups.append((head, _HEAD))
    return found, changed | ({"quantization_config": _described(groups, ignored, kv)} if groups or kv else {})


def _with_scales_as_stored(tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a model with those of keys and values as they are stored, and their scheme, None without.
    Raises ValueError unless all layers have both."""
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(GIVEN)}
    if not scales:
        return tensors, None
    names = {name.rpartition(".self_attn.")[0] for name in tensors if ".self_attn." in name}
    missing = [each for name in sorted(names) for part in GIVEN if (each := f"{name}.self_attn.{part}") not in scales]
    if missing:
        raise ValueError(f"cannot save scales of keys and values without {missing[0]}; set all or none of them to None")
    alike = all((scale == scale[0]).all() for scale in scales.values())
    kv = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor" if alike else "attn_head"}
    stored = {name: scale[0, 0] for name, scale in scales.items()} if alike else scales
    return {**tensors, **stored}, kv | {"dynamic": False}


def _with_floats_to_look_up(tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return the tensors of a model without a quantised embedding, and what changes in config.json."""
    names, head_names = ([name.replace("weight", kind) for kind in PARTS] for name in (EMBEDDING, HEAD))
    weight = Weight(tensors[EMBEDDING], *map(tensors.get, names[1:])) if EMBEDDING in tensors else None
    if weight is None or weight.scale is None:
        return tensors, {}
    floats = torch.cat([part.floats() for part in weight.split(WIDE_AT_ONCE)])
    others = {name: tensor for name, tensor in tensors.items() if name not in names}
    if HEAD in tensors:
        return {EMBEDDING: floats} | others, {}
    tied = {name: part for name, part in zip(head_names, weight, strict=True) if part is not None}
    return {EMBEDDING: floats} | others | tied, {"tie_word_embeddings": False}


def as_written(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of `compress` as it is written, a copy."""
    if not name.endswith(f".{_NUMBERS}"):
        return tensor.clone(memory_format=torch.contiguous_format)
    return written(tensor)


def _kind(weight: Weight) -> Quantization:
    """Return how a weight is quantised. Raises ValueError for groups that cannot be saved."""
    assert weight.scale is not None
    form = cast(Format, QUANTISED[weight.numbers.dtype])
    if weight.is_per_row:
        given = weight.input_scale
        inputs: Inputs | None = None if given is None else "static" if given.numel() else "dynamic"
        return Quantization(form, inputs=inputs)
    groups, symmetric = weight.scale.shape[1], weight.zero is None
    return Quantization(form, weight.shape[1] // groups, symmetric)


def _one_of(name: str, scale: Tensor) -> Tensor:
    """Return a scale of inputs `[N, 1]` as it is stored, `[1]`. Raises ValueError unless it is one number."""
    if (scale != scale[0]).any():
        raise ValueError(f"cannot save {name}, whose numbers differ; give all inputs of a layer one scale")
    return scale[0]


def _padded(zero: Tensor, each: int) -> Tensor:
    """Return zero points `[N, G]` with rows of 0 up to a multiple of `each`."""
    return torch.nn.functional.pad(zero, (0, 0, 0, -len(zero) % each))


def _described(
    groups: list[tuple[Quantization, list[str]]], ignored: list[str], kv: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the object for config.json, with a group of each quantization and its targets, and the scheme of keys and
    values."""
    described = {f"group_{i}": _described_group(*group) for i, group in enumerate(groups)}
    layouts = {group["format"] for group in described.values()} or {_DENSE}
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": ignored,
        "kv_cache_scheme": kv,
        "global_compression_ratio": None,
    }


def _described_group(quantization: Quantization, targets: list[str]) -> dict[str, Any]:
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
    inputs = None
    if quantization.inputs is not None:
        dynamic = quantization.inputs == "dynamic"
        inputs = weights | {"strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    # The format is named in the group, too: without it, the library takes 8 bits for packed.
    group = {"targets": targets, "weights": weights, "input_activations": inputs, "output_activations": None}
    return group | {"format": layout}
