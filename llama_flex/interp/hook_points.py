"""Hook points: named places inside a layer whose tensors can be captured (`capture.Capture`) and edited (`edits.Edit`).

Tokens are always the second dimension: B batch, T query tokens, E hidden size, H query heads, K key/value heads, D head
dim, F MLP size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..config import Dimensions
from ..kernels.apart import keep_apart
from ..kernels.kv_cache import Scales
from ..tokens import TokenFunction, Tokens
from ..usercode.arguments import whole_numbers

HOOK_POINTS = {
    "resid_pre": "[B, T, E], the residual stream as it enters the layer; in layer 0 the embeddings",
    "q": "[B, T, H, D], queries, rotated to their positions",
    "k": "[B, T, K, D], keys, rotated to their positions",
    "v": "[B, T, K, D], values",
    "z": "[B, T, H, D], what each head gives, before the product with o",
    "resid_mid": "[B, T, E], the residual stream between attention and MLP",
    "mlp_post": "[B, T, F], the MLP's activations, silu(gate) * up, before the product with down",
    "resid_post": "[B, T, E], the residual stream as it leaves the layer",
}
ATTENTION, LSE, ENTROPY = "attention", "attention.lse", "attention.entropy"
OF_ATTENTION = {  # computed densely from q and k, for the heads asked for: can be captured, not edited
    ATTENTION: "[B, T, heads, S], attention weights",
    LSE: "[B, T, heads], log of the sum of the exponentials of the scores that a query gives, -inf if it sees nothing",
    ENTROPY: "[B, T, heads], entropy of a query's attention weights in nats, 0 if it sees nothing",
}

Hook: TypeAlias = Callable[[str, Tensor], Tensor]  # (hook point, its tensor) -> the tensor to go on with


def shape_of(point: str, dims: Dimensions) -> tuple[int, ...]:
    """Return the shape of a hook point's tensor per token."""
    if point in ("q", "z"):
        return dims.num_heads, dims.head_dim
    if point in ("k", "v"):
        return dims.num_kv_heads, dims.head_dim
    return (dims.mlp_size if point == "mlp_post" else dims.hidden_size,)


def identity(name: str, x: Tensor) -> Tensor:
    """Return x unchanged: the hook of layers without captures or edits."""
    return x


class Change(TokenFunction):
    """The function of an edit."""

    kind = "edit"


class Probe(NamedTuple):
    """The captures and edits of one layer: the hook points to capture, and the edits, which apply first, in order."""

    read: frozenset[str]
    edits: tuple[tuple[str, TokenFunction], ...]

    @property
    def structure(self) -> Hashable:
        """A key for compiled graphs; see `CapturingFunction.structure`."""
        return self.read, tuple((point, change.structure()) for point, change in self.edits)


class Captured(NamedTuple):
    """The tensors captured in a step, by hook point and layer, and their tokens `[B, T]`. scales: of each layer's keys
    and values, if a checkpoint gave them."""

    tokens: Tokens
    at: dict[tuple[str, int], Tensor]
    scales: Sequence[Scales | None]


def copy_tokens(tokens: Tokens) -> Tokens:
    """Copy the attributes: the next step may overwrite its inputs in place."""
    return Tokens(*(x.clone() for x in tokens))


def run_probed(
    probe: Probe, tokens: Tokens, block: Callable[..., Tensor], *args: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a layer under a probe; return its output, and the captured tensors by hook point."""
    captured: dict[str, Tensor] = {}

    def hook(name: str, x: Tensor) -> Tensor:
        changes = [change for point, change in probe.edits if point == name]
        if changes and name == "z":
            x = keep_apart(x)
        for change in changes:
            x = apply_edit(x, change, tokens)
        if name in probe.read:
            captured[name] = x
        return x

    return block(*args, hook), captured


def apply_edit(x: Tensor, change: TokenFunction, tokens: Tokens) -> Tensor:
    """Apply an edit to x, in x's dtype. Raises ValueError if it fails or does not return a tensor of x's shape.

    Padding stays unchanged: an edit may make it infinite, such as by dividing by index + 1, and a masked token still
    takes part in products. The edit gets a copy of x: it may work in place, and x may be read elsewhere.
    """
    new = change.call(x.clone(), tokens)
    if not isinstance(new, Tensor) or new.shape != x.shape:
        kind = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"edit {change} returned {kind}; it must return a tensor of shape {list(x.shape)}")
    return torch.where(wide(tokens.index >= 0, x), new.to(x.dtype), x)


def wide(chosen: Tensor, x: Tensor) -> Tensor:
    """Reshape booleans `[B, T]` to broadcast with x `[B, T, ...]`."""
    return chosen.reshape(*chosen.shape, *[1] * (x.dim() - 2))


def numbers_of(what: str, numbers: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return one or several layer or head numbers as a tuple; None, for all of them, stays None. Raises ValueError
    for anything else."""
    if numbers is None:
        return None
    rule = f"{what} must be numbers from 0, such as 3 or [3, 4]"
    each = tuple(whole_numbers(rule, numbers if isinstance(numbers, Iterable) else [numbers]))
    if not each or min(each) < 0:
        raise ValueError(f"{rule}, not {numbers!r}")
    return each
