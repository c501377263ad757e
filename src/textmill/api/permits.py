"""Permits bound how many sequences are in the house: within one router, or over all routers that share a pipe."""

from __future__ import annotations

import os
from typing import Protocol

PIPE_CAPACITY = 65536  # bytes that a Linux pipe holds by default, one permit each


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
    """One byte in an inherited pipe per free permit: reading takes one, writing gives it back.

    The kernel makes each read and write atomic, so routers need no lock. `held` is what this process holds; a launcher
    gives a dead router's share back by writing that many bytes itself.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.held = 0
        os.set_blocking(read_fd, False)

    @staticmethod
    def create(total: int) -> tuple[int, int]:
        """A filled pipe as (read descriptor, write descriptor), both inheritable; at most 65,536 permits."""
        read_fd, write_fd = os.pipe()
        os.write(write_fd, b"p" * min(total, PIPE_CAPACITY))
        for fd in (read_fd, write_fd):
            os.set_inheritable(fd, True)
        return read_fd, write_fd

    def try_acquire(self, count: int) -> bool:
        try:
            taken = len(os.read(self.read_fd, count))
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
            os.write(self.write_fd, b"p" * count)
