"""The pages of a job: how far it is, and what came of it."""

from __future__ import annotations

from collections.abc import Callable

from gi.repository import Adw, GLib, Gtk

from sessiond.desktop import phrases
from sessiond.desktop.state import Job
from sessiond.desktop.widgets import SPACE, button, describe, name, plain
from sessiond.words import _

_PULSE = 100
"""Milliseconds between two steps of a bar that only says that something goes on."""


class Progress(Gtk.Box):
    """A job that runs."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        super().__init__(orientation=Gtk.Orientation.VERTICAL)
        self._cancel = cancel
        self._bar = Gtk.ProgressBar(valign=Gtk.Align.CENTER, show_text=True)
        self.cancel_button = button(_("_Cancel"), self._cancelled, "pill")
        self.cancel_button.set_halign(Gtk.Align.CENTER)
        content = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, spacing=2 * SPACE)
        content.append(self._bar)
        content.append(self.cancel_button)
        self._page = Adw.StatusPage(
            icon_name="emblem-synchronizing-symbolic", child=content, vexpand=True
        )
        self.append(self._page)
        self._pulse = 0
        self.connect("unmap", lambda _page: self._stop_pulse())

    def show_job(self, job: Job) -> None:
        """Show how far it is."""
        self._say(phrases.begun(job.operation))
        if job.progress_valid:
            self._stop_pulse()
            self._bar.set_text(None)  # the percentage
            self._bar.set_fraction(job.progress)
        else:
            self.show_waiting()

    def show_absence(self) -> None:
        """Show that nobody knows, for the moment."""
        self._say(_("Waiting for sessiond…"))
        self.show_waiting()

    def show_waiting(self) -> None:
        """Show that something goes on, whatever it is."""
        self._bar.set_text(" ")
        if not self._pulse:
            self._pulse = GLib.timeout_add(_PULSE, self._step)

    def _say(self, text: str) -> None:
        self._page.set_title(plain(text))
        name(self._bar, text)

    def _cancelled(self) -> None:
        self.cancel_button.set_sensitive(False)
        self.cancel_button.set_label(_("Cancelling…"))
        self._cancel()

    def _step(self) -> bool:
        self._bar.pulse()
        return bool(GLib.SOURCE_CONTINUE)

    def _stop_pulse(self) -> None:
        if self._pulse:
            GLib.source_remove(self._pulse)
            self._pulse = 0


class Outcome(Gtk.Box):
    """A job that has ended; None is one of which nobody knows what came of it."""

    def __init__(self, job: Job | None, leave: Callable[[], None]) -> None:
        super().__init__(orientation=Gtk.Orientation.VERTICAL)
        heading, text, details = _told(job)
        good = not text
        self.leave_button = button(_("_Back"), leave, "pill")
        self.leave_button.set_halign(Gtk.Align.CENTER)
        describe(self.leave_button, " ".join((heading, text)))
        content = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, spacing=2 * SPACE)
        if details:
            content.append(
                Gtk.Label(
                    label=phrases.shown(details),
                    wrap=True,
                    selectable=True,
                    focusable=False,
                    justify=Gtk.Justification.CENTER,
                    css_classes=["dim-label"],
                )
            )
        content.append(self.leave_button)
        self.append(
            Adw.StatusPage(
                icon_name="object-select-symbolic" if good else "dialog-error-symbolic",
                title=plain(heading),
                description=plain(text),
                child=content,
                vexpand=True,
            )
        )


def _told(job: Job | None) -> tuple[str, str, str]:
    """Return a heading, a sentence, and what the daemon said."""
    if job is None:
        return _("It is not known what came of it"), _("sessiond has been started again."), ""
    if not job.error_name:
        return phrases.ended(job), "", ""
    return phrases.ended(job), phrases.failure(job.error_name), job.error_message
