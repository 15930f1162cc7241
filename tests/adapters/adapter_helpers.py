"""PEFT's adapters of tiny models, with random factors, and the same ones loaded here."""

import copy
import json
import warnings
from pathlib import Path

import peft
import torch
from helpers import random_ids
from safetensors.torch import load_file, save_file

from llama_flex import Llama

# What an adapter may say, by name.
CONFIGS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear, rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {
            r"layers\.[01]\.mlp\.(down|gate)_proj": 1,
            "gate_proj": 50,
            "^model.layers.0.self_attn.k_proj": 32,
        },
    },
    "saved modules": {
        "target_modules": ["o_proj", "gate_proj"],
        "modules_to_save": ["lm_head", "norm", "embed_tokens"],
    },
    "saved matrices": {"target_modules": ["o_proj", "q_proj"], "modules_to_save": ["k_proj", "mlp.up_proj"]},
    "expression": {
        "target_modules": r".*layers\.[01]\.(self_attn|mlp)\.(q|k|up)_proj",
        "exclude_modules": ["model.layers.1.self_attn.q_proj"],
    },
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "left out": {"target_modules": ["k_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "whole names": {"target_modules": ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj"]},
    "vocabulary": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}

# Requests with adapters: prompts, some of which begin alike, and the adapter of each.
NAMES = ["q and v", "patterns", "vocabulary"]
OPTIONS = {"max_new_tokens": 5, "stop_token_ids": ()}
PREFIX = random_ids(150)
PROMPTS = [[*PREFIX, 20], [*PREFIX, 20], [*PREFIX, 30, 31], [7, 8, 9], [*PREFIX, 20]]
ADAPTERS = ["q and v", "patterns", "patterns", "vocabulary", "__base__"]


def peft_adapter(reference, folder: Path, seed: int = 1, **config) -> peft.PeftModel:
    """Give a copy of transformers' model an adapter with random factors, save that, and return what PEFT loads."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about embeddings
        model = peft.get_peft_model(copy.deepcopy(reference), peft.LoraConfig(**{"r": 4} | config)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(copy.deepcopy(reference), folder, is_trainable=True).eval()


def errors(model: Llama, theirs, ids: torch.Tensor) -> tuple[float, float]:
    """Return how far logits of ours are from those of theirs in float64 (but for norms and softmax, which transformers
    computes in float32), in the mean, and how far theirs are, with the attention that is further off."""
    exact = copy.deepcopy(theirs).double()(ids).logits
    own = []
    for kind in ("eager", "sdpa"):
        theirs.base_model.model.set_attn_implementation(kind)
        own.append((theirs(ids).logits - exact).abs().mean().item())
    theirs.base_model.model.set_attn_implementation("eager")
    return (model(ids) - exact).abs().mean().item(), max(own)


def edit_config(folder: Path, **changes) -> None:
    """Change keys of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    """Write what a function makes of an adapter's tensors, by name."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def swap(first: str, second: str):
    """Return a function that exchanges the factors of two modules, by parts of their names."""

    def change(tensors: dict) -> dict:
        names = {first: second, second: first}
        found = {name: next((part for part in names if part in name), None) for name in tensors}
        return {name.replace(part, names[part]) if part else name: tensors[name] for name, part in found.items()}

    return change
