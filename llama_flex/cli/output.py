"""The output of results and errors."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import IO, NoReturn

from .prompts_file import UsageError


def refuse(error: Exception) -> int:
    """Print an error that the user can fix, in one line; return the exit code for it."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def leave(code: int) -> NoReturn:
    """Exit, at once even if a thread still compiles, for which the interpreter would wait; all output is flushed."""
    if any(thread.daemon and thread.name.startswith("llama_flex") for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


class Output:
    """stdout or a file, opened before the model loads; a file keeps its content until there is something to write."""

    def __init__(self, path: Path | None, append: bool) -> None:
        self.path, self.append = path, append
        self.name = "stdout" if path is None else f"--output {path}"
        self.existed = path is not None and path.exists()
        self.written = False
        if path is None and sys.stdout is None:
            raise UsageError("stdout is closed; give --output")
        try:
            self.file: IO[str] = sys.stdout if path is None else path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write to {self.name}: {error.strerror}") from None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is None:
            return
        try:
            self.file.close()
        except OSError as error:  # what could not be written is still in the buffer
            raise UsageError(f"cannot write to {self.name}: {error.strerror}") from None
        if not self.written and not self.existed:
            self.path.unlink()

    def write(self, text: str) -> None:
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)  # a terminal may not support every character
        try:
            if self.path is not None and not self.written and not self.append and self.path.is_file():
                self.file.truncate(0)
            self.written = True
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(f"cannot write to {self.name}: {error.strerror}") from None
