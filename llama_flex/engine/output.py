"""What an engine returns: steps of tokens and text, completions, and the error of a model without usable logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..text.detokenizer import StopStrings
from ..tokenizer import Tokenizer


class NonFiniteLogitsError(ValueError):
    """The model's own logits have a NaN or an infinity, from which no token can be chosen.

    where: the number of each prompt that this happened to, and of the new token, from 1. completions: what
    `Engine.generate` has of all prompts.
    """

    completions: Sequence[Completion] = ()

    def __init__(self, where: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
        prompts = ", ".join(f"prompt {prompt} at new token {token}" for prompt, token in where)
        way = "loading warns of weights that are; an edit or score function may be the reason, too"
        if dtype == torch.float16:
            way = "float16 ends at 65,504, where bfloat16 and float32 do not: try dtype bfloat16 or float32"
        super().__init__(f"{prompts}: the model's logits are NaN or infinite ({way})")
        self.where = list(where)

    def with_completions(self, completions: Sequence[Completion]) -> NonFiniteLogitsError:
        """Return this error with what was generated of all prompts; those that it names have ended in an error."""
        for prompt, _ in self.where:
            completions[prompt].finish_reason = "error"
        self.completions = completions
        return self


@dataclass(frozen=True)
class Step:
    """One new token for one prompt: the prompt's number, its id, its log-probability, and the text now certain.

    text is None for an engine without a tokenizer. finish_reason is None until the prompt's last step: "stop" (a stop
    token or string) or "length".
    """

    row: int
    token: int
    logprob: float
    text: str | None
    finish_reason: str | None


@dataclass
class Completion:
    """All that was generated for one prompt: ids (a stop token included), log-probabilities, and the text.

    text is None for an engine without a tokenizer.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = ""
    finish_reason: str | None = None

    @classmethod
    def empty(cls, tokenizer: Tokenizer | None) -> Completion:
        """Return the completion of a prompt before its first token."""
        return cls(text=None if tokenizer is None else "")

    def add(self, step: Step) -> None:
        """Append one step of this row."""
        self.tokens.append(step.token)
        self.logprobs.append(step.logprob)
        self.text = None if step.text is None else (self.text or "") + step.text
        self.finish_reason = step.finish_reason


class OutputProcessor:
    """Turn the tokens of one prompt into steps: whole characters only, text that ends before a stop string."""

    def __init__(
        self,
        row: int,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop: Sequence[str],
        stop_ids: Iterable[int],
        limit: int,
    ) -> None:
        """prompt: the ids that the text goes on from. limit: the most tokens.

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
        """Go back to where these steps, and no others, had been made."""
        self.count = 0
        self._text = None if self._tokenizer is None else _Text(self._tokenizer, self._prompt, self._stop)
        for step in steps:
            self.put(step.token, step.logprob)

    def put(self, token: int, logprob: float) -> Step:
        """Return the step of one more token."""
        self.count += 1
        is_stop_id, is_last = token in self.stop_ids, self.count == self.limit
        text, stopped = None, False
        if self._text is not None:
            text, stopped = self._text.put(token, silent=is_stop_id)
            if (is_stop_id or is_last) and not stopped:
                text += self._text.rest()
        return Step(self.row, token, logprob, text, "stop" if is_stop_id or stopped else "length" if is_last else None)


class _Text:
    """The text of one prompt's new tokens, without special tokens; it ends before a stop string, which may hold some.

    A model may have more ids than its tokenizer, where the vocabulary was padded; those have no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, StopStrings(stop)
        context = [id for id in prompt if id in tokenizer]
        self._visible = tokenizer.stream(context)
        # Stop strings are looked for in the text with special tokens, as transformers does.
        self._all = tokenizer.stream(context, skip_special_tokens=False) if stop else None
        # How long the text with special tokens and the visible text are after each token, and how much of them is
        # searched and given. Before the tokens whose text is held back, the lengths stand alone.
        self._lengths, self._before = list[tuple[int, int]](), (0, 0)
        self._all_length = self._searched = self._given = 0
        self._ready = ""  # visible text that may not be given yet

    def put(self, token: int, *, silent: bool = False) -> tuple[str, bool]:
        """Return the text that is certain with one more token, and whether a stop string was found. silent: the token
        has no text itself, but may complete a stop string."""
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
        """Return the text that was held back, once no more tokens come."""
        return self._ready + self._visible.flush()

    def _give(self) -> str:
        """Return the visible text up to where was searched. Of a token amid whose text that is, both texts end alike:
        what they may have beside, such as white space or what was held back, comes before."""
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
