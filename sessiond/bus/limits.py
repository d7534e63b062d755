"""How much one caller may ask for at once, so that it leaves something to the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Iterator
from contextlib import contextmanager

from sessiond.bus import names
from sessiond.bus.wire import BusError

ROOT = 0
"""The user id that may do everything, and that no limit for each user is for."""


class Limit:
    """At most `most` of something at once for each key, such as a user id, but those `exempt`.

    `refusal` is what the others are told then; ``{most}`` in it becomes the limit.
    """

    def __init__(self, most: int, refusal: str, *, exempt: Container[Hashable] = ()) -> None:
        self._most = most
        self._refusal = refusal
        self._exempt = exempt
        self._taken: Counter[Hashable] = Counter()

    @contextmanager
    def share(self, key: Hashable) -> Iterator[None]:
        """Have one while the context is open. Raises `BusError` LimitsExceeded at once."""
        if self._taken[key] >= self._most and key not in self._exempt:
            raise BusError(names.LIMITS_EXCEEDED, self._refusal.format(most=self._most))
        self._taken[key] += 1
        try:
            yield
        finally:
            self._taken[key] -= 1
            if not self._taken[key]:
                del self._taken[key]

    def total(self) -> int:
        """Return how many there are now, of all keys."""
        return self._taken.total()
