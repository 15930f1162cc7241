"""Resolve a path or a Hugging Face repository name to a local folder."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, snapshot_download

from .config_rules import read_json
from .files import what_it_is

INDEX = "model.safetensors.index.json"
# Of the weights, only the files that are read: a repository may also hold them in other precisions and formats.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", INDEX)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
SECONDS_TO_ANSWER = 10.0  # the hub's time to answer, before only its cache is used
# Failed connections. Which HTTP library raises them depends on the version of huggingface_hub; its own errors derive
# from the library's.
_HTTP_ERROR: Any = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
_UNREACHABLE = (_HTTP_ERROR, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    path_or_repo: str | Path, files: Sequence[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """Return a model's local folder: `path_or_repo` itself if it is one, else the hub's, downloaded into its cache.

    files: patterns of the files to download; with an index of weights, also the shards that it names. revision, token:
    passed to the hub. HF_HUB_OFFLINE=1 uses only the cache.
    Raises ValueError if there is neither such a folder nor such a repository, or if it holds none of the files.
    """
    if not str(path_or_repo):
        raise ValueError("no model named; give a folder or a hub repository name, owner/model")
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    if folder.exists():
        gguf = "; GGUF is not read" if folder.suffix == ".gguf" else ""
        raise ValueError(f"{name}: is a file; give the folder that holds config.json and the safetensors{gguf}")
    if not _REPO_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name}: no such folder (and not a hub repository name, owner/model)")
    reason, names = None, list[str]()
    try:
        # Asked once, with a timeout: a download retries again and again, and waits as long as a connection stands.
        found = HfApi().model_info(name, revision=revision, token=token, timeout=SECONDS_TO_ANSWER)
        names = [file.rfilename for file in found.siblings or ()]
    except errors.GatedRepoError:
        raise ValueError(f"{name}: access is restricted; accept its terms on the hub and pass a token") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{name}: neither a local folder nor a repository on the hub, unless it is private") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: no revision {revision!r} on the hub") from None
    except _UNREACHABLE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__

    wanted = ["config.json"] if "config.json" in files else files
    if names and not any(fnmatch.fnmatch(file, pattern) for file in names for pattern in wanted):
        raise ValueError(f"{name}: holds no {' or '.join(wanted[:2])}{what_it_is(names)}")

    def download(patterns: Sequence[str]) -> Path:
        local = reason is not None
        return Path(
            snapshot_download(name, revision=revision, token=token, allow_patterns=[*patterns], local_files_only=local)
        )

    try:
        folder = download(files)
        if INDEX in files and (folder / INDEX).exists() and not (folder / "model.safetensors").exists():
            shards = read_json(folder / INDEX).get("weight_map")
            if isinstance(shards, dict):  # else loading reports what is wrong with it
                download([glob.escape(shard) for shard in sorted({*map(str, shards.values())})])
        return folder
    except _UNREACHABLE as error:
        reason = reason or str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name}: no such local folder, and it could not be downloaded from the hub ({reason})"
        ) from None
