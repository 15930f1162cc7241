"""Sample tokens from logits: pure functions of tensors, one row per request.

Every random number is a function of (seed, step, token id) alone, so a request gives the same tokens whatever it is
batched with, on any device. Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.noise import gumbel
from .kernels.reductions import argmax, logsumexp
from .logits.parameters import SamplingTensors


def sample(logits: Tensor, p: SamplingTensors, step: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sample the next token of every row, with its log-probability: logits `[B, V]` -> int64 `[B]`, float32 `[B]`.

    step `[B]`: the number of tokens generated so far. seen `[B, V]` bool: tokens of the prompt and of the text so far;
    needed only for the repetition penalty. The log-probability is the model's own, before any filter.
    """
    logits = logits.float()
    token = draw(adjust_logits(logits, p, seen), p, step)
    return token, logprob_of(logits, token)


def draw(logits: Tensor, p: SamplingTensors, step: Tensor) -> Tensor:
    """Draw a token `[B]` of every row from logits `[B, V]` after the penalties; step `[B]` as in `sample`."""
    filtered = _keep_likely(logits, p)
    token = argmax(filtered)
    if p.temperature is not None and p.seed is not None:
        # Gumbel-max: argmax(logit + Gumbel) is distributed as softmax(logit).
        token = torch.where(p.temperature == 0, token, argmax(filtered + gumbel(p.seed, step, logits.shape[-1])))
    return token


def logprob_of(logits: Tensor, token: Tensor) -> Tensor:
    """Return the log-probabilities `[B]` of tokens `[B]` under logits `[B, V]`."""
    return logits.gather(-1, token[:, None])[:, 0] - logsumexp(logits)


def filter_logits(logits: Tensor, p: SamplingTensors, seen: Tensor | None = None) -> Tensor:
    """Return logits `[B, V]` after penalty and temperature, -inf where a filter removes one (none in greedy rows)."""
    return _keep_likely(adjust_logits(logits, p, seen), p)


def adjust_logits(logits: Tensor, p: SamplingTensors, seen: Tensor | None = None) -> Tensor:
    """Return logits `[B, V]` after biases and penalties, -inf for tokens that are banned or come too early."""
    if p.bias is not None:
        logits = logits + p.bias
    if p.repetition_penalty is not None:
        assert seen is not None
        penalty = p.repetition_penalty[:, None]
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if p.counts is not None and p.frequency_penalty is not None and p.presence_penalty is not None:
        logits = logits - p.frequency_penalty[:, None] * p.counts - p.presence_penalty[:, None] * (p.counts > 0)
    return logits if p.forbidden is None else logits.masked_fill(p.forbidden, -torch.inf)


def _keep_likely(logits: Tensor, p: SamplingTensors) -> Tensor:
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
    if p.typical_p is not None:
        log_p, mass = logits.log_softmax(-1), p.typical_p[:, None]
        surprise = (-log_p - -(log_p * log_p.exp()).nansum(-1, keepdim=True)).abs()
        ordered, order = surprise.sort(-1)
        number = (logits.gather(-1, order).softmax(-1).cumsum(-1) < mass).sum(-1, keepdim=True)
        most = ordered.gather(-1, number.clamp(max=logits.shape[-1] - 1))
        logits = logits.masked_fill((surprise > most) & (mass < 1), -torch.inf)
    if p.temperature is None:
        return logits
    return torch.where((p.temperature == 0)[:, None], unfiltered, logits)  # filters may drop the first of ties
