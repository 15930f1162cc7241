"""The layers of LLaMA (Touvron et al., arXiv:2302.13971): norm, linear, grouped-query attention, SwiGLU, block.

Dimension letters, here and in the whole package:
B batch, T query tokens, S slots (keys), H query heads, K key/value heads, D head dim, E hidden size, F MLP size,
V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .attention import AttentionMetadata, attend
from .config import LlamaConfig
from .interp.hook_points import Hook, identity
from .kernels import cpu, linear
from .kernels.kv_cache import KV, keep
from .kernels.lora import lora_of, updated
from .kernels.modules import MatrixModule, matrix_of
from .kernels.weight import PARTS, Weight
from .rope import apply_rotary_emb
from .usercode.modules import are_own


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv:1910.07467), computed in float32 or wider and rounded once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = cpu.normalise(x, self.weight, self.eps)
        return linear.rms_norm(x, self.weight, self.eps) if y is None else y


class Linear(MatrixModule, nn.Linear):
    """A linear layer with weight `[out, in]`, the only place that multiplies by a weight matrix.

    parts: the number of rows of each matrix stacked in the weight, such as those of q, k and v.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = tuple(parts)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where it has no effect, but takes half of the time to build a model
            super().reset_parameters()

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """Return weight @ x + bias, `[B, T, in]` -> `[B, T, out]`. adapters: see `apply_linear`."""
        return updated(self, x, linear.matmul(x, self.matrix, self.bias), adapters)


class TiedLinear(Linear):
    """A linear layer that multiplies by an embedding's weight `[V, E]`, which remains a parameter of the embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix_of(embedding).shape
        self.parts = (self.out_features,)
        for name in ("bias", *PARTS[1:]):
            self.register_parameter(name, None)
        self.embedding = (embedding,)  # a tuple does not register it as a submodule

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The embedding's weight."""
        return self.embedding[0].weight

    @property
    def matrix(self) -> Weight:
        """The embedding's weight, with scale and zero point if it is quantised."""
        return matrix_of(self.embedding[0])


def apply_linear(
    module: nn.Module,
    x: Tensor,
    *,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    adapters: Tensor | None = None,
) -> Tensor:
    """Return residual + module(norm(x)), `[B, T, in]` -> `[B, T, out]`, in a single kernel where there is one.

    gated: apply SwiGLU (arXiv:2002.05202) to the halves of the product, silu(gate) * up, `[B, T, out / 2]`. Any module
    from `[B, T, in]` to `[B, T, out]` may take the place of a `Linear`; it is called, as is one with forward hooks.
    adapters: the number of each token's adapter, broadcast to `[B, T]`; its update is added to the product.
    """
    update = lora_of(module, adapters)
    if update is None and isinstance(module, Linear) and isinstance(norm, RMSNorm | None) and are_own(module, norm):
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        if linear.can_fuse(x, module.matrix, module.bias, norm_weight, residual, gated):
            return linear.fused_linear(x, module.matrix, module.bias, norm_weight, eps, residual, gated)
    x = x if norm is None else norm(x)
    y = module(x) if update is None else update.applied(module, x, adapters)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = nn.functional.silu(gate) * up if (z := cpu.swiglu(y)) is None else z
    return y if residual is None else residual + y


class Attention(nn.Module):
    """Pre-norm grouped-query attention (arXiv:2305.13245) with residual: x + o(attend(qkv(norm(x)))).

    window: the layer's sliding window, or None. q_norm, k_norm: norms of each head's queries and keys, or None.
    """

    def __init__(self, config: LlamaConfig, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        parts = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        self.qkv = Linear(config.hidden_size, parts, config.attention_bias or config.architecture.qkv_bias)
        self.o = Linear(parts[0], [config.hidden_size], config.attention_bias)
        norms = (RMSNorm(self.head_dim, config.rms_norm_eps) if config.architecture.qk_norm else None for _ in "qk")
        self.q_norm, self.k_norm = norms

    def project(self, x: Tensor, adapters: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[B, T, H, D]`, keys and values, both `[B, T, K, D]`, before rotation."""
        heads = apply_linear(self.qkv, x, norm=self.norm, adapters=adapters).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v

    def forward(self, x: Tensor, metadata: AttentionMetadata, kv: KV | None, hook: Hook = identity) -> Tensor:
        """Attend from x `[B, T, E]` to the cache slots, or to its own tokens if kv is None; add the result to x."""
        assert metadata.rotary is not None
        q, k, v = self.project(x, adapters := metadata.adapters)
        if hook is identity and (z := cpu.attend_newest(q, k, v, metadata.newest, kv)) is not None:
            return apply_linear(self.o, z, residual=x, adapters=adapters)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        rotated = zip("qkv", (*(apply_rotary_emb(heads, *metadata.rotary) for heads in (q, k)), v), strict=True)
        q, k, v = (hook(name, heads.transpose(1, 2)).transpose(1, 2) for name, heads in rotated)
        kv = keep(self, kv, metadata.slots, k, v)  # [B, K, S, D]
        z = kv.scale_output(attend(kv.scale_queries(q), kv.k, kv.v, metadata))
        z = hook("z", z.transpose(1, 2))  # [B, T, H, D]
        return apply_linear(self.o, z.flatten(2), residual=x, adapters=adapters)


class MLP(nn.Module):
    """Pre-norm SwiGLU with residual: x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.size = config.intermediate_size
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up = Linear(config.hidden_size, [self.size] * 2, config.mlp_bias)
        self.down = Linear(self.size, [config.hidden_size], config.mlp_bias)

    def forward(self, x: Tensor, hook: Hook = identity, adapters: Tensor | None = None) -> Tensor:
        """Return x `[B, T, E]` plus the MLP's output."""
        hidden = apply_linear(self.gate_up, x, norm=self.norm, gated=True, adapters=adapters)
        return apply_linear(self.down, hook("mlp_post", hidden), residual=x, adapters=adapters)  # hidden: [B, T, F]


class Block(nn.Module):
    """One layer: attention, then MLP. hook: may read and change the tensors at `hook_points.HOOK_POINTS`."""

    def __init__(self, config: LlamaConfig, window: int | None) -> None:
        super().__init__()
        self.attention = Attention(config, window)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, metadata: AttentionMetadata, kv: KV | None, hook: Hook = identity) -> Tensor:
        if hook is identity and metadata.adapters is None and (y := run_blocks(x, [(self, metadata, kv)])) is not None:
            return y
        x = hook("resid_pre", x)
        x = hook("resid_mid", self.attention(x, metadata, kv, hook))
        adapters = () if metadata.adapters is None else (metadata.adapters,)  # which a user's own module may not take
        return hook("resid_post", self.mlp(x, hook, *adapters))


def run_blocks(x: Tensor, layers: Iterable[tuple[nn.Module, AttentionMetadata, KV | None]]) -> Tensor | None:
    """Run layers without adapters in a single kernel, or return None: for few tokens of an uncompiled step on a CPU."""
    given = []
    for block, metadata, kv in layers:
        layer = cpu.Layer.of(block, metadata.newest, kv) if are_own(block, *block.children()) else None
        if layer is None or not are_own(*layer.norms, *layer.products):
            return None
        given.append(layer)
    return cpu.run_blocks(x, given)
