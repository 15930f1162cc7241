"""The files of a folder that nobody vouches for: which of them are read, up to what size, and errors of one line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_ERROR_CHARACTERS = 1900


class FolderError(ValueError):
    """Something wrong with the files of a folder. Its text is one printable line, whatever the files hold."""

    def __init__(self, text: object) -> None:
        super().__init__(one_line(text))


def one_line(text: object) -> str:
    """Text that may come from a file: white space folded, what does not print escaped, and not too long."""
    text = str(text)
    words = " ".join(text[:MAX_ERROR_CHARACTERS].split())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return escaped if len(text) <= MAX_ERROR_CHARACTERS else f"{escaped[:MAX_ERROR_CHARACTERS]} ..."


def regular(path: Path, folder: Path | None = None) -> str:
    """The file that `path` is, links followed; folder: the one it belongs to (default: the one it is in).

    Raises FolderError unless it is a regular file in that folder, or a blob a snapshot in the hub's cache links to.
    """
    home, file = os.path.realpath(folder or path.parent), os.path.realpath(path)
    homes = [home]
    if os.path.basename(os.path.dirname(home)) == "snapshots":
        repository = os.path.dirname(os.path.dirname(home))
        homes += [os.path.join(place, "blobs") for place in (repository, os.path.dirname(repository))]
    if not any(file.startswith(os.path.join(place, "")) for place in homes):
        raise FolderError(f"{path}: links to {file}, out of its folder, and is not followed; put the file there itself")
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
    """The bytes of a `regular` file. Raises FolderError, also if there are more than `most`."""
    try:
        with open(regular(path, folder), "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > most:
        raise FolderError(f"{path}: larger than {most >> 20} MiB, which no such file is")
    return content
