"""The folder of compiled code: one that cannot be written to is replaced, and damaged files are told in one line."""

import getpass
import logging
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from llama_flex.kernels import code_cache

NAMELESS = """
import os, pwd

def none(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = none
for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR"):
    os.environ.pop(name, None)
import llama_flex
llama_flex.Engine
"""
DAMAGED = """
import logging
import llama_flex
llama_flex.Engine
for _ in range(2):
    try:
        1 / 0
    except ZeroDivisionError:
        log = logging.getLogger("torch._inductor.codecache")
        log.warning("fx graph cache unable to load compiled graph", exc_info=True)
"""


def python(code: str, **environment: str) -> str:
    """Run Python code in a process of its own; return what it prints to stderr, warnings of llama_flex included."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stderr


def test_a_temporary_folder_stands_in_for_one_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "x")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    with pytest.warns(UserWarning, match=rf"^{folder}, where torch keeps .* \(Not a directory\); what is compiled now"):
        code_cache._make_writable()
    assert code_cache.folder() != folder
    assert os.path.isdir(code_cache.folder())


def test_the_folder_of_a_user_without_a_name_has_the_users_number(monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 1")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(getpass, "getuser", nameless)
    assert code_cache.folder().endswith(f"torchinductor_uid_{os.getuid()}")


def test_only_the_first_record_of_damaged_files_is_logged(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    one_line, level = code_cache._OneLine(), logging.WARNING
    texts = ["fx graph cache unable to load compiled graph", "something else"] * 2
    records = [logging.LogRecord("torch", level, __file__, 1, text, (), (OSError, OSError(), None)) for text in texts]
    assert [one_line.filter(record) for record in records] == [True, True, False, True]
    assert records[0].getMessage() == f"files in {tmp_path} are damaged: compiled anew"
    assert records[0].exc_info is None


@pytest.mark.exhaustive
def test_the_folder_of_compiled_code_may_be_unwritable_or_its_user_nameless(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "x")
    err = python("import llama_flex; llama_flex.Engine", TORCHINDUCTOR_CACHE_DIR=folder)
    assert f"{folder}, where torch keeps compiled code, cannot be written to (Not a directory); what is" in err
    assert python(NAMELESS) == ""


@pytest.mark.exhaustive
def test_damaged_files_of_compiled_code_are_one_line(tmp_path):
    err = python(DAMAGED, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert err.endswith(f"] files in {tmp_path} are damaged: compiled anew\n")
    assert err.count("\n") == 1
