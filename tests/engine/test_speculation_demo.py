"""Drafts for the demo weights: the same texts in float32, and in bfloat16 others only where tokens are as likely."""

import pytest
import torch
from helpers import few

from llama_flex import Engine, Llama, Sampling, Tokenizer

CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n    return a * b\n"
ASKED = [
    f"Repeat this code, and add a docstring to each function:\n{CODE}",
    "Copy this text twice: a stitch in time saves nine, and the early bird catches the worm.",
    "Count from one to fifty in words.",
]
# Logits of 16 to 32, such as the largest ones, are an eighth apart in bfloat16; either of two may move by one step.
STEP = 0.125


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in ASKED]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@pytest.mark.weights
@pytest.mark.parametrize("sampling", few([Sampling()], [Sampling(temperature=0.8, top_p=0.9, seed=1)]))
@pytest.mark.parametrize("drafter", ["lookup", "self"])
def test_texts_in_float32_are_the_same(demo, demo_folder, drafter, sampling):
    asked = prompts(Tokenizer.from_pretrained(demo_folder))[:1]
    options = {"max_new_tokens": 32, "sampling": sampling}
    expected = Engine(demo, backend="dense").generate(asked, **options)
    engine = Engine(demo, backend="dense", speculate=drafter)
    assert [done.tokens for done in engine.generate(asked, **options)] == [done.tokens for done in expected]
    speculation = engine.speculation
    assert speculation.accepted > 0
    if not sampling.temperature:  # far more is right of greedy texts
        assert speculation.decoded > (2.0 if drafter == "self" else 1.2) * speculation.decode_steps


@pytest.mark.weights
@pytest.mark.exhaustive
@pytest.mark.parametrize("drafter", ["lookup", "self"])
def test_texts_in_bfloat16_differ_where_tokens_are_as_likely(demo_folder, drafter):
    model = Llama.from_pretrained(demo_folder, device="cpu", dtype=torch.bfloat16)
    asked = prompts(Tokenizer.from_pretrained(demo_folder))
    options = {"max_new_tokens": 100, "stop_token_ids": (), "sampling": Sampling(top_logprobs=4)}
    expected = Engine(model, backend="dense").generate(asked, **options)
    found = Engine(model, backend="dense", speculate=drafter).generate(asked, **options)
    compared = differing = 0
    for one, other in zip(found, expected, strict=True):
        pairs = zip(one.tokens, other.tokens, other.top_logprobs, strict=True)
        first = next(((n, mine, dict(top)) for n, (mine, token, top) in enumerate(pairs) if mine != token), None)
        compared += len(one.tokens) if first is None else first[0] + 1
        if first is not None:
            n, mine, top = first
            differing += 1
            assert top[other.tokens[n]] - top[mine] <= 2 * STEP
    assert differing <= 0.03 * compared
