"""llama_flex.eval.parity: correct models agree with transformers, and each fault is found and named."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, few

from llama_flex import Engine, Llama, Tokenizer
from llama_flex.eval import parity
from llama_flex.weights import named_weights

TINY = ("random:tiny", "--device", "cpu", "--length", "40")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random checkpoint of two layers; the norms have random weights, too."""
    folder = tmp_path_factory.mktemp("tiny")
    parity.random_checkpoint("tiny", 0, folder)
    return folder


def printed(capsys, code: int, *arguments: str) -> str:
    """Run the command; check its exit code and that it reports no error; return what it prints."""
    assert parity.main(list(arguments)) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


def as_json(capsys, code: int, *arguments: str) -> dict:
    """Run the command; return the JSON object that it prints."""
    return json.loads(printed(capsys, code, *arguments, "--json"))


@pytest.mark.exhaustive
def test_a_right_model_agrees(capsys):
    assert printed(capsys, 0, *TINY, "--no-compile").startswith("random:tiny, against the same in transformers ")
    result = as_json(capsys, 0, *TINY)
    assert result["device"] == "cpu"
    assert result["agrees"]
    assert result["verdict"] == "nothing diverges"
    assert (result["tokens"], len(result["sites"]), len(result["checks"])) == (40, 1 + 2 * 7 + 2, 6)
    assert result["checks"][2]["name"].startswith("compiled")


@pytest.mark.parametrize("dtype", few(["float32"], ["bfloat16"]))
@pytest.mark.parametrize(
    ("fault", "layer", "site", "words"),
    [
        (
            "q-rows",
            1,
            "q",
            "in heads [0], from position 0 on. This points to the rows of q_proj (permuted?), or q_norm, if the",
        ),
        ("q-rows:0", 0, "q", "the rows of q_proj (permuted?)"),
        ("theta", 0, "q", "RoPE: its theta or scaling"),
        (
            "eps",
            0,
            "q",
            "q and k and v: first to diverge, from position 0 on. This points to the norm before attention",
        ),
        ("window", 0, "attention output", "the mask, which is wrong from query 8 on"),
        ("gate-up:0", 0, "MLP activations", "gate_proj and up_proj (exchanged?)"),
        ("gate-up", 1, "MLP activations", "gate_proj and up_proj (exchanged?)"),
    ],
)
def test_a_fault_is_found_and_named(capsys, fault, layer, site, words, dtype):
    result = as_json(capsys, 1, *TINY, "--inject", fault, "--dtype", dtype)
    first = next(site for site in result["sites"] if site["diverges"])
    assert (first["layer"], first["name"]) == (layer, site)
    assert result["verdict"].startswith(f"layer {layer}, {site}")
    assert words in result["verdict"]
    assert (result["agrees"], result["checks"]) == (False, [])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("q_norm", "layer 0, q: .* the rows of q_proj .permuted.., or q_norm, if the model has them"),
        ("k_norm", "layer 0, k: .* the rows of k_proj .permuted.., or k_norm, if the model has them"),
    ],
)
@torch.no_grad()
def test_a_norm_that_differs_is_named(tmp_path, part, words):
    parity.random_checkpoint("tiny-qwen3", 0, tmp_path)
    model, ids = Llama.from_pretrained(tmp_path, device="cpu"), torch.arange(40)[None]
    expected, *others = parity.Reference(tmp_path, torch.float32, model.device).runs(ids)
    assert parity.verdict(parity.compare(parity.walk(model, ids), expected, others)) == "nothing diverges"
    getattr(model.layers[0].attention, part).weight.mul_(1.01)
    assert re.match(words, parity.verdict(parity.compare(parity.walk(model, ids), expected, others)))


def scaled(name: str, rows: slice = slice(None)):
    return lambda tensors: tensors[name][rows].mul_(1.01)


def interleaved(tensors):
    for name in ("q_proj", "k_proj"):
        rows = tensors[f"model.layers.1.self_attn.{name}.weight"].unflatten(0, (-1, 2, 16))
        rows.copy_(rows.transpose(1, 2).reshape(rows.shape).clone())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scaled("model.embed_tokens.weight"), "embeddings: first to diverge, from position 0 on"),
        (scaled("model.layers.1.input_layernorm.weight"), "layer 1, q and k and v: .* the norm before attention"),
        (interleaved, "layer 1, q and k: .* the rows of q_proj and k_proj"),
        (scaled("model.layers.1.self_attn.k_proj.weight", slice(32)), r"layer 1, k: .* in heads \[0\], .* k_proj"),
        (scaled("model.layers.0.self_attn.v_proj.weight"), "layer 0, v: .* the rows of v_proj"),
        (scaled("model.layers.0.self_attn.o_proj.weight"), "layer 0, residual after attention: .* to o_proj"),
        (scaled("model.layers.1.post_attention_layernorm.weight"), "layer 1, MLP activations: .* the norm before them"),
        (scaled("model.layers.1.mlp.down_proj.weight"), "layer 1, residual after MLP: .* to down_proj"),
        (scaled("model.norm.weight"), "final norm: first .* the final norm"),
        (scaled("lm_head.weight"), "logits: first .* lm_head"),
        (lambda tensors: tensors["lm_head.weight"].fill_(torch.nan), "logits: first"),
    ],
)
@torch.no_grad()
def test_weights_that_differ_are_named(folder, change, words):
    model = Llama.from_pretrained(folder, device="cpu")
    ids = torch.arange(40)[None]
    expected, *others = parity.Reference(folder, torch.float32, model.device).runs(ids)
    change(named_weights(model, model.config))
    assert re.match(words, parity.verdict(parity.compare(parity.walk(model, ids), expected, others)))


@torch.no_grad()
def test_non_finite_values_never_agree(folder):
    ids = torch.arange(40)[None]
    expected, *others = parity.Reference(folder, torch.float32, torch.device("cpu")).runs(ids)
    for sites in (expected, *others):
        sites[None, "logits"][0, 7, 3] = torch.nan
    assert parity.verdict(parity.compare(expected, expected, others)).startswith("logits: first to diverge")


def test_another_checkpoint_diverges(capsys, folder, tmp_path):
    model = Llama.from_pretrained(folder, device="cpu")
    named_weights(model, model.config)["model.layers.1.self_attn.o_proj.weight"].neg_()
    model.save_pretrained(tmp_path)
    arguments = (str(folder), *TINY[1:], "--against", str(tmp_path), "--no-compile")
    lines = printed(capsys, 1, *arguments).splitlines()
    assert "layer 1, residual after attention: first to diverge, from position 0 on. This points to o_proj." in lines
    marked = [line[:30].strip() for line in lines if line.endswith("  diverges")]
    assert marked[-2:] == ["positions from 32768 on", "32 greedy tokens, logits lost"]


@pytest.mark.exhaustive
@torch.no_grad()
def test_checks_would_notice(folder, monkeypatch):
    """Check mutations: a cache that forgets, positions that are ignored, tokens for another prompt."""
    model = Llama.from_pretrained(folder, device="cpu")
    reference, ids = parity.Reference(folder, torch.float32, model.device), torch.arange(40)[None]
    forward, generate = Llama.forward, Engine.generate

    def anywhere(self, *args, positions=None, **options):
        return forward(self, *args, **options)

    def another(self, prompts, **options):
        return generate(self, [[*prompts[0][:-1], 1]], **options)

    monkeypatch.setattr(Llama, "new_cache", lambda self, b, n, **_: self.new_rolling_cache(b, 4, largest_append=n))
    monkeypatch.setattr(Llama, "forward", anywhere)
    monkeypatch.setattr(Engine, "generate", another)
    checks = list(parity.logits_checks(model, reference, ids, 1e-4, False))
    assert parity.verdict([], checks) == (
        "all sites agree, but not: prefill in three chunks, the last 32 one by one, positions from 32768 on, "
        "32 greedy tokens, logits lost"
    )


@pytest.mark.weights
def test_tokenizer_checks_would_notice(demo_folder, monkeypatch):
    right = Tokenizer.from_pretrained(demo_folder)
    assert [check.difference for check in parity.tokenizer_checks(demo_folder, right)] == [0, 0]
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [1])
    right.chat_template = "{{ messages }}"
    monkeypatch.setattr(Tokenizer, "apply_chat_template", lambda self, chat: "")
    assert [check.difference for check in parity.tokenizer_checks(demo_folder, right)] == [12, 1]


def test_table_shows_layers_and_on_demand_all(capsys):
    arguments = (*TINY, "--inject", "gate-up:0")
    assert [line.split()[0] for line in printed(capsys, 1, *arguments).splitlines()[3:-2]] == (
        ["layer", "embeddings", *"0000000", "...", "final", "logits"]
    )
    shown = printed(capsys, 1, *arguments, "--all").splitlines()
    assert sum(line.startswith("    1  ") for line in shown) == 7


@pytest.fixture
def of_context(folder, tmp_path):
    """A function from a context to a folder of the same checkpoint with that context."""

    def made(context: int) -> str:
        model = Llama.from_pretrained(folder, device="cpu")
        model.config = dataclasses.replace(model.config, max_position_embeddings=context)
        model.save_pretrained(tmp_path)
        return str(tmp_path)

    return made


@pytest.mark.filterwarnings("error")  # such as the warning of tokens beyond the context
@pytest.mark.parametrize(
    ("context", "tokens", "new"),
    [
        (2, 2, 0),
        (3, 2, 1),
        (33, 17, 16),
        *(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((4, 2, 2), (40, 20, 20), (80, 48, 32))),
    ],
)
def test_a_model_of_a_short_context_gets_a_shorter_text(capsys, of_context, context, tokens, new):
    lines = printed(capsys, 0, of_context(context), "--device", "cpu", "--no-compile").splitlines()
    assert lines[1] == f"float32, cpu, {tokens} tokens"
    assert [line.split()[0] for line in lines if "greedy tokens" in line] == [str(new)] * bool(new)
    assert lines[-1] == "nothing diverges"


@pytest.mark.parametrize(
    ("context", "length", "words"),
    [
        (1, "2", "a context of 1 has no room for the 2 tokens that are needed; give another model"),
        (2, "3", "3 tokens and 0 new ones exceed the context; give --length 2 or less"),
        (16, "9", "9 tokens and 8 new ones exceed the context; give --length 8 or less"),
    ],
)
def test_a_length_beyond_a_short_context_is_one_line(capsys, of_context, context, length, words):
    with pytest.raises(SystemExit):
        parity.main([of_context(context), "--device", "cpu", "--length", length])
    assert capsys.readouterr().err == f"error: {words}\n"


@pytest.mark.exhaustive
def test_without_transformers_the_way_out_is_one_line(tmp_path):
    """Check the error where transformers is not installed, with a module in its place that cannot be imported."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'x'\")")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "llama_flex.eval.parity", "random:tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    said = "llama_flex.eval.parity needs transformers (No module named 'x'): pip install 'llama_flex[parity]'"
    assert done.stderr == f"error: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("no-such-folder", "no-such-folder: no such folder"),
        ("random:x", "random:x is not known; choose random: and one of"),
        ("random:tiny --inject x", "--inject x is not known; choose one of q-rows, theta"),
        ("random:tiny --inject q-rows:2", "the model has layers 0 to 1"),
        ("random:tiny --inject theta:1", "leave out :1"),
        ("random:tiny --length 1", "found 1 tokens, 2 are needed"),
        ("random:tiny --length 0", "length must be at least 1, not 0"),
        ("random:tiny --length 131072", "give --length 131040 or less"),
        ("random:tiny --text README.md", "no tokenizer for a text (--text); leave that out"),
        ("random:tiny --device tpu", "device 'tpu' is not known"),
        ("random:tiny --against FOLDER", "vocab_size is 512 in MODEL and 500 in --against; give models of one shape"),
        ("random:tiny --dtype int8", "invalid choice: 'int8'"),
    ],
)
def test_wrong_use_is_one_line(capsys, tmp_path, arguments, words):
    (tmp_path / "config.json").write_text('{"vocab_size": 500}')
    with pytest.raises(SystemExit) as ended:
        parity.main(["--device", "cpu", *arguments.replace("FOLDER", str(tmp_path)).split()])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.exhaustive
@pytest.mark.weights
def test_the_demo_model_agrees(capsys, demo_folder):
    result = as_json(capsys, 0, str(demo_folder), "--device", "cpu", "--length", "48", "--no-compile")
    names = [check["name"].split(",")[0] for check in result["checks"]]
    assert names[-2:] == ["texts with other ids", "chats with another text"]


def test_the_test_in_the_document_passes_and_explains_a_failure(folder, tmp_path):
    text = (ROOT / "docs" / "parity.md").read_text()
    [block] = re.findall(r"```python\n(.*?def test_.*?)```", text, re.DOTALL)
    assert block.count("\n") <= 10
    block = block.replace("weights/SmolLM2-135M-Instruct", str(folder))
    for extra, said in (("", "1 passed"), (', inject="theta"', "This points to RoPE: its theta or scaling.")):
        (tmp_path / "test_mine.py").write_text(block.replace("compile=False", f"compile=False{extra}"))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_mine.py")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == bool(extra), done.stdout
        assert said in done.stdout
