"""Build and load the C++ kernels for decoding on the CPU, `cpu.cpp`.

torch's own products (MKL, oneDNN) read weights at a third to a half of memory's speed, most of all on AMD. `few_rows`
reads them once, at that speed, for up to `ROWS` rows; `attend_newest` does as much for the keys and values of uncompiled
steps. They are compiled on first use, in two to three seconds, for the vectors of this processor, and kept beside what
torch compiles.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

ROWS = 16  # with more, products are bound by arithmetic, which torch does faster
DTYPES = torch.float32, torch.bfloat16, torch.float16
BIAS, NORM, RESIDUAL, GATED = 1, 2, 4, 8  # the parts of a product besides x and weight
_SOURCE = Path(__file__).with_suffix(".cpp")
_VECTORS = {  # what torch uses of this processor, and the compiler's names for it
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}

ops = torch.library.Library("llama_flex", "FRAGMENT")
ops.define(
    "few_rows(Tensor x, Tensor weight, Tensor bias, Tensor norm, Tensor residual, float eps, int parts) -> Tensor"
)
torch.library.register_fake(
    "llama_flex::few_rows",
    lambda x, weight, *rest: x.new_empty(*x.shape[:-1], len(weight) // (2 if rest[-1] & GATED else 1)),
    lib=ops,
)
ops.define(
    "attend_newest(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys,"
    " Tensor(b!) values, Tensor visible, Tensor page_table, bool paged) -> Tensor"
)
loaded = False  # read by compiled steps, which cannot build it


@functools.cache
def load() -> bool:
    """Build the kernel if need be and load it; return whether it can be used. If not, warn once, with the way out."""
    global loaded
    try:
        library = _load(_build())
    except OSError as error:
        lost = "products of few rows use torch's kernels, at about half the speed"
        warnings.warn(f"{error}; {lost}", stacklevel=2)
        return False
    assert library.register_kernels() == 0
    loaded = True
    return True


def describe() -> str:
    """Return which kernel computes products of few rows on the CPU, and why."""
    if not load():
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
    return torch.ops.llama_flex.few_rows(x, weight, *given, eps, parts)


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

    rotary: cosine and sine, float32 `[B, 1, T, D/2]`. visible: booleans `[B, 1 or H, T, up to S]`. page_table: the page
    of each 128 slots of a row, int32 `[B, blocks]`, if kv are a pool `[1, K, S, D]`. All else is in one dtype of DTYPES;
    sums in float32. `load` must have returned True.
    """
    pages = (slots, False) if page_table is None else (page_table, True)
    assert q.stride()[2:] == k.stride()[2:] == v.stride()[2:] == (q.shape[3], 1)
    return torch.ops.llama_flex.attend_newest(q, k, v, *rotary, slots, *kv, visible.contiguous(), *pages)


def _build() -> Path:
    """Compile the kernel, unless it has been for this compiler and processor; return the library's path. Raises
    OSError."""
    from . import code_cache  # it makes the folder, if it can

    compiler = shutil.which(name := os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    if compiler is None:
        raise FileNotFoundError(f"there is no C++ compiler {name!r}; install g++, or set CXX to one")
    vectors = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [compiler, "-O3", "-fno-math-errno", "-std=gnu++17", "-fPIC", "-shared", *vectors]
    command += [str(_SOURCE), f"-L{torch_lib}", "-ltorch_cpu"]
    about = "\0".join([*command, torch.__version__, str(os.stat(compiler).st_mtime_ns)]).encode()
    name = hashlib.sha256(_SOURCE.read_bytes() + about).hexdigest()[:32]
    path = Path(code_cache.folder()) / "llama_flex" / f"{name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                first = next(iter(done.stderr.strip().splitlines()), f"{compiler} failed")
                raise OSError(f"{_SOURCE.name} cannot be compiled: {first[:200]}")
            os.replace(made, path)  # whole or not at all, whoever else compiles it now
    return path


def _load(path: Path) -> ctypes.CDLL:
    """Load the library, built again if the file is damaged."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(_build()))
