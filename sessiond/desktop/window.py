"""The window: what there is of a session, one question at a time, and the job that runs."""

from __future__ import annotations

from collections.abc import Callable

from gi.repository import Adw, Gio, GLib, Gtk

from sessiond.desktop import phrases
from sessiond.desktop.daemon import Daemon, Failure
from sessiond.desktop.differences import Differences
from sessiond.desktop.overview import Overview
from sessiond.desktop.programs import Programs
from sessiond.desktop.progress import Outcome, Progress
from sessiond.desktop.question import Question
from sessiond.desktop.snapshots import Snapshots, Wishes
from sessiond.desktop.state import RUNNING, Job, Session, Snapshot
from sessiond.desktop.widgets import button, describe, name, plain, switch_row
from sessiond.words import _

_SESSION = "session"
_SNAPSHOTS = "snapshots"


class Window(Adw.ApplicationWindow):
    """Shows one session. What `choose` finds may be another one, or none, at any time."""

    def __init__(
        self,
        application: Gtk.Application,
        daemon: Daemon,
        choose: Callable[[list[Session]], Session | None],
    ) -> None:
        super().__init__(
            application=application,
            title=_("Reset Session"),
            default_width=520,
            default_height=680,
        )
        self._daemon = daemon
        self._choose = choose
        self._session: Session | None = None
        self._job = ""
        """Object path of the job that is shown; empty if none is."""
        self._job_seen = False
        self._guest: Gtk.Widget | None = None
        """What is shown in place of the two pages."""

        self._overview = Overview(daemon, self._ask_reset, self._list_changes)
        self._snapshots = Snapshots(
            Wishes(self._ask_snapshot, self._ask_restore, self._ask_edit, self._ask_delete)
        )
        self._pages = Adw.ViewStack()
        for page, page_id, title, icon in (
            (self._overview, _SESSION, _("Session"), "user-home-symbolic"),
            (self._snapshots, _SNAPSHOTS, _("Snapshots"), "document-open-recent-symbolic"),
        ):
            self._pages.add_titled(page, page_id, title).set_icon_name(icon)
        self._place = Gtk.Stack(
            transition_type=Gtk.StackTransitionType.CROSSFADE, vexpand=True, hhomogeneous=False
        )
        self._place.add_child(self._pages)
        self._switcher = Adw.ViewSwitcher(
            stack=self._pages, policy=Adw.ViewSwitcherPolicy.WIDE, visible=True
        )
        self._title = Adw.WindowTitle(title=_("Reset Session"))
        self._back = Gtk.Button(
            icon_name="go-previous-symbolic", tooltip_text=_("Back"), action_name="win.back"
        )
        name(self._back, _("Back"))
        self._header = Adw.HeaderBar()
        self._header.pack_start(self._back)
        content = Gtk.Box(orientation=Gtk.Orientation.VERTICAL)
        content.append(self._header)
        content.append(self._place)
        self.set_content(content)
        self._add_actions()

        self._heard = daemon.connect("changed", lambda _daemon: self._refresh())
        self.connect("close-request", self._closed)
        self._refresh()

    def _add_actions(self) -> None:
        actions: dict[str, Callable[[], None]] = {
            "back": self._go_back,
            "look-again": self._look_again,
            _SESSION: lambda: self._pages.set_visible_child_name(_SESSION),
            _SNAPSHOTS: lambda: self._pages.set_visible_child_name(_SNAPSHOTS),
        }
        for action_name, act in actions.items():
            action = Gio.SimpleAction(name=action_name)
            action.connect("activate", _without_arguments(act))
            self.add_action(action)

    def _closed(self, _window: Gtk.Window) -> bool:
        self._daemon.disconnect(self._heard)
        self._put_away_guest()
        return False

    # What is shown.

    def _refresh(self) -> None:
        found = self._choose(self._daemon.sessions())
        if self._job:
            self._follow_job()
        elif not self._daemon.present:
            self._session = None
            self._show_message(*self._absence())
        elif found is None:
            self._session = None
            self._show_message(
                "user-home-symbolic",
                _("There is no session"),
                _("You do not work in a session of sessiond, so there is nothing to reset."),
            )
        else:
            self._show_session(found)

    def _absence(self) -> tuple[str, str, str]:
        if not self._daemon.known:
            return "content-loading-symbolic", _("Looking for your session…"), ""
        return (
            "network-offline-symbolic",
            _("sessiond cannot be reached"),
            _("It is not running on this machine, or does not answer."),
        )

    def _show_session(self, session: Session) -> None:
        if self._session is None or self._session.path != session.path:
            self._put_away_guest()  # it is about something else
        self._session = session
        self._overview.show_session(session)
        snapshots = [self._daemon.snapshot(path) for path in session.snapshots]
        self._snapshots.show_snapshots([one for one in snapshots if one is not None])
        job = self._daemon.job(session.last_job)
        if job is not None and job.state == RUNNING:
            self._show_job(job.path)
        elif self._guest is None or isinstance(self._guest, _Message):
            self._show(None)
            self._overview.reset_button.grab_focus()

    def _show_message(self, icon: str, title: str, text: str) -> None:
        known = self._daemon.known
        message = _Message(icon, title, text, self._look_again if known else None)
        if not message.is_like(self._guest):
            self._show(message, leave=False)

    def _show(self, guest: Gtk.Widget | None, *, leave: bool = True) -> None:
        """Show `guest` in place of the pages of the session, or them if it is None.

        With `leave`, one can go back to them.
        """
        self._put_away_guest()
        self._guest = guest
        if guest is not None:
            self._place.add_child(guest)
        self._place.set_visible_child(guest or self._pages)
        self._header.set_title_widget(self._switcher if guest is None else self._title)
        if self._session is not None:
            self._title.set_subtitle(phrases.shown(self._session.user))
        self._back.set_visible(guest is not None and leave)

    def _put_away_guest(self) -> None:
        if self._guest is None:
            return
        if isinstance(self._guest, Differences):
            self._guest.stop()
        self._place.set_visible_child(self._pages)
        self._place.remove(self._guest)
        self._guest = None

    def _go_back(self) -> None:
        if isinstance(self._guest, Question) and self._guest.pending:
            return
        if self._guest is not None and self._back.get_visible():
            self._job = ""
            self._put_away_guest()
            self._refresh()

    def _look_again(self) -> None:
        if not self._daemon.present:
            self._daemon.start()
        self._overview.look_again()

    # Jobs.

    def _show_job(self, path: str) -> None:
        if path == self._job:  # the daemon's properties were there before its answer
            return
        self._job = path
        self._job_seen = False
        self._show(Progress(self._cancel_job), leave=False)
        self._follow_job()

    def _follow_job(self) -> None:
        shown = self._guest
        if not isinstance(shown, Progress):
            return  # it has ended, and what came of it is being read
        job = self._daemon.job(self._job)
        if not self._daemon.present:
            shown.show_absence()
        elif job is None:
            if self._job_seen:
                self._show_outcome(None)
            else:
                shown.show_waiting()
        elif job.state == RUNNING:
            self._job_seen = True
            shown.show_job(job)
        else:
            self._show_outcome(job)

    def _show_outcome(self, job: Job | None) -> None:
        outcome = Outcome(job, self._go_back)
        self._show(outcome)
        outcome.leave_button.grab_focus()

    def _cancel_job(self) -> None:
        job = self._daemon.job(self._job)
        if job is not None:
            nothing = GLib.Variant("()", ())
            # Where that is refused, the job goes on, and the page goes on to say so.
            self._daemon.call(job, "Cancel", nothing, lambda *_: None, self._not_cancelled)

    def _not_cancelled(self, _failure: Failure) -> None:
        if isinstance(self._guest, Progress):
            self._show(Progress(self._cancel_job), leave=False)
            self._follow_job()

    # Questions.

    def _list_changes(self) -> None:
        if self._session is not None:
            self._title.set_title(_("Changes"))
            self._show(Differences(self._daemon, self._session))

    def _ask(self, question: Question, focus: Gtk.Widget | None = None) -> None:
        self._title.set_title(_("Reset Session"))
        self._show(question)
        (focus or question.cancel_button).grab_focus()

    def _ask_reset(self) -> None:
        session = self._session
        if session is None:
            return
        keeping, keep = switch_row(
            _("_Keep a snapshot first"), _("You can go back to it on the page “Snapshots”."), False
        )
        choices = Adw.PreferencesGroup()
        choices.add(keeping)
        programs = Programs(self._daemon, session)

        def act(_done: Callable[[], None], failed: Callable[[Failure], None]) -> None:
            options = {
                "terminate": GLib.Variant("b", programs.to_be_closed),
                "snapshot-first": GLib.Variant("b", keep.get_active()),
            }
            arguments = GLib.Variant("(a{sv})", (options,))
            self._daemon.call(session, "Reset", arguments, self._show_job, failed)

        changes = self._overview.changes
        text = _("Everything becomes as it is in the image. What you have made or changed is lost.")
        if changes:
            text = f"{text}\n{phrases.changes(changes)}"
        self._ask(
            Question(
                _("Reset this session?"),
                text,
                [choices, programs],
                (_("_Reset"), "destructive-action"),
                act,
                self._go_back,
            )
        )

    def _ask_restore(self, snapshot: Snapshot) -> None:
        session = self._session
        if session is None:
            return
        programs = Programs(self._daemon, session)

        def act(_done: Callable[[], None], failed: Callable[[Failure], None]) -> None:
            options = {"terminate": GLib.Variant("b", programs.to_be_closed)}
            arguments = GLib.Variant("(sa{sv})", (snapshot.name, options))
            self._daemon.call(session, "Restore", arguments, self._show_job, failed)

        self._ask(
            Question(
                _("Restore “{name}”?").format(name=phrases.shown(snapshot.name)),
                _(
                    "The session becomes as it was then ({moment}). "
                    "What it is now is kept as another snapshot."
                ).format(moment=phrases.moment(snapshot.created_at)),
                [programs],
                (_("_Restore"), "destructive-action"),
                act,
                self._go_back,
            )
        )

    def _ask_delete(self, snapshot: Snapshot) -> None:
        def act(done: Callable[[], None], failed: Callable[[Failure], None]) -> None:
            self._daemon.call(snapshot, "Delete", GLib.Variant("()", ()), done, failed)

        self._ask(
            Question(
                _("Delete “{name}”?").format(name=phrases.shown(snapshot.name)),
                _("The session itself stays as it is. This cannot be undone."),
                [],
                (_("_Delete"), "destructive-action"),
                act,
                self._go_back,
            )
        )

    def _ask_snapshot(self) -> None:
        session = self._session
        if session is None:
            return
        proposed = GLib.DateTime.new_now_local().format("%Y-%m-%d-%H%M%S")
        form, entry, description = _form(proposed, "")

        def act(done: Callable[[], None], failed: Callable[[Failure], None]) -> None:
            options = {"description": GLib.Variant("s", description.get_text())}
            arguments = GLib.Variant("(sa{sv})", (entry.get_text(), options))
            self._daemon.call(session, "Snapshot", arguments, lambda _path: done(), failed)

        question = Question(
            _("Keep a snapshot?"),
            _("The session is kept as it is now, and can be restored later."),
            [form],
            (_("_Keep"), "suggested-action"),
            act,
            self._go_back,
        )
        self._ask_form(question, entry, description)

    def _ask_edit(self, snapshot: Snapshot) -> None:
        form, entry, description = _form(snapshot.name, snapshot.description)

        def act(done: Callable[[], None], failed: Callable[[Failure], None]) -> None:
            def rename() -> None:
                if entry.get_text() == snapshot.name:
                    done()
                else:
                    arguments = GLib.Variant("(s)", (entry.get_text(),))
                    self._daemon.call(snapshot, "Rename", arguments, done, failed)

            # The description first: once renamed, the snapshot has another object path.
            arguments = GLib.Variant("(s)", (description.get_text(),))
            self._daemon.call(snapshot, "Describe", arguments, rename, failed)

        question = Question(
            _("Edit “{name}”").format(name=phrases.shown(snapshot.name)),
            "",
            [form],
            (_("_Save"), "suggested-action"),
            act,
            self._go_back,
        )
        self._ask_form(question, entry, description)

    def _ask_form(self, question: Question, *entries: Gtk.Widget) -> None:
        for entry in entries:
            entry.connect("entry-activated", lambda _entry: question.confirm())
        self._ask(question, entries[0])


class _Message(Adw.Bin):
    """Why no session is shown, with a button if there is something to try."""

    def __init__(
        self, icon: str, title: str, text: str, try_again: Callable[[], None] | None
    ) -> None:
        super().__init__()
        self._told = (title, text)
        page = Adw.StatusPage(icon_name=icon, title=plain(title), description=plain(text))
        if try_again is not None:
            again = button(_("_Try again"), try_again, "pill")
            again.set_halign(Gtk.Align.CENTER)
            describe(again, " ".join(self._told))
            page.set_child(again)
        self.set_child(page)

    def is_like(self, other: Gtk.Widget | None) -> bool:
        """Say whether `other` tells the same."""
        return isinstance(other, _Message) and other._told == self._told


def _form(proposed: str, described: str) -> tuple[Gtk.Widget, Adw.EntryRow, Adw.EntryRow]:
    entry = Adw.EntryRow(title=_("Name"), text=proposed)
    description = Adw.EntryRow(title=_("Description"), text=described)
    form = Adw.PreferencesGroup()
    form.add(entry)
    form.add(description)
    return form, entry, description


def _without_arguments(act: Callable[[], None]) -> Callable[..., None]:
    return lambda _action, _parameter: act()
