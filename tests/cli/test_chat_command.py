"""--chat: the history of a conversation, its commands, interrupts, and conversations that outgrow the context."""

import dataclasses
import json
import re
import shutil

import pytest
from cli_helpers import conversation, expected_text
from helpers import few

from llama_flex import Engine, Llama, Sampling, Tokenizer
from llama_flex.engine.output import OutputProcessor

# A template that is as strict as Llama 2's and Mistral's: no empty turn, and users and assistants take turns.
STRICT = (
    "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n{{ '' }}"
)


@pytest.mark.parametrize("system", few([None], ["the weather is nice"]))
def test_chat_keeps_the_history_and_answers_as_a_fresh_conversation_would(cli, engine, system):
    messages = ["hello", "how are you today?", "and the dog?"]
    arguments = ["--chat", "--max-new-tokens", 6, *([] if system is None else ["--system", system])]
    code, out, err = cli(*arguments, stdin="\n".join(messages) + "\n\n")
    replies = conversation(engine, messages, 6, system)
    assert code == 0
    assert out == "".join(reply + "\n" for reply in replies)
    assert replies[1] != conversation(engine, messages[1:2], 6, system)[0]  # the history matters
    # Only what was new in the later prompts was computed.
    computed = int(re.search(r"prefill (\d+) tokens", err)[1])
    alone = sum(
        len(engine.tokenizer.encode(f"<|im_start|>user\n{m}<|im_end|>\n<|im_start|>assistant\n")) for m in messages
    )
    assert computed < alone + 3 * 10 + 20


def test_chat_continues_beyond_the_first_cache(cli, engine):
    messages = ["hello", "the quick brown fox " * 12, "and the dog?", "1 2 3 " * 30]
    code, out, _ = cli("--chat", "--max-new-tokens", 5, stdin="\n".join(messages))
    assert code == 0
    assert out == "".join(reply + "\n" for reply in conversation(engine, [m.strip() for m in messages], 5))


def test_chat_without_a_limit_uses_the_room_that_the_context_leaves(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    code, out, err = cli("--chat", "--quiet", model=copy, stdin="hello\n")
    assert code == 0, err
    assert out.endswith("\n")
    assert len(out) > 1


def test_chat_penalises_what_was_said_in_earlier_turns(cli, folder, tmp_path):
    """The repetition penalty counts the tokens of earlier turns, as it does in a fresh prompt of the whole."""
    penalised = Engine(Llama.from_pretrained(folder, device="cpu"), Tokenizer.from_pretrained(folder))
    messages = ["hello", "hello", "hello you"]
    options = {"sampling": Sampling(repetition_penalty=1.6)}
    history, replies = [], []
    for message in messages:
        history.append({"role": "user", "content": message})
        prompt = penalised.tokenizer.apply_chat_template(history)
        replies.append(expected_text(penalised, prompt, 12, special=False, **options))
        history.append({"role": "assistant", "content": replies[-1]})
    assert replies != conversation(penalised, messages, 12)
    code, out, _ = cli("--chat", "--max-new-tokens", 12, "--repetition-penalty", 1.6, stdin="\n".join(messages))
    assert (code, out) == (0, "".join(reply + "\n" for reply in replies))


def test_each_turn_of_a_chat_has_a_seed_of_its_own(cli, engine):
    arguments = ["--chat", "--max-new-tokens", 8, "--temperature", 1.5, "--top-k", 0, "--seed", 5]
    _, out, _ = cli(*arguments, stdin="hello\nhow are you?\n")
    history, replies = [], []
    for turn, message in enumerate(["hello", "how are you?"]):
        history.append({"role": "user", "content": message})
        prompt = engine.tokenizer.apply_chat_template(history)
        sampling = Sampling(temperature=1.5, seed=5 + turn)
        replies.append(expected_text(engine, prompt, 8, special=False, sampling=sampling))
        history.append({"role": "assistant", "content": replies[-1]})
    assert out == "".join(reply + "\n" for reply in replies)
    assert cli(*arguments, stdin="hello\nhow are you?\n")[1] == out


def test_commands_of_a_chat_do_not_go_to_the_model(cli, engine):
    said = "hello\n/help\n  /clear \nhow are you today?\n/usr/bin is a folder\n/exit\nhello\n"
    code, out, err = cli("--chat", "--max-new-tokens", 4, stdin=said)
    replies = conversation(engine, ["hello"], 4) + conversation(
        engine, ["how are you today?", "/usr/bin is a folder"], 4
    )
    assert (code, out) == (0, "".join(reply + "\n" for reply in replies))
    assert "/clear forgets the conversation" in err


def test_an_interrupt_in_chat_ends_the_reply_and_not_the_conversation(cli, engine, monkeypatch):
    step, calls = Llama.step, []

    def interrupted(self, *arguments):
        output = step(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # once the third step has written its keys and values
        return output

    monkeypatch.setattr(Llama, "step", interrupted)
    code, out, _ = cli("--chat", "--max-new-tokens", 5, stdin="hello\nhow are you?\n")
    monkeypatch.setattr(Llama, "step", step)
    assert code == 0
    first = [{"role": "user", "content": "hello"}]
    ids = engine.tokenizer.encode(engine.tokenizer.apply_chat_template(first), add_special_tokens=False)
    cut = "".join(s.text for s in list(engine.stream([ids], max_new_tokens=5))[:2])
    history = [*first, {"role": "assistant", "content": cut}, {"role": "user", "content": "how are you?"}]
    second = expected_text(engine, engine.tokenizer.apply_chat_template(history), 5, special=False)
    assert out == f"{cut}\n{second}\n"


@pytest.mark.parametrize("how", ["interrupt", "end of text", "white space"])
def test_an_empty_reply_is_left_out_of_the_conversation(cli, engine, folder, tmp_path, monkeypatch, how):
    """Llama 2's and Mistral's templates strip white space, and refuse an empty turn and two turns of the user in a
    row."""
    copy = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((copy / "tokenizer_config.json").read_text()) | {"chat_template": STRICT}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    step, calls = Llama.step, []

    def empty(self, *arguments):
        calls.append(1)
        output = step(self, *arguments)
        if len(calls) == 1 and how == "interrupt":
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(Llama, "step", empty)
    if how == "end of text":
        put, made = OutputProcessor.put, []

        def ended(self, token, *rest):
            made.append(1)
            return put(self, 2 if len(made) == 1 else token, *rest)

        monkeypatch.setattr(OutputProcessor, "put", ended)
    if how == "white space":
        put, made = OutputProcessor.put, []

        def blank(self, token, *rest):
            made.append(1)
            return put(self, token, *rest) if len(made) > 5 else dataclasses.replace(put(self, 5, *rest), text=" ")

        monkeypatch.setattr(OutputProcessor, "put", blank)
    code, out, err = cli("--chat", "--max-new-tokens", 5, model=copy, stdin="hello\nhow are you?\nand now?\n")
    monkeypatch.undo()
    assert code == 0
    assert "no reply; the message was dropped from the conversation" in err
    assert "error" not in err
    nothing = " " * 5 if how == "white space" else ""
    assert out == "".join(f"{reply}\n" for reply in [nothing, *conversation(engine, ["how are you?", "and now?"], 5)])


def test_in_a_chat_the_turn_whose_logits_are_nan_ends(cli, damaged, engine):
    code, out, err = cli("--chat", "--max-new-tokens", 4, model=damaged, stdin="hello\nthe lazy dog\nand you?\n")
    assert code == 0
    assert "error: at new token 1: the model's logits are NaN or infinite" in err
    first, last = conversation(engine, ["hello", "and you?"], 4)
    assert out == f"{first}\n\n{last}\n"


# ---- long conversations


def test_a_chat_at_the_end_of_the_context_forgets_its_oldest_messages(cli, engine):
    long = "the quick brown fox " * 20
    messages = [f"{n} {long}".strip() for n in range(8)]
    code, out, err = cli("--chat", "--system", "be brief", "--max-new-tokens", 5, stdin="\n".join(messages))
    replies = out.splitlines()
    assert code == 0
    assert len(replies) == len(messages)
    assert "error" not in err
    assert "context limit of 512 tokens reached; dropped the 2 oldest messages" in err
    history = [{"role": "system", "content": "be brief"}]
    for message, reply in zip(messages[-3:-1], replies[-3:-1], strict=True):
        history += [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]
    history.append({"role": "user", "content": messages[-1]})
    encode, apply = engine.tokenizer.encode, engine.tokenizer.apply_chat_template
    while len(encode(apply(history), add_special_tokens=False)) + 5 > 512:
        del history[1:3]
    assert replies[-1] == expected_text(engine, apply(history), 5, special=False)


@pytest.mark.exhaustive
def test_a_chat_at_the_end_of_what_max_length_allows_forgets_its_oldest_messages(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "generation_config.json").write_text('{"max_length": 120}')
    code, out, err = cli("--chat", model=copy, stdin="hello\nhow are you?\nand now?\nwhat?\n" + "x y " * 60)
    assert code == 0
    assert "context limit of 120 tokens reached; dropped the " in err
    assert "leave no room within generation_config.json's max_length of 120; give max_new_tokens" in err
    assert out.count("\n") >= 4


def test_a_message_too_long_by_itself_leaves_the_conversation_as_it_is(cli, engine):
    messages = ["hello", "x y " * 600, "and you?"]
    _, out, err = cli("--chat", "--max-new-tokens", 4, stdin="\n".join(messages))
    assert re.search(r"error: \d+ tokens leave no room", err)
    assert "dropped" not in err
    assert out == "".join(reply + "\n" for reply in conversation(engine, ["hello", "and you?"], 4))


def test_a_message_that_does_not_fit_does_not_end_the_conversation(cli):
    code, out, err = cli("--chat", "--max-new-tokens", 3, stdin="hello\n" + "x y " * 600 + "\nhello again\n")
    assert code == 0
    assert out.count("\n") == 2
    assert "leave no room" in err
