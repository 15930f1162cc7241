"""Build the probe of each layer from captures and edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from ..config import Dimensions
from ..tokens import Tokens
from .capture import Capture
from .edits import Edit
from .hook_points import OF_ATTENTION, Probe, apply_edit, shape_of

T = TypeVar("T")


def build_probes(
    captures: Sequence[Capture],
    edits: Sequence[Edit],
    rows: int,
    dims: Dimensions,
    device: torch.device,
    dtype: torch.dtype,
    stepwise: bool = False,
) -> dict[int, Probe]:
    """Build one Probe per layer with a capture or an edit, the edits' tensors on `device`; skip the other layers.

    rows, dims, device, dtype: of the run and its model. stepwise: for a run in steps of any number of tokens; the edits
    are tried on one token of each row, so that the compiler does not have to report their errors. Raises ValueError for
    an edit that fails this trial, for a capture that does not fit the rows, for layers and heads that the model does
    not have, and for a capture given twice.
    """
    for each in captures:
        each.check(rows, device)
    if len(set(map(id, captures))) < len(captures):
        raise ValueError("the same capture was passed twice; pass it once")
    edits, count, heads = [each.to(device) for each in edits], dims.num_layers, dims.num_heads
    for layers in (*(c.layers for c in captures), *(e.layers for e in edits)):
        if layers is not None and not all(0 <= layer < count for layer in layers):
            raise ValueError(f"the model has layers 0 to {count - 1}, not {list(layers)}")
    for each in captures:
        if each.heads is not None and not all(0 <= head < heads for head in each.heads):
            raise ValueError(f"the model has heads 0 to {heads - 1}, not {list(each.heads)}")
    for edit in edits if stepwise else ():
        shape = rows, 1, *shape_of(edit.site, dims)
        tokens = Tokens.arriving(1, batch=rows).map(lambda x: x.to(device))
        apply_edit(torch.zeros(shape, dtype=dtype, device=device), edit.change, tokens)
    probes = {}
    for layer in range(count):
        names = {name for c in captures if c.layers is None or layer in c.layers for name in c.sites}
        if names & OF_ATTENTION.keys():
            names |= {"q", "k"}  # to compute it from
        mine = tuple((e.site, e.change) for e in edits if e.layers is None or layer in e.layers)
        if names or mine:
            probes[layer] = Probe(frozenset(names - OF_ATTENTION.keys()), mine)
    return probes


def as_tuple(value: T | Sequence[T] | None, kind: type[T], name: str) -> tuple[T, ...]:
    """Return None, one, or several values as a tuple. Raises ValueError for anything else."""
    each = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for one in each:
        if not isinstance(one, kind):
            raise ValueError(f"{name} takes one {kind.__name__} or a list of them, found {type(one).__name__}")
    return each
