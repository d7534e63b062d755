"""Who holds back the resets of a session that come by themselves, each by a descriptor."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import trio

from sessiond.errors import NoSuchSession
from sessiond.session.model import ROOT, Uid


@dataclass(frozen=True, slots=True)
class Inhibitor:
    """One that holds."""

    who: str
    why: str
    uid: Uid
    since: datetime


class Inhibitors:
    """Those of one session; `changed` is called when one comes or goes.

    Each is a pipe: the other end is with whoever holds, and is closed when they let go or die.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._held: dict[int, Inhibitor] = {}
        # Of a pipe it tells only that the other end is closed, so nobody can wake us by writing.
        self._closed = select.epoll()

    @property
    def all(self) -> tuple[Inhibitor, ...]:
        """Those that hold now, in the order in which they came."""
        return tuple(self._held.values())

    @property
    def any_of_root(self) -> bool:
        return any(one.uid == ROOT for one in self._held.values())

    def add(self, uid: Uid, who: str, why: str) -> int:
        """Hold until the returned descriptor, which is the caller's, is closed by all.

        Raises `NoSuchSession` when the session is being closed.
        """
        if self._closed.closed:
            raise NoSuchSession("The session is being closed, or has been.")
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closed.register(ours, 0)
        self._held[ours] = Inhibitor(who, why, uid, datetime.now(UTC))
        self._changed()
        return theirs

    async def watch(self) -> None:
        """Let go of those whose descriptor is closed, until cancelled; then of all."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._closed.fileno())
                for ours, _ in self._closed.poll(0):
                    self._release(ours)
                self._changed()
        finally:
            for ours in tuple(self._held):
                self._release(ours)
            self._closed.close()

    def _release(self, ours: int) -> None:
        del self._held[ours]
        self._closed.unregister(ours)
        os.close(ours)
