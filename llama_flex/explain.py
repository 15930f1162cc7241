"""What ran: kernels and why, precision, graphs, blocks, and how near to the memory's speed decoding came."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .attention import Layers, kernel
from .masks import BLOCK
from .rules import Tokens

if TYPE_CHECKING:
    from .engine import Engine


class Last(NamedTuple):
    """What to know of the steps that ran last, without their keys and values."""

    layers: Layers
    tokens: Callable[[], Tokens]  # those held now, [B, S]

    def newest(self) -> Tokens:
        """Each row's newest token, `[B, 1]`."""
        held = self.tokens()
        at = held.index.argmax(1, keepdim=True)
        return Tokens(*(x.gather(1, at) for x in held))


def explain(engine: Engine, bytes_per_second: float | None = None) -> str:
    """Lines of text about the engine's last stream; see `Engine.explain`."""
    model, last = engine.model, engine.last
    if last is None:
        raise ValueError("nothing has run yet: explain after generating")
    config, device = model.config, model.device
    precision = torch.get_float32_matmul_precision()
    lines = [f"{model.dtype} on {device}; float32 products at precision {precision!r}".replace("torch.", "")]
    graphs = engine.graphs
    if engine.compile:
        again = graphs.count - len(graphs.parts)
        lines.append(f"{len(engine.steps)} steps compiled in {graphs.count} graphs, {again} of them again")
        lines += sorted(f"  {b} x {t} tokens against {slots} slots" for b, t, slots, *_ in engine.steps)
    else:
        lines.append("not compiled: every operation runs by itself, attention by FlexAttention's own eager definition")

    q, kv = last.newest(), last.tokens()
    (rows, _), group = kv.index.shape, config.num_attention_heads // config.num_key_value_heads
    for i, pattern in enumerate(last.layers.patterns):
        full, some = pattern.mask.blocks(q, kv, config.num_attention_heads)
        visited, total = int(some.sum()), some.numel()
        count = last.layers.of_layer.count(i)
        what = f"mask {pattern.mask}" + ("" if pattern.score_mod is None else f", scores {pattern.score_mod}")
        lines.append(f"{count} layers, {what}")
        if engine.compile:
            lines.append(f"  decoding: {kernel(device, 1, group, some.shape[1])}")
            lines.append(f"  prompts: {kernel(device, BLOCK, group, some.shape[1])}")
        lines.append(
            f"  the last query visits {visited} of {total} blocks of {BLOCK} slots, {int(full.sum())} unmasked"
        )

    contexts = (kv.index >= 0).sum(1).tolist()
    size = model.bytes_per_step(contexts)
    lines.append(f"a step of {rows} rows reads {size / 1e9:.3f} GB: weights, keys and values")
    if bytes_per_second:
        rates = f"{bytes_per_second / 1e9:.1f} GB/s reached of {(most := read_bandwidth(device)) / 1e9:.1f}"
        lines.append(f"{rates} that memory gives to a reduction: {bytes_per_second / most:.0%}")
    return "\n".join(lines)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which memory is read: the best of some reductions over far more than the caches hold."""
    cuda = device.type == "cuda"
    # Beside a model and its cache there may be little left.
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
