"""Grammars as masks over the vocabulary: llguidance's own, for every kind of tokenizer, and stop tokens."""

import functools
import json
import re

import llguidance
import llguidance.hf
import numpy as np
import pytest
import torch
import transformers
from helpers import DEMO, TEST_INPUTS, few

from llama_flex import Grammar, Tokenizer
from llama_flex.logits import grammar
from llama_flex.logits.grammar import Matcher, Vocabulary, fill_masks, set_bits
from llama_flex.logits.processors import unpack_bits

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"enum": ["ä", "b\n", None]}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LARK = 'start: "yes" | "no" (", " WORD)*\nWORD: /[a-zé]+/'
TEXTS = {
    "json": (
        Grammar.json_schema(SCHEMA),
        json.dumps({"name": 'Zoë "Q" €', "age": -12, "tags": "ä"}, ensure_ascii=False),
    ),
    "regex": (Grammar.regex(r"[0-9]{1,4} (BC|AD)( or so)?"), "1066 AD or so"),
    "lark": (Grammar.lark(LARK), "no, été, ok"),
}


class Letters:
    """A tokenizer of a few pieces; one is special, one is missing."""

    special_ids = frozenset({0})
    pieces = b"<unk>", b"a", b"b", b"", b"ab", b"\n"

    def encode(self, text, *, add_special_tokens):
        return [self.pieces.index(letter.encode()) for letter in text]

    def token_bytes(self):
        return list(self.pieces)


def ids_of(bits: np.ndarray, size: int) -> list[int]:
    return unpack_bits(torch.from_numpy(bits[None]))[0, :size].nonzero()[:, 0].tolist()


def allowed(matcher: Matcher, new: list[int], size: int = 8) -> np.ndarray:
    """Return the tokens that may follow as bits. size: of the vocabulary."""
    bits = np.full((1, size // 32 + 1), -1, np.int32)
    fill_masks([(matcher.advance(new), 0)], bits)
    matcher.complete(bits[0])
    return bits[0]


@pytest.fixture(scope="module")
def demo() -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer.from_pretrained(DEMO)
    return tokenizer, Vocabulary(tokenizer, tokenizer.vocab_size)


# ---- against llguidance


def check_masks(matcher: Matcher, theirs: llguidance.LLMatcher, ids: list[int], size: int, stop: int) -> None:
    """Check the mask after every token of a text against a matcher made by llguidance from transformers' tokenizer,
    whose end-of-text token is `stop`."""
    for end in range(len(ids) + 1):
        mask = np.zeros(-(-size // 32), np.int32)
        theirs.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        assert ids_of(allowed(matcher, ids[:end], size), size) == ids_of(mask, size), end
        if end < len(ids):
            assert theirs.consume_token(ids[end])


def both(vocabulary: Vocabulary, given: Grammar, stop: int) -> tuple[Matcher, llguidance.LLMatcher]:
    return vocabulary.matcher(given, [stop]), llguidance.LLMatcher(reference(stop), given.text)


@functools.cache
def reference(stop: int) -> llguidance.LLTokenizer:
    return llguidance.hf.from_tokenizer(transformers.AutoTokenizer.from_pretrained(DEMO), eos_token=stop)


@pytest.mark.weights
@pytest.mark.parametrize("kind", TEXTS)
def test_masks_are_llguidances(demo, kind):
    (tokenizer, vocabulary), (given, text) = demo, TEXTS[kind]
    matcher, theirs = both(vocabulary, given, stop := tokenizer.eos_token_id)
    check_masks(matcher, theirs, tokenizer.encode(text, add_special_tokens=False), tokenizer.vocab_size, stop)


@pytest.mark.weights
@pytest.mark.parametrize("mutant", ["another byte", "stop tokens at any time", "late"])
def test_comparison_with_llguidance_catches(demo, mutant, monkeypatch):
    (tokenizer, vocabulary), (given, text) = demo, TEXTS["regex"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    if mutant == "another byte":
        pieces = [piece.replace(b"7", b"x") for piece in tokenizer.token_bytes()]
        monkeypatch.setattr(tokenizer, "token_bytes", lambda: pieces)
        vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    elif mutant == "stop tokens at any time":
        monkeypatch.setattr(grammar, "set_bits", lambda bits, ids, on: set_bits(bits, ids, True))
    matcher, theirs = both(vocabulary, given, stop := tokenizer.eos_token_id)
    if mutant == "late":
        advance = matcher.advance
        monkeypatch.setattr(matcher, "advance", lambda new: advance(new[:-1]))
    with pytest.raises(AssertionError):
        check_masks(matcher, theirs, ids, tokenizer.vocab_size, stop)


# ---- other tokenizers


@functools.cache
def vocabularies(folder: str) -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer.from_pretrained(TEST_INPUTS / folder)
    return tokenizer, Vocabulary(tokenizer, tokenizer.vocab_size + 40)


@pytest.mark.weights
@pytest.mark.parametrize("folder", few(["llama2"], ["mistral", "llama3"]))
@pytest.mark.parametrize("kind", TEXTS)
def test_whatever_a_mask_allows_is_a_text_of_the_grammar(folder, kind):
    """Draw tokens that the masks allow, short texts first, with byte pieces and sentencepiece's spaces among them."""
    tokenizer, vocabulary = vocabularies(folder)
    given = {"json": Grammar.json_schema({"enum": ["naïve €", 12, "naïf"]})}.get(kind, TEXTS[kind][0])
    rule = {
        "json": r'"naïve €"|12|"naïf"',
        "regex": r"[0-9]{1,4} (BC|AD)( or so)?",
        "lark": r"yes|no(, [a-zé]+)*",
    }
    stop, size = tokenizer.vocab_size, tokenizer.vocab_size + 40  # padded
    matcher = vocabulary.matcher(given, [stop])
    draw, texts = torch.Generator().manual_seed(0), set()
    context = tokenizer.encode("x")
    for _ in range(12):
        new: list[int] = []
        while True:
            ids = ids_of(allowed(matcher, new, size), size)
            assert not {*ids} & {*tokenizer.special_ids, *range(tokenizer.vocab_size + 1, size)}
            if stop in ids and (len(ids) == 1 or len(new) > 6):
                break
            new.append(
                [id for id in ids if id != stop][int(torch.randint(len(ids) - (stop in ids), (), generator=draw))]
            )
            assert len(new) < 60
        decoder = tokenizer.stream(context)
        text = "".join(map(decoder.put, new)) + decoder.flush()
        assert re.fullmatch(rule[kind], text), text
        texts.add(text)
    assert len(texts) > 1


# ---- stop tokens, ends, errors


def test_stop_tokens_are_allowed_where_the_text_may_end_and_nowhere_else():
    vocabulary = Vocabulary(Letters(), 8)
    matcher = vocabulary.matcher(Grammar.regex("(a|b)b*"), [6, 5, 99])  # 5 is a token of text, too
    assert ids_of(allowed(matcher, []), 8) == [1, 2, 4]
    assert ids_of(allowed(matcher, [1]), 8) == [2, 5, 6]
    finished = vocabulary.matcher(Grammar.regex("ab"), [7])
    assert ids_of(allowed(finished, [1, 2]), 8) == ids_of(allowed(finished, [4]), 8) == [7]
    newline = vocabulary.matcher(Grammar.regex("a\nb"), [5])
    assert ids_of(allowed(newline, [1]), 8) == []  # it may go on with a token only that would end it


@pytest.mark.parametrize("size", [8, 31, 32, 64])
def test_masks_of_several_texts_are_computed_together_each_in_its_row(size):
    vocabulary, stop = Vocabulary(Letters(), size), size - 1
    given = [("ab", [4]), ("a(b|\n)", [1]), ("ab", [2]), ("(a|b)b*", []), ("a", [1])]  # ended, going on, wrong
    bits = np.full((8, size // 32 + 1), -1, np.int32)
    matchers = [vocabulary.matcher(Grammar.regex(pattern), [stop]) for pattern, _ in given]
    rows = [6, 0, 3, 5, 2]
    states = [matcher.advance(new) for matcher, (_, new) in zip(matchers, given, strict=True)]
    fill_masks(list(zip(states, rows, strict=True)), bits)
    assert (bits[[1, 4, 7]] == -1).all()
    for matcher, row, (pattern, new) in zip(matchers, rows, given, strict=True):
        if new == [2]:
            with pytest.raises(ValueError, match="allows no token after 1 new ones"):
                matcher.complete(bits[row])
            continue
        matcher.complete(bits[row])
        one = vocabulary.matcher(Grammar.regex(pattern), [stop])
        assert ids_of(bits[row], size) == ids_of(allowed(one, new, size), size)
    assert ids_of(bits[6], size) == [stop]
    assert ids_of(bits[0], size) == [2, 5]


def test_the_state_follows_the_tokens_forwards_and_back():
    vocabulary = Vocabulary(Letters(), 8)
    matcher, texts = vocabulary.matcher(Grammar.regex("(ab)*a?a"), [7]), [[4], [4, 1], [4], [], [4, 4, 1], [1]]
    for new in texts:
        assert ids_of(allowed(matcher, new), 8) == ids_of(
            allowed(vocabulary.matcher(Grammar.regex("(ab)*a?a"), [7]), new), 8
        )


def test_an_interrupt_while_tokens_are_consumed_loses_nothing():
    matcher = Vocabulary(Letters(), 8).matcher(Grammar.regex("(ab)+"), [7])
    allowed(matcher, [1])

    class Interrupted:
        def __init__(self, state):
            self.consume = state.consume_tokens

        def consume_tokens(self, ids):
            self.consume(ids)
            raise KeyboardInterrupt

    state, _ = matcher._state
    matcher._state = Interrupted(state), [1]
    with pytest.raises(KeyboardInterrupt):
        matcher.advance([1, 2])
    assert ids_of(allowed(matcher, [1, 2]), 8) == [1, 4, 7]


def test_a_grammar_that_allows_no_token_is_an_error_in_words():
    vocabulary = Vocabulary(Letters(), 8)
    for new in ([1], [2], [1, 1]):
        with pytest.raises(ValueError, match=f"the grammar allows no token after {len(new)} new ones"):
            allowed(vocabulary.matcher(Grammar.regex("ac"), [7]), new)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grammar.regex("("), "regular expression cannot be used: .*unclosed group"),
        (lambda: Grammar.regex(5), "a regex must be text, not 5"),
        (lambda: Grammar.lark("start: x"), "Lark grammar cannot be used: .*unknown name"),
        (lambda: Grammar.lark(None), "a Lark grammar must be text"),
        (lambda: Grammar.regex("\ud800"), "a regex must be Unicode text"),
        (lambda: Grammar.json_schema("[1"), "JSON schema cannot be used: expected"),
        (lambda: Grammar.json_schema({"type": "colour"}), "JSON schema cannot be used: .*colour"),
        (lambda: Grammar.json_schema({"if": {}}), "JSON schema cannot be used: Unimplemented keys"),
        (lambda: Grammar.json_schema({"a": {1}}), "JSON schema is not JSON"),
    ],
)
def test_a_malformed_grammar_is_refused_in_a_line(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_without_llguidance_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'llama_flex\[grammar\]'"):
        Grammar.regex("a")


def test_a_tokenizer_that_cannot_decode_piece_by_piece_is_refused(demo, monkeypatch):
    tokenizer = Tokenizer.from_pretrained(DEMO)
    monkeypatch.setattr(tokenizer._backend, "decoding", lambda: None)
    with pytest.raises(ValueError, match="grammars need a tokenizer whose text is the bytes of its tokens"):
        Vocabulary(tokenizer, 10)
