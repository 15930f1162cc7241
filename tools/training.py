"""Benchmark a training step on documents packed into one row: `python -m tools.training --config llama-3.2-1b`.

A step is forward, backward and AdamW, in one dtype throughout. Its share of the speed of matrix products counts only
the operations that the model needs: the forward, twice as many for the backward, attention within documents, nothing
that is recomputed. Peers are transformers, which see the documents by positions that start again at 0; both sides have
the same compiled loss. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llama_flex import Llama, masks
from tools import _peers
from tools._measuring import (
    CONFIGS,
    attempt,
    check_device,
    check_model,
    clear,
    model_of,
    print_json,
    print_table,
    products,
    random_ids,
    several,
    whole_number,
)
from tools._measuring import operations as of_prompt

PEERS = {"sdpa": ("sdpa", False), "sdpa-compiled": ("sdpa", True), "flex": ("flex_attention", True)}


def operations(model: Llama, lengths: list[int]) -> int:
    """Count the floating-point operations of a step: forward, and twice as many backward."""
    logits = 2 * model.lm_head.weight.numel()  # per token
    return 3 * sum(of_prompt(model, n) + (n - 1) * logits for n in lengths)


def stepping(parameters: list[Any], forward: Callable[[], Tensor], targets: Tensor) -> Callable[[], None]:
    """Return a function that does a training step; `forward` returns logits `[1, T, V]`."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    loss_of = torch.compile(lambda logits: cross_entropy(logits[0].float(), targets), dynamic=False)

    def step() -> None:
        loss_of(forward()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(args: argparse.Namespace, model: Llama) -> dict[str, Any]:
    """Measure the seconds and the peak memory of a step in each way; print a table."""
    length = args.tokens // args.documents
    lengths = [length] * args.documents
    ids = torch.tensor([random_ids(sum(lengths), model.config)], device=args.device)
    positions = torch.arange(length, device=args.device).repeat(args.documents)[None]
    segments = torch.arange(args.documents, device=args.device).repeat_interleave(length)[None]
    targets = torch.where(positions[0] < length - 1, ids[0].roll(-1), -100)
    cuda, ways = args.device.startswith("cuda"), {}

    def ours() -> Tensor:
        return model(
            ids,
            positions=positions,
            segments=segments,
            mask=[mask & masks.document() for mask in model.default_masks],
            backend="flex" if cuda else "dense",
            recompute=args.recompute,
        )

    def run(parameters: list[Any], forward: Callable[[], Tensor]) -> dict[str, Any]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = several(args.device, stepping(parameters, forward, targets), args.rounds)
        return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated() if cuda else None}

    model.train().requires_grad_(True)
    for block in model.layers if cuda else ():
        block.compile(fullgraph=True, dynamic=False)
    ways["llama_flex"] = run([*model.parameters()], ours)
    for name in args.peers:
        clear(args.device)
        attention, compiled = PEERS[name]

        def peer(attention: str = attention, compiled: bool = compiled) -> dict[str, Any]:
            theirs = _peers.load(model, None if args.config else args.model, attention).train().requires_grad_(True)
            if args.recompute:
                theirs.gradient_checkpointing_enable()
            call = torch.compile(theirs.forward, dynamic=False) if compiled else theirs.forward
            return run([*theirs.parameters()], lambda: call(ids, position_ids=positions, use_cache=False).logits)

        found = attempt(peer)
        ways[f"transformers, {name}"] = {"error": found} if isinstance(found, str) else found
    work, found = operations(model, lengths), products(args.device, args.dtype)
    ceiling = found["operations"] / statistics.median(found["seconds"])
    print(f"matrix products run at {ceiling / 1e12:.3f} TFLOP/s")
    rows = []
    for name, way in ways.items():
        if "error" in way:
            rows.append([name, way["error"], "", "", "", ""])
            continue
        each = statistics.median(way["seconds"])
        memory = "" if way["bytes"] is None else f"{way['bytes'] / 2**30:.1f}"
        speed = [f"{each * 1e3:.1f}", f"{sum(lengths) / each:.0f}", f"{work / each / 1e12:.3f}"]
        rows.append([name, *speed, f"{work / each / ceiling:.1%}", memory])
    print_table(["", "ms a step", "tokens/s", "TFLOP/s", "of matrix products", "peak GiB"], rows)
    return {"flop": work, "flop_per_s": ceiling, "ways": ways}


def main(argv: list[str] | None = None) -> int:
    """Run the measurement; return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="a folder, or a name on the hub")
    which.add_argument("--config", choices=CONFIGS, help="a shape, with random weights")
    parser.add_argument("--tokens", type=whole_number, default=8192, help="tokens in a step (default %(default)s)")
    parser.add_argument(
        "--documents", type=whole_number, default=8, help="documents in a row, of equal length (default %(default)s)"
    )
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["sdpa"], help="ways of running transformers")
    parser.add_argument("--rounds", type=whole_number, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    check_device(parser, args)
    context = check_model(parser, args)
    if not 2 <= args.tokens // args.documents <= context:
        parser.error(f"documents must have from 2 to {context} tokens, not {args.tokens // args.documents}")
    _peers.register()
    print_json(args, measure(args, model_of(args, args.dtype)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
