"""What is measured side by side, by kind: servers asked over HTTP, and an engine without one in its own process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, Self

from load import Load, arrival_figures, figures, run, run_arrival
from servers import PEERS, SERVERS, Running, Server, Started, install_llama

OPENVINO = "openvino-genai"
NAMES = (*SERVERS, OPENVINO)


class Subject(Protocol):
    """One process (tree), ready to answer; a context manager that ends it."""

    startup_s: float

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def measure(self, load: Load, arrival: bool = False) -> dict[str, float]:
        """The figures of a load; with `arrival`, of what its streams feel when a long prompt arrives."""

    def peak_memory_mib(self) -> float: ...


class OverHttp(Running):
    """A server, asked through its /v1/completions."""

    def __init__(self, server: Server, model: Path, port: int, threads: int, log: Path) -> None:
        super().__init__(server, model, port, threads, log)
        self._server, self._port = server, port

    def measure(self, load: Load, arrival: bool = False) -> dict[str, float]:
        extra = self._server.extra | (self._server.prefix_extra if load.shared_prefix_tokens else {})
        if arrival:
            return arrival_figures(*asyncio.run(run_arrival(self._port, load, extra)))
        return figures(load, *asyncio.run(run(self._port, load, extra)))


class InProcess(Started):
    """openvino_peer.py, told what to do line by line."""

    def __init__(self, model: Path, threads: int, log: Path) -> None:
        script = Path(__file__).with_name("openvino_peer.py")
        super().__init__([openvino_python(), script, "--model", model, "--threads", str(threads)], log, pipes=True)
        self._answer()  # the first line says that it is ready
        self.startup_s = time.perf_counter() - self.started

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.__exit__()
            raise RuntimeError(f"openvino_peer.py ended early; see {self._log.name}")
        found: dict[str, float] = json.loads(line)
        return found

    def measure(self, load: Load, arrival: bool = False) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"load": asdict(load), "arrival": arrival}) + "\n")
        self.process.stdin.flush()
        return self._answer()


def openvino_python() -> Path:
    return PEERS / OPENVINO / "bin/python"


def install_openvino() -> None:
    """Makes its virtual environment once in the peers' folder (about 300 MB)."""
    python = openvino_python()
    if any(python.parents[1].glob("lib/python*/site-packages/openvino_genai")):
        return
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "openvino-genai==2026.4.*"], check=True)


def install(names: list[str], threads: int) -> None:
    """Installs, once, what the named subjects need."""
    if any(name.startswith("llama") for name in names):
        install_llama(threads)
    if OPENVINO in names:
        install_openvino()


def start(name: str, model: Path, port: int, threads: int, log: Path) -> Subject:
    if name == OPENVINO:
        return InProcess(model, threads, log)
    return OverHttp(SERVERS[name], model, port, threads, log)
