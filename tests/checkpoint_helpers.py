"""Checkpoints to load, to change and to damage, and comparisons of their tensors with transformers'."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llama_flex import Llama
from llama_flex.weights import named_weights

INDEX = "model.safetensors.index.json"


def load(folder, **options) -> Llama:
    """Return the model in `folder`, on the CPU."""
    return Llama.from_pretrained(folder, device="cpu", **options)


def load_quietly(folder, **options) -> Llama:
    """Return the model in `folder`; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, **options)


def refusal(folder, *needles: str, **options) -> str:
    """Return the message with which loading `folder` is refused: one line, which must contain all needles."""
    with pytest.raises(ValueError, match=r".") as caught:
        load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message, message
    for needle in needles:
        assert needle in message, message
    return message


def load_in_transformers(folder, dtype=torch.float32) -> transformers.LlamaForCausalLM:
    """Return transformers' model of `folder`, which must hold exactly the tensors that it expects."""
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


# ---- tensors by their names in a checkpoint


def tensors_of(model: Llama) -> dict[str, torch.Tensor]:
    """Return the tensors of a model of ours."""
    return named_weights(model, model.config)


def state_of(reference: transformers.LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the tensors of transformers' model, without the copy of a tied embedding."""
    state = {name: tensor.to(dtype) for name, tensor in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor."""
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same_tensors(found: dict, expected: dict) -> None:
    """Check that names, dtypes, shapes and bits are equal."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def logits(model, vocab_size: int) -> torch.Tensor:
    """Return the logits of some random ids, by a model of ours or transformers'."""
    ids = torch.randint(vocab_size, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


# ---- changes to a folder


def edited(change):
    """Return a change of tensors, for `rewrite`, from one in place."""

    def run(tensors):
        change(tensors)
        return tensors

    return run


def rewrite(folder: Path, change=None, **configured) -> dict[str, torch.Tensor]:
    """Apply `change` to the tensors of a checkpoint and `configured` to its config.json; return the tensors."""
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        tensors = change(dict(tensors)) or tensors
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if configured:
        config = json.loads((folder / "config.json").read_text()) | configured
        (folder / "config.json").write_text(json.dumps(config))
    return tensors


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """Split a checkpoint into shards with an index, as the hub has them; return the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::parts]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map) -> None:
    """Write an index of shards."""
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
