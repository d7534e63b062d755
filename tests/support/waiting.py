"""Waiting for what other tasks or processes bring about."""

from __future__ import annotations

from collections.abc import Callable

import trio

BOUND = 20.0
"""Seconds after which what is waited for counts as never happening."""


async def until(condition: Callable[[], object]) -> None:
    """Return once `condition` holds."""
    with trio.fail_after(BOUND):
        while not condition():
            await trio.sleep(0.005)
