"""Score continuations of one prefix, answer multiple-choice questions, and compute the perplexity of a long text.

python -m examples.scoring
"""

import os
from pathlib import Path

import torch

from llama_flex import Engine, Llama, Sampling, Tokenizer, choose, score, score_text

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")
QUESTIONS = (
    ("The capital of France is", ("Paris", "London", "Rome", "Berlin"), 0),
    ("Water is made of hydrogen and", ("gold", "oxygen", "salt", "light"), 1),
    ("The opposite of hot is", ("warm", "red", "cold", "tall"), 2),
    ("Two plus two is", ("seven", "ten", "one", "four"), 3),
)
TEXT = (Path(__file__).parent.parent / "LICENSE").read_text()


def main(text: str = TEXT, window: int = 512) -> tuple[int, float]:
    """Print the score of each choice; return how many answers are right, and the perplexity."""
    tokenizer = Tokenizer.from_pretrained(folder)
    engine, right = Engine(Llama.from_pretrained(folder, dtype=torch.float32)), 0
    for question, choices, answer in QUESTIONS:
        prefix = tokenizer.encode(question)
        ids = [tokenizer.encode(f" {choice}", add_special_tokens=False) for choice in choices]
        scores = score(engine, prefix, ids, sampling=Sampling(temperature=0.7, top_k=20))
        for choice, found in zip(choices, scores, strict=True):
            processed = found.processed.sum()
            print(f"{question} {choice}: {found.total:.2f}, at temperature 0.7 among 20 tokens {processed:.2f}")
        right += choose(engine, prefix, ids) == answer
    ids = tokenizer.encode(text)
    found = score_text(engine, ids, window=window)
    print(f"{right} of {len(QUESTIONS)} right; perplexity of {len(ids)} tokens: {found.perplexity:.2f}")
    return right, found.perplexity


if __name__ == "__main__":
    main()
