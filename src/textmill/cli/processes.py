"""The mechanics of supervision: child processes, their status lines and exits, and signals, as one stream of events."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from textmill.cli.status import Status, StatusLines

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Child:
    """One running child process with the pipe through which it says how it is doing."""

    def __init__(self, name: str, command: Sequence[str], fds: Sequence[int] = ()) -> None:
        self.name = name
        self.ready = False
        self.reason = ""
        self.last_beat = time.monotonic()
        self.stalled_since: float | None = None
        self.kill_at: float | None = None
        self.started = time.monotonic()
        self.status_fd, write = os.pipe()
        try:
            # Its own process group: Ctrl-C reaches the launcher alone, which passes it on in order.
            self.process = subprocess.Popen(
                [*command, "--status-fd", str(write), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(*fds, write),
                process_group=0,
            )
        finally:
            os.close(write)
        self.pidfd = os.pidfd_open(self.process.pid)
        self._lines = StatusLines()

    def read(self) -> tuple[list[Status], bool]:
        """The status lines that have come, and whether more may come."""
        data = os.read(self.status_fd, 1 << 16)
        return self._lines.feed(data), bool(data)

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it now and wait; a child in its own group may have left others behind, which go with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def how_it_ended(self) -> str:
        """`exited with code 3` or `was killed by SIGKILL`."""
        code = self.process.wait()
        if code >= 0:
            return f"exited with code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.status_fd)


@dataclass(frozen=True, slots=True)
class Signalled:
    number: int


@dataclass(frozen=True, slots=True)
class Said:
    child: Child
    status: Status


@dataclass(frozen=True, slots=True)
class Exited:
    child: Child


Event = Signalled | Said | Exited


@dataclass
class Watch:
    """Waits for children and signals. Signals are taken over between `open` and `close`."""

    children: list[Child] = field(default_factory=list)

    def open(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        for end in (self._signals, self._wakeup):
            end.setblocking(False)
        self._selector.register(self._signals, selectors.EVENT_READ)
        self._old_wakeup = signal.set_wakeup_fd(self._wakeup.fileno())
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}

    def close(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        for thing in (self._selector, self._signals, self._wakeup):
            thing.close()

    def add(self, child: Child) -> None:
        self.children.append(child)
        self._selector.register(child.status_fd, selectors.EVENT_READ, child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)

    def wait(self, timeout: float | None) -> Iterator[Event]:
        """What has happened, at most `timeout` seconds from now. A child's last words come before its exit."""
        exits: list[Child] = []
        for key, _ in self._selector.select(timeout):
            child = key.data
            if child is None:
                yield from (Signalled(number) for number in self._signals.recv(64) if number in SIGNALS)
            elif key.fd == child.pidfd:
                exits.append(child)
            else:
                yield from self._read(child)
        for child in exits:
            yield from self._finish(child)

    def _read(self, child: Child) -> Iterator[Event]:
        statuses, more = child.read()
        if not more:
            self._selector.unregister(child.status_fd)
        yield from (Said(child, status) for status in statuses)

    def _finish(self, child: Child) -> Iterator[Event]:
        self._selector.unregister(child.pidfd)
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(child.status_fd, False)  # a grandchild may hold the other end
            while child.status_fd in self._selector.get_map():
                yield from self._read(child)
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.status_fd)
        child.kill()
        self.children.remove(child)
        yield Exited(child)
        child.close()
