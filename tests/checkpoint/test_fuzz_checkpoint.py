"""Configurations and weights that somebody else made, changed at random or replaced; see fuzz_helpers."""

import itertools
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import fuzz_helpers
import pytest
from fuzz_helpers import (
    CASES,
    INDEX,
    SHARD,
    byte_changes,
    change_bytes,
    change_json,
    change_json_file,
    check_mutations,
    json_changes,
    load_config,
    load_model,
    load_tokenizer,
)
from helpers import few
from hypothesis import strategies as st

outcomes, quiet, sound = fuzz_helpers.outcomes, fuzz_helpers.quiet, fuzz_helpers.sound  # fixtures


def split_file(file: bytes) -> tuple[dict, bytes]:
    """Return the header and the data of a safetensors file."""
    size = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def join_file(header: str, data: bytes = b"", size: int | None = None) -> bytes:
    """Return a safetensors file of a header and data; size: what it says that the header has."""
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


# ---- changed files

FILES = [
    *(("config.json", load_config), ("model.safetensors", load_model), ("generation_config.json", load_config)),
    *((INDEX, load_model), (SHARD, load_model)),
]
JSON = [("config.json", load_model), ("generation_config.json", load_config), (INDEX, load_model)]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("file", "load"), FILES, ids=[file for file, _ in FILES])
def test_bytes_of_any_file(file, load, cases, sound, outcomes):
    check_mutations(cases, sound, outcomes, file, load, f"bytes of `{file}`", byte_changes, change_bytes)


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("file", "load"), JSON, ids=[file for file, _ in JSON])
def test_values_of_any_json(file, load, cases, sound, outcomes):
    check_mutations(cases, sound, outcomes, file, load, f"values in `{file}`", json_changes, change_json_file)


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("name", ["quantised", "blocks"])
def test_values_of_a_quantised_checkpoints_json(name, cases, sound, outcomes):
    def change(whole, mutation):
        config = json.loads(whole)
        return (
            json.dumps(config)
            .encode()
            .replace(
                json.dumps(config["quantization_config"]).encode(),
                change_json(config["quantization_config"], mutation).encode("utf-8", "surrogatepass"),
            )
        )

    source, kind = sound / name, "values in `quantization_config`"
    check_mutations(cases, sound, outcomes, "config.json", load_model, kind, json_changes, change, source)


sizes = st.one_of(st.none(), st.none(), st.none(), st.sampled_from([0, 1, 8, 100, 2**22, 2**31, 2**63 - 1, 2**64 - 1]))


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("file", ["model.safetensors", SHARD])
def test_headers_of_safetensors(file, cases, sound, outcomes):
    def change(whole, mutation):
        header, data = split_file(whole)
        return join_file(change_json(header, mutation[0]), data, mutation[1])

    strategy = st.tuples(json_changes, sizes)
    check_mutations(cases, sound, outcomes, file, load_model, f"header of `{file}`", strategy, change)


# Changes to offsets, shapes, dtypes and names, which changes to any JSON rarely hit.
TENSOR_CHANGES = {
    "offsets": lambda info, n: info | {"data_offsets": [info["data_offsets"][0] + n, info["data_offsets"][1]]},
    "ends": lambda info, n: info | {"data_offsets": [info["data_offsets"][0], info["data_offsets"][1] + n]},
    "both": lambda info, n: info | {"data_offsets": [offset + n for offset in info["data_offsets"]]},
    "shape": lambda info, n: info | {"shape": [*info["shape"], n]},
    "size": lambda info, n: info | {"shape": [info["shape"][0] + n, *info["shape"][1:]]},
    "flat": lambda info, n: info | {"shape": [max(1, n), -1]},
    "dtype": lambda info, n: (
        info | {"dtype": ["F64", "F16", "BF16", "I8", "U64", "BOOL", "F4", "C64", "f32", "", "F8_E4M3"][n % 11]}
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


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(
    ("file", "source"),
    [("model.safetensors", None), (SHARD, None), ("model.safetensors", "quantised"), ("model.safetensors", "blocks")],
)
def test_tensors_of_safetensors(file, source, cases, sound, outcomes):
    def change(whole, mutation):
        header, data = split_file(whole)
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
        return join_file(text or json.dumps(header), data)

    kind = f"tensors of `{file}`" if source is None else f"tensors of a checkpoint in 8 bits, {source}"
    source = None if source is None else sound / source
    check_mutations(cases, sound, outcomes, file, load_model, kind, tensor_changes, change, source)


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

PLACES = [
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *(INDEX, SHARD, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("pytorch_model.bin", "chat_template.json"),
]
OFTEN = ("a link elsewhere", "100,000 brackets")


@pytest.mark.parametrize("entry", few(OFTEN, [entry for entry in ENTRIES if entry not in OFTEN]))
def test_entries_of_a_folder(entry, sound, outcomes):
    for source, file in itertools.product(("single", "sharded"), PLACES):
        with tempfile.TemporaryDirectory(dir=sound) as place:
            folder = Path(shutil.copytree(sound / source, Path(place) / "model"))
            (folder / file).unlink(missing_ok=True)
            ENTRIES[entry](folder / file)
            for load in (load_config, load_model, load_tokenizer):
                outcomes.check("what stands in the place of a file", folder, load)
