"""The freezer of a cgroup (version 2), by which all programs in it are stopped for a moment.

Who stops them must not leave them so. The manager and the worker of a session each hold the same
two descriptors, and each lets programs go on by itself when it is done, when the other is gone, and
after `LONGEST`. Should both be killed, the next manager does (`sessiond.session.halting`).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import trio

log = logging.getLogger(__name__)

LONGEST = 5.0
"""Seconds after which programs go on in any case."""
PATIENCE = 0.5
"""Seconds that are waited for all of them to stand still. One that waits in the kernel, for a file
system that another of them serves, say, does not; it still cannot run on until they all go on.
"""


class Freezer:
    """That of one cgroup, which may be gone by now: then there is nobody to be stopped."""

    def __init__(self, control: int, events: int) -> None:
        """`control`, `events`: descriptors of its ``cgroup.freeze`` and ``cgroup.events``; they are
        taken over.
        """
        self._control = control
        self._events = events

    @classmethod
    def open(cls, directory: int) -> Freezer:
        """Open that of a cgroup by its directory. Raises OSError; ENOENT before Linux 5.2, and for
        the root of the hierarchy.
        """
        control = os.open("cgroup.freeze", os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
        try:
            return cls(
                control, os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
            )
        except BaseException:
            os.close(control)
            raise

    def close(self) -> None:
        """Close the descriptors; nobody goes on because of that."""
        os.close(self._control)
        os.close(self._events)

    @property
    def descriptors(self) -> tuple[int, int]:
        """As the constructor takes them."""
        return self._control, self._events

    @property
    def is_set(self) -> bool:
        """Whether somebody has stopped the programs of this very cgroup, and not of one above it.

        While it is, no program runs any code of its own.
        """
        try:
            return os.pread(self._control, 8, 0).strip() == b"1"
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return False

    def freeze(self) -> None:
        """Stop all programs; those that are in a system call stop when they return from it."""
        self._set(b"1")

    def thaw(self) -> None:
        """Let them go on."""
        self._set(b"0")

    def _set(self, value: bytes) -> None:
        try:
            os.pwrite(self._control, value, 0)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    async def wait_frozen(self) -> None:
        """Return when all stand still."""
        with closing(select.epoll()) as changed:
            # All else that poll(2) says of such a file it always says.
            changed.register(self._events, select.EPOLLPRI)
            while not self._all_stand_still():
                await trio.lowlevel.wait_readable(changed.fileno())

    def _all_stand_still(self) -> bool:
        try:
            return b"frozen 1" in os.pread(self._events, 4096, 0).splitlines()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return True

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Have programs go on when the context ends, or before, `LONGEST` after it began.

        A thread sees to the latter, for whatever else this process does may hang.
        """
        timer = threading.Timer(LONGEST, self.thaw)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            self.thaw()
            timer.cancel()
            timer.join()


class Halt:
    """Programs that stand still while files that they write are copied: of the cgroup that was
    prepared last, if any was, from `begin` to `end`.
    """

    def __init__(self) -> None:
        self._freezer: Freezer | None = None
        self._limits = ExitStack()

    def prepare(self, freezer: Freezer) -> None:
        """Take over `freezer`."""
        self.end()
        self._freezer = freezer
        self._limits.callback(freezer.close)

    async def begin(self) -> None:
        """Stop the programs; return when all of them stand still, or after `PATIENCE`.

        Must come before any request of theirs is held: who waits for an answer does not stand
        still.
        """
        if self._freezer is None:
            return
        try:
            self._limits.enter_context(self._freezer.limited())
            self._freezer.freeze()
            with trio.move_on_after(PATIENCE) as patience:
                await self._freezer.wait_frozen()
        except OSError as error:
            log.error("Programs could not be stopped: %s", error)  # noqa: TRY400
            self.end()
            return
        if patience.cancelled_caught:
            log.warning("Not all programs stand still within %g s.", PATIENCE)

    def holds(self) -> bool:
        """Say whether all that were stopped still are."""
        return self._freezer is None or self._freezer.is_set

    def end(self) -> None:
        """Let them go on; may be repeated."""
        self._freezer = None
        self._limits.close()
