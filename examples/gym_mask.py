"""Use a mask of attention-gym (pip install attn-gym): check it, run a full forward with it, and generate with a cache.

A `mask_mod(b, h, q_idx, kv_idx)` gets the rows and columns of one attention call. `Mask.from_mask_mod` gives it the
order in which tokens arrived instead, so that it also holds where a cache keeps them in other slots. The one here is
Longformer's: a window to both sides, and global tokens that see all and that all see. It looks ahead, which
`check_mask` notes, so it is combined with `masks.causal()`.

python -m examples.gym_mask
"""

import os

import torch
from attn_gym.masks import generate_global_sliding_window

from llama_flex import Engine, Llama, Mask, Sampling, Tokenizer, check_mask, masks

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")


@torch.no_grad()
def main(window: int = 16, sinks: int = 4, new_tokens: int = 24) -> tuple[list[int], list[int]]:
    """Return the tokens generated with a cache, and what a full forward with the same mask predicts for them."""
    is_global = torch.arange(8192) < sinks  # moved to the model's device
    theirs = Mask.from_mask_mod(generate_global_sliding_window(window, is_global))
    mask = theirs & masks.causal()
    for each in (theirs, mask):
        print(f"check_mask({each}): {[str(finding) for finding in check_mask(each, compile=False)]}")
    # float32, because rounding depends on the shapes of products: in bfloat16 it may decide between two tokens.
    model, tokenizer = Llama.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
    prompt = tokenizer.encode("Here is a list of fruits that you can buy at the market in summer, and their colours:")
    options = {"max_new_tokens": new_tokens, "sampling": Sampling(), "stop_token_ids": ()}
    done = Engine(model, tokenizer).generate([prompt], mask=mask, **options)[0]
    print(f"{len(prompt)} tokens and {len(done.tokens)} new ones, through a cache:{done.text}")
    logits = model(torch.tensor([prompt + done.tokens]), mask=mask)[0]
    predicted = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    same = sum(a == b for a, b in zip(done.tokens, predicted, strict=True))
    print(f"{same} of {new_tokens} tokens are those of a full forward with this mask")
    return done.tokens, predicted


if __name__ == "__main__":
    main()
