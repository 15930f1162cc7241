"""Files of untrusted folders: which of them are read, up to what size, and errors of one line."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

MAX_ERROR_CHARACTERS = 1900
_LFS = b"version https://git-lfs.github.com/spec/"  # what Git LFS puts in place of a large file
_PAGES = (b"<!doctype html", b"<html")


class FolderError(ValueError):
    """An error in the files of a folder. Its text is one printable line, whatever the files hold."""

    def __init__(self, text: object) -> None:
        super().__init__(one_line(text))


def one_line(text: object) -> str:
    """Return text from a file as one printable line: fold white space, escape what does not print, cut if too long."""
    text = str(text)
    words = " ".join(text[:MAX_ERROR_CHARACTERS].split())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return escaped if len(text) <= MAX_ERROR_CHARACTERS else f"{escaped[:MAX_ERROR_CHARACTERS]} ..."


def regular(path: Path, folder: Path | None = None) -> str:
    """Return the real path of a file, links followed. folder: the one it belongs to (default: the one it is in).

    Raises FolderError unless it is a regular file in that folder, or a blob a snapshot in the hub's cache links to.
    """
    home, file = os.path.realpath(folder or path.parent), os.path.realpath(path)
    homes = [home]
    if os.path.basename(os.path.dirname(home)) == "snapshots":
        repository = os.path.dirname(os.path.dirname(home))
        homes += [os.path.join(place, "blobs") for place in (repository, os.path.dirname(repository))]
    if not any(file.startswith(os.path.join(place, "")) for place in homes):
        raise FolderError(
            f"{path}: links to {file}, outside its folder, and is not followed; replace the link with the file"
        )
    try:
        status = os.stat(file)
    except FileNotFoundError:
        raise FolderError(f"{path}: no such file") from None
    except OSError as error:
        raise FolderError(f"{path}: cannot be opened ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise FolderError(f"{path}: not a regular file")
    return file


def read(path: Path, most: int, folder: Path | None = None) -> bytes:
    """Return the bytes of a `regular` file. Raises FolderError, also if there are more than `most`."""
    try:
        with open(regular(path, folder), "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > most:
        raise FolderError(f"{path}: larger than {most >> 20} MiB, the limit for this file")
    check_not_in_place(path, content[:256])
    return content


def make_folder(folder: Path, names: Iterable[str]) -> None:
    """Make a folder for files of these names. Raises OSError if a file or a folder is in the way."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; save to a folder")
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a directory; remove it, or save elsewhere")
    folder.mkdir(parents=True, exist_ok=True)


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically: an interruption leaves either the old file or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)  # an existing one could be a link to anywhere
    try:
        temporary.write_bytes(content)
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_not_in_place(path: Path, start: bytes) -> None:
    """Raise FolderError if a file starts like one that is often saved in place of the real one: a Git LFS pointer, or
    the web page about it."""
    if start.startswith(_LFS):
        raise FolderError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")
    if start.lstrip().lower().startswith(_PAGES):
        raise FolderError(
            f"{path}: a web page, not the file itself; fetch the file (on the hub under /resolve/, not /blob/)"
        )


def names_in(folder: Path) -> list[str]:
    """List a folder, sorted; return [] if it is not a folder or cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def what_it_is(names: Iterable[str]) -> str:
    """Explain what a folder or repository of these files, without config.json, is instead, and what to do; return "" if
    unknown."""
    names = sorted(names)
    if "adapter_config.json" in names:
        return (
            ": an adapter (PEFT), which is not a model; load its base model, and then the adapter (--adapter, or "
            "model.adapters.load)"
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f": GGUF files ({gguf[0]}) are not read; give the folder of safetensors that they were made of"
    if "params.json" in names:
        return ": Meta's own format; give the folder that Hugging Face has of the same model"
    return ""
