"""Low-rank updates of products (LoRA, Hu et al., arXiv:2106.09685), those of several adapters in one pass.

Dimensions: B rows, T tokens, K inputs, N outputs; r ranks of one adapter, R ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ..usercode.modules import has_own_forward


class Update(NamedTuple):
    """One adapter's update of one matrix `[N, K]`, scale * up @ down: down `[r, K]`, up `[N, r]`."""

    down: Tensor
    up: Tensor
    scale: float

    def product(self) -> Tensor:
        """Return the update as a matrix `[N, K]`, in the dtype of its factors."""
        return (self.up @ self.down) * self.scale


class LoRA(nn.Module):
    """The updates of the matrices stacked in one weight, by all adapters that are loaded.

    The ranks of all adapters lie side by side, so that two products serve a batch whose rows have different adapters:
    ranks of other adapters than a token's own are masked between the two. No graph depends on who has which.
    """

    down: nn.Parameter  # [R, K], by matrix, then by adapter
    owner: Tensor  # int32 [R], the number of each rank's adapter
    scale: Tensor  # [R], float32 or wider

    def __init__(self, parts: Sequence[int], updates: Sequence[tuple[int, int, Update]]) -> None:
        """parts: N of each stacked matrix. updates: each with its place among these, and its adapter's number."""
        super().__init__()
        updates = sorted(updates, key=lambda each: each[:2])
        self.places = [(part, number, len(update.down), update.scale) for part, number, update in updates]
        self.ranks = [sum(place[2] for place in self.places if place[0] == part) for part in range(len(parts))]
        self.down = nn.Parameter(torch.cat([update.down for *_, update in updates]), requires_grad=False)
        for part, (size, rank) in enumerate(zip(parts, self.ranks, strict=True)):
            ups = [update.up.t() for place, _, update in updates if place == part]
            up = torch.cat(ups) if ups else self.down.new_empty(rank, size)
            self.register_parameter(f"up{part}", nn.Parameter(up.contiguous(), requires_grad=False))
        owner = [number for _, number, rank, _ in self.places for _ in range(rank)]
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.int32, device=self.down.device), persistent=False)
        self.register_buffer("scale", None, persistent=False)
        self._make_scale()

    def forward(self, x: Tensor, y: Tensor, numbers: Tensor) -> Tensor:
        """Return y `[B, T, N]`, the product of x, with its update, in y's dtype; computed in the adapters' dtype.

        x: `[B, T, K]`, or for an embedding ids `[B, T]`. numbers: each token's adapter, broadcast to `[B, T]`; a number
        that no adapter here has leaves y as it is.
        """
        if x.is_floating_point():
            h = nn.functional.linear(x.to(self.down.dtype), self.down)
        else:
            h = nn.functional.embedding(x, self.down.t())
        # Masked, not multiplied by 0: what another adapter makes of this token may be infinite.
        h = (h * self.scale).masked_fill(numbers[..., None] != self.owner, 0.0).to(self.down.dtype)
        each = zip(h.split(self.ranks, -1), self.ups, strict=True)
        parts = [part @ up if len(up) else part.new_zeros(*part.shape[:-1], up.shape[1]) for part, up in each]
        return (y + torch.cat(parts, -1)).to(y.dtype)

    def applied(self, module: nn.Module, x: Tensor, numbers: Tensor | None) -> Tensor:
        """Return what a module that holds these updates makes of x, with them. The package's own forward adds them
        itself, so that hooks of the module see and change what they are made of and what they give."""
        if has_own_forward(module):
            return cast(Tensor, module(x, adapters=numbers))
        return updated(module, x, module(x), numbers)

    @property
    def ups(self) -> list[Tensor]:
        """The second factors, transposed, `[ranks, N]` for each stacked matrix."""
        return [getattr(self, f"up{part}") for part in range(len(self.ranks))]

    def updates(self) -> Iterator[tuple[int, int, Update]]:
        """Yield the updates, as the constructor takes them; their factors are views of the parameters."""
        starts = [0] * len(self.ranks)
        for part, number, rank, scale in self.places:
            start, before = starts[part], sum(self.ranks[:part])
            up = self.ups[part].detach()[start : start + rank].t()
            yield part, number, Update(self.down.detach()[before + start :][:rank], up, scale)
            starts[part] += rank

    def _make_scale(self) -> None:
        each = [scale for *_, rank, scale in self.places for _ in range(rank)]
        dtype = torch.promote_types(self.down.dtype, torch.float32)
        self.scale = torch.tensor(each, dtype=dtype, device=self.down.device)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # model.bfloat16() casts buffers too; a scale such as 1 / sqrt(8) would be rounded.
        super()._apply(*args, **kwargs)
        self._make_scale()
        return self


def updated(module: nn.Module, x: Tensor, y: Tensor, numbers: Tensor | None) -> Tensor:
    """Return y, the product of a module with x, with the updates that it holds; see `LoRA.forward`."""
    lora = lora_of(module, numbers)
    return y if lora is None else cast(Tensor, lora(x, y, numbers))


def lora_of(module: nn.Module, numbers: Tensor | None) -> LoRA | None:
    """Return the updates of a module's product, None if it has none, or if no token has an adapter."""
    return None if numbers is None else lora_in(module)


def lora_in(module: nn.Module) -> LoRA | None:
    """Return the updates that a module holds, None if it has none."""
    found = module._modules.get("adapter")
    return found if isinstance(found, LoRA) else None
