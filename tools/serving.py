"""Benchmark many requests at a time: `python -m tools.serving NAME`.

    throughput  output tokens per second for requests of random lengths, against transformers' continuous batching or
                against one request after the other
    sweep       the time of a decoding step by batch size
    grammar     the time of a decoding step of texts that conform to a JSON schema, against texts that do not
    prefix      the time to the first token for requests that share a prefix
    latency     the time between tokens while long prompts arrive, prefilled in chunks and in one piece
    requests    print the requests of `throughput` as JSON lines with tokens and max_new_tokens

Each result is shown beside that of a peer, or beside a bound measured in the same run. The bound is the least time that
the machine needs at its measured speeds: for each decoding step, to read the weights or to multiply with them,
whichever takes longer, and to read keys and values; for prompts, to multiply. Requests have random ids and decode
greedily. Prints a table in Markdown, and last a line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llama_flex import Engine, Grammar, Llama, Sampling, Tokenizer
from llama_flex.checkpoint.files import FolderError
from llama_flex.engine.explain import bytes_per_step, read_bandwidth
from llama_flex.engine.output import Step
from llama_flex.engine.request import Request
from llama_flex.kernels.kv_cache import KVDtype
from llama_flex.masks.layout import BLOCK
from tools._measuring import (
    CONFIGS,
    DEMO,
    attempt,
    check_device,
    check_model,
    clear,
    config_of,
    matrices,
    model_of,
    operations,
    print_json,
    print_table,
    products,
    timed,
    wait,
    whole_number,
)

STEPS = 10  # `sweep`: decoding steps per round
SCHEMA = {  # `grammar`: it lets no text of the measured length end
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "emails": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.org$"}, "maxItems": 3},
        },
        "required": ["name", "age", "emails"],
        "additionalProperties": False,
    },
}
OWN = "the rest, prefix in caches of their own"  # a row of `prefix`


class Asked(NamedTuple):
    """One request: token ids, and how many to generate."""

    ids: list[int]
    new: int


def requests(args: argparse.Namespace, vocabulary: int, round: int = 0) -> list[Asked]:
    """Make requests of random ids, with `low` to `high` tokens in and as many out; the same for the same arguments.

    Another round has requests of the same lengths with other ids, so that none of their pages can be reused.
    """
    lengths = np.random.default_rng(args.seed).integers(args.low, args.high + 1, (args.count, 2))
    rng = np.random.default_rng((args.seed, round))
    return [Asked(_ids(rng, n, vocabulary), int(new)) for n, new in lengths]


def _ids(rng: np.random.Generator, count: int, vocabulary: int) -> list[int]:
    return rng.integers(vocabulary, size=count).tolist()


class Machine(NamedTuple):
    """Measured speeds: bytes of memory read, and operations of large matrix products, per second."""

    bytes: float
    operations: float
    kv_dtype: KVDtype  # of the caches

    @classmethod
    def measured(cls, args: argparse.Namespace) -> Machine:
        """Measure the device."""
        found = products(args.device, args.dtype)
        rate = found["operations"] / statistics.median(found["seconds"])
        return cls(read_bandwidth(torch.device(args.device)), rate, args.kv_dtype)

    def step(self, model: Llama, contexts: Sequence[int]) -> float:
        """Return the least seconds that a decoding step of sequences of these lengths can take."""
        weights = bytes_per_step(model, [])
        numbers = matrices(model) + math.prod(model.lm_head.matrix.shape)
        multiplying = 2 * numbers * len(contexts) / self.operations
        cached = bytes_per_step(model, contexts, self.kv_dtype) - weights
        return max(weights / self.bytes, multiplying) + cached / self.bytes

    def all(self, model: Llama, asked: Sequence[Asked]) -> float:
        """Return the least seconds that requests can take if all of them run from the beginning."""
        prompts = sum(operations(model, len(a.ids)) for a in asked) / self.operations
        steps = range(max(a.new for a in asked))
        return prompts + sum(self.step(model, [len(a.ids) + n for a in asked if n < a.new]) for n in steps)


def throughput(args: argparse.Namespace, model: Llama) -> dict[str, Any]:
    """Measure output tokens per second, ours and a peer's."""
    machine = Machine.measured(args)
    each = [requests(args, model.config.vocab_size, round) for round in range(args.rounds + 1)]
    engine = Engine(
        model, compile=True, kv_dtype=args.kv_dtype, max_batch_size=args.batch_size, max_length=2 * args.high
    )
    found = [_of(machine, model, "llama_flex", each[0], [_together(engine, asked) for asked in each][1:])]
    failed: list[list[str]] = []
    if args.peer == "one by one":
        alone = Engine(model, compile=True, kv_dtype=args.kv_dtype)
        found.append(_of(machine, model, args.peer, each[0], [_one_by_one(alone, asked) for asked in each][1:]))
    elif args.peer is not None:
        from tools._peers import batches, load

        name, some = f"transformers, {args.peer}", each[0][: args.peer_count]
        seconds = attempt(lambda: [batches(load(model, args.model, args.peer), some)])
        if isinstance(seconds, str):
            failed.append([name, seconds, "", "", "", ""])
        else:
            found.append(_of(machine, model, name, some, seconds))
    rates = [way["tokens"] / statistics.median(way["seconds"]) for way in found]
    rows = []
    for way, rate in zip(found, rates, strict=True):
        median = statistics.median(way["seconds"])
        share, times = way["bound"] / median, rates[0] / rate
        rows.append([way["name"], str(way["requests"]), f"{median:.2f}", f"{rate:.1f}", f"{share:.1%}", f"{times:.1f}"])
    print_table(["", "requests", "s", "tokens/s", "of the bound", "llama_flex is times as fast"], rows + failed)
    return {**machine._asdict(), "ways": found}


def _of(machine: Machine, model: Llama, name: str, asked: Sequence[Asked], seconds: list[float]) -> dict[str, Any]:
    """Return one way's requests, tokens and seconds, and the bound for them."""
    tokens, bound = sum(a.new for a in asked), machine.all(model, asked)
    print(f"{name}: {statistics.median(seconds):.2f} s", flush=True)
    return {"name": name, "requests": len(asked), "tokens": tokens, "bound": bound, "seconds": seconds}


def _submit(engine: Engine, ids: list[int], new: int, **options: Any) -> Request:
    return engine.submit(ids, max_new_tokens=new, sampling=Sampling(), stop_token_ids=(), **options)


def _together(engine: Engine, asked: list[Asked]) -> float:
    before, started = engine.scheduler.prompt_tokens, time.perf_counter()
    for ids, new in asked:
        _submit(engine, ids, new)
    engine.run()
    seconds = time.perf_counter() - started
    # No prompt was cached before; those of preempted requests were computed again.
    assert engine.scheduler.prompt_tokens - before >= sum(len(ids) for ids, _ in asked)
    return seconds


def _one_by_one(engine: Engine, asked: list[Asked]) -> float:
    started = time.perf_counter()
    for ids, new in asked:
        engine.generate([ids], max_new_tokens=new, sampling=Sampling(), stop_token_ids=())
    return time.perf_counter() - started


def sweep(args: argparse.Namespace, model: Llama) -> dict[str, Any]:
    """Measure the time of a decoding step at each batch size."""
    machine, rows, found = Machine.measured(args), [], []
    rng, new = np.random.default_rng(args.seed), _new_of_sweep(args)
    engine = Engine(
        model, compile=True, kv_dtype=args.kv_dtype, max_batch_size=max(args.sizes), max_length=args.context + new
    )
    for size in args.sizes:
        submitted = [_submit(engine, _ids(rng, args.context, model.config.vocab_size), new) for _ in range(size)]
        while min(len(r.steps) for r in submitted) < 8:
            engine.step()
        seconds = []
        for _ in range(args.rounds):
            wait(args.device)
            started = time.perf_counter()
            for _ in range(STEPS):
                engine.step()
            wait(args.device)
            seconds.append((time.perf_counter() - started) / STEPS)
        assert engine.scheduler.num_running == size
        contexts = [args.context + len(r.steps) for r in submitted]
        for request in submitted:
            engine.cancel(request)
        engine.run()
        median, bound = statistics.median(seconds), machine.step(model, contexts)
        times = f"{median * 1e3:.2f}", f"{bound * 1e3:.2f}"
        rows.append([str(size), *times, f"{bound / median:.1%}", f"{size / median:.0f}"])
        found.append({"size": size, "seconds": seconds, "bound": bound})
        print(*rows[-1], flush=True)
    print_table(["batch", "ms a step", "bound, ms", "of the bound", "tokens/s"], rows)
    return {**machine._asdict(), "steps": found}


def _new_of_sweep(args: argparse.Namespace) -> int:
    """Return how many tokens keep the first request decoding until the prompts of the last are computed."""
    return 16 + STEPS * args.rounds + max(args.sizes) * args.context // 512


def grammar(args: argparse.Namespace, model: Llama) -> dict[str, Any]:
    """Measure the time of a step with and without a grammar, in turns: of one stream, and of requests by batch size."""
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    free = Sampling(temperature=1.0, seed=args.seed)
    ways = {"free": free, "grammar": dataclasses.replace(free, grammar=Grammar.json_schema(SCHEMA))}
    engine = Engine(
        model,
        tokenizer,
        compile=True,
        kv_dtype=args.kv_dtype,
        max_batch_size=max(args.sizes),
        max_length=args.context + args.new,
    )
    rng, rows, found = np.random.default_rng(args.seed), [], {}
    for size in (None, *args.sizes):
        prompts = [_ids(rng, args.context, model.config.vocab_size) for _ in range(size or 1)]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for round in range(args.rounds + 1):  # the first compiles
            for way, sampling in ways.items():
                took = _seconds_a_step(engine, prompts, sampling, args.new, together=size is not None)
                seconds[way] += [took] if round else []
        medians = [statistics.median(each) for each in seconds.values()]
        name = "stream" if size is None else str(size)
        rows.append([name, *(f"{median * 1e3:.2f}" for median in medians), f"{medians[0] / medians[1]:.2f}"])
        found[name] = seconds
        print(*rows[-1], flush=True)
    print_table(["batch", "free, ms a step", "JSON schema, ms a step", "rate with it, times that without"], rows)
    return {"seconds": found}


def _seconds_a_step(engine: Engine, prompts: list[list[int]], sampling: Sampling, new: int, *, together: bool) -> float:
    """Return the seconds of a decoding step of prompts that run together, or of a stream of one."""
    # A grammar needs a stop token, which it bans until the text may end.
    stop = [engine.model.config.vocab_size - 1]
    given: dict[str, Any] = {"max_new_tokens": new, "sampling": sampling, "stop_token_ids": stop}
    if not together:
        steps = engine.stream(prompts, **given)
        return _seconds_each(lambda: next(steps), new - new // 2 - 1, before=new // 2)
    submitted = [engine.submit(ids, **given) for ids in prompts]
    while min(len(r.steps) for r in submitted) < 8:
        engine.step()
    seconds = _seconds_each(engine.step, new // 2, before=0)
    assert engine.scheduler.num_running == len(submitted)
    for request in submitted:
        engine.cancel(request)
    engine.run()
    return seconds


def _seconds_each(step: Callable[[], object], count: int, before: int) -> float:
    for _ in range(before):
        step()
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count


def prefix(args: argparse.Namespace, model: Llama) -> dict[str, Any]:
    """Measure the time to the first token of requests that share a prefix.

    The first request computes the prefix, the rest reuse it. Beside them stand the rest without a prefix, and the rest
    in one batch of caches that hold the prefix already, where only their own tokens are left to compute.
    """
    vocabulary, rng = model.config.vocab_size, np.random.default_rng(args.seed)
    longest, blocks = args.prefix + args.own + 2, -(-(args.own + 2) // BLOCK) + 1
    slots = (-(-longest // BLOCK) + args.count * blocks) * BLOCK
    engine = Engine(
        model, compile=True, kv_dtype=args.kv_dtype, max_batch_size=args.count, max_length=longest, max_slots=slots
    )
    own = [_ids(rng, args.own, vocabulary) for _ in range(args.count)]
    found: dict[str, list[float]] = {"the first": [], "the rest": [], "the rest, without a prefix": [], OWN: []}
    computed: dict[str, int] = {}
    options: dict[str, Any] = {"max_new_tokens": 1, "sampling": Sampling(), "stop_token_ids": ()}
    for round in range(args.rounds + 1):  # the first compiles
        shared = _ids(rng, args.prefix, vocabulary)  # a new one, which is not cached yet
        one = engine.new_cache(1, longest)
        engine.generate([shared], cache=one, **options)
        caches = one.expand(args.count - 1)
        seconds = timed(args.device, lambda caches=caches: engine.generate(own[1:], cache=caches, **options))
        if round:
            found[OWN].append(seconds)
        computed[OWN] = args.own * (args.count - 1)
        del one, caches
        asked = {
            "the first": [shared + own[0]],
            "the rest": [shared + ids for ids in own[1:]],
            "the rest, without a prefix": [[round, *ids[1:]] for ids in own[1:]],
        }
        for name, prompts in asked.items():
            before = engine.scheduler.prompt_tokens
            wait(args.device)
            started = time.perf_counter()
            submitted = [_submit(engine, ids, 1) for ids in prompts]
            engine.run()
            assert all(len(r.steps) == 1 for r in submitted)
            computed[name] = engine.scheduler.prompt_tokens - before
            if round:
                found[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    print_table(
        ["requests", "prompt tokens computed", "ms to the first token of all"],
        [[name, str(computed[name]), f"{median * 1e3:.1f}"] for name, median in medians.items()],
    )
    return {"computed": computed, "seconds": found}


def latency(args: argparse.Namespace, model: Llama) -> dict[str, Any]:
    """Measure the time between tokens of running streams, while a long prompt arrives every 20 steps."""
    vocabulary, rows, found = model.config.vocab_size, [], {}
    for name, tokens in (("in chunks", args.chunk), ("in one piece", args.long)):
        engine = Engine(
            model,
            compile=True,
            kv_dtype=args.kv_dtype,
            max_batch_size=args.count + 4,
            max_length=max(args.long + 1, args.own + args.new),
            prefill_tokens=tokens,
        )
        for seed in (0, 1):  # the first compiles
            rng, times = np.random.default_rng(seed), dict[int, list[float]]()

            def came(step: Step, times: dict[int, list[float]] = times) -> None:
                times.setdefault(step.row, []).append(time.perf_counter())

            for _ in range(args.count):
                _submit(engine, _ids(rng, args.own, vocabulary), args.new, callback=came)
            for n in itertools.count():
                if engine.scheduler.idle:
                    break
                if n % 20 == 10 and n < args.new:
                    _submit(engine, _ids(rng, args.long, vocabulary), 1)
                engine.step()
        between = [b - a for each in times.values() for a, b in itertools.pairwise(each)]
        p50, p99 = np.percentile(between, [50, 99]).tolist()
        found[name] = {"p50": p50, "p99": p99, "most": max(between)}
        rows.append([name, str(tokens), *(f"{x * 1e3:.1f}" for x in found[name].values())])
        del engine
        clear(args.device)
    print_table(["long prompts", "prompt tokens a step", "p50, ms", "p99, ms", "most, ms"], rows)
    return found


NAMES: dict[str, Callable[[argparse.Namespace, Llama], dict[str, Any]]] = {
    "throughput": throughput,
    "sweep": sweep,
    "grammar": grammar,
    "prefix": prefix,
    "latency": latency,
}
NEEDED: dict[str, Callable[[argparse.Namespace], int]] = {  # tokens in the longest sequence
    "throughput": lambda args: 2 * args.high,
    "sweep": lambda args: args.context + _new_of_sweep(args),
    "grammar": lambda args: args.context + args.new,
    "prefix": lambda args: args.prefix + args.own + 1,
    "latency": lambda args: max(args.long + 1, args.own + args.new),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    each = {name: commands.add_parser(name) for name in (*NAMES, "requests")}
    counts = {"throughput": 256, "requests": 256, "prefix": 64, "latency": 32}
    for name, command in each.items():
        models = command.add_mutually_exclusive_group()
        models.add_argument("--model", type=Path, metavar="DIR", help="a folder of real weights")
        models.add_argument("--config", choices=CONFIGS, help="a shape, with random weights")
        command.add_argument("--seed", type=int, default=0)
        if name in counts:
            command.add_argument("--count", type=whole_number, default=counts[name], help="number of requests")
        if name in NAMES:
            command.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
            command.add_argument("--quantize", metavar="FORMAT", help="as for llama_flex.generate")
            command.add_argument("--kv-dtype", choices=("fp8",), help="as for llama_flex.generate")
            command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
            command.add_argument("--rounds", type=whole_number, default=3)
    for name in ("throughput", "requests"):
        each[name].add_argument("--low", type=whole_number, default=100, help="fewest tokens, in and out")
        each[name].add_argument("--high", type=whole_number, default=1024, help="most tokens, in and out")
    each["throughput"].add_argument("--batch-size", type=whole_number, default=256)
    each["throughput"].add_argument("--peer", help="'one by one', or an attention of transformers, such as sdpa")
    each["throughput"].add_argument(
        "--peer-count", type=whole_number, default=64, help="transformers serves only the first of them"
    )
    each["sweep"].add_argument("--context", type=whole_number, default=1024)
    each["sweep"].add_argument("--sizes", type=whole_number, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    what = "a tokenizer's folder, if --config has another vocabulary than the default's"
    each["grammar"].add_argument("--tokenizer", type=Path, metavar="DIR", default=DEMO, help=what)
    each["grammar"].add_argument("--context", type=whole_number, default=256)
    each["grammar"].add_argument("--new", type=whole_number, default=128, help="tokens that each text generates")
    each["grammar"].add_argument("--sizes", type=whole_number, nargs="+", default=[1, 64])
    each["prefix"].add_argument("--prefix", type=whole_number, default=4000, help="tokens in the shared prefix")
    each["prefix"].add_argument("--own", type=whole_number, default=100, help="tokens after the prefix in each request")
    each["latency"].add_argument("--long", type=whole_number, default=8000, help="tokens in a long prompt")
    each["latency"].add_argument("--own", type=whole_number, default=500, help="tokens in the prompt of each stream")
    each["latency"].add_argument("--new", type=whole_number, default=200, help="tokens that each stream generates")
    each["latency"].add_argument("--chunk", type=whole_number, default=512, help="tokens in a prefill chunk")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one measurement; return 0."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.model is None and args.config is None:
        args.model = DEMO
    context = check_model(parser, args)
    if args.name in ("throughput", "requests") and args.low > args.high:
        parser.error(f"--low {args.low} is more than --high {args.high}")
    if args.name == "requests":
        for ids, new in requests(args, config_of(args).vocab_size):
            print(json.dumps({"tokens": ids, "max_new_tokens": new}))
        return 0
    check_device(parser, args)
    if NEEDED[args.name](args) > context:
        parser.error(f"{NEEDED[args.name](args)} tokens exceed the model's context of {context}")
    try:
        model = model_of(args, args.dtype)
    except FolderError as error:
        parser.error(str(error))
    with torch.no_grad():
        found = NAMES[args.name](args, model)
    print_json(args, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
