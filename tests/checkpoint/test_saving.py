"""Saving a model: the same bits here and in transformers, and a whole checkpoint whatever interrupts it."""

import copy
import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import (
    INDEX,
    assert_same_tensors,
    load_in_transformers,
    load_quietly,
    logits,
    refusal,
    rewrite,
    state_of,
    tensors_of,
)
from helpers import TINY, few
from safetensors.torch import load_file, save_file

from llama_flex import GenerationConfig, Llama
from llama_flex.checkpoint import saving


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
    assert_same_tensors(tensors_of(again), tensors_of(model))
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
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 150_000)
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
    assert_same_tensors(tensors_of(load_quietly(tmp_path)), state_of(reference))
    assert_same_tensors(state_of(load_in_transformers(tmp_path)), state_of(reference))
    assert not list(tmp_path.glob(".*"))


def changed(model: Llama) -> Llama:
    """Return a copy of a model with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    return other


@pytest.mark.parametrize("sizes", [(10**9, 150_000), (150_000, 10**9), (100_000, 300_000), (300_000, 100_000)])
def test_saving_over_an_older_checkpoint_of_another_layout_leaves_nothing_of_it(
    sizes, tiny_pair, tmp_path, monkeypatch
):
    """Check both directions: model.safetensors wins over an index, so if it stayed, loading would silently give the old
    weights."""
    _, model = tiny_pair("gqa")
    new = changed(model)
    for size, one in zip(sizes, (model, new), strict=True):
        monkeypatch.setattr(saving, "MAX_SHARD_BYTES", size)
        one.save_pretrained(tmp_path)
    assert_same_tensors(tensors_of(load_quietly(tmp_path)), tensors_of(new))
    load_in_transformers(tmp_path)


def test_saving_over_the_folder_it_was_loaded_from(folder):
    model = changed(load_quietly(folder))
    model.save_pretrained(folder)
    assert_same_tensors(tensors_of(load_quietly(folder)), tensors_of(model))


def test_without_a_generation_config_none_is_written_and_transformers_stops_at_the_configs_eos(folder, tmp_path):
    """Check what transformers reads back: it takes ids from config.json only if there is no generation_config.json."""
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
    """Check links, left in the folder by somebody else, of the names that a save writes to before it renames."""
    model = load_quietly(folder)
    outside = tmp_path / "outside"
    outside.write_text("whole")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / f".{name}.partial").symlink_to(outside)
    model.save_pretrained(folder)
    assert outside.read_text() == "whole"
    load_quietly(folder)


# ---- saves that fail


def in_a_child(work) -> int:
    """Run `work` in a forked process and return its exit status: 0, 1 if it raises, or -9 if it is killed."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:  # noqa: BLE001  (whatever it is, the child must not go on with the tests)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def sharded(folder, monkeypatch) -> Path:
    """A checkpoint that was saved in several shards, as the next save will be."""
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 15_000)
    load_quietly(folder).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("most", [100, 14_000])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint_whole(most, sharded):
    model, before = changed(load_quietly(sharded)), contents(sharded)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # a write beyond it fails midway
        with pytest.raises(OSError, match=r"model-0000\d-of-.*cannot be written \(.*\); what was there is whole"):
            model.save_pretrained(sharded)

    assert in_a_child(save) == 0
    assert contents(sharded) == before


@pytest.mark.parametrize("configured", few(["config"], ["", "settings", "no settings"]))
@pytest.mark.parametrize(
    "sizes",
    few([(10**9, 10**9), (10**9, 15_000)], [(15_000, 10**9), (15_000, 15_000), (15_000, 30_000)]),
    ids="{0[0]}-{0[1]}".format,
)
def test_a_save_that_is_killed_leaves_a_whole_checkpoint_or_none_that_loads(sizes, configured, folder, monkeypatch):
    """Kill a save before each write, rename and removal; what is left must be all of the old model, all of the new one,
    or no config.json."""
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", sizes[0])
    old = load_quietly(folder)
    old.save_pretrained(folder)
    before = contents(folder)
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", sizes[1])
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

        for place, name in ((saving, "save_file"), (Path, "write_text"), (os, "replace"), (Path, "unlink")):
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
            assert_same_tensors(tensors_of(found), tensors_of(whole))
            ends.append("old" if whole is old else "new")
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in before.items():
            (folder / name).write_bytes(content)
    assert not list(folder.glob(".*"))
    assert_same_tensors(tensors_of(load_quietly(folder)), tensors_of(new))
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
    before = contents(folder)

    def half(tensors, path, metadata=None):
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(saving, "save_file", half)
    with pytest.raises(type(error)):
        model.save_pretrained(folder)
    assert contents(folder) == before


def test_a_save_that_fails_between_two_shards_leaves_the_old_checkpoint_whole(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 150_000)
    _, model = tiny_pair("gqa")
    model.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    calls = []

    def second_fails(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("disk full")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(saving, "save_file", second_fails)
    with pytest.raises(OSError, match="disk full"):
        changed(model).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert_same_tensors(tensors_of(load_quietly(tmp_path)), tensors_of(model))


def wrapped(linear: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.Sequential(linear)


REPLACED = [
    ("gqa", "layers.0.mlp.down", wrapped, "missing: layers.0.mlp.down.weight; unexpected: layers.0.mlp.down.0.weight"),
    ("gqa", "layers.1.attention.o", lambda linear: torch.nn.Identity(), "missing: layers.1.attention.o.weight;"),
    ("gqa", "layers.1.attention.o", lambda linear: torch.nn.Linear(4, 4, bias=False), r"o.weight is \[4, 4\], not"),
    ("tied", "lm_head", lambda linear: torch.nn.Linear(4, 4, bias=False), "unexpected: lm_head.weight;"),
    ("gqa", "layers", lambda layers: layers[:1], "missing: layers.1.attention.norm.weight;"),
]


@pytest.mark.parametrize(("name", "path", "change", "said"), REPLACED)
def test_a_module_that_holds_other_tensors_is_refused_by_name(tiny_pair, tmp_path, name, path, change, said):
    """Check that nothing is written: the folder would not load, or load as another model."""
    model = copy.deepcopy(tiny_pair(name)[1])
    model.set_submodule(path, change(model.get_submodule(path)))
    with pytest.raises(ValueError, match=f"^cannot save a model whose tensors do not fit its config: .*{said}"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_plain_linear_in_the_place_of_a_product_is_computed_and_saved(tiny_pair, tmp_path):
    model = copy.deepcopy(tiny_pair("gqa")[1])
    expected = logits(model, model.config.vocab_size)
    for path in (
        "layers.0.attention.qkv",
        "layers.0.attention.o",
        "layers.1.mlp.gate_up",
        "layers.1.mlp.down",
        "lm_head",
    ):
        weight = model.get_submodule(path).weight
        plain = torch.nn.Linear(*reversed(weight.shape), bias=False)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        model.set_submodule(path, plain)
    torch.testing.assert_close(logits(model, model.config.vocab_size), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_quietly(tmp_path), model.config.vocab_size), expected)
