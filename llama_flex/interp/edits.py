"""Interventions: change the tensor at a hook point of a layer by a function of the tensor and its tokens.

An edit that locates tokens by their attributes works alike in the full forward, in chunks, in cached decoding, in
ragged batches, eager and compiled. Dimensions: B batch, T tokens, H heads, and `...` for the rest of a hook
point's shape (`hook_points.HOOK_POINTS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..masks.selection import Where, selection
from ..tokens import Tokens
from ..usercode.arguments import whole_number
from ..usercode.captured import name_of
from .capture import Capture
from .hook_points import HOOK_POINTS, Change, numbers_of, wide


class Edit:
    """A function `(x, tokens) -> x` at a hook point: x `[B, T, ...]` as in `HOOK_POINTS`, tokens with attributes
    `[B, T]`, index -1 for padding, which stays unchanged whatever the function returns.

    It must use tensor operations only; tensors that it captures are moved to the model's device. Captures there, and
    all later computation, see its result. Several edits of a hook point apply in the order given. layers: default all.
    Raises ValueError for an unknown hook point.
    """

    def __init__(
        self,
        site: str,
        function: Callable[[Tensor, Tokens], Tensor],
        layers: int | Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        if site not in HOOK_POINTS:
            raise ValueError(f"site {site!r} cannot be edited; choose from {', '.join(HOOK_POINTS)}")
        self.site, self.layers = site, numbers_of("layers", layers)
        self.change = Change(function, name or f"{name_of(function)} at {site}")

    def __repr__(self) -> str:
        return self.change.name

    def to(self, device: torch.device | str) -> Edit:
        """Return this edit with the tensors that it captures on `device`."""
        moved = self.change.to(device)
        return Edit(self.site, moved.function, self.layers, moved.name)


def _edit(
    name: str,
    site: str,
    function: Callable[[Tensor], Tensor],
    layers: int | Sequence[int] | None,
    where: Where,
) -> Edit:
    if where is None:
        return Edit(site, lambda x, tokens: function(x), layers, f"{name} at {site}")
    chosen = selection(where)

    def at_some(x: Tensor, tokens: Tokens) -> Tensor:
        return torch.where(wide(chosen(tokens), x), function(x), x)

    return Edit(site, at_some, layers, f"{name} at {site}, some tokens")


def add(site: str, vector: float | Tensor, layers: int | Sequence[int] | None = None, where: Where = None) -> Edit:
    """Add a steering vector (arXiv:2308.10248). vector: anything that broadcasts to `[B, T, ...]`, such as `[E]`.

    where, here and below: the tokens to edit, by their indices, `[N]` for all rows or `[B, N]`, or by a function from
    their attributes to booleans `[B, T]`, such as `lambda t: t.segment == 2`; default all.
    """
    vector = _shared(vector)
    return _edit("add", site, lambda x: x + vector, layers, where)


def scale(site: str, factor: float | Tensor, layers: int | Sequence[int] | None = None, where: Where = None) -> Edit:
    """Multiply x by a factor: a number, or a tensor that broadcasts to `[B, T, ...]`, such as `[H, 1]` per head."""
    factor = _shared(factor)
    return _edit("scale", site, lambda x: x * factor, layers, where)


def replace(site: str, value: float | Tensor, layers: int | Sequence[int] | None = None, where: Where = None) -> Edit:
    """Replace x by a value: a number, or a tensor that broadcasts to `[B, T, ...]`, such as a mean `[E]`."""
    value = _shared(value)
    return _edit("replace", site, lambda x: torch.zeros_like(x) + value, layers, where)


def ablate(heads: int | Sequence[int], layers: int | Sequence[int] | None = None, where: Where = None) -> Edit:
    """Ablate heads: set their z to 0."""
    numbers = numbers_of("heads", heads)
    if numbers is None:
        raise ValueError("ablate needs heads, such as 3 or [3, 4]")
    gone, most = torch.tensor(numbers), max(numbers)

    def function(x: Tensor) -> Tensor:
        if most >= x.shape[2]:
            raise ValueError(f"the model has heads 0 to {x.shape[2] - 1}, not {most}")
        return x.masked_fill(torch.isin(torch.arange(x.shape[2], device=x.device), gone)[:, None], 0.0)

    return _edit(f"ablate {list(numbers)}", "z", function, layers, where)


def patch(source: Capture, site: str, layer: int, where: Where = None) -> Edit:
    """Replace x by its values in another run (arXiv:2202.05262), matching tokens by index. source: a capture of that
    site and layer, with one row, used for all rows, or with as many rows. Tokens that it does not hold stay unchanged.
    Raises ValueError for a source that holds a token twice, from two runs.
    """
    layer = whole_number("layer", layer, least=0)
    found, held = source[site, layer], source.tokens
    count = int(held.index.max()) + 1
    at = torch.where(held.index < 0, count, held.index).long()  # padding goes to an extra last place, which is dropped
    rows = torch.arange(len(at), device=at.device)[:, None]
    values = found.new_zeros(len(found), count + 1, *found.shape[2:])
    values[rows, at] = found
    times = at.new_zeros(values.shape[:2]).scatter_add(1, at, torch.ones_like(at))
    if bool((times[:, :count] > 1).any()):
        raise ValueError("the source captured a token twice, in two runs; call clear() between them")
    known = times > 0
    values, known = values[:, :count].contiguous(), known[:, :count].contiguous()
    chosen = None if where is None else selection(where)

    def function(x: Tensor, tokens: Tokens) -> Tensor:
        if len(values) not in (1, len(x)):
            raise ValueError(
                f"patch: the source has {len(values)} rows but this run has {len(x)}; it needs one row, or as many"
            )
        row = torch.arange(len(x), device=x.device)[:, None] % len(values)
        at = tokens.index.clamp(0, count - 1)
        there = known[row, at] & (tokens.index < count)  # no edit changes padding
        if chosen is not None:
            there = there & chosen(tokens)
        return torch.where(wide(there, x), values[row, at].to(x.dtype), x)

    return Edit(site, function, layer, f"patch at {site}")


def _shared(number: float | Tensor) -> Tensor:
    """Return a number as a tensor: edits that differ only in the values of tensors share compiled steps."""
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)
