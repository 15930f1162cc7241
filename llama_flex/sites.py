"""Places inside a layer that can be read (`capture.Capture`) and changed (`edits.Edit`), by name.

Tokens are always the second dimension: B batch, T query tokens, E hidden size, H query heads, K key/value heads, D head
dim, F MLP size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from .arguments import whole_numbers
from .linear import ops
from .rules import Rule, Tokens

if TYPE_CHECKING:
    from .capture import Capture
    from .config import LlamaConfig
    from .edits import Edit
    from .model import Llama

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


class Change(Rule):
    """The function of an edit."""

    kind = "edit"


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
    """What an edit makes of x, in the same dtype. Raises ValueError if it fails, or gives no tensor of the same shape.

    Padding stays as it is: an edit may make it infinite, where its index of -1 is none to divide by, and a masked token
    still takes part in products. x is copied: an edit may work in place, and what was read elsewhere stays.
    """
    new = change.ask(x.clone(), tokens)
    if not isinstance(new, Tensor) or new.shape != x.shape:
        kind = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"edit {change} returned {kind} of {list(x.shape)}; it returns what it got, changed")
    return torch.where(wide(tokens.index >= 0, x), new.to(x.dtype), x)


def wide(chosen: Tensor, x: Tensor) -> Tensor:
    """Booleans `[B, T]` so that they broadcast with x `[B, T, ...]`."""
    return chosen.reshape(*chosen.shape, *[1] * (x.dim() - 2))


def probes(
    model: Llama,
    captures: Sequence[Capture],
    edits: Sequence[Edit],
    rows: int,
    stepwise: bool = False,
) -> dict[int, Probe]:
    """What is read and changed in each layer, with the edits' tensors on the model's device; no layer of which neither.

    stepwise: for a run in steps of any number of tokens; the edits are tried on one token of each row, so that what
    they do wrong is not reported by a compiler. Raises ValueError for one that fails so, for what cannot be captured
    of so many rows, for layers and heads that are not the model's, and for a capture that is given twice.
    """
    for each in captures:
        each.check(rows, model.device)
    if len(set(map(id, captures))) < len(captures):
        raise ValueError("a capture is given twice, and would keep everything twice")
    config, edits = model.config, [each.to(model.device) for each in edits]
    count, heads = config.num_hidden_layers, config.num_attention_heads
    for layers in (*(c.layers for c in captures), *(e.layers for e in edits)):
        if layers is not None and not all(0 <= layer < count for layer in layers):
            raise ValueError(f"the model has layers 0 to {count - 1}, not {list(layers)}")
    for each in captures:
        if each.heads is not None and not all(0 <= head < heads for head in each.heads):
            raise ValueError(f"the model has heads 0 to {heads - 1}, not {list(each.heads)}")
    for edit in edits if stepwise else ():
        shape = rows, 1, *shape_of(edit.site, config)
        tokens = Tokens(*(x.to(model.device) for x in Tokens.arriving(1, batch=rows)))
        changed(torch.zeros(shape, dtype=model.dtype, device=model.device), edit.change, tokens)
    probe_of = {}
    for layer in range(count):
        names = {name for c in captures if c.layers is None or layer in c.layers for name in c.sites}
        if ATTENTION in names:
            names |= {"q", "k"}  # of which it is made
        mine = tuple((e.site, e.change) for e in edits if e.layers is None or layer in e.layers)
        if names or mine:
            probe_of[layer] = Probe(frozenset(names - {ATTENTION}), mine)
    return probe_of


def several(value: T | Sequence[T] | None, kind: type[T], name: str) -> tuple[T, ...]:
    """None, one, or several, as a tuple. Raises ValueError for anything else."""
    each = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for one in each:
        if not isinstance(one, kind):
            raise ValueError(f"{name} takes one {kind.__name__} or a list of them, found {type(one).__name__}")
    return each


def numbers_of(what: str, numbers: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The numbers of one layer or head, or of several, as a tuple; None stays, for all of them. Raises ValueError for
    anything else."""
    if numbers is None:
        return None
    rule = f"{what} are numbers from 0, such as 3 or [3, 4]"
    each = tuple(whole_numbers(rule, numbers if isinstance(numbers, Iterable) else [numbers]))
    if not each or min(each) < 0:
        raise ValueError(f"{rule}, not {numbers!r}")
    return each
