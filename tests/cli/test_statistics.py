"""What a run says on stderr besides errors: statistics, explanations, and a progress bar on a terminal."""

import os
import pty
import re
import sys
import termios
from collections.abc import Callable

import pytest
from cli_helpers import SAMPLED, write_jsonl


def test_statistics_of_many_prompts_count_all_tokens(cli, engine, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", prompts := ["The quick", "the sea is blue", "a"])
    code, _, err = cli("--prompts-file", path, "--json", "--max-new-tokens", 5)
    count = sum(len(engine.tokenizer.encode(prompt)) for prompt in prompts)
    assert code == 0
    assert f"; {count} tokens in, 15 out, " in err


def test_quiet_leaves_stderr_empty(cli):
    code, _, err = cli("--prompt", "The quick", "--max-new-tokens", 2, "--quiet")
    assert (code, err) == (0, "")


def test_explain_says_what_ran_even_if_quiet(cli):
    code, out, err = cli("--prompt", "The quick", "--max-new-tokens", 3, "--quiet", "--explain")
    assert code == 0
    assert out
    assert re.match("float32 on cpu; .*\nnot compiled: .*\n", err)
    assert re.search(r"\n2 layers, mask causal\(\)\n  the last query visits 1 of \d+ blocks of 128 slots", err)
    assert re.search(r"GB/s reached of .* that memory gives to a reduction: \d+%\n$", err)


# ---- the progress bar


def terminal_output(run: Callable[[], object], *streams: str) -> str:
    """Return what a function writes to a terminal that stands for stderr, and for other streams that are named."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    with pytest.MonkeyPatch.context() as patch, os.fdopen(follower, "w") as terminal:
        for stream in ("stderr", *streams):
            patch.setattr(sys, stream, terminal)
        run()
        terminal.write("<end>")
        terminal.flush()
        content = b""
        while not content.endswith(b"<end>"):  # a terminal passes on what is written in parts, and late
            content += os.read(leader, 4096)
    os.close(leader)
    return content.decode().removesuffix("<end>")


def test_a_terminal_shows_progress_for_a_prompts_file(cli, questions):
    arguments = ("--prompts-file", questions, *SAMPLED)
    shown = terminal_output(lambda: cli(*arguments))
    assert re.search(r"100%.*5/5", shown)
    assert "0/5" in shown
    assert re.search(r"\nload [\d.]+ s; .*\n$", shown.replace("\r\n", "\n"))  # on a line of its own
    assert terminal_output(lambda: cli(*arguments, "--quiet")) == ""
    alone = terminal_output(lambda: cli("--prompt", "a", "--prompt", "b", "--max-new-tokens", 2))
    assert alone.startswith("load ")
    assert "%" not in alone


def test_progress_and_texts_on_one_terminal_do_not_share_lines(cli, questions):
    shown = terminal_output(lambda: cli("--prompts-file", questions, *SAMPLED[:-1]), "stdout")
    assert re.search(r"100%.*5/5", shown)
    assert len(re.findall(r"[\r\n]### ", shown)) == 5


def test_progress_counts_only_what_is_left(cli, questions, uninterrupted, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(uninterrupted.split("\n")[:2]), encoding="utf-8")
    shown = terminal_output(lambda: cli("--prompts-file", questions, *SAMPLED, "--output", path, "--resume"))
    assert re.search(r"100%.*3/3", shown)


def test_without_a_terminal_there_is_no_progress(cli, questions):
    _, _, err = cli("--prompts-file", questions, *SAMPLED)
    assert re.fullmatch(r"load .*\n", err)


def test_a_closed_stderr_changes_nothing_on_stdout(cli, questions, uninterrupted, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli("--prompts-file", questions, *SAMPLED) == (0, uninterrupted, "")
    monkeypatch.setattr(sys, "stderr", None)
    assert cli("--frobnicate") == (2, "", "")
