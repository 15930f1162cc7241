"""Attention maps: find which heads look where, from the weights that every query gives to every key.

Random tokens, repeated once, reveal induction heads (arXiv:2209.11895): at a token's second occurrence they look at
what followed the first. Then the map of one head over a sentence is printed.

python -m examples.attention_maps
"""

import os

import torch

from llama_flex import Capture, Llama, Tokenizer

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")
SENTENCE = "The cat sat on the mat. The cat sat on the"


@torch.no_grad()
def main(sentence: str = SENTENCE, length: int = 40, best: int = 5) -> list[tuple[float, int, int]]:
    """Print and return the heads that look most at what followed the same token before: share, layer, head."""
    model, tokenizer = Llama.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
    half = torch.randint(1000, 20000, (length,), generator=torch.Generator().manual_seed(0))
    capture = Capture("attention", where=range(2 * length))
    model(half.repeat(2)[None], capture=capture)
    second, after_first = torch.arange(length, 2 * length - 1), torch.arange(1, length)
    shares = []
    for layer in range(model.config.num_hidden_layers):
        rows = capture["attention", layer][0]  # [T, H, S]
        for head, share in enumerate(rows[second, :, after_first].mean(0).tolist()):
            shares.append((share, layer, head))
    shares.sort(reverse=True)
    for share, layer, head in shares[:best]:
        print(f"layer {layer}, head {head}: {share:.0%} of its attention is on what came after the same token before")

    ids, (_, layer, head) = tokenizer.encode(sentence), shares[0]
    capture = Capture("attention", layers=layer, heads=head, where=range(len(ids)))
    model(torch.tensor([ids]), capture=capture)
    print(f"layer {layer}, head {head}:")
    for id, row in zip(ids, capture["attention", layer][0, :, 0], strict=True):
        shades = "".join(" ░▒▓█"[int((weight >= torch.tensor([0.05, 0.2, 0.4, 0.6])).sum())] for weight in row)
        print(f"{tokenizer.decode([id]):>8} {shades}")
    return shares[:best]


if __name__ == "__main__":
    main()
