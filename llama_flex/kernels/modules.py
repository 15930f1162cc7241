"""Modules that hold a matrix of floats or of few bits."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from .lora import updated
from .weight import PARTS, Weight


class MatrixModule(nn.Module):
    """A module whose weight is a matrix `[N, K]`; if it is quantised, there is a `weight_scale`, and perhaps a
    `weight_zero_point`, an `input_scale` or a `weight_order`; see `weight.Weight`. It comes before the class of torch
    that it extends, whose constructor makes the weight."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in PARTS[1:]:
            self.register_parameter(name, None)

    @property
    def matrix(self) -> Weight:
        """The weight, with what a quantised one has besides its numbers."""
        return Weight(cast(Tensor, self.weight), *(self._parameters[name] for name in PARTS[1:]))


class Embedding(MatrixModule, nn.Embedding):
    """An embedding with weight `[V, E]`."""

    def forward(self, ids: Tensor, adapters: Tensor | None = None) -> Tensor:
        """Return the rows of the weight at ids, as floats, `[B, T]` -> `[B, T, E]`. adapters: see `LoRA.forward`."""
        return updated(self, ids, self.matrix.rows(ids).floats(), adapters)


def matrix_of(module: nn.Module) -> Weight:
    """Return the weight of a module, which may be torch's own."""
    return module.matrix if isinstance(module, MatrixModule) else Weight(cast(Tensor, module.weight))
