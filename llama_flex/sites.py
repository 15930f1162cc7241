"""Places inside a layer that can be read (`capture.Capture`) and changed (`edits.Edit`), by name.

Tokens are always the second dimension: B batch, T query tokens, E hidden size, H query heads, K key/value heads, D head
dim, F MLP size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from .linear import ops
from .rules import Rule, Tokens

if TYPE_CHECKING:
    from .capture import Capture
    from .config import LlamaConfig
    from .edits import Edit

SITES = {
    "resid_pre": "[B, T, E], the residual stream as it enters the layer; in layer 0 the embeddings",
    "q": "[B, T, H, D], queries, rotated to their positions",
    "k": "[B, T, K, D], keys, rotated to their positions",
    "v": "[B, T, K, D], values",
    "z": "[B, T, H, D], what each head gives, before the product with o",
    "resid_mid": "[B, T, E], the residual stream between attention and MLP",
    "mlp_post": "[B, T, F], the MLP's activations, silu(gate) * up, before the product with down",
    "resid_post": "[B, T, E], the residual stream as it leaves the layer",
}
ATTENTION = "attention"  # [B, T, heads, S], the weights of the keys: can be read, not changed

# torch 2.13's compiled attention on a CPU fails if Inductor takes what follows it into the same loop ("Unsupported for
# `epilogue_nodes`"); a copy that Inductor does not know keeps it apart.
ops.define("apart(Tensor x) -> Tensor")
ops.impl("apart", torch.clone, "CPU")
torch.library.register_fake("llama_flex::apart", torch.empty_like, lib=ops)

Site: TypeAlias = Callable[[str, Tensor], Tensor]  # from a site's name and what flows there to what flows on
T = TypeVar("T")


def shape_of(site: str, config: LlamaConfig) -> tuple[int, ...]:
    """What a site has of each token."""
    if site in ("q", "z"):
        return config.num_attention_heads, config.head_dim
    if site in ("k", "v"):
        return config.num_key_value_heads, config.head_dim
    return (config.intermediate_size if site == "mlp_post" else config.hidden_size,)


def untouched(name: str, x: Tensor) -> Tensor:
    """What flows on where nobody looks: the same."""
    return x


class Probe(NamedTuple):
    """What is done in one layer: which sites are read, and how some are changed before, in order."""

    read: frozenset[str]
    edits: tuple[tuple[str, Rule], ...]

    @property
    def structure(self) -> Hashable:
        """What a compiled graph depends on; see `Rule.structure`."""
        return self.read, tuple((site, change.structure()) for site, change in self.edits)


class Found(NamedTuple):
    """What the probes of a step read: of which tokens `[B, T]`, and tensors by site and layer."""

    tokens: Tokens
    at: dict[tuple[str, int], Tensor]


def copied(tokens: Tokens) -> Tokens:
    """The attributes in memory of their own: the next step may change what it was given in place."""
    return Tokens(*(x.clone() for x in tokens))


def probed(probe: Probe, tokens: Tokens, block: Callable[..., Tensor], *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a layer under a probe: its output, and what was read."""
    found: dict[str, Tensor] = {}

    def site(name: str, x: Tensor) -> Tensor:
        changes = [change for where, change in probe.edits if where == name]
        if changes and name == "z" and torch.compiler.is_compiling() and not (x.is_cuda or x.requires_grad):
            x = torch.ops.llama_flex.apart(x)
        for change in changes:
            x = changed(x, change, tokens)
        if name in probe.read:
            found[name] = x
        return x

    return block(*args, site), found


def changed(x: Tensor, change: Rule, tokens: Tokens) -> Tensor:
    """What an edit makes of x, in the same dtype. Raises ValueError if it is no tensor of the same shape."""
    new = change.function(x, tokens)
    if not isinstance(new, Tensor) or new.shape != x.shape:
        kind = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"edit {change} returned {kind} of {list(x.shape)}; it returns what it got, changed")
    return new.to(x.dtype)


def probes(
    config: LlamaConfig,
    captures: Sequence[Capture],
    edits: Sequence[Edit],
) -> dict[int, Probe]:
    """What to do in which layers; none where there is nothing to do. The edits' tensors are where they are needed.

    Raises ValueError for layers and heads that the model does not have.
    """
    count = config.num_hidden_layers
    for layers in (*(c.layers for c in captures), *(e.layers for e in edits)):
        if layers is not None and not all(0 <= layer < count for layer in layers):
            raise ValueError(f"the model has layers 0 to {count - 1}, not {list(layers)}")
    for capture in captures:
        if capture.heads is not None and not all(0 <= head < config.num_attention_heads for head in capture.heads):
            raise ValueError(f"the model has heads 0 to {config.num_attention_heads - 1}, not {list(capture.heads)}")
    of_layer = {}
    for layer in range(count):
        names = {name for c in captures if c.layers is None or layer in c.layers for name in c.sites}
        if ATTENTION in names:
            names |= {"q", "k"}  # of which it is made
        mine = tuple((e.site, e.change) for e in edits if e.layers is None or layer in e.layers)
        if names or mine:
            of_layer[layer] = Probe(frozenset(names - {ATTENTION}), mine)
    return of_layer


def several(value: T | Sequence[T] | None, kind: type[T], name: str) -> tuple[T, ...]:
    """None, one, or several, as a tuple. Raises ValueError for anything else."""
    each = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for one in each:
        if not isinstance(one, kind):
            raise ValueError(f"{name} must be a {kind.__name__}, or several, found {type(one).__name__}")
    return each


def layers_of(layers: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """One layer or several as a tuple; None stays, for all of them. Raises ValueError for anything else."""
    if layers is None:
        return None
    each = (layers,) if isinstance(layers, int) else tuple(layers)
    if not each or not all(isinstance(layer, int) for layer in each):
        raise ValueError(f"layers are numbers from 0, such as 3 or [3, 4], found {layers!r}")
    return each
