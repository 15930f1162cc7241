"""Prompts files and files of results: what is read, what is refused, and what resuming leaves of an output file."""

import errno
import json
import math
import os
import re
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from llama_flex.cli import prompts_file
from llama_flex.cli.prompts_file import Job, Question, UsageError
from llama_flex.engine.output import Completion

DONE = Completion([5, 6], [-0.5, -1.5], "some text", "length")
CUT = replace(DONE, finish_reason=None)
FUSED = Question([], "before ", " after")
SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\r\nj\rk\x00l"


def write_lines(path: Path, lines: list[str]) -> Path:
    """Write lines of text with newlines alone between them; return the path."""
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    return path


def read(path: Path, default: Question | None = None, first: int = 0) -> list[Job]:
    """Return the jobs of a prompts file; raise the error of the first bad row."""

    def refuse(error: UsageError) -> None:
        raise error

    return list(prompts_file.read(path, first, default, refuse))


def write_results(path: Path, *rows: tuple[Job, Completion]) -> bytes:
    """Write rows of results; return the bytes written."""
    content = "".join(prompts_file.result(job, completion, True) for job, completion in rows).encode()
    path.write_bytes(content)
    return content


@pytest.fixture
def output(tmp_path) -> Path:
    """The path of a file of results that is not there yet, in a folder of its own."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "rows.jsonl"


def three() -> list[Job]:
    """Return three jobs, with the ids a, b and c."""
    return [Job(id, f"prompt {id}", number) for number, id in enumerate("abc")]


# ---- prompts files


@pytest.mark.parametrize(
    ("first", "rows", "bad"),
    [
        (0, [{"id": "a"}, {"id": "b"}, {"id": "a"}], {3: '"a" is already used by line 1'}),
        (0, [{}, {"id": 2}, {}, {"id": 0}], {3: "2 is already used by line 2", 4: "0 is already used by line 1"}),
        (2, [{"id": 1}, {}, {"id": "1"}, {"id": True}], {1: "1 is already used by a --prompt"}),
        (
            0,
            [{"id": {"a": 1, "b": [2]}}, {"id": {"b": [2], "a": 1}}],
            {2: '{"a": 1, "b": [2]} is already used by line 1'},
        ),
        (0, [{"id": None}, {"id": None}], {}),
    ],
)
def test_a_row_with_the_id_of_another_is_a_bad_one(tmp_path, first, rows, bad):
    path = write_lines(tmp_path / "p.jsonl", [json.dumps({"prompt": f"p{n}"} | row) for n, row in enumerate(rows)])
    errors = []
    found = list(prompts_file.read(path, first, None, errors.append))
    said = [f"{path}, line {n}: id {what}; ids must be unique" for n, what in bad.items()]
    assert list(map(str, errors)) == said
    assert [job.prompt for job in found] == [f"p{n}" for n in range(len(rows)) if n + 1 not in bad]
    ids = [job.id for job in found]
    assert ids == [first + n if row.get("id") is None else row["id"] for n, row in enumerate(rows) if n + 1 not in bad]


def test_messages_that_are_null_are_as_if_they_were_not_there(tmp_path):
    (job,) = read(write_lines(tmp_path / "p.jsonl", ['{"messages": null, "prompt": "x"}']))
    assert job.prompt == "x"


def test_rows_of_several_prompts_leave_to_the_default_what_they_do_not_say(tmp_path):
    rows = [
        {"id": "q", "prompts": ["one", "two"]},
        {"prompts": ["one"], "prefix": "", "suffix": "!", "weights": [0.5]},
        {"prompt": "alone"},
        "bare",
        ["list", "of three", "texts"],
        {"prompt": "not this", "prompts": ["but these"], "weights": None},
    ]
    path = write_lines(tmp_path / "p.jsonl", ["", *map(json.dumps, rows)])
    assert read(path, FUSED, first=4) == [
        Job("q", Question(["one", "two"], "before ", " after"), 5),
        Job(6, Question(["one"], "", "!", [0.5]), 6),
        Job(7, Question(["alone"], "before ", " after"), 7),
        Job(8, Question(["bare"], "before ", " after"), 8),
        Job(9, Question(["list", "of three", "texts"], "before ", " after"), 9),
        Job(10, Question(["but these"], "before ", " after"), 10),
    ]


def test_weights_of_a_row_go_before_those_of_the_default(tmp_path):
    rows = [{"prompts": ["a", "b"]}, {"prompts": ["a", "b"], "weights": [3, 0.25]}]
    path = write_lines(tmp_path / "p.jsonl", list(map(json.dumps, rows)))
    default = Question([], weights=[1.0, 2.0])
    assert [job.prompt.weights for job in read(path, default)] == [[1.0, 2.0], [3, 0.25]]


def test_each_line_of_a_text_file_is_a_question_of_one_prompt(tmp_path):
    path = write_lines(tmp_path / "p.txt", ["one", "", '["no", "json"]', "last"])
    prompts = [job.prompt for job in read(path, FUSED)]
    assert prompts == [Question([text], "before ", " after") for text in ("one", '["no", "json"]', "last")]


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"prompts": []}, "'prompts'"),
        ({"prompts": ["a", ""]}, "non-empty"),
        ({"prompts": ["a", 5]}, "'prompts'"),
        ({"prompts": "text"}, "'prompts'"),
        ({"prompts": None}, "'prompts'"),
        ({"prompts": {"a": "b"}}, "'prompts'"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "'prompts'"),
        ({"prompt": ""}, "non-empty"),
        ({"id": "nothing"}, "'prompts'"),
        ([], "'prompts'"),
        (["a", ["b"]], "'prompts'"),
        (None, "'prompts'"),
        ({"prompts": ["a"], "prefix": None}, "'prefix'"),
        ({"prompts": ["a"], "suffix": ["b"]}, "'suffix'"),
        ({"prompts": ["a", "b"], "weights": [1]}, "2 prompts"),
        ({"prompts": ["a"], "weights": []}, "1 prompts"),
        ({"prompts": ["a"], "weights": 1}, "positive weights"),
        ({"prompts": ["a"], "weights": "1"}, "positive weights"),
        ({"prompts": ["a"], "weights": ["1"]}, "positive weights"),
        ({"prompts": ["a"], "weights": [None]}, "positive weights"),
        ({"prompts": ["a"], "weights": [0]}, "positive weights"),
        ({"prompts": ["a"], "weights": [-1.5]}, "positive weights"),
        ({"prompts": ["a"], "weights": [math.nan]}, "not JSON .Out of range"),
        ({"prompts": ["a"], "weights": [math.inf]}, "not JSON .Out of range"),
    ],
    ids=lambda value: json.dumps(value)[:40] if not isinstance(value, str) else "",
)
def test_a_wrong_question_is_refused_with_its_line(tmp_path, row, fragment):
    path = write_lines(tmp_path / "p.jsonl", ['{"prompts": ["fine"]}', json.dumps(row)])
    with pytest.raises(UsageError, match=rf"p\.jsonl, line 2: .*{fragment}"):
        read(path, FUSED)


@pytest.mark.parametrize("row", [{"prompts": ["a", "b"]}, ["a", "b"], {"prompt": "a", "prompts": ["b"]}])
def test_several_prompts_in_a_row_need_fuse(tmp_path, row):
    path = write_lines(tmp_path / "p.jsonl", [json.dumps(row)])
    with pytest.raises(UsageError, match=r"line 1: .*--fuse"):
        read(path)


def test_weights_that_do_not_fit_a_text_file_are_refused_with_the_line(tmp_path):
    path = write_lines(tmp_path / "p.txt", ["", "one"])
    with pytest.raises(UsageError, match=r"p\.txt, line 2: 1 prompts need"):
        read(path, Question([], weights=[1.0, 2.0]))


# ---- rows of results


def test_a_row_of_results_is_one_line_and_parses():
    question = Question([SEPARATORS, "日本語"], "before", "after", [1.0, 2.0])
    completion = Completion([1, 2, 3], [-0.25, -math.inf, math.nan], SEPARATORS, "stop")
    line = prompts_file.result(Job({"any": [None, 1]}, question, 3), completion, True)
    assert line.count("\n") == 1
    assert json.loads(line, parse_constant=pytest.fail) == {
        "id": {"any": [None, 1]},
        "prompts": question.prompts,
        "text": SEPARATORS,
        "tokens": [1, 2, 3],
        "logprobs": [-0.25, None, None],
        "finish_reason": "stop",
    }


def test_a_fused_text_is_titled_with_its_first_prompt():
    line = prompts_file.result(Job("q", Question([" a\nb ", "c"]), 0), DONE, False)
    assert line == "### q: a b\nsome text\n\n"


# ---- resuming


def test_without_an_output_file_all_is_to_do(output):
    assert prompts_file.resume(output, three()) == three()
    assert not output.exists()


def test_an_empty_output_file_holds_nothing(output):
    output.touch()
    assert prompts_file.resume(output, three()) == three()


def test_a_finished_row_is_left_out_and_the_file_kept_as_it_is(output):
    a, b, c = three()
    content = write_results(output, (c, DONE), (a, replace(DONE, finish_reason="stop")))
    before = output.stat()
    assert prompts_file.resume(output, [a, b, c]) == [b]
    assert output.read_bytes() == content
    assert output.stat().st_ino == before.st_ino


def test_all_finished_leaves_nothing(output):
    write_results(output, *((job, DONE) for job in three()))
    assert prompts_file.resume(output, three()) == []


def test_unfinished_rows_are_dropped_wherever_they_are(output):
    a, b, c = three()
    write_results(output, (a, CUT), (b, DONE), (c, replace(CUT, tokens=[], text="")))
    assert prompts_file.resume(output, [a, b, c]) == [a, c]
    assert output.read_text() == prompts_file.result(b, DONE, True)


def test_an_unfinished_row_may_come_before_the_finished_one(output):
    a, b, c = three()
    write_results(output, (a, CUT), (a, DONE))
    assert prompts_file.resume(output, [a, b, c]) == [b, c]
    assert output.read_text() == prompts_file.result(a, DONE, True)


def test_wherever_the_last_row_was_cut_the_file_goes_on_with_whole_rows(output):
    first, second = Job("a", "one", 0), Job("日本", Question(["señor", "two"]), 1)
    whole, last = prompts_file.result(first, DONE, True).encode(), prompts_file.result(second, DONE, True).encode()
    for cut in range(len(last)):
        output.write_bytes(whole + last[:cut])
        todo = prompts_file.resume(output, [first, second])
        if cut == len(last) - 1:  # all but the newline
            assert todo == []
            assert output.read_bytes() == whole + last
        else:
            assert todo == [second], last[:cut]
            assert output.read_bytes() == whole


def test_line_separators_within_texts_do_not_split_rows(output):
    job, other = Job(SEPARATORS, SEPARATORS, 0), Job("b", Question([SEPARATORS, "x"]), 1)
    content = write_results(output, (job, replace(DONE, text=SEPARATORS)), (other, DONE))
    assert prompts_file.resume(output, [job, other]) == []
    assert output.read_bytes() == content
    write_results(output, (job, replace(DONE, text=SEPARATORS)), (other, CUT))
    assert prompts_file.resume(output, [job, other]) == [other]
    assert output.read_text(encoding="utf-8") == prompts_file.result(job, replace(DONE, text=SEPARATORS), True)


IDS = ["1", 1, 1.5, "", "null", None, True, "true", False, 0, [], [1, 2], ["1", 2], {"b": 1, "a": [2]}, 10**30]


def test_ids_of_any_kind_are_told_apart(output):
    asked = [Job(id, "same prompt", number) for number, id in enumerate(IDS)]
    for number, job in enumerate(asked):
        write_results(output, (job, DONE))
        assert prompts_file.resume(output, asked) == asked[:number] + asked[number + 1 :]


def test_the_order_of_the_keys_in_an_id_does_not_matter(output):
    write_results(output, (Job({"a": 1, "b": 2}, "x", 0), DONE))
    assert prompts_file.resume(output, [Job({"b": 2, "a": 1}, "x", 0)]) == []


OTHERS = {
    "another id": prompts_file.result(Job("z", "prompt a", 0), DONE, True),
    "a number for a text": prompts_file.result(Job(0, "prompt a", 0), DONE, True),
    "another prompt": prompts_file.result(Job("a", "prompt b", 0), DONE, True),
    "another unfinished one": prompts_file.result(Job("a", "prompt b", 0), CUT, True),
    "fused": prompts_file.result(Job("a", Question(["prompt a"]), 0), DONE, True),
    "messages": prompts_file.result(Job("a", [{"role": "user", "content": "prompt a"}], 0), DONE, True),
    "no id": '{"prompt": "prompt a", "text": "x", "finish_reason": "length"}\n',
    "titled text": "### a: prompt a\nsome text\n\n",
    "a note": "shopping list",
    "a note of two lines": "shopping list\nmilk",
    "a number": "5",
    "a list": "[1, 2]\n",
    "indented": json.dumps({"id": "a", "prompt": "prompt a", "finish_reason": "stop"}, indent=1),
    "blank line between": prompts_file.result(Job("a", "prompt a", 0), DONE, True) + "\n",
    "twice": prompts_file.result(Job("a", "prompt a", 0), DONE, True) * 2,
    "damaged within": prompts_file.result(Job("a", "prompt a", 0), DONE, True)[:-20] + "\n",
    "cut off, of another run": prompts_file.result(Job("a", "prompt b", 0), DONE, True)[:-20],
    "cut off, another id": prompts_file.result(Job("another", "prompt a", 0), DONE, True)[:-20],
    "cut off, other JSON": '{"model": "x", "weights": [1, 2',
    "deep": "[" * 100_000,
    "not UTF-8": b"caf\xe9\n",
    "UTF-16": prompts_file.result(Job("a", "prompt a", 0), DONE, True).encode("utf-16"),
    "binary": bytes(range(256)) * 8,
    "zeros": bytes(64),
}


@pytest.mark.parametrize("where", ["alone", "after an unfinished row"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_anything_else_is_refused_and_left_alone(output, kind, where):
    other = OTHERS[kind]
    content = other.encode() if isinstance(other, str) else other
    if where != "alone":
        content = prompts_file.result(Job("c", "prompt c", 2), CUT, True).encode() + content
    output.write_bytes(content)
    before = output.stat()
    with pytest.raises(UsageError, match=rf"{re.escape(str(output))}, line \d"):
        prompts_file.resume(output, three())
    assert output.read_bytes() == content
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o664, 0o640])
def test_the_mode_of_the_file_is_kept(output, mode):
    write_results(output, (three()[0], CUT))
    output.chmod(mode)
    prompts_file.resume(output, three())
    assert output.read_bytes() == b""
    assert stat.S_IMODE(output.stat().st_mode) == mode
    assert os.listdir(output.parent) == [output.name]


def test_a_link_stays_a_link_and_its_target_is_cleaned(output, tmp_path):
    a, b, c = three()
    target = tmp_path / "elsewhere.jsonl"
    write_results(target, (a, DONE), (b, CUT))
    output.symlink_to(target)
    assert prompts_file.resume(output, [a, b, c]) == [b, c]
    assert output.is_symlink()
    assert target.read_text() == prompts_file.result(a, DONE, True)


@pytest.mark.parametrize("failing", ["os.replace", "shutil.copymode"])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(output, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    content = write_results(output, (three()[0], DONE), (three()[1], CUT))
    monkeypatch.setattr(failing, full)
    with pytest.raises(UsageError, match=r"cannot write to --output .*No space left"):
        prompts_file.resume(output, three())
    assert output.read_bytes() == content
    assert os.listdir(output.parent) == [output.name]


def test_a_pipe_holds_no_results_and_is_not_waited_for(output):
    def late(*_):
        raise TimeoutError

    os.mkfifo(output)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    try:
        assert prompts_file.resume(output, three()) == three()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_rows_with_windows_line_ends_are_rows(output):
    a, b, c = three()
    output.write_bytes(write_results(output, (a, DONE), (b, DONE)).replace(b"\n", b"\r\n"))
    assert prompts_file.resume(output, [a, b, c]) == [c]
    assert output.read_text().splitlines(keepends=True) == [prompts_file.result(job, DONE, True) for job in (a, b)]
