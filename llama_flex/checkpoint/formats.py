"""The formats of quantised checkpoints, and what follows for loading one: its tensors, and what becomes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.weight import GROUP_SIZES
from . import bitsandbytes, finegrained_fp8, quantization, shards
from .compressed_tensors import METHOD
from .compressed_tensors import scheme as compressed_tensors_scheme
from .config_rules import QUANTIZATION_KEYS, ConfigError
from .gptq import awq_scheme, gptq_scheme
from .quantization import INPUT, ORDER, Quantization
from .shards import CheckpointError, Stored
from .stored import WAY, Scheme, is_in_sequence

# By quant_method: what reads the object in config.json, given its key there.
_FORMATS: dict[str, Callable[[str, Mapping[str, Any]], Scheme]] = {
    METHOD: compressed_tensors_scheme,
    "gptq": gptq_scheme,
    "awq": awq_scheme,
    bitsandbytes.METHOD: bitsandbytes.scheme,
    finegrained_fp8.METHOD: finegrained_fp8.scheme,
}


def scheme_of(raw: Mapping[str, Any]) -> Scheme | None:
    """Return how a config.json says that weights are quantised, None if they are not. Raises ConfigError."""
    given = {key: raw[key] for key in QUANTIZATION_KEYS if raw.get(key) is not None}
    if not given:
        return None
    (key, value), *others = given.items()
    if any(other != value for _, other in others):
        raise ConfigError(f"{' and '.join(given)} differ; keep the one that tells how the weights are stored")
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    read = _FORMATS.get(method) if isinstance(method, str) else None
    if read is None:
        raise ConfigError(_unknown(key, value))
    return read(key, value)


class Plan(NamedTuple):
    """The tensors of a folder, and the parameters that they become.

    expected: the tensors in its files, by name. quantization: of the model's matrices, or None. floats: the paths of
    modules that it does not apply to. sharing: the names of matrices that take the same inputs, with a scale for each.
    """

    folder: Path
    expected: dict[str, Stored]
    quantization: Quantization | None
    floats: frozenset[str] = frozenset()
    sharing: tuple[list[str], ...] = ()

    def fill(self, places: Mapping[str, Tensor], name: str, tensor: Tensor, beside: Mapping[str, Tensor]) -> None:
        """Copy a tensor of the files into the parameters. Raises CheckpointError naming one with invalid values.

        beside: those of `beside`, by name.
        """
        place = self.expected[name].place
        if self.expected[name].read is None:
            quantization.fill(places, name, tensor, self.quantization)
            return
        device = places[place].device if place in places else tensor.device
        found = self._read(name, tensor.to(device), *(beside[other].to(device) for other in self.expected[name].others))
        if place in places:
            places[place].copy_(found)

    @property
    def beside(self) -> set[str]:
        """The names of small tensors that are needed to read others."""
        return {name for stored in self.expected.values() for name in stored.others}

    def order_columns(
        self,
        model: nn.Module,
        modules: Iterable[tuple[str, list[str]]],
        beside: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """Give layers an order of columns where the files have their groups in another (GPTQ's act-order).

        modules: see `plan`. beside: see `fill`. Raises CheckpointError naming one with invalid values, and matrices
        that are stacked, but have other orders.
        """
        orders = {self.expected[name].place: self._read(name, tensor) for name, tensor in beside.items()}
        for path, matrices in modules:
            found = [orders[place] for matrix in matrices if (place := f"{matrix}.{ORDER}") in orders]
            for matrix, order in zip(matrices, found, strict=False):
                if not torch.equal(order, found[0]):
                    raise CheckpointError(
                        f"{self.folder}: {matrix} has its columns in another order than {matrices[0]} (g_idx); {WAY}"
                    )
            if found and not is_in_sequence(found[0]):
                order = nn.Parameter(found[0].to(device), requires_grad=False)
                model.get_submodule(path).register_parameter(ORDER, order)

    def _read(self, name: str, *tensors: Tensor) -> Tensor:
        """Return what a tensor of the files becomes. Raises CheckpointError naming one with invalid values."""
        read = self.expected[name].read
        assert read is not None
        try:
            return read(*tensors)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {name} {error}") from None

    def check(self, places: Mapping[str, Tensor]) -> None:
        """Warn of floats that are not finite. Raises CheckpointError if scales of the same inputs differ."""
        floats = {n: x for n, x in places.items() if x.dtype in shards.DTYPES.values() and x.numel()}
        shards.warn_if_not_finite({name.replace(".weight_scale", ".weight"): x for name, x in floats.items()})
        for first, *others in self.sharing:
            for other in others:
                one, two = (places[f"{name}.{INPUT}"][0].item() for name in (first, other))
                if one != two:
                    raise CheckpointError(
                        f"{self.folder}: {other}.{INPUT} is {two}, but that of {first}, which has the same inputs, is "
                        f"{one}, which is not supported; {WAY}"
                    )


def plan(
    folder: Path,
    raw: Mapping[str, Any],
    modules: Iterable[tuple[str, list[str]]],
    shapes: Mapping[str, list[int]],
    quantize: Quantization | None,
    kv_heads: int,
) -> Plan:
    """Return how to load a model.

    raw: the object in config.json. modules: the paths of its modules, and the names of the matrices stacked in each.
    shapes: of the model's tensors, by name. quantize: what to quantise matrices of floats to. kv_heads: of each layer.
    Raises ConfigError.
    """
    try:
        scheme = scheme_of(raw)
        if scheme is None:
            return Plan(folder, {name: Stored(shape, name) for name, shape in shapes.items()}, quantize)
        if quantize is not None:
            raise ConfigError(
                f"quantize={quantize.name!r} is given, but the weights are already quantised, by {scheme.method!r}; "
                "leave it out, or give the checkpoint that they were made of"
            )
        return _quantised(folder, scheme, modules, shapes, kv_heads)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None


def _quantised(
    folder: Path,
    scheme: Scheme,
    modules: Iterable[tuple[str, list[str]]],
    shapes: Mapping[str, list[int]],
    kv_heads: int,
) -> Plan:
    """Return how to load a quantised checkpoint. Raises ConfigError if it does not fit the model."""
    floats, in_layers, head, sharing = {"embed"}, dict[str, list[int]](), dict[str, list[int]](), list[list[str]]()
    kv_scales = dict[str, Stored]()
    for path, names in modules:
        if path.endswith(".attention"):
            kv_scales |= scheme.of_attention(names[0], kv_heads)
            continue
        matrices = {name: shape for name in names if len(shape := shapes[f"{name}.weight"]) == 2}
        if path == "embed" or not matrices:
            continue
        kept = [name for name in names if scheme.ignores(name)]
        if kept and len(kept) < len(names):
            other = next(name for name in names if name not in kept)
            raise ConfigError(f"{kept[0]} keeps floats, but {other} does not, which is not supported; {WAY}")
        if kept:
            floats.add(path)
        elif path == "lm_head":
            head |= matrices
        else:
            in_layers |= matrices
            sharing += [names] if scheme.quantization.inputs == "static" else []
    quantization = dataclasses.replace(
        _fitting(scheme, in_layers),
        vocabulary=_fitting(scheme.head or scheme, head) if head else None,
        given_kv=bool(kv_scales),
    )
    expected = dict[str, Stored]()
    for name, shape in shapes.items():
        matrix = name.removesuffix(".weight")
        if matrix != name and (matrix in in_layers or matrix in head):
            expected |= (scheme.head or scheme if matrix in head else scheme).tensors(matrix, *shape)
        else:
            expected[name] = Stored(shape, name)
    return Plan(folder, expected | kv_scales, quantization, frozenset(floats), tuple(sharing))


def _fitting(scheme: Scheme, matrices: Mapping[str, list[int]]) -> Quantization:
    """Return the quantization of matrices that are stored by a scheme. Raises ConfigError for columns that groups do
    not divide."""
    quantization = _for_rows(scheme.quantization, matrices) if scheme.per_row else scheme.quantization
    size = quantization.group_size or 1
    for name, (_, columns) in matrices.items():
        if columns % size:
            raise ConfigError(f"groups of {size} do not divide the {columns} columns of {name}; {WAY}")
    return quantization


def _for_rows(quantization: Quantization, matrices: Mapping[str, list[int]]) -> Quantization:
    """Return a quantization with the largest groups that divide the rows of all matrices. Raises ConfigError."""
    for size in reversed(GROUP_SIZES):
        if all(columns % size == 0 for _, columns in matrices.values()):
            return dataclasses.replace(quantization, group_size=size)
    name, (_, columns) = next(item for item in matrices.items() if item[1][1] % GROUP_SIZES[0])
    raise ConfigError(f"no groups of {GROUP_SIZES[0]} divide the {columns} columns of {name}; {WAY}")


def _unknown(key: str, value: Any) -> str:
    """Explain why a quantised checkpoint is refused: its method, as far as the config names it, and what to do."""
    value = value if isinstance(value, Mapping) else {}
    method = value.get("quant_method") or value.get("quant_type") or value.get("format")
    bits = value.get("bits") or next((n for n in (4, 8) if value.get(f"load_in_{n}bit")), None)
    kind = (
        f"by {method!r:.200}" * bool(method) + f" to {bits!r:.200} bits" * bool(bits) or "by a method it does not name"
    )
    known = ", ".join(_FORMATS)
    return f"{key}: the weights are quantised {kind}, which is not supported (only {known}); {WAY}"
