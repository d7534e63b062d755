"""The worker's count of what differs from the image, which it keeps while the session changes.

A moment after something has changed, it is compared in the background, beside everything else, and
when the count is asked for, what has changed since. What may have to be read for long waits until
then; so do files that are open for writing, which the kernel may write without asking.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from sessiond.control import ChangeCounts
from sessiond.fuse import comparison
from sessiond.overlay.by_directory import ByDirectory
from sessiond.overlay.stack import Stack
from sessiond.overlay.tally import Tally, TooManyError
from sessiond.overlay.view import View

log = logging.getLogger(__name__)

_DELAY = 0.25
"""Seconds from a change until it is compared: what changes again meanwhile is compared once."""

_AT_ONCE = 512
"""Names compared at a time, in the background."""

_MOST_BYTES = 1 << 20
"""Contents that are compared in the background."""


_T = TypeVar("_T")


class Counting:
    """See the module. Runs in the thread that serves the mount, but for the comparisons."""

    def __init__(self, view: View, limiter: trio.CapacityLimiter) -> None:
        self._view = view
        self._limiter = limiter
        self._tally = Tally()
        self._postponed: set[bytes] = set()
        self._too_many = False
        """More names differ than are remembered: each count compares all."""
        self._turn = trio.Lock()
        self._touched = trio.Event()
        self._touched.set()
        view.touched.notify = self._note

    def _note(self) -> None:
        self._touched.set()

    async def run(self) -> None:
        """Compare what changes, for ever."""
        while True:
            await self._touched.wait()
            await trio.sleep(_DELAY)
            self._touched = trio.Event()
            try:
                while await self._catch_up():
                    pass
            except OSError as error:
                # Whoever asks for the count is told.
                log.warning("changes cannot be counted as they come about: %s", error)

    async def _catch_up(self) -> bool:
        """Compare some of what has changed; say whether there was anything."""
        async with self._turn:
            batch = self._view.touched.take(most=_AT_ONCE)
            if not batch or (self._too_many and b"" not in batch):
                return False
            try:
                await self._compare(batch, most_bytes=_MOST_BYTES)
            except TooManyError:
                return False
            return True

    async def count(self, by_directory: ByDirectory | None = None) -> ChangeCounts:
        """Return how much differs now; also below directories, if there is what counts that.

        Raises OSError.
        """
        async with self._turn:
            batch = self._view.touched.take()
            batch |= {path: False for path in self._postponed if path not in batch}
            self._postponed.clear()
            try:
                if batch and (not self._too_many or b"" in batch):
                    await self._compare(batch, most_bytes=None)
            except TooManyError:
                pass
            if self._too_many:
                return await self._count_anew(by_directory)
            sums = partial(self._tally.sums, by_directory)
            return comparison.told(await self._in_thread(sums))

    async def _compare(self, batch: dict[bytes, bool], *, most_bytes: int | None) -> None:
        """Compare what was touched. Raises OSError, `TooManyError`."""
        batch = self._tally.names_of(self._view.touched.take_identities()) | batch
        stack = self._view.stack.copy()
        update = partial(_update, self._tally, stack, batch, most_bytes)
        self._too_many = False
        try:
            self._postponed.update(await self._in_thread(update))
        except TooManyError:
            self._tally = Tally()
            self._too_many = True
            log.info("too much differs from the image to be counted as it comes about")
            raise
        except BaseException:
            self._tally = Tally()  # a thread that was left alone has the former
            self._view.touched.everything()
            raise

    async def _count_anew(self, by_directory: ByDirectory | None) -> ChangeCounts:
        stack = self._view.stack.copy()
        count = partial(comparison.count, stack, stack.bottom(), by_directory)
        return await self._in_thread(count)

    async def _in_thread(self, function: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(
            function, abandon_on_cancel=True, limiter=self._limiter
        )


def _update(
    tally: Tally, stack: Stack, batch: dict[bytes, bool], most_bytes: int | None
) -> list[bytes]:
    base = stack.bottom()
    try:
        return tally.update(stack, base, batch, most_bytes=most_bytes)
    finally:
        stack.close()
        base.close()
