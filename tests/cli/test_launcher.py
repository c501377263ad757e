"""The launcher over real child processes: order of ending, restarts, failures, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

STUB = Path(__file__).with_name("stub_launch.py")


class Server:
    """A launcher with stand-in children, its output in a file, its children's journal, its private runtime folder."""

    def __init__(self, folder: Path, engine: str = "good", router: str = "good", *flags: str) -> None:
        self.journal = folder / "journal"
        self.output = folder / "output"
        self.runtime = folder / "runtime"
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.port = free_port()
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(STUB), str(self.journal), engine, router, "--port", str(self.port), *flags],
                stdout=output,
                stderr=output,
                env=os.environ | {"XDG_RUNTIME_DIR": str(self.runtime)},
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text()

    def entries(self) -> list[list[str]]:
        """The journal: [role, pid, what, time] in the order written."""
        return [line.split() for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def pids(self, role: str, what: str = "ready") -> list[int]:
        return [int(pid) for who, pid, did, _ in self.entries() if who == role and did == what]

    def wait_for(self, condition: Callable[[], object], seconds: float = 15.0) -> None:
        wait_for(condition, seconds, self.text)

    def wait_ready(self) -> None:
        self.wait_for(lambda: "Ready in" in self.text())

    def end(self, seconds: float = 15.0) -> int:
        return self.process.wait(seconds)

    def assert_nothing_left(self) -> None:
        """No process, no port, no folder."""
        pids = {int(entry[1]) for entry in self.entries()}
        pids |= {int(entry[2].removeprefix("child=")) for entry in self.entries() if entry[2].startswith("child=")}
        wait_for(lambda: not any(map(alive, pids)), 5.0, lambda: f"alive: {[p for p in pids if alive(p)]}")
        wait_for(lambda: not list(self.runtime.iterdir()), 5.0, lambda: f"left: {list(self.runtime.iterdir())}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", self.port))
            probe.listen()


def wait_for(condition: Callable[[], object], seconds: float, describe: Callable[[], str]) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, describe()
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie that its parent has not yet collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def begin(*arguments: str) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, *arguments))
        return servers[-1]

    yield begin
    for server in servers:
        server.process.kill()
        server.process.wait()


def test_sigterm_ends_routers_then_engine_with_code_0(start: Start) -> None:
    server = start("good", "good", "--router-workers", "2")
    server.wait_ready()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    terms = [entry[0] for entry in server.entries() if entry[2] == "term"]
    assert sorted(terms[:2]) == ["router0", "router1"]
    assert terms[2:] == ["engine"]
    server.assert_nothing_left()


def test_sigint_ends_with_code_130(start: Start) -> None:
    server = start()
    server.wait_ready()
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 130
    server.assert_nothing_left()


def test_sigterm_while_loading_ends_at_once(start: Start) -> None:
    server = start("slow", "slow")
    server.wait_for(lambda: server.pids("engine", "start"))
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    server.assert_nothing_left()


def test_second_signal_does_not_wait(start: Start) -> None:
    server = start("deaf", "deaf")
    server.wait_ready()
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.pids("router0", "term"))
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: len(server.pids("router0", "term")) == 2)  # its chance for last words
    server.process.send_signal(signal.SIGTERM)
    assert server.end(3.0) == 128 + signal.SIGTERM
    server.assert_nothing_left()


def test_children_that_ignore_sigterm_are_killed_in_time(start: Start) -> None:
    server = start("good", "deaf", "--graceful-termination-timeout", "0")
    server.wait_ready()
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert 5.0 < time.monotonic() - began < 9.0
    assert "router 0 did not end in time and is killed" in server.text()
    server.assert_nothing_left()


def test_killed_engine_is_started_again_on_the_same_socket(start: Start) -> None:
    server = start()
    server.wait_ready()
    (first,) = server.pids("engine")
    os.kill(first, signal.SIGKILL)
    server.wait_for(lambda: "the engine serves again" in server.text())
    assert "the engine was killed by SIGKILL; starting it again" in server.text()
    assert len(server.pids("engine")) == 2
    assert len(server.pids("router0")) == 1
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    server.assert_nothing_left()


def test_without_restarts_a_killed_engine_ends_the_server(start: Start) -> None:
    server = start("good", "good", "--engine-restarts", "0")
    server.wait_ready()
    os.kill(server.pids("engine")[0], signal.SIGKILL)
    assert server.end() == 1
    assert "failure: Shard failed: the engine was killed by SIGKILL" in server.text()
    server.assert_nothing_left()


def test_an_engine_that_keeps_dying_is_given_up(start: Start) -> None:
    server = start("crash", "good", "--engine-restarts", "2")
    assert server.end(30.0) == 1
    assert len(server.pids("engine")) == 3
    assert "failure: Shard failed: the engine was killed by SIGKILL" in server.text()
    server.assert_nothing_left()


@pytest.mark.parametrize("mode", ["silent", "stuck"])
def test_a_hung_engine_is_killed_and_replaced(start: Start, mode: str) -> None:
    server = start(mode, "good", "--engine-hang-timeout", "1.5", "--engine-restarts", "1")
    server.wait_for(lambda: "starting it again" in server.text())
    assert "the engine hung for" in server.text()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    server.assert_nothing_left()


def test_a_stopped_engine_counts_as_hung(start: Start) -> None:
    server = start("good", "good", "--engine-hang-timeout", "1.5", "--engine-restarts", "0")
    server.wait_ready()
    os.kill(server.pids("engine")[0], signal.SIGSTOP)
    assert server.end() == 1
    assert "failure: Shard failed: the engine hung for" in server.text()
    server.assert_nothing_left()


def test_a_dead_router_ends_the_server(start: Start) -> None:
    server = start()
    server.wait_ready()
    os.kill(server.pids("router0")[0], signal.SIGKILL)
    assert server.end() == 1
    assert "failure: Webserver failed: router 0 was killed by SIGKILL" in server.text()
    server.assert_nothing_left()


@pytest.mark.parametrize(
    ("engine", "router", "reason"),
    [
        ("refuse", "good", "Shard cannot start: the weights are made of stone"),
        ("die=7", "good", "Shard cannot start: the engine exited with code 7"),
        ("good", "refuse", "Webserver cannot start: the weights are made of stone"),
        ("good", "die=7", "Webserver cannot start: router 0 exited with code 7"),
    ],
)
def test_a_child_that_cannot_start_gives_the_reason(start: Start, engine: str, router: str, reason: str) -> None:
    server = start(engine, router)
    assert server.end() == 1
    assert server.text().splitlines()[-1] == f"failure: {reason}"
    assert "Traceback" not in server.text()
    server.assert_nothing_left()


def test_a_killed_launcher_leaves_nothing(start: Start) -> None:
    server = start("good", "deaf", "--router-workers", "2")
    server.wait_ready()
    (folder,) = server.runtime.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "settings.json").stat().st_mode & 0o777 == 0o600
    server.process.kill()
    server.end()
    server.assert_nothing_left()


def test_what_an_engine_started_dies_with_it(start: Start) -> None:
    server = start("child")
    server.wait_ready()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    server.assert_nothing_left()


def test_progress_and_tables_are_shown(start: Start) -> None:
    server = start()
    server.wait_ready()
    assert "engine: loaded phase=load seconds=" in server.text()
    assert "    weights          98 MiB\n" in server.text()
    assert "    tokens that fit  4,096\n" in server.text()
    assert f": stub at http://0.0.0.0:{server.port}" in server.text()


def test_a_port_that_a_loading_server_holds_is_in_use(start: Start) -> None:
    """The other server has bound its port and does not listen yet; that must be enough."""
    other = socket.socket()
    other.bind(("0.0.0.0", 0))
    taken = other.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "textmill", "launch", "--port", str(taken)], capture_output=True, text=True, timeout=30
    )
    other.close()
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"Error: Webserver cannot start: port {taken} is in use"]
