"""Generation: chunked prefill, decoding token by token, batches, streaming, compiled steps."""

from __future__ import annotations

import operator
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import Cache
from .masks import Mask
from .model import Llama
from .sampling import Sampling, sample, stack
from .streaming import StopStrings
from .tokenizer import Tokenizer

CHUNKS = (512, 128)  # rows of a prefill step: the largest that a prompt still fills, the last one padded
DEFAULT_NEW_TOKENS = 256  # where neither the caller nor generation_config.json says how many
MIN_SLOTS = 1024  # compiled graphs have static shapes, so caches come in few sizes: powers of two from here


@dataclass(frozen=True)
class Step:
    """One new token of one prompt: its row in the batch, its id, its log-probability, and the text now certain.

    finish_reason is None until the row's last step: "stop" (a stop token or string) or "length".
    """

    row: int
    token: int
    logprob: float
    text: str
    finish_reason: str | None


@dataclass
class Completion:
    """All that was generated for one prompt: ids (a stop token included), log-probabilities, text."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def add(self, step: Step) -> None:
        """Append one step of this row."""
        self.tokens.append(step.token)
        self.logprobs.append(step.logprob)
        self.text += step.text
        self.finish_reason = step.finish_reason


class Engine:
    """Generates with one model. Holds its compiled steps: keep the engine, and later calls compile nothing."""

    def __init__(self, model: Llama, tokenizer: Tokenizer | None = None, *, compile: bool = False) -> None:
        """tokenizer: for text and stop strings. compile: run compiled steps (a fixed cost of seconds, then fast)."""
        self.model = model
        self.tokenizer = tokenizer
        self.compile = compile
        self.graphs: dict[tuple[Any, ...], Callable[..., Tensor]] = {}  # by batch size, rows, slots and mask
        self.compile_seconds = 0.0

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """Complete every prompt; see `stream` for the options."""
        completions = [Completion() for _ in prompts]
        for step in self.stream(prompts, **options):
            completions[step.row].add(step)
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Iterator[Step]:
        """Complete prompts (lists of token ids, of any lengths) together, yielding every token as it comes.

        max_new_tokens: default what generation_config.json says, else 256, at most what the context leaves room for.
        sampling: one for all prompts or one each; default what generation_config.json recommends, else greedy.
        stop: strings that end a text. stop_token_ids: default the model's end-of-text ids. Neither appears in the text;
        the tokens do.
        mask: default causal. Keep one Mask object for many calls: compiled steps are made for each.
        cache: continue after the tokens in it, instead of an empty one; it must have a row per prompt.
        Raises ValueError, before any work, for an empty prompt, an id outside the vocabulary, and tokens beyond the
        model's context.
        """
        model = self.model
        prompts = _as_lists(prompts)
        limits = self.check(prompts, max_new_tokens, cache)
        if stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: Engine(model, tokenizer)")
        if not isinstance(sampling, Sequence):
            sampling = [sampling or Sampling.recommended(model.generation_config)] * len(prompts)
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(sampling)} samplings for {len(prompts)} prompts; give one, or one each")
        stop_ids = frozenset(model.eos_token_ids if stop_token_ids is None else stop_token_ids)
        texts = [_Text(self.tokenizer, prompt, stop) for prompt in prompts]
        mask = None if mask is None else mask.to(model.device)
        return self._run(prompts, limits, sampling, texts, stop_ids, mask, cache)

    @torch.no_grad()
    def _run(
        self,
        prompts: list[list[int]],
        limits: list[int],
        sampling: Sequence[Sampling],
        texts: list[_Text],
        stop_ids: frozenset[int],
        mask: Mask | None,
        cache: Cache | None,
    ) -> Iterator[Step]:
        device = self.model.device
        if cache is None:
            cache = self.new_cache(len(prompts), max(len(p) + n for p, n in zip(prompts, limits, strict=True)))
        parameters = stack(sampling, device)
        seen = None
        if parameters.repetition_penalty is not None:
            seen = torch.zeros(len(prompts), self.model.config.vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(seen, prompts, strict=True):
                row[torch.tensor(prompt, device=device)] = True

        logits = self._prefill(prompts, mask, cache)
        running = torch.ones(len(prompts), dtype=torch.int32, device=device)
        for count in range(1, max(limits) + 1):
            token, logprob = sample(logits, parameters, torch.full_like(running, count - 1), seen)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            alive = running.tolist()
            for row, (id, lp) in enumerate(zip(token.tolist(), logprob.tolist(), strict=True)):
                if not alive[row]:
                    continue
                text, stopped = ("", False) if id in stop_ids else texts[row].put(id)
                reason = "stop" if stopped or id in stop_ids else "length" if count == limits[row] else None
                if reason is not None:
                    running[row] = 0
                    text += "" if stopped else texts[row].flush()
                yield Step(row, id, lp, text, reason)
            if not running.any():
                return
            logits = self._step(token[:, None], running, 1, mask, cache)

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """A cache for this engine: if it compiles, of one of few sizes, so that graphs are shared."""
        if self.compile:
            max_length = max(MIN_SLOTS, 1 << (max_length - 1).bit_length())
        return self.model.new_cache(batch_size, max_length)

    def check(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None, cache: Cache | None = None
    ) -> list[int]:
        """How many new tokens each prompt gets at most; raises the ValueErrors of `stream`."""
        config = self.model.config
        held, context, what = 0, config.max_position_embeddings, "context"
        if not len(prompts):
            raise ValueError("no prompts given")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if cache is not None:
            self.model.check_cache(cache, len(prompts))
            held = cache.reserved
            if cache.max_length < context:
                context, what = cache.max_length, "cache"
        limits = []
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {number} is empty; give at least one token, such as the beginning-of-text id")
            if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
                raise ValueError(f"prompt {number} has a token id outside the vocabulary of {config.vocab_size}")
            needed = held + len(prompt)
            room = context - needed
            if room < 1:
                raise ValueError(
                    f"prompt {number}: {needed} tokens leave no room in the {what} of {context} tokens; shorten it"
                )
            if max_new_tokens is not None and max_new_tokens > room:
                raise ValueError(
                    f"prompt {number}: {needed} tokens and {max_new_tokens} new ones exceed the {what} of "
                    f"{context} tokens; ask for at most {room} new tokens"
                )
            limits.append(min(max_new_tokens or self.default_new_tokens, room))
        return limits

    @property
    def default_new_tokens(self) -> int:
        """How many tokens to generate where the caller does not say."""
        return self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS

    def _prefill(self, prompts: list[list[int]], mask: Mask | None, cache: Cache) -> Tensor:
        """Append the prompts to the cache in chunks of fixed sizes; the logits `[B, V]` after each one's last token."""
        device = self.model.device
        length = torch.tensor([len(p) for p in prompts], dtype=torch.int32, device=device)
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), -(-longest // CHUNKS[-1]) * CHUNKS[-1], dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        ids = ids.to(device)
        logits, start = torch.empty(0), 0
        while start < longest:
            size = next((c for c in CHUNKS if start + c <= ids.shape[1]), CHUNKS[-1])
            here = (length - start).clamp(0, size)
            # Copied: a slice keeps the strides of the whole, and every other stride would compile once more.
            chunk = ids[:, start : start + size].clone(memory_format=torch.contiguous_format)
            chunk_logits = self._step(chunk, here, min(size, longest - start), mask, cache)
            ends_here = (length > start) & (length <= start + size)
            logits = chunk_logits if start == 0 else torch.where(ends_here[:, None], chunk_logits, logits)
            start += size
        return logits

    def _step(self, ids: Tensor, lengths: Tensor, count: int, mask: Mask | None, cache: Cache) -> Tensor:
        """Append ids `[B, T]`, of which `lengths` in each row are real, `count` at most; the logits `[B, V]` after each
        row's last."""
        key = (*ids.shape, cache.max_length, mask)
        first = self.compile and key not in self.graphs
        if first:
            self.graphs[key] = _compiled(self.model.step)
        step = self.graphs[key] if self.compile else self.model.step
        started = time.perf_counter()
        with cache.appending(count):
            logits = step(ids, lengths, None, None, cache, mask, "flex", 1)
        if first:
            self.compile_seconds += time.perf_counter() - started
        return logits[:, 0]


def _as_lists(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists of Python integers, whatever kind of integers they come as."""
    try:
        return [[operator.index(id) for id in prompt] for prompt in prompts]
    except TypeError:
        raise ValueError("prompts must be a list of lists of token ids, such as [[1, 2, 3]]") from None


def _compiled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a method for one set of shapes.

    torch keeps compiled code per code object, shared by all callers of a function and limited in number, beyond
    which it runs uncompiled. A code object of its own keeps each graph apart; fullgraph makes a second one an error.
    """
    assert isinstance(method, types.MethodType)
    function = method.__func__
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(types.MethodType(own, method.__self__), fullgraph=True, dynamic=False)


class _Text:
    """The text of one row as its tokens come: whole characters only, cut at stop strings.

    A model may have more ids than its tokenizer, where the vocabulary was padded; those have no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.size = tokenizer.vocab_size if tokenizer else 0
        self.decoder = tokenizer.stream([id for id in prompt if id < self.size]) if tokenizer else None
        self.stops = StopStrings(stop)

    def put(self, token: int) -> tuple[str, bool]:
        if self.decoder is None or token >= self.size:
            return "", False
        return self.stops.put(self.decoder.put(token))

    def flush(self) -> str:
        return "" if self.decoder is None else self.stops.put(self.decoder.flush())[0] + self.stops.flush()
