"""Limits on the tokens of a request, by the context, the cache, `generation_config.json`, and the caller's
arguments."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from ..cache import Cache
from ..logits.grammar import Vocabulary
from ..logits.parameters import Sampling
from ..logits.processors import RequestProcessors
from ..model import Llama
from ..tokenizer import Tokenizer
from ..usercode.arguments import whole_number, whole_numbers
from .fusion import Ensemble, Prompt, token_ids

DEFAULT_NEW_TOKENS = 256  # if neither the caller nor generation_config.json gives a number


class RequestLimits:
    """The token limits of requests to a model."""

    def __init__(self, model: Llama, tokenizer: Tokenizer | None = None) -> None:
        """tokenizer: for grammars."""
        self.model, self._tokenizer = model, tokenizer
        self._vocabulary: Vocabulary | None = None  # made for the first grammar

    @property
    def default_new_tokens(self) -> int:
        """The number of new tokens if the caller gives none."""
        return self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS

    def check(
        self, requests: Sequence[Ensemble], max_new_tokens: int | None = None, cache: Cache | None = None
    ) -> list[int]:
        """Return the most new tokens that each request can get; raises the ValueErrors of `Engine.stream`."""
        if not requests:
            raise ValueError("no prompts given")
        if max_new_tokens is not None:
            max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        if cache is not None:
            self.model.check_cache(cache, sum(len(request.prompts) for request in requests))
        limits, longest = list[int](), self.longest(max_new_tokens)
        for number, request in enumerate(requests):
            limit = max_new_tokens or self.default_new_tokens
            for prompt in request.prompts:
                room, needed, what = self._room(number, prompt, cache)
                if room < 1:
                    raise ValueError(f"prompt {number}: {needed} tokens leave no room in the {what}; shorten it")
                if max_new_tokens is not None and max_new_tokens > room:
                    raise ValueError(
                        f"prompt {number}: {needed} tokens and {max_new_tokens} new ones exceed the {what}; ask for at "
                        f"most {int(room)} new tokens"
                    )
                if needed >= longest:
                    raise ValueError(
                        f"prompt {number}: {needed} tokens leave no room within generation_config.json's max_length of "
                        f"{longest}; give max_new_tokens (--max-new-tokens), or shorten the prompt"
                    )
                limit = int(min(limit, room, longest - needed))
            limits.append(limit)
        return limits

    def longest(self, max_new_tokens: int | None = None) -> float:
        """Return the most tokens that a text may have by the max_length of generation_config.json, which applies only
        if neither the caller nor that file sets the number of new tokens; else infinity."""
        config = self.model.generation_config
        if config.max_length is None or max_new_tokens is not None or config.max_new_tokens is not None:
            return math.inf
        return config.max_length

    def stop_ids(self, asked: Iterable[int] | None) -> frozenset[int]:
        """Return the ids that end a text: the given ones, or the model's if None. Raises ValueError for anything but
        ids of the vocabulary."""
        if asked is None:
            return frozenset(self.model.eos_token_ids)
        ids = frozenset(whole_numbers("stop_token_ids must be token ids, such as [2]", asked))
        self._check_vocabulary("stop_token_ids", ids)
        return ids

    def _check_vocabulary(self, name: str, ids: Iterable[int]) -> None:
        size = self.model.config.vocab_size
        if beyond := [id for id in ids if not 0 <= id < size]:
            raise ValueError(f"{name} has token id {beyond[0]}, which is outside the vocabulary of {size}")

    def processors(
        self, sampling: Sampling, text: Sequence[int], stop_ids: Collection[int], limit: int
    ) -> RequestProcessors | None:
        """Return what the host does to the logits of a request, None if nothing. text: the ids that it continues.
        limit: its most new tokens. Raises ValueError for sampling parameters that the request cannot have."""
        size = self.model.config.vocab_size
        for name, ids in ("logit_bias", sampling.logit_bias or ()), ("banned_tokens", sampling.banned_tokens):
            self._check_vocabulary(name, ids)
        if sampling.top_logprobs > size:
            raise ValueError(f"top_logprobs {sampling.top_logprobs} exceeds the vocabulary of {size}")
        if sampling.min_new_tokens > limit:
            raise ValueError(
                f"min_new_tokens {sampling.min_new_tokens} exceeds the {limit} new tokens that the text may have; ask "
                "for fewer, or give a larger max_new_tokens"
            )
        if not sampling.needs_host:
            return None
        matcher = None
        if sampling.grammar is not None:
            if self._tokenizer is None:
                raise ValueError("a grammar needs a tokenizer: Engine(model, tokenizer)")
            if not stop_ids:
                raise ValueError("a grammar needs stop tokens, to end the text: give stop_token_ids (--stop-token)")
            self._vocabulary = self._vocabulary or Vocabulary(self._tokenizer, size)
            matcher = self._vocabulary.matcher(sampling.grammar, stop_ids)
        ngram_size, functions = sampling.no_repeat_ngram_size, sampling.processors
        return RequestProcessors(text, ngram_size=ngram_size, matcher=matcher, functions=functions)

    def cached_ids(
        self, given: Sequence[Sequence[int]] | None, cache: Cache | None, count: int
    ) -> Sequence[Sequence[int]]:
        """Return the ids in the cache for each of `count` requests, none if not given. Raises ValueError."""
        if given is None:
            return [[]] * count
        if cache is None:
            raise ValueError("cached_ids needs the cache that it describes; pass cache=...")
        rule = f"cached_ids must hold a list of token ids for each of {count} prompts, such as {[[1, 2, 3]] * count}"
        wrong = ValueError(f"{rule}, not {given!r:.100}")
        try:
            ids = [token_ids(each) for each in given]
        except (TypeError, ValueError):
            raise wrong from None
        if len(ids) != count:
            raise wrong
        for n, each in enumerate(ids):
            if each:
                self.check_ids(f"cached_ids {n}", each)
        return ids

    def check_ids(self, what: str, ids: Sequence[int]) -> None:
        """Raise ValueError for an empty list, and for ids outside the model's vocabulary."""
        if not len(ids):
            raise ValueError(f"{what} is empty; give at least one token, such as the beginning-of-text id")
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise ValueError(f"{what} has a token id outside the vocabulary of {self.model.config.vocab_size}")

    def _room(self, number: int, prompt: Prompt, cache: Cache | None) -> tuple[float, int, str]:
        """Return how many tokens fit after a prompt, how many are taken up to its end, and the name of the limit."""
        self.check_ids(f"prompt {number}", prompt.ids)
        if cache is not None and cache.window is not None:
            return math.inf, len(prompt.ids), "cache"
        held, context = 0 if cache is None else int(cache.next_position.max()), self.model.context
        needed = held + max(max(prompt.positions) + 1, prompt.generated_position or 0)
        rooms = [(context - needed, needed, f"context of {context} tokens")]
        if cache is not None:
            needed = cache.reserved + len(prompt.ids)
            rooms.append((cache.max_length - needed, needed, f"cache of {cache.max_length} tokens"))
        return min(rooms)
