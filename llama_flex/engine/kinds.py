"""The kinds of sampling in a step, for which it is compiled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..logits.parameters import Sampling


class Kinds(NamedTuple):
    """Whether any request of a step needs something, so that all else is left out of its graph."""

    random: bool
    cut: bool  # top_k or top_p
    min_p: bool
    typical_p: bool
    several: bool  # rows a request
    split: bool  # processors on the host, between the logits and the draw
    masked: bool  # by grammars or n-grams
    seen: bool  # this table, as the next ones; see `SlotTables`
    counts: bool
    bias: bool
    stops: bool
    top: int  # the most top_logprobs, rounded up to a power of two

    @classmethod
    def of(cls, s: Sampling, *, several: bool) -> Kinds:
        """Return what one request needs."""
        random = s.temperature > 0
        return cls(
            random=random,
            cut=random and (s.top_k > 0 or s.top_p < 1),
            min_p=random and s.min_p > 0,
            typical_p=random and s.typical_p < 1,
            several=several,
            split=s.needs_host,
            masked=s.grammar is not None or s.no_repeat_ngram_size > 0,
            seen=s.repetition_penalty != 1,
            counts=s.presence_penalty != 0 or s.frequency_penalty != 0,
            bias=s.logit_bias is not None or len(s.banned_tokens) > 0,
            stops=s.min_new_tokens > 0,
            top=1 << (s.top_logprobs - 1).bit_length() if s.top_logprobs else 0,
        )

    @property
    def of_drafts(self) -> Kinds:
        """The same without what counts tokens, as drafts may be rejected, or reports them."""
        return self._replace(seen=False, counts=False, top=0)

    @property
    def is_common(self) -> bool:
        """Whether it is worth a graph of its own: no biases, counts, stop tokens, typical_p or top_logprobs."""
        return not (self.counts or self.bias or self.stops or self.typical_p or self.top)

    def covers(self, other: Kinds) -> bool:
        """Return whether a graph for these kinds does for others, too; the host is never waited for in vain."""
        return self.split == other.split and all(mine >= its for mine, its in zip(self, other, strict=True))


def compiled_for(kinds: Kinds, known: set[Kinds]) -> Kinds:
    """Return the kinds to compile a step for, and add them to those `known`: if they are rare, the fewest known ones
    that do, so that not every combination of requests gets a graph."""
    found = [] if kinds.is_common else [each for each in known if each.covers(kinds)]
    chosen = min(found, key=sum, default=kinds)
    known.add(chosen)
    return chosen


def union(each: Iterable[Kinds]) -> Kinds:
    """Return what several requests need together."""
    different = set(each)
    return different.pop() if len(different) == 1 else Kinds(*map(max, zip(*different, strict=True)))
