"""From a path or a Hugging Face repository name to a local folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import errors, snapshot_download

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    path_or_repo: str | Path, files: Sequence[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """The local folder of a model: `path_or_repo` itself if it is one, else the hub's, downloaded into its cache.

    files: which to download. revision, token: as for the hub. HF_HUB_OFFLINE=1 uses the cache alone.
    Raises ValueError if there is neither such a folder nor such a repository.
    """
    if not str(path_or_repo):
        raise ValueError("no model named; give a folder or a hub repository name, owner/model")
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    if folder.exists():
        raise ValueError(f"{name}: is a file; give the folder that holds config.json and the safetensors")
    if not _REPO_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name}: no such folder (and not a hub repository name, owner/model)")
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise ValueError(f"{name}: access is restricted; accept its terms on the hub and pass a token") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{name}: neither a folder here nor a repository on the hub (or a private one)") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: no revision {revision!r} on the hub") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: no such folder here, and the hub gave no copy ({reason})") from None
