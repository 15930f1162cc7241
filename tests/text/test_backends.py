"""The ids and the text of tokenizer.json and tokenizer.model are those of transformers and sentencepiece."""

import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizer_helpers import (
    CORPUS,
    JSON_NAMES,
    LARGE,
    MODEL_NAMES,
    assert_comes_at_the_end,
    cases,
    reference,
    vocabulary,
    write_folder,
)

from llama_flex.tokenizer import Tokenizer

# --- tokenizer.json ---


@cases(*JSON_NAMES)
def test_json_ids_and_text_are_the_references(tokenizer_folders, name):
    ours, theirs = Tokenizer.from_pretrained(tokenizer_folders[name]), reference(tokenizer_folders[name])
    assert ours.vocab_size == len(theirs)
    for text in CORPUS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@cases(*JSON_NAMES, exhaustive=LARGE)
def test_json_special_tokens_are_the_references(tokenizer_folders, name):
    ours, theirs = Tokenizer.from_pretrained(tokenizer_folders[name]), reference(tokenizer_folders[name])
    for key in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert set(theirs.all_special_ids) <= ours.special_ids
    assert [ours.token(id) for id in range(0, len(theirs), 97)] == theirs.convert_ids_to_tokens(
        list(range(0, len(theirs), 97))
    )


@cases("converted", "llama2")
def test_json_against_sentencepiece_needs_the_prefix_space(tokenizer_folders, name):
    """Check that the comparison can fail: without the prefix that the file adds, ids differ for most texts."""
    ours = Tokenizer.from_pretrained(tokenizer_folders[name])
    file = json.loads((tokenizer_folders[name] / "tokenizer.json").read_text())
    file["normalizer"]["normalizers"] = [n for n in file["normalizer"]["normalizers"] if n["type"] != "Prepend"]
    mutated = tokenizers.Tokenizer.from_str(json.dumps(file))
    changed = [text for text in CORPUS if mutated.encode(text).ids != ours.encode(text)]
    assert len(changed) > len(CORPUS) // 2


@cases("converted", "llama2", exhaustive=LARGE)
def test_differences_from_the_llama_class_of_transformers_5(tokenizer_folders, name, tmp_path):
    """Check which texts differ under `tokenizer_class: LlamaTokenizer`, which AutoTokenizer rebuilds from the
    vocabulary and `legacy` alone. With legacy=true it gives the file's ids except where a text, or the text after a
    special token, begins with a space: the file, like sentencepiece, adds a space of its own there."""
    folder = tmp_path / "llama"
    shutil.copytree(tokenizer_folders[name], folder)
    config = {**json.loads((folder / "tokenizer_config.json").read_text()), "tokenizer_class": "LlamaTokenizer"}
    ours = Tokenizer.from_pretrained(tokenizer_folders[name])
    for legacy in (True, False):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": legacy}))
        assert Tokenizer.from_pretrained(folder).encode(" a</s>b") == ours.encode(" a</s>b")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in CORPUS:
            pieces = text.replace("</s>", "<s>").replace("<unk>", "<s>").split("<s>")
            if any(piece.startswith((" ", "▁")) for piece in pieces) or (not legacy and len(pieces) > 1):
                continue
            assert theirs.encode(text) == ours.encode(text), text
        assert theirs.encode(" Hello") != ours.encode(" Hello")


@pytest.mark.parametrize("keys", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_json_file_alone_decides_about_bos_and_eos(tokenizer_folders, tmp_path, keys):
    for name, expected in (("byte_level", 1), ("without", 0)):
        file = json.loads((tokenizer_folders["byte_level"] / "tokenizer.json").read_text())
        if name == "without":
            file["post_processor"] = None
        config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", **keys}
        folder = write_folder(tmp_path / name, config, tokenizer__json=json.dumps(file))
        ids = Tokenizer.from_pretrained(folder).encode("a")
        assert ids == transformers.AutoTokenizer.from_pretrained(folder).encode("a")
        assert len(ids) == 1 + expected


def test_json_added_tokens_of_the_configuration(tokenizer_folders, tmp_path):
    added = {"content": "<|tool|>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "normalized": False},
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "extra_special_tokens": ["<extra>"],
        "added_tokens_decoder": {"9000": added, "9001": {**added, "content": "plain", "special": False}},
    }
    file = (tokenizer_folders["byte_level"] / "tokenizer.json").read_text()
    folder = write_folder(tmp_path / "a", config, tokenizer__json=file)
    ours, theirs = Tokenizer.from_pretrained(folder), reference(folder)
    assert (ours.vocab_size, ours.pad_token_id, ours.bos_token) == (len(theirs), theirs.pad_token_id, "<s>")
    for text in ("x <|tool|> y plain<pad><extra> <mask>z", *CORPUS):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    del config["added_tokens_decoder"]
    older = {"pad_token": "<p2>", "eos_token": {"content": "</s>", "lstrip": False, "rstrip": True}}
    folder = write_folder(
        tmp_path / "b",
        config,
        tokenizer__json=file,
        special_tokens_map__json=json.dumps(older),
        added_tokens__json=json.dumps({"<q>": 9000}),
    )
    ours, theirs = Tokenizer.from_pretrained(folder), reference(folder)
    assert (ours.pad_token, ours.pad_token_id) == ("<p2>", theirs.pad_token_id)
    assert ours.encode("a</s> b<p2><q>") == theirs.encode("a</s> b<p2><q>")


@pytest.mark.parametrize("forced", [False, True])
def test_clean_up_of_spaces(tokenizer_folders, tmp_path, forced):
    config = {"clean_up_tokenization_spaces": True}
    if forced:
        config["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True
    folder = write_folder(
        tmp_path / "a", config, tokenizer__json=(tokenizer_folders["byte_level"] / "tokenizer.json").read_text()
    )
    ours, theirs = Tokenizer.from_pretrained(folder), reference(folder)
    text = "Well , it is n't ' so ' . Is it ?"
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.decode(ours.encode(text)) == text) is not forced
    if forced:
        assert_comes_at_the_end(ours, ours.encode(text))


# --- tokenizer.model ---


def rebuilt_by_transformers(model: bytes, legacy: bool, **tokens) -> transformers.LlamaTokenizer:
    """Return transformers' LlamaTokenizer for a tokenizer.model."""
    vocab, merges = vocabulary(model)
    return transformers.LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True, **tokens)


@cases(*MODEL_NAMES)
def test_model_ids_are_sentencepieces(tokenizer_folders, name):
    path = tokenizer_folders[name] / "tokenizer.model"
    ours, theirs = Tokenizer.from_pretrained(path.parent), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert ours.vocab_size == theirs.get_piece_size()
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_id(), theirs.eos_id())
    assert (ours.bos_token, ours.eos_token, ours.unk_token, ours.pad_token) == ("<s>", "</s>", "<unk>", None)
    for text in CORPUS:
        if not any(token in text for token in ("<s>", "</s>", "<unk>")):
            ids = theirs.encode(text)
            assert ours.encode(text, add_special_tokens=False) == ids, text
            assert ours.encode(text) == [theirs.bos_id(), *ids]
            assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


@pytest.mark.parametrize("legacy", [True, False])
@cases(*MODEL_NAMES, exhaustive=LARGE)
def test_model_with_special_tokens_in_the_text(tokenizer_folders, tmp_path, name, legacy):
    """Compare with transformers' LlamaTokenizer, except for text that begins with a space: it does not add another."""
    model = (tokenizer_folders[name] / "tokenizer.model").read_bytes()
    ours = Tokenizer.from_pretrained(write_folder(tmp_path, {"legacy": legacy}, tokenizer__model=model))
    theirs = rebuilt_by_transformers(model, legacy)
    compared = 0
    for text in CORPUS:
        pieces = text.replace("</s>", "<s>").replace("<unk>", "<s>").split("<s>")
        begins_with_space = [piece.startswith((" ", "▁")) for piece in pieces]
        if any(begins_with_space) if legacy else begins_with_space[0]:
            continue
        compared += len(pieces) > 1
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert compared >= 2
    other = Tokenizer.from_pretrained(write_folder(tmp_path / "x", {"legacy": not legacy}, tokenizer__model=model))
    assert other.encode("a</s>b") != ours.encode("a</s>b")
    assert ours.decode(ours.encode("  two")) == "  two"


@cases(*MODEL_NAMES, exhaustive=LARGE)
def test_model_text_is_decoded_as_the_reference_does(tokenizer_folders, name):
    ours = Tokenizer.from_pretrained(tokenizer_folders[name])
    theirs = rebuilt_by_transformers((tokenizer_folders[name] / "tokenizer.model").read_bytes(), legacy=True)
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.choice([rng.randrange(300), rng.randrange(ours.vocab_size)]) for _ in range(rng.randrange(12))]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), ids


def test_model_follows_its_configuration(tokenizer_folders, tmp_path):
    model = (tokenizer_folders["tiny_model"] / "tokenizer.model").read_bytes()

    def load(config: dict, **files: str) -> Tokenizer:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return Tokenizer.from_pretrained(write_folder(folder, config, tokenizer__model=model, **files))

    plain = load({})
    assert load({"add_bos_token": False, "add_eos_token": True}).encode("Hello") == [*plain.encode("Hello")[1:], 2]
    assert load({"bos_token": None}).bos_token is None
    unprefixed = load({"add_prefix_space": False})
    assert unprefixed.token(unprefixed.encode("Hello")[1]).startswith("H")
    assert unprefixed.decode(unprefixed.encode(" Hello")) == " Hello"

    size = plain.vocab_size
    tool = {"content": "<tool>", "lstrip": True, "rstrip": True, "special": True}
    word = {"content": "wide", "single_word": True, "special": False}
    for tokenizer in (
        load({"added_tokens_decoder": {str(size): tool, str(size + 1): word}, "pad_token": "<pad>"}),
        load({"pad_token": "<pad>"}, added_tokens__json=json.dumps({"<tool>": size, "wide": size + 1})),
        load({"extra_special_tokens": ["<tool>"]}, added_tokens__json=json.dumps({"<tool>": size, "wide": size + 1})),
    ):
        ids = tokenizer.encode("a <tool> b")
        assert size in ids
        assert tokenizer.token(size) == "<tool>"
        assert size + 1 in tokenizer.encode("so wide")
    strict = load({"added_tokens_decoder": {str(size): tool, str(size + 1): word}, "pad_token": "<pad>"})
    assert (strict.pad_token_id, strict.vocab_size) == (size + 2, size + 3)
    assert strict.encode("a <tool> b") == strict.encode("a<tool>b")
    assert size + 1 not in strict.encode("widest")
    assert strict.decode(strict.encode("a<tool>b")) == "a b"
    nested = load({"extra_special_tokens": ["<t", "<t>", "<t>>"]})
    assert nested.encode("<t>>", add_special_tokens=False) == [size + 2]
    assert {0, 1, 2, size, size + 2} == strict.special_ids


# --- files that cannot be used ---


def test_a_panic_while_encoding_is_an_error_that_names_the_file(tokenizer_folders, tmp_path):
    file = json.loads((tokenizer_folders["byte_level"] / "tokenizer.json").read_text())
    changed = file | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "a", None, tokenizer__json=json.dumps(changed)))
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read as a tokenizer \(chunk size must be non-zero"):
        tokenizer.encode("Hello")
    file["post_processor"]["special_tokens"] = {}
    folder = write_folder(tmp_path / "b", None, tokenizer__json=json.dumps(file))
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read as a tokenizer \(no entry found for key\)"):
        Tokenizer.from_pretrained(folder)


def test_an_id_around_texts_that_is_none_is_refused(tokenizer_folders, tmp_path):
    file = json.loads((tokenizer_folders["byte_level"] / "tokenizer.json").read_text())
    file["post_processor"]["special_tokens"]["<s>"]["ids"] = [2**31]
    folder = write_folder(tmp_path, None, tokenizer__json=json.dumps(file))
    with pytest.raises(ValueError, match="adds token id 2147483648, which is not in its vocabulary, around texts"):
        Tokenizer.from_pretrained(folder)


def test_a_sentencepiece_model_of_too_many_pieces(tokenizer_folders, tmp_path):
    model = (tokenizer_folders["tiny_model"] / "tokenizer.model").read_bytes()
    folder = write_folder(tmp_path, None, tokenizer__model=model + b"\x0a\x03\x0a\x01x" * 800_000)
    with pytest.raises(ValueError, match="has more than 360,000 pieces"):
        Tokenizer.from_pretrained(folder)
