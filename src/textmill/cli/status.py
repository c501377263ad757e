"""Status lines between a child process and the launcher: one JSON object per line through a pipe."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

READY = "ready"
BEAT = "beat"


@dataclass(frozen=True, slots=True)
class Status:
    """One line: a phase with a message for people, or the reason why the child gives up (`error`)."""

    phase: str
    message: str = ""
    error: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


class StatusPipe:
    """The child's end. Once the launcher is gone, lines go nowhere. `fd` None: nobody listens."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._since = time.monotonic()

    def report(self, phase: str, message: str, **fields: Any) -> None:
        """Say what was just done; `seconds` is the time since the last report unless given."""
        now = time.monotonic()
        fields.setdefault("seconds", round(now - self._since, 3))
        self._since = now
        self._write({"phase": phase, "message": message, **fields})

    def ready(self, message: str, **fields: Any) -> None:
        self.report(READY, message, **fields)

    def fail(self, reason: str) -> None:
        """Say in one line why this process is about to exit non-zero."""
        self._write({"phase": "error", "error": reason})

    def beat(self, step: int, age: float, working: bool) -> None:
        """The sign of life: steps finished, seconds since the last one ended, and whether there is work."""
        self._write({"phase": BEAT, "step": step, "age": age, "working": working})

    def _write(self, values: dict[str, Any]) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, json.dumps(values, default=str).encode() + b"\n")
        except OSError:  # the launcher is gone; we are about to be as well
            self._fd = None


class StatusLines:
    """The launcher's end: collects bytes, gives whole lines; anything that is not a status is dropped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Status]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [status for status in map(parse, lines) if status is not None]


def parse(line: bytes) -> Status | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("phase"), str):
        return None
    known = {name: str(values.pop(name, "")) for name in ("phase", "message", "error")}
    return Status(**known, fields=values)
