"""Explain the last run: kernels and why, precision, graphs, blocks, and how close decoding came to memory bandwidth."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import torch

from ..kernels import cpu, flex_attention
from ..kernels.kv_cache import KVDtype, dtype_of
from ..kernels.weight import QUANTISED
from ..layers import Linear
from ..masks.layout import BLOCK
from ..model import Llama
from .model_runner import ModelRunner


def explain(runner: ModelRunner, bytes_per_second: float | None = None) -> str:
    """Explain the last run in lines of text; see `Engine.explain`."""
    model, last = runner.model, runner.last
    if last is None:
        raise ValueError("nothing has run yet; generate first")
    dims, device = model.dims, model.device
    precision = torch.get_float32_matmul_precision()
    lines = [f"{model.dtype} on {device}; float32 products at precision {precision!r}".replace("torch.", "")]
    sizes = Counter[str]()
    for weight in (module.matrix for module in model.modules() if isinstance(module, Linear)):
        kind = "" if weight.scale is None else QUANTISED.get(weight.numbers.dtype, str(weight.numbers.dtype))
        kind += "" if weight.input_scale is None else f", with inputs in {kind}"
        sizes[kind] += math.prod(weight.shape)
    for kind in filter(None, sizes):
        lines.append(f"{sizes[kind] / sizes.total():.0%} of the weights in {kind}")
    if model.adapters:
        lines.append(repr(model.adapters))
    if last.kv_dtype is not None:
        lines.append(f"keys and values in {last.kv_dtype}")
    graphs = runner.graphs
    if runner.uncompiled is not None and (steps := runner.uncompiled.steps.total()):
        lines.append(f"{steps} steps not compiled, recorded, as were their prompts; attention backend 'dense'")
    if runner.compile:
        again = graphs.count - len(graphs.parts)
        lines.append(f"{len(runner.shapes)} steps compiled in {graphs.count} graphs, {again} of them again")
        lines += sorted(f"  {b} x {t} tokens against {slots} slots" for b, t, slots, *_ in runner.shapes)
    else:
        lines.append(f"not compiled: every operation runs by itself; attention backend {runner.backend!r}")

    if device.type == "cpu":
        lines.append(f"products of few rows and dense attention: {cpu.describe(model.dtype)}")
    q, kv = last.newest(), last.tokens()
    (rows, _), group = kv.index.shape, dims.num_heads // dims.num_kv_heads
    for i, (mask, score_mod, _, flash) in enumerate(runner.compiled_plan(last.plan).variants):
        full, some = mask.blocks(q, kv, dims.num_heads)
        visited, total = int(some.sum()), some.numel()
        count = last.plan.of_layer.count(i)
        what = f"mask {mask}" + ("" if score_mod is None else f", scores {score_mod}")
        lines.append(f"{count} layers, {what}")
        if runner.compile and runner.backend != "flex":
            lines.append(f"  attention backend {runner.backend!r}")
        elif runner.compile:
            lines.append(f"  decoding: {flex_attention.describe(device, 1, group, some.shape[1])}")
            flash = flash and flex_attention.flash_takes(model.dtype, dims.head_dim)
            lines.append(f"  prompts: {flex_attention.describe(device, BLOCK, group, some.shape[1], flash)}")
        lines.append(
            f"  the last query visits {visited} of {total} blocks of {BLOCK} slots, {int(full.sum())} unmasked"
        )

    contexts = (kv.index >= 0).sum(1).tolist()
    size = bytes_per_step(model, contexts, last.kv_dtype)
    lines.append(f"a step of {rows} rows reads {size / 1e9:.3f} GB: weights, keys and values")
    if bytes_per_second:
        rates = f"{bytes_per_second / 1e9:.1f} GB/s reached of {(most := read_bandwidth(device)) / 1e9:.1f}"
        lines.append(f"{rates} that memory gives to a reduction: {bytes_per_second / most:.0%}")
    return "\n".join(lines)


def bytes_per_step(model: Llama, contexts: Sequence[int], kv_dtype: KVDtype = None) -> int:
    """Return the bytes that a decode step must read: all weights once (of an untied embedding next to nothing), and
    the keys and values of every sequence. contexts: the sequences' lengths."""
    read = sum(p.nbytes for p in model.parameters())
    read -= 0 if model.config.tie_word_embeddings else sum(p.nbytes for p in model.embed.parameters())
    dims, seen = model.dims, 0
    for window, layers in Counter(model.windows).items():
        seen += layers * sum(n if window is None else min(n, window) for n in contexts)
    return read + dims.kv_numbers_per_token // dims.num_layers * dtype_of(kv_dtype, model.dtype).itemsize * seen


def read_bandwidth(device: torch.device) -> float:
    """Measure memory read bandwidth in bytes per second: the best of several reductions over far more data than the
    hardware caches hold."""
    cuda = device.type == "cuda"
    # A model and its cache may leave little memory free.
    numbers = torch.ones(min(2**30, torch.cuda.mem_get_info(device)[0] // 8) if cuda else 2**28, device=device)
    rates = []
    for reduce in (numbers.sum, numbers.amax, numbers.view(torch.int32).amax, lambda: numbers.dot(numbers)):
        times = []
        for _ in range(6):
            started = time.perf_counter()
            reduce()
            if cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        rates.append(numbers.nbytes / statistics.median(times[1:]))
    return max(rates)
