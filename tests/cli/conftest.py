"""Fixtures of the tests of the command line: a tiny model in a folder, its engine, and the command line itself."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from cli_helpers import SAMPLED, TEMPLATE, write_jsonl

from llama_flex import Engine, Llama, LlamaConfig, Tokenizer, generate

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
CORPUS = (
    "The quick brown fox jumps over the lazy dog. A stitch in time saves nine, and the early bird catches the worm.\n"
    "user system assistant hello how are you today? I am fine, thank you; the weather is nice and the sea is blue.\n"
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000. Größe, café, naïve, señor, 日本語. def f(x): return x + 1\n"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The folder of a tiny LLaMA with a byte-level tokenizer and a ChatML template. The model never generates a special
    token, so that no text ends by itself."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Llama(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(folder) -> Engine:
    """An engine of the model in `folder`, which says what the command line must print."""
    return Engine(Llama.from_pretrained(folder, device="cpu"), Tokenizer.from_pretrained(folder))


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """The folder of a model whose logits are NaN after the word " dog"."""
    copy = shutil.copytree(folder, tmp_path / "damaged")
    model, tokenizer = Llama.from_pretrained(folder, device="cpu"), Tokenizer.from_pretrained(folder)
    model.embed.weight[tokenizer.encode(" dog")[-1]] = torch.nan
    model.save_pretrained(copy)
    return copy


@pytest.fixture
def cli(folder, capsys, monkeypatch):
    """A function that runs the command line in this process and returns its exit code, stdout and stderr. With
    `model=None` it is given no --model."""

    def run(*arguments, model: str | Path | None = folder, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        given = [] if model is None else ["--model", str(model)]
        defaults = [] if "--compile" in arguments else ["--compile", "off"]
        defaults += [] if "--device" in arguments else ["--device", "cpu"]
        code = generate.main([*given, *defaults, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


# ---- a long run that is resumed

# Ids of every kind; texts with characters that splitlines() takes for ends of lines.
QUESTIONS = [
    {"id": "a\u2028b", "prompts": ["one\u2028two", "three\x85four\x0b\x1c"]},
    {"id": 1, "prompts": ["The quick"], "suffix": " is"},
    {"id": None, "prompts": ["hello", "how are you", "today?"]},
    {"id": ["x", 2], "prompts": ["日本語", "señor"]},
    {"prompts": ["the sea", "the sea is blue"]},
]


@pytest.fixture
def questions(tmp_path) -> Path:
    """A file of five questions of several prompts each, to be asked with the arguments SAMPLED."""
    return write_jsonl(tmp_path / "asked.jsonl", QUESTIONS)


@pytest.fixture
def uninterrupted(cli, questions) -> str:
    """The rows that the command line writes for all of `questions`."""
    code, out, err = cli("--prompts-file", questions, *SAMPLED)
    assert code == 0, err
    return out
