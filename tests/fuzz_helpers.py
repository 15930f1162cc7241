"""Folders that somebody else made: loading one ends in a model or in one line that names it, soon, and touches no more.

The contract and a table of outcomes are in docs/hostile-files.md. Each file of tests prints its part of the table:
FUZZ_CASES=3000 python -m pytest -m "not slow" -s tests/checkpoint/test_fuzz_checkpoint.py tests/text/test_fuzz_*.py
"""

import copy
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import rewrite
from helpers import few
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_dtype_helpers import with_scales
from tokenizer_helpers import byte_level_json, sentencepiece_model

from llama_flex import GenerationConfig, Llama, LlamaConfig, Tokenizer
from llama_flex.checkpoint import saving
from llama_flex.checkpoint.files import FolderError

# How many cases of each kind there are: some in every run, many in exhaustive ones.
CASES = [int(os.environ["FUZZ_CASES"])] if "FUZZ_CASES" in os.environ else few([20], [250])
SECONDS = 1.0
MEGABYTES = 200  # beyond what the process had before
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

# ---- what a load does

_TOUCHES = ("open", "os.", "shutil.", "socket.", "subprocess.", "pickle.", "ctypes.")
_LOOKS = ("os.listdir", "os.scandir")
_watched: list[tuple] | None = None


def _audit(event: str, args: tuple) -> None:
    if _watched is not None and event.startswith(_TOUCHES) and event not in _LOOKS:
        _watched.append((event, args))


@functools.cache
def start_auditing() -> None:
    """Add the audit hook, once: it stays until the process ends."""
    sys.addaudithook(_audit)


def listing(folder: Path) -> dict:
    """Return what is in a folder, so that any change to it shows."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_mode, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def resident(name: str) -> int:
    """Return the bytes in memory: now ("VmRSS"), or at most since `forget_peak` ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) << 10


def forget_peak() -> None:
    """Start measuring the peak of memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


class TooSlow(AssertionError):
    """A case took longer than any may."""


def again_if_slow(case: Callable[[], None]) -> None:
    """Run a case, and once more if it is slow: a shared machine pauses now and then."""
    try:
        case()
    except TooSlow:
        case()


class Outcomes:
    """How the cases of each kind ended, "loaded" or the class of the error, and the slowest and largest of them."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter] = {}
        self.seconds: Counter = Counter()
        self.bytes: Counter = Counter()

    def check(self, kind: str, folder: Path, load: Callable[[Path], None]) -> None:
        """Load a folder and check the whole contract."""
        start_auditing()
        again_if_slow(lambda: self._check(kind, folder, load))

    def _check(self, kind: str, folder: Path, load: Callable[[Path], None]) -> None:
        global _watched
        before, message = listing(folder), None
        forget_peak()
        taken = resident("VmRSS")
        start, _watched = time.perf_counter(), []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                load(folder)
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
        """Count a case."""
        self.counts.setdefault(kind, Counter())[end] += 1
        self.seconds[kind] = max(seconds, self.seconds[kind])
        self.bytes[kind] = max(peak, self.bytes[kind])

    def table(self) -> str:
        """Return the table of docs/hostile-files.md."""
        lines = ["| changed | cases | loaded | refused | slowest | most memory |", "|---|---|---|---|---|---|"]
        for kind, counts in self.counts.items():
            refused = ", ".join(f"{name} {count:,}" for name, count in counts.most_common() if name != "loaded")
            slowest, most = f"{self.seconds[kind]:.2f} s", f"{self.bytes[kind] >> 20} MiB"
            lines.append(
                f"| {kind} | {counts.total():,} | {counts['loaded']:,} | {refused or '-'} | {slowest} | {most} |"
            )
        total = sum(counts.total() for counts in self.counts.values())
        return "\n".join([*lines, f"| all | {total:,} | | | | |"])


# ---- fixtures, which files of tests take over by assignment


@pytest.fixture(scope="module")
def outcomes():
    """The outcomes of a file of tests; with FUZZ_CASES their table is printed."""
    counted = Outcomes()
    yield counted
    if "FUZZ_CASES" in os.environ:
        print(f"\n{counted.table()}")


@pytest.fixture(autouse=True)
def quiet(capfd):
    """Native code, too, writes nothing to the terminal, except panics of `tokenizers` that were caught."""
    yield
    err = capfd.readouterr().err
    assert "panicked" in err or not err


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """The place of two folders that load, "single" and "sharded"."""
    root = tmp_path_factory.mktemp("sound")
    save_sound(root)
    for folder in (root / "quantised", root / "blocks"):
        load_model(folder)
    for folder in (root / "single", root / "sharded"):
        load_all(folder)  # also imports what is imported late, whose files are opened then
    return root


# ---- sound folders


def save_sound(root: Path) -> None:
    """Save small folders: one file of weights and a tokenizer.json; shards and a tokenizer.model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = Llama(config, GenerationConfig(eos_token_id=(2, 3), temperature=0.5, max_new_tokens=9))
    tool = {"content": "<tool>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "extra_special_tokens": ["<x>"]}
    single, sharded = root / "single", root / "sharded"
    model.save_pretrained(single)
    model.save_pretrained(root / "floats")
    quantised = Llama.from_pretrained(root / "floats", device="cpu", quantize="int8")
    with_scales(quantised, dtype=torch.float32).save_pretrained(root / "quantised")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    Llama(LlamaConfig(vocab_size=48, **sizes)).save_pretrained(root / "blocks")
    save_blocks(root / "blocks")
    (single / "tokenizer.json").write_text(byte_level_json())
    settings = named | {"added_tokens_decoder": {"700": tool}, "chat_template": TEMPLATE, "legacy": False}
    (single / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "MAX_SHARD_BYTES", 20_000)
        model.save_pretrained(sharded)
    (sharded / "tokenizer.model").write_bytes(sentencepiece_model())
    (sharded / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    (sharded / "special_tokens_map.json").write_text(json.dumps(named))
    (sharded / "added_tokens.json").write_text(json.dumps({"<tool>": 700, "word": 701}))
    (sharded / "chat_template.jinja").write_text(TEMPLATE)


def save_blocks(folder: Path) -> None:
    """Quantise the matrices of a folder as transformers' "fp8" does, in blocks that do not divide their rows."""
    settings = {"activation_scheme": "dynamic", "weight_block_size": [24, 32], "modules_to_not_convert": ["lm_head"]}

    def change(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[f"{name}_scale_inv"] = torch.ones(-(-len(tensors[name]) // 24), tensors[name].shape[1] // 32)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        return tensors

    rewrite(folder, change, quantization_config={"quant_method": "fp8"} | settings)


def load_config(folder: Path) -> None:
    """Load the configurations."""
    LlamaConfig.from_pretrained(folder)
    GenerationConfig.from_pretrained(folder)


def load_model(folder: Path) -> None:
    """Load the model."""
    Llama.from_pretrained(folder, device="cpu")


def load_tokenizer(folder: Path) -> None:
    """Load the tokenizer, and use it."""
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("Hello <s> wörld 日 <tool> ab")
    tokenizer.decode(ids)


def load_all(folder: Path) -> None:
    """Load everything, and render the chat template."""
    load_config(folder)
    load_model(folder)
    load_tokenizer(folder)
    Tokenizer.from_pretrained(folder).apply_chat_template(MESSAGES)


# ---- mutations

# Written into JSON as they are: what Python's values cannot express, or not quickly.
RAW = {
    "@deep@": "[" * 900 + "1" + "]" * 900,
    "@deeper@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@long@": json.dumps("x" * 300_000),
    "@digits@": "9" * 5000,
    "@1e999@": "1e999",
}
EXTREMES = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**400),
    *(1.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "a", "é\u2028", "\ud800", "a\nb\x1b[31m", "<s>", [], {}, [[]], {"a": {}}, [1]),
]
NAMES = [
    *("", ".", "..", "../x.safetensors", "/etc/passwd", "x\0.safetensors", "a\nb.safetensors"),
    *("x" * 300 + ".safetensors", "model-00001-of-00004.safetensors", SHARD, "config.json", INDEX, "BF16", "F8_E4M3"),
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


def change_bytes(content: bytes, changes) -> bytes:
    """Return bytes with changes of `byte_changes`."""
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


def change_json(document, changes) -> str:
    """Return the text of a JSON document with changes of `json_changes`, each to a value found by steps into it."""
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


def change_json_file(whole: bytes, changes) -> bytes:
    """Return a file of JSON with changes of `json_changes`."""
    return change_json(json.loads(whole), changes).encode()


def fuzzed(cases: int, strategy: st.SearchStrategy):
    """Decorate a property to check over so many cases, the same ones in every run; the test itself measures time."""

    def decorate(function):
        return settings(
            max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )(given(strategy)(function))

    return decorate


def check_mutations(
    cases: int,
    sound: Path,
    outcomes: Outcomes,
    file: str,
    load,
    kind: str,
    strategy: st.SearchStrategy,
    change,
    source: Path | None = None,
) -> None:
    """Load the sound folder that holds `file`, or `source`, with the file changed by each mutation of a strategy."""
    source = source or (sound / "single" if (sound / "single" / file).exists() else sound / "sharded")
    with tempfile.TemporaryDirectory(dir=sound) as place:
        folder = Path(shutil.copytree(source, Path(place) / "model"))
        whole = (folder / file).read_bytes()

        @fuzzed(cases, strategy)
        def check(mutation):
            (folder / file).write_bytes(change(whole, mutation))
            outcomes.check(kind, folder, load)

        check()
