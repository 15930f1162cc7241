"""Benchmark one stream: `python -m tools.bench NAME`.

    decode    tokens per second of one greedy stream at a given context, against transformers and memory bandwidth
    prefill   time to the first token of a prompt, against transformers and the speed of matrix products
    startup   time from starting a process to its first tokens, with an empty and with a full compile cache
    fusion    five fused prompts, cached and compiled, against recomputing the whole sequence for every token: in
              transformers with a 4-D mask, and in this package
    window    decoding at a long context with a sliding window, against decoding at a context of the window's length

Each result is shown beside that of a peer, or beside what the machine can do, measured in the same run. Prints a line
per measurement, then a table in Markdown, and last a line of JSON with everything, every single time included. Times
are medians over several rounds, in which ours and the peers take turns, because single times are noisy.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_flex import Engine, Llama, Mask, Prompt, Sampling, Tokenizer, Tokens, fuse, masks
from llama_flex.checkpoint.files import FolderError
from llama_flex.checkpoint.quantization import Quantization
from llama_flex.engine.explain import bytes_per_step, read_bandwidth
from llama_flex.engine.graphs import Graphs
from llama_flex.eval.samples import PARAPHRASES
from tools._measuring import (
    COMPILE,
    CONFIGS,
    DEMO,
    ROOT,
    attempt,
    check_device,
    check_model,
    clear,
    model_of,
    operations,
    print_json,
    print_table,
    products,
    random_ids,
    timed,
    wait,
    whole_number,
)

# tools._peers imports transformers, which `startup` must not pay for: it is imported where it is used.

Run = Callable[[], tuple[float, list[int]]]  # does the work once; returns the seconds that count, and the tokens

OURS = "llama_flex"
LLAMA_CPP = {"llama.cpp": "Peer", "llama-bench": "NativePeer"}  # the peers, and their classes in tools._llama_cpp
PEERS = ("dynamic", "static", "flex", *LLAMA_CPP)
START_LENGTH, START_NEW = 30, 10  # `startup`: tokens in the prompt, and tokens generated


def main(argv: list[str] | None = None) -> int:
    """Run one measurement; return 0."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    try:
        if args.name == "first-token":
            return _first_token(args)
        results = COMMANDS[args.name](args)
    except FolderError as error:
        parser.error(str(error))
    print_json(args, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    decode = commands.add_parser("decode", help="tokens a second of one greedy stream")
    decode.add_argument("--context", type=whole_number, nargs="+", default=[1024], help="tokens in the prompt")
    decode.add_argument("--new", type=whole_number, default=128, help="tokens to generate")
    decode.add_argument("--warm-up", type=whole_number, default=8, help="the clock starts after this many of them")
    prefill = commands.add_parser("prefill", help="time to the first token of a prompt")
    prefill.add_argument("--length", type=whole_number, nargs="+", default=[1024], help="tokens in the prompt")
    startup = commands.add_parser("startup", help="time from starting a process to its first tokens")
    fusion = commands.add_parser("fusion", help="five fused prompts against recomputing without a cache")
    fusion.add_argument("--new", type=whole_number, default=40, help="tokens to generate")
    window = commands.add_parser("window", help="a sliding window at a long context against a short context")
    window.add_argument("--context", type=whole_number, nargs="+", default=[32768], help="tokens in the cache")
    window.add_argument("--window", type=whole_number, default=1024, help="tokens that each query sees")
    child = commands.add_parser("first-token")  # run by `startup`; without a help text it is not listed
    for command in (decode, prefill, startup, fusion, window, child):
        models = command.add_mutually_exclusive_group()
        models.add_argument("--model", type=Path, metavar="DIR", help="a folder of real weights")
        if command is not fusion:  # which needs a tokenizer
            models.add_argument("--config", choices=CONFIGS, help="a shape, with random weights")
        default = "bfloat16" if command is window else "float32"
        command.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=[default])
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--rounds", type=whole_number, default=3 if command is startup else 5)
    for command in (decode, prefill, startup, child):
        command.add_argument("--compile", choices=COMPILE, default="auto", help="as for llama_flex.generate")
    for command in (decode, prefill):
        what = "as for llama_flex.generate; llama.cpp gets Q8_0, or Q4_0 for int4, also for embedding and output matrix"
        command.add_argument("--quantize", metavar="FORMAT", help=what)
        command.add_argument("--kv-dtype", choices=("fp8",), help="of ours, as for llama_flex.generate")
        what = "transformers with a growing cache; with a static cache, compiled; with that and flex_attention; "
        what += "llama.cpp, on a CPU (the extra `peers`); its llama-bench on the PATH, built natively"
        command.add_argument("--peers", choices=PEERS, nargs="*", default=["dynamic"], help=what)
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the default model and check the arguments; exit with the reason if they do not fit."""
    check_device(parser, args)
    args.config = getattr(args, "config", None)
    if getattr(args, "quantize", None):
        try:
            Quantization.of(args.quantize)
        except ValueError as error:
            parser.error(str(error))
        if {*args.peers} - {*LLAMA_CPP}:
            parser.error(f"of the peers only {' and '.join(LLAMA_CPP)} quantise; name them after --peers, or none")
    if args.model is None and args.config is None:
        args.model, args.config = (None, "llama-3.1-8b") if args.name == "window" else (DEMO, None)
    context = check_model(parser, args)
    if args.name == "decode" and args.new <= args.warm_up:
        parser.error(f"--new {args.new} leaves nothing to measure after --warm-up {args.warm_up}")
    needed = {"decode": lambda: max(args.context) + args.new, "prefill": lambda: max(args.length) + 1}
    if args.name in needed and needed[args.name]() > context:
        parser.error(f"{needed[args.name]()} tokens exceed the model's context of {context}")


# Ours and the peers, taking turns


@dataclass
class Way:
    """One way to do the work, the time it took, and its tokens."""

    run: Run | None  # None once it has failed, or after the last round
    is_peer: bool = True
    seconds: list[float] = field(default_factory=list)  # of each round
    tokens: list[int] = field(default_factory=list)
    peak: int | None = None  # bytes of memory, the weights included
    error: str | None = None

    @property
    def median(self) -> float:
        """The median time in seconds."""
        return statistics.median(self.seconds)

    def once(self) -> list[float]:
        """Run once; return a list of the seconds it took, empty for a peer that fails now or failed before."""
        if self.run is None:
            return []
        found = attempt(self.run) if self.is_peer else self.run()
        if isinstance(found, str):
            self.run, self.error = None, found
            return []
        seconds, self.tokens = found
        return [seconds]


@dataclass
class Case:
    """Ours and the peers, at one dtype and one size."""

    dtype: str
    size: int
    work: int  # bytes to read per token (decode), or floating-point operations per prompt (prefill)
    ways: dict[str, Way]

    def faster(self, way: Way) -> float:
        """Return how many times as fast as `way` ours is."""
        return way.median / self.ways[OURS].median

    def agreeing(self, way: Way) -> int:
        """Count the leading tokens of `way` that equal ours."""
        pairs = enumerate(zip(self.ways[OURS].tokens, way.tokens, strict=bool(way.tokens)))
        return next((n for n, (a, b) in pairs if a != b), len(way.tokens))

    def to_dict(self) -> dict[str, Any]:
        """Return every single time, and what the table shows, for JSON."""
        ways: dict[str, Any] = {}
        for name, way in self.ways.items():
            ways[name] = {"seconds": way.seconds, "peak_bytes": way.peak, "error": way.error}
            if way.error is None:
                ways[name] |= {"ours_times_as_fast": self.faster(way), "first_tokens_as_ours": self.agreeing(way)}
        return {"dtype": self.dtype, "size": self.size, "work": self.work, "ways": ways}


def _cases(
    args: argparse.Namespace,
    sizes: Sequence[int],
    new: int,
    work: Callable[[Llama, int], int],
    ours: Callable[[Engine, list[int]], tuple[float, list[int]]],
    theirs: Callable[[Any, list[int]], tuple[float, list[int]]],
) -> list[Case]:
    """Measure every dtype and size, with prompts of random ids and `new` tokens after them.

    work: see Case. ours, theirs: what an Engine and a Peer do with a prompt. Each way runs once before the rounds
    begin; ours runs before the peers load their weights, so that its peak memory is its own.
    """
    from tools._peers import Peer, load, register

    register()
    cases = []
    for dtype in args.dtype:
        model, loaded = model_of(args, dtype), None
        for size in sizes:
            ids = random_ids(size, model.config)
            make = functools.partial(Engine, model, compile=COMPILE[args.compile], kv_dtype=args.kv_dtype)
            ways = {OURS: Way(functools.partial(ours, make(), ids), is_peer=False)}
            _warm_up(ways[OURS], model, args.device)
            if {*args.peers} - {*LLAMA_CPP} and (loaded is None or isinstance(loaded, str)):
                loaded = attempt(functools.partial(load, model, args.model))
            for kind in args.peers:
                if kind in LLAMA_CPP:
                    peer = attempt(functools.partial(_llama_cpp, LLAMA_CPP[kind], model, size + new))
                    way = Way(None, error=peer) if isinstance(peer, str) else Way(functools.partial(theirs, peer, ids))
                    _warm_up(way, model, args.device)
                elif isinstance(loaded, str):
                    way = Way(None, error=loaded)
                else:
                    way = Way(functools.partial(theirs, Peer(loaded, kind, size + new), ids))
                    _warm_up(way, loaded, args.device)
                ways[kind if kind in LLAMA_CPP else f"transformers, {kind}"] = way
            _rounds(ways, args.rounds, f"{dtype}, {size} tokens")
            cases.append(Case(dtype, size, work(model, size), ways))
            clear(args.device)
        del model, loaded
        clear(args.device)
    return cases


def _llama_cpp(kind: str, model: Llama, slots: int) -> Any:
    from tools import _llama_cpp

    return getattr(_llama_cpp, kind)(model, slots)


def _warm_up(way: Way, model: torch.nn.Module, device: str) -> None:
    """Run once, which compiles, and note the peak memory: on a CPU the peak of the whole process, for ours only."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    way.once()
    if cuda:
        weights = sum(parameter.nbytes for parameter in model.parameters())
        way.peak = torch.cuda.max_memory_allocated() - before + weights
    elif not way.is_peer:
        unit = 1 if sys.platform == "darwin" else 1024
        way.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rounds(ways: dict[str, Way], rounds: int, case: str) -> None:
    """Run every way once per round, then drop what runs it, so that its memory is free."""
    for _ in range(rounds):
        for way in ways.values():
            way.seconds += way.once()
    for name, way in ways.items():
        way.run = None
        print(f"{case}, {name}: {way.error or f'{way.median:.4f} s'}", flush=True)


def _print_cases(head: Sequence[str], cases: Iterable[Case], cells: Callable[[Case, Way], Sequence[str]]) -> None:
    """Print a table, a row per way: the columns `head`, filled by `cells`, then those that all measurements share."""
    rows = []
    for case in cases:
        for name, way in case.ways.items():
            row = [case.dtype, str(case.size), name]
            if way.error is not None:
                rows.append([*row, way.error.replace("|", "/"), *[""] * (len(head) + 2)])
                continue
            peak = "" if way.peak is None else f"{way.peak / 2**30:.2f}"
            same = "" if name == OURS or not way.tokens else f"{case.agreeing(way)} of {len(way.tokens)}"
            rows.append([*row, *cells(case, way), peak, f"{case.faster(way):.2f}", same])
    print_table(["dtype", "tokens", "", *head, "peak GiB", f"{OURS} is times as fast", "first tokens the same"], rows)


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    counted = args.new - args.warm_up
    cases = _cases(
        args,
        args.context,
        args.new,
        lambda model, context: bytes_per_step(model, [context + args.new // 2], args.kv_dtype),
        functools.partial(_stream, new=args.new, warm_up=args.warm_up),
        lambda peer, ids: peer.decode(ids, args.new, args.warm_up),
    )
    bandwidth = read_bandwidth(torch.device(args.device))
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")

    def cells(case: Case, way: Way) -> list[str]:
        each = way.median / counted
        share = case.work / each / bandwidth
        return [f"{1 / each:.1f}", f"{each * 1e3:.3f}", f"{case.work / 1e9:.3f}", f"{share:.1%}"]

    _print_cases(["tokens/s", "ms a token", "GB to read a token", "of read bandwidth"], cases, cells)
    return {"bytes_per_s": bandwidth, "cases": [case.to_dict() for case in cases]}


def _stream(engine: Engine, ids: list[int], new: int, warm_up: int) -> tuple[float, list[int]]:
    """Generate; return the seconds from token number `warm_up` (0: from the call) to the last, and all tokens."""
    wait(engine.model.device.type)
    arrived, tokens = [time.perf_counter()], []
    for step in engine.stream([ids], max_new_tokens=new, sampling=Sampling(), stop_token_ids=()):
        arrived.append(time.perf_counter())
        tokens.append(step.token)
    return arrived[-1] - arrived[warm_up], tokens


def _prefill(args: argparse.Namespace) -> dict[str, Any]:
    cases = _cases(
        args,
        args.length,
        1,
        operations,
        functools.partial(_stream, new=1, warm_up=0),
        lambda peer, ids: peer.prefill(ids),
    )
    found = {dtype: products(args.device, dtype) for dtype in args.dtype}
    ceiling = {dtype: p["operations"] / statistics.median(p["seconds"]) for dtype, p in found.items()}
    for dtype, most in ceiling.items():
        print(f"{dtype}: matrix products run at {most / 1e12:.3f} TFLOP/s")

    def cells(case: Case, way: Way) -> list[str]:
        speed = case.work / way.median
        share = speed / ceiling[case.dtype]
        return [f"{way.median * 1e3:.2f}", f"{case.size / way.median:.0f}", f"{speed / 1e12:.3f}", f"{share:.1%}"]

    _print_cases(["ms to first token", "tokens/s", "TFLOP/s", "of matrix products"], cases, cells)
    return {"flop_per_s": ceiling, "products": found, "cases": [case.to_dict() for case in cases]}


# Starting


def _startup(args: argparse.Namespace) -> dict[str, Any]:
    starts = []
    for dtype in args.dtype:
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                for kind in ("cold", "warm"):  # the warm start finds what the cold one compiled
                    starts.append({"dtype": dtype, "kind": kind, "seconds": _start(args, dtype, Path(folder))})
                    print(f"{dtype}, {kind}: first token after {starts[-1]['seconds']['token 1']:.2f} s", flush=True)
    events = ("imported", "model", "token 1", f"token {START_NEW}")
    rows = []
    for dtype in args.dtype:
        for kind in ("cold", "warm"):
            same = [start["seconds"] for start in starts if (start["dtype"], start["kind"]) == (dtype, kind)]
            medians = [statistics.median(seconds[event] for seconds in same) for event in events]
            rows.append([dtype, kind, *(f"{median:.2f}" for median in medians)])
    print_table(["dtype", "start", *(f"{event}, s" for event in events)], rows)
    return {"starts": starts}


def _start(args: argparse.Namespace, dtype: str, folder: Path) -> dict[str, float]:
    """Start a process that compiles into `folder`; return the seconds from its start to each line that it prints."""
    model = ["--model", str(args.model)] if args.config is None else ["--config", args.config]
    command = [sys.executable, "-m", "tools.bench", "first-token", *model]
    command += ["--dtype", dtype, "--device", args.device, "--compile", args.compile]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    started, seconds = time.perf_counter(), {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | caches) as child:
        for line in child.stdout or ():
            seconds[line.strip()] = time.perf_counter() - started
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return seconds


def _first_token(args: argparse.Namespace) -> int:
    """Print a line after the imports, a line when the model is loaded, and one per token: the child of `startup`."""
    print("imported", flush=True)
    model = model_of(args, args.dtype[0])
    print("model", flush=True)
    ids = random_ids(START_LENGTH, model.config)
    engine = Engine(model, compile=COMPILE[args.compile])
    stream = engine.stream([ids], max_new_tokens=START_NEW, sampling=Sampling(), stop_token_ids=())
    for number, _ in enumerate(stream, start=1):
        print(f"token {number}", flush=True)
    return 0


# Fused prompts


@torch.no_grad()
def _fusion(args: argparse.Namespace) -> dict[str, Any]:
    from tools._peers import load, register

    register()
    tokenizer = Tokenizer.from_pretrained(args.model)
    question = fuse([tokenizer.encode(text) for text in PARAPHRASES], suffix=tokenizer.encode("\nAnswer:"))
    print(f"{len(question.ids)} tokens in {len(PARAPHRASES)} prompts, {args.new} new")
    found, rows = [], []
    for dtype in args.dtype:
        model = model_of(args, dtype)
        seconds, same = _fused(model, load(model, args.model, "eager"), tokenizer, question, args)
        clear(args.device)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = next(iter(medians.values()))
        rows += [[dtype, name, f"{m:.2f}", f"{m / first:.1f}", str(same[name])] for name, m in medians.items()]
        found.append({"dtype": dtype, "seconds": seconds, "same_tokens": same})
    print_table(["dtype", "", "s", "times the first", "same tokens"], rows)
    return {"prompt": len(question.ids), "cases": found}


def _fused(
    model: Llama, peer: Any, tokenizer: Tokenizer, question: Prompt, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Return the seconds of each way in each round, and whether its tokens always equal those of the first way."""
    engine = Engine(model, tokenizer, compile=True)
    options: dict[str, Any] = {"max_new_tokens": args.new, "stop_token_ids": ()}
    ways = {
        "cached, compiled": lambda: engine.generate([question], **options)[0].tokens,
        "transformers, whole sequence for every token": lambda: _recomputed(_peer_logits(peer), question, args.new),
        "here, whole sequence for every token": lambda: _recomputed(_own_logits(model), question, args.new),
    }
    expected = engine.generate([question], **options)[0].tokens  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    same = dict.fromkeys(ways, True)
    for _ in range(args.rounds):
        for name, way in ways.items():
            tokens: list[list[int]] = []
            seconds[name].append(timed(args.device, lambda way=way, tokens=tokens: tokens.append(way())))
            same[name] &= tokens[0] == expected
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds, same


def _peer_logits(peer: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def logits(ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        tokens = Tokens.arriving(ids.shape[1], segments=segments)
        visible = masks.fused().dense(tokens, tokens, 1)
        mask = torch.zeros(visible.shape, dtype=peer.dtype).masked_fill(~visible, torch.finfo(peer.dtype).min)
        given = {"attention_mask": mask.to(peer.device), "position_ids": positions.to(peer.device)}
        return peer(ids.to(peer.device), use_cache=False, **given).logits

    return logits


def _own_logits(model: Llama) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compute densely, and only the last logits: on a CPU the fastest way without a cache."""

    def logits(ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        given = {"positions": positions, "segments": segments, "mask": masks.fused()}
        return model(ids, backend="dense", logits_to_keep=1, **given)

    return logits


def _recomputed(logits_of: Callable[[Tensor, Tensor, Tensor], Tensor], prompt: Prompt, new: int) -> list[int]:
    """Generate the same text, running the whole sequence through the model for every token."""
    ids, positions, segments = list(prompt.ids), list(prompt.positions), list(prompt.segments)
    for _ in range(new):
        logits = logits_of(*(torch.tensor([x]) for x in (ids, positions, segments)))
        ids.append(int(logits[0, -1].argmax()))
        positions.append(max(positions) + 1)
        segments.append(masks.GENERATED)
    return ids[len(prompt.ids) :]


# Sliding windows


@torch.no_grad()
def _window(args: argparse.Namespace) -> dict[str, Any]:
    window = masks.sliding_window(args.window)
    cases: dict[str, tuple[int, Mask]] = {f"context {args.window}": (args.window, masks.causal())}
    for context in args.context:
        cases[f"context {context}, window {args.window}"] = context, window
        cases[f"context {context}"] = context, masks.causal()
    found, rows = [], []
    for dtype in args.dtype:
        model = model_of(args, dtype)
        steps = {name: _decoding(model, *case, 3 + 20 * args.rounds) for name, case in cases.items()}
        for step in steps.values():
            _busy(args.device, step, 3)  # compiles
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.rounds):
            for name, step in steps.items():
                seconds[name].append(_busy(args.device, step, 20))
                print(f"{dtype}, {name}: {seconds[name][-1] * 1e3:.3f} ms a token", flush=True)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = next(iter(medians.values()))
        rows += [[dtype, name, f"{m * 1e3:.3f}", f"{m / first:.3f}"] for name, m in medians.items()]
        found.append({"dtype": dtype, "seconds": seconds})
        del model, steps, step
        clear(args.device)
    print_table(["dtype", "", "ms a token", "times the first"], rows)
    return {"cases": found}


def _busy(device: str, step: Callable[[], object], count: int) -> float:
    """Return the seconds per step that the device is busy: on a GPU the sum of its kernels, without launch overhead."""
    if not device.startswith("cuda"):
        return timed(device, lambda: [step() for _ in range(count)]) / count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed(device, lambda: [step() for _ in range(count)])
    return sum(event.self_device_time_total for event in profile.key_averages()) / count / 1e6


def _decoding(model: Llama, context: int, mask: Mask, new: int) -> Callable[[], object]:
    """Return a function that decodes one more token, up to `new` of them, after `context` tokens whose keys and values
    are zeros, which takes as long as any others."""
    cache = model.new_cache(1, context + new)
    with cache.appending(context):
        cache.append(Tokens(*(x.to(model.device) for x in Tokens.arriving(context))))
    plan, run = model.attention_plan(mask), Graphs().of("decoding")
    ids = torch.full((1, 1), 3, device=model.device)

    def decode() -> None:
        with cache.appending(1):
            x, _ = model.step(ids, None, None, None, cache, plan, "flex", run)
            run("head", Llama.head, model, x)

    return decode


COMMANDS = {"decode": _decode, "prefill": _prefill, "startup": _startup, "fusion": _fusion, "window": _window}

if __name__ == "__main__":
    sys.exit(main())
