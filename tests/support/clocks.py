"""Clocks that run with trio's, and can be set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import trio

START = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


class FakeClock:
    """Implements `Clock`; to be used within trio."""

    boot = "first"

    def __init__(self) -> None:
        self.set_by = timedelta(0)
        """How far somebody has moved the clock on the wall."""
        self.suspended = 0.0
        """Seconds for which the machine slept."""
        self._begin = trio.current_time()

    def now(self) -> datetime:
        return START + timedelta(seconds=self.boottime() - 1000) + self.set_by

    def boottime(self) -> float:
        return self.monotonic() + self.suspended

    def monotonic(self) -> float:
        return 1000 + trio.current_time() - self._begin
