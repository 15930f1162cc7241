"""Share code between the benchmarks: models, arguments, timing, tables, and the speed of the machine."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama_flex import Llama, LlamaConfig
from llama_flex.checkpoint import hub
from llama_flex.checkpoint.quantization import Quantization, prepare
from llama_flex.eval.samples import CONFIGS
from llama_flex.layers import Linear

Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "weights/SmolLM2-135M-Instruct"
COMPILE: dict[str, Any] = {"auto": "auto", "on": True, "off": False}


def whole_number(text: str) -> int:
    """Parse an argument that is a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make --device the current device, or exit with the reason why it cannot be."""
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device {args.device} is not known; use cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            parser.error(f"--device {args.device} does not exist; torch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device.index or 0)


def check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Resolve the model's folder, or exit with the reason why that fails; return the model's context."""
    try:
        if args.model is not None:
            args.model = hub.resolve(args.model, hub.MODEL_FILES + hub.TOKENIZER_FILES).resolve()
        return config_of(args).max_position_embeddings
    except ValueError as error:
        parser.error(str(error))


def hardware(device: str) -> dict[str, Any]:
    """Describe the machine and the versions of the software."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu()
    versions = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    return {"hardware": name, "threads": torch.get_num_threads(), **versions, "python": platform.python_version()}


def cpu() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def config_of(args: argparse.Namespace) -> LlamaConfig:
    """Return the config that --config or --model names."""
    if args.config is None:
        return LlamaConfig.from_pretrained(args.model)
    return LlamaConfig.from_dict(CONFIGS[args.config])


def model_of(args: argparse.Namespace, dtype: str) -> Llama:
    """Return the model that --config or --model names; a shape gets random weights, and ones for its norms."""
    wanted = getattr(torch, dtype)
    if args.config is None:
        quantize = getattr(args, "quantize", None)
        return Llama.from_pretrained(args.model, device=args.device, dtype=wanted, quantize=quantize)
    with torch.device("meta"):
        model = Llama(config_of(args)).to(wanted)
        prepare(model, Quantization.of(getattr(args, "quantize", None)))
    model = model.to_empty(device=args.device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        _randomise(name, parameter)
    return model


def _randomise(name: str, parameter: Tensor) -> None:
    if parameter.dim() == 1:
        parameter.fill_(1.0)
    elif parameter.dtype in (torch.int8, torch.int32):
        parameter.random_(torch.iinfo(parameter.dtype).min, torch.iinfo(parameter.dtype).max)
    elif parameter.dtype == torch.float8_e4m3fn:
        parameter.copy_((torch.randn(parameter.shape, device=parameter.device) * 74).clamp_(-448, 448))
    elif name.endswith("zero_point"):
        parameter.fill_(8)
    elif name.endswith("scale"):  # for a standard deviation of 0.02, of 8 bits or of 4
        parameter.fill_(0.02 / (74 if parameter.shape[1] == 1 else 4.6))
    else:
        parameter.normal_(std=0.02)


def random_ids(count: int, config: LlamaConfig) -> list[int]:
    """Return random token ids, always the same."""
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def timed(device: str, work: Callable[[], object]) -> float:
    """Return the seconds that some work takes, including its work on the device."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: str) -> None:
    """Wait until the device has done all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clear(device: str) -> None:
    """Drop all compiled code, and give unused memory back to the device."""
    torch.compiler.reset()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def print_json(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print the last line of a measurement: its arguments, the hardware, and the results."""
    given = {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({**given, **hardware(args.device), **results}))


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print()
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def attempt(work: Callable[[], Result]) -> Result | str:
    """Run some work of a peer; return its result, or what it raised in words, so that other results are not lost."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        # A compiler's message can have thousands of lines: keep the beginning.
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def several(device: str, work: Callable[[], object], count: int = 5) -> list[float]:
    """Return the seconds of each of `count` runs, after a first one that does not count."""
    return [timed(device, work) for _ in range(count + 1)][1:]


def matrices(model: Llama) -> int:
    """Count the numbers in the matrices of the layers."""
    return sum(math.prod(x.matrix.shape) for x in model.layers.modules() if isinstance(x, Linear))


def operations(model: Llama, length: int) -> int:
    """Count the floating-point operations of a prompt: the layers' matrices, causal attention, one token's logits."""
    c = model.config
    attention = 2 * length**2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    return 2 * matrices(model) * length + attention + 2 * math.prod(model.lm_head.matrix.shape)


def products(device: str, dtype: str) -> dict[str, Any]:
    """Time a large product of square matrices, 5 times; on a GPU, each time is the mean of 10 products in a row."""
    size, count = (8192, 10) if device.startswith("cuda") else (2048, 1)
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    seconds = several(device, lambda: [torch.mm(a, b, out=out) for _ in range(count)])
    return {"operations": 2 * size**3, "seconds": [each / count for each in seconds]}
