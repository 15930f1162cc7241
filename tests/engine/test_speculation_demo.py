"""Drafts for the demo weights: the same texts in float32, and on a CPU, one at a time, in bfloat16."""

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
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=2)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", ["lookup", "self"])
def test_a_text_in_bfloat16_is_the_same(demo_folder, drafter, sampling):
    """The kernels of up to 16 rows round each row as they do alone."""
    model = Llama.from_pretrained(demo_folder, device="cpu", dtype=torch.bfloat16)
    options = {"max_new_tokens": 48, "stop_token_ids": (), "sampling": sampling}
    for ids in prompts(Tokenizer.from_pretrained(demo_folder))[:2]:
        (expected,) = Engine(model, backend="dense").generate([ids], **options)
        (found,) = Engine(model, backend="dense", speculate=drafter).generate([ids], **options)
        assert found == expected, "log-probabilities, too"
