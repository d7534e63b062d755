"""sessionctl top, on a terminal, against the D-Bus service."""

from __future__ import annotations

import signal
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from sessiond.cli.exit_codes import ExitCode
from sessiond.errors import NoSpace
from sessiond.session.model import Operation, SessionId, SessionState, Uid, Usage
from sessiond.session.schedule import Why
from sessiond.session.space import SpaceLevel
from tests.bus.fake_manager import FakeManager
from tests.support.screen import Terminal, on_terminal
from tests.support.waiting import BOUND, until
from tests.unit.cli.conftest import Sessionctl

UP, DOWN, PAGE_DOWN = b"\x1b[A", b"\x1b[B", b"\x1b[6~"


def top(
    sessionctl: Sessionctl, *, columns: int = 120, lines: int = 24, term: str = "xterm"
) -> AbstractAsyncContextManager[Terminal]:
    environment = {**sessionctl.environment, "TERM": term}
    return on_terminal(sessionctl.command("top"), environment, columns=columns, lines=lines)


async def ended(terminal: Terminal, code: int) -> None:
    with trio.fail_after(BOUND):
        assert await terminal.process.wait() == code, terminal.lines


async def test_what_is_shown(manager: FakeManager, sessionctl: Sessionctl) -> None:
    live = manager.sessions[SessionId("live")]
    live.usage, live.space_level = Usage(960 << 20, 1 << 30, 3, 1000), SpaceLevel.CRITICAL
    live.timer.next_reset, live.timer.reason = datetime.now(UTC) + timedelta(days=2), Why.DAILY
    broken = manager.add("broken", "alice", 1000)
    broken.state, broken.failure = SessionState.FAILED, "Its image is missing."
    broken.usage = Usage(5 << 30, 0, 3, 0)
    async with top(sessionctl) as terminal:
        await terminal.shows("q: quit", "Its image is missing.")
        head, _, titles, first, second, *_ = terminal.lines
        assert head.endswith("2 sessions, 1 failed")
        assert titles.split() == [
            *("SESSION", "USER", "PROFILE", "STORAGE", "STATE", "USE", "USED", "NEXT", "RESET"),
        ]
        assert first.split() == [
            *("broken", "alice", "live", "tmpfs", "failed", "no", "limit"),
            *("5.0", "GiB", "on", "its", "disk"),
        ]
        assert second.split()[:5] == ["live", "nobody", "live", "tmpfs", "active"]
        assert "[||||||||| ]  94%  960.0 MiB of 1.0 GiB, critical  20" in second
        assert terminal.marked == first
        await terminal.type(DOWN)
        await terminal.shows("Since the image: 1 added, 2 changed, 3 deleted, 4 renamed")
        assert terminal.marked == second
        await terminal.type(b"q")
        await ended(terminal, 0)


async def test_it_follows_what_happens(manager: FakeManager, sessionctl: Sessionctl) -> None:
    live = manager.sessions[SessionId("live")]
    async with top(sessionctl) as terminal:
        await terminal.shows("1 session", "active")
        job = live.start(Operation.PERSIST, Uid(0))
        live.state = SessionState.BUSY
        job.move(0.25)
        manager.tell("session_changed", live)
        await terminal.shows("persist 25%", "1 busy")
        job.move(0.5)
        await terminal.shows("persist 50%")
        live.state = SessionState.ACTIVE
        job.finish(NoSpace("The disk is full."))
        manager.tell("session_changed", live)
        await terminal.shows("active", "The last persist failed. The disk is full.")
        manager.add("other", "alice", 1000)
        await terminal.shows("2 sessions", "other")
        assert terminal.marked.startswith("live"), "others come and go, the choice stays"
        await manager.close("live")
        await terminal.shows("1 session")
        assert terminal.marked.startswith("other")
        await manager.begin_maintenance("live", "New packages.", started_by=Uid(0))
        await terminal.shows("maintenance of live: New packages.")


async def test_a_reset_is_asked_about_and_a_snapshot_is_not(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    async with top(sessionctl) as terminal:
        await terminal.shows("q: quit")
        await terminal.type(b"r")
        await terminal.shows("Reset live of nobody?", "y/n")
        await terminal.type(b"n")
        await terminal.shows("q: quit")
        await terminal.type(b"yr")
        await terminal.shows("y/n")
        assert manager.jobs == []
        await terminal.type(b"y")
        await until(lambda: manager.jobs)
        manager.jobs[0].finish()
        await terminal.shows("live has been reset.")
        await terminal.type(b"ry")
        await until(lambda: len(manager.jobs) == 2)
        manager.jobs[1].finish(NoSpace("There is no space."))
        await terminal.shows("There is no space.")
        await terminal.type(b"s")
        await terminal.shows("live has a new snapshot, snapshot-", "1 snapshot,")


async def test_many_sessions_are_scrolled_through(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    for number in range(1, 200):
        manager.add(f"s{number:03}", "alice", 1000)
    async with top(sessionctl, lines=27) as terminal:
        await terminal.shows("200 sessions", "live", "s019")
        assert "s020" not in "\n".join(terminal.lines)
        await terminal.type(PAGE_DOWN + DOWN)
        await terminal.shows("s020", "s039")
        await until(lambda: terminal.marked.startswith("s021"))
        await terminal.type(UP * 2)
        await terminal.shows("s019")
        await until(lambda: terminal.marked.startswith("s019"))
        await terminal.type(PAGE_DOWN * 100)
        await until(lambda: terminal.marked.startswith("s199"))


async def test_another_size(manager: FakeManager, sessionctl: Sessionctl) -> None:
    for number in range(50):
        manager.add(f"s{number:03}", "alice", 1000)
    async with top(sessionctl) as terminal:
        await terminal.shows("NEXT RESET", "s015")
        terminal.resize(200, 50)
        await terminal.shows("s041")
        terminal.resize(40, 12)
        await terminal.shows("SESSION", "USE", "s003")
        assert "USED" not in "\n".join(terminal.lines)
        for columns, lines in ((1, 1), (3, 2), (20, 3), (2, 40)):
            terminal.resize(columns, lines)
        terminal.resize(120, 24)
        await terminal.shows("NEXT RESET", "q: quit")


async def test_a_pipe_gets_one_table(manager: FakeManager, sessionctl: Sessionctl) -> None:
    manager.add("a" * 64, "b" * 200, 1000)
    titles, first, second = await sessionctl.lines("top")
    assert titles.split()[:3] == ["SESSION", "USER", "PROFILE"]
    assert first.split()[:2] == ["a" * 64, "b" * 200]
    assert second.split()[:2] == ["live", "nobody"]


async def test_so_does_a_terminal_that_cannot_be_drawn_on(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    async with top(sessionctl, term="dumb") as terminal:
        await ended(terminal, 0)
        await terminal.shows("SESSION", "nobody")
        assert b"\x1b" not in terminal.written


async def test_names_cannot_command_the_terminal(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\r\n\u202e"
    live = manager.sessions[SessionId("live")]
    live.user, live.failure, live.profile = evil, evil, f"[red]{evil}"
    await manager.begin_maintenance("live", evil, started_by=Uid(0))
    async with top(sessionctl, columns=300) as terminal:
        await terminal.shows(r"\x1b]0;owned\x07\u009b31m\r\n\u202e", "[red]")
        await terminal.type(b"r")
        await terminal.shows(r"Reset live of \x1b]0;owned")
        for sign in (b"\x1b]", b"\x07", b"\xc2\x9b", "\u202e".encode()):
            assert sign not in terminal.written


@pytest.mark.parametrize("ending", [b"\x03", signal.SIGTERM])
async def test_the_terminal_is_left_as_it_was(
    manager: FakeManager, sessionctl: Sessionctl, ending: bytes | signal.Signals
) -> None:
    async with top(sessionctl) as terminal:
        before = terminal.settings
        await terminal.shows("q: quit")
        assert terminal.settings != before
        code = {b"\x03": 130, signal.SIGTERM: 143}[ending]
        if isinstance(ending, bytes):
            await terminal.type(ending)
        else:
            terminal.process.send_signal(ending)
        await ended(terminal, code)
        assert terminal.settings == before
        await until(lambda: terminal.written.endswith(b"\x1b[?25h\x1b[?1049l"))


async def test_a_stop_lends_the_terminal_to_the_shell(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    async with top(sessionctl) as terminal:
        before = terminal.settings
        await terminal.shows("q: quit")
        terminal.process.send_signal(signal.SIGTSTP)
        await until(lambda: terminal.written.endswith(b"\x1b[?1049l"))
        await until(lambda: stopped(terminal))
        assert terminal.settings == before
        terminal.process.send_signal(signal.SIGCONT)
        await until(lambda: b"q: quit" in terminal.written.rpartition(b"\x1b[?1049l")[2])
        await terminal.type(b"q")
        await ended(terminal, 0)
        assert terminal.settings == before


def stopped(terminal: Terminal) -> bool:
    stat = Path(f"/proc/{terminal.process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


async def test_no_daemon(sessionctl: Sessionctl) -> None:
    async with top(sessionctl) as terminal:
        await ended(terminal, ExitCode.UNREACHABLE)
        await terminal.shows("sessionctl: sessiond does not answer")
        assert b"\x1b[?1049h" not in terminal.written
