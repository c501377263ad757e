"""A private folder for one server's socket and settings that is gone when the launcher is, however it dies."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType

PREFIX = "textmill-"


class RuntimeDirectory:
    """A folder only we may enter (0700), under $XDG_RUNTIME_DIR if there is one.

    A forked janitor waits on a pipe whose other end only this process holds: if we are killed, the janitor
    removes the folder. `base` is for tests.
    """

    def __init__(self, base: Path | None = None) -> None:
        self.base = base or default_base()
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=self.base))
        self._janitor, self._lifeline = start_janitor(self.path)

    def __enter__(self) -> RuntimeDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lifeline)
        os.waitpid(self._janitor, 0)

    def write_private(self, name: str, text: str) -> Path:
        """A file that only we may read (settings hold keys)."""
        path = self.path / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        return path


def default_base() -> Path:
    """Where the folder goes: the login session's own folder if it is usable, else the system's temporary one."""
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = session and os.path.isdir(session) and os.access(session, os.W_OK | os.X_OK)
    return Path(session if usable else tempfile.gettempdir())


def start_janitor(path: Path) -> tuple[int, int]:
    """Fork the process that removes `path` once we are gone; returns its id and the pipe end that keeps it waiting."""
    read, write = os.pipe()
    janitor = os.fork()
    if janitor == 0:
        wait_and_remove(read, path)
    os.close(read)
    return janitor, write


def wait_and_remove(lifeline: int, path: Path) -> None:
    """The janitor's whole life; never returns. It leaves our session so that a signal to the group spares it."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(lifeline, 3)
        for standard in (0, 1, 2):  # whoever reads our output must see its end when the server is gone
            os.dup2(null, standard)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))  # the write end and the server's socket among them
        os.read(3, 1)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os._exit(0)
