"""Passwords at the terminal: polkit's own agent, for as long as a command runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def password_agent() -> Iterator[None]:
    """Have polkit ask its questions at this terminal, where no desktop has them asked already.

    Without a terminal, polkit's pkttyagent(1), or a need to ask, as for root, there is none.
    """
    if os.geteuid() == 0 or not sys.stdin.isatty():
        yield
        return
    ready, told = os.pipe()
    try:
        agent = subprocess.Popen(
            ["pkttyagent", "--process", str(os.getpid()), "--notify-fd", str(told), "--fallback"],
            pass_fds=[told],
            # It speaks with the terminal itself. That there is no polkit is no complaint of ours.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        os.close(ready)
        os.close(told)
        yield
        return
    os.close(told)
    with open(ready, "rb") as announcement:
        announcement.read()  # to its end: it is registered, or has ended
    try:
        yield
    finally:
        agent.terminate()
        agent.wait()
