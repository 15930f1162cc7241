"""Draft tokens that a model may choose next, for one step to verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Drafter: TypeAlias = Callable[[Sequence[int], int], Sequence[int]]

# Drafts in a step: with the token before them up to 16, for which a CPU has kernels. Compiled steps have one size.
SIZES, COMPILED_SIZES = (1, 3, 7, 15), (7,)
# The time that verifying a draft adds to a step, in that of a step of one token.
COST = {"cpu": 0.1, "cuda": 0.02}
_FIRST = 3  # drafts after the first token of a text
_PATIENCE = 16  # steps, before which no text gives up
_ENDINGS = (4, 3, 2)  # tokens


def prompt_lookup(ids: Sequence[int], most: int) -> list[int]:
    """Draft what followed the last time that a text ended as it does now, repeated up to `most` tokens; nothing if it
    never did. Of several endings, the longest counts. It pays for editing, summaries and code.

    Prompt lookup decoding: https://github.com/apoorvumang/prompt-lookup-decoding.
    """
    text = np.asarray(ids)
    for n in _ENDINGS:
        if len(text) > n:
            before = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
            if len(found := np.flatnonzero((before == text[-n:]).all(1))):
                return [int(id) for id in np.resize(text[found[-1] + n :], most)]
    return []


@dataclass
class Acceptance:
    """The drafts of a text so far: how many steps verified some, how many there were, and how many were accepted.

    most: how many to draft next. They double while all are accepted. Once they have cost more than they gave, none are
    made any more.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    most: int = _FIRST

    def add(self, drafted: int, new: int, cost: float) -> None:
        """Count a step. new: how many tokens it gave, none if a draft's values were not finite. cost: of a draft, see
        COST."""
        accepted = max(new - 1, 0)
        self.steps, self.drafted, self.accepted = self.steps + 1, self.drafted + drafted, self.accepted + accepted
        self.most = min(2 * self.most, SIZES[-1]) if accepted == drafted else accepted + 1
        if not new or (self.steps >= _PATIENCE and self.accepted < cost * self.drafted):
            self.most = 0
