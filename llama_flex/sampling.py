"""Sample tokens from logits: pure functions of tensors, one row per request.

Every random number is a function of (seed, step, token id) alone, so a request gives the same tokens whatever it is
batched with, on any device. Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint.generation_config import GenerationConfig
from .kernels.noise import gumbel, signed
from .kernels.reductions import argmax, logsumexp

_MOST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling parameters of one request; the filters apply in the order of the fields, as in transformers.

    repetition_penalty: divides the positive and multiplies the negative logits of tokens already seen, prompt included
    (arXiv:1909.05858). temperature: 0 is greedy. top_k: keep the k most likely (0: all). top_p: keep the most likely
    until their mass reaches p, at least one (arXiv:1904.09751). min_p: keep tokens at least min_p times as likely as
    the most likely (arXiv:2407.01082). seed: None draws a fresh one. The tokens kept are those that transformers keeps
    on a CPU, bit by bit; on other devices, different ones of equally likely tokens may be kept.
    Raises ValueError for values out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("repetition_penalty", lambda x: x > 2.0**-126, "a positive number"),  # else 1/x is infinite
            ("temperature", lambda x: x >= 0, "0 (greedy) or a positive number"),
            ("top_k", lambda x: isinstance(x, int) and 0 <= x < 2**31, "0 (off) or a positive whole number"),
            ("top_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("min_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not -_MOST <= value <= _MOST or not valid(value):
                raise ValueError(f"{name} must be {rule}, not {value!r:.60}")
        if self.seed is not None and (type(self.seed) is not int or not -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed must be a 64-bit whole number, not {self.seed!r:.60}")

    @property
    def divisor(self) -> float:
        """The temperature, 0 if greedy. A value next to 0 counts as greedy: dividing by it would overflow."""
        return self.temperature if self.temperature > 1e-30 else 0.0

    @classmethod
    def recommended(cls, config: GenerationConfig, **overrides: float | int | None) -> Sampling:
        """Return the parameters that generation_config.json recommends, replaced by `overrides` (None: not given).

        As in transformers, `do_sample: true` alone means a temperature of 1 and a top_k of 50, and without it
        temperature, top_k, top_p and min_p are ignored. Raises ValueError for a value out of range, naming its source.
        """
        values = config.sampling_values()
        given = {n: v for n, v in overrides.items() if v is not None}
        for name in values.keys() - given.keys():
            try:
                cls(**{name: values[name]})
            except ValueError as error:
                raise ValueError(f"generation_config.json: {error}; set {name} yourself") from None
        return cls(**values | given)


class SamplingTensors(NamedTuple):
    """The parameters of a batch of requests, each `[B]`, on the device; None for those that no request uses."""

    temperature: Tensor | None
    top_k: Tensor | None
    tail: Tensor | None  # 1 - top_p, rounded once
    min_p: Tensor | None
    repetition_penalty: Tensor | None
    seed: Tensor | None


def stack(requests: Sequence[Sampling], device: torch.device) -> SamplingTensors:
    """Stack the parameters of `requests` into tensors, drawing the seeds that are None."""

    def column(values: Sequence[float | None], dtype: torch.dtype, neutral: float | None) -> Tensor | None:
        return None if all(v == neutral for v in values) else torch.tensor(values, dtype=dtype, device=device)

    requests = [with_seed(r) for r in requests]
    penalty = column([r.repetition_penalty for r in requests], torch.float32, 1.0)
    if (temperature := column([r.divisor for r in requests], torch.float32, 0.0)) is None:
        return SamplingTensors(None, None, None, None, penalty, None)
    return SamplingTensors(
        temperature=temperature,
        top_k=column([r.top_k for r in requests], torch.int64, 0),
        tail=column([1 - r.top_p for r in requests], torch.float32, 0.0),
        min_p=column([r.min_p for r in requests], torch.float32, 0.0),
        repetition_penalty=penalty,
        seed=column([r.seed for r in requests], torch.int64, None),
    )


def with_seed(sampling: Sampling, plus: int = 0) -> Sampling:
    """Return `sampling` with a concrete seed (random if None) plus `plus`, wrapping at 64 bits. Raises ValueError for
    anything but a `Sampling`."""
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, such as Sampling(temperature=0.8), not {sampling!r}")
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return replace(sampling, seed=signed((seed + plus) % 2**64))


def sample(logits: Tensor, p: SamplingTensors, step: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sample the next token of every row, with its log-probability: logits `[B, V]` -> int64 `[B]`, float32 `[B]`.

    step `[B]`: the number of tokens generated so far. seen `[B, V]` bool: tokens of the prompt and of the text so far;
    needed only for the repetition penalty. The log-probability is the model's own, before any filter.
    """
    logits = logits.float()
    filtered = filter_logits(logits, p, seen)
    token = argmax(filtered)
    if p.temperature is not None and p.seed is not None:
        # Gumbel-max: argmax(logit + Gumbel) is distributed as softmax(logit).
        token = torch.where(p.temperature == 0, token, argmax(filtered + gumbel(p.seed, step, logits.shape[-1])))
    return token, logprob_of(logits, token)


def logprob_of(logits: Tensor, token: Tensor) -> Tensor:
    """Return the log-probabilities `[B]` of tokens `[B]` under logits `[B, V]`."""
    return logits.gather(-1, token[:, None])[:, 0] - logsumexp(logits)


def filter_logits(logits: Tensor, p: SamplingTensors, seen: Tensor | None = None) -> Tensor:
    """Return logits `[B, V]` after penalty and temperature, -inf where a filter removes one (none in greedy rows)."""
    if p.repetition_penalty is not None:
        assert seen is not None
        penalty = p.repetition_penalty[:, None]
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if p.temperature is not None:
        logits = logits / torch.where(p.temperature == 0, 1.0, p.temperature)[:, None]
    unfiltered = logits
    # From here on, the operations and their order are those of transformers' warpers: another sum would round
    # differently and keep other tokens.
    if p.top_k is not None or p.tail is not None:
        size = logits.shape[-1]
        ordered, order = logits.sort(-1)
        if p.top_k is not None:
            k = torch.where(p.top_k == 0, size, p.top_k.clamp(max=size))[:, None]
            least = ordered.gather(-1, size - k)
            logits, ordered = (x.masked_fill(x < least, -torch.inf) for x in (logits, ordered))
        if p.tail is not None:
            if p.top_k is not None and not torch.compiler.is_dynamo_compiling():
                # Sorted again as in transformers, which may put ties in another order.
                ordered, order = logits.sort(-1)
            tail, last = p.tail[:, None], torch.arange(size, device=logits.device) == size - 1
            removed = (ordered.softmax(-1).cumsum(-1) <= tail) & (tail > 0) & ~last
            logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    if p.min_p is not None:
        probability = logits.softmax(-1)
        least = p.min_p[:, None] * probability.amax(-1, keepdim=True)
        logits = logits.masked_fill(probability < least, -torch.inf)
    if p.temperature is None:
        return logits
    return torch.where((p.temperature == 0)[:, None], unfiltered, logits)  # filters may drop the first of ties
