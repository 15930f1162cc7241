"""safetensors <-> model, under Hugging Face's names, strictly and without a second copy in memory."""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .arguments import whole_number
from .config import DRAFT, MAX_JSON_BYTES, OTHER_HEAD, ConfigError, LlamaConfig, read_json
from .files import FolderError, check_not_in_place, make_folder, names_in, regular, what_it_is

if TYPE_CHECKING:
    from .model import Llama

    LlamaT = TypeVar("LlamaT", bound=Llama)

GENERATION_CONFIG = "generation_config.json"
MAX_SHARD_BYTES = 5 * 10**9
MAX_SHARDS = 4096  # to read; opening so many takes a fifth of a second
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OF_A_DRAFT = re.compile(r"(model\.)?(fc\.weight|midlayer\..*|d2t|t2d)")  # EAGLE's
DTYPES = tuple(_DTYPES.values())  # that weights may have


class CheckpointError(FolderError):
    """A folder whose weights are absent, damaged, or not those its config.json describes."""


def shapes_by_name(config: LlamaConfig) -> dict[str, list[int]]:
    """The shape of every tensor of the checkpoint by its Hugging Face name; nothing is allocated for it."""
    c = config
    e, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": [c.vocab_size, e], "model.norm.weight": [e]}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = [c.vocab_size, e]
    attention = {"q_proj": [q, e], "k_proj": [kv, e], "v_proj": [kv, e], "o_proj": [e, q]}
    mlp = {"gate_proj": [f, e], "up_proj": [f, e], "down_proj": [e, f]}
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": [e] for norm in ("input", "post_attention")}
        for part, linears, bias in (("self_attn", attention, c.attention_bias), ("mlp", mlp, c.mlp_bias)):
            for linear, shape in linears.items():
                shapes[f"{layer}.{part}.{linear}.weight"] = shape
                if bias:
                    shapes[f"{layer}.{part}.{linear}.bias"] = shape[:1]
    return shapes


def tensors_by_name(model: Llama) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its Hugging Face name, each a view into the (fused) parameter that holds it."""
    c = model.config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    views: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
    }
    for i, layer in enumerate(model.blocks()):
        name = f"model.layers.{i}"
        views[f"{name}.input_layernorm.weight"] = layer.attention.norm.weight
        views[f"{name}.post_attention_layernorm.weight"] = layer.mlp.norm.weight
        for module, parts in (
            (layer.attention.qkv, {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}),
            (layer.attention.o, {"self_attn.o_proj": c.hidden_size}),
            (layer.mlp.gate_up, {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}),
            (layer.mlp.down, {"mlp.down_proj": c.hidden_size}),
        ):
            for kind, parameter in module.named_parameters():  # weight and, where the config has it, bias
                for part, view in zip(parts, parameter.detach().split(list(parts.values())), strict=True):
                    views[f"{name}.{part}.{kind}"] = view
    if model.lm_head is not None:
        views["lm_head.weight"] = model.lm_head.weight
    return {name: view.detach() for name, view in views.items()}


def load(
    make: Callable[[], LlamaT],
    config: LlamaConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> LlamaT:
    """The model that `make` makes for `config`, filled from the safetensors in `folder`.

    The headers are compared with `config` first; only then is the model made, on the meta device. Each tensor is copied
    from its file straight into its place, converted on the way, so peak memory is about one copy of the model.
    dtype: default config.json's, else the file's. Raises CheckpointError listing by name what is missing, unexpected or
    misshapen, and for damaged files, FolderError for links out of the folder; warns of weights that are not finite.
    """
    sources, stored, tied_copy = _checked(folder, config)
    dtype = dtype or _config_dtype(config, folder) or stored
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device)
    places = tensors_by_name(model)
    for path in sorted({source.path for source in sources.values()}):
        with _opened(path) as file:
            for name, source in sources.items():
                if source.path == path:
                    places[name].copy_(file.get_tensor(source.name))
    if tied_copy is not None:
        with _opened(tied_copy.path) as file:
            if not torch.equal(file.get_tensor(tied_copy.name).to(model.device, model.dtype), model.embed.weight):
                raise CheckpointError(
                    f"{folder}: lm_head.weight differs from the embedding, but config.json says tie_word_embeddings; "
                    "set it to false there, or remove lm_head.weight"
                )
    _warn_if_not_finite(places)
    return model


class _Source(NamedTuple):
    """Where a tensor is stored, and under which name."""

    path: Path
    name: str


def _checked(folder: Path, config: LlamaConfig) -> tuple[dict[str, _Source], torch.dtype, _Source | None]:
    """Where each tensor of a checkpoint whose headers fit `config` is, the dtype of its embedding, and where a copy of
    a tied embedding is, if there is one. Raises CheckpointError.

    As transformers does, it takes a base model's names, which lack "model.", and a tied embedding under either name.
    """
    expected = shapes_by_name(config)
    found: dict[str, _Source] = {}
    problems: list[str] = []
    stored: dict[str, torch.dtype] = {}
    shapes: dict[str, list[int]] = {}
    for path in _shards(folder):
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer that old checkpoints saved; it follows from the config
                name = key if key in expected or f"model.{key}" not in expected else f"model.{key}"
                meta = file.get_slice(key)
                if meta.get_dtype() in _DTYPES:
                    stored[name] = _DTYPES[meta.get_dtype()]
                elif not _OF_A_DRAFT.fullmatch(key):  # whose tables of ids are integers
                    problems.append(f"stored as {meta.get_dtype()}: {name} (quantised checkpoints are not supported)")
                if name in found and (other := _difference(found[name], file.get_tensor(key))):
                    both = [f"{source.name} in {source.path.name}" for source in (found[name], _Source(path, key))]
                    problems.append(f"twice, {other}: {name} ({' and '.join(both)})")
                shapes[name] = meta.get_shape()
                found.setdefault(name, _Source(path, key))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tied_copy = found.pop(head, None) if config.tie_word_embeddings else None
    if tied_copy is not None and embedding not in found:
        found[embedding], tied_copy = tied_copy, None
        stored[embedding], shapes[embedding] = stored.get(head, torch.float32), shapes[head]
    problems += [
        f"shape: {name} is {shapes[name]}, config.json says {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if shapes[name] != expected[name]
    ]
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems += [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        if hint := _hint(missing, unexpected):
            shown.append(hint)
        raise CheckpointError(f"{folder}: the weights do not fit config.json: " + "; ".join(shown))
    return found, stored[next(iter(expected))], tied_copy


def _hint(missing: list[str], unexpected: list[str]) -> str | None:
    """What weights are that do not fit, with the way out, where their names tell it."""
    if any(map(_OF_A_DRAFT.fullmatch, unexpected)):
        return DRAFT
    if any(name.startswith(("score.", "classifier.", "qa_outputs.")) for name in unexpected):
        return OTHER_HEAD
    if missing == ["lm_head.weight"]:
        return (
            "a base model without an output matrix; give the one that predicts tokens, or say tie_word_embeddings in "
            "config.json if its embedding serves as one"
        )
    return None


def _difference(source: _Source, tensor: Tensor) -> str | None:
    """In what another tensor of the same name differs from the one found first; None if it has the same bits."""
    with _opened(source.path) as file:
        other = file.get_tensor(source.name)
    if other.dtype != tensor.dtype:
        return "as " + " and ".join(str(t.dtype).removeprefix("torch.") for t in (other, tensor))
    if other.shape != tensor.shape:
        return f"in shapes {list(other.shape)} and {list(tensor.shape)}"
    same = torch.equal(other.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    return None if same else "with other values"


def save(model: Llama, folder: Path) -> None:
    """Write `config.json`, `generation_config.json` and safetensors of at most 5 GB each into `folder`.

    There is no generation_config.json where none was loaded and nothing is set; one that stands there is removed.
    Everything is written beside its place and renamed when all of it is there; weight files that an earlier save left
    in another layout are removed. If writing fails (OSError) or is killed, the old checkpoint is whole. Between the
    first rename and the last the folder has no config.json, and does not load, unless one rename is all it takes.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors_by_name(model).items():
        if size and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    stem = "model" if len(shards) == 1 else f"model-{{:05}}-of-{len(shards):05}"
    files = {f"{stem.format(i)}.safetensors": shard for i, shard in enumerate(shards, start=1)}
    documents: dict[str, dict[str, Any]] = {}
    generation, ids = model.generation_config, ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = generation.to_dict()
    if settings and generation.other is None:  # transformers takes them from config.json only where there is no file
        settings = {
            key: id for key, id in model.config.to_dict().items() if key in ids and id not in (None, [])
        } | settings
    if settings or generation.other is not None:
        documents[GENERATION_CONFIG] = settings
    if len(files) > 1:
        weight_map = {name: file for file, shard in files.items() for name in shard}
        documents["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    documents["config.json"] = model.config.to_dict() | {"dtype": str(model.dtype).removeprefix("torch.")}

    partial = {name: folder / f".{name}.partial" for name in (*files, *documents)}
    make_folder(folder, (*partial, GENERATION_CONFIG))
    for temporary in partial.values():
        temporary.unlink(missing_ok=True)  # what stands there could be a link to anywhere
    written = False
    try:
        for file, shard in files.items():
            # Cloned because parts of a fused parameter share storage, which the format refuses; one shard at a time.
            try:
                save_file({name: t.clone() for name, t in shard.items()}, partial[file], metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder / file}: cannot be written ({error}); what was there is whole") from None
        for file, document in documents.items():
            partial[file].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        written = True
    finally:
        for temporary in () if written else partial.values():
            temporary.unlink(missing_ok=True)
    config = folder / "config.json"
    stay = all(_content(folder / name) == _content(partial.get(name)) for name in (config.name, GENERATION_CONFIG))
    if len(files) > 1 or not stay:
        config.unlink(missing_ok=True)  # else shards of two models, or one's weights and another's config, would load
    for file in partial:
        if file != config.name:
            os.replace(partial[file], folder / file)
    if GENERATION_CONFIG not in partial:
        (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors*"):
        if path.name not in partial and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name):
            path.unlink()
    os.replace(partial[config.name], config)


def _content(path: Path | None) -> bytes | None:
    return path.read_bytes() if path is not None and path.is_file() else None


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CheckpointError if there are none, or the index is wrong."""
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
                "Convert them: transformers' LlamaForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for name in weight_map.values():
        # Plain names only. A file may itself be a link, as the hub's cache makes them.
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
def _opened(path: Path) -> Iterator[safe_open]:
    """An open safetensors file; its errors name it. Raises CheckpointError, or FolderError from `regular`."""
    file = regular(path)
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as begun:
            start = begun.read(256)
        check_not_in_place(path, start)
        header_bytes = int.from_bytes(start[:8], "little")
        if header_bytes > MAX_JSON_BYTES:  # as large as it is, the parsed one would be far larger
            what = f"a header of {header_bytes:,} bytes" if start[8:9] == b"{" else f"it begins {start[:16]!r}"
            raise CheckpointError(f"{path}: damaged or not a safetensors file ({what})")
        if size < 8 + header_bytes:
            there = f"it ends after {size:,} bytes, amid its header" if size else "it is empty"
            raise CheckpointError(
                f"{path}: damaged or cut short, as by an interrupted download ({there}); fetch it again"
            )
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError, MemoryError) as error:  # MemoryError: too large to be mapped
        whole, twice = _announced(file)
        if twice is not None:
            raise CheckpointError(f"{path}: damaged: its header has {twice} twice; fetch it again") from None
        if whole > size:
            raise CheckpointError(
                f"{path}: damaged or cut short, as by an interrupted download ({size:,} of {whole:,} bytes); fetch it "
                "again"
            ) from None
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None


def _announced(file: str) -> tuple[int, str | None]:
    """How long a safetensors file is by its own header, 0 if that cannot be read; and a name that it has twice."""
    try:
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(header_bytes, MAX_JSON_BYTES)), object_pairs_hook=list)
        names = Counter(name for name, _ in header)
        ends = [dict(entry)["data_offsets"][1] for name, entry in header if name != "__metadata__"]
        end = max(map(whole_number, itertools.repeat("an offset"), ends), default=0)
        return 8 + header_bytes + end, next((name for name in names if names[name] > 1), None)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return 0, None


def _config_dtype(config: LlamaConfig, folder: Path) -> torch.dtype | None:
    if config.dtype is None:
        return None
    dtype = {str(d).removeprefix("torch."): d for d in _DTYPES.values()}.get(config.dtype)
    if dtype is None:
        raise ConfigError(f"{folder / 'config.json'}: dtype {config.dtype!r} is not supported; pass another")
    return dtype


def _warn_if_not_finite(tensors: Mapping[str, Tensor]) -> None:
    # aminmax carries NaN through, needs no temporary, and the answers cross to the host together.
    extremes = [torch.stack(t.aminmax()).isfinite().all() for t in tensors.values()]
    finite: Iterable[bool] = torch.stack(extremes).tolist()
    if bad := [name for name, ok in zip(tensors, finite, strict=True) if not ok]:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        warnings.warn(f"weights with NaN or infinity: {shown}", stacklevel=3)
