"""Finetuning: train on texts packed into one row, each seeing only itself, until the model knows them by heart.

python -m examples.finetune --text one.txt --text two.txt --output weights/mine
transformers can load the result; with `--lora 8` an adapter of rank 8 is trained instead, which peft can load. The
backward of attention is FlexAttention's on a GPU, and the dense one on a CPU.
"""

import argparse
import shutil
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llama_flex import Engine, Llama, Tokenizer, masks

RHYMES = (
    "The moon forgot her silver shoe upon the baker's windowsill.",
    "Nine patient herons learned to count the coins beneath the water mill.",
)


def packed(texts: list[list[int]], end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack texts into one row: ids, targets (-100 where there is none), positions and segments, each `[1, T]`."""
    ids = [[*text, end] for text in texts]
    targets = [[*text[1:], -100] for text in ids]
    positions = [range(len(text)) for text in ids]
    segments = [[n] * len(text) for n, text in enumerate(ids)]
    return tuple(torch.tensor([list(chain(*rows))]) for rows in (ids, targets, positions, segments))


def train(
    model: Llama, texts: list[list[int]], steps: int, lr: float, recompute: bool = False, adapter: str | None = None
) -> list[float]:
    """Overfit the texts, with the whole model or an adapter of it; return the loss of every step."""
    model.train().requires_grad_(adapter is None)
    parameters = model.parameters() if adapter is None else model.adapters.train(adapter)
    cuda = model.device.type == "cuda"
    for block in model.layers if cuda else ():
        block.compile(dynamic=False)
    ids, targets, positions, segments = (x.to(model.device) for x in packed(texts, model.eos_token_ids[0]))
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True), []
    for step in range(steps):
        logits = model(
            ids,
            positions=positions,
            segments=segments,
            mask=[mask & masks.document() for mask in model.default_masks],
            backend="flex" if cuda else "dense",
            recompute=recompute,
        )
        loss = cross_entropy(logits[0].float(), targets[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    model.eval().requires_grad_(False)
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Finetune, save, and let the model continue the first words of each text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/SmolLM2-135M-Instruct"))
    parser.add_argument(
        "--text", type=Path, action="append", help="a text file; repeat it for several (default: two rhymes)"
    )
    parser.add_argument("--output", type=Path, help="a new folder for the finetuned checkpoint")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, help="default 1e-4, for an adapter 2e-3")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter of this rank, and save that")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward pass")
    args = parser.parse_args(arguments)
    if args.output is not None:
        args.output.mkdir(parents=True)  # before any work
    model, tokenizer = (
        Llama.from_pretrained(args.model, dtype=getattr(torch, args.dtype)),
        Tokenizer.from_pretrained(args.model),
    )
    texts = [path.read_text() for path in args.text] if args.text else RHYMES
    ids = [tokenizer.encode(text) for text in texts]
    adapter = None if args.lora is None else model.adapters.add("finetuned", rank=args.lora)
    train(model, ids, args.steps, args.lr or (1e-4 if adapter is None else 2e-3), args.recompute, adapter)
    if args.output is not None and adapter is not None:
        model.adapters.save(adapter, args.output)
    elif args.output is not None:
        model.save_pretrained(args.output)
        for file in args.model.glob("*token*"):
            shutil.copy(file, args.output)
    for text in ids:
        (done,) = Engine(model, tokenizer).generate([text[:4]], max_new_tokens=len(text))
        print(f"{tokenizer.decode(text[:4])!r} goes on: {done.text!r}")


if __name__ == "__main__":
    main()
