"""Read and write PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

Dimensions: N rows, K columns of a matrix; r ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.files import make_folder, names_in
from ..checkpoint.shards import DTYPES, CheckpointError, opened
from ..kernels.lora import Update
from .config import CONFIG, EMBEDDING, HEAD, AdapterConfig

TENSORS = "adapter_model.safetensors"
FILES = CONFIG, TENSORS
_PREFIX = "base_model.model."
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")


def read(
    folder: Path, config: AdapterConfig, matrices: Mapping[str, tuple[int, int]], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Return the updates in a folder, by module, and the weights that replace a model's, by name.

    matrices: the shape `(N, K)` of each module that may have an update. weights: the model's, by name. The header is
    checked before anything is read. Raises CheckpointError listing missing, unexpected and misshapen tensors, and for
    damaged files, values that are not finite, and for a copy of a base weight that differs from the model's.
    """
    path = folder / TENSORS
    if not os.path.lexists(path) and "adapter_model.bin" in names_in(folder):
        raise CheckpointError(
            f"{folder}: only pickled weights (adapter_model.bin), which are never opened; save it anew"
        )
    with opened(path) as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        dtypes = {key: file.get_slice(key).get_dtype() for key in shapes}
        in_file = {name for name in matrices if any(f"{_PREFIX}{name}.{end}" in shapes for end in _ends_of(name))}
        targets = [name for name in matrices if config.is_target(name, in_file)]
        expected, copies = dict[str, list[int]](), dict[str, str]()
        for name in targets:
            (rows, columns), rank = matrices[name], config.rank_of(name)
            down, up = (f"{_PREFIX}{name}.{end}" for end in _ends_of(name))
            expected |= {down: [rank, columns], up: [rows, rank]}
            copy = f"{_PREFIX}{name}.base_layer.weight"
            if name in (EMBEDDING, HEAD) and copy in shapes:  # PEFT adds it
                copies[copy] = name
                expected[copy] = [columns, rows] if name == EMBEDDING else [rows, columns]
        saved = {f"{_PREFIX}{name}": name for name in weights if config.is_saved(name.rpartition(".")[0])}
        expected |= {key: list(weights[name].shape) for key, name in saved.items()}
        problems = [f"stored as {dtypes[key]}: {key}" for key in shapes if dtypes[key] not in DTYPES]
        problems += [
            f"shape: {key} is {shapes[key]}, not {expected[key]}"
            for key in sorted(expected.keys() & shapes.keys())
            if shapes[key] != expected[key]
        ]
        problems += [f"missing: {key}" for key in sorted(expected.keys() - shapes.keys())]
        problems += [f"unexpected: {key}" for key in sorted(shapes.keys() - expected.keys())]
        if not targets:
            problems.append("it adapts no matrix of this model")
        if problems:
            more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
            raise CheckpointError(f"{path}: does not fit the model and {CONFIG}: " + "; ".join(problems[:20] + more))
        tensors = {key: file.get_tensor(key) for key in expected}
    if bad := [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise CheckpointError(f"{path}: NaN or infinity in {', '.join(bad[:5])}")
    for key, name in copies.items():
        own = weights.get(f"{name}.weight", weights[f"{EMBEDDING}.weight"])  # the output matrix may be the embedding
        if own.dtype not in DTYPES.values() or not torch.equal(tensors[key].to(own), own):
            raise CheckpointError(f"{path}: {key} differs from the model's weight; it was trained on another model")
    updates = {}
    for name in targets:
        down, up = (tensors[f"{_PREFIX}{name}.{end}"] for end in _ends_of(name))
        updates[name] = Update(down, up, config.scale_of(name))
    return updates, {name: tensors[key] for key, name in saved.items()}


def write(folder: Path, raw: Mapping[str, Any], updates: Mapping[str, Update], saved: Mapping[str, Tensor]) -> None:
    """Write an adapter folder, which PEFT loads. raw: the object of `adapter_config.json`. An interruption never leaves
    one adapter's config with another's weights. Raises OSError."""
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in saved.items()}
    for name, update in updates.items():
        for end, factor in zip(_ends_of(name), update[:2], strict=True):
            tensors[f"{_PREFIX}{name}.{end}"] = factor
    make_folder(folder, FILES)
    partial = {name: folder / f".{name}.partial" for name in FILES}
    try:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)  # an existing one could be a link to anywhere
        whole = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
        save_file(whole, partial[TENSORS], metadata={"format": "pt"})
        partial[CONFIG].write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        (folder / CONFIG).unlink(missing_ok=True)
        os.replace(partial[TENSORS], folder / TENSORS)
        os.replace(partial[CONFIG], folder / CONFIG)
    except SafetensorError as error:
        raise OSError(f"{folder / TENSORS}: cannot be written ({error})") from None
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


def _ends_of(name: str) -> tuple[str, str]:
    """Return how the names of a module's two factors end."""
    return _EMBEDDING if name == EMBEDDING else _LINEAR
