"""Whether the user of a session is there: what somebody has to know who has seen their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sessiond.errors import NotSupported
from sessiond.session.model import Uid


@dataclass(frozen=True, slots=True)
class Attendance:
    """Whether a user is there. Programs of theirs can pretend that they are."""

    logged_in: bool
    idle_since: float | None = None
    """CLOCK_MONOTONIC, in seconds, of the last input, if that was long ago; of who is logged in."""


class Presence(Protocol):
    """Who knows."""

    async def attendance(self, uid: Uid) -> Attendance:
        """Say whether a user is there. Raises `NotSupported`, `Unreachable`, `Failed`."""


class NoPresence:
    """Nobody does."""

    async def attendance(self, uid: Uid) -> Attendance:
        raise NotSupported("Nothing on this machine knows whether users are idle.")
