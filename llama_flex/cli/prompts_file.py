"""Prompts from arguments and files, and rows of results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..checkpoint import files

if TYPE_CHECKING:  # torch is imported only after the arguments are checked
    from ..engine.output import Completion

Messages: TypeAlias = list[dict[str, Any]]


class UsageError(ValueError):
    """An error in the arguments or their files, which the user can fix."""


@dataclass(frozen=True)
class Question:
    """Several prompts for one answer, the text before and after them, and their weights (None: all the same)."""

    prompts: list[str]
    prefix: str = ""
    suffix: str = ""
    weights: list[float] | None = None


@dataclass(frozen=True)
class Job:
    """One prompt to complete: a text, a conversation for the chat template, or a question; its number among all, and
    where it was given."""

    id: Any
    prompt: str | Messages | Question
    number: int
    where: str = field(default="--prompt", compare=False)

    @property
    def name(self) -> str:
        """The name that errors use."""
        return f"prompt {self.id}" if self.where == "--prompt" else self.where

    @property
    def title(self) -> str:
        """One short line that identifies the job."""
        if isinstance(self.prompt, Question):
            text: object = self.prompt.prompts[0]
        else:
            text = self.prompt if isinstance(self.prompt, str) else self.prompt[-1].get("content", "")
        return f"{self.id}: {' '.join(str(text).split())[:70]}"

    @property
    def given(self) -> dict[str, Any]:
        """The prompt as a row of results repeats it."""
        return {"prompts": self.prompt.prompts} if isinstance(self.prompt, Question) else {"prompt": self.prompt}


def read(path: Path, first: int, default: Question | None, bad_row: Callable[[UsageError], None]) -> Iterator[Job]:
    """Yield the jobs of a prompts file, numbered from `first`; a line is a JSON object in a .jsonl file, else a text.

    A job's id is that of its row, else its number. default: for fused prompts, the prefix, suffix and weights of a row
    that gives none. bad_row: called for each line that is malformed or repeats an id; the other lines follow. Raises
    UsageError for a file that cannot be read.
    """
    taken = {_key(number): "a --prompt" for number in range(first)}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut at U+2028, legal in JSON
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --prompts-file {path}: {error}") from None
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        where = f"{path}, line {number - first + 1}"
        try:
            if path.suffix == ".jsonl":
                id, prompt = _row(line, number, default, where)
            else:
                id, prompt = number, line if default is None else question({"prompts": [line]}, default, where)
            if (key := _key(id)) in taken:
                raise UsageError(f"{where}: id {key} is already used by {taken[key]}; ids must be unique")
        except UsageError as error:
            bad_row(error)
        else:
            taken[key] = f"line {number - first + 1}"
            yield Job(id, prompt, number, where)


def _row(line: str, number: int, default: Question | None, where: str) -> tuple[Any, str | Messages | Question]:
    """Return the id and the prompt of a line of JSON. Raises UsageError, saying where."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")  # refuses lone surrogates too
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    row = row if isinstance(row, dict) else {"prompts" if isinstance(row, list) else "prompt": row}
    prompt = _prompt(row, default, where)
    if not prompt:
        raise UsageError(f"{where}: the prompt is empty; give it some text, such as the model's first token")
    return number if row.get("id") is None else row["id"], prompt


def _prompt(row: dict[str, Any], default: Question | None, where: str) -> str | Messages | Question:
    if "prompts" in row and default is None:
        raise UsageError(f"{where}: several 'prompts' for one answer need --fuse")
    prompt: Any = row.get("prompt") if row.get("messages") is None else row["messages"]
    if default is not None:
        return question({"prompts": [prompt]} | row, default, where)
    chat = isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt)
    if not isinstance(prompt, str) and not chat:
        raise UsageError(f"{where}: needs a text 'prompt', or 'messages' that each have a role")
    return prompt


def question(row: dict[str, Any], default: Question, where: str) -> Question:
    """Return the question of a row, with defaults for all but the prompts. Raises UsageError, saying where."""
    prompts = row["prompts"]
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p for p in prompts):
        raise UsageError(f"{where}: --fuse needs 'prompts', a list of non-empty texts")
    prefix, suffix = (row.get(name, getattr(default, name)) for name in ("prefix", "suffix"))
    if not isinstance(prefix, str) or not isinstance(suffix, str):
        raise UsageError(f"{where}: 'prefix' and 'suffix' must be text")
    weights: Any = row.get("weights", default.weights)
    if weights is not None:
        numbers = isinstance(weights, list) and all(isinstance(w, int | float) and 0 < w < math.inf for w in weights)
        if not numbers or len(weights) != len(prompts):
            raise UsageError(f"{where}: {len(prompts)} prompts need as many positive weights, not {weights}")
    return Question(prompts, prefix, suffix, weights)


def result(job: Job, completion: Completion, as_json: bool) -> str:
    """Format a completed job: a titled text, or one line of JSON."""
    if not as_json:
        return f"### {job.title}\n{completion.text}\n\n"
    row = {"id": job.id, **job.given, "text": completion.text, "tokens": completion.tokens}
    row |= {"logprobs": [lp if math.isfinite(lp) else None for lp in completion.logprobs]}
    if completion.top_logprobs:
        row["top_logprobs"] = [
            [[id, lp if math.isfinite(lp) else None] for id, lp in most] for most in completion.top_logprobs
        ]
    return json.dumps(row | {"finish_reason": completion.finish_reason}, ensure_ascii=False) + "\n"


def resume(path: Path, jobs: list[Job]) -> list[Job]:
    """Return the jobs that have no finished row in a file of JSON rows, and remove unfinished rows from the file.

    A row that ended in an error is not finished: another dtype may compute it. Raises UsageError for a file that holds
    anything but rows of these jobs.
    """
    pending = {_key(job.id): job for job in jobs}
    assert len(pending) == len(jobs)
    if not path.is_file():  # a pipe or a terminal is not read either: it would block
        return jobs
    try:
        with path.open("rb") as file:  # bytes: an interrupt may have come within a character
            lines = list(file)
    except OSError as error:
        raise UsageError(f"cannot read --output {path}: {error.strerror}") from None
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            cut = number == len(lines) and not line.endswith(b"\n")
            if cut and any(_begins(line, job) for job in pending.values()):
                continue  # an interrupt came while it was written
            raise UsageError(f"--output {path}, line {number}: not a row of results; choose another file") from None
        job = pending.get(_key(row.get("id"))) if isinstance(row, dict) else None
        if job is None or any(row.get(name) != value for name, value in job.given.items()):
            raise UsageError(f"--output {path}, line {number}: not a result of these prompts; choose another file")
        if row.get("finish_reason") not in (None, "error"):
            kept.append(line.rstrip(b"\r\n") + b"\n")
            del pending[_key(job.id)]
    if kept != lines:
        try:
            files.replace(path.resolve(), b"".join(kept))  # a link stays a link
        except OSError as error:
            raise UsageError(f"cannot write to --output {path}: {error.strerror}") from None
    return list(pending.values())


def _key(id: Any) -> str:
    return json.dumps(id, sort_keys=True)


def _begins(line: bytes, job: Job) -> bool:
    """Return whether a line is the beginning of a job's row of results."""
    start = json.dumps({"id": job.id, **job.given}, ensure_ascii=False)[:-1].encode()
    return line.startswith(start[: len(line)])
