"""What is refused in a tokenizer.json before `tokenizers` reads it: what crashes it, or takes too long or too much
memory."""

import base64
import json
import os
import time

import pytest
from tokenizer_helpers import write_folder

from llama_flex.tokenizer import Tokenizer


def test_merges_that_make_no_token_are_refused(tokenizer_folders, tmp_path):
    """Check merges that `tokenizers` copies into a buffer as long as the longest token, sometimes reading beyond it."""
    file = json.loads((tokenizer_folders["byte_level"] / "tokenizer.json").read_text())
    model = file["model"]
    for change in (
        {"continuing_subword_prefix": "a"},
        {"merges": [*model["merges"], ["Ġ" * 50, "Ġ" * 50]]},
        {"merges": [*model["merges"], "ab ba"]},
        {"merges": [*model["merges"], ["#version", "x"]]},
        {"vocab": dict(list(model["vocab"].items())[:-1])},
    ):
        folder = write_folder(tmp_path, None, tokenizer__json=json.dumps(file | {"model": model | change}))
        with pytest.raises(
            ValueError, match=r"tokenizer.json cannot be read as a tokenizer .*merges whose result is not"
        ):
            Tokenizer.from_pretrained(folder)
    repeated = json.dumps(file).replace('"model":', '"model": {"merges": [["a", "b"]]}, "model":')
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read as a tokenizer .*duplicate key"):
        Tokenizer.from_pretrained(write_folder(tmp_path, None, tokenizer__json=repeated))
    model["merges"] = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]  # the older form
    older = Tokenizer.from_pretrained(write_folder(tmp_path, None, tokenizer__json=json.dumps(file)))
    assert older.encode("Hello") == Tokenizer.from_pretrained(tokenizer_folders["byte_level"]).encode("Hello")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}] * 60},
        {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 60},
        {"type": "Replace", "pattern": {"Regex": "x?"}, "content": "y" * 10**6},
        {"type": "Prepend", "prepend": "y" * 10**6},
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + b"y" * 10**6).decode()},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Replace", "pattern": {"String": ""}, "content": ""},
    ],
    ids=lambda normalizer: json.dumps(normalizer)[:40],
)
def test_a_normalizer_that_would_swell_added_tokens_is_refused(normalizer, tokenizer_folders, tmp_path):
    file = json.loads((tokenizer_folders["byte_level"] / "tokenizer.json").read_text()) | {"normalizer": normalizer}
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read as a tokenizer"):
        Tokenizer.from_pretrained(write_folder(tmp_path, None, tokenizer__json=json.dumps(file)))


# --- files that would take too long, or too much memory ---


def added(id: int, content: str) -> dict:
    """Return an entry of `added_tokens` that the normalizer is applied to."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": id, "content": content} | flags


def searching(pattern: str, *contents: str) -> dict:
    """Return a normalizer that searches the added tokens for a regular expression."""
    normalizer = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    return {"normalizer": normalizer, "added_tokens": [added(i, text) for i, text in enumerate(contents, start=600)]}


def unigram(pieces: list[str]) -> dict:
    """Return a Unigram model of these pieces."""
    return {"model": {"type": "Unigram", "unk_id": 0, "vocab": [[piece, -1.0] for piece in pieces]}}


ENDLESS = {
    "two repetitions": searching("a*a*b", "a" * 100),
    "nested repetitions": searching("(a+)+b", "a" * 100),
    "a long search": searching("a+b", "a" * 100_000),
    "many searches": searching("(a|aa)*b", *("a" * 30 + str(i) for i in range(200))),
    "long added tokens": {"added_tokens": [added(600, "x" * 300_000)]},
    "doubled added tokens": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 99}] * 5},
        "added_tokens": [added(600, "x")],
    },
    "many normalizers": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 100_000}},
    "long pieces": unigram([f"{i:05}" + os.urandom(500).hex() for i in range(1000)]),
    "many pieces": unigram([f"{i:06}" for i in range(600_000)]),
    "many items": {"other": [[]] * 2_000_000},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_tokenizer_that_would_take_too_long_is_refused(name, tokenizer_folders, tmp_path):
    file = json.loads((tokenizer_folders["byte_level"] / "tokenizer.json").read_text())
    folder = write_folder(tmp_path, None, tokenizer__json=json.dumps(file | ENDLESS[name]))
    start = time.process_time()
    with pytest.raises(ValueError, match=r"too many|too long"):
        Tokenizer.from_pretrained(folder)
    assert time.process_time() - start < 6  # a second or two on an idle machine


def test_a_usual_normalizer_is_not_refused(tokenizer_folders, tmp_path):
    file = json.loads((tokenizer_folders["byte_level"] / "tokenizer.json").read_text())
    file |= searching(" {2,}", "<a>", "<b>")
    Tokenizer.from_pretrained(write_folder(tmp_path / "a", None, tokenizer__json=json.dumps(file)))
    steps = [{"type": "NFKC"}, {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Lowercase"}]
    several = file | {"normalizer": {"type": "Sequence", "normalizers": steps}}
    several["added_tokens"] = [added(600 + i, f"<extra_id_{i}>") for i in range(1000)]
    Tokenizer.from_pretrained(write_folder(tmp_path / "c", None, tokenizer__json=json.dumps(several)))
    pieces = [f"{i}{word}" for i in range(1000) for word in ("a", "of the", "▁international")]
    file = {**file, "post_processor": None} | unigram(["<unk>", *pieces])
    Tokenizer.from_pretrained(write_folder(tmp_path / "b", None, tokenizer__json=json.dumps(file)))
