"""`--speculate` and `--draft-model`: drafts change no text, for one prompt, in a chat and for files of prompts."""

import re

import pytest
import torch
from cli_helpers import assert_one_error, parse_rows, write_jsonl

from llama_flex import Llama, LlamaConfig

REPEATS = "the sea is blue. the sea is blue. the sea is"
DRAFTERS = "lookup", "self", "draft"


@pytest.fixture(scope="session")
def small(engine, tmp_path_factory):
    """A function from the size of a vocabulary to the folder of a smaller model with it."""

    def saved(size: int = engine.model.config.vocab_size):
        torch.manual_seed(2)
        folder = tmp_path_factory.mktemp("small")
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        Llama(LlamaConfig(vocab_size=size, **sizes)).save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(params=DRAFTERS)
def drafts(request, small) -> tuple[str, ...]:
    """The arguments that ask for drafts."""
    return ("--draft-model", str(small())) if request.param == "draft" else ("--speculate", request.param)


def figures(err: str) -> tuple[int, int, int]:
    """Return how many drafts the statistics name, in how many texts, and how many were accepted."""
    found = re.search(r"; drafts by .*: (\d+) in (\d+) texts?, (\d+) accepted", err)
    assert found, err
    return int(found[1]), int(found[2]), int(found[3])


def test_one_prompt_gets_the_same_text_and_says_what_came_of_drafts(cli, drafts):
    arguments = "--prompt", REPEATS, "--max-new-tokens", 24, "--repetition-penalty", 0.7
    _, plain, _ = cli(*arguments)
    code, out, err = cli(*arguments, *drafts, "--explain")
    assert (code, out) == (0, plain)
    drafted, texts, accepted = figures(err)
    assert texts == 1
    assert drafted >= max(accepted, 1)
    assert re.search(r"\d tok/s; drafts by ", err), "no bytes a second: a step gives several tokens"
    assert err.splitlines()[-1].startswith("drafts by "), "the explanation says it too"
    if "lookup" not in drafts:
        assert re.search(r"\(a step reads 0\.\d{3} GB of weights, one of the model 0\.\d{3} GB\)", err)
    code, out, err = cli(*arguments, *drafts, "--quiet")
    assert (code, out, err) == (0, plain, "")


@pytest.mark.parametrize("drafter", ["lookup", "self"])
def test_a_chat_gets_the_same_replies(cli, drafter):
    messages = f"{REPEATS}\nhello\n{REPEATS} blue\n"
    _, plain, _ = cli("--chat", "--max-new-tokens", 12, stdin=messages)
    code, out, err = cli("--chat", "--max-new-tokens", 12, "--speculate", drafter, stdin=messages)
    assert (code, out) == (0, plain)
    assert figures(err)[0] >= (drafter == "self")  # the random model repeats nothing


@pytest.mark.parametrize("drafter", ["lookup", "self"])
def test_a_file_of_prompts_gets_the_same_rows(cli, drafter, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [REPEATS, "hello", "The quick", "1 2 3 1 2 3 1 2"])
    arguments = "--prompts-file", path, "--json", "--max-new-tokens", 9, "--temperature", 0.7, "--seed", 3
    _, plain, _ = cli(*arguments)
    code, out, err = cli(*arguments, "--speculate", drafter)
    assert code == 0
    rows, expected = ({row["id"]: row["text"] for row in parse_rows(text)} for text in (out, plain))
    assert rows == expected
    assert "drafts by " in err


def test_the_copy_in_4_bits_is_made_once(cli, tmp_path, monkeypatch):
    from llama_flex.engine import speculation

    made, make = [], speculation.quantise_beside
    monkeypatch.setattr(speculation, "quantise_beside", lambda *args: made.append(1) or make(*args))
    path = write_jsonl(tmp_path / "p.jsonl", ["a", "b"])
    assert cli("--prompts-file", path, "--max-new-tokens", 2, "--speculate", "self")[0] == 0
    assert made == [1]


def test_a_draft_model_with_another_vocabulary_is_refused_in_one_line(cli, small, engine):
    size = engine.model.config.vocab_size
    result = cli("--prompt", "a", "--draft-model", small(size + 8))
    assert_one_error(result, "draft model's tokens", str(size), str(size + 8))
