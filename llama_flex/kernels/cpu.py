"""Load and call the C++ kernels for the CPU, `cpu.cpp`.

torch's own products (MKL, oneDNN) read weights at a third to a half of memory's speed, most of all on AMD. `few_rows`
reads them once, at that speed, for up to `ROWS` rows; `attend_newest` is the dense attention of uncompiled steps. They
are compiled on first use, in a second or two, for the vectors of this processor, and kept beside what torch compiles.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import build

ROWS = 16  # with more, products are bound by arithmetic, which torch does faster
DTYPES = torch.float32, torch.bfloat16, torch.float16  # each has a library of its own
BIAS, NORM, RESIDUAL, GATED = 1, 2, 4, 8  # the parts of a product besides x and weight
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
_libraries: dict[torch.dtype, ctypes.CDLL] = {}
_loading = threading.Lock()


def prepare(weight: Tensor) -> None:
    """Begin to build the kernels for a weight, if need be, while something else is done; `load` waits for them."""
    if weight.device.type == "cpu" and weight.dtype not in loaded:
        build.begin(_name(weight.dtype))


@functools.cache
def load(dtype: torch.dtype) -> bool:
    """Build the kernels for a dtype of DTYPES if need be, load them, and return whether they can be used. If not, warn
    once, with the way out."""
    with _loading:
        if dtype in loaded:
            return True
        try:
            _libraries[dtype] = library = _load(dtype)
            if library.register_kernels():
                raise OSError("torch does not accept the kernels of cpu.cpp")
        except OSError as error:
            lost = "products of few rows and dense attention use torch's, at about half the speed"
            warnings.warn(f"{error}; {lost}", stacklevel=2)
            return False
        loaded.add(dtype)
        return True


def describe(dtype: torch.dtype) -> str:
    """Return which kernels compute products of few rows and dense attention on the CPU, and why."""
    if dtype not in DTYPES:
        return f"torch's: cpu.cpp has none for {_name(dtype)}"
    if not load(dtype):
        return "torch's: cpu.cpp could not be compiled and loaded"
    bits = 32 * _libraries[dtype].lanes()
    return f"cpu.cpp, {bits}-bit vectors, up to {ROWS} rows; torch's for more, which are bound by arithmetic"


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Return residual + weight @ norm(x) + bias, or SwiGLU of it: x `[..., in]`, of up to 8 dimensions, weight
    `[out, in]` -> `[..., out]`.

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


def can_attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, cos: Tensor) -> bool:
    """Return whether `attend_newest` computes attention of q to a cache of keys: uncompiled, on a CPU, in one dtype,
    without gradients. Load the kernels if they are missing."""
    if q.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or q.dtype not in DTYPES:
        return False
    if not q.dtype == k.dtype == v.dtype == keys.dtype or cos.dtype != torch.float32:
        return False
    return keys.is_contiguous() and load(q.dtype)


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
    heads = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    rest = (x.contiguous() for x in (*rotary, slots))
    return _OPS[q.dtype][1](*heads, *rest, *kv, visible.contiguous(), *pages)


def _load(dtype: torch.dtype) -> ctypes.CDLL:
    """Load the library, built again if the file is damaged."""
    path = build.finish(_name(dtype))
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(build.finish(_name(dtype))))
