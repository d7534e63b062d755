"""The question what becomes of the programs that use a session, when that is reset or restored."""

from __future__ import annotations

import os
from collections.abc import Sequence

from gi.repository import GLib, Gtk

from sessiond.desktop import phrases
from sessiond.desktop.daemon import Daemon, Failure
from sessiond.desktop.state import Program, Session
from sessiond.desktop.widgets import Rows, row, switch_row
from sessiond.words import _


class Programs(Rows):
    """Names the programs, and asks whether they are to be closed."""

    def __init__(self, daemon: Daemon, session: Session) -> None:
        super().__init__(_("Programs"))
        self._asking, self._switch = switch_row(
            _("Close _programs that use the session"),
            _("What they have not saved is lost. Others go on with what they have open."),
            True,
        )
        self._switch.connect("notify::active", lambda *_change: self._show())
        self._found: Sequence[Program] | None = None
        self._failure: Failure | None = None
        self._show()
        nothing = GLib.Variant("()", ())
        daemon.call(session, "Conflicts", nothing, self._answered, self._failed)

    @property
    def to_be_closed(self) -> bool:
        """Whether they are to be closed."""
        return bool(self._switch.get_active())

    def _answered(self, found: Sequence[tuple[str, Sequence[int], int, str]]) -> None:
        self._found = [Program(*one) for one in found]
        self._show()

    def _failed(self, failure: Failure) -> None:
        self._failure = failure
        self._show()

    def _show(self) -> None:
        self.show_rows([self._asking, *self._rows()])

    def _rows(self) -> list[Gtk.Widget]:
        if self._failure is not None:
            reason = phrases.failure(self._failure.name)
            return [row(_("The programs could not be listed"), reason)]
        if self._found is None:
            return [row(_("Looking for programs…"))]
        if not self._found:
            return [row(_("No program uses the session"))]
        told = [_program(one, self.to_be_closed) for one in self._found]
        if self.to_be_closed and not _above().isdisjoint(
            pid for one in self._found for pid in one.pids
        ):
            warning = row(
                _("This window may close, too"),
                _("Your desktop, or this program, uses the session. You may be logged out."),
            )
            warning.add_css_class("warning")
            told.insert(0, warning)
        return told


def _program(one: Program, closed: bool) -> Gtk.Widget:
    if not closed:
        fate = _("goes on")
    elif os.getuid() in (0, one.uid):
        fate = _("will be closed")
    else:
        fate = _("goes on: it belongs to another user")
    return row(phrases.program(one), fate)


def _above() -> set[int]:
    """Return the pids of this process and of all that it was started by, but the first."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 1 and pid not in found:
        found.add(pid)
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended, or is hidden
            break
    return found
