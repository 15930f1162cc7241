"""--output: when the file is opened and written, and what is left of what it held."""

import shutil
import time
from pathlib import Path

import pytest
from cli_helpers import UNWRITABLE, assert_one_error, run_process, unwritable_path


def test_output_goes_to_a_file_in_place_of_what_it_held(cli, tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old " * 1000)
    code, out, _ = cli("--prompt", "The quick", "--max-new-tokens", 4, "--output", path)
    assert (code, out) == (0, "")
    assert path.read_text(encoding="utf-8") == cli("--prompt", "The quick", "--max-new-tokens", 4)[1]


@pytest.mark.parametrize("failure", ["no model", "no tokenizer", "bad sampling", "too long", "too many"])
def test_an_output_file_keeps_what_it_held_if_nothing_can_be_generated(cli, folder, tmp_path, failure):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    arguments, model = ["--prompt", "The quick", "--output", path, "--json"], folder
    if failure == "no model":
        model = tmp_path / "nowhere"
    elif failure == "no tokenizer":
        model = shutil.copytree(folder, tmp_path / "model")
        (model / "tokenizer.json").unlink()
    elif failure == "bad sampling":
        arguments += ["--top-p", "2"]
    elif failure == "too long":
        arguments += ["--prompt", "1 " * 600]
    else:
        arguments += ["--max-new-tokens", "600"]
    assert_one_error(cli(*arguments, model=model))
    assert path.read_text() == "old\n"


def test_a_refused_run_leaves_no_empty_output(cli, tmp_path):
    assert_one_error(cli("--prompt", "One", "--output", tmp_path / "new.txt", model="nowhere"), "nowhere")
    assert not (tmp_path / "new.txt").exists()


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_an_unwritable_output_is_refused_within_a_second(folder, tmp_path, kind):
    path = unwritable_path(tmp_path, kind)
    seconds = []
    for _ in range(3):  # the fastest of three, as other processes may be busy
        began = time.perf_counter()
        result = run_process("--model", folder, "--prompt", "x", "--output", path)
        seconds.append(time.perf_counter() - began)
        assert_one_error(result, "--output", str(path))
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1


def test_the_prompts_file_is_not_written_over(cli, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n")
    assert_one_error(cli("--prompts-file", path, "--output", path), "is the prompts file")
    assert path.read_text() == "one\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named(cli):
    assert_one_error(
        cli("--prompt", "One", "--max-new-tokens", 2, "--output", "/dev/full"), "/dev/full", "No space left"
    )
