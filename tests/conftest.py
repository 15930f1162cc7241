"""Fixtures that the tests share: tiny random models beside their transformers twins, and the demo weights."""

import gc
import json
import os
import shutil
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers  # before anything compiles: it registers pytree nodes, and every graph would recompile once
from families import SHAPES, tiny
from helpers import DEMO, TINY, tiny_reference
from tokenizer_helpers import make_tokenizer_folders

from llama_flex import Llama

# Cores are often shared, and two threads that wait for each other are then far slower than one.
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def as_in_a_process_of_its_own():
    """The garbage collector does not look again at what earlier files left: after thousands of tests that took seconds
    at a time, which tests that measure time or count objects took for their own."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """A function from the name of a TINY shape to (its transformers model, the same weights loaded here)."""
    made = {}

    def pair(name: str) -> tuple[transformers.LlamaForCausalLM, Llama]:
        if name not in made:
            overrides = TINY[name]
            if "head_dim" not in overrides:
                overrides = overrides | {"head_dim": 32, "hidden_size": 32 * overrides["num_attention_heads"]}
            reference = tiny_reference(**overrides)
            folder = tmp_path_factory.mktemp(name)
            reference.save_pretrained(folder)
            made[name] = reference, Llama.from_pretrained(folder, device="cpu", dtype=torch.float32)
        return made[name]

    return pair


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """A function from a family or shape to (transformers' model, ours), of the same config.json and weights."""
    made = {}

    def of(name: str) -> tuple[transformers.PreTrainedModel, Llama]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            config = json.dumps(SHAPES[name] if name in SHAPES else tiny(name))
            (folder / "config.json").write_text(config)
            torch.manual_seed(0)
            reference = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(folder), attn_implementation="eager"
            ).eval()
            for key, parameter in reference.named_parameters():
                torch.nn.init.normal_(parameter, mean=float("norm" in key), std=0.15)
            reference.save_pretrained(folder)
            (folder / "config.json").write_text(config)  # its own spelling again
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                made[name] = reference, Llama.from_pretrained(folder, device="cpu")
        return made[name]

    return of


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of tokenizers by name: small ones trained here, and real ones, which may be absent."""
    return make_tokenizer_folders(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo weights; the test is skipped if they are not there."""
    if not DEMO.is_dir():
        pytest.skip(f"no demo weights in {DEMO}: python -m tools.fetch_smollm2")
    return DEMO


@pytest.fixture(scope="session")
def demo(demo_folder) -> Llama:
    """The demo model, float32."""
    return Llama.from_pretrained(demo_folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def demo_reference(demo_folder) -> transformers.LlamaForCausalLM:
    """The demo model in transformers, float32, eager attention."""
    return transformers.LlamaForCausalLM.from_pretrained(
        demo_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A very small untied checkpoint that transformers wrote; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    small = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    tiny_reference(**small, **TINY["gqa"], head_dim=4).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of `saved` to change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
