"""Compare ways to ask one question in several wordings: `python -m tools.compare_fusion`.

The ways: each wording alone, all in one prompt, ensembles of the wordings, and fused prompts. Every way gets the same
tokens: two examples, the wordings as "Question: ...", and "Answer:". Decoding is greedy, in float32; an answer ends
with its line.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from llama_flex import Completion, Engine, Ensemble, Llama, Prompt, Sampling, Tokenizer, fuse, masks
from llama_flex.engine.fusion import AnyPrompt

PREFIX = (
    "Question: What is the largest planet in the Solar System?\n"
    "Answer: The largest planet in the Solar System is Jupiter.\n"
    "Question: How many wheels does a bicycle have?\nAnswer: A bicycle has 2 wheels.\n"
)
SUFFIX = "\nAnswer:"
FIRST_WEIGHT = 4.0  # the weight of the first wording in the weighted way; the others have 1


@dataclass(frozen=True)
class Question:
    """A question in several wordings, and the answers that count as right."""

    id: str
    prompts: list[str]
    answers: list[str]


def read(path: Path) -> list[Question]:
    """Read the questions of a JSONL file. Raises ValueError, with the line number, for a malformed row."""
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(row["id"], row["prompts"], row["answers"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: needs a JSON object with id, prompts and answers") from None
        lists = (question.prompts, question.answers)
        if not all(isinstance(x, list) and x and all(isinstance(t, str) and t for t in x) for x in lists):
            raise ValueError(f"{path}, line {number}: prompts and answers are lists of texts, none empty")
        if questions and len(question.prompts) != len(questions[0].prompts):
            raise ValueError(f"{path}, line {number}: has not as many prompts as the first question")
        questions.append(question)
    if questions:
        return questions
    raise ValueError(f"{path} has no questions")


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Tell whether the first line has an answer as whole words, in any case; "4" is not in "40", "4.5" or "-4"."""
    line = " ".join(text.split("\n")[0].casefold().split())
    words = "|".join(re.escape(" ".join(answer.casefold().split())) for answer in answers)
    return re.search(rf"(?<![\w-])(?<!\d[.,])({words})(?!\w|[.,]\d)", line) is not None


def requests(question: Question, tokenizer: Tokenizer) -> dict[str, list[AnyPrompt]]:
    """Return the prompts to complete for each way, by its name."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    prefix, suffix, line_end = tokenizer.encode(PREFIX), encode(SUFFIX), encode("\n")
    prompts = [encode(f"Question: {prompt}") for prompt in question.prompts]
    joined = prompts[0] + [id for prompt in prompts[1:] for id in (*line_end, *prompt)]
    alone = [Prompt.plain([*prefix, *prompt, *suffix]) for prompt in prompts]
    weights = [FIRST_WEIGHT] + [1.0] * (len(prompts) - 1)
    fused = partial(fuse, prompts, prefix=prefix, suffix=suffix)
    return {
        "each wording alone": [*alone],
        "all in one causal prompt": [Prompt.plain([*prefix, *joined, *suffix])],
        "ensemble, mean": [Ensemble(alone, "mean")],
        "ensemble, max": [Ensemble(alone, "max")],
        "fused, continue": [fused()],
        "fused, parallel": [fused(positions="parallel")],
        f"fused, continue, first weighs {FIRST_WEIGHT:g}": [fused(weights=weights)],
    }


def compare(engine: Engine, questions: Sequence[Question], max_new_tokens: int) -> list[dict[str, Any]]:
    """Complete all questions in every way, in batches with as many rows as a question has wordings; summarise."""
    assert engine.tokenizer is not None
    asked, size, rows = [requests(q, engine.tokenizer) for q in questions], len(questions[0].prompts), []
    # masks.fused() is causal where there are no segments: with one mask for all, the ways share their graphs.
    options = {"max_new_tokens": max_new_tokens, "sampling": Sampling(), "stop": ["\n"], "mask": masks.fused()}
    for name in asked[0]:
        flat = [request for of_question in asked for request in of_question[name]]
        step = 1 if isinstance(flat[0], Ensemble) else size
        done: list[Completion] = []
        started, compiled = time.perf_counter(), engine.compile_seconds
        for start in range(0, len(flat), step):
            batch = flat[start : start + step]
            filled = batch + batch[-1:] * (step - len(batch))
            done += engine.generate(filled, **options)[: len(batch)]
        seconds = time.perf_counter() - started - (engine.compile_seconds - compiled)
        rows.append({"way": name} | summary(done, questions) | {"seconds": seconds / len(questions)})
    return rows


def summary(done: Sequence[Completion], questions: Sequence[Question]) -> dict[str, Any]:
    """Summarise one way: scores, mean log-probability, texts. Every question has the same number of completions."""
    n, count = len(questions), len(done) // len(questions)
    texts = [[c.text.strip() for c in done[i : i + count]] for i in range(0, len(done), count)]
    right = [[is_right(text, q.answers) for text in of_q] for of_q, q in zip(texts, questions, strict=True)]
    each = [sum(column) for column in zip(*right, strict=True)]  # by wording, where each was asked alone
    mean, logprobs = sum(each) / count, [lp for completion in done for lp in completion.logprobs]
    row: dict[str, Any] = {"right": mean, "of": n, "standard_error": math.sqrt(mean * (1 - mean / n))}
    row["logprob"] = sum(logprobs) / len(logprobs)
    if count > 1:
        row |= {"right_by_wording": each, "differ_in_right": sum(any(r) and not all(r) for r in right)}
        row |= {"differ_in_text": sum(len(set(of_q)) > 1 for of_q in texts)}
    answers = zip(questions, texts, right, strict=True)
    return row | {"answers": [{"id": q.id, "texts": of_q, "right": r} for q, of_q, r in answers]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the summaries in Markdown. Won, lost: questions right here, not by the mean ensemble; and vice versa."""
    head = "| way | right ± standard error | won, lost | log-probability of a token | seconds a question |"
    lines, notes = [head, "|---|---|---|---|---|"], ""
    (mean,) = ([a["right"][0] for a in row["answers"]] for row in rows if row["way"] == "ensemble, mean")
    for row in rows:
        pairs = [(a["right"][0], m) for a, m in zip(row["answers"], mean, strict=True)]
        against, name = f"{pairs.count((True, False))}, {pairs.count((False, True))}", row["way"]
        if "right_by_wording" in row:
            each, against, name = row["right_by_wording"], "", f"{name} (mean)"
            best, worst = (1 + each.index(pick(each)) for pick in (max, min))
            notes = (
                f"Right by wording: {', '.join(map(str, each))}; best is {best}, worst {worst}. Questions right "
                f"in some wordings only: {row['differ_in_right']}; with different texts: {row['differ_in_text']}."
            )
        score = f"{row['right']:.4g} of {row['of']} ± {row['standard_error']:.1f}"
        lines.append(f"| {name} | {score} | {against} | {row['logprob']:.3f} | {row['seconds']:.2f} |")
    return "\n".join([*lines, "", notes])


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong arguments."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise ValueError(message)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a mistake of the user's."""
    p = _Parser(prog="python -m tools.compare_fusion", description="Compare ways to ask a question in many wordings.")
    p.add_argument("--questions", type=Path, default=Path("docs/questions.jsonl"), metavar="FILE")
    p.add_argument(
        "--model", default="weights/SmolLM2-135M-Instruct", help="a Hugging Face folder, or owner/name on the hub"
    )
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    p.add_argument("--new", type=int, default=16, metavar="N", help="the most new tokens per answer (default: 16)")
    p.add_argument("--json", action="store_true", help="print all numbers and texts as JSON instead of the table")
    try:
        args = p.parse_args(argv)
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"--limit must be at least 1, not {args.limit}")
        questions = read(args.questions)[: args.limit]
        model = Llama.from_pretrained(args.model, dtype=torch.float32)
        engine = Engine(model, Tokenizer.from_pretrained(args.model), compile=True)
        rows = compare(engine, questions, args.new)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
