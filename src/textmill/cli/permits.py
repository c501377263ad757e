"""The permits that all routers share: a pipe with one byte for each request that may be in the house."""

from __future__ import annotations

import fcntl
import os

from textmill.errors import ConfigError

ROOM = 2 * 4096


def fill_permits(count: int) -> int:
    """A descriptor, open for reading and writing, of a pipe that holds `count` bytes. Raises `ConfigError` if the
    system allows no pipe of that size."""
    read, write = os.pipe()
    try:
        # A page that is only partly read still takes its full place, hence the room.
        if count + ROOM > fcntl.fcntl(write, fcntl.F_GETPIPE_SZ):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, count + ROOM)
        os.set_blocking(write, False)
        written = 0
        while written < count:
            written += os.write(write, b"." * min(count - written, 4096))
        return os.open(f"/proc/self/fd/{read}", os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"`max_concurrent_requests` ({count}) is more than this system allows: {error}") from None
    finally:
        os.close(read)
        os.close(write)
