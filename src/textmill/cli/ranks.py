"""The other ranks of an engine: processes that the engine starts, that die with it, and whose death it reports."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textmill.runner.orders import Channel

log = logging.getLogger(__name__)

TEXTMILL = (sys.executable, "-P", "-m", "textmill")
# The engine's own words to its routers come first; it ends by itself as soon as it computes with a rank that is gone.
LAST_WORDS = 2.0


class RankProcesses:
    """Ranks 1 .. size - 1 of the engine in this process, which is rank 0; they meet beside its `socket`.

    To be made on the main thread: the kernel kills them when the thread that started them is gone.
    """

    def __init__(self, settings: Path, socket: Path, size: int) -> None:
        from textmill.runner.orders import Channel

        self.meeting = socket.with_name(f"ranks-{os.getpid()}")
        self.channels: list[Channel] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.reason = ""  # which rank ended, and how
        for rank in range(1, size):
            command = [*TEXTMILL, "serve-shard", "--settings", str(settings), "--meeting", str(self.meeting)]
            self._start([*command, "--rank", str(rank), "--ranks", str(size)], Channel)

    def _start(self, command: list[str], channel: type[Channel]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = ["--leader-fd", str(theirs.fileno()), "--parent", str(os.getpid())]
            process = subprocess.Popen([*command, *arguments], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self.channels.append(channel(ours))
        self.processes.append(process)

    def watch(self, on_end: Callable[[str], None]) -> None:
        """From now on, tell `on_end` (on a thread of its own) how the first rank that ends came to its end."""
        threading.Thread(target=self._watch, args=(on_end,), name="ranks", daemon=True).start()

    def _watch(self, on_end: Callable[[str], None]) -> None:
        places = {os.pidfd_open(process.pid): rank for rank, process in enumerate(self.processes, 1)}
        ended, _, _ = select.select(list(places), [], [])
        rank = places[ended[0]]
        process = self.processes[rank - 1]
        self.reason = f"rank {rank} (process {process.pid}) {how_it_ended(process.wait())}"
        on_end(self.reason)

    def named(self, error: str, seconds: float = 0.5) -> str:
        """What really happened, if an error here may come of a rank that ended just now."""
        deadline = time.monotonic() + seconds
        while not self.reason and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.reason or error


def how_it_ended(code: int) -> str:
    return f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
