"""The page of a session: whose it is, how much was changed, and the button."""

from __future__ import annotations

from collections.abc import Callable

from gi.repository import GLib, Gtk

from sessiond.desktop import phrases
from sessiond.desktop.daemon import Daemon, Failure
from sessiond.desktop.state import Changes, Session
from sessiond.desktop.widgets import Rows, button, page, plain, row, with_buttons
from sessiond.words import _, pgettext


class Overview(Gtk.Box):
    """What there is to know of a session before it is reset."""

    def __init__(
        self, daemon: Daemon, reset: Callable[[], None], all_changes: Callable[[], None]
    ) -> None:
        super().__init__()
        self._daemon = daemon
        self._all_changes = all_changes
        self._session: Session | None = None
        self._usage = ""
        self.changes: Changes | None = None
        """How much was changed; None until that is known."""
        self._failure: Failure | None = None
        self._told: tuple[object, ...] = ()
        """What is shown."""
        self._about = Rows(_("Session"))
        self._differences = Rows(
            _("Changes"), _("How the session differs from the image that it started from.")
        )
        self.reset_button = button(_("_Reset…"), reset, "destructive-action")
        self.append(with_buttons(page(self._about, self._differences), self.reset_button))

    def show_session(self, session: Session) -> None:
        """Show this session; what has to be asked for is asked for anew if it may be another."""
        before, self._session = self._session, session
        stale = before is None or _counted(before) != _counted(session)
        if stale:
            self.look_again()
        self._show()

    def look_again(self) -> None:
        """Ask how much was changed, and is used, by now."""
        session = self._session
        if session is None:
            return

        def counted(summary: dict[str, object]) -> None:
            if session.path == self._path:
                self.changes, self._failure = Changes.of(summary), None
                self._show()

        def failed(failure: Failure) -> None:
            if session.path == self._path:
                self.changes, self._failure = None, failure
                self._show()

        def read(now: Session) -> None:
            if now.path == self._path:
                self._usage = _usage(now)
                self._show()

        self._daemon.call(session, "Changes", GLib.Variant("(a{sv})", ({},)), counted, failed)
        self._daemon.read_anew(session, read, lambda _failure: None)

    @property
    def _path(self) -> str:
        return self._session.path if self._session else ""

    def _show(self) -> None:
        assert self._session is not None
        told = (self._session, self._usage, self.changes, self._failure)
        if told == self._told:
            return  # whoever is at one of the rows keeps it
        self._told = told
        heading = _("Session of {user}").format(user=self._session.user)
        self._about.set_title(plain(heading))
        self._about.set_description(
            plain(
                _("{session}, with the profile {profile}").format(
                    session=self._session.id, profile=self._session.profile
                )
            )
        )
        self._about.show_rows(_facts(self._session, self._usage))
        self._differences.show_rows(self._amounts())

    def _amounts(self) -> list[Gtk.Widget]:
        if self._failure is not None:
            told = f"{phrases.failure(self._failure.name)} {self._failure.text}"
            if self._session is not None and not self._session.is_mounted:
                told = _("The session is not mounted")
            return [row(_("It is not known what was changed"), told)]
        if self.changes is None:
            return [row(_("Counting…"))]
        amount = row(phrases.changes(self.changes))
        if not self.changes:
            return [amount]
        amount.set_subtitle(_("{size} in files").format(size=phrases.size(self.changes.bytes)))
        show_all = button(_("_All changes"), self._all_changes)
        show_all.set_valign(Gtk.Align.CENTER)
        amount.add_suffix(show_all)
        return [amount, *(_file(*one) for one in self.changes.largest)]


def _counted(session: Session) -> tuple[object, ...]:
    """Return what has to be the same for what was counted to hold, if no program changes files."""
    return session.path, session.is_mounted, session.last_reset, session.last_job


def _file(path: str, kind: str, size: int) -> Gtk.Widget:
    shown = row(path, phrases.kind(kind))
    shown.set_title_lines(2)
    shown.add_suffix(Gtk.Label(label=phrases.size(size), css_classes=["dim-label", "numeric"]))
    return shown


def _facts(session: Session, usage: str) -> list[Gtk.Widget]:
    facts = []
    if not session.is_mounted:
        trouble = row(_("The session is not mounted"), session.failure)
        trouble.add_css_class("error")
        facts.append(trouble)
    facts.append(row(_("Started"), phrases.moment(session.created_at)))
    if session.last_reset:
        facts.append(row(_("Last reset"), phrases.moment(session.last_reset)))
    if session.next_reset:
        when = phrases.moment(session.next_reset)
        why = phrases.reason(session.next_reset_reason)
        coming = row(_("Next reset"))
        coming.set_subtitle("\n".join(map(plain, filter(None, (when, why)))))
        facts.append(coming)
    where = {
        "tmpfs": _("In memory: lost when the machine is switched off"),
        "persistent": _("On disk"),
    }
    storage = row(pgettext("where a session is", "Storage"), where.get(session.storage, ""))
    if usage:
        storage.add_suffix(Gtk.Label(label=usage, css_classes=["numeric"]))
    if session.space_level != "normal":
        storage.add_css_class("warning")
        storage.set_title(_("Storage is nearly full"))
    facts.append(storage)
    return facts


def _usage(session: Session) -> str:
    if not session.bytes_limit:
        return ""  # it is the whole file system that is counted then
    return _("{used} of {limit}").format(
        used=phrases.size(session.bytes_used), limit=phrases.size(session.bytes_limit)
    )
