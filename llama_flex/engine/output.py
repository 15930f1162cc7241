"""The results of an engine: steps of tokens and text, completions, and the error for logits that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..text.detokenizer import StopStrings
from ..tokenizer import Tokenizer


class NonFiniteLogitsError(ValueError):
    """A NaN or an infinity in the model's own logits, from which no token can be sampled.

    where: the number of each affected prompt, and the number of the new token, from 1. completions: those of all
    prompts so far, from `Engine.generate`.
    """

    completions: Sequence[Completion] = ()

    def __init__(self, where: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
        prompts = ", ".join(f"prompt {prompt} at new token {token}" for prompt, token in where)
        way = "loading warns about NaN or infinite weights; an edit or score function may also be the cause"
        if dtype == torch.float16:
            way = "float16 overflows above 65,504; try dtype bfloat16 or float32"
        super().__init__(f"{prompts}: the model's logits are NaN or infinite ({way})")
        self.where = list(where)

    def with_completions(self, completions: Sequence[Completion]) -> NonFiniteLogitsError:
        """Attach the completions of all prompts and return this error; the prompts that it names end with "error"."""
        for prompt, _ in self.where:
            completions[prompt].finish_reason = "error"
        self.completions = completions
        return self


@dataclass(frozen=True)
class Step:
    """One new token of one prompt: the prompt's number, the token's id and log-probability, and the text now final.

    text is None for an engine without a tokenizer. finish_reason is None until the prompt's last step: "stop" (a stop
    token or string) or "length". top_logprobs: the most likely tokens in order, with their log-probabilities; None
    unless `Sampling` asks for them.
    """

    row: int
    token: int
    logprob: float
    text: str | None
    finish_reason: str | None
    top_logprobs: list[tuple[int, float]] | None = None


@dataclass
class Completion:
    """Everything generated for one prompt: ids (a stop token included), log-probabilities, and the text.

    text is None for an engine without a tokenizer. top_logprobs: those of each step, if `Sampling` asks for them.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = ""
    finish_reason: str | None = None
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    @classmethod
    def empty(cls, tokenizer: Tokenizer | None) -> Completion:
        """Return the completion of a prompt before its first token."""
        return cls(text=None if tokenizer is None else "")

    def add(self, step: Step) -> None:
        """Append one step of this prompt."""
        self.tokens.append(step.token)
        self.logprobs.append(step.logprob)
        self.text = None if step.text is None else (self.text or "") + step.text
        self.finish_reason = step.finish_reason
        if step.top_logprobs is not None:
            self.top_logprobs.append(step.top_logprobs)


@dataclass
class ScoredCompletion(Completion):
    """One of several completions of a prompt, with the score by which `Engine.beam_search` or `Engine.best_of` chose
    it."""

    score: float = 0.0


class OutputProcessor:
    """The conversion of one prompt's tokens into steps: whole characters only, text that ends before a stop string."""

    def __init__(
        self,
        row: int,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop: Sequence[str],
        stop_ids: Iterable[int],
        limit: int,
    ) -> None:
        """prompt: the ids that the text continues. limit: the most new tokens.

        Raises ValueError for stop strings without a tokenizer.
        """
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer: Engine(model, tokenizer)")
        self.row, self.limit, self.stop_ids = row, limit, frozenset(stop_ids)
        self._tokenizer, self._prompt, self._stop = tokenizer, prompt, stop
        self.rewind([])

    def empty_completion(self) -> Completion:
        """Return the completion of this prompt before its first token."""
        return Completion.empty(self._tokenizer)

    def rewind(self, steps: Sequence[Step]) -> None:
        """Reset to the state after the given steps."""
        self.count = 0
        self._text = None if self._tokenizer is None else _Text(self._tokenizer, self._prompt, self._stop)
        for step in steps:
            self.put(step.token, step.logprob)

    def put(self, token: int, logprob: float, top_logprobs: list[tuple[int, float]] | None = None) -> Step:
        """Add a token and return its step."""
        self.count += 1
        is_stop_id, is_last = token in self.stop_ids, self.count == self.limit
        text, stopped = None, False
        if self._text is not None:
            text, stopped = self._text.put(token, silent=is_stop_id)
            if (is_stop_id or is_last) and not stopped:
                text += self._text.rest()
        reason = "stop" if is_stop_id or stopped else "length" if is_last else None
        return Step(self.row, token, logprob, text, reason, top_logprobs)


class _Text:
    """The text of one prompt's new tokens, without special tokens; it ends before a stop string, which may hold some.

    A model may have more ids than its tokenizer, if the vocabulary was padded; those have no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, StopStrings(stop)
        context = [id for id in prompt if id in tokenizer]
        self._visible = tokenizer.stream(context)
        # Stop strings are searched for in the text with special tokens, as in transformers.
        self._all = tokenizer.stream(context, skip_special_tokens=False) if stop else None
        # Lengths of the text with special tokens and of the visible text, after each token whose text is held back and
        # before all of those; the first text's length, how much of it was searched, how much visible text was given.
        self._lengths, self._before = list[tuple[int, int]](), (0, 0)
        self._all_length = self._searched = self._given = 0
        self._ready = ""  # visible text that is held back

    def put(self, token: int, *, silent: bool = False) -> tuple[str, bool]:
        """Add a token; return the text that is now final, and whether a stop string was found. silent: the token has
        no visible text, but may complete a stop string."""
        if token not in self._tokenizer:
            return "", False
        text = "" if silent else self._visible.put(token)
        if self._all is None:
            return text, False
        self._ready += text
        text = self._all.put(token)
        self._all_length += len(text)
        pending = self._all.pending()
        visible = self._given + len(self._ready) + len(self._visible.pending())
        self._lengths.append((self._all_length + len(pending), visible))
        safe, stopped = self._stops.put(text, pending)
        self._searched += len(safe)
        if stopped:
            self._ready += self._visible.flush()
        return self._give(), stopped

    def rest(self) -> str:
        """Return the text still held back, after the last token."""
        return self._ready + self._visible.flush()

    def _give(self) -> str:
        """Return the visible text up to the point searched for stop strings. If that is within a token's text, both
        texts are aligned at its end: differences, such as white space or held-back text, come before."""
        done = max((n for n, (length, _) in enumerate(self._lengths) if length <= self._searched), default=-1)
        if done >= 0:
            self._before = self._lengths[done]
            del self._lengths[: done + 1]
        due = self._before[1]
        if self._lengths:
            length, visible = self._lengths[0]
            due = max(due, visible - (length - self._searched))
        text = self._ready[: max(due - self._given, 0)]
        self._ready = self._ready[len(text) :]
        self._given += len(text)
        return text
