"""Files of a folder that nobody vouches for: links, what stands in their place, and messages of one line."""

import json
import os
import re
from pathlib import Path

import pytest
from checkpoint_helpers import assert_same_tensors, load_quietly, refusal, shard, tensors_of
from config_helpers import write
from safetensors.torch import load_file

from llama_flex import GenerationConfig, LlamaConfig, Tokenizer
from llama_flex.checkpoint.config_rules import ConfigError

# ---- links and other entries


@pytest.mark.parametrize("kind", [LlamaConfig, GenerationConfig])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "links to /dev/zero"),
        (lambda path: os.symlink("/etc/passwd", path), "links to /etc/passwd"),
        (lambda path: os.symlink(path.name, path), "cannot be opened"),
        (lambda path: os.symlink("gone", path), "no such file"),
    ],
    ids=["fifo", "directory", "device", "file elsewhere", "loop", "broken link"],
)
def test_only_a_regular_file_of_the_folder_is_opened(kind, make, named, tmp_path):
    path = tmp_path / ("config.json" if kind is LlamaConfig else "generation_config.json")
    make(path)
    with pytest.raises(ConfigError, match=named) as caught:
        kind.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_links_as_in_the_hubs_cache_are_followed(sharded, shared, folder, tmp_path):
    source = load_file(folder / "model.safetensors")
    if sharded:
        shard(folder)
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = cache / "blobs" / f"{number:064x}"  # a blob's name has no suffix
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        if shared:  # as in huggingface_hub 2, where repositories share blobs
            (tmp_path / "blobs" / "00").mkdir(parents=True, exist_ok=True)
            blob.rename(tmp_path / "blobs" / "00" / blob.name)
            blob.symlink_to(Path("../../blobs/00") / blob.name)
    assert_same_tensors(tensors_of(load_quietly(snapshot)), source)


def test_a_folder_that_is_a_link_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert load_quietly(tmp_path / "link").config.vocab_size == 48


# ---- what stands in the place of a file or a folder


def test_a_git_lfs_pointer_is_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 538090408\n"
    (folder / "model.safetensors").write_text(pointer)
    refusal(folder, "model.safetensors: a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("page", ["<!DOCTYPE html>\n<html class='x'>", "\n <html lang='en'>"])
def test_a_web_page_in_the_place_of_a_file_is_named(folder, file, page):
    (folder / file).write_text(page + "<head></head><body>model.safetensors</body></html>" * 99)
    said = f"{folder / file}: a web page, not the file itself; fetch the file (on the hub under /resolve/, not /blob/)"
    if file != "tokenizer.json":
        refusal(folder, said)
    else:
        with pytest.raises(ValueError, match=re.escape(said)):
            Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("file", ["model-Q8_0.gguf", "adapter_model.safetensors"])
def test_a_folder_with_a_config_and_weights_of_another_kind_is_named(folder, file):
    (folder / "model.safetensors").rename(folder / file)
    if file.startswith("adapter"):
        (folder / "adapter_config.json").write_text("{}")
    refusal(folder, "GGUF files" if file.endswith("gguf") else "an adapter (PEFT)", str(folder))


@pytest.mark.parametrize(
    ("file", "way"),
    [
        ("adapter_config.json", "load its base model"),
        ("model-Q4_K_M.gguf", "GGUF files"),
        ("params.json", "Meta's own format"),
    ],
)
def test_a_folder_of_another_kind_is_named_with_the_way_out(tmp_path, file, way):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError, match=f"config.json: no such file: .*{way}"):
        LlamaConfig.from_pretrained(tmp_path)


def test_a_folder_that_cannot_be_listed_is_only_said_to_lack_the_file(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ConfigError, match=r"config\.json: no such file$"):
        LlamaConfig.from_pretrained(tmp_path)


# ---- text from files


@pytest.mark.parametrize(
    "key", ["architectures", "hidden_act", "rope_scaling", "dtype", "eos_token_id", "rms_norm_eps"]
)
@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, json.dumps("x" * 10**6), json.dumps("a\nb\x1b[31m"), "1e999"])
def test_a_value_that_cannot_be_shown_is_shown_in_one_short_line(key, value, tmp_path):
    write(tmp_path, f'{{"{key}": {value}}}')
    try:
        LlamaConfig.from_pretrained(tmp_path)
    except ConfigError as error:
        message = str(error)
        assert str(tmp_path / "config.json") in message
        assert message.isprintable()
        assert len(message) < 2100


def test_keys_are_shown_in_warnings_of_one_short_line(tmp_path):
    write(tmp_path, {"a\nb\x1b[31m": 1, "c" * 10**6: 2, "rope_parameters": {"rope_type": "default", "d\ne": 3}})
    with pytest.warns(UserWarning, match="use") as caught:
        LlamaConfig.from_pretrained(tmp_path)
    assert len(caught) == 2
    for warning in caught:
        assert str(warning.message).isprintable()
        assert len(str(warning.message)) < 2100
