"""The perplexity of text under a model, as its dtype, its quantisation and that of its keys and values change it:

python -m tools.perplexity --quantize int8 README.md docs/*.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from llama_flex import Engine, Llama, Tokenizer
from llama_flex.eval.scoring import score
from llama_flex.kernels.kv_cache import KVDtype
from llama_flex.layers import Linear

from ._measuring import DEMO

WIDTH = 1024  # tokens that are predicted from those before them in the same window


def perplexity(model: Llama, ids: Sequence[int], kv_dtype: KVDtype = None) -> tuple[float, int]:
    """Return the perplexity of a text in windows of WIDTH tokens, and how many tokens were predicted."""
    engine = Engine(model, backend="dense", kv_dtype=kv_dtype)
    windows = range(0, len(ids) - 1, WIDTH)
    scores = [score(engine, ids[n : n + 1], [ids[n + 1 : n + 1 + WIDTH]])[0] for n in windows]
    count = sum(len(each.logprobs) for each in scores)
    return math.exp(-sum(each.total for each in scores) / count), count


def round_as_gguf(model: Llama, kind: str) -> None:
    """Replace the layers' matrices by what is left of them in a type of GGUF, such as "Q4_0"."""
    import gguf

    for module in (x for x in model.layers.modules() if isinstance(x, Linear)):
        numbers = gguf.quantize(module.weight.float().cpu().numpy(), gguf.GGMLQuantizationType[kind])
        module.weight.copy_(torch.from_numpy(gguf.dequantize(numbers, gguf.GGMLQuantizationType[kind])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="text, read one after the other")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--quantize", metavar="FORMAT", help="as for llama_flex.generate")
    parser.add_argument("--kv-dtype", choices=("fp8",), help="as for llama_flex.generate")
    parser.add_argument(
        "--gguf", metavar="TYPE", help="of llama.cpp: the layers' matrices as Q4_0 or the like has them"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.quantize and args.gguf:
        parser.error("--quantize and --gguf: give one of them")
    ids = Tokenizer.from_pretrained(args.model).encode("".join(path.read_text() for path in args.files))
    dtype = getattr(torch, args.dtype)
    model = Llama.from_pretrained(args.model, device=args.device, dtype=dtype, quantize=args.quantize)
    if args.gguf is not None:
        round_as_gguf(model, args.gguf)
    found, count = perplexity(model, ids, args.kv_dtype)
    what = f"{args.quantize or args.gguf or 'not quantised'}, keys and values in {args.kv_dtype or args.dtype}"
    print(f"{args.dtype}, {what}: perplexity {found:.4f} of {count:,} tokens")


if __name__ == "__main__":
    main()
