"""What every child process does first: die with the launcher, name itself, log like the launcher, read its settings."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from textmill.config import Settings
from textmill.observe import logs

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


@dataclass(frozen=True, slots=True)
class Handed:
    """What the launcher hands to a child: the settings and the resolved model (fields of `ModelSource`)."""

    settings: Settings
    source: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"settings": json.loads(self.settings.to_json()), "source": self.source}, default=str)


def read_handed(path: Path) -> Handed:
    values = json.loads(path.read_text(encoding="utf-8"))
    return Handed(Settings.from_json(json.dumps(values["settings"])), values["source"])


def adopt(name: str, settings: Settings) -> None:
    """Start of a child's life after its settings are known: its logs, and stacks on SIGUSR1 for a hang."""
    logs.configure(
        name, settings.log_level, json_output=settings.json_output, colorize=settings.log_colorize, stream=sys.stdout
    )
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def die_with(parent: int, name: str) -> None:
    """Have the kernel kill us when the launcher (process `parent`; 0: nobody) dies, in whatever way."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    if parent == 0:
        return
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def leave(code: int) -> NoReturn:
    """End now, all output written: native threads and modules are not taken apart in an order of chance."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
