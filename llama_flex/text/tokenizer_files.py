"""Read the JSON files beside a tokenizer: special tokens, added tokens, chat templates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from ..checkpoint import hub
from ..checkpoint.config_rules import MAX_JSON_BYTES, read_json
from ..checkpoint.files import FolderError, make_folder, read, replace

# Limits of memory and time while reading; those on a tokenizer.json's content are in `tokenizer_json`.
MAX_TOKENIZER_BYTES = 48 * 2**20
MAX_SENTENCEPIECE_BYTES = 8 * 2**20
MAX_IDS = 2**22
_LARGEST = {"tokenizer.json": MAX_TOKENIZER_BYTES, "tokenizer.model": MAX_SENTENCEPIECE_BYTES}


class TokenizerError(FolderError):
    """A folder whose tokenizer is absent, damaged or malformed."""


def read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {"bos_token": "<s>", ...}: the configuration's entries named `..._token`, the standard names first."""
    named = {**dict.fromkeys(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), **config}
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        named |= extra
    contents = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in named.items()
        if key.endswith("_token")
    }
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def extra_special_tokens(config: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [] if isinstance(extra, dict) else [as_added_token(token, special=True) for token in extra]


def as_added_token(value: str | Mapping[str, Any], *, special: bool) -> tokenizers.AddedToken:
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=special, normalized=not special)
    flags = {key: value[key] for key in ("lstrip", "rstrip", "single_word", "normalized") if key in value}
    return tokenizers.AddedToken(value["content"], special=special or value.get("special", False), **flags)


def added_tokens(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> dict[int, tokenizers.AddedToken]:
    """Return added tokens by id: from tokenizer_config.json, or from added_tokens.json, which older folders have
    instead."""
    if "added_tokens_decoder" in config:
        return {_id(int(id)): as_added_token(t, special=False) for id, t in config["added_tokens_decoder"].items()}
    special = {*special_tokens.values(), *(token.content for token in extra_special_tokens(config))}
    contents = read_if_there(folder / "added_tokens.json")
    return {_id(id): as_added_token(content, special=content in special) for content, id in contents.items()}


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_IDS:
        raise ValueError(f"an added token has the invalid id {value!r:.40}")
    return value


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return chat templates by name. Template files override tokenizer_config.json, and that overrides
    chat_template.json, which processors write."""
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if os.path.lexists(folder / "chat_template.jinja"):
        paths["default"] = folder / "chat_template.jinja"
    if paths:
        return {name: _text(path, folder) for name, path in paths.items()}
    template = config.get("chat_template")
    if template is None:
        template = read_if_there(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    named = template if isinstance(template, dict) else {} if template is None else {"default": template}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise TypeError("a chat template or its name is not a string")
    return named


def _text(path: Path, folder: Path) -> str:
    try:
        return read(path, MAX_JSON_BYTES, folder).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text ({error})") from None


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def find_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the tokenizer's files in a folder, each with a stamp that changes when it is rewritten."""
    return {str(path.relative_to(folder)): _stamp(path) for path in _files_in(folder)}


def copy_files(files: Mapping[str, tuple[int, ...]], source: Path, target: Path) -> None:
    """Copy files to another folder, and remove another tokenizer's there. Raises FolderError, and writes nothing, if
    the stamp of one has changed; OSError if writing fails."""
    for name, stamp in files.items():
        if (now := _stamp(source / name)) != stamp:
            what = "changed since this tokenizer was loaded; load it again"
            gone = "removed since this tokenizer was loaded; restore it, or load the tokenizer from elsewhere"
            raise TokenizerError(f"{source / name}: {what if now else gone}")
    if target.is_dir() and target.samefile(source):
        return
    contents = {name: read(source / name, _LARGEST.get(name, MAX_JSON_BYTES), source) for name in files}
    make_folder(target, (*hub.TOKENIZER_FILES, *contents))
    for path in {(target / name).parent for name in hub.TOKENIZER_FILES} - {target}:
        if path.is_symlink():  # nothing outside the target is written or removed
            path.unlink()
    for name, content in contents.items():
        (target / name).parent.mkdir(exist_ok=True)
        replace(target / name, content)
    for path in _files_in(target):
        if str(path.relative_to(target)) not in contents:
            path.unlink()


def _files_in(folder: Path) -> list[Path]:
    """List the tokenizer files in a folder, links included."""
    paths = {path for name in hub.TOKENIZER_FILES for path in (folder / name, *folder.glob(name))}
    return sorted(path for path in paths if path.is_symlink() or (path.exists() and not path.is_dir()))


def _stamp(path: Path) -> tuple[int, ...]:
    """Return a stamp that changes when a file is rewritten; () if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
