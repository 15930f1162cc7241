"""Benchmark speculation: `python -m tools.speculation NAME`.

    verify   the time of a step that verifies several tokens, against a step of one
    texts    tokens per second with and without drafts, on tasks over a text of this repository

Times are medians over rounds in which the ways take turns. Prints a table in Markdown, and last a line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama_flex import Engine, Llama, Sampling, Tokenizer
from llama_flex.checkpoint.files import FolderError
from llama_flex.engine.model_runner import ModelRunner, RecordedSteps
from llama_flex.engine.speculation import Speculation
from llama_flex.kernels.reductions import argmax
from tools._measuring import (
    COMPILE,
    CONFIGS,
    DEMO,
    ROOT,
    check_device,
    check_model,
    model_of,
    print_json,
    print_table,
    random_ids,
    wait,
    whole_number,
)

STEPS = 20  # `verify`: in a round
TASKS = {
    "edit": "Copy this text and mend its spelling:\n\n",
    "rename": "Print this text again, with `mask` renamed to `rule`:\n\n",
    "summarise": "Summarise this text:\n\n",
    "continue": "",
}


def verify(args: argparse.Namespace, model: Llama) -> dict[str, Any]:
    """Measure steps of one token and of several, all with greedy sampling after each."""
    runner, ids = ModelRunner(model, compile=COMPILE[args.compile]), random_ids(args.context, model.config)
    steps = {t: _step_of(runner, ids, t) for t in (1, *args.tokens)}
    seconds: dict[int, list[float]] = {t: [] for t in steps}
    for _ in range(args.rounds):
        for t, step in steps.items():
            wait(args.device)
            started = time.perf_counter()
            for _ in range(STEPS):
                step()
            wait(args.device)
            seconds[t].append((time.perf_counter() - started) / STEPS)
    medians = {t: statistics.median(each) for t, each in seconds.items()}
    rows = [[str(t), f"{each * 1e3:.3f}", f"{each / medians[1]:.3f}"] for t, each in medians.items()]
    print_table(["tokens", "ms a step", "times a step of one"], rows)
    return {"seconds": seconds}


def _step_of(runner: ModelRunner, ids: list[int], count: int) -> Callable[[], None]:
    """Return a function that computes, again and again, the same tokens after a context."""
    model, device = runner.model, runner.model.device
    plan, cache = model.attention_plan(), model.new_cache(1, len(ids) + count)
    Engine(model).generate([ids], max_new_tokens=1, cache=cache, stop_token_ids=(), sampling=Sampling())
    new = torch.tensor([ids[:count]], device=device)
    positions = torch.arange(len(ids), len(ids) + count, dtype=torch.int32, device=device)[None]
    segments, counts = torch.zeros_like(positions), torch.full((1,), count, dtype=torch.int32, device=device)
    tokens = torch.zeros(count, dtype=torch.int64, device=device)
    recorded = RecordedSteps(runner)

    def compute() -> None:
        x, _ = runner.step(new, counts, positions, segments, plan, cache)
        runner.run_for("sample", x.shape)("sample", _sample, model, x, tokens, counts, cache)

    def step() -> None:
        with cache.appending(count):
            recorded.run(("verify", cache.slots_in_use), compute, replays=runner.compile, memory=cache.layers)
        cache.release(count)

    for _ in range(4):  # compiled, recorded, and run again
        step()
    return step


def _sample(model: Llama, x: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, cache: Any) -> None:
    tokens.copy_(argmax(model.head(x)[0].float()))
    cache.drop(counts)


def texts(args: argparse.Namespace, model: Llama) -> dict[str, Any]:
    """Measure each task with every drafter and without."""
    tokenizer = Tokenizer.from_pretrained(args.model)
    text = (ROOT / "docs" / "pitfalls.md").read_text()[: args.characters]
    engines: dict[str, Engine] = {"none": Engine(model, tokenizer, compile=COMPILE[args.compile])}
    for name in args.drafters:
        engines[name] = Engine(model, tokenizer, compile=COMPILE[args.compile], speculate=name)
    rows, found = [], dict[str, Any]()
    for task, asked in TASKS.items():
        chat = [{"role": "user", "content": asked + text}]
        ids = tokenizer.encode(text)
        if asked:
            ids = tokenizer.encode(tokenizer.apply_chat_template(chat), add_special_tokens=False)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        tokens, before = dict[str, list[int]](), dict[str, Speculation | None]()
        for round in range(args.rounds + 1):
            for name, engine in engines.items():
                before[name] = copy.copy(engine.speculation)
                arrived, tokens[name] = [], []
                for step in engine.stream([ids], max_new_tokens=args.new, sampling=Sampling(), stop_token_ids=()):
                    arrived.append(time.perf_counter())
                    tokens[name].append(step.token)
                seconds[name] += [arrived[-1] - arrived[0]] if round else []
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        for name, engine in engines.items():
            pairs = enumerate(zip(tokens["none"], tokens[name], strict=True))
            same = next((n for n, (a, b) in pairs if a != b), args.new)
            now, then, drafts = engine.speculation, before[name], ["", "", ""]
            if now is not None and then is not None:
                steps, drafted, accepted = (
                    getattr(now, each) - getattr(then, each) for each in ("steps", "drafted", "accepted")
                )
                drafts = [str(drafted), str(accepted), f"{1 + accepted / max(steps, 1):.2f}"]
            rate, times = (args.new - 1) / medians[name], medians["none"] / medians[name]
            rows.append([task, name, f"{rate:.1f}", f"{times:.2f}", *drafts, f"{same} of {args.new}"])
            print(*rows[-1], flush=True)
        found[task] = seconds
    head = [
        "task",
        "drafts",
        "tokens/s",
        "times without",
        "drafted",
        "accepted",
        "tokens a verifying step",
        "the same tokens",
    ]
    print_table(head, rows)
    return {"seconds": found}


NAMES: dict[str, Callable[[argparse.Namespace, Llama], dict[str, Any]]] = {"verify": verify, "texts": texts}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.speculation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    each = {name: commands.add_parser(name) for name in NAMES}
    for name, command in each.items():
        models = command.add_mutually_exclusive_group()
        models.add_argument("--model", type=Path, metavar="DIR", help="a folder of real weights")
        if name == "verify":
            models.add_argument("--config", choices=CONFIGS, help="a shape, with random weights")
        command.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
        command.add_argument("--quantize", metavar="FORMAT", help="as for llama_flex.generate")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--rounds", type=whole_number, default=5)
        command.add_argument("--compile", choices=COMPILE, default="auto", help="as for llama_flex.generate")
    each["verify"].add_argument("--context", type=whole_number, default=1024)
    each["verify"].add_argument("--tokens", type=whole_number, nargs="+", default=[4, 8, 16])
    each["texts"].add_argument("--drafters", nargs="+", default=["lookup", "self"])
    each["texts"].add_argument("--characters", type=whole_number, default=2000, help="of the text in a task")
    each["texts"].add_argument("--new", type=whole_number, default=300)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one measurement; return 0."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.config = getattr(args, "config", None)
    if args.model is None and args.config is None:
        args.model = DEMO
    check_device(parser, args)
    check_model(parser, args)
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
