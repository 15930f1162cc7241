"""--stop-token and --ignore-eos, --prefill-response, and --prompt -: what ends a text, begins one, and is read."""

import io
import json
import shutil
import sys

import pytest
from cli_helpers import assert_one_error, parse_rows, write_jsonl

from llama_flex import Engine, Ensemble, Llama, Tokenizer, generate
from llama_flex.cli.session import Session

NEW, PROMPT = 8, "The quick"


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    """An engine of the model in `folder`, in the quick way."""
    return Engine(Llama.from_pretrained(folder, device="cpu"), Tokenizer.from_pretrained(folder), compile="auto")


@pytest.fixture
def cli(cli):
    """The command line, in the quick way."""
    return lambda *arguments, **options: cli(*arguments, "--compile", "auto", **options)


@pytest.fixture
def ended(engine, folder, tmp_path):
    """A copy of the model whose text for PROMPT ends with its third token, and the engine's tokens without that."""
    (done,) = engine.generate([engine.tokenizer.encode(PROMPT)], max_new_tokens=NEW)
    assert done.tokens.index(done.tokens[2]) == 2
    copy = shutil.copytree(folder, tmp_path / "ended")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": done.tokens[2]}))
    return copy, done


def run(cli, *arguments, **options) -> dict:
    """Run the command line with --json; return its only row."""
    code, out, err = cli("--max-new-tokens", NEW, "--json", *arguments, **options)
    assert code == 0, err
    (row,) = parse_rows(out)
    return row


def test_a_stop_token_ends_the_text_as_an_id_and_as_a_text(cli, engine):
    (done,) = engine.generate([engine.tokenizer.encode(PROMPT)], max_new_tokens=NEW)
    id = done.tokens[3]
    at, text = done.tokens.index(id), engine.tokenizer.decode([id])
    assert engine.tokenizer.encode(text) == [id]
    for token in (id, text):
        row = run(cli, "--prompt", PROMPT, "--stop-token", token, "--stop-token", "<unk>")
        assert (row["tokens"], row["finish_reason"]) == (done.tokens[: at + 1], "stop")
        assert (
            row["text"] == engine.tokenizer.decode([*engine.tokenizer.encode(PROMPT), *done.tokens[:at]])[len(PROMPT) :]
        )
    assert run(cli, "--prompt", PROMPT, "--stop-token", "<unk>")["tokens"] == done.tokens


def test_end_of_text_tokens_end_it_too_unless_they_are_ignored(cli, ended):
    copy, done = ended
    assert run(cli, "--prompt", PROMPT, model=copy)["tokens"] == done.tokens[:3]
    assert run(cli, "--prompt", PROMPT, "--stop-token", done.tokens[5], model=copy)["tokens"] == done.tokens[:3]
    assert run(cli, "--prompt", PROMPT, "--ignore-eos", model=copy)["tokens"] == done.tokens
    last = run(cli, "--prompt", PROMPT, "--ignore-eos", "--stop-token", done.tokens[5], model=copy)
    assert last["tokens"] == done.tokens[: done.tokens.index(done.tokens[5]) + 1]
    code, out, _ = cli("--prompt", PROMPT, "--max-new-tokens", NEW, "--ignore-eos", model=copy)  # as it comes
    assert (code, out) == (0, done.text + "\n")


def test_a_chat_stops_at_them_too(cli, engine):
    chat = engine.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    (done,) = engine.generate([engine.tokenizer.encode(chat, add_special_tokens=False)], max_new_tokens=NEW)
    at = done.tokens.index(done.tokens[4])
    code, out, _ = cli("--chat", "--max-new-tokens", NEW, "--stop-token", done.tokens[4], stdin="hello\n")
    expected = engine.tokenizer.decode(done.tokens[:at])
    assert (code, out) == (0, expected + "\n")
    assert expected != done.text


# ---- what the answer begins with


def answer(engine: Engine, messages: list[dict], prefill: str, new: int = NEW) -> str:
    """Return the answer to a conversation, generated from its text with the beginning of the answer."""
    text = engine.tokenizer.apply_chat_template(messages) + prefill
    (done,) = engine.generate([engine.tokenizer.encode(text, add_special_tokens=False)], max_new_tokens=new)
    return prefill + done.text


def user(content: str) -> dict:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("options", [["--instruct"], ["--system", "nice weather"]])
def test_an_answer_begins_with_what_it_is_given(cli, engine, options):
    system = [{"role": "system", "content": options[1]}] if len(options) > 1 else []
    expected = answer(engine, [*system, user("hello")], "I am")
    given = ["--prompt", "hello", "--prefill-response", "I am", *options]
    code, out, err = cli(*given, "--max-new-tokens", NEW)
    assert (code, out) == (0, expected + "\n"), err
    row = run(cli, *given)
    assert row["text"] == expected
    assert len(row["tokens"]) == NEW  # of the new ones
    code, out, _ = cli(*given, "--prompt", "how are you", "--max-new-tokens", NEW)
    assert out.split("\n\n")[0] == f"### 0: hello\n{expected}"
    assert expected != answer(engine, [*system, user("hello")], "")


def test_an_answer_that_is_only_shown_its_beginning_would_be_noticed(cli, engine, monkeypatch):
    def without(self, messages):
        return self.tokenizer.apply_chat_template(messages)

    monkeypatch.setattr(Session, "chat_text", without)
    with pytest.raises(AssertionError):
        test_an_answer_begins_with_what_it_is_given(cli, engine, ["--instruct"])


def test_rows_of_messages_need_no_other_option(cli, engine, tmp_path):
    rows = [{"id": n, "messages": [user(text)]} for n, text in enumerate(("hello", "how are you"))]
    found = cli("--prompts-file", write_jsonl(tmp_path / "p.jsonl", rows), "--json", "--prefill-response", "no",
                "--max-new-tokens", NEW)  # fmt: skip
    assert found[0] == 0, found
    texts = {row["id"]: row["text"] for row in parse_rows(found[1])}
    assert texts == {n: answer(engine, row["messages"], "no") for n, row in enumerate(rows)}


def test_a_row_that_ends_in_an_answer_is_refused(cli, tmp_path):
    rows = [{"messages": [user("a"), {"role": "assistant", "content": "b"}]}]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    result = cli("--prompts-file", file, "--prefill-response", "no", "--strict")
    assert_one_error(result, "line 1", "--prefill-response", "the last message is one already")


def test_a_chat_keeps_the_beginnings_of_its_answers_in_its_history(cli, engine):
    history, replies = [], []
    for message in ("hello", "and the dog?"):
        history.append(user(message))
        replies.append(answer(engine, history, "I am", 6))
        history.append({"role": "assistant", "content": replies[-1]})
    code, out, err = cli("--chat", "--prefill-response", "I am", "--max-new-tokens", 6, stdin="hello\nand the dog?\n")
    assert (code, out) == (0, "".join(reply + "\n" for reply in replies)), err


def test_fused_prompts_have_one_too(cli, engine):
    options = ["--fuse", "mean", "--instruct", "--prompt", "hello", "--prompt", "how are you"]
    code, out, err = cli(*options, "--prefill-response", "I am", "--max-new-tokens", 3)
    texts = [engine.tokenizer.apply_chat_template([user(text)]) + "I am" for text in ("hello", "how are you")]
    prompts = Ensemble([engine.tokenizer.encode(text, add_special_tokens=False) for text in texts], "mean")
    (done,) = engine.generate([prompts], max_new_tokens=3)
    assert (code, out) == (0, f"I am{done.text}\n"), err


def test_a_resumed_file_keeps_its_rows(cli, tmp_path):
    out, given = tmp_path / "out.jsonl", ["--instruct", "--prefill-response", "I am", "--json", "--max-new-tokens", 3]
    cli("--prompt", "hello", *given, "--output", out)
    first = out.read_text()
    code, _, err = cli("--prompt", "hello", "--prompt", "-", *given, "--output", out, "--resume", stdin="how\n")
    assert code == 0, err
    rows = parse_rows(out.read_text())
    assert rows[0] == parse_rows(first)[0]
    assert (rows[1]["prompt"], rows[1]["text"][:4]) == ("how", "I am")
    assert "has all results" in cli("--prompt", "hello", "--prompt", "-", *given, "--output", out, "--resume",
                                    stdin="how")[2]  # fmt: skip


# ---- standard input


def test_a_prompt_is_read_from_standard_input(cli, engine):
    (done,) = engine.generate([engine.tokenizer.encode("The quick\nbrown")], max_new_tokens=NEW)
    for text in ("The quick\nbrown", "The quick\nbrown\n"):
        row = run(cli, "--prompt", "-", stdin=text)
        assert (row["prompt"], row["tokens"]) == ("The quick\nbrown", done.tokens)
    code, out, _ = cli("--prompt", "-", "--max-new-tokens", NEW, stdin="The quick\nbrown\n")
    assert (code, out) == (0, done.text + "\n")
    code, out, _ = cli("--prompt", "hello", "--prompt", "-", "--json", "--max-new-tokens", 2, stdin="The quick\n")
    assert sorted(row["prompt"] for row in parse_rows(out)) == ["The quick", "hello"]


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--prompt", "x", "--stop-token", "the weather is nice"], ["--stop-token", "tokens, not one", "use --stop"]),
        (["--prompt", "x", "--stop-token", ""], ["--stop-token '' is 0 tokens"]),
        (["--prompt", "x", "--stop-token", "99999"], ["--stop-token 99999", "vocabulary of 40"]),
        (["--prompt", "x", "--ignore-eos", "now"], ["now"]),
        (["--prompt", "x", "--prefill-response", "a"], ["needs --chat, --instruct, --system"]),
        (["--prompt", "x", "--fuse", "--prefill-response", "a"], ["needs --chat, --instruct, --system"]),
        (["--prompt", "x", "--instruct", "--prefill-response", ""], ["--prefill-response is empty"]),
        (["--prompt", "-"], ["prompt 0 is empty"]),
        (["--prompt", "-", "--prompt", "-"], ["--prompt -", "give it once"]),
        (["--chat", "--prompt", "-"], ["--chat", "--prompt"]),
    ],
)
def test_what_cannot_be_honoured_is_one_line(cli, arguments, fragments):
    assert_one_error(cli(*arguments), *fragments)


def test_a_closed_or_unreadable_standard_input_is_one_line(folder, capsys, monkeypatch):
    for stdin, fragment in (
        (None, "which is closed"),
        (io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"), "cannot read standard input"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        code = generate.main(["--model", str(folder), "--device", "cpu", "--prompt", "-"])
        assert_one_error((code, *capsys.readouterr()), "--prompt -", fragment)


def test_a_template_that_changes_the_beginning_is_named(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("m.content", "m.content | trim")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    given = ["--prompt", "x", "--instruct", "--max-new-tokens", 2, "--prefill-response"]
    assert_one_error(cli(*given, "I am ", model=copy), "the chat template changes --prefill-response", "white space")
    assert cli(*given, "I am", model=copy)[0] == 0


@pytest.mark.weights
@pytest.mark.exhaustive
def test_the_demo_model_begins_as_told(demo, demo_folder, cli):
    engine = Engine(demo, Tokenizer.from_pretrained(demo_folder), compile="auto")
    expected = answer(
        engine, [{"role": "system", "content": "Be brief."}, user("What is the capital of France?")], "It is"
    )
    given = ["--system", "Be brief.", "--prompt", "-", "--prefill-response", "It is", "--stop-token", "<|im_end|>"]
    code, out, err = cli(*given, "--dtype", "float32", "--max-new-tokens", NEW, model=demo_folder,
                         stdin="What is the capital of France?\n")  # fmt: skip
    assert (code, out) == (0, expected + "\n"), err
    assert out.startswith("It is the capital of France")
