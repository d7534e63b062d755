"""Time: by the clock on the wall, which people read and may set, and by one that only runs on.

What is to happen at a time of day goes by the first; what is to happen after a while goes by the
second, CLOCK_BOOTTIME, which also runs while the machine is suspended.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Protocol, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FAR_AWAY = datetime(2200, 1, 1, tzinfo=UTC)
_MARGIN = timedelta(minutes=1)


class Clock(Protocol):
    """All clocks of the machine."""

    boot: str
    """Changes with each start of the machine."""

    def now(self) -> datetime:
        """What the clock on the wall shows, in UTC."""

    def boottime(self) -> float:
        """Seconds since the machine was started, suspended or not."""

    def monotonic(self) -> float:
        """The same without the time for which it was suspended."""


class SystemClock:
    """The kernel's."""

    def __init__(self) -> None:
        self.boot = _BOOT_ID.read_text().strip()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_MONOTONIC)


class Instant(BaseModel):
    """A moment that has been, as all clocks had it; can be kept over a start of the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wall: Annotated[AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC), lt=_FAR_AWAY)]
    boot: str
    seconds: Annotated[float, Field(ge=0, le=1e9)]
    """Of `Clock.boottime`."""

    @classmethod
    def now(cls, clock: Clock) -> Self:
        """Return the present moment."""
        return cls(wall=clock.now(), boot=clock.boot, seconds=clock.boottime())

    def elapsed(self, clock: Clock) -> float:
        """Return how many seconds ago it was, however the clock on the wall was set since.

        If the machine has been started since, that clock is all that there is to go by.
        """
        if self.boot == clock.boot:
            return clock.boottime() - self.seconds
        return max(0.0, (clock.now() - self.wall).total_seconds())


def next_time_of_day(hour: int, minute: int, after: datetime) -> datetime:
    """Return when the clock on the wall next shows a time, by the machine's time zone.

    More than a minute later than `after`: a clock that is put right by some seconds does not show
    the same time twice. Where daylight saving leaves the time out, it is an hour later.
    """
    time.tzset()  # the time zone of the machine may have been changed
    earliest = after + _MARGIN
    day = earliest.astimezone().date()
    while True:
        # By the timestamp: of a time that is left out, astimezone() makes another on Python 3.13.
        local = datetime(day.year, day.month, day.day, hour, minute)
        candidate = datetime.fromtimestamp(local.timestamp(), UTC)
        if candidate > earliest:
            return candidate
        day += timedelta(days=1)
