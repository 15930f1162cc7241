"""Run llama.cpp on our models' weights, as the benchmarks' peer on a CPU: the package xllamacpp, or llama-bench."""

from __future__ import annotations

import atexit
import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from torch import Tensor

from llama_flex import Llama
from llama_flex.checkpoint.quantization import assign
from llama_flex.kernels.modules import MatrixModule
from llama_flex.kernels.weight import Weight
from llama_flex.weights import named_weights

TYPES = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
NAMES = {  # Hugging Face's names of the weights, and those of GGUF
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Peer:
    """Greedy generation from one prompt by llama.cpp, on as many threads as torch has. The times are its own, those of
    new tokens the mean of all. It has a process of its own, stopped while others are measured: its idle threads spin.
    """

    def __init__(self, model: Llama, slots: int) -> None:
        """slots: how many tokens its cache must hold. Raises ValueError as `write` does."""
        with tempfile.TemporaryDirectory() as folder:
            write(model, path := Path(folder) / "model.gguf")
            command = [sys.executable, "-m", "tools._llama_cpp", path, str(slots + 1), str(torch.get_num_threads())]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, text=True, **pipes)
            atexit.register(self._process.kill)
            self._ask({"prompt": [0], "n_predict": 1})

    def decode(self, ids: Sequence[int], new: int, warm_up: int) -> tuple[float, list[int]]:
        """Generate; return the seconds for the tokens from number `warm_up` to number `new`, and all tokens."""
        done = self._complete(ids, new)
        return (new - warm_up) * done["timings"]["predicted_per_token_ms"] / 1e3, _tokens(done)

    def prefill(self, ids: Sequence[int]) -> tuple[float, list[int]]:
        """Return the seconds that the prompt takes, and the token after it."""
        done = self._complete(ids, 1)
        return done["timings"]["prompt_ms"] / 1e3, _tokens(done)

    def _complete(self, ids: Sequence[int], new: int) -> dict[str, Any]:
        greedy = {"temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}
        return self._ask({"prompt": list(ids), "n_predict": new, **greedy})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        done: dict[str, Any] = json.loads(self._process.stdout.readline() or "{}")
        if "timings" not in done:
            raise RuntimeError(f"llama.cpp answers {done}")
        self._process.send_signal(signal.SIGSTOP)
        return done


class NativePeer:
    """The same by the program llama-bench, built for this machine. It decodes random tokens, without sampling."""

    def __init__(self, model: Llama, slots: int) -> None:
        """slots: as for `Peer`. Raises FileNotFoundError without the program, and ValueError as `write` does."""
        program = shutil.which("llama-bench")
        if program is None:
            raise FileNotFoundError("there is no llama-bench on the PATH; build llama.cpp")
        self._folder = tempfile.TemporaryDirectory()
        write(model, path := Path(self._folder.name) / "model.gguf")
        self._command = [program, "-m", str(path), "-t", str(torch.get_num_threads()), "-r", "1", "-o", "json"]

    def decode(self, ids: Sequence[int], new: int, warm_up: int) -> tuple[float, list[int]]:
        """Generate; return the seconds for the tokens from number `warm_up` to number `new`, and no tokens."""
        return self._seconds("-p", 0, "-n", new - warm_up, "-d", len(ids) + warm_up), []

    def prefill(self, ids: Sequence[int]) -> tuple[float, list[int]]:
        """Return the seconds that a prompt of as many tokens takes, and no tokens."""
        return self._seconds("-p", len(ids), "-n", 0), []

    def _seconds(self, *options: str | int) -> float:
        run = subprocess.run([*self._command, *map(str, options)], capture_output=True, text=True, check=True)
        return float(json.loads(run.stdout)[0]["avg_ns"]) / 1e9


def serve(path: str, slots: str, threads: str) -> None:
    """Answer requests, a line of JSON each, from standard input."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = path, int(slots), 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.n_batch = parameters.n_ubatch = 512
    server = xllamacpp.Server(parameters)
    for line in sys.stdin:
        print(json.dumps(server.handle_completions(json.loads(line))), flush=True)


def write(model: Llama, path: Path) -> None:
    """Write a model as a GGUF file, with a vocabulary of numbers; a quantised one as Q8_0, or as Q4_0 if its
    numbers have 4 bits, embedding and output matrix, too, unless they are quantised in another way.

    Raises ValueError for dtypes, architectures and rope types that this does not write.
    """
    config, dims = model.config, model.dims
    kind = config.rope_parameters.rope_type
    biases = config.attention_bias or config.mlp_bias
    if model.dtype not in TYPES or config.architecture.name != "LlamaForCausalLM" or kind != "default" or biases:
        what = f"{config.architecture.name} in {model.dtype} with RoPE {kind!r}"
        raise ValueError(f"no GGUF file is written for {what}")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(dims.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(dims.hidden_size)
    writer.add_feed_forward_length(dims.mlp_size)
    writer.add_head_count(dims.num_heads)
    writer.add_head_count_kv(dims.num_kv_heads)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_rope_dimension_count(dims.head_dim)
    writer.add_rope_freq_base(config.rope_parameters.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(dims.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{n}>" for n in range(dims.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * dims.vocab_size)
    writer.add_token_merges(["< 0"])
    writer.add_eos_token_id(dims.vocab_size - 1)
    model, in_layers, vocabulary = copy.deepcopy(model), None, None
    for path, module in model.named_modules():
        if isinstance(module, MatrixModule) and module.weight_scale is not None:
            kinds = gguf.GGMLQuantizationType
            kind = kinds.Q4_0 if module.matrix.is_packed else kinds.Q8_0
            in_layers, vocabulary = (kind, vocabulary) if path.startswith("layers.") else (in_layers, kind)
            assign(module, Weight(module.matrix.floats()))
    for name, weight in named_weights(model, config).items():
        layer, _, inside = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        theirs = f"blk.{layer}.{NAMES[inside]}" if layer.isdigit() else NAMES[name.removesuffix(".weight")]
        if "attn_q" in theirs or "attn_k" in theirs:
            weight = _permuted(weight, dims.num_heads if "attn_q" in theirs else dims.num_kv_heads)
        weight = (weight.float() if weight.dim() == 1 else weight).contiguous()  # llama.cpp wants norms in float32
        quantised = in_layers if layer.isdigit() else vocabulary or in_layers
        if quantised is not None and weight.dim() > 1:
            numbers = gguf.quantize(weight.float().numpy(), quantised)
            writer.add_tensor(f"{theirs}.weight", numbers, raw_dtype=quantised)
            continue
        writer.add_tensor(f"{theirs}.weight", weight.cpu().view(torch.uint8).numpy(), raw_dtype=TYPES[weight.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokens(done: dict[str, Any]) -> list[int]:
    return [int(number) for number in re.findall(r"<(\d+)>", done["choices"][0]["text"])]


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Bring the rows of q or k into llama.cpp's order, which rotates neighbours: see `fetch_smollm2.unpermute`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


if __name__ == "__main__":
    serve(*sys.argv[1:])
