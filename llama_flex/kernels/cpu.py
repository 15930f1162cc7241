"""Build and load the C++ kernels for decoding on the CPU, `cpu.cpp`.

torch's own products (MKL, oneDNN) read weights at a third to a half of memory's speed, most of all on AMD. `few_rows`
reads them once, at that speed, for up to `ROWS` rows; `attend_newest` is the dense attention of uncompiled steps. They
are compiled on first use, in a second or two, for the vectors of this processor, and kept beside what torch compiles.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch._ops import OpOverload

ROWS = 16  # with more, products are bound by arithmetic, which torch does faster
DTYPES = torch.float32, torch.bfloat16, torch.float16  # each has a library of its own
BIAS, NORM, RESIDUAL, GATED = 1, 2, 4, 8  # the parts of a product besides x and weight
_SOURCE = Path(__file__).with_suffix(".cpp")
_VECTORS = {  # what torch uses of this processor, and the compiler's names for it
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
_NUMBERS = {  # what `_SOURCE` calls them
    torch.float32: ["-DNUMBERS=Float32"],
    torch.bfloat16: ["-DNUMBERS=BFloat16"],
    torch.float16: ["-DNUMBERS=Float16", "-DFLOAT16=1"],
}
ops = torch.library.Library("llama_flex", "FRAGMENT")
loaded: set[torch.dtype] = set()  # read by compiled steps, which cannot build it


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _define(dtype: torch.dtype) -> tuple[OpOverload, OpOverload]:
    product, attention = f"few_rows_{_name(dtype)}", f"attend_newest_{_name(dtype)}"
    ops.define(
        f"{product}(Tensor x, Tensor weight, Tensor bias, Tensor norm, Tensor residual, float eps, int parts) -> Tensor"
    )
    torch.library.register_fake(
        f"llama_flex::{product}",
        lambda x, weight, *rest: x.new_empty(*x.shape[:-1], len(weight) // (2 if rest[-1] & GATED else 1)),
        lib=ops,
    )
    ops.define(
        f"{attention}(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys,"
        " Tensor(b!) values, Tensor visible, Tensor page_table, bool paged) -> Tensor"
    )
    defined = torch.ops.llama_flex
    return getattr(defined, product).default, getattr(defined, attention).default


_OPS = {dtype: _define(dtype) for dtype in DTYPES}
_builds: dict[torch.dtype, _Build] = {}  # under way
_loading = threading.Lock()


def prepare(weight: Tensor) -> None:
    """Start to build the kernels for a weight, if need be, while something else is done; `load` waits for them."""
    dtype = weight.dtype
    if weight.device.type == "cpu" and dtype in DTYPES and dtype not in loaded and dtype not in _builds:
        with contextlib.suppress(OSError):  # which `load` reports, once they are missed
            _builds[dtype] = _Build(dtype)


@functools.cache
def load(dtype: torch.dtype) -> bool:
    """Build the kernels for a dtype of DTYPES if need be, load them, and return whether they can be used. If not, warn
    once, with the way out."""
    with _loading:
        if dtype in loaded:
            return True
        try:
            library = _load(dtype)
        except OSError as error:
            lost = "products of few rows and dense attention use torch's, at about half the speed"
            warnings.warn(f"{error}; {lost}", stacklevel=2)
            return False
        assert library.register_kernels() == 0
        loaded.add(dtype)
        return True


def describe(dtype: torch.dtype) -> str:
    """Return which kernels compute products of few rows and dense attention on the CPU, and why."""
    if dtype not in DTYPES:
        return f"torch's: cpu.cpp has none for {_name(dtype)}"
    if not load(dtype):
        return "torch's: cpu.cpp could not be compiled"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"cpu.cpp for {vectors} up to {ROWS} rows; torch's for more, which are bound by arithmetic"


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Return residual + weight @ norm(x) + bias, or SwiGLU of it: x `[..., in]`, weight `[out, in]` -> `[..., out]`.

    All in one dtype of DTYPES; sums in float32. `load` must have returned True.
    """
    parts = GATED * gated
    x, weight = x.contiguous(), weight.contiguous()
    if bias is not None:
        bias, parts = bias.contiguous(), parts | BIAS
    if norm is not None:
        norm, parts = norm.contiguous(), parts | NORM
    if residual is not None:
        residual, parts = residual.contiguous(), parts | RESIDUAL
    # A tensor stands for each that is not given: `parts` says so, and the kernel's interface knows no optional ones.
    given = (x if bias is None else bias, x if norm is None else norm, x if residual is None else residual)
    return _OPS[x.dtype][0](x, weight, *given, eps, parts)


def can_attend(q: Tensor, keys: Tensor, cos: Tensor) -> bool:
    """Return whether `attend_newest` computes attention of q to a cache of keys."""
    same = q.dtype == keys.dtype and q.dtype in DTYPES and cos.dtype == torch.float32
    return same and q.device.type == "cpu" and load(q.dtype)


def attend_newest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    visible: Tensor,
    page_table: Tensor | None = None,
) -> Tensor:
    """Rotate new queries `[B, T, H, D]` and keys `[B, T, K, D]`, store keys and values in the given slots `[B, T]` of
    kv, both `[B, K, S, D]`, and return what attention is by definition, `[B, T, H * D]`.

    rotary: cosine and sine, float32 `[B, 1, T, D/2]`. visible: booleans `[B, 1 or H, T, up to S]`. page_table: int32
    `[B, blocks]`, the page of each 128 slots of a row, if kv are a pool `[1, K, S, D]`. All else is in one dtype of
    DTYPES; sums in float32. `load` must have returned True.
    """
    pages = (slots, False) if page_table is None else (page_table, True)
    assert q.stride()[2:] == k.stride()[2:] == v.stride()[2:] == (q.shape[3], 1)
    return _OPS[q.dtype][1](q, k, v, *rotary, slots, *kv, visible.contiguous(), *pages)


class _Build:
    """The compilation of a library by a process of its own; there is none if the library is there already."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Raises OSError if there is no compiler."""
        from . import code_cache  # it makes the folder, if it can

        self.compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        compiler = shutil.which(self.compiler)
        if compiler is None:
            raise FileNotFoundError(f"there is no C++ compiler {self.compiler!r}; install g++, or set CXX to one")
        vectors = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
        command = [compiler, "-O3", "-fno-math-errno", "-std=gnu++17", "-fPIC", "-shared", *vectors, *_NUMBERS[dtype]]
        command += [f'-DNAME="{_name(dtype)}"', str(_SOURCE), f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        about = "\0".join([*command, torch.__version__, str(os.stat(compiler).st_mtime_ns)]).encode()
        name = hashlib.sha256(_SOURCE.read_bytes() + about).hexdigest()[:32]
        self.path = Path(code_cache.folder()) / "llama_flex" / f"{name}.so"
        if self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(dir=self.path.parent))
        # In a session of its own, so that it can be ended with all that it has started.
        command += ["-o", str(self.scratch / name)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        atexit.register(self.stop)

    def finish(self) -> Path:
        """Wait for the compiler; return the library's path. Raises OSError."""
        if self.path.exists():
            return self.path
        try:
            _, said = self.process.communicate()
            if self.process.returncode:
                first = next(iter(said.strip().splitlines()), f"{self.compiler} failed")
                raise OSError(f"{_SOURCE.name} cannot be compiled: {first[:200]}")
            os.replace(self.scratch / self.path.stem, self.path)  # whole or not at all, whoever else compiles it now
        finally:
            self.stop()
        return self.path

    def stop(self) -> None:
        """End the compiler, and leave nothing of it."""
        atexit.unregister(self.stop)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _load(dtype: torch.dtype) -> ctypes.CDLL:
    """Load the library, built again if the file is damaged."""
    path = (_builds.pop(dtype, None) or _Build(dtype)).finish()
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(_Build(dtype).finish()))
