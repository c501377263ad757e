"""A real server as a user starts it: the launcher, an engine and a router in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Server:
    """`textmill launch` with the default model on a free port of the loopback interface."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "textmill", "launch", "--hostname", "127.0.0.1", "--port", str(self.port)]
        started = time.perf_counter()
        with log.open("wb") as output:
            self.process = subprocess.Popen([*command, *flags], stdout=output, stderr=subprocess.STDOUT)
        self._wait_ready()
        self.startup_s = time.perf_counter() - started

    def _wait_ready(self, limit_s: float = 90.0) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            if self.status("/health") == 200:
                return
            time.sleep(0.02)
        raise TimeoutError(self.log.read_text(errors="replace"))

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (urllib.error.URLError, OSError):
            return 0

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def post(self, path: str, body: object, timeout: float = 60) -> tuple[int, dict[str, str], object]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, dict(response.headers), parsed(response.read())
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), parsed(error.read())

    def metric(self, name: str) -> float:
        """The value of one line of /metrics; `name` with its labels as they stand there."""
        for line in self.get("/metrics").splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def children(self, command: str = "") -> list[int]:
        """Process ids of the launcher's children, or of those that run one textmill command."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                    arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                if int(parent) == self.process.pid and (not command or command in arguments):
                    found.append(int(entry.name))
        return found

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGKILL)
            raise


def parsed(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def launch(tmp_path: Path, default_model: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with extra flags and stops them after the test."""
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(Server(tmp_path / f"server-{len(servers)}.log", *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[Server]:
    """One server for a whole module's tests, with limits small enough to reach."""
    running = Server(tmp_path_factory.mktemp("server") / "log", "--max-concurrent-requests", "32", "--max-best-of", "4")
    yield running
    assert running.stop() == 0
