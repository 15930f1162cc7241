"""Write a model as a Hugging Face folder, so that an interruption never leaves a mixture of two models."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..kernels.kv_cache import GIVEN
from ..kernels.weight import PARTS, Weight
from . import quantization
from .compressed_tensors import as_written, compress
from .config_rules import QUANTIZATION_KEYS
from .files import make_folder
from .generation_config import GenerationConfig

GENERATION_CONFIG = "generation_config.json"
MAX_SHARD_BYTES = 5 * 10**9


def assign(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a new model the tensors of another with the same config.

    Raises ValueError listing those that do not fit.
    """
    if any(name.endswith(".adapter.down") for name in state):
        raise ValueError(
            "adapters are loaded: save one by itself (model.adapters.save), or merge it, and remove the others, before "
            "saving the model"
        )
    for path, module in model.named_modules():
        numbers, scale, *others = parts = [state.get(f"{path}.{kind}") for kind in PARTS]
        order = parts[-1]
        what = None if order is None else "whose columns are reordered (act-order)"
        if numbers is not None and Weight(numbers, scale).is_fp8_in_groups:
            what = "which is in groups of fp8"
        elif numbers is not None and Weight(numbers).is_nf4:
            what = "which is in NF4"
        if what is not None:
            raise ValueError(
                f"cannot save {path}, {what}, as compressed-tensors; keep the folder that it was loaded from"
            )
        for name in GIVEN:
            if path.endswith(".attention") and (given := state.get(f"{path}.{name}")) is not None:
                module.register_parameter(name, nn.Parameter(given, requires_grad=False))
        if quantization.is_quantisable(module) and numbers is not None and scale is not None:
            weight = Weight(numbers, scale, *others)
            if weight.shape == module.get_parameter("weight").shape and weight.fits(scale):
                quantization.assign(module, weight)
    expected, found = ({name: list(t.shape) for name, t in held.items()} for held in (model.state_dict(), state))
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
    ]
    if problems:
        raise ValueError(
            f"cannot save a model whose tensors do not fit its config: {'; '.join(problems[:8])}; put a Linear with "
            "the merged weight in place of each replaced module"
        )
    model.load_state_dict(state, assign=True)


def save(tensors: Mapping[str, Tensor], config: Mapping[str, Any], generation: GenerationConfig, folder: Path) -> None:
    """Write `config.json`, `generation_config.json` and safetensors of at most 5 GB each into `folder`.

    tensors: by Hugging Face's names. config: the object of config.json, without its dtype. Quantised weights are
    written as compressed-tensors has them, see `compress`; raises ValueError if they are quantised in different ways.

    If no generation_config.json was loaded and nothing is set, none is written, and an existing one is removed.
    Everything is written to temporary files, which are renamed when all are complete; weight files of an earlier save
    in another layout are removed. If writing fails (OSError) or is killed, the old checkpoint is intact. Between the
    first rename and the last, the folder has no config.json and does not load, unless a single rename is enough.
    """
    tensors, quantised = compress(tensors)
    config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS} | quantised
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    stem = "model" if len(shards) == 1 else f"model-{{:05}}-of-{len(shards):05}"
    files = {f"{stem.format(i)}.safetensors": shard for i, shard in enumerate(shards, start=1)}
    documents: dict[str, dict[str, Any]] = {}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = generation.to_dict()
    if settings and generation.other is None:  # transformers takes them from config.json only if there is no file
        settings = {key: id for key, id in config.items() if key in ids and id not in (None, [])} | settings
    if settings or generation.other is not None:
        documents[GENERATION_CONFIG] = settings
    if len(files) > 1:
        weight_map = {name: file for file, shard in files.items() for name in shard}
        documents["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    dtype = next(iter(tensors.values())).dtype
    documents["config.json"] = {**config, "dtype": str(dtype).removeprefix("torch.")}

    partial = {name: folder / f".{name}.partial" for name in (*files, *documents)}
    make_folder(folder, (*partial, GENERATION_CONFIG))
    for temporary in partial.values():
        temporary.unlink(missing_ok=True)  # an existing one could be a link to anywhere
    written = False
    try:
        for file, shard in files.items():
            # Cloned because parts of a fused parameter share storage, which the format refuses; one shard at a time.
            try:
                save_file(
                    {name: as_written(name, t) for name, t in shard.items()}, partial[file], metadata={"format": "pt"}
                )
            except SafetensorError as error:
                raise OSError(f"{folder / file}: cannot be written ({error}); what was there is whole") from None
        for file, document in documents.items():
            partial[file].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        written = True
    finally:
        for temporary in () if written else partial.values():
            temporary.unlink(missing_ok=True)
    described = folder / "config.json"
    stay = all(_content(folder / name) == _content(partial.get(name)) for name in (described.name, GENERATION_CONFIG))
    if len(files) > 1 or not stay:
        # Else shards of two models, or one's weights and another's config, would load.
        described.unlink(missing_ok=True)
    for file in partial:
        if file != described.name:
            os.replace(partial[file], folder / file)
    if GENERATION_CONFIG not in partial:
        (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors*"):
        if path.name not in partial and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name):
            path.unlink()
    os.replace(partial[described.name], described)


def _content(path: Path | None) -> bytes | None:
    return path.read_bytes() if path is not None and path.is_file() else None
