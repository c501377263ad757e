"""Permits bound how many sequences are in the house: within one router, or over all routers that share a pipe."""

from __future__ import annotations

import os
from typing import Protocol


class Permits(Protocol):
    def try_acquire(self, count: int) -> bool:
        """Take `count` permits, all or none, without waiting."""
        ...

    def release(self, count: int) -> None: ...


class LocalPermits:
    """A plain counter, for a single router."""

    def __init__(self, total: int) -> None:
        self.free = total

    def try_acquire(self, count: int) -> bool:
        if count > self.free:
            return False
        self.free -= count
        return True

    def release(self, count: int) -> None:
        self.free += count


class PipePermits:
    """One byte in a pipe that all routers inherit per free permit: reading takes one, writing gives it back.

    The kernel keeps each read and write whole, so routers need no lock. `fd` is open for both (the launcher makes it,
    `cli.permits`). `held` is what this process holds, which is lost if it is killed.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.held = 0
        os.set_blocking(fd, False)

    def try_acquire(self, count: int) -> bool:
        try:
            taken = len(os.read(self.fd, count))
        except BlockingIOError:
            return False
        self.held += taken
        if taken < count:
            self.release(taken)
            return False
        return True

    def release(self, count: int) -> None:
        if count:
            self.held -= count
            os.write(self.fd, b"." * count)
