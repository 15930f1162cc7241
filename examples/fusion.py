"""Ask one question in three wordings: each alone, fused into one sequence, and as an ensemble; see docs/fusion.md.

The wordings were chosen because the demo model answers them differently. One question does not show that a way is
better: over the forty questions of docs/fusion.md, no way was reliably ahead.

python -m examples.fusion
"""

import os

from llama_flex import Engine, Ensemble, Llama, Sampling, Tokenizer, fuse

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")
WORDINGS = (
    "What is the capital of Egypt?",
    "Which city is the seat of the Egyptian government?",
    "Name the city on the Nile that serves as Egypt's capital.",
)


def main(wordings: tuple[str, ...] = WORDINGS, new_tokens: int = 12) -> dict[str, str]:
    """Print and return the answer of each way."""
    tokenizer = Tokenizer.from_pretrained(folder)
    engine = Engine(Llama.from_pretrained(folder), tokenizer)
    prefix = tokenizer.encode("Question: What is the largest planet?\nAnswer: The largest planet is Jupiter.\n")
    prompts = [tokenizer.encode(f"Question: {wording}", add_special_tokens=False) for wording in wordings]
    suffix = tokenizer.encode("\nAnswer:", add_special_tokens=False)
    weights = [4] + [1] * (len(prompts) - 1)
    alone = [[*prefix, *prompt, *suffix] for prompt in prompts]
    ways = {
        **{f"alone: {wording}": ids for wording, ids in zip(wordings, alone, strict=True)},
        "fused, one after another": fuse(prompts, prefix=prefix, suffix=suffix),
        "fused, side by side": fuse(prompts, prefix=prefix, suffix=suffix, positions="parallel"),
        "fused, the first weighs 4": fuse(prompts, prefix=prefix, suffix=suffix, weights=weights),
        "ensemble, mean": Ensemble(alone, "mean"),
        "ensemble, max": Ensemble(alone, "max"),
    }
    # All in one batch, in which an ensemble takes a row per wording, and every other way one row.
    completions = engine.generate(list(ways.values()), max_new_tokens=new_tokens, stop=["\n"], sampling=Sampling())
    answers = {way: done.text.strip() for way, done in zip(ways, completions, strict=True)}
    for way, answer in answers.items():
        print(f"{way:<65} {answer}")
    return answers


if __name__ == "__main__":
    main()
