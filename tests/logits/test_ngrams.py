"""N-grams that may not come twice, as in transformers, and functions of the caller's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from llama_flex.logits import processors
from llama_flex.logits.grammar import set_bits
from llama_flex.logits.processors import RequestProcessors, unpack_bits

VOCAB = 70  # more than two words of bits


def allowed(rules: RequestProcessors, new: list[int]) -> list[bool]:
    bits = np.full((1, VOCAB // 32 + 1), -1, np.int32)
    rules.complete(new, bits[0])
    return unpack_bits(torch.from_numpy(bits))[0, :VOCAB].tolist()


def check_ngrams(ids: list[int], start: int, size: int) -> None:
    """Check the tokens that may follow every beginning of ids, the first `start` of which are the prompt."""
    rules, theirs = RequestProcessors(ids[:start], ngram_size=size), NoRepeatNGramLogitsProcessor(size)
    for end in range(start, len(ids) + 1):
        expected = theirs(torch.tensor([ids[:end]]), torch.zeros(1, VOCAB)) == 0
        assert allowed(rules, ids[start:end]) == expected[0].tolist()


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(60, 66), min_size=1, max_size=40), data=st.data(), size=st.integers(1, 4))
def test_ngrams_are_transformers(ids, data, size):
    check_ngrams(ids, data.draw(st.integers(1, len(ids))), size)


@pytest.mark.parametrize("mutant", ["next size", "without the prompt", "another bit"])
def test_comparison_of_ngrams_catches(mutant, monkeypatch):
    ngrams, ids = processors._Ngrams, [61, 62, 61, 62, 63, 61, 62, 62, 63]
    check_ngrams(ids, 4, 2)
    if mutant == "next size":
        monkeypatch.setattr(processors, "_Ngrams", lambda size, prompt: ngrams(size + 1, prompt))
    elif mutant == "without the prompt":
        monkeypatch.setattr(processors, "_Ngrams", lambda size, prompt: ngrams(size, prompt[-1:]))
    else:
        monkeypatch.setattr(processors, "set_bits", lambda bits, ids, on: set_bits(bits, [id - 1 for id in ids], on))
    with pytest.raises(AssertionError):
        check_ngrams(ids, 4, 2)


def test_the_state_follows_the_tokens_forwards_and_back():
    rules = RequestProcessors([60, 61], ngram_size=2)
    texts = [[60], [60, 62], [60, 62, 60], [], [60, 62, 60, 61], [62, 60, 62], [62]]
    for new in texts:
        assert allowed(rules, new) == allowed(RequestProcessors([60, 61], ngram_size=2), new), new


def test_functions_are_called_in_turn_with_all_tokens_and_must_return_logits():
    def add(ids, logits):
        return logits + len(ids)

    def double(ids, logits):
        return 2 * logits.double()

    logits = torch.zeros(VOCAB)
    found = RequestProcessors([1, 2], functions=[add, double]).apply([3], logits)
    assert torch.equal(found, torch.full((VOCAB,), 6.0))
    for wrong, said in (
        (None, "NoneType"),
        (logits[:-1], r"\[69\]"),
        (logits.long(), "int64"),
        (logits[None], "1, 70"),
    ):
        rules = RequestProcessors([1], functions=[lambda ids, logits, wrong=wrong: wrong])
        with pytest.raises(ValueError, match=f"logits processor <lambda> must return .*{said}"):
            rules.apply([], logits)
