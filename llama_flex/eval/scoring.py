"""Score given text: continuations of one prefix, long texts by sliding windows, multiple choice.

Dimensions: B batch, T tokens, V vocabulary, N tokens scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.fusion import Prompt, token_ids
from ..engine.prefill import prefill
from ..engine.request import tokens_of
from ..engine.transfer import pad_rows
from ..interp.edits import Edit
from ..logits.parameters import Sampling, stack
from ..masks.mask import Mask
from ..masks.scores import ScoreMod
from ..model import Llama
from ..sampling import filter_logits, logprob_of
from ..usercode.arguments import check_options, whole_number

_LOGITS = 2**26  # elements in memory at once


@dataclass(frozen=True, eq=False)
class Score:
    """The likelihood of a text under a model, token by token; float32 `[N]` on the CPU.

    logprobs: the model's own log-probabilities, in nats. processed: those after penalty, temperature and filters of a
    `Sampling`, if one was given; -inf for tokens that it removes; at temperature 0, which filters nothing, those after
    the penalty. greedy: whether each token is the most likely one, bool.
    """

    logprobs: Tensor
    greedy: Tensor
    processed: Tensor | None = None

    @property
    def total(self) -> float:
        """The log-probability of the whole text."""
        return self.logprobs.double().sum().item()

    @property
    def mean(self) -> float:
        """The log-probability per token."""
        return self.total / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        try:
            return math.exp(-self.mean)
        except OverflowError:
            return math.inf


@torch.no_grad()
def score(
    model: Llama | Engine,
    prefix: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    sampling: Sampling | None = None,
    mask: Mask | Sequence[Mask | None] | None = None,
    score_mod: ScoreMod | Sequence[ScoreMod | None] | None = None,
    edit: Edit | Sequence[Edit] | None = None,
    batch_size: int = 16,
) -> list[Score]:
    """Score continuations (token ids) of a prefix, which is computed once for all of them.

    model: an Engine with compile=True scores with compiled steps, and keeps them. sampling: also compute
    `Score.processed` for it. batch_size: continuations at a time. mask, score_mod, edit: as in `Engine.stream`; the
    prefix does not see the continuations, and a mask that reads `batch` sees row 0 in it.
    Raises ValueError for an empty prefix (give the beginning-of-text id) or continuation, for tokens beyond the
    vocabulary or the context, and for a model that attends in both directions, unless a mask says otherwise.
    """
    engine = model if isinstance(model, Engine) else Engine(model)
    model, start = engine.model, token_ids(prefix)
    if model.looks_ahead_by_default(mask):
        raise ValueError(
            "this model attends in both directions (is_causal is false), so every token is visible when it is "
            "predicted; give a causal mask, such as masks.causal()"
        )
    if sampling is not None:
        stack([sampling], model.device)  # refuses what only engines honour, before any work
    texts = [token_ids(text) for text in continuations]
    batch_size = whole_number("batch_size", batch_size, least=1)
    engine.limits.check_ids("the prefix", start)
    for n, text in enumerate(texts):
        engine.limits.check_ids(f"continuation {n}", text)
        if len(start) + len(text) - 1 > model.context:  # the last token is not fed
            much = f"a prefix of {len(start)} tokens and continuation {n} of {len(text)}"
            raise ValueError(f"{much} exceed the context of {model.context}; see score_text")
    if not texts:
        return []
    slots = engine.slots(min(batch_size, len(texts)), len(start) + max(map(len, texts)))
    cache = model.new_cache(1, slots, kv_dtype=engine.kv_dtype)
    plan = model.attention_plan(mask, score_mod, cache)
    probes = model.probes((), edit, 1, stepwise=True)
    *_, first = prefill(
        engine.runner, [tokens_of(Prompt.plain(start), [])], plan, cache, probes, adapters=model.adapters.number
    )
    found = []
    for group in (texts[n : n + batch_size] for n in range(0, len(texts), batch_size)):
        # Few batch sizes, to share compiled steps: rows without tokens fill up a group.
        b = 1 << (len(group) - 1).bit_length() if engine.compile else len(group)
        rows = [text[:-1] for text in group] + [[]] * (b - len(group))
        x = [first[:, -1:].expand(b, -1, -1)]
        if any(rows):
            after = [tokens_of(Prompt.plain(row).shifted(len(start)), []) for row in rows]
            x += prefill(engine.runner, after, plan, cache.expand(b), probes, adapters=model.adapters.number)
        found += _scores(model, torch.cat(x, 1)[: len(group)], start, group, sampling)
    return found


def _scores(
    model: Llama, x: Tensor, prefix: list[int], texts: list[list[int]], sampling: Sampling | None
) -> list[Score]:
    """Score texts from the last layer's output `[B, T, E]` at the token before each of their tokens."""
    b, count = len(texts), max(map(len, texts))
    ids = pad_rows(texts, count, torch.int64).to(x.device)
    seen = torch.zeros(b, 1, model.dims.vocab_size, dtype=torch.bool, device=x.device)
    seen[:, :, prefix] = True
    parts, step = [], max(1, _LOGITS // seen.numel())
    for n in range(0, count, step):
        here = ids[:, n : n + step]
        logits = model.head(x[:, n : n + here.shape[1]], model.adapters.number).float()
        flat, token = logits.flatten(0, 1), here.flatten()
        part = [logprob_of(flat, token), (flat.argmax(-1) == token).float()]
        if sampling is not None:
            parameters, before = stack([sampling] * len(token), x.device), None
            if parameters.repetition_penalty is not None:
                new = torch.zeros_like(logits, dtype=torch.int32).scatter_(2, here[:, :, None], 1)
                known = (new.cumsum(1) > 0) | seen  # includes each token itself, hence the shift below
                before, seen = torch.cat((seen, known[:, :-1]), 1).flatten(0, 1), known[:, -1:]
            part.append(logprob_of(filter_logits(flat, parameters, before), token))
        parts.append(torch.stack(part).view(-1, *here.shape).cpu())
    whole = torch.cat(parts, 2)  # [2 or 3, B, T]
    for n, text in enumerate(texts):
        if not bool((finite := whole[0, n, : len(text)].isfinite()).all()):
            at = int((~finite).nonzero()[0])
            raise ValueError(
                f"the model's logits are NaN or infinite at token {at} of the continuation {text[:8]}...: its weights "
                f"may be damaged, or {model.dtype} may overflow (try another dtype)"
            )
    of_text = (whole[:, q, : len(text)].unbind(0) for q, text in enumerate(texts))
    return [Score(raw, greedy.bool(), *processed) for raw, greedy, *processed in of_text]


def score_text(
    model: Llama | Engine,
    ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    **options: Any,
) -> Score:
    """Score all tokens of a text but the first, by sliding windows if it is long.

    window: tokens per forward, default the model's context. stride: the number of tokens scored at the end of a window,
    given all others in it; default half of the window. The first window scores all of its tokens but the first.
    options: as in `score`. Raises ValueError for fewer than two tokens, and for sizes out of range.
    """
    check_options("score_text", score, options)
    engine, text = model if isinstance(model, Engine) else Engine(model), token_ids(ids)
    window = engine.model.context if window is None else whole_number("window", window)
    stride = max(window // 2, 1) if stride is None else whole_number("stride", stride)
    if len(text) < 2 or window < 2 or not 0 < stride < window or window > engine.model.context:
        raise ValueError(
            f"score_text needs at least 2 tokens, a window from 2 to {engine.model.context}, and a stride from 1 to "
            f"less than the window; found {len(text)} tokens, window {window}, stride {stride}"
        )
    scores, done = [], 1
    while done < len(text):
        end = min(window if done == 1 else done + stride, len(text))
        (found,) = score(engine, text[max(0, end - window) : done], [text[done:end]], **options)
        scores.append(found)
        done = end
    processed = [found.processed for found in scores if found.processed is not None]
    return Score(
        torch.cat([found.logprobs for found in scores]),
        torch.cat([found.greedy for found in scores]),
        torch.cat(processed) if processed else None,
    )


def choose(
    model: Llama | Engine,
    prefix: Sequence[int],
    choices: Sequence[Sequence[int]],
    *,
    per_token: bool = False,
    **options: Any,
) -> int:
    """Return the index of the most likely of several continuations of a prefix, the first in a tie.

    per_token: by the mean log-probability instead of the sum. options: as in `score`.
    """
    check_options("choose", score, options)
    scores = score(model, prefix, choices, **options)
    if not scores:
        raise ValueError("choose needs at least one choice")
    return max(range(len(scores)), key=lambda n: scores[n].mean if per_token else scores[n].total)
