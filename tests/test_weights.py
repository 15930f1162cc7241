"""safetensors in and out: every tensor in its place, bit-exact round trips, and one clear line for every bad folder."""

import copy
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from helpers import TINY, tiny_reference
from safetensors.torch import load_file, save_file

from llama_flex import GenerationConfig, Llama, Tokenizer, weights

INDEX = "model.safetensors.index.json"


def load(folder, **options) -> Llama:
    return Llama.from_pretrained(folder, device="cpu", **options)


def load_quietly(folder, **options) -> Llama:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, **options)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def state_of(reference: transformers.LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> dict:
    state = {name: tensor.to(dtype) for name, tensor in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def logits(model, vocab_size: int) -> torch.Tensor:
    ids = torch.randint(vocab_size, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def refusal(folder, *needles: str, **options) -> str:
    """The message with which loading `folder` is refused: one line, with all needles in it."""
    with pytest.raises(ValueError, match=r".") as caught:
        load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message, message
    for needle in needles:
        assert needle in message, message
    return message


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A very small untied checkpoint that transformers wrote; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    small = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    tiny_reference(**small, **TINY["gqa"], head_dim=4).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of `saved` to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def rewrite(folder: Path, change=None, **configured) -> dict:
    """Apply `change` to the tensors of a checkpoint and `configured` to its config."""
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        tensors = change(dict(tensors)) or tensors
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if configured:
        config = json.loads((folder / "config.json").read_text()) | configured
        (folder / "config.json").write_text(json.dumps(config))
    return tensors


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """Split a checkpoint into shards with an index, as the hub has them; returns the weight map."""
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
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


# ---- what is loaded


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_loaded_bit_by_bit(name, tiny_pair):
    reference, model = tiny_pair(name)
    assert_same_tensors(weights.named_weights(model, model.config), state_of(reference))
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in state_of(reference).values())
    assert not model.training


@pytest.mark.parametrize("name", TINY)
def test_shapes_are_known_without_a_model(name, tiny_pair):
    _, model = tiny_pair(name)
    held = {name: list(view.shape) for name, view in weights.named_weights(model, model.config).items()}
    assert weights.shapes_by_name(model.config) == held


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
    kept = parameter[first].clone()
    parameter[first] = parameter[second]
    parameter[second] = kept


MUTATIONS = {
    "k and v exchanged": lambda m: swap_rows(m.layers[1].attention.qkv.weight, slice(128, 256), slice(256, 384)),
    "gate and up exchanged": lambda m: swap_rows(m.layers[0].mlp.gate_up.weight, slice(0, 160), slice(160, 320)),
    "layers exchanged": lambda m: swap_rows(m.layers, slice(0, 1), slice(1, 2)),
    "norms exchanged": lambda m: m.layers[0].attention.norm.weight.copy_(m.layers[0].mlp.norm.weight),
    "head tied": lambda m: m.lm_head.weight.copy_(m.embed.weight),
    "one value off by one ulp": lambda m: m.norm.weight[3:4].copy_(m.norm.weight[3].nextafter(torch.tensor(9.0))),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_comparison_of_tensors_catches(name, tiny_pair):
    reference, model = tiny_pair("mha")
    mutant = copy.deepcopy(model)
    with torch.no_grad():
        if name == "layers exchanged":
            mutant.layers = torch.nn.ModuleList(reversed(mutant.layers))
        else:
            MUTATIONS[name](mutant)
    with pytest.raises(AssertionError):
        assert_same_tensors(weights.named_weights(mutant, mutant.config), state_of(reference))
    if "ulp" not in name:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(logits(mutant, 512), logits(reference, 512), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_rounds_every_tensor_as_torch_does(dtype, saved):
    expected = {name: t.to(dtype) for name, t in load_file(saved / "model.safetensors").items()}
    model = load_quietly(saved, dtype=dtype)
    assert model.dtype == dtype
    assert_same_tensors(weights.named_weights(model, model.config), expected)


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
    assert_same_tensors(weights.tensors_by_name(load(folder)), {k: v.float() for k, v in source.items()})


def test_a_dtype_in_config_that_is_none_here_is_refused(folder):
    rewrite(folder, dtype="float8_e4m3fn")
    refusal(folder, "float8_e4m3fn")


@pytest.mark.parametrize("name", ["gqa", "tied", "biases"])
def test_shards_written_by_transformers_load_as_the_single_file(name, tiny_pair, tmp_path):
    reference, _ = tiny_pair(name)
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_tensors(weights.tensors_by_name(load_quietly(tmp_path)), state_of(reference))


def test_shards_need_no_order_and_no_metadata(folder):
    source = load_file(folder / "model.safetensors")
    weight_map = shard(folder, 5)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(reversed(weight_map.items()))}))
    assert_same_tensors(weights.tensors_by_name(load_quietly(folder)), source)


def test_buffers_of_old_checkpoints_are_ignored(folder):
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
    source = load_file(folder / "model.safetensors")
    rewrite(folder, lambda t: t | {name: torch.ones(2) for name in names})
    assert_same_tensors(weights.tensors_by_name(load_quietly(folder)), source)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_links_as_in_the_hubs_cache_are_followed(sharded, shared, folder, tmp_path):
    source = load_file(folder / "model.safetensors")
    if sharded:
        shard(folder)
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = cache / "blobs" / f"{number:064x}"  # a blob's name has no suffix
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        if shared:  # of huggingface_hub 2: repositories share a blob
            (tmp_path / "blobs" / "00").mkdir(parents=True, exist_ok=True)
            blob.rename(tmp_path / "blobs" / "00" / blob.name)
            blob.symlink_to(Path("../../blobs/00") / blob.name)
    assert_same_tensors(weights.tensors_by_name(load_quietly(snapshot)), source)


def test_a_folder_that_is_a_link_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert load_quietly(tmp_path / "link").config.vocab_size == 48


def test_a_path_may_be_a_string_or_relative(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    for path in (str(saved), saved.name, f"./{saved.name}/"):
        assert load_quietly(path).config.vocab_size == 48


# ---- tied embeddings


def test_a_tied_checkpoint_may_repeat_the_embedding(folder):
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True)
    model = load_quietly(folder)
    assert model.lm_head is None
    assert model.lm_head.weight is model.embed.weight


def test_a_tied_checkpoint_without_a_head_needs_none(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, tie_word_embeddings=True)
    assert load_quietly(folder).lm_head is None


def test_a_tied_checkpoint_with_another_head_is_refused(folder):
    rewrite(folder, tie_word_embeddings=True)
    refusal(folder, str(folder), "lm_head.weight", "tie_word_embeddings")


def test_a_tied_checkpoint_with_a_head_of_another_shape_is_refused(folder):
    rewrite(folder, lambda t: t | {"lm_head.weight": torch.zeros(3, 3)}, tie_word_embeddings=True)
    refusal(folder, str(folder), "lm_head.weight", "tie_word_embeddings")


def test_an_untied_checkpoint_without_a_head_is_refused(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    refusal(folder, str(folder), "missing: lm_head.weight")


# ---- what is written


def load_in_transformers(folder, dtype=torch.float32) -> transformers.LlamaForCausalLM:
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in TINY), ("gqa", torch.bfloat16), ("biases", torch.float16)],
)
def test_saving_gives_the_same_bits_here_and_in_transformers(name, dtype, tiny_pair, tmp_path):
    reference, model = tiny_pair(name)
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(tmp_path)
    again = load_quietly(tmp_path)
    assert again.dtype == dtype
    assert again.eos_token_ids == model.eos_token_ids
    assert again.config.to_dict() == model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    assert_same_tensors(weights.named_weights(again, again.config), weights.named_weights(model, model.config))
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), state_of(reference, dtype))
    theirs = load_in_transformers(tmp_path, dtype)
    assert_same_tensors(state_of(theirs, dtype), state_of(reference, dtype))
    vocab = model.config.vocab_size
    assert torch.equal(logits(again, vocab), logits(model, vocab))
    if dtype == torch.float32:
        assert torch.equal(logits(theirs, vocab), logits(reference, vocab))
        torch.testing.assert_close(logits(again, vocab), logits(reference, vocab), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gqa", "tied", "biases"])
def test_saving_in_shards_gives_the_same_bits_here_and_in_transformers(name, tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 150_000)
    reference, model = tiny_pair(name)
    model.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state_of(reference).values())
    held = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == held
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 150_000
    assert_same_tensors(weights.tensors_by_name(load_quietly(tmp_path)), state_of(reference))
    assert_same_tensors(state_of(load_in_transformers(tmp_path)), state_of(reference))
    assert not list(tmp_path.glob(".*"))


def changed(model: Llama) -> Llama:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    return other


@pytest.mark.parametrize("sizes", [(10**9, 150_000), (150_000, 10**9), (100_000, 300_000), (300_000, 100_000)])
def test_saving_over_an_older_checkpoint_of_another_layout_leaves_nothing_of_it(
    sizes, tiny_pair, tmp_path, monkeypatch
):
    """model.safetensors wins over an index: if it stayed, loading would give the old weights without a word."""
    _, model = tiny_pair("gqa")
    new = changed(model)
    for size, one in zip(sizes, (model, new), strict=True):
        monkeypatch.setattr(weights, "MAX_SHARD_BYTES", size)
        one.save_pretrained(tmp_path)
    assert_same_tensors(weights.tensors_by_name(load_quietly(tmp_path)), weights.named_weights(new, new.config))
    load_in_transformers(tmp_path)


def test_saving_over_the_folder_it_was_loaded_from(folder):
    model = changed(load_quietly(folder))
    model.save_pretrained(folder)
    assert_same_tensors(weights.tensors_by_name(load_quietly(folder)), weights.named_weights(model, model.config))


def test_without_a_generation_config_none_is_written_and_transformers_stops_at_the_configs_eos(folder, tmp_path):
    """It takes the ids from config.json only where there is no generation_config.json."""
    (folder / "generation_config.json").unlink()
    rewrite(folder, eos_token_id=[7, 9], bos_token_id=3)
    model, target = load_quietly(folder), tmp_path / "out"
    target.mkdir()
    (target / "generation_config.json").write_text('{"eos_token_id": 5}')  # of another model
    model.save_pretrained(target)
    assert not (target / "generation_config.json").exists()
    assert load_in_transformers(target).generation_config.eos_token_id == [7, 9]
    model.generation_config = dataclasses.replace(model.generation_config, temperature=0.5, do_sample=True)
    model.save_pretrained(target)
    theirs = load_in_transformers(target).generation_config
    assert (theirs.temperature, theirs.eos_token_id, theirs.bos_token_id) == (0.5, [7, 9], 3)
    assert load_quietly(target).generation_config.temperature == 0.5


def test_an_empty_generation_config_is_written_back(folder):
    (folder / "generation_config.json").write_text("{}")
    load_quietly(folder).save_pretrained(folder)
    assert json.loads((folder / "generation_config.json").read_text()) == {}


def test_saving_replaces_a_link_and_leaves_what_it_pointed_to(folder):
    blob = folder / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    before = blob.read_bytes()
    changed(load_quietly(folder)).save_pretrained(folder)
    assert blob.read_bytes() == before


def test_saving_writes_through_no_link(folder, tmp_path):
    """Left in a folder by somebody else, a link of the name that a save writes first would lead it anywhere."""
    model = load_quietly(folder)
    outside = tmp_path / "outside"
    outside.write_text("whole")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / f".{name}.partial").symlink_to(outside)
    model.save_pretrained(folder)
    assert outside.read_text() == "whole"
    load_quietly(folder)


def in_a_child(work) -> int:
    """The status with which a forked process ends that does `work`: 0, 1 if it raises, or -9 if it is killed."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:  # noqa: BLE001  (this process ends here, whatever it is)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def sharded(folder, monkeypatch) -> Path:
    """A checkpoint of several shards, as another save would write them."""
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 15_000)
    load_quietly(folder).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("most", [100, 14_000])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint_whole(most, sharded):
    model, before = changed(load_quietly(sharded)), contents(sharded)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # writing beyond it fails midway
        with pytest.raises(OSError, match=r"model-0000\d-of-.*cannot be written \(.*\); what was there is whole"):
            model.save_pretrained(sharded)

    assert in_a_child(save) == 0
    assert contents(sharded) == before


@pytest.mark.parametrize("configured", ["", "config", "settings", "no settings"])
@pytest.mark.parametrize(
    "sizes", [(10**9, 10**9), (10**9, 15_000), (15_000, 10**9), (15_000, 15_000), (15_000, 30_000)]
)
def test_a_save_that_is_killed_leaves_a_whole_checkpoint_or_none_that_loads(sizes, configured, folder, monkeypatch):
    """Killed before each write, rename and removal: all of the old model, all of the new one, or no config.json."""
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", sizes[0])
    old = load_quietly(folder)
    old.save_pretrained(folder)
    before = contents(folder)
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", sizes[1])
    new = changed(old)
    if configured == "config":
        new.config = dataclasses.replace(new.config, rms_norm_eps=0.5)
    elif configured:
        new.generation_config = GenerationConfig(temperature=0.5) if configured == "settings" else GenerationConfig()
    steps = 0

    def save_and_be_killed():
        def counted(function):
            def step(*args, **kwargs):
                nonlocal steps
                if not steps:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps -= 1
                return function(*args, **kwargs)

            return step

        for place, name in ((weights, "save_file"), (Path, "write_text"), (os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(place, name, counted(getattr(place, name)))
        new.save_pretrained(folder)

    ends = []
    while True:
        steps = len(ends)
        if in_a_child(save_and_be_killed) == 0:
            break
        if "config.json" not in contents(folder):
            refusal(folder, str(folder), "config.json: no such file")
            ends.append("refused")
        else:
            found = load_quietly(folder)
            whole = old if torch.equal(found.embed.weight, old.embed.weight) else new
            assert found.config.rms_norm_eps == whole.config.rms_norm_eps
            assert found.generation_config.temperature == whole.generation_config.temperature
            assert found.eos_token_ids == whole.eos_token_ids
            assert_same_tensors(weights.named_weights(found, found.config), weights.named_weights(whole, whole.config))
            ends.append("old" if whole is old else "new")
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in before.items():
            (folder / name).write_bytes(content)
    assert not list(folder.glob(".*"))
    assert_same_tensors(weights.tensors_by_name(load_quietly(folder)), weights.named_weights(new, new.config))
    assert sorted(ends, key=["old", "refused", "new"].index) == ends
    assert ends.count("old") > 4
    assert ("refused" in ends) == (bool(configured) or sizes[1] < 10**9)


def test_a_directory_in_the_place_of_a_file_is_found_before_anything_is_written(folder):
    model = load_quietly(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(IsADirectoryError, match="is a directory; remove it"):
        changed(model).save_pretrained(folder)
    assert sorted(folder.iterdir()) == before
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file; save to a folder"):
        model.save_pretrained(folder / "config.json")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_a_save_that_fails_midway_leaves_the_old_file_whole(error, folder, monkeypatch):
    model = changed(load_quietly(folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(tensors, path, metadata=None):
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(type(error)):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_that_fails_between_two_shards_leaves_the_old_checkpoint_whole(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 150_000)
    _, model = tiny_pair("gqa")
    model.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    calls = []

    def second_fails(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("disk full")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(weights, "save_file", second_fails)
    with pytest.raises(OSError, match="disk full"):
        changed(model).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert_same_tensors(weights.tensors_by_name(load_quietly(tmp_path)), weights.named_weights(model, model.config))


# ---- what is refused


def test_no_such_folder(tmp_path):
    refusal(tmp_path / "absent", str(tmp_path / "absent"), "no such folder")


@pytest.mark.parametrize("name", ["", ".", "..", "owner/", "/owner", "a/b/c", "owner/na me", "../x"])
def test_names_that_are_neither_a_folder_nor_a_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(name)


def test_a_repository_that_the_hub_does_not_give(monkeypatch, tmp_path):
    refusal("no-such-owner/no-such-model", "no-such-owner/no-such-model")


def test_a_path_that_is_a_file(saved):
    refusal(saved / "model.safetensors", str(saved / "model.safetensors"), "is a file", "folder")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refusal(folder, str(folder), "model.safetensors", INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_opened(name, folder):
    (folder / "model.safetensors").rename(folder / name)
    refusal(folder, name, "pickled", "save_pretrained")


def test_a_folder_in_the_place_of_the_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refusal(folder, "model.safetensors")


def test_a_broken_link(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    refusal(folder, "model.safetensors")


def test_a_file_cut_at_any_place(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    places = {*range(12), header - 1, header, header + 1, len(whole) - 1, len(whole) - 4, *range(0, header, 97)}
    for place in sorted(places | {rng.randrange(len(whole)) for _ in range(30)}):
        path.write_bytes(whole[:place])
        refusal(folder, str(path), "damaged")


def test_a_file_with_bytes_behind_its_end(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    refusal(folder, str(path), "damaged")


def test_a_flipped_bit_in_the_header_never_loads_other_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    source = load_file(path)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [*range(64), *random.Random(1).sample(range(64, 8 * header), 300)]
    harmless = 0
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            loaded, message = load(folder), None
        except ValueError as error:
            loaded, message = None, str(error)
        if loaded is None:
            assert "\n" not in message, place
            assert str(folder) in message, place
        else:  # in the spaces that pad it, or in its metadata
            assert_same_tensors(weights.named_weights(loaded, loaded.config), source)
            harmless += 1
    assert harmless < 40


def test_a_file_of_noise(folder):
    path = folder / "model.safetensors"
    rng = random.Random(2)
    for size in (1, 8, 9, 100, 5000):
        path.write_bytes(rng.randbytes(size))
        refusal(folder, str(path), "damaged")


def test_a_missing_shard_is_named(folder):
    weight_map = shard(folder)
    gone = sorted(set(weight_map.values()))[1]
    (folder / gone).unlink()
    refusal(folder, str(folder), gone, "3")


def test_a_cut_shard_is_named(folder):
    path = folder / sorted(set(shard(folder).values()))[1]
    path.write_bytes(path.read_bytes()[:-1])
    refusal(folder, str(path), "damaged")


@pytest.mark.parametrize(
    "target",
    [
        *(
            "../outside.safetensors",
            "sub/inside.safetensors",
            "./here.safetensors",
            "..",
            ".",
            "",
            "a/../b.safetensors",
        ),
        *("ABSOLUTE", "weights.bin", 5, None, ["a"], {"a": 1}, "x\0.safetensors", "new\nline.safetensors"),
    ],
    ids=repr,
)
def test_an_index_leads_nowhere_but_to_safetensors_beside_it(target, folder):
    weight_map = shard(folder)
    outside = folder.parent / "outside.safetensors"
    (folder / "sub").mkdir()
    first = folder / next(iter(weight_map.values()))
    for copied in (outside, folder / "sub" / "inside.safetensors", folder / "here.safetensors", folder / "weights.bin"):
        shutil.copy(first, copied)
    if target == "ABSOLUTE":
        target = str(outside)
    write_index(folder, weight_map | {next(iter(weight_map)): target})
    refusal(folder, str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": "x"}'])
def test_an_index_without_a_weight_map(text, folder):
    shard(folder)
    (folder / INDEX).write_text(text)
    refusal(folder, str(folder / INDEX))


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(33)
        return tensors

    rewrite(folder, change)
    refusal(
        folder,
        str(folder),
        "missing: model.layers.1.mlp.up_proj.weight",
        "unexpected: model.layers.7.mlp.up_proj.weight",
        "shape: model.norm.weight is [33], config.json says [32]",
    )


@pytest.mark.parametrize(
    ("configured", "needle"),
    [
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1."),
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
        ({"num_key_value_heads": 4}, "shape: model.layers.0.self_attn.k_proj.weight"),
        ({"vocab_size": 49}, "shape: model.embed_tokens.weight"),
        ({"intermediate_size": 23}, "shape: model.layers.0.mlp.down_proj.weight"),
        ({"head_dim": 8}, "shape: model.layers.0.self_attn.q_proj.weight"),
        ({"attention_bias": True}, "missing: model.layers.0.self_attn.k_proj.bias"),
        ({"mlp_bias": True}, "missing: model.layers.0.mlp.down_proj.bias"),
    ],
    ids=str,
)
def test_weights_that_are_not_those_of_the_config(configured, needle, folder):
    rewrite(folder, **configured)
    refusal(folder, str(folder), needle)


def test_biases_that_the_config_does_not_know_are_refused(folder):
    rewrite(folder, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    refusal(folder, "unexpected: model.layers.0.self_attn.q_proj.bias")


def test_a_long_list_of_problems_is_cut(folder):
    rewrite(folder, num_hidden_layers=50)
    assert len(refusal(folder, "more")) < 2000


def test_a_tensor_in_two_shards_with_the_same_bits_is_loaded(folder):
    expected = load_file(folder / "model.safetensors")
    files = sorted(set(shard(folder).values()))
    first, second = load_file(folder / files[0]), load_file(folder / files[1])
    name = sorted(first)[0]
    save_file(second | {name: first[name]}, folder / files[1])
    assert_same_tensors(weights.tensors_by_name(load_quietly(folder)), expected)
    save_file(second | {name: first[name].double()}, folder / files[1])
    refusal(folder, f"twice, as float32 and float64: {name} ({name} in {files[0]} and {name} in {files[1]})")


@pytest.mark.parametrize("tied", [False, True])
def test_names_without_model_are_those_of_a_base_model(folder, tied):
    expected = load_file(folder / "model.safetensors")
    rewrite(folder, lambda t: {k.removeprefix("model."): v for k, v in t.items() if k != "lm_head.weight"})
    if tied:
        rewrite(folder, tie_word_embeddings=True)
        del expected["lm_head.weight"]
        assert_same_tensors(weights.tensors_by_name(load_quietly(folder)), expected)
    else:
        refusal(folder, "missing: lm_head.weight", "a base model without an output matrix", "tie_word_embeddings")


def test_a_tied_checkpoint_may_hold_its_embedding_under_the_name_of_the_head(folder):
    expected = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != "lm_head.weight"}
    embedding = "model.embed_tokens.weight"
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != embedding} | {"lm_head.weight": t[embedding]})
    refusal(folder, f"missing: {embedding}")
    rewrite(folder, tie_word_embeddings=True)
    assert_same_tensors(weights.tensors_by_name(load_quietly(folder)), expected)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(reference.get_input_embeddings().weight, expected[embedding])


def test_a_classifier_is_named(folder):
    rewrite(
        folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"} | {"score.weight": torch.zeros(2, 32)}
    )
    refusal(folder, "unexpected: score.weight", "another head than the one that predicts tokens")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForQuestionAnswering"))
    refusal(folder, "another head than the one that predicts tokens; give the model that it was made of")


def test_a_git_lfs_pointer_is_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 538090408\n"
    (folder / "model.safetensors").write_text(pointer)
    refusal(folder, "model.safetensors: a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.3])
def test_a_download_cut_short_is_named_with_its_sizes(folder, kept):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    refusal(folder, "cut short, as by an interrupted download", f"{int(kept * len(whole)):,} of {len(whole):,} bytes")


@pytest.mark.parametrize(
    ("kept", "said"),
    [(0, "it is empty"), *((n, f"it ends after {n:,} bytes, amid its header") for n in (1, 7, 8, 9, 1000))],
)
def test_a_download_cut_short_amid_the_header_is_named(folder, kept, said):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refusal(folder, f"{path}: damaged or cut short, as by an interrupted download ({said}); fetch it again")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("page", ["<!DOCTYPE html>\n<html class='x'>", "\n <html lang='en'>"])
def test_a_web_page_in_the_place_of_a_file_is_named(folder, file, page):
    (folder / file).write_text(page + "<head></head><body>model.safetensors</body></html>" * 99)
    said = f"{folder / file}: a web page, not the file itself; fetch the file (on the hub under /resolve/, not /blob/)"
    if file != "tokenizer.json":
        refusal(folder, said)
    else:
        with pytest.raises(ValueError, match=re.escape(said)):
            Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Access to model x/y is restricted.", r"it begins b'Access to model ')"),
        (b"GGUF\x03\0\0\0\x22\x01\0\0\0\0\0\0", r"it begins b'GGUF\x03\x00"),
        (struct.pack("<Q", 5 * 2**20) + b"{" + b" " * 5 * 2**20, "a header of 5,242,880 bytes"),
    ],
)
def test_a_file_of_another_kind_is_named_by_how_it_begins(folder, content, said):
    (folder / "model.safetensors").write_bytes(content)
    refusal(folder, f"model.safetensors: damaged or not a safetensors file ({said}")


def test_a_header_that_has_a_name_twice_is_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    header = whole[8:end].replace(b"model.layers.0.mlp.up_proj.weight", b"model.layers.1.mlp.up_proj.weight")
    path.write_bytes(whole[:8] + header + whole[end:])
    refusal(folder, f"{path}: damaged: its header has model.layers.1.mlp.up_proj.weight twice; fetch it again")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t + 1, "with other values"),
        (lambda t: t.double(), "as float32 and float64"),
        (lambda t: t[:5].clone(), "in shapes [32] and [5]"),
    ],
)
def test_a_tensor_under_two_names_is_named_with_both_and_what_differs(folder, change, said):
    name, file = "model.norm.weight", "model.safetensors"
    rewrite(folder, lambda t: t | {"norm.weight": t[name].clone()})
    load_quietly(folder)
    rewrite(folder, lambda t: t | {"norm.weight": change(t[name])})
    refusal(folder, f"twice, {said}: {name} ({name} in {file} and norm.weight in {file})")


@pytest.mark.parametrize("extra", ["fc.weight", "midlayer.self_attn.q_proj.weight", "d2t"])
def test_a_draft_model_is_named(folder, extra):
    rewrite(folder, lambda t: t | {extra: torch.zeros(3, dtype=torch.int64 if extra == "d2t" else torch.float32)})
    message = refusal(folder, f"unexpected: {extra}; a draft model (EAGLE)", "give the model that it drafts for")
    assert "quantised" not in message


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.qweight"])
def test_a_quantised_tensor_that_the_config_does_not_list_is_named(folder, name):
    rewrite(folder, lambda t: t | {name: torch.zeros(48, 32, dtype=torch.int8)}, tie_word_embeddings=True)
    refusal(folder, f"stored as I8: {name} (quantised")


@pytest.mark.parametrize("file", ["model-Q8_0.gguf", "adapter_model.safetensors"])
def test_a_folder_with_a_config_and_weights_of_another_kind_is_named(folder, file):
    (folder / "model.safetensors").rename(folder / file)
    if file.startswith("adapter"):
        (folder / "adapter_config.json").write_text("{}")
    refusal(folder, "GGUF files" if file.endswith("gguf") else "an adapter (PEFT)", str(folder))


def test_a_tensor_in_two_shards_is_refused(folder):
    weight_map = shard(folder)
    files = sorted(set(weight_map.values()))
    first, second = load_file(folder / files[0]), load_file(folder / files[1])
    name = sorted(first)[0]
    save_file(second | {name: first[name] + 1}, folder / files[1])
    refusal(folder, f"twice, with other values: {name}", files[0], files[1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_tensors_are_refused_by_name(dtype, folder):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder, lambda t: t | {name: t[name].to(dtype)})
    refusal(folder, str(folder), name, "quantised")


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


# ---- memory

MEASURE = """
import sys, threading, time, torch
from llama_flex import GenerationConfig, Llama, Tokenizer, weights
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
    if careless:  # what must be noticed: a whole state dict beside the model
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
    """A checkpoint of some 200 MB, bfloat16, of which no tensor is a large part."""
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
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back at once: no base is too high
    )
    bfloat16, float32, careless = map(float, done.stdout.split())
    # Were the sampling thread starved, the peaks would read low, never high; the last line would notice.
    assert 0.9 < bfloat16 < 1.4
    assert 0.9 < float32 < 1.4
    assert careless > 1.8
