"""Hugging Face's names of the weights, and loading them into the model without a second copy in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import formats, shards
from .checkpoint.quantization import ORDER, Quantization, device_for, prepare
from .config import LlamaConfig
from .kernels import cpu

DTYPES = tuple(shards.DTYPES.values())  # supported for weights


def named_weights(model: nn.Module, config: LlamaConfig) -> dict[str, Tensor]:
    """Return every tensor of the checkpoint by its name there, as a view into the (fused) parameter that holds it."""
    views = dict[str, Tensor]()
    for path, names in config.architecture.modules(config.num_hidden_layers, config.tie_word_embeddings):
        module = model.get_submodule(path)
        for kind, parameter in module.named_parameters(recurse=False):  # weight, and bias if there is one
            tensor, parts = parameter.detach(), getattr(module, "parts", (len(parameter),))
            views_of = [tensor] * len(names) if kind == ORDER else tensor.split(parts)
            for name, view in zip(names, views_of, strict=True):
                views[f"{name}.{kind}"] = view
    return views


def load(
    model: nn.Module,
    config: LlamaConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Fill a model that is on the meta device from the safetensors in `folder`.

    Headers are checked against the model's shapes before any memory is allocated; each tensor goes from its file into
    its parameter, so peak memory is about one copy of the model. dtype: default config.json's, else the file's.
    quantization: of the matrices, unless the folder's are quantised. Raises CheckpointError listing missing, unexpected
    and misshapen tensors, and for damaged files; ConfigError for a quantised folder that does not fit; FolderError for
    links out of it. Warns of weights that are not finite.
    """
    shapes = {name: list(view.shape) for name, view in named_weights(model, config).items()}
    modules = config.architecture.modules(config.num_hidden_layers, config.tie_word_embeddings)
    plan = formats.plan(folder, config.other, modules, shapes, quantization, config.num_key_value_heads)
    device_for(device, plan.quantization)
    checkpoint = shards.find(folder, plan.expected, tied=config.tie_word_embeddings)
    model.to(dtype := dtype or shards.dtype_named(config.dtype, folder) or checkpoint.dtype)
    prepare(model, plan.quantization, plan.floats)
    model.to_empty(device=device)
    cpu.prepare(dtype, device)  # its compiler runs while weights are read
    beside = dict(checkpoint.tensors(plan.beside))
    plan.order_columns(model, modules, beside, device)
    places = named_weights(model, config)
    for name, tensor in checkpoint.tensors():
        plan.fill(places, name, tensor, beside)
    checkpoint.check_tied_copy(dtype)
    plan.check(places)
