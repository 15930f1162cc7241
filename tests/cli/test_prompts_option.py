"""--prompts-file: text files, JSONL files, and what is done about rows that cannot be completed."""

import json
import os
import re

import pytest
from cli_helpers import assert_one_error, expected_text, parse_rows, prompt_arguments


def test_a_text_file_has_a_prompt_a_line(cli, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The quick\n\n  \nsail the sea\u2028and back\r\nlast", encoding="utf-8")
    code, out, _ = cli("--prompts-file", path, "--max-new-tokens", 2, "--json")
    rows = parse_rows(out)
    assert code == 0
    assert [row["prompt"] for row in rows] == ["The quick", "sail the sea\u2028and back", "last"]
    assert len({row["id"] for row in rows}) == 3


def test_a_jsonl_file_has_texts_or_messages_and_ids(cli, engine, tmp_path):
    messages = [{"role": "system", "content": "fine"}, {"role": "user", "content": "hello"}]
    given = [{"id": "a", "prompt": "The quick"}, {"id": 7, "messages": messages}, {"prompt": "no id"}, "bare"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, given)) + "\n\n")
    code, out, _ = cli("--prompt", "first", "--prompts-file", path, "--max-new-tokens", 3, "--json")
    rows = parse_rows(out)
    assert code == 0
    assert [row["id"] for row in rows[:3]] == [0, "a", 7]
    assert [row["prompt"] for row in rows] == ["first", "The quick", messages, "no id", "bare"]
    rendered = engine.tokenizer.apply_chat_template(messages)
    assert rows[2]["text"] == expected_text(engine, rendered, 3, special=False)


def test_json_rows_can_be_given_back_as_prompts(cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    prompts = ["The quick", "a\u2028b\x85c\x0bd\x0ce\x1cf", "tab\tand\nnewline"]
    cli(*prompt_arguments(prompts), "--max-new-tokens", 2, "--json", "--output", path)
    code, out, err = cli("--prompts-file", path, "--max-new-tokens", 2, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert out == path.read_text(encoding="utf-8")


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(cli, tmp_path):
    for name, line in (("p.txt", "One"), ("p.jsonl", '{"prompt": "One"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + line.encode())
        _, out, _ = cli("--prompts-file", tmp_path / name, "--max-new-tokens", 1, "--json")
        assert json.loads(out)["prompt"] == "One"


def test_prompts_come_from_a_pipe(cli, tmp_path):
    path, (reader, writer) = tmp_path / "rows.jsonl", os.pipe()
    os.write(writer, b"The quick\n\nthe sea")
    os.close(writer)
    arguments = ("--prompts-file", f"/dev/fd/{reader}", "--fuse", "--max-new-tokens", 2, "--json", "--quiet")
    assert cli(*arguments, "--output", path, "--resume") == (0, "", "")
    os.close(reader)
    assert [row["prompts"] for row in parse_rows(path.read_text())] == [["The quick"], ["the sea"]]


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ('{"prompt": "a", "id": NaN}', ["line 1", "not JSON", "float"]),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', ["line 3", "'prompt'"]),
        ('{"prompt": 5}', ["line 1", "'prompt'"]),
        ("[1, 2]", ["line 1"]),
        ('{"messages": ["hello"]}', ["line 1", "'messages'"]),
        ('{"messages": []}', ["empty"]),
        ('{"prompt": ""}', ["empty"]),
        ("[" * 100_000, ["line 1", "not JSON"]),
        ("", ["nothing to complete"]),
        (b'{"prompt": "\xff"}', ["utf-8"]),
    ],
    ids=[
        "cut off",
        "NaN",
        "no prompt",
        "number",
        "list",
        "messages of text",
        "no messages",
        "empty",
        "deep",
        "none",
        "bytes",
    ],
)
def test_a_malformed_jsonl_file_is_refused_with_its_line(cli, tmp_path, content, fragments):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_error(cli("--prompts-file", path, "--strict"), *fragments)


@pytest.mark.parametrize(
    "line", ['{"prompt": "a", "id": "\\ud800"}', '{"messages": [{"content": "a"}]}', "9" * 5000, '{"prompt": 5}']
)
def test_a_wrong_row_is_refused_with_its_line_number(cli, tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    assert_one_error(cli("--prompts-file", path, "--strict"), "line 2")


def test_a_malformed_row_is_said_and_skipped(cli, engine, tmp_path):
    path, text = tmp_path / "p.jsonl", "long " * 2000
    lines = ['{"prompt": "a"}', '{"prompt": ', json.dumps(text), '{"prompt": ""}', '{"id": "z", "prompt": "b"}']
    path.write_text("\n".join(lines))
    code, out, err = cli("--prompts-file", path, "--max-new-tokens", 2, "--json", "--quiet")
    assert code == 0
    rows = {row["id"]: row for row in parse_rows(out)}
    assert set(rows) == {0, "z"}
    for id, prompt in ((0, "a"), ("z", "b")):
        assert rows[id]["text"] == expected_text(engine, prompt, 2)
    said = err.splitlines()
    assert [line.partition(": ")[0] for line in said] == ["skipped"] * 3
    for line, (number, what) in zip(said, ((2, "not JSON"), (4, "empty"), (3, "tokens")), strict=True):
        assert f"{path}, line {number}: " in line
        assert what in line
    assert_one_error(cli("--prompts-file", path, "--strict"), "line 2")
    path.write_text("\n".join(lines[2:3]))
    assert_one_error(cli("--prompts-file", path, "--strict"), "line 1", "tokens")
    code, out, err = cli("--prompts-file", path)
    assert (code, out) == (2, "")
    assert err.splitlines()[1:] == ["error: no prompt is left to complete"]


def test_messages_without_content_are_refused(cli, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user"}]}\n')
    code, _, err = cli("--prompts-file", path, "--max-new-tokens", 1, "--quiet")
    assert code == 0 or (code == 2 and re.fullmatch(r"error: .+\n", err))


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_prompts_file_that_cannot_be_read_is_named(cli, tmp_path, name):
    assert_one_error(cli("--prompts-file", tmp_path / name), "--prompts-file", str(tmp_path))
