"""Give torch a writable folder for compiled code before its compiler is imported, which writes to it.

Importing this module is enough; it must come before any import of `torch._dynamo` or `torch._inductor`.
"""

from __future__ import annotations

import atexit
import getpass
import logging
import os
import re
import shutil
import tempfile
import warnings

_NAME = "TORCHINDUCTOR_CACHE_DIR"


def _make_writable() -> None:
    """Point torch at a temporary folder for compiled code if its own is not writable: without a writable one, its
    compiler cannot even be imported."""
    home = folder()
    try:
        os.makedirs(home, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        os.environ[_NAME] = tempfile.mkdtemp(prefix="torchinductor_")
        atexit.register(shutil.rmtree, os.environ[_NAME], ignore_errors=True)
        warnings.warn(
            f"{home}, where torch keeps compiled code, cannot be written to ({error.strerror}); what is compiled now "
            f"is not kept; set {_NAME} to another folder",
            stacklevel=1,
        )


def folder() -> str:
    """Return the folder, by default under the name that torch gives it; unlike torch's function, do not create it."""
    if given := os.environ.get(_NAME):
        return given
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # such as in a container whose user has no name
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


class _OneLine(logging.Filter):
    """A filter that cuts torch's tracebacks for files that it cannot load and recompiles to one line, logged once."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "unable to load compiled graph" not in record.getMessage():
            return True
        record.msg, record.args, record.exc_info = "files in %s are damaged: compiled anew", (folder(),), None
        first, self.said = not self.said, True
        return first


_make_writable()
logging.getLogger("torch._inductor.codecache").addFilter(_OneLine())
