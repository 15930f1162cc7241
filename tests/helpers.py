"""What the tests share besides fixtures: paths, shapes of tiny models, transformers' tiny models, compiled forwards."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from llama_flex import Llama
from llama_flex.engine.graphs import Graphs
from llama_flex.layers import Linear, RMSNorm, apply_linear

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "weights" / "SmolLM2-135M-Instruct"
TEST_INPUTS = ROOT / "weights" / "test-inputs"
# Modules of kernels that need Triton or CUDA's bindings, which come with torch's CUDA builds only.
CUDA_ONLY = "cuda_cpp", "few_rows", "gemv", "int4_gemv", "int4_matmul"

# The shapes that differ in kind: (heads, key/value heads, head_dim or None), and switches.
TINY = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "group3": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "head_dim": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "odd_vocab": {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 509},
}


def tokens_without_waiting(engine, submit) -> list[list[list[int]]]:
    """Return the tokens of what `submit` submits, three times: torch refuses to synchronise the last time."""
    tokens = []
    for mode in ("default", "default", "error"):  # the first compiles, the second records
        submitted = submit()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            engine.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        tokens.append([request.completion.tokens for request in submitted])
    return tokens


def few(first: Iterable, others: Iterable) -> list:
    """Return the values of a parameter: the first for every run of the tests, the others for exhaustive ones."""
    return [*first, *(pytest.param(value, marks=pytest.mark.exhaustive) for value in others)]


def tiny_reference(**overrides) -> transformers.LlamaForCausalLM:
    """A two-layer random LLaMA of transformers, float32, eager attention; weights large enough to matter."""
    values = {
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**values)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # initialised to ones and zeros, which would hide a mistake
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def random_ids(length: int, seed: int = 0) -> list[int]:
    """Return ids of no special token, others for every length and seed."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 500, (length,), generator=generator).tolist()


def random_batch(model: Llama, length: int, batch: int = 2) -> torch.Tensor:
    """Return ids `[batch, length]` of no special token, others for every length."""
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


class Products(nn.Module):
    """Every kind of product with a weight, of random weights `[n, k]` or, gated, `[2 * n, k]`."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.norm = RMSNorm(k, 1e-5)
        self.plain, self.biased = Linear(k, [n]), Linear(k, [n], bias=True)
        self.gated, self.gated_biased = Linear(k, [n, n]), Linear(k, [n, n], bias=True)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Multiply x `[B, T, k]`; residual: `[B, T, n]`."""
        return (
            apply_linear(self.plain, x),
            apply_linear(self.biased, x, norm=self.norm, residual=residual),
            apply_linear(self.plain, x, residual=residual),
            apply_linear(self.gated_biased, x, norm=self.norm, gated=True),
            apply_linear(self.gated, x, norm=self.norm, gated=True),
        )


def compiled_forward(model: Llama):
    """The model's forward, compiled: a graph for each shape and for each structure of masks and score functions."""
    graphs = Graphs()

    def forward(ids, *, cache=None, lengths=None, positions=None, segments=None, mask=None, score_mod=None):
        ids, lengths, positions, segments = (
            None if x is None else x.to(model.device, copy=True, memory_format=torch.contiguous_format)
            for x in (ids, lengths, positions, segments)
        )
        plan = model.attention_plan(mask, score_mod, cache)
        given = tuple(x is None for x in (cache, lengths, positions, segments))
        forward.steps.add(key := (ids.shape, given, plan.structure))
        with nullcontext() if cache is None else cache.appending(ids.shape[1]):
            x, _ = model.step(ids, lengths, positions, segments, cache, plan, "flex", graphs.of(*key))
            return model.head(x)

    forward.steps = set()
    forward.graphs = graphs
    return forward
