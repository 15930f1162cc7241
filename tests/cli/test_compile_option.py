"""--compile: compiled text is the same text, and where torch cannot compile, auto continues uncompiled."""

import itertools
import re

import pytest
import torch
from cli_helpers import assert_one_error, conversation, expected_text, parse_rows, run_process
from helpers import few
from torch._inductor.exc import InductorError
from torch.torch_version import TorchVersion

from llama_flex import Sampling
from llama_flex.cli.session import COMPILE_FROM
from llama_flex.engine import model_runner
from llama_flex.engine.graphs import Graphs

# A compiler for a Python whose headers are not installed.
FAKE_COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "g++ (none) 12.2.0"; exit 0;; esac
echo "x.cpp:1:10: fatal error: Python.h: No such file or directory" >&2; exit 1
"""


def test_compiled_gives_the_same_text(cli):
    arguments = ("--prompt", "The quick brown", "--max-new-tokens", 8)
    _, eager, _ = cli(*arguments)
    code, compiled, err = cli(*arguments, "--compile", "on")
    assert (code, compiled) == (0, eager)
    assert re.search(r"load [\d.]+ s; first token [\d.]+ s, [\d.]+ s of it compiling; compiling [\d.]+ s in all; ", err)


def test_auto_does_not_compile_where_that_would_be_refused(cli, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    code, _, err = cli("--prompt", "The quick", "--compile", "auto", "--max-new-tokens", COMPILE_FROM)
    assert (code, "compile" in err) == (0, False)
    assert_one_error(cli("--prompt", "The quick", "--compile", "on"), "torch 2.13", "--compile off")
    code, _, err = cli("--chat", "--compile", "auto", "--max-new-tokens", 3, stdin="hello\n")
    assert (code, "compile" in err) == (0, False)


class NoCompiler(Exception):
    """The error of a compiler that fails."""


@pytest.fixture
def no_compiler(monkeypatch):
    """A function that makes `auto` compile, as on a GPU, and compiling fail, quickly, once so many parts are compiled,
    as a damaged file does."""

    def after(count: int = 0) -> None:
        monkeypatch.setitem(model_runner.COMPILES_BY_ITSELF, "cpu", True)
        monkeypatch.setattr(model_runner, "UNCOMPILED_PROMPTS", 0)
        compiled = Graphs._compiled

        def failing(self, function):
            if len(self.parts) >= count:

                def part(*_):
                    raise InductorError(NoCompiler("a file is damaged"), None)

                return part
            return compiled(self, function)

        monkeypatch.setattr(Graphs, "_compiled", failing)

    return after


@pytest.mark.parametrize("parts", few([3], [0]))
def test_a_compiler_that_fails_during_a_text_changes_nothing_in_it(cli, engine, no_compiler, parts):
    no_compiler(parts)
    code, out, err = cli("--prompt", "The quick", "--max-new-tokens", 40, "--compile", "auto", "--quiet")
    assert (code, out) == (0, expected_text(engine, "The quick", 40) + "\n")
    assert err.count("\n") == 1
    assert "continuing uncompiled, which is slower: torch cannot compile: a file is damaged; a mask or score " in err


@pytest.mark.exhaustive
def test_random_numbers_are_drawn_once(cli, engine, no_compiler, monkeypatch):
    """A text that is begun again, uncompiled, keeps the seed that was drawn, and so the tokens given already."""
    seeds = itertools.count(1)
    monkeypatch.setattr("secrets.randbits", lambda _: next(seeds))
    no_compiler(3)
    drawn = ["--max-new-tokens", 40, "--temperature", 1, "--compile", "auto", "--quiet"]
    _, out, err = cli("--prompt", "The quick", *drawn)
    assert "continuing uncompiled" in err
    assert out == expected_text(engine, "The quick", 40, sampling=Sampling(temperature=1, seed=1)) + "\n"


def test_many_prompts_and_a_chat_go_on_uncompiled_too(cli, engine, no_compiler, tmp_path):
    no_compiler()
    (tmp_path / "p.txt").write_text("The quick\nhello\n")
    arguments = ["--prompts-file", tmp_path / "p.txt", "--json", "--max-new-tokens", 40]
    code, out, err = cli(*arguments, "--compile", "auto", "--quiet")
    assert code == 0
    assert err.count("continuing uncompiled") == 1
    texts = {row["prompt"]: row["text"] for row in parse_rows(out)}
    assert texts == {prompt: expected_text(engine, prompt, 40) for prompt in ("The quick", "hello")}
    code, out, err = cli("--chat", "--max-new-tokens", 5, "--compile", "auto", stdin="hello\nand you?\n")
    assert (code, out) == (0, "".join(reply + "\n" for reply in conversation(engine, ["hello", "and you?"], 5)))
    assert err.count("continuing uncompiled") == 1
    assert_one_error(
        cli("--prompt", "The quick", "--compile", "on", "--quiet"), "torch cannot compile", "--compile off"
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nope"}, "there is no C++ compiler; install g++, or set CXX to one"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "it does not recognise this processor; if ATEN_CPU_CAPABILITY is set"),
        ({"CXX": "fake"}, "Python's headers are missing; install them (python3-dev)"),
    ],
    ids=["no compiler", "no instructions", "no headers"],
)
@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch before 2.13 does not compile for a CPU")
def test_a_compiler_failure_stops_on_but_not_auto(folder, engine, tmp_path, environment, reason):
    (tmp_path / "fake").write_text(FAKE_COMPILER)
    (tmp_path / "fake").chmod(0o755)
    if environment.get("CXX") == "fake":
        environment = {"CXX": str(tmp_path / "fake")}
    arguments = ["--model", folder, "--prompt", "The quick", "--device", "cpu", "--max-new-tokens", 40, "--quiet"]

    def run(compile: str) -> tuple[int, str, str]:
        cache = str(tmp_path / "cache")
        return run_process(*arguments, "--compile", compile, TORCHINDUCTOR_CACHE_DIR=cache, **environment)

    # Our own kernels need the compiler too.
    lost = r"warning: .*; products of few rows and dense attention use torch's, .*\n" if "CXX" in environment else ""
    code, out, err = run("auto")
    assert (code, out) == (0, expected_text(engine, "The quick", 40) + "\n")
    assert re.fullmatch(lost, err)
    code, out, err = run("on")
    assert (code, out) == (2, "")
    assert re.fullmatch(lost + r"error: torch cannot compile: .*--compile off\n", err)
    assert reason in err


@pytest.mark.exhaustive
def test_a_folder_for_compiled_code_that_cannot_be_written_is_replaced(folder, tmp_path):
    """torch does not even start without such a folder."""
    (tmp_path / "file").write_text("")
    arguments = ["--model", folder, "--prompt", "a", "--quiet", "--device", "cpu", "--compile", "off"]
    cache = str(tmp_path / "file" / "cache")
    code, _, err = run_process(*arguments, "--max-new-tokens", 2, TORCHINDUCTOR_CACHE_DIR=cache)
    assert code == 0
    assert re.fullmatch(r"warning: .*/file/cache, where torch keeps compiled code, cannot be written to .*\n", err)
