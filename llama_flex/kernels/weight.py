"""The weight of a product as kernels take it: numbers of few bits with a scale, or floats.

Dimensions: N rows, K columns, G groups of columns.

Numbers of 4 bits are 0 to 15, and lie eight in a word: of 32 columns, which take four words, bits 4 i to 4 i + 3 of
word j are column 4 i + j. So a vector of words, shifted and masked, is a vector of numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

RUN = 32  # columns whose numbers of 4 bits lie together
CHUNK = 4 * RUN  # columns that `int4_matmul.cu` takes at a time
GROUP_SIZES = RUN, 2 * RUN, 4 * RUN  # columns that share a scale, if not a whole row
MIDDLE = 8  # the number of 4 bits that means 0 if there are no zero points
MIDDLE_8 = 128  # the zero point of 8 bits that means 0, which int8 are without zero points
# A module's parameters that make a `Weight`.
PARTS = "weight", "weight_scale", "weight_zero_point", "input_scale", "weight_order"
# The values of NF4 (Dettmers et al., arXiv:2305.14314), of which a number of 4 bits tells which.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Weight(NamedTuple):
    """A weight `[N, K]`: `numbers`, or, if they have scales, (numbers - zero) * scale, or of NF4 value * scale.

    numbers: of a float dtype, `[N, K]`; or of int8 or float8_e4m3fn, `[N, K]`, or int32 `[N, K / 8]`, eight of 4 bits
    each, with scale `[N, G]`, for every K / G columns of a row, and perhaps zero, uint8 `[N, G]`, for int8 plus 128; or
    of NF4, uint8 `[N, K / 2]`, the bytes of such words, with scale float32 `[N, G]`. Several groups of float8 in a row
    have scales in float32, too.
    input_scale: of a weight whose inputs are quantised to its dtype (see `activations`): with one scale a row `[N, 1]`,
    repeating their scale, or `[N, 0]`, if each row of them has its own; with groups of float8 `[N, 0]`, if each group
    of a row of them has. order: int64 `[K]`, which column of the weight each of the numbers is, if they are sorted.
    """

    numbers: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    input_scale: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(N, K)`."""
        rows, columns = self.numbers.shape
        return rows, columns * (2 if self.is_nf4 else 8 if self.is_packed else 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its floats."""
        return (self.numbers if self.scale is None else self.scale).dtype

    @property
    def is_packed(self) -> bool:
        """Whether the numbers have 4 bits."""
        return self.numbers.dtype == torch.int32 or self.is_nf4

    @property
    def is_nf4(self) -> bool:
        """Whether the numbers stand for the values of NF4."""
        return self.numbers.dtype == torch.uint8

    @property
    def is_per_row(self) -> bool:
        """Whether the numbers have 8 bits, a scale for each row and no zero points, so that a product of them may be
        multiplied by the scales."""
        if self.scale is None or self.zero is not None or self.numbers.dtype not in BYTES:
            return False
        return self.scale.shape[-1] == 1

    @property
    def is_fp8_in_groups(self) -> bool:
        """Whether the numbers are float8 with several scales in a row."""
        return self.numbers.dtype == torch.float8_e4m3fn and self.scale is not None and self.scale.shape[-1] > 1

    def fits(self, x: Tensor) -> bool:
        """Return whether it can be multiplied by x: on its device, the numbers or, unless these are in float32, their
        scales in its dtype."""
        if self.order is not None and self.order.shape != (self.shape[1],):
            return False
        if any(part.device != x.device for part in self if part is not None):
            return False
        if self.scale is None:
            return self.input_scale is None and self.numbers.dtype == x.dtype
        dtype = torch.float32 if self.is_nf4 or self.is_fp8_in_groups else x.dtype
        if self.numbers.dtype not in QUANTISED or self.scale.dtype != dtype:
            return False
        rows, columns = self.shape
        groups = self.scale.shape[-1]
        sizes = [n for n in GROUP_SIZES if not columns % n]
        if not self.is_packed and self.zero is None:
            sizes.append(columns)
        if self.scale.shape != (rows, groups) or groups not in [columns // size for size in sizes]:
            return False
        zero, inputs = self.zero, self.input_scale
        if zero is not None and (self.numbers.dtype not in (torch.int8, torch.int32) or zero.shape != self.scale.shape):
            return False
        if zero is not None and zero.dtype != torch.uint8:
            return False
        shapes = [(rows, 0)] if self.is_fp8_in_groups else [(rows, 0), (rows, 1)] if self.is_per_row else []
        return inputs is None or (inputs.dtype == dtype and inputs.shape in shapes)

    def rows(self, index: Tensor) -> Weight:
        """Return the rows at an index `[...]`: numbers `[..., K]`, `[..., K / 8]` or `[..., K / 2]`, with scales
        `[..., G]`."""
        return self._map(lambda part: _looked_up(index, part))

    def of_rows(self, rows: slice) -> Weight:
        """Return that of some successive rows."""
        return self._map(lambda part: part[rows])

    def split(self, most: int) -> list[Weight]:
        """Divide it into weights of successive rows, each of at most so many numbers, but for a longer row."""
        rows = max(1, most // max(1, self.shape[1]))
        return [self.of_rows(slice(start, start + rows)) for start in range(0, max(1, len(self.numbers)), rows)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Weight:
        """Return it with a function of each part that has a row for each of its own."""
        scale, zero, inputs = (None if part is None else function(part) for part in self[1:4])
        return Weight(function(self.numbers), scale, zero, inputs, self.order)

    def floats(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight as floats, in the dtype of its scale. Raises ValueError for a scale of other numbers.

        dtype: of the floats that scales in float32 give, default that; rounded once, as bitsandbytes does.
        """
        if self.order is not None:
            return self._replace(order=None).floats(dtype)[..., self.order.argsort()]
        if self.scale is None:
            return self.numbers
        if self.numbers.dtype not in QUANTISED:
            raise ValueError(
                f"a weight_scale belongs to a weight of few bits, not of {self.numbers.dtype}; if the dtype of a model "
                "in fp8 was changed, load it in that dtype; else set the scale to None"
            )
        if self.is_per_row:
            return self.numbers.to(self.scale.dtype) * self.scale
        if self.is_fp8_in_groups:
            wide = torch.promote_types(dtype or self.scale.dtype, self.scale.dtype)
            floats = self.numbers.to(wide).unflatten(-1, (self.scale.shape[-1], -1)) * self.scale[..., None]
            return floats.flatten(-2).to(dtype or self.scale.dtype)
        if self.is_nf4:
            if self.scale.dtype.itemsize < 4:
                raise ValueError(
                    "the scales of NF4 are float32; if the dtype of a model was changed, load it in that dtype"
                )
            values = nf4_on(self.scale.device)[unpack(self.numbers.view(torch.int32))]
            floats = values.unflatten(-1, (self.scale.shape[-1], -1)) * self.scale[..., None]
            return floats.flatten(-2).to(dtype or self.scale.dtype)
        if self.is_packed:
            numbers, zero = unpack(self.numbers), MIDDLE
        else:
            numbers, zero = self.numbers.to(torch.int16) + MIDDLE_8, MIDDLE_8
        numbers = numbers.unflatten(-1, (self.scale.shape[-1], -1)) - (
            zero if self.zero is None else self.zero[..., None]
        )
        return (numbers.to(self.scale.dtype) * self.scale[..., None]).flatten(-2)


BYTES = torch.int8, torch.float8_e4m3fn  # the dtypes of numbers of 8 bits
# The dtypes of numbers.
QUANTISED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.int32: "int4", torch.uint8: "nf4"}


@functools.cache
def nf4_on(device: torch.device) -> Tensor:
    """Return NF4 on a device, as kernels take it: the same tensor each time."""
    return torch.tensor(NF4, device=device)


def _looked_up(index: Tensor, part: Tensor) -> Tensor:
    if part.dtype != torch.float8_e4m3fn:
        return nn.functional.embedding(index, part)
    return nn.functional.embedding(index, part.view(torch.uint8)).view(part.dtype)  # torch has none of it on CUDA


def pack(numbers: Tensor) -> Tensor:
    """Pack integers from 0 to 15, `[N, K]`, into words, int32 `[N, K / 8]`. K must be a multiple of RUN."""
    runs = numbers.to(torch.int32).unflatten(1, (-1, 8, 4))
    return (runs << _shifts(numbers.device)).sum(2, dtype=torch.int32).flatten(1)


def unpack(words: Tensor) -> Tensor:
    """Return the numbers in words, int32 `[..., K / 8]`, as int32 `[..., K]`."""
    return ((words.unflatten(-1, (-1, 1, 4)) >> _shifts(words.device)) & 15).flatten(-3)


def apart(x: Tensor) -> Tensor:
    """Return x `[..., K]` with its columns in the order of a row's words: first those of the numbers in the lowest bits
    of each word, last those in the highest."""
    return x.unflatten(-1, (-1, 8, 4)).transpose(-3, -2).flatten(-3)


def tokens_of(m: int) -> int:
    """Return how many of m rows of x a block of `int4_matmul.cu` takes: 8, 16, 32, 64, 128 or 256."""
    return min(256, max(8, 1 << (m - 1).bit_length()))


def in_chunks(x: Tensor) -> Tensor:
    """Return x `[M, K]` as `int4_matmul.cu` reads it, flat: for `tokens_of(M)` rows and 128 columns at a time, eight
    columns of each row, then the next eight; with columns in the order in which it widens those of the weight, and with
    zeros up to whole parts."""
    tokens = tokens_of(len(x))
    x = nn.functional.pad(x, (0, -x.shape[1] % CHUNK, 0, -len(x) % tokens))
    # Columns of a chunk by thread, number of a pair, product of a word, pair in a product, and word.
    parts = x.reshape(-1, tokens, x.shape[1] // CHUNK, 4, 2, 2, 2, 4)
    return parts.permute(0, 2, 7, 5, 6, 1, 3, 4).flatten()


def reorder(numbers: Tensor, order: Tensor) -> Tensor:
    """Return the columns of a weight's numbers in an order, int64 `[K]`."""
    return pack(unpack(numbers)[:, order]) if numbers.dtype == torch.int32 else numbers[:, order]


def _shifts(device: torch.device) -> Tensor:
    """Return the first bits of the numbers in a word, made on the device, so that it can be recorded."""
    return torch.arange(0, 32, 4, dtype=torch.int32, device=device)[:, None]
