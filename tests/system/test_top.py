"""sessionctl top, with the daemon and a session in which something happens."""

from __future__ import annotations

import sys

from sessiond.cli.top_screen import GONE
from tests.support.daemon import Daemon
from tests.support.screen import on_terminal

DOWN = b"\x1b[B"


async def test_a_day_of_a_session(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "guest", "--id", "desk")
    environment = {**daemon.environment, "TERM": "xterm"}
    command = [sys.executable, "-m", "sessiond.cli.main", "top"]
    async with on_terminal(command, environment, columns=120) as terminal:
        await terminal.shows("1 session", "desk", "active", "of 64.0 MiB", "nothing differs")
        with open(daemon.root("desk") / "home/film", "wb") as film:
            film.truncate(40 << 20)
            film.write(b"x" * (32 << 20))
        await terminal.type(DOWN)  # it asks sooner then
        await terminal.shows("[|||||     ]  50%  32.0 MiB of 64.0 MiB", "Since the image: 1 added")
        await terminal.type(b"s")
        await terminal.shows("desk has a new snapshot", "1 snapshot,")
        daemon.leave()
        await terminal.shows(GONE)
        daemon.start()
        await terminal.shows("1 session", "desk", "active", "1 snapshot,")
        await terminal.type(b"ry")
        await terminal.shows("desk has been reset.")
        await terminal.type(DOWN)
        await terminal.shows("nothing differs")
        daemon.sessionctl("close", "desk")
        await terminal.shows("0 sessions")
        daemon.stop()
        await terminal.shows(GONE)
        await terminal.type(b"q")
        assert await terminal.process.wait() == 0
