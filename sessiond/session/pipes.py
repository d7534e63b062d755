"""Pipes that callers pass: what is written to one, or read from one, by a thread of the manager.

Only pipes are taken. Any other descriptor leads to a file system, which may be a merged view, or a
network or FUSE file system of the caller's: a thread that waits there could not be ended, and some
files of /proc do for root who writes what they would not do for who has opened them. Functions
block, and are called in threads; they call `check` again and again, which stops them by raising.
"""

from __future__ import annotations

import fcntl
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress

from sessiond.errors import Failed, InvalidOption

PATIENCE = 60.0
"""Seconds for which the other side may neither read nor write."""
_GLANCE = 0.1
"""Seconds between two calls of `check` while nothing moves."""
_CAPACITY = 1 << 20
"""Bytes that a pipe is to hold, where its user may have that."""


def take(descriptor: int, *, write: bool) -> int:
    """Return a descriptor of one's own of the pipe `descriptor`, which does not block.

    What the caller does with its own has no effect on it, nor the other way round. Raises
    `InvalidOption` where it is no pipe, without asking any file system.
    """
    name = f"/proc/self/fd/{descriptor}"
    try:
        if not os.readlink(name).startswith("pipe:["):  # of a file: its path, which has a slash
            raise InvalidOption("The descriptor has to be one end of a pipe.")
        mode = os.O_WRONLY if write else os.O_RDONLY
        pipe = os.open(name, mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidOption(f"The pipe cannot be used: {error.strerror}.") from error
    with suppress(OSError):  # who has many gets no larger ones
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _CAPACITY)
    return pipe


class Pipe:
    """One end of a pipe, as `take` returns it; `close` comes after all else."""

    def __init__(self, descriptor: int, check: Callable[[], None]) -> None:
        """Take over the descriptor."""
        self._descriptor = descriptor
        self._check = check

    def close(self) -> None:
        os.close(self._descriptor)

    def write(self, data: bytes) -> None:
        """Write all of `data`. Raises `Failed` when the reader is gone or does not read."""
        rest = memoryview(data)
        while rest:
            self._wait(select.POLLOUT, "Nothing was read from the pipe")
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # there is some room, but not enough for so little
                continue
            except BrokenPipeError:
                raise _closed_early() from None

    def require_reader(self) -> None:
        """Raise `Failed` when the reader is gone."""
        poll = select.poll()
        poll.register(self._descriptor, 0)
        if poll.poll(0):
            raise _closed_early()

    def read(self, size: int) -> bytes:
        """Return what there is, at most `size` bytes; nothing at the end. Raises `Failed`."""
        while True:
            self._wait(select.POLLIN, "Nothing was written to the pipe")
            with suppress(BlockingIOError):  # another reader was faster
                return os.read(self._descriptor, size)

    def _wait(self, event: int, what: str) -> None:
        poll = select.poll()
        poll.register(self._descriptor, event)
        end = time.monotonic() + PATIENCE
        while True:
            self._check()
            if poll.poll(_GLANCE * 1000):
                return
            if time.monotonic() > end:
                raise Failed(f"{what} for {PATIENCE:g} seconds; it is given up.")


def _closed_early() -> Failed:
    return Failed("The other end of the pipe was closed early.")
