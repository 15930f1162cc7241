"""Steer a model by a direction in the residual stream, added while it writes (arXiv:2308.10248).

The direction is the mean of one layer's stream over texts about the sea, minus the mean over texts about a town.

python -m examples.steering
"""

import os

import torch

from llama_flex import Capture, Engine, Llama, Sampling, Tokenizer, edits

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")
SEA = ("The ocean waves rolled onto the sandy beach.", "A ship sailed across the deep blue sea.", "Fish swim in reefs.")
TOWN = ("The clerk opened the office door.", "A man bought bread at the bakery.", "Cars drive along the street.")
PROMPT = "My favourite thing in the world is"


@torch.no_grad()
def main(layer: int = 15, strengths: tuple[float, ...] = (0.0, 1.0, 1.5), new_tokens: int = 24) -> dict[float, str]:
    """Print and return the text at each strength."""
    model, tokenizer = Llama.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
    prompt, means = tokenizer.encode(PROMPT), []
    for texts in (SEA, TOWN):
        capture = Capture(
            "resid_post", layers=layer, where=lambda t: t.index > 0
        )  # without the first token, an outlier
        ids = [tokenizer.encode(text) for text in texts]
        Engine(model).generate(ids, max_new_tokens=1, capture=capture)
        means.append(capture["resid_post", layer].sum((0, 1)) / capture.count.sum())  # [E]
    engine, found = Engine(model, tokenizer), {}
    for strength in strengths:
        edit = edits.add("resid_post", strength * (means[0] - means[1]), layers=layer)
        sampling = Sampling(repetition_penalty=1.2)
        (done,) = engine.generate([prompt], max_new_tokens=new_tokens, sampling=sampling, edit=edit)
        found[strength] = done.text
        print(f"{strength:g} times: {PROMPT}{done.text}")
    return found


if __name__ == "__main__":
    main()
