"""The weight of a product as kernels take it: numbers of few bits with a scale, or floats.

Dimensions: N rows, K columns, G groups of columns.

Numbers of 4 bits are 0 to 15, and lie eight in a word: of 32 columns, which take four words, bits 4 i to 4 i + 3 of
word j are column 4 i + j. So a vector of words, shifted and masked, is a vector of numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RUN = 32  # columns whose numbers of 4 bits lie together
GROUP_SIZES = RUN, 2 * RUN, 4 * RUN  # columns of 4 bits that share a scale
MIDDLE = 8  # the number of 4 bits that means 0 if there are no zero points
PARTS = "weight_scale", "weight_zero_point", "weight_order"  # the parameters of a layer that belong to its weight
_SHIFTS = tuple(range(0, 32, 4))


class Weight(NamedTuple):
    """A weight `[N, K]`: `numbers`, or, if they have scales, (numbers - zero) * scale.

    numbers: of a float dtype, `[N, K]`; or of int8 or float8_e4m3fn, `[N, K]`, or int32 `[N, K / 8]`, eight of 4 bits
    each, with scale `[N, G]`, for every K / G columns of a row, and perhaps zero, uint8 `[N, G]`. Only 4 bits have more
    than one group in a row. order: int64 `[K]`, which column of the weight each of the numbers is, if they are sorted.
    """

    numbers: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(N, K)`."""
        rows, columns = self.numbers.shape
        return rows, columns * (8 if self.is_packed else 1)

    @property
    def is_packed(self) -> bool:
        """Whether the numbers have 4 bits."""
        return self.numbers.dtype == torch.int32

    def fits(self, x: Tensor) -> bool:
        """Return whether it can be multiplied by x: on its device, the numbers or their scale in its dtype."""
        if self.order is not None and self.order.shape != (self.shape[1],):
            return False
        if self.scale is None:
            return self.numbers.dtype == x.dtype and self.numbers.device == x.device
        if self.numbers.dtype not in QUANTISED or self.scale.dtype != x.dtype:
            return False
        rows, columns = self.shape
        groups = self.scale.shape[-1]
        sizes = [size for size in GROUP_SIZES if not columns % size] if self.is_packed else [columns]
        if self.scale.shape != (rows, groups) or groups not in [columns // size for size in sizes]:
            return False
        if self.zero is not None and (self.zero.dtype != torch.uint8 or self.zero.shape != self.scale.shape):
            return False
        return all(part.device == x.device for part in self if part is not None)

    def floats(self) -> Tensor:
        """Return the weight as floats, in the dtype of its scale. Raises ValueError for a scale of other numbers."""
        if self.order is not None:
            return self._replace(order=None).floats()[:, self.order.argsort()]
        if self.scale is None:
            return self.numbers
        if self.numbers.dtype not in QUANTISED:
            raise ValueError(
                f"a weight_scale belongs to a weight of few bits, not of {self.numbers.dtype}; if the dtype of a model "
                "in fp8 was changed, load it in that dtype; else set the scale to None"
            )
        if not self.is_packed:
            return self.numbers.to(self.scale.dtype) * self.scale
        zero = MIDDLE if self.zero is None else self.zero[..., None]
        numbers = unpack(self.numbers).unflatten(1, (self.scale.shape[1], -1)) - zero
        return (numbers.to(self.scale.dtype) * self.scale[..., None]).flatten(1)


QUANTISED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.int32: "int4"}  # the dtypes of numbers


def pack(numbers: Tensor) -> Tensor:
    """Pack integers from 0 to 15, `[N, K]`, into words, int32 `[N, K / 8]`. K must be a multiple of RUN."""
    runs = numbers.to(torch.int32).unflatten(1, (-1, len(_SHIFTS), 4))
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=numbers.device)[:, None]
    return (runs << shifts).sum(2, dtype=torch.int32).flatten(1)


def unpack(words: Tensor) -> Tensor:
    """Return the numbers in words, int32 `[N, K / 8]`, as int32 `[N, K]`."""
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=words.device)[:, None]
    return ((words.unflatten(1, (-1, 1, 4)) >> shifts) & 15).flatten(1)


def reorder(numbers: Tensor, order: Tensor) -> Tensor:
    """Return the columns of a weight's numbers in an order, int64 `[K]`."""
    return pack(unpack(numbers)[:, order]) if numbers.dtype == torch.int32 else numbers[:, order]
