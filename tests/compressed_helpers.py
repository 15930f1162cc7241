"""Quantised checkpoints written by code of its own: random numbers, packed with numpy as each format describes."""

import copy
import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from checkpoint_helpers import rewrite
from helpers import TINY, tiny_reference

from llama_flex import Llama
from llama_flex.checkpoint.quantization import assign
from llama_flex.kernels.modules import MatrixModule
from llama_flex.kernels.weight import Weight
from llama_flex.layers import Linear

SMALL = {"vocab_size": 48, "hidden_size": 128, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 2}


def write_floats(folder: Path, **overrides) -> Path:
    """Write a small checkpoint of floats; return its folder."""
    tiny_reference(**TINY["gqa"] | SMALL | overrides).save_pretrained(folder)
    return folder


class Kind(NamedTuple):
    """How matrices are stored: the words of a config.json of compressed-tensors."""

    format: str = "pack-quantized"
    num_bits: int = 4
    type: str = "int"
    strategy: str = "group"
    group_size: int | None = 32
    symmetric: bool = True
    inputs: str | None = None
    actorder: str | None = None

    def config(self, **changes) -> dict:
        """Return the object for config.json; changes: of its weights."""
        weights = {key: value for key, value in self._asdict().items() if key not in ("format", "inputs")} | changes
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        if self.inputs is not None:
            dynamic = self.inputs == "dynamic"
            group["input_activations"] = {
                "num_bits": 8,
                "type": self.type,
                "symmetric": True,
                "strategy": "token" if dynamic else "tensor",
                "dynamic": dynamic,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }

    def store(self, name: str, shape: tuple[int, int], seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the tensors of a random matrix, by their names in the file, and its floats."""
        (rows, columns), draw = shape, np.random.default_rng(seed)
        groups = columns // self.group_size if self.strategy == "group" else 1
        high = 1 << (self.num_bits - 1)
        numbers = draw.integers(-high, high, shape)
        zero = draw.integers(-high, high, (rows, groups)) * (not self.symmetric)
        scale = torch.tensor(draw.normal(size=(rows, groups)) * 0.3 / high, dtype=torch.float32)
        if self.strategy == "tensor":
            scale = scale[:1].expand(rows, 1)
        stored = {f"{name}.weight_scale": scale[:1, 0] if self.strategy == "tensor" else scale}
        if self.inputs == "static":
            stored[f"{name}.input_scale"] = self.input_scale(name)
        of_column = np.arange(columns) // (columns // groups)
        if self.actorder == "group":
            of_column = shuffled(of_column)
            stored[f"{name}.weight_g_idx"] = torch.tensor(of_column, dtype=torch.int32)
        if self.type == "float":
            held = torch.tensor(draw.normal(size=shape) * 50).to(torch.float8_e4m3fn)
            return stored | {f"{name}.weight": held}, held.float() * scale
        if self.format == "int-quantized":
            stored[f"{name}.weight"] = torch.tensor(numbers, dtype=torch.int8)
        else:
            stored[f"{name}.weight_packed"] = pack(numbers + high, self.num_bits)
            stored[f"{name}.weight_shape"] = torch.tensor(shape)
        if not self.symmetric:
            stored[f"{name}.weight_zero_point"] = pack((zero + high).T, self.num_bits).T
        steps = torch.tensor(numbers - zero[:, of_column], dtype=torch.float32)
        return stored, steps * scale[:, of_column]

    def input_scale(self, name: str) -> torch.Tensor:
        """Return the scale of a matrix's inputs, `[1]`, another for each layer and kind of inputs."""
        shared = re.sub("[qkv]_proj|gate_proj|up_proj", "", name)
        return torch.tensor([(4 + zlib.crc32(shared.encode()) % 100 / 100) / (448 if self.type == "float" else 127)])


def shuffled(of_column: np.ndarray) -> np.ndarray:
    """Return the groups of columns in another order, the same for all matrices with as many columns."""
    return np.random.default_rng(len(of_column)).permutation(of_column)


def pack(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """Return unsigned numbers `[X, Y]` in int32 `[X, Y bits / 32]`, lowest bits first, padded with 0."""
    each = 32 // bits
    wide = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % each))).astype(np.uint32)
    words = sum((wide[:, i::each] << np.uint32(bits * i) for i in range(each)), np.zeros((), np.uint32))
    return torch.tensor(words.view(np.int32))


def quantise(folder: Path, config: dict, store, keep=lambda name: False) -> dict[str, torch.Tensor]:
    """Replace the layers' matrices of a checkpoint by quantised ones, but for those to keep; return their floats.

    store: from a matrix's name, shape and a seed to its tensors in the file and its floats.
    """
    floats: dict[str, torch.Tensor] = {}

    def change(tensors):
        for seed, (name, tensor) in enumerate(list(tensors.items())):
            matrix = name.removesuffix(".weight")
            if name.startswith("model.layers.") and tensor.ndim == 2:
                floats[matrix] = tensor
                if not keep(matrix):
                    del tensors[name]
                    stored, floats[matrix] = store(matrix, tuple(tensor.shape), seed)
                    tensors |= {key: value.contiguous() for key, value in stored.items()}
        return tensors

    rewrite(folder, change, quantization_config=config)
    return floats


def floats_of(model: Llama) -> dict[str, torch.Tensor]:
    """Return the layers' matrices of a model as floats, by their names in a checkpoint."""
    found = {}
    for path, names in model.config.architecture.modules(
        model.config.num_hidden_layers, model.config.tie_word_embeddings
    ):
        if isinstance(module := model.get_submodule(path), Linear) and path != "lm_head":
            found |= zip(names, module.matrix.floats().split(module.parts), strict=True)
    return found


def dequantised(model: Llama) -> Llama:
    """Return a copy of a model with the weights that its numbers, scales and zero points stand for."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, MatrixModule) and module.weight_scale is not None:
            assign(module, Weight(module.matrix.floats(model.dtype)))
    return model


def same(found: dict, expected: dict) -> bool:
    """Return whether matrices have the same names and are equal, number by number."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def configured(folder: Path) -> dict:
    """Return the quantization_config of a folder."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]
