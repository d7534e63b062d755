"""`sessionctl top`: the sessions as they are, until somebody has seen enough.

One task follows the daemon's signals, two ask now and then for what no signal tells, one reads
keys, and one draws. They share `_Top`, and change it between their checkpoints only. Each reset or
snapshot that is asked for has a task of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial

import trio
from rich.console import Console, ConsoleDimensions

from sessiond.bus.client import Client
from sessiond.bus.mirror import Mirror, mirror
from sessiond.cli.differences import counts
from sessiond.cli.output import ANY_WIDTH, show
from sessiond.cli.top_screen import Picture, Row, rows_in, table, window
from sessiond.errors import SessiondError, Unreachable
from sessiond.words import _

CALM = 5.0
"""Seconds between questions for what no signal tells: how full sessions are, and what changed."""
_BREATH = 0.5
"""Seconds between them at least, however fast somebody goes from session to session."""
_TOGETHER = 0.1
"""Seconds within which all that happens is one new picture."""

_KEY = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
_STEPS = {b"\x1b[A": -1, b"\x1bOA": -1, b"\x1b[B": 1, b"\x1bOB": 1}
_PAGES = {b"\x1b[5~": -1, b"\x1b[6~": 1}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def show_sessions(client: Client) -> int | None:
    """Show the sessions until q is typed; as one table, if that is all the output can take.

    Returns 128 + n when signal n has ended it. Raises `Unreachable` when there is no daemon.
    """
    await client.info()  # starts it, and says what is wrong if it does not answer
    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    if sys.stdin.isatty() and sys.stdout.isatty() and not console.is_dumb_terminal:
        return await _Top(client, console).run()
    async with mirror(client) as copy:
        rows = _rows(copy)
    width = console.width if sys.stdout.isatty() else ANY_WIDTH
    show(table(rows, width, 0, len(rows)))
    return None


def _rows(copy: Mirror) -> list[Row]:
    return [Row(session, copy.last_job(session)) for session in copy.sessions()]


class _Top:
    """What is shown, and what was typed so far."""

    def __init__(self, client: Client, console: Console) -> None:
        self._client = client
        self._screen = _Screen(console)
        self._copy: Mirror | None = None
        """None while the daemon is away."""
        self._rows: list[Row] = []
        self._chosen = ""
        """Id of the session that keys act on."""
        self._at = 0
        """The index of its row."""
        self._changes: dict[str, str] = {}
        """How the session that was asked about last differs from its image."""
        self._note = ""
        self._if_yes: Callable[[], Awaitable[None]] | None = None
        """What was asked about."""
        self._news = trio.Event()
        self._moved = trio.Event()
        self._failure: SessiondError | None = None

    async def run(self) -> int | None:
        """Return when it is over."""
        code = None
        with (
            trio.open_signal_receiver(signal.SIGWINCH, signal.SIGTSTP, *_ENDING) as signals,
            self._screen.taken(),
        ):
            async with trio.open_nursery() as nursery:
                for task in (self._follow, self._read_keys):
                    nursery.start_soon(task, nursery)
                for forever in (self._ask_for_use, self._ask_for_changes, self._draw):
                    nursery.start_soon(forever)
                async for number in signals:
                    if number in _ENDING:
                        code = 128 + number
                        break
                    if number == signal.SIGTSTP:
                        with self._screen.given_back():
                            os.kill(os.getpid(), signal.SIGSTOP)
                    self._news.set()
                nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        return code

    async def _follow(self, nursery: trio.Nursery) -> None:
        """Have the rows be those of the daemon, also of one that takes its place."""
        try:
            while True:
                with suppress(Unreachable):
                    async with mirror(self._client) as self._copy:
                        while True:
                            self._news.set()
                            await self._copy.next_change()
                self._copy = None
                self._news.set()
                await self._client.returned()
        except SessiondError as error:  # raised out there, it is not wrapped into a group
            self._failure = error
            nursery.cancel_scope.cancel()

    async def _ask_for_use(self) -> None:
        while True:
            moved = self._moved
            if self._copy is not None:
                first, count = window(self._at, len(self._rows), self._screen.rows)
                ids = [row.session.id for row in self._rows[first : first + count]]
                with suppress(SessiondError):  # who follows its signals finds that out as well
                    await self._copy.refresh(ids)
                    self._news.set()
            await self._breathe(moved)

    async def _ask_for_changes(self) -> None:
        while True:
            moved = self._moved
            session = self._rows[self._at].session if self._rows else None
            # What others are refused would be in the journal each time.
            if (
                session is not None
                and session.state not in ("failed", "inactive")
                and os.geteuid() in (0, session.uid)
            ):
                with suppress(SessiondError):
                    summary = await self._client.session_named(session.id).changes()
                    self._changes = {
                        session.id: _("Since the image: {changes}").format(changes=counts(summary))
                    }
                    self._news.set()
            await self._breathe(moved)

    async def _breathe(self, moved: trio.Event) -> None:
        """Wait until it is time for the next question, or there is a reason to ask sooner."""
        await trio.sleep(_BREATH)
        with trio.move_on_after(CALM):
            await moved.wait()

    async def _draw(self) -> None:
        while True:
            await self._news.wait()
            await trio.sleep(_TOGETHER)
            self._news = trio.Event()
            self._screen.show(self._picture())

    def _picture(self) -> Picture:
        self._rows = [] if self._copy is None else _rows(self._copy)
        ids = [row.session.id for row in self._rows]
        if self._chosen in ids:
            self._at = ids.index(self._chosen)
        elif ids:
            self._choose(self._at)
        return Picture(
            None if self._copy is None else self._copy.manager(),
            self._rows,
            self._at,
            self._changes.get(self._chosen, ""),
            self._note,
        )

    def _choose(self, index: int) -> None:
        """Choose the session in this row, or the next to it that there is."""
        self._at = max(min(index, len(self._rows) - 1), 0)
        self._chosen = self._rows[self._at].session.id
        self._ask_again()

    def _ask_again(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    async def _read_keys(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(sys.stdin)
            keys = _KEY.findall(self._screen.read())
            if not keys or b"q" in keys:  # none: the terminal is gone
                nursery.cancel_scope.cancel()
            for key in keys:
                self._take(key, nursery)
            self._news.set()

    def _take(self, key: bytes, nursery: trio.Nursery) -> None:
        confirmed, self._if_yes = self._if_yes, None
        self._note = ""
        if key == b"y" and confirmed is not None:
            nursery.start_soon(confirmed)
        if not self._rows:
            return
        session = self._rows[self._at].session
        if key in _STEPS:
            self._choose(self._at + _STEPS[key])
        elif key in _PAGES:
            self._choose(self._at + _PAGES[key] * self._screen.rows)
        elif key == b"s":
            nursery.start_soon(self._snapshot, session.id)
        elif key == b"r":
            self._if_yes = partial(self._reset, session.id)
            question = _("Reset {session} of {user}? What was changed in it is lost. y/n")
            self._note = question.format(session=session.id, user=session.user)

    async def _reset(self, session_id: str) -> None:
        with self._noting(_("{session} has been reset.").format(session=session_id)):
            job = await self._client.session_named(session_id).reset()
            await job.wait()

    async def _snapshot(self, session_id: str) -> None:
        name = f"snapshot-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        done = _("{session} has a new snapshot, {snapshot}.")
        with self._noting(done.format(session=session_id, snapshot=name)):
            await self._client.session_named(session_id).snapshot(name)

    @contextmanager
    def _noting(self, outcome: str) -> Iterator[None]:
        """Show what comes of something, if no question is asked meanwhile."""
        try:
            yield
        except SessiondError as error:
            outcome = str(error)
        if self._if_yes is None:
            self._note = outcome
        self._ask_again()
        self._news.set()


class _Screen:
    """The terminal, with another screen than the one that the shell has."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._settings = termios.tcgetattr(sys.stdin)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have it for oneself while the context is open."""
        self._take()
        try:
            yield
        finally:
            self._give_back()

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """Have it as it was while the context is open."""
        self._give_back()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        tty.setcbreak(sys.stdin)
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def _give_back(self) -> None:
        with suppress(OSError, termios.error):  # it may be gone
            self._console.show_cursor(True)
            self._console.set_alt_screen(False)
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._settings)

    def read(self) -> bytes:
        """Return what was typed; nothing when the terminal is gone."""
        try:
            return os.read(sys.stdin.fileno(), 1024)
        except OSError:
            return b""

    @property
    def rows(self) -> int:
        """How many sessions there is room for."""
        return rows_in(shutil.get_terminal_size().lines)

    def show(self, picture: Picture) -> None:
        width, height = shutil.get_terminal_size()
        self._console.size = ConsoleDimensions(width, height)
        self._console.update_screen(picture.draw(width, height))
