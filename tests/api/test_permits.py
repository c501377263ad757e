"""Permits within one router and over a pipe that several share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest

from textmill.api.permits import LocalPermits, Permits, PipePermits
from textmill.cli.permits import fill_permits


@pytest.fixture(params=["local", "pipe"])
def permits(request: pytest.FixtureRequest) -> Iterator[Permits]:
    if request.param == "local":
        yield LocalPermits(4)
        return
    fd = fill_permits(4)
    yield PipePermits(fd)
    os.close(fd)


def test_all_or_none(permits: Permits) -> None:
    assert permits.try_acquire(3)
    assert not permits.try_acquire(2)
    assert permits.try_acquire(1)
    assert not permits.try_acquire(1)
    permits.release(4)
    permits.release(0)
    assert permits.try_acquire(4)
    assert not permits.try_acquire(5)


def take_and_give(fd: int, pipe: Connection) -> None:
    permits = PipePermits(fd)
    most = 0
    for _ in range(2000):
        if permits.try_acquire(3):
            most = max(most, permits.held)
            permits.release(3)
    pipe.send(most)


def test_processes_share_a_pipe() -> None:
    """Four processes that take and give thousands of times lose nothing and never hold more than there is."""
    fd = fill_permits(8)
    fork = get_context("fork")
    ends = [fork.Pipe() for _ in range(4)]
    children = [fork.Process(target=take_and_give, args=(fd, mine)) for _, mine in ends]
    for child in children:
        child.start()
    assert all(theirs.recv() <= 3 for theirs, _ in ends)
    for child in children:
        child.join()
    permits = PipePermits(fd)
    assert not permits.try_acquire(9)
    assert permits.try_acquire(8)
    assert not permits.try_acquire(1)
    os.close(fd)
