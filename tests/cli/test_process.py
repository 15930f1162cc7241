"""The command line as a process of its own: standard streams, signals and exit codes."""

import json
import re
import signal
import subprocess
import sys

import pytest
from cli_helpers import assert_one_error, expected_text, interrupted, run_process, start
from helpers import ROOT, few


def test_a_process_of_its_own_prints_the_same_and_nothing_on_stderr_if_quiet(folder, engine):
    arguments = ("--model", folder, "--prompt", "The quick", "--max-new-tokens", 6, "--compile", "off", "--quiet")
    assert run_process(*arguments, "--device", "cpu") == (0, expected_text(engine, "The quick", 6) + "\n", "")


@pytest.mark.exhaustive
def test_a_traceback_never_shows_in_a_process_of_its_own():
    assert_one_error(run_process("--prompt", "x", "--model", "/no/such/folder"), "/no/such/folder")


@pytest.mark.exhaustive
def test_an_interrupt_ends_the_line_with_exit_code_130_and_no_traceback(folder):
    arguments = ("--model", folder, "--device", "cpu", "--compile", "off", "--prompt", "The quick")
    with start(*arguments, "--max-new-tokens", 480) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert len(out) < 2000
    assert b"Traceback" not in err
    assert b"error" not in err


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_loses_nothing_of_what_was_generated(cli, engine, as_json):
    with interrupted(lambda step: step == 4):
        code, out, err = cli("--prompt", "The sea", "--max-new-tokens", 9, *(["--json"] if as_json else []))
    assert code == 130
    assert "error" not in err
    ids = engine.tokenizer.encode("The sea")
    steps = list(engine.stream([ids], max_new_tokens=9))[:3]
    text = "".join(s.text for s in steps)
    if as_json:
        row = json.loads(out)
        assert (row["text"], row["tokens"], row["finish_reason"]) == (text, [s.token for s in steps], None)
    else:
        assert out == text + "\n"


@pytest.mark.parametrize("extra", few([[]], [["--prompt", "and more", "--json", "--batch-size", "1"]]))
def test_a_reader_that_leaves_early_causes_no_traceback(folder, extra):
    arguments = ("--model", folder, "--device", "cpu", "--compile", "off", "--prompt", "The quick", *extra)
    with start(*arguments, "--max-new-tokens", 60) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert b"Traceback" not in err
    assert b"rror" not in err  # Error or error


def test_closed_streams_are_named(folder):
    for redirect, arguments in (("<&-", "--chat"), (">&-", "--prompt One")):
        command = f"{sys.executable} -m llama_flex.generate --model {folder} --compile off {arguments} {redirect}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert re.fullmatch("error: .*closed.*\n", done.stderr)
