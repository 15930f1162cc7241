"""Load and call the C++ kernels for the CPU, `cpu.cpp`.

torch's own products (MKL, oneDNN) read weights at a third to a half of memory's speed, most of all on AMD. `few_rows`
reads them once, at that speed, for up to `ROWS` rows; `attend_newest` is the dense attention of uncompiled steps, and
`run_blocks` all layers of a step; `summarise` is for its logits. They are compiled on first use, in two seconds or
three, for the vectors of this processor, and kept beside what torch compiles.

Dimension letters: see `layers`.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd import forward_ad

from . import build
from .kv_cache import KV
from .weight import PARTS, Weight

ROWS = 16  # with more, products are bound by arithmetic, which torch does faster
DTYPES = torch.float32, torch.bfloat16, torch.float16  # each has a library of its own
BIAS, NORM, RESIDUAL, GATED, SCALE, ZERO, INPUTS = 1, 2, 4, 8, 16, 32, 64  # the parts of a product besides x and weight
_ATTENTION = (  # a `Newest`, with a cache
    "Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values, Tensor visible, Tensor page_table"
)
_MISSING = torch.empty(0, dtype=torch.bool, device="cpu")  # stands for what a layer lacks; no parameter is like it
ops = torch.library.Library("llama_flex", "FRAGMENT")
loaded: set[torch.dtype] = set()  # read by compiled steps, which cannot build it


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Ops(NamedTuple):
    few_rows: OpOverload
    attend_newest: OpOverload
    run_blocks: OpOverload
    normalise: OpOverload
    swiglu: OpOverload


def _define(dtype: torch.dtype) -> _Ops:
    product, attention, blocks, *rows = names = [f"{name}_{_name(dtype)}" for name in _Ops._fields]
    ops.define(
        f"{product}(Tensor x, Tensor weight, Tensor scale, Tensor zero, Tensor input_scale, Tensor bias, Tensor norm, "
        "Tensor residual, float eps, int parts) -> Tensor"
    )
    ops.define(f"{attention}(Tensor q, Tensor k, Tensor v, {_ATTENTION}, bool paged) -> Tensor")
    ops.define(f"{blocks}(Tensor x, Tensor(a!)[] tensors, float[] eps, bool paged) -> Tensor")
    for each in rows:
        ops.define(f"{each}(Tensor x, Tensor norm, float eps) -> Tensor")
    shapes: list[Callable[..., tuple[int, ...]]] = [  # of results
        lambda x, weight, *rest: (*x.shape[:-1], len(weight) // (2 if rest[-1] & GATED else 1)),
        lambda q, *_: (*q.shape[:2], q.shape[2] * q.shape[3]),
        lambda x, *_: x.shape,
        lambda x, *_: x.shape,
        lambda x, *_: (*x.shape[:-1], x.shape[-1] // 2),
    ]
    for name, shape in zip(names, shapes, strict=True):
        fake = functools.partial(_fake, shape)
        torch.library.register_fake(f"llama_flex::{name}", fake, lib=ops)
    return _Ops(*(getattr(torch.ops.llama_flex, name).default for name in names))


def _fake(shape: Callable[..., tuple[int, ...]], x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(shape(x, *rest))


_OPS = {dtype: _define(dtype) for dtype in DTYPES}
_libraries: dict[torch.dtype, ctypes.CDLL] = {}
_loading = threading.Lock()


def prepare(dtype: torch.dtype, device: torch.device) -> None:
    """Begin to build the kernels for a model, if need be, while something else is done; `load` waits for them."""
    if device.type == "cpu" and dtype not in loaded:
        build.begin(_name(dtype))


@functools.cache
def load(dtype: torch.dtype) -> bool:
    """Build the kernels for a dtype of DTYPES if need be, load them, and return whether they can be used. If not, warn
    once, with the way out."""
    with _loading:
        if dtype in loaded:
            return True
        try:
            _libraries[dtype] = library = _load(dtype)
            if library.register_kernels(not loaded):
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
    weight: Weight,
    bias: Tensor | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Return residual + weight @ norm(x) + bias, or SwiGLU of it: x `[..., in]`, of up to 8 dimensions, its columns in
    the order of the numbers, weight `[out, in]` -> `[..., out]`.

    All in one dtype of DTYPES, except the numbers of a quantised weight; sums in float32. `load` must have
    returned True.
    """
    parts = GATED * gated
    (numbers, scale, zero, inputs, _), x = weight, x.contiguous()
    if scale is not None:
        scale, parts = scale.contiguous(), parts | SCALE
    if zero is not None:
        zero, parts = zero.contiguous(), parts | ZERO
    if inputs is not None:
        inputs, parts = inputs.contiguous(), parts | INPUTS
    if bias is not None:
        bias, parts = bias.contiguous(), parts | BIAS
    if norm is not None:
        norm, parts = norm.contiguous(), parts | NORM
    if residual is not None:
        residual, parts = residual.contiguous(), parts | RESIDUAL
    # A tensor stands for each that is not given: `parts` says so, and the kernel's interface knows no optional ones.
    given = (x if part is None else part for part in (scale, zero, inputs, bias, norm, residual))
    return _OPS[x.dtype].few_rows(x, numbers.contiguous(), *given, eps, parts)


ops.define("summarise(Tensor x) -> Tensor")
torch.library.register_fake("llama_flex::summarise", lambda x: x.new_empty(len(x), 3, dtype=torch.float64), lib=ops)


def summarise(x: Tensor) -> Tensor | None:
    """Return what `reductions` returns of each row of x `[B, V]`, float32: the first index of the largest value, the
    log-sum-exp, and whether all values are finite, float64 `[B, 3]`. Or None if it cannot: it is for uncompiled steps
    on a CPU, without gradients, once the kernels of a dtype are loaded."""
    if not loaded or is_transformed() or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    if x.dim() != 2 or not x.numel():
        return None
    return torch.ops.llama_flex.summarise.default(x.contiguous())


def is_transformed() -> bool:
    """Return whether code is traced or differentiated instead of just run."""
    traced = torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()
    return traced or torch.is_grad_enabled() or forward_ad._current_level >= 0


def _takes_rows(x: Tensor) -> bool:
    if is_transformed() or x.device.type != "cpu":
        return False
    # In float32 torch's operations round as the reference does; in float16 they are faster.
    return x.dtype == torch.bfloat16 and 0 < x.dim() <= 8 and load(x.dtype)


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """Compute `layers.RMSNorm` of x `[..., E]`, or return None if it cannot: it is for uncompiled steps on a CPU,
    without gradients, in bfloat16."""
    if not _takes_rows(x) or weight.dtype != x.dtype or weight.shape != x.shape[-1:] or weight.device != x.device:
        return None
    return _OPS[x.dtype].normalise(x.contiguous(), weight.contiguous(), eps)


def swiglu(x: Tensor) -> Tensor | None:
    """Return SwiGLU of the halves of x `[..., 2 F]`, `[..., F]`, or None where `normalise` would."""
    if not _takes_rows(x) or x.shape[-1] % 2:
        return None
    x = x.contiguous()
    return _OPS[x.dtype].swiglu(x, x, 0.0)


class Packed(Protocol):
    """The packing of rows `[B, T, ...]` into one row of N tokens, `[1, N, ...]`."""

    def pack(self, x: Tensor) -> Tensor: ...
    def unpack(self, x: Tensor) -> Tensor: ...


class Newest(NamedTuple):
    """The newest tokens of each row, as attention needs to know them; contiguous, but for the rows of page_table.

    cos, sin: float32 `[B, 1, T, D/2]`. slots `[B, T]`: where their keys and values go. visible: booleans
    `[B, 1 or H, T, up to S]`. page_table: int32 `[B, blocks]`, the page of each 128 slots of a row, if keys and values
    are a pool `[1, K, S, D]`; else None. packed: the packing of the tokens' tensors, None if they come in rows.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    visible: Tensor
    page_table: Tensor | None = None
    packed: Packed | None = None

    @staticmethod
    def of(
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
        visible: Tensor,
        page_table: Tensor | None,
        packed: Packed | None,
    ) -> Newest | None:
        """Return them for the tokens of a step, or None if the kernels are not for it: they are for uncompiled steps on
        a CPU without gradients. rotary, slots: packed, if the tokens are."""
        if is_transformed() or slots.device.type != "cpu":
            return None
        if rotary[0].dtype != torch.float32:
            return None
        cos, sin = rotary
        if packed is not None:  # padding repeats another token, and is stored once more
            cos, sin, slots = (packed.unpack(x) for x in (cos[:, 0], sin[:, 0], slots))
            cos, sin = cos[:, None], sin[:, None]
        cos, sin, slots, visible = (x.contiguous() for x in (cos, sin, slots, visible))
        return Newest(cos, sin, slots, visible, page_table, packed)

    def with_cache(self, kv: KV) -> tuple[Tensor, ...]:
        """Return the arguments of _ATTENTION."""
        table = self.slots if self.page_table is None else self.page_table
        return self.cos, self.sin, self.slots, kv.k, kv.v, self.visible, table


def can_attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> bool:
    """Return whether `attend_newest` attends from q to a cache of keys: in one dtype. Load the kernels if need be."""
    return q.dtype == k.dtype == v.dtype == keys.dtype and keys.is_contiguous() and q.dtype in DTYPES and load(q.dtype)


def attend_newest(q: Tensor, k: Tensor, v: Tensor, newest: Newest | None, kv: KV | None) -> Tensor | None:
    """Rotate new queries `[B, T, H, D]` and keys `[B, T, K, D]`, store keys and values in kv, both `[B, K, S, D]`, and
    return what attention is by definition, `[B, T, H * D]`, or None if it cannot; sums in float32.

    If packed, q, k, v and the result have N tokens instead of B and T.
    """
    if newest is None or kv is None or not can_attend(q, k, v, kv.k):
        return None
    if newest.packed is not None:
        q, k, v = map(newest.packed.unpack, (q, k, v))
    heads = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    y = _OPS[q.dtype].attend_newest(*heads, *newest.with_cache(kv), newest.page_table is not None)
    return y if newest.packed is None else newest.packed.pack(y)


class Layer(NamedTuple):
    """A layer, as `run_blocks` takes it.

    norms: of attention and MLP, and those of each query and key, or None. products: q, k and v; o; gate and up; down.
    """

    norms: tuple[nn.Module | None, ...]
    products: tuple[nn.Module | None, ...]
    newest: Newest
    kv: KV

    @staticmethod
    def of(block: nn.Module, newest: Newest | None, kv: KV | None) -> Layer | None:
        """Return that of a `layers.Block` and its own attention and MLP, or None if there is no kernel for the step."""
        attention, mlp = map(block._modules.get, ("attention", "mlp"))  # ten times as fast as attributes
        if newest is None or newest.packed is not None or kv is None or attention is None or mlp is None:
            return None
        if kv.scales is not None:
            return None
        if not 0 < newest.slots.numel() <= ROWS:  # asked here, so that a prompt is turned down by its first layer
            return None
        norm, q_norm, k_norm, qkv, o = map(attention._modules.get, ("norm", "q_norm", "k_norm", "qkv", "o"))
        mlp_norm, gate_up, down = map(mlp._modules.get, ("norm", "gate_up", "down"))
        return Layer((norm, mlp_norm, q_norm, k_norm), (qkv, o, gate_up, down), newest, kv)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the layer's tensors, as the operation takes them."""
        named = [(x, "weight") for x in (*self.norms, *self.products)]
        named += [(x, name) for name in (*PARTS[1:4], "bias") for x in self.products]  # `run_blocks` declines an order
        found = (None if module is None else module._parameters.get(name) for module, name in named)
        return *(_MISSING if x is None else x for x in found), *self.newest.with_cache(self.kv)


def run_blocks(x: Tensor, layers: Sequence[Layer]) -> Tensor | None:
    """Compute layers for x `[B, T, E]` of up to `ROWS` tokens, as `layers.Block` does, or return None if it cannot.

    All in one dtype of DTYPES, with caches of one kind; sums in float32. The modules must be this package's own.
    """
    if x.dtype not in DTYPES or not load(x.dtype):
        return None
    modules = [module for layer in layers for module in (*layer.norms, *layer.products)]
    for parameters in (module._parameters for module in modules if module is not None):
        if parameters.get("weight") is None or parameters.get("weight_order") is not None:
            return None  # it is no parameter, and may be computed, or its columns are in another order than those of x
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    eps = [0.0 if norm is None else norm.eps for layer in layers for norm in layer.norms]
    y = _OPS[x.dtype].run_blocks(x, tensors, eps, layers[0].newest.page_table is not None)
    return y if y.numel() else None  # nothing: no code for such tensors


def _load(dtype: torch.dtype) -> ctypes.CDLL:
    """Load the library, built again if the file is damaged."""
    path = build.finish(_name(dtype))
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(build.finish(_name(dtype))))
