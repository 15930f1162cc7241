"""The command that checks a mask or a score function: what it prints, its exit codes, and what it refuses."""

import functools
import subprocess
import sys

import pytest
from helpers import ROOT

from llama_flex.eval import check_mask

SOURCE = """
import torch
from llama_flex import masks
good = masks.causal()
def late(q, kv):
    return kv.index >= 0
def strict(q, kv):
    return kv.index < q.index
number = 3
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command on NAME of a file, and returns (exit code, stdout, stderr)."""
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(check_mask, "_MODULE", "_checked_here")
    monkeypatch.setattr(check_mask, "check_mask", functools.partial(check_mask.check_mask, lengths=(1, 9)))

    def command(name, *options):
        try:
            code = check_mask.main([f"{file}:{name}", *options, "--no-compile"])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    command.file = file
    return command


def test_the_command_says_what_passed(run):
    code, out, err = run("good")
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["passed"] * 2


@pytest.mark.parametrize(
    ("name", "exit_code", "line"),
    [
        ("strict", 1, "error: no-key"),
        pytest.param("late", 0, "note: not-causal", marks=pytest.mark.exhaustive),
    ],
)
def test_the_exit_code_is_1_for_errors_only(run, name, exit_code, line):
    code, out, _ = run(name)
    assert code == exit_code
    assert line in out


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        (SOURCE, "absent", "has no absent"),
        (SOURCE, "number", "int takes none of the known argument lists"),
        ("1 / 0", "good", "ZeroDivisionError: division by zero in line 1 of mine.py, `1 / 0`"),
        ("def f(:", "good", "SyntaxError"),
        ("raise SystemExit", "good", "exits when it is run"),
    ],
)
def test_impossible_checks_are_one_line_and_exit_code_2(run, source, name, words):
    run.file.write_text(source)
    code, out, err = run(name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize("target", ["no_such_file.py:good", "mine.py", ":good", "."])
def test_a_target_that_is_none_is_one_line_and_exit_code_2(target, capsys):
    assert check_mask.main([target]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_options_are_one_line_and_exit_code_2(run):
    for options in (["--heads", "x"], ["--mask-mod"], ["--heads", "0"]):
        code, out, err = run("good", *options)
        assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.exhaustive
def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "llama_flex.eval.check_mask", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nothing is not FILE.py:NAME\n")
