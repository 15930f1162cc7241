"""Folders and repositories of the hub: which files are fetched, and how long a silent hub is waited for."""

import json
import re
import socket
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from checkpoint_helpers import load_quietly, refusal

from llama_flex.checkpoint import hub

# What a repository holds besides the weights that are read: other formats, precisions, adapters, Meta's own files.
REPOSITORY = {
    "README.md": "",
    "config.json": "{}",
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer.model": "",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "",
    "additional_chat_templates/tool.jinja": "",
    "consolidated.safetensors": "",
    "consolidated.00.pth": "",
    "original/consolidated.00.safetensors": "",
    "original/tokenizer.model": "",
    "original/params.json": "{}",
    "model.fp16.safetensors": "",
    "adapter_model.safetensors": "",
    "pytorch_model.bin": "",
    "onnx/model.safetensors": "",
    "onnx/config.json": "{}",
    "model-Q4_K_M.gguf": "",
}
SHARDS = {"a.weight": "model-00001-of-000002.safetensors", "b.weight": "weights[1].safetensors"}
SHARDED = {
    **REPOSITORY,
    **dict.fromkeys(SHARDS.values(), ""),
    "model.safetensors.index.json": json.dumps({"weight_map": SHARDS}),
    "model.fp16-00001-of-00001.safetensors": "",
    "model.safetensors.index.fp16.json": "{}",
}


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A hub with one repository: the function that puts files into it, and the folder of the cache."""
    held: dict[str, str] = {}

    def download(name, *, allow_patterns, local_files_only, **_):
        assert name == "owner/name"
        for file, content in held.items():
            if not local_files_only and any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).write_text(content)
        if not any(tmp_path.iterdir()):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)

    def model_info(*_, **__):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in held])

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    return held.update, tmp_path


def fetched(folder: Path) -> set[str]:
    """Return the files in the cache."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_files_that_are_read_are_fetched(repository):
    hold, cache = repository
    hold(REPOSITORY | {"model.safetensors": ""})
    assert hub.resolve("owner/name", hub.MODEL_FILES) == cache
    assert fetched(cache) == {"config.json", "generation_config.json", "model.safetensors"}
    hub.resolve("owner/name", hub.TOKENIZER_FILES)
    assert fetched(cache) - {"config.json", "generation_config.json", "model.safetensors"} == {
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
        *("chat_template.jinja", "additional_chat_templates/tool.jinja"),
    }


def test_only_shards_that_the_index_names_are_fetched(repository):
    hold, cache = repository
    hold(SHARDED)
    hub.resolve("owner/name", hub.MODEL_FILES)
    index = "model.safetensors.index.json"
    assert fetched(cache) == {"config.json", "generation_config.json", index, *SHARDS.values()}


def test_a_single_file_goes_before_an_index_as_it_does_in_loading(repository):
    hold, cache = repository
    hold(SHARDED | {"model.safetensors": ""})
    hub.resolve("owner/name", hub.MODEL_FILES)
    assert not fetched(cache) & {*SHARDS.values()}


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("adapter_config.json", "an adapter (PEFT), which is not a model; load its base model"),
        ("model-Q4_K_M.gguf", "GGUF files (model-Q4_K_M.gguf) are not read; give the folder of safetensors"),
        ("params.json", "Meta's own format"),
        ("README.md", ""),
    ],
)
def test_a_repository_of_something_else_is_named_and_not_fetched(repository, file, what):
    hold, cache = repository
    hold({file: "", "tokenizer.json": "{}"})
    for files in (hub.MODEL_FILES, hub.MODEL_FILES + hub.TOKENIZER_FILES):
        with pytest.raises(
            ValueError, match=rf"^owner/name: holds no config\.json{re.escape(f': {what}') if what else '$'}"
        ):
            hub.resolve("owner/name", files)
    assert fetched(cache) == set()
    assert hub.resolve("owner/name", hub.TOKENIZER_FILES) == cache


def test_a_repository_without_a_tokenizer_says_so(repository):
    hold, _ = repository
    hold({"config.json": "{}", "model.gguf": ""})
    with pytest.raises(ValueError, match=r"^owner/name: holds no tokenizer\.json or tokenizer\.model: GGUF files"):
        hub.resolve("owner/name", hub.TOKENIZER_FILES)


def test_without_a_hub_the_cache_is_used(repository, monkeypatch):
    hold, cache = repository
    hold(REPOSITORY | {"model.safetensors": ""})
    hub.resolve("owner/name", hub.MODEL_FILES)

    def unreachable(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    assert hub.resolve("owner/name", hub.MODEL_FILES) == cache


def test_a_fault_of_another_kind_is_not_taken_for_the_hubs(repository, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(hub.HfApi, "model_info", broken)
    with pytest.raises(RuntimeError, match="something else"):
        hub.resolve("owner/name", hub.MODEL_FILES)


@pytest.mark.parametrize("answers", [True, False], ids=["refuses", "is silent"])
def test_a_hub_that_does_not_answer_is_not_waited_for_long(monkeypatch, tmp_path, answers):
    """Check that the hub is asked first: the download itself would try for minutes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if not answers:
            listener.listen()  # nobody accepts the connection
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        api = huggingface_hub.HfApi(endpoint=endpoint)
        monkeypatch.setattr(hub, "HfApi", lambda: api)
        monkeypatch.setattr(hub, "SECONDS_TO_ANSWER", 1.0)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        started = time.monotonic()
        with pytest.raises(
            ValueError, match=r"^owner/name: no such local folder, and it could not be downloaded from the hub \(.+\)$"
        ):
            hub.resolve("owner/name", hub.MODEL_FILES)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "no model named"),
        ("no-such-folder", "no such folder (and not a hub repository name, owner/model)"),
        ("./a/b", "no such folder"),
        ("FILE", "is a file; give the folder that holds config.json and the safetensors"),
        ("FILE.gguf", "GGUF is not read"),
    ],
)
def test_a_name_that_is_no_model_is_refused_with_the_reason(tmp_path, name, reason):
    if name.startswith("FILE"):
        (tmp_path / name).write_text("")
        name = str(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(reason)):
        hub.resolve(name, hub.MODEL_FILES)


# ---- loading by name


def test_no_such_folder(tmp_path):
    refusal(tmp_path / "absent", str(tmp_path / "absent"), "no such folder")


@pytest.mark.parametrize("name", ["", ".", "..", "owner/", "/owner", "a/b/c", "owner/na me", "../x"])
def test_names_that_are_neither_a_folder_nor_a_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(name)


def test_a_repository_that_the_hub_does_not_give(monkeypatch, tmp_path):
    refusal("no-such-owner/no-such-model", "no-such-owner/no-such-model")


def test_a_path_that_is_a_file(saved):
    refusal(saved / "model.safetensors", str(saved / "model.safetensors"), "is a file", "folder")


def test_a_path_may_be_a_string_or_relative(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    for path in (str(saved), saved.name, f"./{saved.name}/"):
        assert load_quietly(path).config.vocab_size == 48
