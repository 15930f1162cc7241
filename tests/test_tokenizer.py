"""Loading a tokenizer from a folder, and saving it again."""

import shutil
from pathlib import Path

import pytest
from tokenizer_helpers import write_folder

from llama_flex.checkpoint.files import FolderError
from llama_flex.tokenizer import Tokenizer

# --- loading ---


def test_folders_that_hold_no_tokenizer(tmp_path, tokenizer_folders):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        Tokenizer.from_pretrained(tokenizer_folders["byte_level"] / "tokenizer.json")
    neither = r"has neither tokenizer\.json nor tokenizer\.model"
    with pytest.raises(ValueError, match=f"{neither}; fetch one of them into it"):
        Tokenizer.from_pretrained(tmp_path)
    for file, way in (("model-Q8_0.gguf", r"GGUF files \(model-Q8_0.gguf\)"), ("adapter_config.json", "an adapter")):
        (tmp_path / file).write_text("{}")
        with pytest.raises(ValueError, match=f"{neither}: {way}"):
            Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00\xff", "version https://git-lfs.github.com/spec/v1\n"])
def test_broken_files_are_named(tmp_path, tokenizer_folders, content):
    raw = content.encode("latin-1")
    whole = (tokenizer_folders["byte_level"] / "tokenizer.json").read_bytes()
    for broken in (raw, whole[: len(whole) // 2], whole.replace(b"<|im_end|>", b"<|im\xff|>")):
        pointer = "json: a Git LFS pointer.*git lfs pull" if broken.startswith(b"version") else None
        with pytest.raises(ValueError, match=pointer or r"tokenizer.json cannot be read as a tokenizer .*fetch"):
            Tokenizer.from_pretrained(write_folder(tmp_path / "json", None, tokenizer__json=broken))
    pointer = "a Git LFS pointer.*git lfs pull" if raw.startswith(b"version") else None
    with pytest.raises(ValueError, match=pointer or r"is not a sentencepiece model.*tokenizer.json beside it"):
        Tokenizer.from_pretrained(write_folder(tmp_path / "model", None, tokenizer__model=raw))
    if content != "{}":
        folder = write_folder(tmp_path / "config", None, tokenizer__json=whole, tokenizer_config__json=raw)
        with pytest.raises(ValueError, match=pointer or r"(not readable as JSON|expected a JSON object)"):
            Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["byte_level", "tiny_model"])
def test_wrong_ids_and_text_are_refused(tokenizer_folders, name):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folders[name])
    for id in (-1, tokenizer.vocab_size, 2**31, 2**70):
        for call in (tokenizer.token, lambda id: tokenizer.decode([5, id]), lambda id: tokenizer.stream().put(id)):
            with pytest.raises(ValueError, match=f"token id {id} is not in the vocabulary"):
                call(id)
    with pytest.raises(ValueError, match=r"lone surrogate .* at 1"):
        tokenizer.encode("a\ud83d")


# --- saving ---


@pytest.mark.parametrize("name", ["byte_level", "converted", "tiny_model"])
def test_saving_writes_the_files_that_were_loaded(tokenizer_folders, tmp_path, name):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folders[name])
    for _ in range(2):  # the second over the first
        tokenizer.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    saved = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert saved.keys() & {"tokenizer.json", "tokenizer.model"}
    for file, path in saved.items():
        assert path.read_bytes() == (tokenizer_folders[name] / file).read_bytes()
    text = "Hello world,  and <s>you</s>?"
    again = Tokenizer.from_pretrained(tmp_path / "new/folder")
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template


def test_saving_keeps_templates_in_folders_and_replaces_links(tokenizer_folders, tmp_path):
    source = write_folder(
        tmp_path / "a",
        {},
        tokenizer__json=(tokenizer_folders["byte_level"] / "tokenizer.json").read_text(),
        chat_template__jinja="{{ 1 }}",
    )
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ 2 }}")
    tokenizer = Tokenizer.from_pretrained(source)
    (tmp_path / "b").mkdir()
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "b" / "tokenizer.json").symlink_to(tmp_path / "kept.txt")
    tokenizer.save_pretrained(tmp_path / "b")
    again = Tokenizer.from_pretrained(tmp_path / "b")
    assert again.apply_chat_template([{"role": "user", "content": ""}], chat_template="tool") == "2"
    assert (tmp_path / "kept.txt").read_text() == "kept"


UNUSED = {
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
    "too large": (b"x" * (8 * 2**20 + 1), "larger than 8 MiB"),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_file_that_is_not_used_matters_only_for_saving(tokenizer_folders, tmp_path, kind):
    """Check a tokenizer.model beside a tokenizer.json, which is not read."""
    content, said = UNUSED[kind]
    source = Path(shutil.copytree(tokenizer_folders["byte_level"], tmp_path / "a"))
    (source / "tokenizer.model").write_bytes(content)
    tokenizer = Tokenizer.from_pretrained(source)
    target = Path(shutil.copytree(tokenizer_folders["converted"], tmp_path / "b"))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(FolderError, match=f"a/tokenizer.model: {said}"):
        tokenizer.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    tokenizer.save_pretrained(source)  # where it is already


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json"])
def test_obstacles_to_saving_are_found_before_anything_is_written(tokenizer_folders, tmp_path, name):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folders["converted"])
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name} is a directory; remove it, or save elsewhere"):
        tokenizer.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; save to a folder"):
        tokenizer.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("name", ["byte_level", "tiny_model"])
def test_saving_over_another_tokenizer_leaves_nothing_of_it(tokenizer_folders, tmp_path, name):
    target = write_folder(
        tmp_path / "model",
        {"bos_token": "<other>", "chat_template": "{{ 1 }}"},
        tokenizer__json=(tokenizer_folders["converted"] / "tokenizer.json").read_text(),
        tokenizer__model=tokenizer_folders["tiny_model"].joinpath("tokenizer.model").read_bytes(),
        special_tokens_map__json='{"eos_token": "<other>"}',
        added_tokens__json='{"<other>": 5000}',
        chat_template__jinja="{{ 1 }}",
        config__json="{}",
    )
    outside = write_folder(tmp_path / "outside", None, tool__jinja="kept")
    (target / "additional_chat_templates").symlink_to(outside)
    (target / "chat_template.json").symlink_to("gone")
    tokenizer = Tokenizer.from_pretrained(tokenizer_folders[name])
    tokenizer.save_pretrained(target)
    names = {path.name for path in tokenizer_folders[name].iterdir()}
    assert {path.name for path in target.iterdir()} == names | {"config.json"}
    again = Tokenizer.from_pretrained(target)
    text = "Hello <s> <other> é日"
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.vocab_size, again.chat_template) == (tokenizer.vocab_size, tokenizer.chat_template)
    assert (outside / "tool.jinja").read_text() == "kept"


def test_saving_where_it_was_loaded_from_changes_nothing(tokenizer_folders, tmp_path, monkeypatch):
    source = Path(shutil.copytree(tokenizer_folders["byte_level"], tmp_path / "a"))
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.from_pretrained("a")
    (source / "chat_template.jinja").write_text("{{ 1 }}")  # added since
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir("/")
    for folder in (source, tmp_path / "link"):
        tokenizer.save_pretrained(folder)
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before
    tokenizer.save_pretrained(tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == before.keys() - {"chat_template.jinja"}


def test_a_tokenizer_whose_files_are_gone_or_others_is_not_saved(tokenizer_folders, tmp_path):
    source = Path(shutil.copytree(tokenizer_folders["byte_level"], tmp_path / "a"))
    tokenizer = Tokenizer.from_pretrained(source)
    Tokenizer.from_pretrained(tokenizer_folders["converted"]).save_pretrained(source)
    for target in (source, tmp_path / "b"):
        changed = r"tokenizer.json: changed since this tokenizer was loaded; load it again$"
        with pytest.raises(FolderError, match=changed):
            tokenizer.save_pretrained(target)
    shutil.rmtree(source)
    with pytest.raises(FolderError, match=r"a/tokenizer.json: removed since this tokenizer was loaded; restore it, or"):
        tokenizer.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
