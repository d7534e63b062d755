"""Waiting for what other tasks or processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

BOUND = 20.0
"""Seconds after which what is waited for counts as never happening."""


async def until(condition: Callable[[], object]) -> None:
    """Return once `condition` holds."""
    end = time.monotonic() + BOUND  # trio's clock may be one that does not wait for threads
    while not condition():
        if time.monotonic() > end:
            raise trio.TooSlowError
        await trio.sleep(0.005)
