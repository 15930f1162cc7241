"""Generate without end in memory that does not grow: a rolling cache with attention sinks (arXiv:2309.17453).

The cache keeps the last `window` tokens and the first few, the sinks. This generates beyond the window, showing how
many slots are taken and how large the cache is; then it reads a licence, showing the mean loss of its tokens in nats.
Both are done with and without sinks: without them, the loss of the demo model rises by more than a nat once the first
token has left the window. In generated text the difference may not show: with a window of 32 the model falls into
repeating a word, with one of 64 the first hundred tokens after this prompt look fine.

python -m examples.streaming_forever
"""

import os
from pathlib import Path

import torch

from llama_flex import Cache, Engine, Llama, Sampling, Tokenizer

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")
PROMPT = "Once upon a time, there was a lighthouse keeper who"
CHUNK = 128  # the most tokens appended at a time
TEXT = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")


def generate(engine: Engine, cache: Cache, new_tokens: int) -> list[tuple[int, int, int]]:
    """Print the text as it comes; return (tokens so far, slots taken, bytes of keys and values) of each step."""
    sizes = []
    prompt = engine.tokenizer.encode(PROMPT)
    for step in engine.stream([prompt], cache=cache, max_new_tokens=new_tokens, sampling=Sampling(), stop_token_ids=()):
        print(step.text, end="", flush=True)
        taken = int((cache.tokens.index >= 0).sum())
        sizes.append((int(cache.length), taken, sum(kv.k.nbytes + kv.v.nbytes for kv in cache.layers)))
    return sizes


@torch.no_grad()
def losses(model: Llama, cache: Cache, ids: list[int]) -> list[float]:
    """Return the mean loss in each chunk of a text, read from beginning to end."""
    text = torch.tensor([ids])
    logits = torch.cat([model(chunk, cache=cache)[0] for chunk in text[:, :-1].split(CHUNK, dim=1)])
    each = torch.nn.functional.cross_entropy(logits.float(), text[0, 1:], reduction="none")
    return [float(part.mean()) for part in each.split(CHUNK)]


def main(window: int = 32, sinks: int = 4, new_tokens: int = 48, text_tokens: int = 257) -> dict[int, tuple]:
    """Generate and read with and without sinks; return sizes by step and losses by chunk, by number of sinks."""
    engine = Engine(Llama.from_pretrained(folder), Tokenizer.from_pretrained(folder))
    found = {}
    for count in (sinks, 0):
        print(f"Window {window}, {count} sinks: {PROMPT}", end="")
        caches = [engine.model.new_rolling_cache(1, window, count, largest_append=CHUNK) for _ in range(2)]
        sizes = generate(engine, caches[0], new_tokens)
        print()
        for arrived, taken, size in sizes[:: max(1, len(sizes) // 4)]:
            print(f"{arrived:>5} tokens: {taken:>3} slots taken, {size / 2**20:.2f} MiB")
        reading = losses(engine.model, caches[1], engine.tokenizer.encode(TEXT)[:text_tokens])
        print(f"Loss by {CHUNK} tokens of the licence: {', '.join(f'{loss:.2f}' for loss in reading)}\n")
        found[count] = sizes, reading
    return found


if __name__ == "__main__":
    main()
