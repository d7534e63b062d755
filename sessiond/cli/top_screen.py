"""What `sessionctl top` draws, for a screen of any size. Only looks at what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sessiond.bus.client import JobInfo, ManagerInfo, SessionInfo
from sessiond.cli.output import listed, printable, size, when
from sessiond.cli.terms import (
    OPERATIONS,
    RESET_REASONS,
    SESSION_STATES,
    SPACE_LEVELS,
    STORAGES,
)
from sessiond.words import _, ngettext

KEYS = _("up, down: choose   r: reset   s: snapshot   q: quit")
GONE = _(
    "sessiond is not running. This goes on when it is back: 'systemctl start sessiond' starts it."
)

_BAR = 10
_GAP = 2
_LEVELS = {"normal": "", "warning": "yellow", "critical": "red"}


@dataclass(frozen=True, slots=True)
class Row:
    """One session, and the job that ran last."""

    session: SessionInfo
    job: JobInfo | None


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is shown."""

    manager: ManagerInfo | None
    """None while the daemon is away."""
    rows: Sequence[Row]
    chosen: int
    """The index of the row that keys act on."""
    changes: str
    """How that session differs from its image; may be empty."""
    note: str
    """The last line: a question, or what came of an answer; the keys if it is empty."""

    def draw(self, width: int, height: int) -> RenderableType:
        """Return lines for a screen of that many columns and lines."""
        below = self._below()
        first, count = window(self.chosen, len(self.rows), rows_in(height))
        parts: list[RenderableType] = [
            _line(self._summary(), "bold"),
            Text(),
            table(self.rows, width, first, count, chosen=self.chosen),
            *[Text()] * (rows_in(height) - count),
            *below,
        ]
        return Group(*parts)

    def _summary(self) -> str:
        if self.manager is None:
            return GONE
        states = [row.session.state for row in self.rows]
        sessions = ngettext("{number} session", "{number} sessions", len(states))
        counts = [sessions.format(number=len(states))]
        counts += [
            f"{states.count(state)} {SESSION_STATES[state]}"
            for state in ("failed", "busy")
            if state in states
        ]
        told = f"sessiond {self.manager.version}   {listed(counts)}"
        if self.manager.maintenance:
            maintained = _("maintenance of {profile}").format(profile=self.manager.maintenance)
            told += f"   {maintained}"
            if self.manager.maintenance_message:
                told += f": {self.manager.maintenance_message}"
        return told

    def _below(self) -> list[Text]:
        facts = ["", ""]
        if self.rows:
            session = self.rows[self.chosen].session
            kept = len(session.snapshots)
            snapshots = ngettext("{number} snapshot", "{number} snapshots", kept)
            fact = _("{snapshots}, last reset {moment}, at {mount_point}").format(
                snapshots=snapshots.format(number=kept),
                moment=when(session.last_reset),
                mount_point=session.mount_point,
            )
            facts = [
                f"{session.id}  {fact}",
                session.failure or _last(self.rows[self.chosen].job) or self.changes,
            ]
        return [Text(), *(_line(fact) for fact in facts), _line(self.note or KEYS, "reverse")]


_AROUND = 7
"""Lines that are no rows: summary, titles, facts, note, and two that are empty."""


def rows_in(height: int) -> int:
    """Return how many rows a screen of that many lines has, one at least."""
    return max(height - _AROUND, 1)


def window(chosen: int, rows: int, room: int) -> tuple[int, int]:
    """Return the first row of the page that the chosen one is on, and how many rows it has."""
    first = chosen - chosen % room
    return first, min(room, rows - first)


class _Column(NamedTuple):
    title: str
    cell: Callable[[Row], Text]
    needed: int
    """Those with the lowest number go first where a screen is narrow."""


def table(
    rows: Sequence[Row], width: int, first: int, count: int, *, chosen: int | None = None
) -> Table:
    """Return a table of `count` sessions from the first on.

    It is as wide as all sessions need, so that it looks the same whichever are shown.
    """
    columns = [(column, [column.cell(row) for row in rows]) for column in _COLUMNS]
    widths = {
        column.title: max([cell_len(column.title), *(cell_len(cell.plain) for cell in cells)])
        for column, cells in columns
    }
    while len(columns) > 1 and sum(widths[c.title] + _GAP for c, _cells in columns) - _GAP > width:
        columns.remove(min(columns, key=lambda one: one[0].needed))
    drawn = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column, _cells in columns:
        drawn.add_column(
            column.title, no_wrap=True, overflow="ellipsis", min_width=widths[column.title]
        )
    for index in range(first, first + count):
        style = "reverse" if index == chosen else ""
        drawn.add_row(*(cells[index] for _column, cells in columns), style=style)
    return drawn


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style, no_wrap=True, overflow="ellipsis")


def _state(row: Row) -> Text:
    session, job = row.session, row.job
    if session.state == "busy" and job is not None and job.state == "running":
        progress = f" {job.progress:.0%}" if job.progress_valid else ""
        return _line(f"{OPERATIONS[job.operation]}{progress}", "cyan")
    return _line(SESSION_STATES[session.state], "red" if session.state == "failed" else "")


def _bar(row: Row) -> Text:
    """A bar of ASCII, which every terminal can show, and its percentage."""
    session = row.session
    if not session.bytes_limit:
        return Text(_("no limit"))
    share = session.bytes_used / session.bytes_limit
    full = min(round(share * _BAR), _BAR)
    return _line(f"[{'|' * full:<{_BAR}}] {share:4.0%}", _LEVELS.get(session.space_level, ""))


def _used(row: Row) -> Text:
    session = row.session
    sentence = _("{used} of {limit}") if session.bytes_limit else _("{used} on its disk")
    used = sentence.format(used=size(session.bytes_used), limit=size(session.bytes_limit))
    level = f", {SPACE_LEVELS[session.space_level]}" if session.space_level != "normal" else ""
    return _line(f"{used}{level}")


def _next_reset(row: Row) -> Text:
    session = row.session
    if session.next_reset is None:
        return _line(_("held back") if session.inhibitors else "")
    at = session.next_reset.astimezone()
    today = at.date() == datetime.now().astimezone().date()
    reason = RESET_REASONS[session.next_reset_reason]
    return _line(f"{at:%H:%M} {reason}" if today else f"{at:%Y-%m-%d %H:%M}")


def _last(job: JobInfo | None) -> str:
    """Say why the last job has failed, if it has."""
    if job is None or job.state != "failed":
        return ""
    sentence = _("The last {operation} failed. {reason}")
    return sentence.format(operation=OPERATIONS[job.operation], reason=job.error_message)


_COLUMNS = (
    _Column(_("SESSION"), lambda row: _line(row.session.id), 9),
    _Column(_("USER"), lambda row: _line(row.session.user), 6),
    _Column(_("PROFILE"), lambda row: _line(row.session.profile), 2),
    _Column(_("STORAGE"), lambda row: _line(STORAGES[row.session.storage]), 1),
    _Column(_("STATE"), _state, 8),
    _Column(_("USE"), _bar, 7),
    _Column(_("USED"), _used, 4),
    _Column(_("NEXT RESET"), _next_reset, 3),
)
