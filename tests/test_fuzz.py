"""Folders that somebody else made: loading one ends in a model or in one line that names it, soon, and touches no more.

The contract and a table of outcomes are in docs/hostile-files.md. The table comes from
FUZZ_CASES=3000 python -m pytest tests/test_fuzz.py -s
"""

import copy
import itertools
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import jinja2
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_flex import GenerationConfig, Llama, LlamaConfig, Tokenizer, chat, weights
from llama_flex.checkpoint.files import FolderError

CASES = int(os.environ.get("FUZZ_CASES", "250"))  # of each kind
SECONDS = 1.0
MEGABYTES = 200  # above what was there before
SHARD = "model-00002-of-00004.safetensors"
INDEX = "model.safetensors.index.json"
TEMPLATE = """\
{%- set ns = namespace(system='', n=0) %}
{%- for message in messages if message.role == 'system' %}{% set ns.system = message.content | trim %}{% endfor %}
{%- for message in messages %}
{%- if loop.first and ns.system %}{{ bos_token ~ '<<SYS>>' ~ ns.system[:80] ~ '<</SYS>>' }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] %s [/INST]' % message['content'].strip() }}
{%- else %}{{ message.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- set ns.n = ns.n + 1 %}
{%- endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"""
MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi </think> é"}]

# ---- what is watched

_TOUCHES = ("open", "os.", "shutil.", "socket.", "subprocess.", "pickle.", "ctypes.")
_LOOKS = ("os.listdir", "os.scandir")
_watched: list[tuple] | None = None


def _audit(event: str, args: tuple) -> None:
    if _watched is not None and event.startswith(_TOUCHES) and event not in _LOOKS:
        _watched.append((event, args))


sys.addaudithook(_audit)


def listing(folder: Path) -> dict:
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_mode, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def resident(name: str) -> int:
    """Bytes in memory, now ("VmRSS") or at most since `_forget_peak` ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class TooSlow(AssertionError):
    """A case took longer than all may."""


def again_if_slow(case) -> None:
    """A machine that others use too pauses now and then; what is slow by itself is so again."""
    try:
        case()
    except TooSlow:
        case()


class Outcomes:
    """How the cases of a kind ended: "loaded", or the class of the error; and the slowest and largest."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter] = {}
        self.seconds: Counter = Counter()
        self.bytes: Counter = Counter()

    def of(self, kind: str, folder: Path, work) -> None:
        """Does `work` with a folder, and checks all of the contract."""
        again_if_slow(lambda: self._of(kind, folder, work))

    def _of(self, kind: str, folder: Path, work) -> None:
        global _watched
        before, message = listing(folder), None
        forget_peak()
        taken = resident("VmRSS")
        start, _watched = time.perf_counter(), []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                work(folder)
                end = "loaded"
            except FolderError as error:
                end, message = type(error).__name__, str(error)
            finally:
                touched, _watched = _watched, None
        seconds, peak = time.perf_counter() - start, resident("VmHWM") - taken
        if seconds >= SECONDS:
            raise TooSlow(f"{seconds:.2f} s, {message or end}")
        assert peak < MEGABYTES << 20, message
        if message is not None:
            assert message.isprintable(), message
            assert str(folder) in message
        for warning in warned:
            text = str(warning.message)
            assert issubclass(warning.category, (DeprecationWarning, SyntaxWarning)) or text.isprintable(), text
        for event, args in touched:
            assert event == "open", (event, args)
            path, mode, *_ = args
            assert Path(path).resolve().is_relative_to(folder.resolve()), (event, args)
            assert mode in ("r", "rb", None), (event, args)
        assert listing(folder) == before
        self.add(kind, end, seconds, peak)

    def add(self, kind: str, end: str, seconds: float, peak: int = 0) -> None:
        self.counts.setdefault(kind, Counter())[end] += 1
        self.seconds[kind] = max(seconds, self.seconds[kind])
        self.bytes[kind] = max(peak, self.bytes[kind])

    def table(self) -> str:
        lines = ["| changed | cases | loaded | refused | slowest | most memory |", "|---|---|---|---|---|---|"]
        for kind, counts in self.counts.items():
            refused = ", ".join(f"{name} {count:,}" for name, count in counts.most_common() if name != "loaded")
            slowest, most = f"{self.seconds[kind]:.2f} s", f"{self.bytes[kind] >> 20} MiB"
            lines.append(
                f"| {kind} | {counts.total():,} | {counts['loaded']:,} | {refused or '-'} | {slowest} | {most} |"
            )
        total = sum(counts.total() for counts in self.counts.values())
        return "\n".join([*lines, f"| all | {total:,} | | | | |"])


@pytest.fixture(scope="module")
def outcomes():
    counted = Outcomes()
    yield counted
    if "FUZZ_CASES" in os.environ:
        print(f"\n{counted.table()}")


@pytest.fixture(autouse=True)
def quiet(capfd):
    """Native code, too, writes nothing to the terminal, but for panics of `tokenizers` that were caught."""
    yield
    err = capfd.readouterr().err
    assert "panicked" in err or not err


# ---- sound folders


def make_sound(root: Path) -> None:
    """Small folders that load: one file of weights and a tokenizer.json; shards and a tokenizer.model."""
    from test_tokenizer import byte_level_json, sentencepiece_model  # which imports transformers, slowly

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = Llama(config, GenerationConfig(eos_token_id=(2, 3), temperature=0.5, max_new_tokens=9))
    tool = {"content": "<tool>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "extra_special_tokens": ["<x>"]}
    single, sharded = root / "single", root / "sharded"
    model.save_pretrained(single)
    (single / "tokenizer.json").write_text(byte_level_json())
    settings = named | {"added_tokens_decoder": {"700": tool}, "chat_template": TEMPLATE, "legacy": False}
    (single / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
        model.save_pretrained(sharded)
    (sharded / "tokenizer.model").write_bytes(sentencepiece_model())
    (sharded / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    (sharded / "special_tokens_map.json").write_text(json.dumps(named))
    (sharded / "added_tokens.json").write_text(json.dumps({"<tool>": 700, "word": 701}))
    (sharded / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    make_sound(root)
    for folder in (root / "single", root / "sharded"):
        load_all(folder)  # also imports what is imported late, whose files are opened then
    return root


def load_config(folder: Path) -> None:
    LlamaConfig.from_pretrained(folder)
    GenerationConfig.from_pretrained(folder)


def load_model(folder: Path) -> None:
    Llama.from_pretrained(folder, device="cpu")


def load_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("Hello <s> wörld 日 <tool> ab")
    tokenizer.decode(ids)


def load_all(folder: Path) -> None:
    load_config(folder)
    load_model(folder)
    load_tokenizer(folder)
    Tokenizer.from_pretrained(folder).apply_chat_template(MESSAGES)


# ---- mutations

# Written into JSON as they are: what cannot be made from Python's values, or not quickly.
RAW = {
    "@deep@": "[" * 900 + "1" + "]" * 900,
    "@deeper@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@long@": json.dumps("x" * 300_000),
    "@digits@": "9" * 5000,
    "@1e999@": "1e999",
}
EXTREMES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    -(2**63),
    2**64,
    10**400,
    1.5,
    -0.0,
    1e308,
]
EXTREMES += [
    float("nan"),
    float("inf"),
    "",
    "a",
    "é\u2028",
    "\ud800",
    "a\nb\x1b[31m",
    "<s>",
    [],
    {},
    [[]],
    {"a": {}},
    [1],
]
NAMES = [
    "",
    ".",
    "..",
    "../x.safetensors",
    "/etc/passwd",
    "x\0.safetensors",
    "a\nb.safetensors",
    "x" * 300 + ".safetensors",
]
NAMES += [
    "model-00001-of-00004.safetensors",
    SHARD,
    "config.json",
    INDEX,
    "BF16",
    "F8_E4M3",
]

values = st.one_of(
    st.sampled_from([*EXTREMES, *RAW, *NAMES]),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
        max_leaves=6,
    ),
)
json_changes = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "remove", "add", "copy"]),
        st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
        values,
        st.sampled_from(["a", "", "\n", "type", "model_type", "quantization_config", "rope_scaling", "chat_template"]),
    ),
    min_size=1,
    max_size=3,
)
places = st.one_of(st.floats(0, 1), st.floats(0, 0.05), st.sampled_from([0.0, 1.0]))
byte_changes = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "remove", "insert", "repeat"]), places, st.binary(min_size=1)),
    min_size=1,
    max_size=4,
)


def changed_bytes(content: bytes, changes) -> bytes:
    for what, place, data in changes:
        i = min(int(place * len(content)), len(content) - 1)
        match what:
            case "flip":
                content = content[:i] + bytes([content[i] ^ 1 << data[0] % 8]) + content[i + 1 :]
            case "set":
                content = content[:i] + data + content[i + len(data) :]
            case "cut":
                content = content[:i]
            case "remove":
                content = content[:i] + content[i + len(data) * data[0] :]
            case "insert":
                content = content[:i] + data * 5 + content[i:]
            case "repeat":
                content = content[: i + 16 * data[0]] + content[i:]
        content = content or b" "
    return content


def changed_json(document, changes) -> str:
    """The text of a JSON document in which values, found by following `steps` into it, are changed."""
    document = json.loads(json.dumps(document))
    for what, steps, value, key in changes:
        holder, place, inner, value = None, None, document, copy.deepcopy(value)
        for step in steps:
            if not isinstance(inner, dict | list) or not inner:
                break
            places = list(inner) if isinstance(inner, dict) else range(len(inner))
            holder, place = inner, places[step % len(places)]
            inner = holder[place]
        if holder is None:
            document = value
        elif what == "remove":
            del holder[place]
        elif what == "replace":
            holder[place] = value
        elif what == "copy":
            holder[place] = json.loads(json.dumps(document))
        elif isinstance(holder, dict):
            holder[key] = value
        else:
            holder.insert(place, value)
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


def parts(file: bytes) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    size = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def joined(header: str, data: bytes = b"", size: int | None = None) -> bytes:
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


# ---- mutated files

BYTES = [("config.json", load_config), ("model.safetensors", load_model), ("tokenizer.json", load_tokenizer)]
BYTES += [("tokenizer_config.json", load_tokenizer), ("generation_config.json", load_config), (INDEX, load_model)]
BYTES += [(SHARD, load_model), ("tokenizer.model", load_tokenizer)]
BYTES += [("special_tokens_map.json", load_tokenizer), ("added_tokens.json", load_tokenizer)]
BYTES += [("chat_template.jinja", load_tokenizer)]
JSON = [case for case in BYTES if case[0].endswith(".json")]
JSON[0] = ("config.json", load_model)


def fuzzed(*strategies, cases: int = CASES):
    """A property over so many cases, the same ones in every run; the time is measured by the test."""

    def decorate(function):
        return settings(
            max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )(given(*strategies)(function))

    return decorate


def mutate(sound: Path, outcomes: Outcomes, file: str, load, label: str, strategy, change) -> None:
    """Load the folder that holds `file` with the file changed by each mutation."""
    source = sound / "single" if (sound / "single" / file).exists() else sound / "sharded"
    with tempfile.TemporaryDirectory(dir=sound) as place:
        folder = Path(shutil.copytree(source, Path(place) / "model"))
        whole = (folder / file).read_bytes()

        @fuzzed(strategy)
        def check(mutation):
            (folder / file).write_bytes(change(whole, mutation))
            outcomes.of(label, folder, load)

        check()


@pytest.mark.parametrize(("file", "load"), BYTES, ids=[file for file, _ in BYTES])
def test_bytes_of_any_file(file, load, sound, outcomes):
    mutate(sound, outcomes, file, load, f"bytes of `{file}`", byte_changes, changed_bytes)


@pytest.mark.parametrize(("file", "load"), JSON, ids=[file for file, _ in JSON])
def test_values_of_any_json(file, load, sound, outcomes):
    def change(whole, mutation):
        return changed_json(json.loads(whole), mutation).encode()

    mutate(sound, outcomes, file, load, f"values in `{file}`", json_changes, change)


sizes = st.one_of(st.none(), st.none(), st.none(), st.sampled_from([0, 1, 8, 100, 2**22, 2**31, 2**63 - 1, 2**64 - 1]))


@pytest.mark.parametrize("file", ["model.safetensors", SHARD])
def test_headers_of_safetensors(file, sound, outcomes):
    def change(whole, mutation):
        header, data = parts(whole)
        return joined(changed_json(header, mutation[0]), data, mutation[1])

    strategy = st.tuples(json_changes, sizes)
    mutate(sound, outcomes, file, load_model, f"header of `{file}`", strategy, change)


# Changes to offsets, shapes, dtypes and names, which changes to any JSON seldom hit.
TENSOR_CHANGES = {
    "offsets": lambda info, n: info | {"data_offsets": [info["data_offsets"][0] + n, info["data_offsets"][1]]},
    "ends": lambda info, n: info | {"data_offsets": [info["data_offsets"][0], info["data_offsets"][1] + n]},
    "both": lambda info, n: info | {"data_offsets": [offset + n for offset in info["data_offsets"]]},
    "shape": lambda info, n: info | {"shape": [*info["shape"], n]},
    "size": lambda info, n: info | {"shape": [info["shape"][0] + n, *info["shape"][1:]]},
    "flat": lambda info, n: info | {"shape": [max(1, n), -1]},
    "dtype": lambda info, n: (
        info | {"dtype": ["F64", "F16", "BF16", "I8", "U64", "BOOL", "F4", "C64", "f32", ""][n % 10]}
    ),
}
tensor_changes = st.lists(
    st.tuples(
        st.sampled_from([*TENSOR_CHANGES, "rename", "swap", "twice", "remove"]),
        st.integers(0, 99),
        st.one_of(st.integers(-200, 200), st.sampled_from([2**31, 2**62, 2**63, 2**64 - 1, -(2**63)])),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("file", ["model.safetensors", SHARD])
def test_tensors_of_safetensors(file, sound, outcomes):
    def change(whole, mutation):
        header, data = parts(whole)
        text = None
        for what, which, n in mutation:
            names = [name for name in header if name != "__metadata__"]
            name, other = names[which % len(names)], names[(which + 1) % len(names)]
            if what == "rename":
                header[f"{name}\n\x1b" if n % 2 else name.replace("0", "1")] = header.pop(name)
            elif what == "swap":
                header[name], header[other] = header[other], header[name]
            elif what == "twice":
                text = f'{{"{name}": {json.dumps(header[other])}, {json.dumps(header)[1:]}'
            elif what == "remove" and len(names) > 2:
                del header[name]
            elif what in TENSOR_CHANGES:
                header[name] = TENSOR_CHANGES[what](header[name], n)
        return joined(text or json.dumps(header), data)

    mutate(sound, outcomes, file, load_model, f"tensors of `{file}`", tensor_changes, change)


# ---- parts of a tokenizer.json

# Type -> its keys, each with what it is usually given. All of the `tokenizers` library's but those that need data.
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
TOP = {
    "truncation": [{"direction": "Right", "max_length": n, "strategy": "LongestFirst", "stride": 9} for n in (0, 5)],
    "padding": [
        {"strategy": {"Fixed": n}, "direction": "Left", "pad_to_multiple_of": m} for n, m in ((9, 0), (9**9, 8))
    ],
    "added_tokens": [[{"id": id, "content": content}] for id, content in ((600, "<s>"), (2**32 - 1, "<t>"), (7, ""))],
}
TOP["padding"] = [pad | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"} for pad in TOP["padding"]]
flags = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": True, "special": False}
TOP["added_tokens"] = [[token | flags for token in tokens] for tokens in TOP["added_tokens"]]


@st.composite
def tokenizer_parts(draw) -> dict:
    """Parts of a tokenizer.json to replace, well formed but for a value in a few."""

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


def test_parts_of_a_tokenizer_json(sound, outcomes):
    def change(whole, parts):
        return (json.dumps(json.loads(whole) | parts)).encode()

    mutate(sound, outcomes, "tokenizer.json", load_tokenizer, "parts of `tokenizer.json`", tokenizer_parts(), change)


# ---- what stands in the place of a file

ENTRIES = {
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "100 MB of spaces": lambda path: (path.touch(), os.truncate(path, 100 << 20)),
    "100 GB of nothing": lambda path: (path.touch(), os.truncate(path, 100 << 30)),
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link elsewhere": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "a link to another file": lambda path: path.symlink_to("generation_config.json"),
    "100,000 brackets": lambda path: path.write_text("[" * 100_000),
    "10 MB of JSON": lambda path: path.write_text("[" + "{}," * 3_333_333 + "{}]"),
    "JSON of one key": lambda path: path.write_text(json.dumps({"a": "x" * 3_000_000})),
    "a pickle": lambda path: path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR."),
}
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
FILES += [INDEX, SHARD, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
FILES += ["pytorch_model.bin", "chat_template.json"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_of_a_folder(entry, sound, outcomes):
    for source, file in itertools.product(("single", "sharded"), FILES):
        with tempfile.TemporaryDirectory(dir=sound) as place:
            folder = Path(shutil.copytree(sound / source, Path(place) / "model"))
            (folder / file).unlink(missing_ok=True)
            ENTRIES[entry](folder / file)
            for load in (load_config, load_model, load_tokenizer):
                outcomes.of("what stands in the place of a file", folder, load)


# ---- chat templates

NUMBERS = ["0", "1", "-1", "3", "99", "5000", "100000", "10000000000", "-100000000", "2.5", "1e308", "10 ** 400"]
NUMBERS += ["0x" + "f" * 300, "2305843009213693951"]
ATOMS = [
    "'x'",
    "''",
    "'a\\nb'",
    "'%s%d%*d'",
    "'{:>{}}{!r}'",
    "'é' * 3000",
    "messages",
    "messages[0]",
    "missing",
    "none",
]
ATOMS += ["[]", "[1]", "()", "{}", "true", "ns", "ns.a", "ns.b", "range(9)", "range(100000)", "loop", "self", "caller"]
ATOMS += ["dict", "cycler", "joiner()", "namespace(a=1)", "strftime_now", "range", "raise_exception", "varargs"]
FILTERS = sorted(jinja2.filters.FILTERS)
TESTS = sorted(jinja2.tests.TESTS)
METHODS = sorted({name for kind in (str, bytes, list, dict, int, float) for name in dir(kind) if name[0] != "_"})
METHODS += ["__class__", "__init__", "__globals__", "gi_frame", "mapping", "changed", "cycle", "a", "call", "striptags"]
FORMS = ["(@ OPERATOR @)", "(@ OPERATOR @)", "(@ | FILTER)", "(@ | FILTER(@))", "(@ | FILTER(@, @))", "(@).METHOD()"]
FORMS += ["(@ | FILTER(width=@))", "(@ | FILTER(attribute=@))", "(@ | map('FILTER', @) | list)", "(@).METHOD(@)"]
FORMS += ["(@).METHOD(@, @)", "(@ is TEST(@))", "@[@]", "@[@:@]", "[@, @]", "(@, @)", "{@: @}", "dict(a=@, b=@)"]
FORMS += ["(@ if @ else @)", "m(@, @)", "[ns.a, ns.a]", "(ns.a * @)", "(ns.a ~ ns.a)"]
STATEMENTS = ["{{ @ }}", "{% set ns.a = @ %}", "{% for i in range(60) %}{% set ns.a = @ %}{% endfor %}", "{{ ns.a }}"]
STATEMENTS += ["{% for i in range(9000) %}{% set ns.b = @ %}{% endfor %}", "{% for x in @ %}{{ @ }}{% endfor %}"]
STATEMENTS += ["{% macro m(x=@) %}{{ @ }}{% endmacro %}", "{% call m() %}{{ @ }}{% endcall %}", "{{ ns.a == @ }}"]
STATEMENTS += [
    "{% filter upper %}{{ @ }}{% endfilter %}",
    "{% set x %}{{ ns.a }}{{ ns.a }}{% endset %}{% set ns.a = x %}",
]
STATEMENTS += ["{% if @ %}{{ @ }}{% endif %}", "{% if"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or"]
CHOICES = {
    "ATOM": [*NUMBERS, *ATOMS, *ATOMS],
    "FILTER": FILTERS,
    "TEST": TESTS,
    "METHOD": METHODS,
    "OPERATOR": OPERATORS,
}


@st.composite
def expressions(draw, depth: int = 3) -> str:
    """A Jinja expression; @ in a form stands for a smaller one."""
    form = draw(st.sampled_from(FORMS)) if depth and draw(st.integers(0, 4)) else "ATOM"
    for name, choices in CHOICES.items():
        while name in form:
            form = form.replace(name, draw(st.sampled_from(choices)), 1)
    while "@" in form:
        form = form.replace("@", draw(expressions(depth - 1)), 1)
    return form


@st.composite
def programs(draw) -> str:
    body = [draw(st.sampled_from(STATEMENTS)) for _ in range(draw(st.integers(1, 5)))]
    text = "{% set ns = namespace(a='x', b=[1]) %}" + "".join(body)
    while "@" in text:
        text = text.replace("@", draw(expressions()), 1)
    return text


ENDS = {"for more than": "too long", "takes more than": "too much memory", "its text has": "too much text"}


def rendered(outcomes: Outcomes, kind: str, template: str) -> None:
    again_if_slow(lambda: _rendered(outcomes, kind, template))


def _rendered(outcomes: Outcomes, kind: str, template: str) -> None:
    start, message = time.perf_counter(), None
    try:
        chat.render_chat(template, MESSAGES, bos_token="<s>", eos_token="</s>")
    except ValueError as error:
        message = str(error)
    seconds = time.perf_counter() - start
    if seconds >= 2 + SECONDS:  # processor time is limited in whole seconds
        raise TooSlow(f"{seconds:.2f} s: {template}")
    end = "loaded"
    if message is not None:
        assert re.match(r"the chat template failed( \(line \d+\))?: .", message), message
        assert message.isprintable(), message
        assert "ended with" not in message, template
        end = next((ENDS[text] for text in ENDS if text in message), "faulty")
    outcomes.add(kind, end, seconds)


def test_bytes_of_a_chat_template(outcomes, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)

    @fuzzed(byte_changes)
    def check(mutation):
        template = changed_bytes(TEMPLATE.encode(), mutation).decode("utf-8", "replace")
        rendered(outcomes, "characters of a chat template", template)

    check()


def test_programs_as_chat_templates(outcomes, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)

    @fuzzed(programs())
    def check(template):
        rendered(outcomes, "programs as a chat template", template)

    check()
