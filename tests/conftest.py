"""Models the tests share: tiny random ones beside their transformers twins, and the demo weights."""

import gc
import json
import os
import warnings
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers  # before anything compiles: it registers pytree nodes, and every graph would recompile once
from families import SHAPES, tiny

from llama_flex import Llama, attention
from llama_flex.compiling import Graphs

DEMO = Path(__file__).parent.parent / "weights" / "SmolLM2-135M-Instruct"
VIEW_OF = attention.view_of
TEST_INPUTS = DEMO.parent / "test-inputs"

# Cores are often shared, and two threads that wait for each other are then far slower than one.
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def as_in_a_process_of_its_own():
    """The garbage collector does not look again at what earlier files left: after thousands of tests that took seconds
    at a time, which tests that measure time or count objects took for their own."""
    gc.collect()
    gc.freeze()


# The shapes that differ in kind: (heads, key/value heads, head_dim or None), and switches.
TINY = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "group3": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "head_dim": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "odd_vocab": {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 509},
}


def tiny_reference(**overrides) -> transformers.LlamaForCausalLM:
    """A two-layer random LLaMA of transformers, float32, eager attention; weights large enough to matter."""
    values = {
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**values)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # initialised to ones and zeros, which would hide a mistake
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def attend_densely(patch: pytest.MonkeyPatch) -> None:
    """Engines compute attention by its dense definition: flex_attention run eagerly takes ten times as long."""
    patch.setattr(attention, "view_of", lambda *given: VIEW_OF(*given[:4], "dense", *given[5:]))


def compiled_forward(model: Llama):
    """The model's forward, compiled: a graph for each shape and for each structure of masks and score functions."""
    graphs = Graphs()

    def forward(ids, *, cache=None, lengths=None, positions=None, segments=None, mask=None, score_mod=None):
        ids, lengths, positions, segments = (
            None if x is None else x.to(model.device, copy=True, memory_format=torch.contiguous_format)
            for x in (ids, lengths, positions, segments)
        )
        layers = model.attention_layers(mask, score_mod, cache)
        given = tuple(x is None for x in (cache, lengths, positions, segments))
        forward.steps.add(key := (ids.shape, given, layers.structure))
        with nullcontext() if cache is None else cache.appending(ids.shape[1]):
            x, _ = model.step(ids, lengths, positions, segments, cache, layers, "flex", graphs.of(*key))
            return model.head(x)

    forward.steps = set()
    forward.graphs = graphs
    return forward


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
