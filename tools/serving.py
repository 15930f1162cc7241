"""Many requests at a time: `python -m tools.serving NAME`. Beside each number stands what the machine can do, measured
in the same run.

    throughput  output tokens a second of many requests of random lengths, against transformers' continuous batching
    sweep       the time of a decoding step by batch size
    prefix      time to first token of requests that begin alike
    latency     time between tokens while long prompts arrive, with these in chunks and in one piece
    requests    write the requests of `throughput` as JSON lines: id, tokens, max_new_tokens

The bound of a step is what reading the weights, or multiplying with them if that takes longer, and reading keys and
values takes at the speeds measured. Prints a table in Markdown and last a line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from llama_flex import Engine, Llama, Sampling
from llama_flex.explain import read_bandwidth
from llama_flex.scheduler import Request
from tools import bench


class Asked(NamedTuple):
    """One request: token ids, and how many to generate."""

    ids: list[int]
    new: int


def requests(count: int, low: int, high: int, vocabulary: int, seed: int = 0) -> list[Asked]:
    """Requests of random ids, with `low` to `high` tokens in and as many out; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high + 1, (count, 2))
    return [Asked(rng.integers(3, vocabulary, n).tolist(), int(new)) for n, new in lengths]


class Machine(NamedTuple):
    """What was measured of it, per second."""

    bytes: float
    operations: float

    @classmethod
    def of(cls, device: str, dtype: str) -> Machine:
        products = bench._products(device, dtype)
        return cls(
            read_bandwidth(torch.device(device)), products["operations"] / statistics.median(products["seconds"])
        )

    def step(self, model: Llama, contexts: Sequence[int]) -> float:
        """The least seconds of a decoding step of rows with such contexts."""
        weights = model.bytes_per_step([])
        kv = model.bytes_per_step(contexts) - weights
        return max(weights / self.bytes, 2 * _matrices(model) * len(contexts) / self.operations) + kv / self.bytes

    def prompt(self, model: Llama, length: int) -> float:
        """The least seconds of a prompt."""
        return bench._operations(model, length) / self.operations

    def all(self, model: Llama, asked: Sequence[Asked]) -> float:
        """The least seconds of requests that all run at once from the beginning."""
        seconds = sum(self.prompt(model, len(a.ids)) for a in asked)
        for n in range(max(a.new for a in asked)):
            seconds += self.step(model, [len(a.ids) + n for a in asked if n < a.new])
        return seconds


def _matrices(model: Llama) -> int:
    layers = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    return layers + model.output_weight.numel()


def _submit(engine: Engine, asked: Sequence[Asked]) -> list[Request]:
    return [engine.submit(a.ids, max_new_tokens=a.new, sampling=Sampling(), stop_token_ids=()) for a in asked]


def _ours(engine: Engine, asked: Sequence[Asked]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    submitted = _submit(engine, asked)
    engine.run()
    return time.perf_counter() - started, [[s.token for s in r.steps] for r in submitted]


def _theirs(peer: Any, asked: Sequence[Asked]) -> tuple[float, list[list[int]]]:
    """transformers' continuous batching, with a limit for each request; without the time it takes to get ready."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(a.new for a in asked)
    )
    with peer.continuous_batching_context_manager(generation_config=config, block=True, timeout=5) as manager:
        warm = manager.add_request(asked[0].ids, max_new_tokens=8)
        while (found := manager.get_result(timeout=60)) is None or found.request_id != warm or not found.is_finished():
            pass
        torch.cuda.synchronize()
        started = time.perf_counter()
        names = [manager.add_request(a.ids, max_new_tokens=a.new) for a in asked]
        results = {}
        while len(results) < len(names):
            found = manager.get_result(timeout=60)
            if found is not None and found.is_finished():
                results[found.request_id] = list(found.generated_tokens)
        seconds = time.perf_counter() - started
    return seconds, [results[name] for name in names]


def _engine(args: argparse.Namespace, model: Llama, **options: Any) -> Engine:
    return Engine(model, compile=not args.eager, **options)


def throughput(args: argparse.Namespace, model: Llama, machine: Machine) -> dict[str, Any]:
    asked = requests(args.count, args.low, args.high, model.config.vocab_size)
    total = sum(a.new for a in asked)
    engine = _engine(args, model, max_batch_size=args.batch_size, max_length=2 * args.high)
    bound = machine.all(model, asked)
    found: dict[str, Any] = {"bound_seconds": bound, "tokens": total}
    for n in range(args.rounds + 1):  # the first compiles
        seconds, tokens = _ours(engine, asked)
        assert [len(t) for t in tokens] == [a.new for a in asked]
        print(f"ours: {seconds:.2f} s, {total / seconds:.0f} tok/s, {bound / seconds:.1%} of the bound", flush=True)
        found.setdefault("ours", []).append(seconds)
    print(f"compile {engine.compile_seconds:.1f} s, pages {engine.scheduler.pool.count}", flush=True)
    found["ours"] = found["ours"][1:] or found["ours"]
    rows = [["llama_flex", *_cells(found["ours"], total, bound)]]
    del engine
    bench._clear(args.device)
    if args.peer:
        from tools._peers import load

        some = asked[: args.peer_count]
        peer = load(model, None if args.config else args.model, args.peer)
        try:
            seconds, theirs = _theirs(peer, some)
            most = sum(a.new for a in some)
            same = sum(a == b for x, y in zip(tokens, theirs, strict=False) for a, b in zip(x, y, strict=False))
            found |= {"peer": seconds, "peer_tokens": most, "peer_same": same}
            rows.append([f"transformers, {args.peer}, {len(some)}", *_cells([seconds], most, machine.all(model, some))])
        except Exception as error:  # noqa: BLE001
            print("peer:", repr(error)[:2000], flush=True)
    bench._print_table(["", "s", "tok/s", "of the bound"], rows)
    return found


def _cells(seconds: list[float], tokens: int, bound: float) -> list[str]:
    median = statistics.median(seconds)
    return [f"{median:.2f}", f"{tokens / median:.0f}", f"{bound / median:.1%}"]


def sweep(args: argparse.Namespace, model: Llama, machine: Machine) -> dict[str, Any]:
    rows, found = [], []
    sizes = [n for n in args.sizes if n <= args.batch_size]
    engine = _engine(args, model, max_batch_size=args.batch_size, max_length=args.context + 256)
    for size in sizes:
        asked = [Asked(a.ids, 200) for a in requests(size, args.context, args.context, model.config.vocab_size, size)]
        submitted = _submit(engine, asked)
        while not all(len(r.steps) >= 8 for r in submitted):
            engine.step()
        times = []
        for _ in range(args.rounds):
            bench._wait(args.device)
            started = time.perf_counter()
            for _ in range(10):
                engine.step()
            bench._wait(args.device)
            times.append((time.perf_counter() - started) / 10)
        for request in submitted:
            engine.cancel(request)
        engine.run()
        seconds, bound = statistics.median(times), machine.step(model, [args.context + 40] * size)
        row = [
            str(size),
            f"{seconds * 1e3:.2f}",
            f"{bound * 1e3:.2f}",
            f"{bound / seconds:.1%}",
            f"{size / seconds:.0f}",
        ]
        print(" ".join(row), flush=True)
        rows.append(row)
        found.append({"size": size, "seconds": times, "bound": bound})
    bench._print_table(["batch", "ms a step", "bound, ms", "of the bound", "tok/s"], rows)
    return {"steps": found}


def prefix(args: argparse.Namespace, model: Llama, machine: Machine) -> dict[str, Any]:
    """The first request computes the prefix, the others only their own tokens."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, model.config.vocab_size, args.prefix).tolist()
    own = [rng.integers(3, model.config.vocab_size, args.own).tolist() for _ in range(args.count)]
    found: dict[str, list[float]] = {"first": [], "rest": [], "own": []}
    engine = _engine(args, model, max_batch_size=args.batch_size, max_length=args.prefix + args.own + 64)
    for n in range(args.rounds + 1):
        times = {}
        beginning = [*shared[:-1], 3 + n]  # nothing of the round before
        for name, prompts in (
            ("first", [[*beginning, *own[0]]]),
            ("rest", [[*beginning, *ids] for ids in own[1:]]),
            ("own", [[4 + n, *ids] for ids in own[1:]]),
        ):
            bench._wait(args.device)
            started = time.perf_counter()
            submitted = [
                engine.submit(ids, max_new_tokens=2, sampling=Sampling(), stop_token_ids=()) for ids in prompts
            ]
            while not all(r.steps for r in submitted):
                engine.step()
            times[name] = time.perf_counter() - started
            engine.run()
        print(times, flush=True)
        if n:
            for name, seconds in times.items():
                found[name].append(seconds)
    return found


def latency(args: argparse.Namespace, model: Llama, machine: Machine) -> dict[str, Any]:
    """Streams that run, and a long prompt every so many of their tokens."""
    rows, found = [], {}
    for name, tokens in (("in chunks", args.chunk), ("in one piece", args.long)):
        engine = _engine(args, model, max_batch_size=args.batch_size, max_length=args.long + 256, prefill_tokens=tokens)
        between: list[float] = []
        for warm in (True, False):
            times: dict[int, list[float]] = {}

            def came(step: Any, times: dict[int, list[float]] = times) -> None:
                times.setdefault(step.row, []).append(time.perf_counter())

            streams = [
                engine.submit(a.ids, max_new_tokens=a.new, sampling=Sampling(), stop_token_ids=(), callback=came)
                for a in (
                    Asked(a.ids, 200) for a in requests(args.streams, 500, 500, model.config.vocab_size, 1 + warm)
                )
            ]
            rng = np.random.default_rng(2 + warm)
            first = []
            for n in itertools.count():
                if engine.scheduler.idle:
                    break
                if n % 20 == 10 and n < 200:
                    ids = rng.integers(3, model.config.vocab_size, args.long).tolist()
                    first.append(engine.submit(ids, max_new_tokens=1, sampling=Sampling(), stop_token_ids=()))
                engine.step()
            between = [b - a for r in streams for a, b in itertools.pairwise(times[r.number])]
        p50, p99 = np.percentile(between, [50, 99])
        rows.append([name, str(tokens), f"{p50 * 1e3:.1f}", f"{p99 * 1e3:.1f}", f"{max(between) * 1e3:.1f}"])
        print(rows[-1], flush=True)
        found[name] = {"p50": p50, "p99": p99, "max": max(between)}
        del engine
        bench._clear(args.device)
    bench._print_table(["long prompts", "prefill tokens a step", "p50, ms", "p99, ms", "longest, ms"], rows)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.serving", description=__doc__)
    parser.add_argument("name", choices=("throughput", "sweep", "prefix", "latency", "requests"))
    parser.add_argument("--config", choices=bench.CONFIGS)
    parser.add_argument("--model", default=bench.DEMO)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--low", type=int, default=100)
    parser.add_argument("--high", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--prefix", type=int, default=4000)
    parser.add_argument("--own", type=int, default=100)
    parser.add_argument("--long", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--peer", default=None)
    parser.add_argument("--peer-count", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args(argv)
    model = bench._model(args, args.dtype)
    machine = Machine.of(args.device, args.dtype)
    print(f"memory {machine.bytes / 1e9:.0f} GB/s, products {machine.operations / 1e12:.1f} TFLOP/s", flush=True)
    with torch.no_grad():
        found = globals()[args.name](args, model, machine)
    print(json.dumps({**bench._hardware(args.device), **machine._asdict(), **found}, default=float))
    return 0


if __name__ == "__main__":
    sys.exit(main())
