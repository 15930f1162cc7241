"""What the tests of the command line share besides fixtures: processes of their own, expected texts, files of rows."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tokenizers
from helpers import ROOT

from llama_flex import Engine, Llama

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLED = ("--fuse", "--max-new-tokens", 6, "--temperature", 1.0, "--seed", 21, "--batch-size", 2, "--json")

# ---- the command line in a process of its own


def start(*arguments, **environment: str) -> subprocess.Popen:
    """Start the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_flex.generate", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_process(*arguments, **environment: str) -> tuple[int, str, str]:
    """Run the command line as a process of its own; return its exit code, stdout and stderr."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


# ---- what it must print


def expected_text(engine: Engine, prompt: str, new: int, *, special: bool = True, **options) -> str:
    """Return the text of `new` tokens that the engine generates for a prompt."""
    ids = engine.tokenizer.encode(prompt, add_special_tokens=special)
    return engine.generate([ids], max_new_tokens=new, **options)[0].text


def conversation(engine: Engine, messages: list[str], new: int, system: str | None = None) -> list[str]:
    """Return the replies to messages, each generated afresh from the whole conversation so far."""
    history = [] if system is None else [{"role": "system", "content": system}]
    replies = []
    for message in messages:
        history.append({"role": "user", "content": message})
        replies.append(expected_text(engine, engine.tokenizer.apply_chat_template(history), new, special=False))
        history.append({"role": "assistant", "content": replies[-1]})
    return replies


def assert_one_error(result: tuple[int, str, str], *fragments: str) -> None:
    """Check that a run was refused in one line on stderr that holds these fragments, and printed nothing else."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err), err
    for fragment in fragments:
        assert fragment in err


def assert_same_rows(rows: list[dict], expected: list[dict]) -> None:
    """Check that the rows are those expected, each once, in any order. Log-probabilities may differ in their last
    digits, as the rows may have been batched with others."""
    ids = [json.dumps(row["id"]) for row in rows]
    assert sorted(ids) == sorted(json.dumps(row["id"]) for row in expected)
    for row in expected:
        found = rows[ids.index(json.dumps(row["id"]))]
        assert found["logprobs"] == pytest.approx(row["logprobs"], abs=1e-4)
        assert {k: v for k, v in found.items() if k != "logprobs"} == {k: v for k, v in row.items() if k != "logprobs"}


# ---- what it is given


def prompt_arguments(prompts: list[str]) -> list[str]:
    """Return a --prompt argument for each prompt."""
    return [argument for prompt in prompts for argument in ("--prompt", prompt)]


def write_jsonl(path: Path, rows: list) -> Path:
    """Write a line of JSON for each row; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parse_rows(text: str) -> list[dict]:
    """Return the rows of lines of JSON, which may hold characters that splitlines() would split at."""
    return [json.loads(line) for line in text.split("\n") if line]


def unwritable_path(folder: Path, kind: str) -> Path:
    """Return a path in `folder` where no file can be written, of a kind of UNWRITABLE."""
    if kind == "missing folder":
        return folder / "missing" / "out.txt"
    if kind == "folder":
        return folder
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (folder / "locked").mkdir(mode=0o500)
    return folder / "locked" / "out.txt"


UNWRITABLE = ["missing folder", "folder", "no permission"]


def copy_with_bos(folder: Path, copy: Path) -> tokenizers.Tokenizer:
    """Copy a model, with a tokenizer that puts BOS before a text; return that tokenizer."""
    shutil.copytree(folder, copy)
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    begins = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.post_processor = begins
    tokenizer.save(str(copy / "tokenizer.json"))
    return tokenizer


@contextmanager
def interrupted(is_due: Callable[[int], bool]) -> Iterator[None]:
    """Interrupt the model, as Ctrl-C does, before each of its steps whose number, from 1, is due."""
    step, numbers = Llama.step, itertools.count(1)

    def interrupting(self, *arguments):
        if is_due(next(numbers)):
            raise KeyboardInterrupt
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Llama, "step", interrupting)
        yield
