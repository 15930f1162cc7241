"""Weights of a checkpoint: their names, every tensor in its place, dtypes, tied embeddings, memory while loading."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import assert_same_tensors, load, load_quietly, logits, refusal, rewrite, state_of, tensors_of
from helpers import ROOT, TINY
from safetensors.torch import load_file, save_file

from llama_flex import Llama


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_loaded_bit_by_bit(name, tiny_pair):
    reference, model = tiny_pair(name)
    assert_same_tensors(tensors_of(model), state_of(reference))
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in state_of(reference).values())
    assert not model.training


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_are_known_without_weights(name, tiny_pair):
    """Check a model on the meta device, with which loading compares the headers of the files."""
    reference, loaded = tiny_pair(name)
    with torch.device("meta"):
        found = tensors_of(Llama(loaded.config))
    assert all(tensor.is_meta for tensor in found.values())
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in state_of(reference).items()
    }


@pytest.mark.parametrize("name", TINY)
def test_fused_parameters_are_the_sources_one_above_the_other(name, tiny_pair):
    reference, model = tiny_pair(name)
    for ours, theirs in zip(model.blocks(), reference.model.layers, strict=True):
        attention = theirs.self_attn
        for kind in ("weight", "bias") if model.config.attention_bias else ("weight",):
            parts = [getattr(p, kind) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            assert torch.equal(getattr(ours.attention.qkv, kind), torch.cat(parts))
        assert torch.equal(ours.mlp.gate_up.weight, torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight]))


def swap_rows(parameter: torch.Tensor, first: slice, second: slice) -> None:
    """Exchange rows of a parameter, in place."""
    kept = parameter[first].clone()
    parameter[first] = parameter[second]
    parameter[second] = kept


MUTATIONS = {
    "k and v exchanged": lambda m: swap_rows(m.layers[1].attention.qkv.weight, slice(128, 256), slice(256, 384)),
    "gate and up exchanged": lambda m: swap_rows(m.layers[0].mlp.gate_up.weight, slice(0, 160), slice(160, 320)),
    "layers exchanged": lambda m: setattr(m, "layers", torch.nn.ModuleList(reversed(m.layers))),
    "norms exchanged": lambda m: m.layers[0].attention.norm.weight.copy_(m.layers[0].mlp.norm.weight),
    "head tied": lambda m: m.lm_head.weight.copy_(m.embed.weight),
    "one value off by one ulp": lambda m: m.norm.weight[3:4].copy_(m.norm.weight[3].nextafter(torch.tensor(9.0))),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_comparison_of_tensors_catches(name, tiny_pair):
    reference, model = tiny_pair("mha")
    mutant = copy.deepcopy(model)
    with torch.no_grad():
        MUTATIONS[name](mutant)
    with pytest.raises(AssertionError):
        assert_same_tensors(tensors_of(mutant), state_of(reference))
    if "ulp" not in name:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(logits(mutant, 512), logits(reference, 512), rtol=1e-3, atol=1e-3)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_rounds_every_tensor_as_torch_does(dtype, saved):
    expected = {name: t.to(dtype) for name, t in load_file(saved / "model.safetensors").items()}
    model = load_quietly(saved, dtype=dtype)
    assert model.dtype == dtype
    assert_same_tensors(tensors_of(model), expected)


@pytest.mark.parametrize(
    ("configured", "stored", "asked", "expected"),
    [
        ("float32", torch.float32, None, torch.float32),
        ("bfloat16", torch.float32, None, torch.bfloat16),
        (None, torch.bfloat16, None, torch.bfloat16),
        (None, torch.float32, None, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float32, torch.float32),
        ("float8_e4m3fn", torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_dtype_is_the_callers_else_the_configs_else_the_files(configured, stored, asked, expected, folder):
    rewrite(folder, lambda t: {k: v.to(stored) for k, v in t.items()}, dtype=configured)
    model = load_quietly(folder, dtype=asked)
    assert {p.dtype for p in model.parameters()} == {expected}


def test_files_of_several_dtypes_become_one(folder):
    source = rewrite(folder, lambda t: {k: v.bfloat16() if "mlp" in k else v for k, v in t.items()})
    assert_same_tensors(tensors_of(load(folder)), {k: v.float() for k, v in source.items()})


def test_a_dtype_in_config_that_is_none_here_is_refused(folder):
    rewrite(folder, dtype="float8_e4m3fn")
    refusal(folder, "float8_e4m3fn")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_in_a_warning(value, folder):
    names = ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"]

    def change(tensors):
        for name in names:
            tensors[name].view(-1)[-1] = value

    rewrite(folder, change)
    with pytest.warns(UserWarning, match="NaN or infinity") as caught:
        load(folder)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert all(name in message for name in names)
    assert "k_proj" not in message


def test_weights_that_overflow_when_converted_are_named_in_a_warning(folder):
    rewrite(folder, lambda t: t | {"model.norm.weight": torch.full((32,), 1e6)})
    load_quietly(folder)
    with pytest.warns(UserWarning, match=r"model\.norm\.weight"):
        load(folder, dtype=torch.float16)


# ---- tied embeddings


def test_a_tied_checkpoint_may_repeat_the_embedding(folder):
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True)
    model = load_quietly(folder)
    assert model.lm_head.weight is model.embed.weight


def test_a_tied_checkpoint_without_a_head_needs_none(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, tie_word_embeddings=True)
    model = load_quietly(folder)
    assert model.lm_head.weight is model.embed.weight


def test_a_tied_checkpoint_with_another_head_is_refused(folder):
    rewrite(folder, tie_word_embeddings=True)
    refusal(folder, str(folder), "lm_head.weight", "tie_word_embeddings")


def test_a_tied_checkpoint_with_a_head_of_another_shape_is_refused(folder):
    rewrite(folder, lambda t: t | {"lm_head.weight": torch.zeros(3, 3)}, tie_word_embeddings=True)
    refusal(folder, str(folder), "lm_head.weight", "tie_word_embeddings")


def test_an_untied_checkpoint_without_a_head_is_refused(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    refusal(folder, str(folder), "missing: lm_head.weight")


# ---- memory

# Prints how many copies of the model loading takes at its peak: as bfloat16, as float32, and with a mistake.
MEASURE = """
import sys, threading, time, torch
from llama_flex import Llama
from safetensors.torch import load_file

def anonymous():  # the bytes this process holds itself; the pages of a mapped file are the system's
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

def copies(dtype, careless=False):
    global peak
    base = peak = anonymous()
    if careless:  # a whole state dict beside the model, which must be noticed
        state = {name: tensor.clone() for name, tensor in load_file(large + "/model.safetensors").items()}
    model = Llama.from_pretrained(large, device="cpu", dtype=dtype)
    peak = max(peak, anonymous())
    return (peak - base) / sum(p.nbytes for p in model.parameters())

peak, (small, large) = 0, sys.argv[1:]
Llama.from_pretrained(small, device="cpu", dtype=torch.float32)  # whatever is imported on the way comes first
threading.Thread(target=watch, daemon=True).start()
print(copies(torch.bfloat16), copies(torch.float32), copies(torch.bfloat16, careless=True))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A bfloat16 checkpoint of some 200 MB, no tensor of which is a large part."""
    folder = tmp_path_factory.mktemp("large")
    e, f, layers, vocab = 1024, 2816, 8, 4096
    config = {"hidden_size": e, "intermediate_size": f, "num_hidden_layers": layers, "vocab_size": vocab}
    config |= {"num_attention_heads": 16, "dtype": "bfloat16", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, e), "model.norm.weight": (e,)}
    for i in range(layers):
        name = f"model.layers.{i}."
        shapes |= {f"{name}{norm}_layernorm.weight": (e,) for norm in ("input", "post_attention")}
        shapes |= {f"{name}self_attn.{x}_proj.weight": (e, e) for x in "qkvo"}
        shapes |= {f"{name}mlp.{x}_proj.weight": (f, e) for x in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (e, f)
    save_file({name: torch.ones(s, dtype=torch.bfloat16) for name, s in shapes.items()}, folder / "model.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_the_memory_of_about_one_copy(large, saved):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(saved), str(large)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory goes back at once: no base is too high
    )
    bfloat16, float32, careless = map(float, done.stdout.split())
    # If the sampling thread were starved, the peaks would read low, never high, and the last line would notice.
    assert 0.9 < bfloat16 < 1.4
    assert 0.9 < float32 < 1.4
    assert careless > 1.8
