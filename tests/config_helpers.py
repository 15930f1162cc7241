"""Reading config.json here and in transformers, and comparing what both make of it."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_flex import LlamaConfig

# The fields that decide what is computed, and which tokens end it.
MATHEMATICS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "bos_token_id", "pad_token_id"),
]


def read(raw: dict[str, Any]) -> LlamaConfig:
    """Return a config of ours; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LlamaConfig.from_dict(json.loads(json.dumps(raw)))


def reference_of(raw: dict[str, Any]) -> transformers.LlamaConfig:
    """Return transformers' config."""
    return transformers.LlamaConfig.from_dict(json.loads(json.dumps(raw)))


def write(folder: Path, raw: str | dict[str, Any], name: str = "config.json") -> Path:
    """Write a file of JSON, or of any text, and return its folder."""
    (folder / name).write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


def as_list(ids) -> list[int]:
    """Return token ids, given as one, several or none."""
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def assert_same_mathematics(ours: LlamaConfig, reference: transformers.LlamaConfig) -> None:
    """Check that two configs describe the same computation, rotary frequencies to the bit."""
    for name in MATHEMATICS:
        assert getattr(ours, name) == getattr(reference, name), name
    assert as_list(ours.eos_token_id) == as_list(reference.eos_token_id)
    inv_freq = ours.rope_parameters.inverse_frequencies(ours.head_dim)
    assert torch.equal(inv_freq, LlamaRotaryEmbedding(reference).inv_freq)
    used = {k: v for k, v in reference.rope_parameters.items() if k != "type"}
    held = {k: v for k, v in dataclasses.asdict(ours.rope_parameters).items() if v is not None}
    assert held == used
