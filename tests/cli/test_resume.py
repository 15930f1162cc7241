"""--resume: whatever ended a run, the file of its rows is completed, and the rows are those of a run that did not end.

How a file of results is read is tested in test_prompts_file.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from cli_helpers import (
    SAMPLED,
    UNWRITABLE,
    assert_one_error,
    assert_same_rows,
    interrupted,
    parse_rows,
    start,
    unwritable_path,
    write_jsonl,
)
from helpers import ROOT


def test_resuming_what_was_not_begun_is_a_run(cli, questions, uninterrupted, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert cli("--prompts-file", questions, *SAMPLED, "--output", path, "--resume", "--quiet") == (0, "", "")
    assert path.read_text(encoding="utf-8") == uninterrupted


@pytest.mark.exhaustive
@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_from_any_row_on_a_resumed_run_gives_the_same_rows(cli, questions, uninterrupted, tmp_path, kept):
    lines = uninterrupted.split("\n")
    path = tmp_path / "rows.jsonl"
    unfinished = json.dumps(json.loads(lines[kept]) | {"finish_reason": None, "tokens": [1], "text": "x"})
    for last in ("", lines[kept][: len(lines[kept]) // 2], lines[kept][:-1], lines[kept], unfinished + "\n"):
        path.write_text("\n".join([*lines[:kept], last]), encoding="utf-8")
        code, out, err = cli("--prompts-file", questions, *SAMPLED, "--output", path, "--resume", "--quiet")
        assert (code, out) == (0, ""), err
        assert_same_rows(parse_rows(path.read_text(encoding="utf-8")), parse_rows(uninterrupted))


def test_an_interrupted_run_is_resumed(cli, questions, uninterrupted, tmp_path):
    path, codes = tmp_path / "rows.jsonl", []
    with interrupted(lambda step: step % 9 == 0):
        while not codes or codes[-1] == 130:
            codes.append(cli("--prompts-file", questions, *SAMPLED, "--output", path, "--resume")[0])
            assert len(codes) < 9
    assert codes[0] == 130
    assert codes[-1] == 0
    assert_same_rows(parse_rows(path.read_text(encoding="utf-8")), parse_rows(uninterrupted))


def test_an_interrupted_run_marks_what_is_not_finished(cli, questions, tmp_path):
    path = tmp_path / "rows.jsonl"
    with interrupted(lambda step: step == 11):
        assert cli("--prompts-file", questions, *SAMPLED, "--output", path)[0] == 130
    rows = parse_rows(path.read_text(encoding="utf-8"))
    assert [row["finish_reason"] for row in rows] == ["length", "length", None, None]
    assert all(0 < len(row["tokens"]) < 6 for row in rows[2:])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda kind: kind.name)
def test_a_killed_run_is_resumed(cli, folder, tmp_path, kind):
    prompts = write_jsonl(tmp_path / "p.jsonl", [[f"number {i}", f"the {i} sea"] for i in range(12)])
    path, arguments = tmp_path / "rows.jsonl", ("--prompts-file", prompts, "--fuse", "--max-new-tokens", 20, "--json")
    single = ("--batch-size", 1, "--output", path)
    with start("--model", folder, "--device", "cpu", "--compile", "off", *arguments, *single) as process:
        began = time.monotonic()
        while not path.exists() or path.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            assert time.monotonic() - began < 120
            time.sleep(0.005)
        process.send_signal(kind)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    assert b"Traceback" not in err
    assert 2 <= path.read_bytes().count(b'"finish_reason": "length"}\n') < 12
    code, out, _ = cli(*arguments, "--batch-size", 12, "--output", path, "--resume")
    assert (code, out) == (0, "")
    assert_same_rows(parse_rows(path.read_text()), parse_rows(cli(*arguments, "--batch-size", 12)[1]))


def test_with_all_done_no_model_is_loaded(cli, questions, uninterrupted, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(uninterrupted, encoding="utf-8")
    before = path.stat()
    code, out, err = cli("--prompts-file", questions, *SAMPLED, "--output", path, "--resume", model="/no/such/model")
    assert (code, out) == (0, "")
    assert re.fullmatch(rf"--output {re.escape(str(path))} has all results\n", err)
    assert path.read_text(encoding="utf-8") == uninterrupted
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_with_all_done_torch_is_not_imported(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": 0, "prompt": "a", "finish_reason": "stop"}])
    arguments = ["--model", "/no/such/model", "--prompt", "a", "--json", "--output", str(path), "--resume"]
    script = f"import sys; from llama_flex import generate; code = generate.main({arguments}); "
    script += "sys.exit(code or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True).returncode == 0


def test_resuming_keeps_the_mode_of_the_file(cli, questions, uninterrupted, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(uninterrupted[:-30], encoding="utf-8")
    path.chmod(0o644)
    assert cli("--prompts-file", questions, *SAMPLED, "--output", path, "--resume")[0] == 0
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(tmp_path)) == ["asked.jsonl", "rows.jsonl"]
    assert_same_rows(parse_rows(path.read_text(encoding="utf-8")), parse_rows(uninterrupted))


@pytest.mark.parametrize(
    "other",
    [
        '{"id": "z", "prompts": ["x"], "text": "y", "finish_reason": "stop"}\n',
        '{"id": 1, "prompts": ["The slow"], "text": "y", "finish_reason": "stop"}\n',
        '{"id": 1, "prompt": "The quick", "text": "y", "finish_reason": "stop"}\n',
        "### 1: The quick\nsome text\n\n",
        "precious notes",
    ],
    ids=["another id", "other prompts", "not fused", "titled text", "notes"],
)
def test_the_output_of_another_run_is_left_alone(cli, questions, tmp_path, other):
    path = tmp_path / "rows.jsonl"
    path.write_text(other)
    result = cli("--prompts-file", questions, *SAMPLED, "--output", path, "--resume")
    assert_one_error(result, "--output", str(path), "line 1")
    assert path.read_text() == other


def test_resuming_plain_prompts_and_messages(cli, tmp_path):
    messages = [{"role": "user", "content": "hello\u2028there"}]
    prompts = write_jsonl(
        tmp_path / "p.jsonl", ["The quick", {"id": "m", "messages": messages}, {"id": 9, "prompt": "日本"}]
    )
    path, arguments = tmp_path / "rows.jsonl", ("--prompt", "first", "--prompts-file", prompts, "--json", "--quiet")
    arguments = (*arguments, "--max-new-tokens", 3)
    _, whole, _ = cli(*arguments)
    lines = whole.split("\n")
    path.write_text(lines[2] + "\n" + lines[0] + "\n" + lines[3][:-9], encoding="utf-8")
    assert cli(*arguments, "--output", path, "--resume") == (0, "", "")
    assert_same_rows(parse_rows(path.read_text(encoding="utf-8")), parse_rows(whole))


def test_when_all_that_is_left_cannot_be_completed_resuming_says_so_and_is_done(cli, tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", ["a", {"prompt": "long " * 5000}])
    arguments = "--prompts-file", prompts, "--json", "--output", tmp_path / "rows.jsonl", "--max-new-tokens", 1
    for _ in range(2):
        code, out, err = cli(*arguments, "--resume", "--quiet")
        assert (code, out) == (0, "")
        assert re.fullmatch(r"skipped: .*line 2: .* tokens.*\n", err)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


def test_a_row_with_the_id_of_another_is_skipped_so_that_resuming_knows_all(cli, tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"id": 1, "prompt": "a"}, "b", "c"])  # "b" has no id: its number, 1
    path, arguments = tmp_path / "rows.jsonl", ("--prompts-file", prompts, "--json", "--max-new-tokens", 1)
    said = f"skipped: {prompts}, line 2: id 1 is already used by line 1; ids must be unique"
    code, _, err = cli(*arguments, "--output", path, "--quiet")
    assert (code, err.splitlines()) == (0, [said])
    assert sorted(row["id"] for row in parse_rows(path.read_text())) == [1, 2]
    code, _, err = cli(*arguments, "--output", path, "--resume")
    assert (code, err.splitlines()) == (0, [said, f"--output {path} has all results"])
    assert_one_error(cli(*arguments, "--strict"), "line 2", "id 1 is already used by line 1")


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_resuming_to_where_nothing_can_be_written_is_refused(cli, tmp_path, kind):
    path = unwritable_path(tmp_path, kind)
    result = cli("--prompt", "a", "--json", "--output", path, "--resume", model="nowhere")
    assert_one_error(result, "cannot write to --output", str(path))


def test_the_prompts_file_is_no_output_to_resume(cli, questions):
    before = questions.read_bytes()
    assert_one_error(
        cli("--prompts-file", questions, *SAMPLED, "--output", questions, "--resume"), "is the prompts file"
    )
    assert questions.read_bytes() == before
