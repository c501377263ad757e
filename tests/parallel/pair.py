"""Two ranks for tests: this process and one more, which live as long as the tests and compute model after model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from textmill.models.registry import build_model
from textmill.parallel.processes import Ranks
from textmill.runner.orders import Channel, Failure, Plan
from textmill.runner.ranks import LeadingExecutor
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.view import View

SCRIPT = Path(__file__).with_name("second_rank.py")


class Pair:
    """`executor` gives the leading one of a checkpoint's model on two ranks; `finish` ends its use."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, str(SCRIPT), str(theirs.fileno()), str(folder / "meeting")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self.channel = Channel(ours)
        self.group = Ranks(0, 2)
        self.group.join(folder / "meeting")
        self._busy = False

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()
        self.group.close()

    def executor(self, path: Path, sizes: tuple[int, int, int, int], *, dequantize: bool = False) -> LeadingExecutor:
        """`sizes`: slots, total tokens, block size and blocks."""
        self.finish()
        checkpoint = open_checkpoint(path, dequantize=dequantize)
        model = build_model(checkpoint.config, View(checkpoint, group=self.group))
        job = json.dumps({"path": str(path), "sizes": sizes, "dequantize": dequantize})
        assert self.process.stdin is not None
        self.process.stdin.write(job.encode() + b"\n")
        self.process.stdin.flush()
        assert self.channel.receive() == Plan(0, 0)
        self._busy = True
        return LeadingExecutor(model, *sizes, [self.channel])

    def finish(self) -> list[str]:
        """Tensors that the second rank never read."""
        if not self._busy:
            return []
        self._busy = False
        self.channel.send(Plan(0, 0))
        words = self.channel.receive()
        assert isinstance(words, Failure)
        return words.reason.splitlines()
