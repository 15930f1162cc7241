"""The decoding loop: every step reads and writes the same tensors, so that it can be recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import Cache
from ..interp.hook_points import Captured, Probe
from ..masks import library, scores
from ..masks.mask import Mask
from ..masks.plan import AttentionPlan
from ..masks.scores import ScoreMod
from ..model import Llama
from ..sampling import SamplingTensors, all_finite, sample
from .fusion import Ensemble, Prompt, combined
from .step_runner import StepRunner
from .transfer import pad_rows, read_async

WEIGHTS = 16  # fused prompts' tables of log-weights are padded to a multiple of this, so that graphs are shared


class Batch:
    """Requests laid out in rows: one row per prompt, so that an ensemble has a row for each member."""

    def __init__(self, requests: Sequence[Ensemble], device: torch.device) -> None:
        self.rows: list[Prompt] = [prompt for request in requests for prompt in request.prompts]
        self.requests = [q for q, request in enumerate(requests) for _ in request.prompts]
        self.request_of = torch.tensor(self.requests, device=device)
        self.is_max = torch.tensor([request.combine == "max" for request in requests], device=device)
        self.rows_of = torch.tensor([len(request.prompts) for request in requests], device=device)
        after = [(prompt.generated_position or 0, prompt.generated_segment) for prompt in self.rows]
        columns = torch.tensor(after, dtype=torch.int32, device=device).T.contiguous()
        self.generated_position, self.generated_segment = columns[:, :, None].unbind(0)

    def combined(self, logits: Tensor) -> Tensor:
        """Combine the logits `[R, V]` of rows into logits `[Q, V]` of requests."""
        if len(self.rows) == len(self.rows_of):
            return logits
        return combined(logits, self.request_of, self.is_max, self.rows_of)

    def attention_plan(
        self,
        model: Llama,
        mask: Mask | Sequence[Mask | None] | None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None,
        cache: Cache,
    ) -> AttentionPlan:
        """Return the plan for a mask (default: fused prompts are kept apart) and score function, with their weights."""
        fused = any(prompt.generated_segment == library.GENERATED for prompt in self.rows)
        plan = model.attention_plan(mask, score_mod, cache, fused)
        if any(prompt.log_weights for prompt in self.rows):
            count = max(len(prompt.log_weights) for prompt in self.rows)
            size = -(-count // WEIGHTS) * WEIGHTS
            table = pad_rows([prompt.log_weights for prompt in self.rows], size, torch.float32)
            weights = scores.segment_weights(table)
            own = [plan.variants[i].score_mod for i in plan.of_layer]
            plan = model.attention_plan(mask, [weights if s is None else s >> weights for s in own], cache, fused)
        return plan


class _State(NamedTuple):
    """The tensors that a decode step reads and updates in place; Q requests, R rows."""

    ids: Tensor  # [R, 1], the newest tokens
    positions: Tensor  # [R, 1], their positions
    lengths: Tensor  # [R], 1 for a row still running, else 0
    running: Tensor  # [Q], the same by request
    done: Tensor  # [Q], tokens sampled so far
    limits: Tensor  # [Q], the most tokens allowed
    stop_ids: Tensor  # [N]
    seen: Tensor | None  # [Q, V], for the repetition penalty
    # [3, Q], float64, for one copy to the host: the newest tokens, their log-probabilities, and whether all logits were
    # finite
    result: Tensor


class Decoding:
    """The decoding loop of one stream: every step in the same memory; once compiled, it is recorded, then replayed."""

    def __init__(
        self,
        runner: StepRunner,
        batch: Batch,
        plan: AttentionPlan,
        cache: Cache,
        parameters: SamplingTensors,
        limits: list[int],
        stop_ids: frozenset[int],
        seen_ids: Sequence[Sequence[int]],
        probes: Mapping[int, Probe],
    ) -> None:
        """limits: the most new tokens of each request. seen_ids: the ids of each so far, for the repetition penalty."""
        model, q, device = runner.model, len(limits), runner.model.device
        seen = None
        if parameters.repetition_penalty is not None:
            seen = torch.zeros(q, model.config.vocab_size, dtype=torch.bool, device=device)
            for request, ids in enumerate(seen_ids):
                seen[request, torch.tensor(ids, device=device)] = True
        ones = torch.ones(q, dtype=torch.int32, device=device)
        self.state = _State(
            ids=torch.zeros(len(batch.rows), 1, dtype=torch.int64, device=device),
            positions=batch.generated_position + cache.next_position[:, None] - 1,
            lengths=torch.ones(len(batch.rows), dtype=torch.int32, device=device),
            running=ones,
            done=torch.zeros_like(ones),
            limits=torch.tensor(limits, dtype=torch.int32, device=device),
            stop_ids=torch.tensor(sorted(stop_ids) or [-1], device=device),
            seen=seen,
            result=torch.zeros(3, q, dtype=torch.float64, device=device),
        )
        self.runner, self.model, self.batch, self.parameters = runner, model, batch, parameters
        self.plan, self.cache, self.probes = plan, cache, probes
        self.compiled = runner.compile
        self.made_for = model.device, model.dtype
        self.has_run = False
        self.replay: Callable[[], Captured | None] | None = None
        self.memory: tuple[object, object] = None, None  # the cache tensors that the recorded step works on

    def first(self, x: Tensor) -> None:
        """Sample the first tokens from the last layer's output `[R, 1, E]` at the prompts' last tokens."""
        self._sample_next(x)

    def next(self) -> Captured | None:
        """Compute one more token for each request (on CUDA, only enqueue it); return the tensors that probes captured.

        Raises ValueError if the model's dtype or device has changed, since the cached keys and values have not.
        """
        cache, now = self.cache, (self.model.device, self.model.dtype)
        if now != self.made_for:
            was, is_ = (f"{dtype} on {device}" for device, dtype in (self.made_for, now))
            raise ValueError(f"the model changed from {was} to {is_} during a stream; start a new stream")
        with cache.appending(1):
            layers, tokens = self.memory
            if self.replay is not None and cache.layers is layers and cache.tokens is tokens:
                captured = self.replay()
            elif self.compiled and self.has_run:  # the first step compiles what is not compiled yet
                self.replay, self.memory = None, (None, None)  # free it before the new recording allocates
                captured, self.replay = self.runner.graphs.record(self._step, self.model.device)
                self.memory = cache.layers, cache.tokens  # a fork or reorder of the cache mid-stream replaces them
            else:
                captured = self._step()
        self.has_run = True
        return captured

    def result(self) -> Callable[[], list[list[float]]]:
        """Return a function that reads the newest tokens, their log-probabilities, and whether the logits were
        finite, however many steps are enqueued before it is called."""
        return read_async(self.state.result)

    def stop(self, request: int) -> None:
        """Stop computing tokens for a request."""
        self.state.running[request] = 0
        self.state.lengths.mul_(self.batch.request_of != request)

    def _step(self) -> Captured | None:
        s, segments = self.state, self.batch.generated_segment
        x, captured = self.runner.step(s.ids, s.lengths, s.positions, segments, self.plan, self.cache, self.probes)
        self._sample_next(x)
        return captured

    def _sample_next(self, x: Tensor) -> None:
        kinds = tuple(p is None for p in self.parameters)
        counts = len(self.batch.rows), len(self.batch.rows_of), len(self.state.stop_ids)
        run = self.runner.run_for(*counts, kinds)
        run("sample_next", _sample_next, self.model, x, self.batch, self.parameters, self.state)


def _sample_next(model: Llama, x: Tensor, batch: Batch, parameters: SamplingTensors, s: _State) -> None:
    """Sample the next tokens from the last layer's output `[R, 1, E]`, and update the state for the next step."""
    logits = model.head(x)[:, 0]
    finite = all_finite(logits).double()
    if len(finite) > len(s.done):  # members of an ensemble sample one token together
        finite = torch.ones_like(s.done, dtype=finite.dtype).scatter_reduce(0, batch.request_of, finite, "amin")
    token, logprob = sample(batch.combined(logits), parameters, s.done, s.seen)
    if s.seen is not None:
        s.seen.scatter_(1, token[:, None], True)
    s.result.copy_(torch.stack((token.double(), logprob.double(), finite)))
    s.done.add_(1)
    s.running.mul_((s.done < s.limits) & (token[:, None] != s.stop_ids).all(1))
    s.ids.copy_(token[batch.request_of, None])
    s.lengths.copy_(s.running[batch.request_of])
    s.positions.add_(1)
