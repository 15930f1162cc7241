"""Masks and score functions of several requests in one step: every row has those of its request.

Dimensions: R rows of a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import masks, scores
from .attention import Layers
from .decoding import WEIGHTS, Buffer
from .masks import Mask
from .model import Llama
from .rules import Token, take
from .scores import ScoreMod

PATTERNS = 8  # that may run at a time: every one is evaluated for every row


class Rule(NamedTuple):
    """How a request attends. key: equal for requests that attend alike."""

    key: Hashable
    # The mask and score function that were asked for, if any were: the key holds addresses of their tensors, so they
    # must stay.
    given: tuple[Any, Any] | None
    layers: Layers
    shares: bool  # pages with others: nothing but the tokens decides what they hold


class Row(NamedTuple):
    """Of a row of a step: the number of its rule, its place among the rows of its request, and its log-weights."""

    number: int
    member: int
    log_weights: tuple[float, ...]


class Rules:
    """The rules that may run now, each with a number, and layers in which every row has its own.

    generation: changes when layers that were given out are not used any more.
    """

    def __init__(self, model: Llama, rows: int) -> None:
        """rows: how many a step has at most."""
        self.model, self.rows, self.generation = model, rows, 0
        fused = masks.fused() & model.default_mask
        self._default = {
            False: Rule(("default", False), None, model.attention_layers(), True),
            True: Rule(("default", True), None, model.attention_layers(fused), True),
        }
        self.rules = [self._default[False]]
        self._combined: dict[Hashable, Layers] = {}
        self._of_row = self._tables(0)

    def rule(
        self,
        mask: Mask | Sequence[Mask | None] | None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None,
        fused: bool,
    ) -> Rule:
        """The rule of a request. Raises ValueError for what is no mask or score function."""
        if mask is None and score_mod is None:
            return self._default[fused]
        default = masks.fused() & self.model.default_mask if fused else None
        given = [m or default for m in mask] if isinstance(mask, list | tuple) else mask or default
        layers = self.model.attention_layers(given, score_mod)
        return Rule((fused, _identity(mask), _identity(score_mod)), (mask, score_mod), layers, False)

    def number_of(self, rule: Rule, running: set[int]) -> int | None:
        """The number of a rule, which may take that of one that is not running; None if all are."""
        for number, known in enumerate(self.rules):
            if known.key == rule.key:
                return number
        unused = [number for number in range(1, len(self.rules)) if number not in running]
        if len(self.rules) < PATTERNS:
            self.rules.append(rule)
        elif unused:
            self.rules[unused[0]] = rule
        else:
            return None
        self._forget()
        return self.rules.index(rule)

    def is_full(self) -> bool:
        """Whether a new rule takes the number of another."""
        return len(self.rules) == PATTERNS

    def _forget(self) -> None:
        self._combined = {}
        self.generation += 1

    def _tables(self, weights: int) -> Buffer:
        number = torch.int32, (self.rows,)
        shapes = {"number": number, "member": number, "weights": (torch.float32, (self.rows, weights))}
        return Buffer(self.model.device, shapes)

    def layers(self, rows: Mapping[int, Row]) -> Layers:
        """How each layer attends in a step of these rows, by where they are in it, the next to run."""
        numbers = sorted({row.number for row in rows.values()})
        weights = max(len(row.log_weights) for row in rows.values())
        if len(numbers) == 1 and self.rules[numbers[0]].shares and not weights:
            return self.rules[numbers[0]].layers
        if weights > self._of_row.on_device["weights"].shape[1]:
            self._of_row = self._tables(-(-weights // WEIGHTS) * WEIGHTS)
            self._forget()
        filled = self._of_row.fill()
        for table in filled.values():
            table.fill(0)
        for n, row in rows.items():
            filled["number"][n], filled["member"][n] = row.number, row.member
            filled["weights"][n, : len(row.log_weights)] = row.log_weights
        self._of_row.send()
        numbers = numbers if len(numbers) == 1 else list(range(len(self.rules)))  # few graphs: one, or all
        key = *numbers, weights > 0
        if key not in self._combined:
            self._combined[key] = self._combine(numbers, weights > 0)
        return self._combined[key]

    def _combine(self, numbers: list[int], weighted: bool) -> Layers:
        tables = self._of_row.on_device
        own_masks: list[Mask] = []
        own_scores: list[ScoreMod | None] = []
        for layer in range(self.model.config.num_hidden_layers):
            each = [rule.layers.patterns[rule.layers.of_layer[layer]] for rule in (self.rules[n] for n in numbers)]
            own_masks.append(_mask_of_each(numbers, [p.mask for p in each], tables["number"], tables["member"]))
            score = _score_of_each(numbers, [p.score_mod for p in each], tables["number"], tables["member"])
            if weighted:
                weights = scores.segment_weights(tables["weights"])
                score = weights if score is None else score >> weights
            own_scores.append(score)
        return self.model.attention_layers(own_masks, own_scores)


class _Alone:
    """A token of a row as a mask sees it that was written for a request alone: rows are counted in the request.

    In rows of other requests all is 0: what the mask looks up may have no more.
    """

    def __init__(self, token: Token, member: Tensor, mine: Tensor) -> None:
        each = take(member, token.batch), token.index, token.position, token.segment
        self.batch, self.index, self.position, self.segment = (torch.where(mine, x, 0) for x in each)
        self.head = token.head


def _mask_of_each(numbers: list[int], each: list[Mask], number_of: Tensor, member: Tensor) -> Mask:
    """In each row the mask whose number it has."""

    def predicate(q: Token, kv: Token) -> Tensor:
        number, allowed = take(number_of, q.batch), torch.zeros_like(kv.index, dtype=torch.bool)
        for n, mask in zip(numbers, each, strict=True):
            mine = number == n
            lone: Any = _Alone(q, member, mine), _Alone(kv, member, mine)
            allowed = allowed | mine & mask.evaluate(*lone)
        return allowed

    return Mask(predicate, " or ".join(map(str, each)))


def _score_of_each(
    numbers: list[int], each: list[ScoreMod | None], number_of: Tensor, member: Tensor
) -> ScoreMod | None:
    """In each row the score function whose number it has; None if there is none."""
    if not any(each):
        return None

    def function(score: Tensor, q: Token, kv: Token) -> Tensor:
        number, new = take(number_of, q.batch), score
        for n, mod in zip(numbers, each, strict=True):
            if mod is not None:
                mine = number == n
                lone: Any = _Alone(q, member, mine), _Alone(kv, member, mine)
                new = torch.where(mine, mod.evaluate(score, *lone), new)
        return new

    return ScoreMod(function, " or ".join(map(str, each)))


def _identity(rule: Any) -> Hashable:
    return tuple(map(_identity, rule)) if isinstance(rule, list | tuple) else rule and rule.identity()
