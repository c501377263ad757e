"""A stand-in for the engine or a router: a real process that journals what it does and misbehaves on demand.

Usage: stub_child.py ROLE JOURNAL MODE, then the launcher's arguments. MODE is `good` or a comma list of:
die=N (exit with N before ready), refuse (report an error, exit 1), crash (ready, then SIGKILL itself),
silent (ready, no beats), stuck (beats that say "working, no step"), deaf (ignores SIGTERM),
child (starts a process), slow (loads for a minute).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from textmill.cli.child import die_with, read_handed
from textmill.cli.status import StatusPipe

role, journal, modes, *rest = sys.argv[1:]
given = dict(zip(rest[::2], rest[1::2], strict=True))
mode = dict(part.partition("=")[::2] for part in modes.split(","))


def note(what: str) -> None:
    with open(journal, "a", encoding="ascii") as file:
        file.write(f"{role}{given.get('--index', '')} {os.getpid()} {what} {time.monotonic():.3f}\n")


def on_term(number: int, frame: object) -> None:
    note("term")
    if "deaf" not in mode:
        os._exit(0)


def serve() -> None:
    """Take the place of the real thing: the engine binds its socket, a router listens."""
    if role == "engine":
        endpoint = socket.socket(socket.AF_UNIX)
        endpoint.bind(given["--socket"])
    else:
        assert Path(given["--engine-socket"]).parent.is_dir()
        os.fstat(int(given["--permits-fd"]))
        endpoint = socket.socket(fileno=int(given["--listen-fd"]))
    endpoint.listen()
    keep.append(endpoint)


keep: list[socket.socket] = []
die_with(int(given["--parent"]), f"stub-{role}")
handed = read_handed(Path(given["--settings"]))
assert handed.source["model_id"] == "stub"
status = StatusPipe(int(given["--status-fd"]))
note("start")
if "slow" in mode:
    time.sleep(60)
signal.signal(signal.SIGTERM, on_term)
if "die" in mode:
    os._exit(int(mode["die"]))
if "refuse" in mode:
    status.fail("the weights are made of stone")
    os._exit(1)
if "child" in mode:
    note(f"child={subprocess.Popen(['sleep', '300']).pid}")
serve()
status.report("load", "loaded", table=[["weights", "98 MiB"], ["tokens that fit", "4,096"]])
status.ready("ready")
note("ready")
if "crash" in mode:
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    if role == "engine" and "silent" not in mode:
        status.beat(step=1, age=99.0 if "stuck" in mode else 0.0, working="stuck" in mode)
    time.sleep(0.1)
