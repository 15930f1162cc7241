"""Grammars that a generated text conforms to, by masks over the vocabulary from llguidance, an optional package."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Grammar:
    """The form of a text: a JSON schema, a regular expression or a Lark grammar. It needs llguidance.

    The text begins after the prompt, as its tokens spell it. It may end, by a stop token, wherever the grammar may; one
    that reaches max_new_tokens is cut.
    """

    text: str  # as llguidance takes it

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Grammar:
        """Return the grammar of the JSON values that conform to a schema. Raises ValueError for a schema that is not
        JSON, or that llguidance does not support."""
        if not isinstance(schema, str):
            try:
                schema = json.dumps(schema)
            except (TypeError, ValueError) as error:
                raise ValueError(f"the JSON schema is not JSON ({error})") from None
        try:
            text = _llguidance().LLMatcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise ValueError(f"the JSON schema is not JSON ({error})") from None
        return cls._checked("JSON schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Return the grammar of the texts that match a regular expression as a whole, in the syntax of Rust's `regex`.
        Raises ValueError for a malformed one."""
        return cls._checked("regular expression", _llguidance().LLMatcher.grammar_from_regex(_text("a regex", pattern)))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Return a grammar written in llguidance's dialect of Lark, an EBNF; its first rule is `start`. Raises
        ValueError for a malformed one."""
        return cls._checked("Lark grammar", _llguidance().LLMatcher.grammar_from_lark(_text("a Lark grammar", text)))

    @classmethod
    def _checked(cls, kind: str, text: Any) -> Grammar:
        if error := _llguidance().LLMatcher.validate_grammar(text):
            raise ValueError(f"the {kind} cannot be used: {' '.join(error.split())[:300]}")
        return cls(text)


class TokenBytes(Protocol):
    """The interface of `Tokenizer` that grammars need."""

    special_ids: frozenset[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def token_bytes(self) -> list[bytes]: ...


class Vocabulary:
    """The bytes of a tokenizer's tokens, for llguidance. Matchers come from here; making the first takes a second."""

    def __init__(self, tokenizer: TokenBytes, size: int) -> None:
        """size: of the model's vocabulary. Raises ValueError as `Tokenizer.token_bytes` does."""
        self._encode, self._special = tokenizer.encode, tokenizer.special_ids
        self._tokens = [*tokenizer.token_bytes(), *[b""] * size][:size]  # a model's vocabulary may be padded
        # llguidance allows its end-of-text token where a text may end. Ours is none of the model's: stop tokens differ
        # from request to request.
        self.eos_token_id, self.bos_token_id = size, None
        self.tokens = [*self._tokens, b"<end>"]
        self.special_token_ids = [*(id for id in sorted(self._special) if id < size), size]
        library = _llguidance()
        self._tokenizer = library.LLTokenizer(library.TokenizerWrapper(self), n_vocab=size + 1, eos_token=size)
        # Compiling a grammar may take a second, and many requests have the same.
        self._compiled = functools.lru_cache(maxsize=64)(
            lambda text: library.LLMatcher(self._tokenizer, text, log_level=0)
        )

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text that a grammar leaves no choice about."""
        for before in ("", "\n"):  # at the start, sentencepiece puts a space before a text
            skipped = len(self._encode(before, add_special_tokens=False)) if before else 0
            ids = self._encode(before + text, add_special_tokens=False)[skipped:]
            known = self._special.isdisjoint(ids) and max(ids, default=0) < len(self._tokens)
            if known and b"".join(self._tokens[id] for id in ids) == text.encode():
                return ids
        found: list[int] = self._tokenizer.greedy_tokenize(text)
        return found

    def matcher(self, grammar: Grammar, stop_ids: Collection[int]) -> Matcher:
        """Return a matcher for one text. Raises ValueError if llguidance refuses the grammar."""
        first = self._compiled(grammar.text)
        if first.is_error():
            raise ValueError(f"the grammar cannot be used with this tokenizer{_why(first)}")
        return Matcher(first, len(self._tokens), stop_ids)


class Matcher:
    """The state of a grammar after the tokens of a text."""

    def __init__(self, first: Any, size: int, stop_ids: Collection[int]) -> None:
        """first: an `LLMatcher` before the first token. size: of the vocabulary, llguidance's own token not counted."""
        self._first, self._stop_ids = first, [id for id in stop_ids if id < size]
        self._state: tuple[Any, list[int]] | None = None  # with the tokens consumed; None while it changes

    def advance(self, new: list[int]) -> Any:
        """Return the state after the new tokens, for `fill_masks`; those consumed already are not consumed again."""
        state, consumed = self._state or (None, [])
        if state is None or consumed != new[: len(consumed)]:
            state, consumed = self._first.deep_copy(), []
        self._state = None
        after = new[len(consumed) :]
        state.consume_tokens(after)
        consumed += after
        self._state = state, consumed
        return state

    def complete(self, bits: np.ndarray) -> None:
        """Complete a mask `[V // 32 + 1]` from `fill_masks`: stop tokens may follow where the text may end, and nowhere
        else. Raises ValueError if no token may follow, or if llguidance gives up, as on a grammar that is too
        complex."""
        assert self._state is not None
        state, consumed = self._state
        if state.is_error():
            self._state = None
            raise ValueError(
                f"the grammar allows no token after {len(consumed)} new ones, or is too complex{_why(state)}"
            )
        set_bits(bits, self._stop_ids, state.is_accepting())


def fill_masks(states: Sequence[tuple[Any, int]], bits: np.ndarray) -> None:
    """Write the tokens that may follow into rows of bits, int32 `[R, V // 32 + 1]`, token 0 the lowest bit of the
    first word; in parallel threads. states: from `Matcher.advance`, each with its row."""
    if states:
        _executor().unsafe_compute_mask_ptr(states, bits.ctypes.data, bits.strides[0], len(bits))


@functools.cache
def _executor() -> Any:
    return _llguidance().LLExecutor()


def set_bits(bits: np.ndarray, ids: Iterable[int], on: bool) -> None:
    """Set or clear the bits of ids, in int32 `[N]`, 32 to a word."""
    words = bits.view(np.uint32)
    for id in ids:
        bit = np.uint32(1 << id % 32)
        words[id // 32] = words[id // 32] | bit if on else words[id // 32] & ~bit


def _text(kind: str, given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError(f"{kind} must be text, not {given!r:.60}")
    if not given.isascii() and any("\ud800" <= each <= "\udfff" for each in given):
        raise ValueError(f"{kind} must be Unicode text; {given!r:.60} has a lone surrogate")
    return given


def _why(matcher: Any) -> str:
    text = " ".join(matcher.get_error().partition("<state>")[0].split())
    return f" ({text[:300]})" if text else ""


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError("grammars need llguidance: pip install 'llama_flex[grammar]'") from None
    return llguidance
