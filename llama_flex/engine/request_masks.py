"""Combine the masks and score functions of several requests in one step: each row uses those of its request.

Dimensions: R rows of a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Cache
from ..masks import scores
from ..masks.mask import Mask
from ..masks.plan import AttentionPlan
from ..masks.scores import ScoreMod
from ..model import Llama
from ..tokens import Token, take
from .fusion import Prompt
from .transfer import StagingBuffer, pad_rows

MAX_SPECS = 8  # specs that may run at a time: each is evaluated for every row
WEIGHTS = 16  # fused prompts' tables of log-weights are padded to a multiple of this, so that graphs are shared


class AttentionSpec(NamedTuple):
    """The masks and score functions of a request. key: equal for requests that attend alike."""

    key: Hashable
    # The mask and score function of the request, if it has any. The key holds the ids of their tensors, so they must be
    # kept alive.
    given: tuple[Any, Any] | None
    plan: AttentionPlan
    shares: bool  # pages with other requests: their content depends on the tokens alone


class RowSpec(NamedTuple):
    """The spec of a row of a step, by its number, the row's place among those of its request, and its log-weights."""

    number: int
    member: int
    log_weights: tuple[float, ...]


class MaskRegistry:
    """The specs that may run now, by number, and the plans that give each row its own spec.

    generation: changes when plans that were returned before are no longer used.
    """

    def __init__(self, model: Llama, rows: int) -> None:
        """rows: the most rows of a step."""
        self.model, self.rows, self.generation = model, rows, 0
        self._default = {
            fused: AttentionSpec(("default", fused), None, model.attention_plan(fused=fused), True)
            for fused in (False, True)
        }
        self.specs = [self._default[False]]
        self._combined: dict[Hashable, AttentionPlan] = {}
        self._of_row = self._tables(0)

    def spec(
        self,
        mask: Mask | Sequence[Mask | None] | None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None,
        fused: bool,
    ) -> AttentionSpec:
        """Return the spec of a request. Raises ValueError for anything but a mask or score function."""
        if mask is None and score_mod is None:
            return self._default[fused]
        plan = self.model.attention_plan(mask, score_mod, fused=fused)
        return AttentionSpec((fused, _identity(mask), _identity(score_mod)), (mask, score_mod), plan, False)

    def number_of(self, spec: AttentionSpec, running: set[int]) -> int | None:
        """Return the number of a spec, replacing one that is not running if need be; None if all are running."""
        for number, known in enumerate(self.specs):
            if known.key == spec.key:
                return number
        unused = [number for number in range(1, len(self.specs)) if number not in running]
        if len(self.specs) < MAX_SPECS:
            self.specs.append(spec)
        elif unused:
            self.specs[unused[0]] = spec
        else:
            return None
        self._forget()
        return self.specs.index(spec)

    def is_full(self) -> bool:
        """Return whether a new spec would replace another."""
        return len(self.specs) == MAX_SPECS

    def _forget(self) -> None:
        self._combined = {}
        self.generation += 1

    def _tables(self, weights: int) -> dict[str, StagingBuffer]:
        """Make the tables that masks and score functions capture, which must not share memory."""
        number = torch.int32, (self.rows,)
        shapes = {"number": number, "member": number, "weights": (torch.float32, (self.rows, weights))}
        return {name: StagingBuffer(self.model.device, {name: shape}) for name, shape in shapes.items()}

    def plan(self, rows: Mapping[int, RowSpec]) -> AttentionPlan:
        """Return the attention plan of the next step. rows: the specs of its rows, by row number."""
        numbers = sorted({row.number for row in rows.values()})
        weights = max(len(row.log_weights) for row in rows.values())
        if len(numbers) == 1 and self.specs[numbers[0]].shares and not weights:
            return self.specs[numbers[0]].plan
        if weights > self._of_row["weights"].on_device["weights"].shape[1]:
            self._of_row = self._tables(-(-weights // WEIGHTS) * WEIGHTS)
            self._forget()
        filled = {name: buffer.fill()[name] for name, buffer in self._of_row.items()}
        for table in filled.values():
            table.fill(0)
        for n, row in rows.items():
            filled["number"][n], filled["member"][n] = row.number, row.member
            filled["weights"][n, : len(row.log_weights)] = row.log_weights
        for buffer in self._of_row.values():
            buffer.send()
        numbers = numbers if len(numbers) == 1 else list(range(len(self.specs)))  # one or all: few graphs
        key = *numbers, weights > 0
        if key not in self._combined:
            self._combined[key] = self._combine(numbers, weights > 0)
        return self._combined[key]

    def _combine(self, numbers: list[int], weighted: bool) -> AttentionPlan:
        tables = {name: buffer.on_device[name] for name, buffer in self._of_row.items()}
        own_masks: list[Mask] = []
        own_scores: list[ScoreMod | None] = []
        for layer in range(len(self.model.layers)):
            plans = [self.specs[n].plan for n in numbers]
            each = [plan.variants[plan.of_layer[layer]] for plan in plans]
            own_masks.append(_mask_of_each(numbers, [a.mask for a in each], tables["number"], tables["member"]))
            score = _score_of_each(numbers, [a.score_mod for a in each], tables["number"], tables["member"])
            own_scores.append(_with_weights(score, tables["weights"]) if weighted else score)
        return self.model.attention_plan(own_masks, own_scores)


def plan_of_rows(
    model: Llama,
    prompts: Sequence[Prompt],
    mask: Mask | Sequence[Mask | None] | None,
    score_mod: ScoreMod | Sequence[ScoreMod | None] | None,
    cache: Cache | None,
) -> AttentionPlan:
    """Return the plan for prompts that have a cache to themselves, a row each: a mask (default: fused prompts are kept
    apart) and a score function, and the weights of fused prompts."""
    fused = any(prompt.is_fused for prompt in prompts)
    plan = model.attention_plan(mask, score_mod, cache, fused)
    if count := max(len(prompt.log_weights) for prompt in prompts):
        table = pad_rows([prompt.log_weights for prompt in prompts], -(-count // WEIGHTS) * WEIGHTS, torch.float32)
        weighted = [_with_weights(plan.variants[i].score_mod, table) for i in plan.of_layer]
        plan = model.attention_plan(mask, weighted, cache, fused)
    return plan


def plan_of_beams(model: Llama, plan: AttentionPlan, prompts: int, beams: int) -> AttentionPlan:
    """Return the plan for `beams` rows of each prompt, in succession, from that for one row each: masks and score
    functions see the prompt's number as `batch`."""
    if all(variant.is_plain for variant in plan.variants):
        return plan  # which reads no table
    number = torch.zeros(prompts * beams, dtype=torch.int32, device=model.device)
    member = torch.arange(prompts, dtype=torch.int32, device=model.device).repeat_interleave(beams)
    each = [plan.variants[i] for i in plan.of_layer]
    own_masks = [_mask_of_each([0], [a.mask], number, member) for a in each]
    own_scores = [_score_of_each([0], [a.score_mod], number, member) for a in each]
    return model.attention_plan(own_masks, own_scores)


def _with_weights(score_mod: ScoreMod | None, table: Tensor) -> ScoreMod:
    """Return a score function followed by the weights of fused prompts."""
    weights = scores.segment_weights(table)
    return weights if score_mod is None else score_mod >> weights


class _RequestToken:
    """A token as the mask of one request sees it: `batch` counts the rows of that request only.

    In rows of other requests all attributes are 0, as the mask's tables may have no entries for theirs.
    """

    def __init__(self, token: Token, member: Tensor, mine: Tensor) -> None:
        each = take(member, token.batch), token.index, token.position, token.segment
        self.batch, self.index, self.position, self.segment = (torch.where(mine, x, 0) for x in each)
        self.head = token.head


def _mask_of_each(numbers: list[int], each: list[Mask], number_of: Tensor, member: Tensor) -> Mask:
    """Return a mask that applies, in each row, the mask with that row's number."""

    def predicate(q: Token, kv: Token) -> Tensor:
        number, allowed = take(number_of, q.batch), torch.zeros_like(kv.index, dtype=torch.bool)
        for n, mask in zip(numbers, each, strict=True):
            mine = number == n
            own: Any = _RequestToken(q, member, mine), _RequestToken(kv, member, mine)
            allowed = allowed | mine & mask.evaluate(*own)
        return allowed

    return Mask(predicate, " or ".join(map(str, each)))


def _score_of_each(
    numbers: list[int], each: list[ScoreMod | None], number_of: Tensor, member: Tensor
) -> ScoreMod | None:
    """Return a score function that applies, in each row, the one with that row's number; None if there is none."""
    if not any(each):
        return None

    def function(score: Tensor, q: Token, kv: Token) -> Tensor:
        number, new = take(number_of, q.batch), score
        for n, mod in zip(numbers, each, strict=True):
            if mod is not None:
                mine = number == n
                own: Any = _RequestToken(q, member, mine), _RequestToken(kv, member, mine)
                new = torch.where(mine, mod.evaluate(score, *own), new)
        return new

    return ScoreMod(function, " or ".join(map(str, each)))


def _identity(function: Any) -> Hashable:
    if isinstance(function, list | tuple):
        return tuple(map(_identity, function))
    return function and function.identity()
