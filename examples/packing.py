"""Pack several texts into one row, none of which sees another: each has its segment, and positions from 0.

Compares the logits of each text with those in a row of its own, in float32: with `masks.document()` they are the same
up to rounding; with a plain causal mask, every text but the first also reads those before it. RoPE is relative, so
positions that continue from text to text would change logits only by rounding; positions that start again at 0 stay
small, however many texts a row has.

python -m examples.packing
"""

import os

import torch

from llama_flex import Llama, Tokenizer, masks

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")
TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of 100 degrees",
    "Here is a recipe for bread. Mix flour, water, yeast and",
    "The opposite of hot is",
)


@torch.no_grad()
def main(texts: tuple[str, ...] = TEXTS) -> dict[str, list[float]]:
    """Print what each text predicts; return for each mask the largest error in the logits of each text."""
    model, tokenizer = Llama.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
    documents = [torch.tensor(tokenizer.encode(text)) for text in texts]
    lengths = [len(document) for document in documents]
    row = torch.cat(documents)[None]  # [1, T]
    segments = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = [model(document[None])[0] for document in documents]
    found = {}
    for name, mask in (("causal & document", masks.causal() & masks.document()), ("causal", masks.causal())):
        packed = model(row, segments=segments, positions=positions, mask=mask)[0].split(lengths)
        found[name] = [float((a - b).abs().max()) for a, b in zip(alone, packed, strict=True)]
        print(f"{name}: one row of {row.shape[1]} tokens")
        for text, logits, off in zip(texts, packed, found[name], strict=True):
            print(f"  off by {off:8.1e}: {text!r} -> {tokenizer.decode([int(logits[-1].argmax())])!r}")
    return found


if __name__ == "__main__":
    main()
