"""Several prompts for one completion: fused in attention, or as an ensemble of their next-token distributions.

Fused: the prompts are segments of one sequence, each sees only itself and a shared prefix, and generated text sees them
all (`masks.fused`). Ensemble: each prompt is a row of its own, and every step samples one token for all of them.
Dimensions: R rows, Q requests, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..masks.library import GENERATED, SHARED
from ..usercode.arguments import check_choice, whole_numbers

Positions: TypeAlias = Literal["continue", "parallel"]
Combine: TypeAlias = Literal["mean", "max"]


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, with a position (counted from the end of the cached tokens) and a segment for each.

    generated_segment, generated_position: the segment of the generated text, and the position of its first token (None:
    the one after the last). Raises ValueError for lists of different lengths.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    segments: Sequence[int]
    generated_segment: int = 0
    generated_position: int | None = None
    log_weights: tuple[float, ...] = ()  # of segments 0, 1, ...; see `scores.segment_weights`

    @property
    def is_fused(self) -> bool:
        """Whether its segments are prompts that the generated text continues together."""
        return self.generated_segment == GENERATED

    def shifted(self, by: int) -> Prompt:
        """Return this prompt with all positions moved by a number."""
        if not by:
            return self
        positions = [position + by for position in self.positions]
        return replace(self, positions=positions, generated_position=(self.generated_position or 0) + by)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", token_ids(self.ids))
        counts = [len(self.ids), len(self.positions), len(self.segments)]
        if len(set(counts)) > 1:
            raise ValueError("a prompt needs as many positions and segments as ids, not {1}, {2}, {0}".format(*counts))
        if self.generated_position is None and len(self.positions):
            object.__setattr__(self, "generated_position", self.positions[-1] + 1)

    @classmethod
    def plain(cls, ids: Sequence[int]) -> Prompt:
        """Return the prompt of one text: positions in order, all in segment 0."""
        ids = token_ids(ids)
        return cls(ids, range(len(ids)), [0] * len(ids))


def token_ids(ids: Sequence[int]) -> list[int]:
    """Return ids, which may be integers of any type, as Python integers. Raises ValueError for anything else."""
    return whole_numbers("prompts must be lists of token ids, such as [[1, 2, 3]]", ids)


@dataclass(frozen=True)
class Ensemble:
    """Prompts whose next-token distributions are combined at every step: their mean, or their maximum, normalised."""

    prompts: Sequence[Prompt]
    combine: Combine

    def __init__(self, prompts: Sequence[Sequence[int] | Prompt], combine: Combine = "mean") -> None:
        prompts = list(prompts)
        if not prompts:
            raise ValueError("an ensemble needs at least one prompt")
        check_choice("combine", combine, get_args(Combine))
        object.__setattr__(self, "prompts", [p if isinstance(p, Prompt) else Prompt.plain(p) for p in prompts])
        object.__setattr__(self, "combine", combine)


AnyPrompt: TypeAlias = Sequence[int] | Prompt | Ensemble  # anything that an Engine completes


def as_ensemble(request: AnyPrompt) -> Ensemble:
    """Return the request if it is an ensemble, else an ensemble of this one prompt."""
    return request if isinstance(request, Ensemble) else Ensemble([request])


def as_requests(prompts: Sequence[AnyPrompt]) -> list[Ensemble]:
    """Return every request as an ensemble, most of one prompt. Raises ValueError for anything but a list of prompts."""
    try:
        return [as_ensemble(request) for request in prompts]
    except TypeError:
        raise ValueError(f"prompts must be lists of token ids, such as [[1, 2, 3]], not {prompts!r}") from None


def fuse(
    prompts: Sequence[Sequence[int]],
    *,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    positions: Positions = "continue",
    weights: Sequence[float] | None = None,
) -> Prompt:
    """Fuse prompts (token ids) into one sequence of segments, for an Engine, which then generates with `masks.fused()`.

    prefix: seen by all, such as a system message or examples. suffix: sees all, as generated text does, such as
    "Answer:"; without one the first new token comes from the last prompt's last token, which sees no other prompt.
    positions: "continue", one after another; or "parallel", each prompt right after the prefix, and the suffix and the
    generated text after the longest. weights: how much each prompt counts in generation; 1 leaves it as it is.
    Raises ValueError for no prompts, an empty prompt, and weights that are not one positive number per prompt.
    """
    each = [token_ids(prompt) for prompt in prompts]
    if not each or not all(each):
        raise ValueError("fuse needs at least one prompt, and no empty one")
    check_choice("positions", positions, get_args(Positions))
    if weights is not None and (len(weights) != len(each) or not all(0 < w < math.inf for w in weights)):
        raise ValueError(f"fuse needs a positive weight for each of the {len(each)} prompts, not {list(weights)}")
    ids, end_ids = token_ids(prefix), token_ids(suffix)
    shared = len(ids)
    places, segments = list(range(shared)), [SHARED] * shared
    for number, prompt in enumerate(each, start=1):
        start = shared if positions == "parallel" else len(ids)
        ids += prompt
        places += range(start, start + len(prompt))
        segments += [number] * len(prompt)
    end = max(places) + 1
    ids += end_ids
    places += range(end, end + len(end_ids))
    segments += [GENERATED] * len(end_ids)
    log_weights = () if weights is None else (0.0, *map(math.log, weights))
    return Prompt(ids, places, segments, GENERATED, end + len(end_ids), log_weights)


def combined(logits: Tensor, request_of: Tensor, is_max: Tensor, rows_of: Tensor) -> Tensor:
    """Return the logarithm of each request's combined distribution, `[Q, V]`, up to a constant, from logits `[R, V]`.

    request_of `[R]`: the request of each row. is_max `[Q]`: take the maximum, else the mean. rows_of `[Q]`: the number
    of rows of each request; with a single row, its logits stay unchanged.
    """
    logits = logits.float()
    probability = logits.softmax(-1)
    index = request_of[:, None].expand_as(probability)
    empty = probability.new_zeros(len(is_max), logits.shape[-1])
    mean = empty.scatter_add(0, index, probability)
    most = empty.scatter_reduce(0, index, probability, "amax")
    alone = empty.scatter_add(0, index, logits)
    return torch.where((rows_of == 1)[:, None], alone, torch.where(is_max[:, None], most, mean).log())
