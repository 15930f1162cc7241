"""Rotary parameters of every scaling type, and what they mean: by transformers, and by definition."""

import math

import torch
import transformers
from families import LLAMA_31_ROPE
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_flex.checkpoint.rope_scaling import RopeParameters

LLAMA3 = LLAMA_31_ROPE | {"rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 8192}
PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, integer base": {"rope_type": "default", "rope_theta": 100000},
    "default, large base": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "linear, odd factor": {"rope_type": "linear", "rope_theta": 12345.6, "factor": 2.7},
    "llama3": LLAMA3,
    "llama3.2": LLAMA3 | {"factor": 32.0},
    "llama3, other ramp": LLAMA3
    | {"low_freq_factor": 1.5, "high_freq_factor": 9.0, "original_max_position_embeddings": 4096},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": YARN,
    "yarn, deepseek's": YARN | {"factor": 40.0, "mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 20, "beta_slow": 2},
    "yarn, own attention factor": YARN | {"attention_factor": 0.8, "truncate": False},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
    },
}
CONTEXT = 131072  # max_position_embeddings
HEAD_DIMS = [2, 4, 64, 80, 96, 128, 256]
CASES = [(name, d) for name in PARAMETERS for d in HEAD_DIMS if d > 2 or name != "dynamic"]  # undefined for 2


def parameters_of(name: str, head_dim: int) -> dict:
    """Return the rope_parameters, with a factor for each pair of dimensions where the type needs them."""
    parameters = PARAMETERS[name]
    if parameters["rope_type"] != "longrope":
        return parameters
    pairs = range(head_dim // 2)
    return parameters | {"short_factor": [1 + 0.01 * p for p in pairs], "long_factor": [1 + 0.7 * p for p in pairs]}


def reference_rope(parameters: dict, head_dim: int, context: int = CONTEXT) -> LlamaRotaryEmbedding:
    """Return transformers' module."""
    return LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            rope_parameters=dict(parameters),
            max_position_embeddings=context,
        )
    )


def frequencies_by_hand(parameters: dict, head_dim: int, length: int = 1, context: int = CONTEXT) -> list[float]:
    """Return the frequencies by their definition, in Python's float64 arithmetic, for a sequence of some length."""
    kind, theta = parameters["rope_type"], parameters["rope_theta"]
    if kind == "dynamic" and length > context:
        stretch = parameters["factor"] * length / context - parameters["factor"] + 1
        theta *= stretch ** (head_dim / (head_dim - 2))
    out = []
    for pair in range(head_dim // 2):
        f = math.exp(-2 * pair / head_dim * math.log(theta))
        if kind == "linear":
            f /= parameters["factor"]
        if kind == "llama3":
            turns = parameters["original_max_position_embeddings"] * f / (2 * math.pi)
            low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
            # 1: turns often within the trained context, kept; 0: turns rarely, stretched; linear in between.
            keep = min(1.0, max(0.0, (turns - low) / (high - low)))
            f *= keep + (1 - keep) / parameters["factor"]
        if kind == "yarn":
            # As llama3, but linear from the pair that turns beta_fast times to the one that turns beta_slow times.
            ends = []
            for beta in (parameters.get("beta_fast", 32), parameters.get("beta_slow", 1)):
                wavelength = parameters["original_max_position_embeddings"] / beta
                ends.append(head_dim / 2 * math.log(wavelength / (2 * math.pi)) / math.log(theta))
            if parameters.get("truncate", True):
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            first, end = max(ends[0], 0), min(ends[1], head_dim - 1)
            end += 0.001 * (first == end)
            keep = 1 - min(1.0, max(0.0, (pair - first) / (end - first)))
            f *= keep + (1 - keep) / parameters["factor"]
        if kind == "longrope":
            longer = length > parameters["original_max_position_embeddings"]
            f /= parameters["long_factor" if longer else "short_factor"][pair]
        out.append(f)
    return out


def scale_by_hand(parameters: dict) -> float:
    """Return the factor of cosine and sine by its definition."""
    if "attention_factor" in parameters:
        return parameters["attention_factor"]
    if parameters["rope_type"] == "yarn":
        grown = 0.1 * math.log(parameters["factor"])
        return (parameters.get("mscale", 1) * grown + 1) / (parameters.get("mscale_all_dim", 0) * grown + 1)
    if parameters["rope_type"] == "longrope":
        return math.sqrt(1 + math.log(parameters["factor"], parameters["original_max_position_embeddings"]))
    return 1.0


def frequencies_of(parameters: RopeParameters, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the frequencies that are tested."""
    return parameters.inverse_frequencies(head_dim, context=CONTEXT, dtype=dtype)
