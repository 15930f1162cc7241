"""The sampling parameters of requests, checked, and as the tensors that `sampling` computes with."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..checkpoint.generation_config import GenerationConfig
from ..kernels.noise import signed
from ..usercode.arguments import whole_numbers
from .grammar import Grammar

LogitsProcessor: TypeAlias = Callable[[list[int], Tensor], Tensor]

_MOST = torch.finfo(torch.float32).max
_MOST_BIAS = 1e6  # divided by the smallest temperature, it is still finite
_COUNT = "0 (off) or a positive whole number"


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and 0 <= x < 2**31


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling parameters of one request, which apply in the order of the fields, as in transformers.

    logit_bias: numbers to add to the logits of token ids. repetition_penalty: divides the positive and multiplies the
    negative logits of tokens already seen, prompt included (arXiv:1909.05858). presence_penalty, frequency_penalty:
    subtracted from the logits of tokens already generated, once and as often as they were, as in OpenAI's API.
    no_repeat_ngram_size: no sequence of so many tokens comes twice, prompt included (0: off). min_new_tokens: no stop
    token before so many new tokens; stop strings still end a text. grammar: the text conforms to it, see `Grammar`; it
    may end where the grammar may. banned_tokens: ids that are never sampled.

    processors: functions from the ids so far, prompt included, and the logits (float32 `[V]` on the model's device) to
    logits of the same kind. They may be called again with the same ids, after an interrupt or a preemption; an
    exception in one ends its request only. Of several prompts for one text they see the ids of the first, and the
    combined logits.

    temperature: 0 is greedy, which the following fields do not change. top_k: keep the k most likely (0: all). top_p:
    keep the most likely until their mass reaches p, at least one (arXiv:1904.09751). min_p: keep tokens at least min_p
    times as likely as the most likely (arXiv:2407.01082). typical_p: keep the tokens whose surprise is nearest to the
    expected one until their mass reaches p (arXiv:2202.00666). seed: None draws a fresh one. top_logprobs: report so
    many of the most likely tokens with each step; like the log-probability of the token itself, these are the model's
    own, before any of the above.

    The tokens kept are those that transformers keeps on a CPU, bit by bit; on other devices, different ones of equally
    likely tokens may be kept. Steps of requests with no_repeat_ngram_size, grammar or processors wait for the token
    before; all else costs no synchronisation. Raises ValueError for values out of range.
    """

    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    grammar: Grammar | None = None
    banned_tokens: Sequence[int] = ()
    processors: Sequence[LogitsProcessor] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("repetition_penalty", lambda x: x > 2.0**-126, "a positive number"),  # else 1/x is infinite
            ("presence_penalty", lambda x: -2 <= x <= 2, "from -2 to 2"),
            ("frequency_penalty", lambda x: -2 <= x <= 2, "from -2 to 2"),
            ("no_repeat_ngram_size", _is_count, _COUNT),
            ("min_new_tokens", _is_count, _COUNT),
            ("temperature", lambda x: x >= 0, "0 (greedy) or a positive number"),
            ("top_k", _is_count, _COUNT),
            ("top_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("min_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("typical_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("top_logprobs", _is_count, _COUNT),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not -_MOST <= value <= _MOST or not valid(value):
                raise ValueError(f"{name} must be {rule}, not {value!r:.60}")
        if self.seed is not None and (type(self.seed) is not int or not -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed must be a 64-bit whole number, not {self.seed!r:.60}")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar must be a Grammar, such as Grammar.regex('[0-9]+'), not {self.grammar!r:.60}")
        banned = whole_numbers("banned_tokens must be token ids, such as [2]", self.banned_tokens)
        object.__setattr__(self, "banned_tokens", tuple(banned))
        object.__setattr__(self, "processors", _functions(self.processors))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def divisor(self) -> float:
        """The temperature, 0 if greedy. A value next to 0 counts as greedy: dividing by it would overflow."""
        return self.temperature if self.temperature > 1e-30 else 0.0

    @property
    def needs_host(self) -> bool:
        """Whether each of its tokens must be read before the next one can be sampled."""
        return bool(self.no_repeat_ngram_size or self.grammar or self.processors)

    @classmethod
    def recommended(cls, config: GenerationConfig, **overrides: Any) -> Sampling:
        """Return the parameters that generation_config.json recommends, replaced by `overrides` (None: not given).

        As in transformers, `do_sample: true` alone means a temperature of 1 and a top_k of 50, and without it
        temperature, top_k, top_p, min_p and typical_p are ignored. Raises ValueError for a value out of range, naming
        its source.
        """
        values = config.sampling_values()
        given = {n: v for n, v in overrides.items() if v is not None}
        for name in values.keys() - given.keys():
            try:
                cls(**{name: values[name]})
            except ValueError as error:
                raise ValueError(f"generation_config.json: {error}; set {name} yourself") from None
        return cls(**values | given)


def _functions(given: Any) -> tuple[LogitsProcessor, ...]:
    found = tuple(given) if isinstance(given, Sequence) else (given,)
    if not all(map(callable, found)):
        raise ValueError(f"processors must be a list of functions of token ids and logits, not {given!r:.60}")
    return found


def _biases(given: Any) -> dict[int, float] | None:
    """Return a copy of a logit_bias, None if it is empty."""
    if given is None or (isinstance(given, Mapping) and not given):
        return None
    rule = f"logit_bias must be numbers from {-_MOST_BIAS:.0e} to {_MOST_BIAS:.0e} by token id, such as {{5: -1.5}}"
    if not isinstance(given, Mapping):
        raise ValueError(f"{rule}, not {given!r:.60}")
    found = dict(zip(whole_numbers(rule, given), given.values(), strict=True))
    for id, value in found.items():
        if type(value) not in (int, float) or not -_MOST_BIAS <= value <= _MOST_BIAS:
            raise ValueError(f"{rule}, not {value!r:.60} for {id}; to rule a token out, use banned_tokens")
    return found


class SamplingTensors(NamedTuple):
    """The parameters of a batch of requests on the device, each `[B]` unless noted; None for those that no request
    uses."""

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    tail: Tensor | None = None  # 1 - top_p, rounded once
    min_p: Tensor | None = None
    repetition_penalty: Tensor | None = None
    seed: Tensor | None = None
    typical_p: Tensor | None = None
    presence_penalty: Tensor | None = None  # with frequency_penalty and counts
    frequency_penalty: Tensor | None = None
    counts: Tensor | None = None  # [B, V]: how often each token was generated
    bias: Tensor | None = None  # [B, V], float32, to add; -inf for banned tokens
    forbidden: Tensor | None = None  # [B, V], bool: stop tokens that come too early


# What `stack` leaves to an Engine, which knows a request's tokens and stop tokens.
_OF_ENGINES = (
    *("logit_bias", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "min_new_tokens", "grammar"),
    *("banned_tokens", "processors", "top_logprobs"),
)


def stack(requests: Sequence[Sampling], device: torch.device) -> SamplingTensors:
    """Stack the parameters of `requests` into tensors, drawing the seeds that are None. Raises ValueError for a request
    with parameters that only an Engine honours."""

    def column(values: Sequence[float | None], dtype: torch.dtype, neutral: float | None) -> Tensor | None:
        return None if all(v == neutral for v in values) else torch.tensor(values, dtype=dtype, device=device)

    requests = [with_seed(r) for r in requests]
    if beyond := [name for name in _OF_ENGINES if any(getattr(r, name) != getattr(Sampling, name) for r in requests)]:
        raise ValueError(f"{', '.join(beyond)}: honoured by Engine.stream, generate and submit only; leave it out")
    penalty = column([r.repetition_penalty for r in requests], torch.float32, 1.0)
    if (temperature := column([r.divisor for r in requests], torch.float32, 0.0)) is None:
        return SamplingTensors(repetition_penalty=penalty)
    return SamplingTensors(
        temperature=temperature,
        top_k=column([r.top_k for r in requests], torch.int64, 0),
        tail=column([1 - r.top_p for r in requests], torch.float32, 0.0),
        min_p=column([r.min_p for r in requests], torch.float32, 0.0),
        repetition_penalty=penalty,
        seed=column([r.seed for r in requests], torch.int64, None),
        typical_p=column([r.typical_p for r in requests], torch.float32, 1.0),
    )


def with_seed(sampling: Sampling, plus: int = 0) -> Sampling:
    """Return `sampling` with a concrete seed (random if None) plus `plus`, wrapping at 64 bits. Raises ValueError for
    anything but a `Sampling`."""
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, such as Sampling(temperature=0.8), not {sampling!r}")
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return replace(sampling, seed=signed((seed + plus) % 2**64))
