"""A file of prompts, many at a time: a callback writes each result as soon as its text is done.

Reads JSON lines such as {"id": "sky", "prompt": "The sky is", "max_new_tokens": 8} and writes {"id", "prompt", "text",
"finish_reason"} in the order of completion. `python -m llama_flex.generate --prompts-file in.jsonl --json` also reports
bad rows and resumes after an interrupt; but its --max-new-tokens is the same for all rows.

python -m examples.batch_file [IN.jsonl OUT.jsonl]
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

from llama_flex import Completion, Engine, Llama, Tokenizer

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")
ROWS = (
    '{"id": "story", "prompt": "Once upon a time", "max_new_tokens": 24}',
    '{"id": "france", "prompt": "The capital of France is", "max_new_tokens": 4}',
    '{"id": "water", "prompt": "Water boils at", "max_new_tokens": 12}',
    '{"id": "count", "prompt": "One, two, three,", "max_new_tokens": 8}',
    '{"id": "sky", "prompt": "The sky is", "max_new_tokens": 6}',
)


def writer(row: dict, output: TextIO) -> Callable:
    """Return a callback that collects the steps of a row, and writes the result after the last."""
    completion = Completion()

    def came(step) -> None:
        completion.add(step)
        if step.finish_reason is not None:
            done = {"id": row["id"], "prompt": row["prompt"], "text": completion.text}
            row_of_results = json.dumps(done | {"finish_reason": step.finish_reason}, ensure_ascii=False)
            print(row_of_results, file=output, flush=True)

    return came


def main(lines: Iterable[str] = ROWS, output: TextIO = sys.stdout, batch_size: int = 3) -> None:
    """Complete the prompts of all lines, `batch_size` at a time."""
    tokenizer = Tokenizer.from_pretrained(folder)
    engine = Engine(Llama.from_pretrained(folder), tokenizer, max_batch_size=batch_size, max_length=512)
    requests = []
    for row in map(json.loads, filter(str.strip, lines)):
        ids, limit = tokenizer.encode(row["prompt"]), row.get("max_new_tokens", 16)
        requests.append(engine.submit(ids, max_new_tokens=limit, callback=writer(row, output)))
    engine.run()
    for request in requests:
        if request.error is not None:  # an error in a callback ends only its own request
            raise request.error


if __name__ == "__main__":
    if len(sys.argv) == 3:
        with open(sys.argv[1], encoding="utf-8") as given, open(sys.argv[2], "w", encoding="utf-8") as results:
            main(given, results)
    else:
        main()
