"""The files beside a tokenizer: added tokens, tokenizer_config.json, chat templates; which of them are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from chat_helpers import SYSTEM, TOOLS, TURNS
from tokenizer_helpers import LARGE, cases, write_folder

from llama_flex.tokenizer import Tokenizer


@pytest.mark.parametrize("id", [-1, 2**22, 2**31, 10**400, 1.5, None, "x", [1]], ids=repr)
def test_an_added_token_has_an_id_that_can_be_one(id, tokenizer_folders, tmp_path):
    model = (tokenizer_folders["tiny_model"] / "tokenizer.model").read_bytes()
    for config, added in (({}, {"<tool>": id}), ({"added_tokens_decoder": {str(id): {"content": "<tool>"}}}, {})):
        folder = write_folder(tmp_path, config, tokenizer__model=model, added_tokens__json=json.dumps(added))
        with pytest.raises(ValueError, match=str(tmp_path)) as caught:
            Tokenizer.from_pretrained(folder)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "config",
    [
        {"extra_special_tokens": [{"content": "<x>", "lstrip": "yes"}]},
        {"bos_token": "\ud800"},
        {"pad_token": {"no content": 1}},
        {"extra_special_tokens": [5]},
        {"extra_special_tokens": ["\ud800"]},
        {"added_tokens_decoder": {"5": {"content": 5}}},
        {"added_tokens_decoder": [1]},
        {"chat_template": 5},
        {"chat_template": [{"name": 5, "template": "x"}]},
        {"chat_template": [{"name": [], "template": "x"}]},
        {"chat_template": {"default": ["x"]}},
    ],
    ids=lambda config: json.dumps(config)[:40],
)
def test_a_malformed_configuration_is_named(config, tokenizer_folders, tmp_path):
    for file in ("tokenizer.json", "tokenizer.model"):
        shutil.rmtree(tmp_path)
        source = tokenizer_folders["byte_level" if file == "tokenizer.json" else "tiny_model"] / file
        folder = write_folder(tmp_path, config, **{file.replace(".", "__"): source.read_bytes()})
        with pytest.raises(ValueError, match=str(tmp_path)) as caught:
            Tokenizer.from_pretrained(folder)
        assert str(caught.value).isprintable()


def test_files_of_a_tokenizer_are_regular_ones_of_its_folder(tokenizer_folders, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(tokenizer_folders["byte_level"], outside)
    (outside / "x.jinja").write_text("x")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"):
        folder = Path(shutil.copytree(tokenizer_folders["byte_level"], tmp_path / name))
        (folder / name).unlink(missing_ok=True)
        source = outside if name.startswith("additional") else outside / name
        (folder / name).symlink_to(source if source.exists() else outside / "x.jinja")
        with pytest.raises(ValueError, match=r"links to .*, outside its folder") as caught:
            Tokenizer.from_pretrained(folder)
        assert str(folder / name) in str(caught.value)
        (folder / name).unlink()
        if name.endswith(("json", "jinja")):
            os.mkfifo(folder / name)
            with pytest.raises(ValueError, match="not a regular file"):
                Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"\xff", b"\xc3\x28", "x".encode("utf-16")])
def test_a_chat_template_that_is_no_text_is_named(content, tokenizer_folders, tmp_path):
    folder = Path(shutil.copytree(tokenizer_folders["byte_level"], tmp_path / "a"))
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ValueError, match=r"chat_template.jinja: not UTF-8 text"):
        Tokenizer.from_pretrained(folder)


# --- chat templates ---


def folder_with(path: Path, config: dict, **files: str) -> Path:
    """Write a folder with a tokenizer, a configuration and files; `__` in a keyword stands for the dot, `DIR_` for the
    folder of additional templates."""
    path.mkdir(parents=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config})
    )
    for name, content in files.items():
        file = path / name.replace("__", ".").replace("DIR_", "additional_chat_templates/")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    return path


def test_the_folders_template(tmp_path):
    named = [{"name": "default", "template": "D {{ bos_token }}"}, {"name": "tool_use", "template": "T {{ tools }}"}]
    folders = {
        "config": folder_with(tmp_path / "config", {"chat_template": "C {{ eos_token }}{{ pad_token }}"}),
        "named": folder_with(tmp_path / "named", {"chat_template": named}),
        "file": folder_with(tmp_path / "file", {"chat_template": "C"}, chat_template__jinja="F {{ bos_token }}"),
        "extra": folder_with(tmp_path / "extra", {}, chat_template__jinja="F", DIR_tool_use__jinja="X {{ extra }}"),
    }
    for folder in folders.values():
        ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for arguments in ({}, {"tools": TOOLS}, {"chat_template": "own {{ bos_token }}"}, {"bos_token": "other"}):
            assert ours.apply_chat_template(TURNS, **arguments) == theirs.apply_chat_template(
                TURNS, tokenize=False, add_generation_prompt=True, **arguments
            )
    assert Tokenizer.from_pretrained(folders["named"]).chat_template == "D {{ bos_token }}"
    assert Tokenizer.from_pretrained(folders["file"]).chat_template == "F {{ bos_token }}"
    extra = Tokenizer.from_pretrained(folders["extra"])
    assert extra.apply_chat_template(TURNS, chat_template="tool_use", extra=1) == "X 1"
    processor = folder_with(tmp_path / "json", {}, chat_template__json=json.dumps({"chat_template": "J"}))
    assert Tokenizer.from_pretrained(processor).chat_template == "J"


def test_no_template(tmp_path):
    tokenizer = Tokenizer.from_pretrained(folder_with(tmp_path / "a", {}))
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"no chat template; pass chat_template=..., or put a chat_template\.jinja"):
        tokenizer.apply_chat_template(TURNS)
    assert tokenizer.apply_chat_template(TURNS, chat_template="{{ messages | length }}") == "3"
    only = folder_with(tmp_path / "b", {"chat_template": [{"name": "rag", "template": "R"}]})
    with pytest.raises(ValueError, match=r"named ones it has: rag"):
        Tokenizer.from_pretrained(only).apply_chat_template(TURNS)


@cases("smollm2", "llama3", exhaustive=LARGE)
def test_the_template_of_a_real_folder(tokenizer_folders, name):
    folder = tokenizer_folders[name]
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for messages in (TURNS, [SYSTEM, *TURNS]):
        for prompt in (True, False):
            text = ours.apply_chat_template(messages, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode(text, add_special_tokens=False) == ids
