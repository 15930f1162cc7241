"""Measurements: `python -m tools.bench NAME`. Every number is a ratio to a peer measured in the same run.

    fusion    five prompts fused, cached and compiled, against recomputing the whole sequence for every token, as
              transformers with a 4-D mask does it and as this package can
    window    decoding at a long context with a sliding window, against decoding at a context of the window's length

Prints a line for each measurement and a line of JSON with all of them at the end. The machine's noise is part of every
single time, so times are medians over several rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llama_flex import Engine, Llama, LlamaConfig, Mask, Prompt, Tokenizer, Tokens, fuse, masks
from llama_flex.compiling import compiled

DEMO = Path("weights/SmolLM2-135M-Instruct")
SHAPES = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
    },
}
PARAPHRASES = (
    "A farmer has twelve apples in a basket. He gives three of them to his neighbour and two to his daughter, and "
    "then finds one more under the tree. In the afternoon a traveller comes to the farm and buys half of what is "
    "left. In the evening the farmer's wife brings four apples home from the market, and puts them into the same "
    "basket. At night a mouse spoils one apple, which the farmer throws away. How many good apples are in the "
    "basket now?",
    "There are twelve apples in the basket of a farmer. Three go to the neighbour, two go to the daughter, and one "
    "is found below the tree. Half of those that remain are sold to a traveller who visits the farm in the "
    "afternoon. Then the wife of the farmer comes back from the market with four more, which she adds to the "
    "others. During the night one of them is spoiled by a mouse and has to be thrown away. What is the number of "
    "good apples in the end?",
    "Starting with twelve apples, a farmer hands three to a neighbour and two to his daughter. Under the tree he "
    "finds another one. A man on a journey stops at the farm after noon, and he pays for one half of the apples "
    "that are there. From the market, his wife carries four apples into the house before it is dark. The next "
    "morning they see that a mouse has eaten from one of the apples, so they do not keep that one. Count the good "
    "apples that they have.",
    "Someone who grows apples owns twelve of them. After presenting three to the person next door and two to his "
    "daughter, he picks up one more from under the tree. Later that day he sells half of all his apples to a "
    "stranger who is passing by. His wife, who was at the market, returns with four of them and lays them beside "
    "the rest. A mouse gets at one apple while everybody sleeps, and it is no longer good. How many good ones does "
    "he own?",
    "Twelve apples lie in a basket. The farmer whose basket it is takes out three for his neighbour and two for his "
    "daughter. He puts in one which he found under the tree. A traveller then buys every second apple from the "
    "basket. Four apples, which the farmer's wife got at the market, are put into it in the evening. In the night "
    "one apple is bitten by a mouse, and in the morning it is taken out. How many good apples lie in the basket "
    "after all of this?",
)


def main(argv: list[str] | None = None) -> int:
    """Run one measurement; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="name", required=True)
    fusion = commands.add_parser("fusion", help="five fused prompts against uncached recomputing")
    fusion.add_argument("--model", type=Path, default=DEMO)
    fusion.add_argument("--new", type=int, default=40, help="tokens to generate")
    window = commands.add_parser("window", help="a window at a long context against a short context")
    window.add_argument("--shape", choices=SHAPES, default="8b", help="of random weights")
    window.add_argument("--context", type=int, default=32768)
    window.add_argument("--window", type=int, default=1024)
    for command in (fusion, window):
        default = "float32" if command is fusion else "bfloat16"
        command.add_argument("--dtype", choices=("float32", "bfloat16"), default=default)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    results = {"name": args.name, **_hardware(args.device), **{"fusion": _fusion, "window": _window}[args.name](args)}
    print(json.dumps(results))
    return 0


def _hardware(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def _timed(device: str, work: Callable[[], object]) -> float:
    """Seconds that some work takes, on the device too."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def _fusion(args: argparse.Namespace) -> dict[str, Any]:
    model = Llama.from_pretrained(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    tokenizer = Tokenizer.from_pretrained(args.model)
    question = fuse([tokenizer.encode(text) for text in PARAPHRASES], suffix=tokenizer.encode("\nAnswer:"))
    # Before anything compiles: transformers changes what graphs are guarded on.
    peer = transformers.LlamaForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="eager"
    ).to(args.device)
    engine = Engine(model, tokenizer, compile=True)
    options: dict[str, Any] = {"max_new_tokens": args.new, "stop_token_ids": ()}
    engine.generate([question], **options)  # compiles
    ways = {
        "cached, compiled": lambda: engine.generate([question], **options)[0].tokens,
        "transformers, whole sequence for every token": lambda: _recomputed(_peer_logits(peer), question, args.new),
        "here, whole sequence for every token": lambda: _recomputed(_own_logits(model), question, args.new),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: list[list[int]] = []
    for _ in range(args.rounds):
        for name, way in ways.items():
            seconds[name].append(_timed(args.device, lambda way=way: tokens.append(way())))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first, same = next(iter(medians.values())), all(found == tokens[0] for found in tokens)
    print(f"{len(question.ids)} tokens in {len(PARAPHRASES)} prompts, {args.new} new; the same tokens: {same}")
    for name, median in medians.items():
        print(f"{name}: {median:.2f} s, {median / first:.1f} times the first")
    return {"dtype": args.dtype, "prompt": len(question.ids), "new": args.new, "seconds": seconds, "same_tokens": same}


def _peer_logits(peer: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def logits(ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        tokens = Tokens.arriving(ids.shape[1], segments=segments)
        visible = masks.fused().dense(tokens, tokens, 1)
        mask = torch.zeros(visible.shape, dtype=peer.dtype).masked_fill(~visible, torch.finfo(peer.dtype).min)
        given = {"attention_mask": mask.to(peer.device), "position_ids": positions.to(peer.device)}
        return peer(ids.to(peer.device), use_cache=False, **given).logits

    return logits


def _own_logits(model: Llama) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense, and only the last logits: the fastest without a cache on a CPU."""

    def logits(ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        given = {"positions": positions, "segments": segments, "mask": masks.fused()}
        return model(ids, backend="dense", logits_to_keep=1, **given)

    return logits


def _recomputed(logits_of: Callable[[Tensor, Tensor, Tensor], Tensor], prompt: Prompt, new: int) -> list[int]:
    """The same generation by a forward of the whole sequence for every token."""
    ids, positions, segments = list(prompt.ids), list(prompt.positions), list(prompt.segments)
    for _ in range(new):
        logits = logits_of(*(torch.tensor([x]) for x in (ids, positions, segments)))
        ids.append(int(logits[0, -1].argmax()))
        positions.append(max(positions) + 1)
        segments.append(masks.GENERATED)
    return ids[len(prompt.ids) :]


@torch.no_grad()
def _window(args: argparse.Namespace) -> dict[str, Any]:
    config = LlamaConfig.from_dict({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPES[args.shape]})
    with torch.device("meta"):
        model = Llama(config)
    model = model.to_empty(device=args.device).to(getattr(torch, args.dtype)).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    window = masks.sliding_window(args.window)
    cases: dict[str, tuple[int, Mask]] = {
        f"context {args.window}": (args.window, masks.causal()),
        f"context {args.context}, window {args.window}": (args.context, window),
        f"context {args.context}": (args.context, masks.causal()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    running = {name: _decoding(model, *case) for name, case in cases.items()}
    for step in running.values():
        _busy(args.device, step, 3)  # compiles
    for _ in range(args.rounds):
        for name, step in running.items():
            seconds[name].append(_busy(args.device, step, 20))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name}: {median * 1e3:.3f} ms a token, {median / first:.3f} times the first")
    return {"shape": args.shape, "dtype": args.dtype, "ms": {name: m * 1e3 for name, m in medians.items()}}


def _busy(device: str, step: Callable[[], object], count: int) -> float:
    """Seconds a step keeps the device busy: on a GPU the sum of its kernels, so that launches do not hide them."""
    if not device.startswith("cuda"):
        return _timed(device, lambda: [step() for _ in range(count)]) / count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _timed(device, lambda: [step() for _ in range(count)])
    return sum(event.self_device_time_total for event in profile.key_averages()) / count / 1e6


def _decoding(model: Llama, context: int, mask: Mask) -> Callable[[], object]:
    """A function that decodes one more token after `context` others, whose keys and values are zeros: it takes no less
    time for that."""
    cache = model.new_cache(1, context + 512)
    with cache.appending(context):
        cache.append(Tokens(*(x.to(model.device) for x in Tokens.arriving(context))))
    layers, step = model.attention_layers(mask), compiled(model.step)
    ids = torch.full((1, 1), 3, device=model.device)

    def decode() -> None:
        with cache.appending(1):
            step(ids, None, None, None, cache, layers, "flex", 1)

    return decode


if __name__ == "__main__":
    sys.exit(main())
