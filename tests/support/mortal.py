"""Processes that never outlive their test.

A worker that does not answer keeps its client, the test, in a wait that only the worker's death
ends, and that no time limit within the client can interrupt: the alarm is what fails such a test.

``python -m tests.support.mortal MODULE ARGUMENTS`` runs a module so.
"""

from __future__ import annotations

import runpy
import signal
import sys

from tests.support import libc

LIFE_SECONDS = 110
"""A little less than a test may take, so that it still gets to report what it waited for."""


def die_in_time() -> None:
    """Have this process end with its parent, or after `LIFE_SECONDS`."""
    libc.die_with_parent(signal.SIGKILL)
    signal.alarm(LIFE_SECONDS)


if __name__ == "__main__":
    die_in_time()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
