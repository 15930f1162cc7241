"""Tokenizers that somebody else made: their files, changed at random; see fuzz_helpers."""

import json

import fuzz_helpers
import pytest
from fuzz_helpers import (
    CASES,
    byte_changes,
    change_bytes,
    change_json_file,
    check_mutations,
    json_changes,
    load_tokenizer,
    values,
)
from hypothesis import strategies as st

outcomes, quiet, sound = fuzz_helpers.outcomes, fuzz_helpers.quiet, fuzz_helpers.sound  # fixtures
FILES = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("file", FILES)
def test_bytes_of_any_tokenizer_file(file, cases, sound, outcomes):
    check_mutations(cases, sound, outcomes, file, load_tokenizer, f"bytes of `{file}`", byte_changes, change_bytes)


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".json")])
def test_values_of_any_tokenizer_json(file, cases, sound, outcomes):
    check_mutations(cases, sound, outcomes, file, load_tokenizer, f"values in `{file}`", json_changes, change_json_file)


# ---- parts of a tokenizer.json

# The types of the `tokenizers` library, except those that need data: for each its keys and what they usually hold.
PATTERNS = [{"String": "a"}, {"String": ""}, {"Regex": "\\s+"}, {"Regex": "(a*)*b"}, {"Regex": "("}, {"Regex": ""}]
BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
SCHEMES = ["always", "never", "first"]
NORMALIZERS = {name: {} for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")}
NORMALIZERS |= {
    "Strip": {"strip_left": [True], "strip_right": [True]},
    "Prepend": {"prepend": ["▁", "", "x" * 999]},
    "Replace": {"pattern": PATTERNS, "content": ["", "aa", "é" * 999]},
    "BertNormalizer": {key: [True] for key in ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")},
    "Precompiled": {"precompiled_charsmap": ["", "AAAA", "/////w==", "CAAAAAEAAAACAAAAYQBiAA=="]},
}
PRE_TOKENIZERS = {name: {} for name in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")}
PRE_TOKENIZERS |= {
    "ByteLevel": {"add_prefix_space": [True], "trim_offsets": [True], "use_regex": [True, False]},
    "Metaspace": {"replacement": ["▁", "ab", ""], "prepend_scheme": SCHEMES, "split": [True]},
    "Split": {"pattern": PATTERNS, "behavior": BEHAVIORS, "invert": [True, False]},
    "Punctuation": {"behavior": BEHAVIORS},
    "CharDelimiterSplit": {"delimiter": ["a", "ab"]},
    "Digits": {"individual_digits": [True]},
    "FixedLength": {"length": [1, 0, 2**63]},
}
DECODERS = {
    "ByteLevel": PRE_TOKENIZERS["ByteLevel"],
    "Metaspace": PRE_TOKENIZERS["Metaspace"],
    "Replace": NORMALIZERS["Replace"],
    "ByteFallback": {},
    "Fuse": {},
    "Strip": {"content": [" ", "ab"], "start": [1, 10**9], "stop": [0, 10**9]},
    "WordPiece": {"prefix": ["##"], "cleanup": [True]},
    "BPEDecoder": {"suffix": ["</w>"]},
    "CTC": {"pad_token": ["<pad>"], "word_delimiter_token": ["|"], "cleanup": [True]},
}
IDS = [["<s>", 0], ["</s>", 2**31], ["", -1], ["<s>", 600]]
PIECES = [[{"Sequence": {"id": "A", "type_id": 0}}], [{"SpecialToken": {"id": "<s>", "type_id": 0}}], []]
KNOWN = [{"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"]}} for ids in ([600], [], [1, 2], [2**32 - 1])]
PROCESSORS = {
    "BertProcessing": {"sep": IDS, "cls": IDS},
    "RobertaProcessing": {"sep": IDS, "cls": IDS, "trim_offsets": [True], "add_prefix_space": [True]},
    "ByteLevel": PRE_TOKENIZERS["ByteLevel"],
    "TemplateProcessing": {"single": PIECES, "pair": PIECES, "special_tokens": [*KNOWN, {}]},
}
WORDS = {"a": 0, "b": 1, "ab": 2, "##b": 3, "<unk>": 4}
MODELS = {
    "BPE": {
        "vocab": [WORDS, {"a": 0, "b": 2**31}, {}, {"a": 0, "b": 0, "ab": 0}],
        "merges": [[["a", "b"]], ["a b"], ["a b c"], [["a", "a"]], [["a"]], ["#version: 1", "a b"], []],
        "dropout": [0.5, 2.0, -1],
        "unk_token": ["<unk>", "none"],
        "continuing_subword_prefix": ["##", ""],
        "end_of_word_suffix": ["</w>", ""],
        "fuse_unk": [True],
        "byte_fallback": [True],
        "ignore_merges": [True],
    },
    "WordPiece": {
        "vocab": [WORDS, {}],
        "unk_token": ["<unk>", "none"],
        "continuing_subword_prefix": ["##", ""],
        "max_input_chars_per_word": [100, 0],
    },
    "WordLevel": {"vocab": [WORDS, {}], "unk_token": ["<unk>", "none"]},
    "Unigram": {"vocab": [[["a", 0.0], ["b", -1]], [], [["", 0.0]]], "unk_id": [0, 9, -1], "byte_fallback": [True]},
}
SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
SEQUENCES |= {"post_processor": "processors"}
PARTS = {"normalizer": NORMALIZERS, "pre_tokenizer": PRE_TOKENIZERS, "decoder": DECODERS, "post_processor": PROCESSORS}
PARTS |= {"model": MODELS}
FLAGS = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": True, "special": False}
TOP = {
    "truncation": [{"direction": "Right", "max_length": n, "strategy": "LongestFirst", "stride": 9} for n in (0, 5)],
    "padding": [
        {"strategy": {"Fixed": n}, "direction": "Left", "pad_to_multiple_of": m}
        | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
        for n, m in ((9, 0), (9**9, 8))
    ],
    "added_tokens": [
        [{"id": id, "content": content} | FLAGS] for id, content in ((600, "<s>"), (2**32 - 1, "<t>"), (7, ""))
    ],
}


@st.composite
def tokenizer_parts(draw) -> dict:
    """Draw parts of a tokenizer.json to replace, well formed but for a value in a few."""

    def one(part: str) -> dict:
        kind = draw(st.sampled_from(sorted(PARTS[part])))
        made = {"type": kind}
        for key, usual in PARTS[part][kind].items():
            if draw(st.integers(0, 9)):
                made[key] = draw(st.sampled_from(usual)) if draw(st.integers(0, 7)) else draw(values)
        return made

    made = {}
    for part in draw(st.sets(st.sampled_from([*PARTS, *TOP]), min_size=1)):
        if part in TOP:
            made[part] = draw(st.sampled_from(TOP[part]))
        elif part in SEQUENCES and draw(st.booleans()):
            made[part] = {"type": "Sequence", SEQUENCES[part]: [one(part) for _ in range(draw(st.integers(0, 6)))]}
        else:
            made[part] = one(part)
    return made


@pytest.mark.parametrize("cases", CASES)
def test_parts_of_a_tokenizer_json(cases, sound, outcomes):
    def change(whole, parts):
        return (json.dumps(json.loads(whole) | parts)).encode()

    file, kind = "tokenizer.json", "parts of `tokenizer.json`"
    check_mutations(cases, sound, outcomes, file, load_tokenizer, kind, tokenizer_parts(), change)
