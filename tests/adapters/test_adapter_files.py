"""Adapter folders that somebody else made: what is not plain LoRA of this model is refused by name, before any work."""

import json

import fuzz_helpers
import pytest
import torch
from adapter_helpers import CONFIGS, edit_config, edit_tensors, peft_adapter
from fuzz_helpers import CASES, byte_changes, change_bytes, change_json, change_json_file, check_mutations, json_changes
from helpers import TINY, tiny_reference

from llama_flex import Llama
from llama_flex.checkpoint.files import FolderError

outcomes, quiet = fuzz_helpers.outcomes, fuzz_helpers.quiet  # fixtures
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SMALL = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The place of an adapter and of its model."""
    root = tmp_path_factory.mktemp("sound")
    reference = tiny_reference(**SMALL, **TINY["gqa"], head_dim=4)
    reference.save_pretrained(root / "model")
    peft_adapter(reference, root / "single", **CONFIGS["patterns"] | {"modules_to_save": ["lm_head"]})
    return root


@pytest.fixture(scope="module")
def model(sound) -> Llama:
    return Llama.from_pretrained(sound / "model", device="cpu")


@pytest.fixture
def adapter(sound, tmp_path):
    """A copy of the adapter to change."""
    for file in (CONFIG, TENSORS):
        (tmp_path / file).write_bytes((sound / "single" / file).read_bytes())
    return tmp_path


def refusal(model: Llama, folder) -> str:
    """Return why a folder is refused, and check that nothing is left of it."""
    with pytest.raises(FolderError) as caught:
        model.adapters.load(folder, "refused")
    assert "refused" not in model.adapters
    assert str(folder) in str(caught.value)
    return str(caught.value)


REFUSED = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 1], [0, 2]],
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [5],
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "target_parameters": ["experts.w"],
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa_niter_16",
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "new_in_a_later_version": 3,
    "r": 0,
    "lora_alpha": "8",
    "rank_pattern": {"(q+)+_proj": 2},
    "alpha_pattern": {"q_proj": float("nan")},
    "target_modules": None,
    "exclude_modules": 5,
    "layers_to_transform": "1",
    "modules_to_save": [".*"],
    "use_rslora": 1,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(model, adapter, key):
    edit_config(adapter, **{key: REFUSED[key]})
    assert key in refusal(model, adapter)


def test_how_the_factors_began_is_of_no_effect(model, adapter):
    edit_config(adapter, init_lora_weights="gaussian", lora_dropout=0.3, eva_config={"rho": 2}, unknown=None)
    model.adapters.remove(model.adapters.load(adapter))


LAYERS = "base_model.model.model.layers"
CHANGED = {
    f"missing: {LAYERS}.0.mlp.up_proj.lora_A": lambda t: {
        n: x for n, x in t.items() if "0.mlp.up_proj.lora_A" not in n
    },
    f"unexpected: {LAYERS}.9": lambda t: t | {f"{LAYERS}.9.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
    "lm_head.lora_A": lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)},
    "lora_magnitude_vector": lambda t: (
        t | {f"{LAYERS}.0.self_attn.q_proj.lora_magnitude_vector.weight": torch.ones(16)}
    ),
    "shape: ": lambda t: {n: x[:1] if "k_proj.lora_A" in n else x for n, x in t.items()},
    "stored as I64": lambda t: {n: x.long() if "k_proj.lora_A" in n else x for n, x in t.items()},
    "NaN or infinity in": lambda t: {n: x / 0 if "k_proj.lora_A" in n else x for n, x in t.items()},
}


@pytest.mark.parametrize("text", CHANGED)
def test_tensors_that_do_not_fit_are_named(model, adapter, text):
    edit_tensors(adapter, CHANGED[text])
    assert text in refusal(model, adapter)


def test_an_adapter_of_another_model_and_no_adapter_at_all(model, adapter, sound):
    other = tiny_reference(**SMALL | {"hidden_size": 64}, **TINY["gqa"], head_dim=4)
    peft_adapter(other, adapter, **CONFIGS["q and v"])
    assert "shape: " in refusal(model, adapter)
    assert "adapter_config.json: no such file" in refusal(model, sound / "model")
    with pytest.raises(ValueError, match=r"no such folder|could not be downloaded"):
        model.adapters.load(adapter / "nothing")
    (adapter / TENSORS).rename(adapter / "adapter_model.bin")
    assert "only pickled weights" in refusal(model, adapter)
    with pytest.raises(ValueError, match="load its base model, and then the adapter"):
        Llama.from_pretrained(sound / "single", device="cpu")


def load_adapter(model: Llama):
    """Return a function that loads an adapter's folder and removes it again."""

    def load(folder) -> None:
        model.adapters.remove(model.adapters.load(folder))

    return load


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_bytes_of_any_file(file, cases, model, sound, outcomes):
    load = load_adapter(model)
    load(sound / "single")
    check_mutations(cases, sound, outcomes, file, load, f"bytes of `{file}`", byte_changes, change_bytes)


@pytest.mark.parametrize("cases", CASES)
def test_values_of_the_config(cases, model, sound, outcomes):
    load = load_adapter(model)
    load(sound / "single")
    check_mutations(cases, sound, outcomes, CONFIG, load, f"values in `{CONFIG}`", json_changes, change_json_file)


@pytest.mark.parametrize("cases", CASES)
def test_headers_of_the_tensors(cases, model, sound, outcomes):
    def change(whole, mutation):
        size = int.from_bytes(whole[:8], "little")
        raw = change_json(json.loads(whole[8 : 8 + size]), mutation).encode("utf-8", "surrogatepass")
        return len(raw).to_bytes(8, "little") + raw + whole[8 + size :]

    load = load_adapter(model)
    load(sound / "single")
    check_mutations(cases, sound, outcomes, TENSORS, load, f"header of `{TENSORS}`", json_changes, change)
