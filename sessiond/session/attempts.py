"""How often to try again."""

from __future__ import annotations

from collections import deque

import trio


class Attempts:
    """Allows `most` attempts within any `seconds`, by trio's clock."""

    def __init__(self, *, most: int, seconds: float) -> None:
        self._seconds = seconds
        self._latest: deque[float] = deque(maxlen=most)

    def allowed(self) -> bool:
        """Tell whether one more is allowed; if so, it counts."""
        now = trio.current_time()
        latest = self._latest
        if len(latest) == latest.maxlen and now - latest[0] < self._seconds:
            return False
        latest.append(now)
        return True
