"""Read the safetensors of a folder, strictly: find the files, check their headers, locate each tensor."""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..usercode.arguments import whole_number
from .config_rules import DRAFT, MAX_JSON_BYTES, OTHER_HEAD, ConfigError, read_json
from .files import FolderError, check_not_in_place, names_in, regular, what_it_is

MAX_SHARDS = 4096  # opening so many takes a fifth of a second
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OF_A_DRAFT = re.compile(r"(model\.)?(fc\.weight|midlayer\..*|d2t|t2d)")  # EAGLE's names


class CheckpointError(FolderError):
    """A folder whose weights are absent, damaged, or not those its config.json describes."""


class Source(NamedTuple):
    """The file that a tensor is stored in, and its name there."""

    path: Path
    name: str


class Stored(NamedTuple):
    """A tensor in a file, and the parameter that it fills.

    shape, dtypes: what the file's header must say, the dtypes by safetensors' names; -1 for any size. place: the name
    of the parameter; "" for a tensor that is only checked. read: turns the tensor, and those named in others, into
    one that is copied to its place, broadcast; raises ValueError, in words that follow the tensor's name. None: it is
    floats.
    """

    shape: list[int]
    place: str
    read: Callable[..., Tensor] | None = None
    dtypes: Collection[str] = tuple(DTYPES)
    others: tuple[str, ...] = ()


class Checkpoint(NamedTuple):
    """The sources of a model's tensors, by name.

    dtype: the embedding's dtype as stored. tied_copy: a copy of a tied embedding under the output matrix's name.
    """

    sources: dict[str, Source]
    dtype: torch.dtype
    tied_copy: Source | None

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors with their names, file by file: those named, or all."""
        for path in sorted({source.path for source in self.sources.values()}):
            with opened(path) as file:
                for name, source in self.sources.items():
                    if source.path == path and (names is None or name in names):
                        yield name, file.get_tensor(source.name)

    def check_tied_copy(self, dtype: torch.dtype) -> None:
        """Raise CheckpointError if there is a copy of a tied embedding, and it differs in a dtype."""
        if self.tied_copy is None:
            return
        both = []
        for source in (self.sources[EMBEDDING], self.tied_copy):
            with opened(source.path) as file:
                both.append(file.get_tensor(source.name).to(dtype))
        if not torch.equal(*both):
            raise CheckpointError(
                f"{self.tied_copy.path.parent}: lm_head.weight differs from the embedding, but config.json sets "
                "tie_word_embeddings; set it to false there, or remove lm_head.weight"
            )


def find(folder: Path, expected: Mapping[str, Stored], *, tied: bool) -> Checkpoint:
    """Find the tensors that are expected. Raises CheckpointError listing missing, unexpected, misshapen ones.

    Like transformers, it accepts a base model's names, which lack "model.", and a tied embedding under either name.
    """
    found: dict[str, Source] = {}
    problems: list[str] = []
    stored: dict[str, torch.dtype] = {}
    shapes: dict[str, list[int]] = {}
    is_quantised = any("F32" not in each.dtypes for each in expected.values())
    for path in _files(folder):
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer that old checkpoints saved; it follows from the config
                name = key if key in expected or f"model.{key}" not in expected else f"model.{key}"
                meta = file.get_slice(key)
                dtype, allowed = meta.get_dtype(), expected[name].dtypes if name in expected else DTYPES
                if dtype in DTYPES:
                    stored[name] = DTYPES[dtype]
                if dtype not in allowed and not _OF_A_DRAFT.fullmatch(key):  # its tables of ids are integers
                    reason = f"not {' or '.join(allowed)}" if is_quantised else "quantised; config.json says not"
                    problems.append(f"stored as {dtype}: {name} ({reason})")
                if name in found and (other := _difference(found[name], file.get_tensor(key))):
                    both = [f"{source.name} in {source.path.name}" for source in (found[name], Source(path, key))]
                    problems.append(f"twice, {other}: {name} ({' and '.join(both)})")
                shapes[name] = meta.get_shape()
                found.setdefault(name, Source(path, key))
    tied_copy = found.pop(HEAD, None) if tied else None
    if tied_copy is not None and EMBEDDING not in found:
        found[EMBEDDING], tied_copy = tied_copy, None
        stored[EMBEDDING], shapes[EMBEDDING] = stored.get(HEAD, torch.float32), shapes[HEAD]
    problems += [
        f"shape: {name} is {shapes[name]}, config.json says {expected[name].shape}"
        for name in sorted(expected.keys() & found.keys())
        if len(shapes[name]) != len(expected[name].shape)
        or any(size not in (-1, found) for size, found in zip(expected[name].shape, shapes[name], strict=True))
    ]
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems += [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        if hint := _hint(missing, unexpected):
            shown.append(hint)
        raise CheckpointError(f"{folder}: the weights do not fit config.json: " + "; ".join(shown))
    return Checkpoint(found, stored[next(iter(expected))], tied_copy)


def _hint(missing: list[str], unexpected: list[str]) -> str | None:
    """Explain from their names what weights that do not fit are, and what to do; return None if unknown."""
    if any(map(_OF_A_DRAFT.fullmatch, unexpected)):
        return DRAFT
    if any(name.startswith(("score.", "classifier.", "qa_outputs.")) for name in unexpected):
        return OTHER_HEAD
    if missing == [HEAD]:
        return (
            "a base model without an output matrix; give the one that predicts tokens, or say tie_word_embeddings in "
            "config.json if its embedding serves as one"
        )
    return None


def _difference(source: Source, tensor: Tensor) -> str | None:
    """Describe how a tensor differs from the first one of the same name; return None if the bits are the same."""
    with opened(source.path) as file:
        other = file.get_tensor(source.name)
    if other.dtype != tensor.dtype:
        return "as " + " and ".join(str(t.dtype).removeprefix("torch.") for t in (other, tensor))
    if other.shape != tensor.shape:
        return f"in shapes {list(other.shape)} and {list(tensor.shape)}"
    same = torch.equal(other.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    return None if same else "with other values"


def _files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint. Raises CheckpointError if there are none, or the index is invalid."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        return [single]
    if not os.path.lexists(index):
        names = names_in(folder)
        if kind := what_it_is(names):
            raise CheckpointError(f"{folder}{kind}")
        if others := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
            raise CheckpointError(
                f"{folder}: only pickled weights ({others[0]}); they can run code when read and are never opened. "
                "Convert them: transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise CheckpointError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for name in weight_map.values():
        # Plain names only. A file may itself be a link, as in the hub's cache.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            found = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
            raise CheckpointError(f"{index}: points to {found}; only safetensors files beside it are read")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index}: names {len(names)} files, more than {MAX_SHARDS}")
    if absent := [name for name in names if not os.path.lexists(folder / name)]:
        raise CheckpointError(f"{folder}: missing {', '.join(absent)} (of {len(names)} files in {index.name})")
    return [folder / name for name in names]


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file. Raises CheckpointError, or FolderError from `regular`, naming the file."""
    file = regular(path)
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as begun:
            start = begun.read(256)
        check_not_in_place(path, start)
        header_bytes = int.from_bytes(start[:8], "little")
        if header_bytes > MAX_JSON_BYTES:  # large as it is, it would be far larger when parsed
            what = f"a header of {header_bytes:,} bytes" if start[8:9] == b"{" else f"it begins {start[:16]!r}"
            raise CheckpointError(f"{path}: damaged or not a safetensors file ({what})")
        if size < 8 + header_bytes:
            there = f"it ends after {size:,} bytes, in the middle of its header" if size else "it is empty"
            raise CheckpointError(
                f"{path}: damaged or cut short, as by an interrupted download ({there}); fetch it again"
            )
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError, MemoryError) as error:  # MemoryError: too large to be mapped
        whole, twice = _announced(file)
        if twice is not None:
            raise CheckpointError(f"{path}: damaged: its header lists {twice} twice; fetch it again") from None
        if whole > size:
            raise CheckpointError(
                f"{path}: damaged or cut short, as by an interrupted download ({size:,} of {whole:,} bytes); fetch it "
                "again"
            ) from None
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None


def _announced(file: str) -> tuple[int, str | None]:
    """Return a safetensors file's length by its header, 0 if unreadable, and a name that occurs twice in the header."""
    try:
        with open(file, "rb") as begun:
            header_bytes = int.from_bytes(begun.read(8), "little")
            header = json.loads(begun.read(min(header_bytes, MAX_JSON_BYTES)), object_pairs_hook=list)
        names = Counter(name for name, _ in header)
        ends = [dict(entry)["data_offsets"][1] for name, entry in header if name != "__metadata__"]
        end = max(map(whole_number, itertools.repeat("an offset"), ends), default=0)
        return 8 + header_bytes + end, next((name for name in names if names[name] > 1), None)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return 0, None


def dtype_named(name: str | None, folder: Path) -> torch.dtype | None:
    """Return the dtype that a config.json names, None if it names none. Raises ConfigError for an unsupported one."""
    if name is None:
        return None
    dtype = {str(d).removeprefix("torch."): d for d in DTYPES.values()}.get(name)
    if dtype is None:
        raise ConfigError(f"{folder / 'config.json'}: dtype {name!r} is not supported; pass another")
    return dtype


def warn_if_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Warn of tensors with NaN or infinity, naming them."""
    # aminmax propagates NaN and needs no temporary, and the results are copied to the host together.
    extremes = [torch.stack(t.aminmax()).isfinite().all() for t in tensors.values()]
    finite: Iterable[bool] = torch.stack(extremes).tolist()
    if bad := [name for name, ok in zip(tensors, finite, strict=True) if not ok]:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        warnings.warn(f"weights with NaN or infinity: {shown}", stacklevel=4)
