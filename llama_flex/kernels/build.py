"""Compile the C++ kernels for the CPU, `cpu.cpp`, without torch: its import takes longer, meanwhile."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_SOURCE = Path(__file__).with_name("cpu.cpp")
_NUMBERS = {  # the dtypes, each of which has a library of its own, and what `_SOURCE` calls them
    "float32": ["-DNUMBERS=Float32"],
    "bfloat16": ["-DNUMBERS=BFloat16", "-DBFLOAT16=1"],
    "float16": ["-DNUMBERS=Float16", "-DFLOAT16=1"],
}
_VECTORS = {  # of ATEN_CPU_CAPABILITY, which limits what torch uses, and the compiler's names for them
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
_begun: dict[str, Build] = {}
_lock = threading.Lock()


class Build:
    """The compilation of a dtype's library; nothing to do if it is there already."""

    def __init__(self, dtype: str) -> None:
        """Raises OSError if there is no compiler."""
        from . import code_cache  # it makes the folder, if it can

        name, *options = shlex.split(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
        compiler = shutil.which(name)
        if compiler is None:
            raise FileNotFoundError(f"there is no C++ compiler {name!r}; install g++, or set CXX to one")
        vectors, processor = _vectors()
        command = [compiler, *options, "-O3", "-fno-math-errno", "-std=gnu++17", "-fPIC", "-shared", *vectors]
        command += [*_NUMBERS[dtype], f'-DNAME="{dtype}"', str(_SOURCE), f"-L{_torch_folder() / 'lib'}", "-ltorch_cpu"]
        about = [*command, importlib.metadata.version("torch"), str(os.stat(compiler).st_mtime_ns), processor]
        library = hashlib.sha256(_SOURCE.read_bytes() + "\0".join(about).encode()).hexdigest()[:32]
        self.path = _folder_in(code_cache.folder()) / f"{library}.so"
        self._owner, self._process = os.getpid(), None
        if self.path.exists():
            return
        self._scratch = Path(tempfile.mkdtemp(dir=self.path.parent))
        command += ["-o", str(self._scratch / library)]
        try:  # in a session of its own, so that it can be ended with all that it has started
            self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        except OSError:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        atexit.register(self.stop)

    def finish(self) -> Path:
        """Wait for the compiler; return the library's path. Raises OSError."""
        if self._process is None:
            return self.path
        try:
            _, said = self._process.communicate()
            if self._process.returncode:
                first = next(iter(said.strip().splitlines()), "the compiler failed")
                raise OSError(f"{_SOURCE.name} cannot be compiled: {first[:200]}")
            os.replace(self._scratch / self.path.stem, self.path)  # whole or not at all, whoever else compiles it now
        finally:
            self.stop()
        return self.path

    def stop(self) -> None:
        """End the compiler, if it runs, and remove its temporary folder."""
        atexit.unregister(self.stop)
        if self._process is None or self._owner != os.getpid():  # a fork has inherited this
            return
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
            self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)


def begin(dtype: str) -> None:
    """Begin to build the library of a dtype, if need be, while something else is done."""
    with _lock, contextlib.suppress(OSError):  # which `finish` raises, once the library is missed
        if dtype in _NUMBERS and dtype not in _begun:
            _begun[dtype] = Build(dtype)


def finish(dtype: str) -> Path:
    """Build the library of a dtype, unless it has been for this compiler and processor; return its path. Raises
    OSError."""
    with _lock:
        begun = _begun.pop(dtype, None)
        while _begun:  # for a dtype that was guessed
            _begun.popitem()[1].stop()
    path = (begun or Build(dtype)).finish()
    return path if path.exists() else Build(dtype).finish()  # somebody may clean the folder meanwhile


@functools.cache
def _folder_in(home: str) -> Path:
    """Return the folder of libraries: a temporary one if others could put code where torch keeps its own."""
    folder = Path(home) / "llama_flex"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        found = [path.stat() for path in (folder.parent, folder)]
        if any(x.st_uid != os.getuid() or x.st_mode & stat.S_IWOTH for x in found):
            folder = Path(tempfile.mkdtemp(prefix="llama_flex_"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _vectors() -> tuple[list[str], str]:
    """Return the compiler's options for this processor's vectors, and what tells the processor from others."""
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    if limit is not None or platform.machine() not in ("x86_64", "AMD64"):
        return _VECTORS.get(limit or "", []), ""
    return ["-march=native"], _processor()


@functools.cache
def _processor() -> str:
    """Describe the processor: a folder of compiled code may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None  # it is required
    return Path(str(spec.origin)).parent
