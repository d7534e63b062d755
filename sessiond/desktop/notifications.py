"""Notifications of the desktop (Desktop Notifications Specification), with actions.

By the specification's own D-Bus interface, which GNOME, KDE, Xfce and others have, rather than by
GNotification, for which GNOME wants a visible application for each id.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gi.repository import Gio, GLib

BUS = "org.freedesktop.Notifications"
PATH = "/org/freedesktop/Notifications"
DESKTOP_ENTRY = "org.sessiond.Reset"

NORMAL = 1
CRITICAL = 2
_STAYS = 0
"""For an expiry: until somebody closes it."""


@dataclass(frozen=True)
class Notice:
    """What is told. `actions` are labels of buttons, and what they do."""

    title: str
    body: str
    urgency: int = NORMAL
    actions: Mapping[str, Callable[[], None]] = field(default_factory=dict, compare=False)


@dataclass
class _Shown:
    """A notice on its way, or on the display."""

    notice: Notice
    number: int = 0
    """As the desktop has numbered it; 0 until it has answered."""
    sent: Notice | None = None
    """What was sent last; another one is due if it is not the notice."""
    answered: bool = True
    over: bool = False
    dismissed: bool = False


class Notifications:
    """At most one notification for each key, which is replaced or taken back."""

    def __init__(self, bus: Gio.DBusConnection) -> None:
        self._bus = bus
        self._shown: dict[str, _Shown] = {}
        for member, heard in (
            ("ActionInvoked", self._invoked),
            ("NotificationClosed", self._closed),
        ):
            bus.signal_subscribe(
                BUS, BUS, member, PATH, None, Gio.DBusSignalFlags.NONE, _values(heard)
            )

    def show(self, key: str, notice: Notice) -> None:
        """Show it, in place of the one of that key; not if that was closed by hand."""
        shown = self._shown.setdefault(key, _Shown(notice))
        shown.notice = notice
        self._send(shown)

    def take_back(self, key: str) -> None:
        """Close it, if it is shown; the next of that key is a new one."""
        shown = self._shown.pop(key, None)
        if shown is not None:
            shown.over = True
            self._send(shown)

    def _send(self, shown: _Shown) -> None:
        """Bring the desktop up to date, one call after the other."""
        if not shown.answered or shown.dismissed:
            return
        if shown.over:
            if shown.number:
                arguments = GLib.Variant("(u)", (shown.number,))
                self._bus.call(
                    BUS, PATH, BUS, "CloseNotification", arguments, None, 0, -1, None, None
                )
            return
        if shown.sent == shown.notice:
            return
        shown.sent = shown.notice
        shown.answered = False
        self._bus.call(
            BUS, PATH, BUS, "Notify", _arguments(shown), None, 0, -1, None, self._answer_for(shown)
        )

    def _answer_for(self, shown: _Shown) -> Callable[[Gio.DBusConnection, Gio.AsyncResult], None]:
        def answered(bus: Gio.DBusConnection, result: Gio.AsyncResult) -> None:
            shown.answered = True
            try:
                (shown.number,) = bus.call_finish(result).unpack()
            except GLib.Error as error:
                print(f"sessiond-reset: no notification: {error.message}", file=sys.stderr)
            else:
                self._send(shown)

        return answered

    def _invoked(self, number: int, label: str) -> None:
        for shown in list(self._shown.values()):
            if shown.number == number and label in shown.notice.actions:
                shown.notice.actions[label]()

    def _closed(self, number: int, _reason: int) -> None:
        for shown in self._shown.values():
            if shown.number == number:
                shown.dismissed = True


def _arguments(shown: _Shown) -> GLib.Variant:
    notice = shown.notice
    actions = [text for label in notice.actions for text in (label, label)]
    hints = {
        "urgency": GLib.Variant("y", notice.urgency),
        "desktop-entry": GLib.Variant("s", DESKTOP_ENTRY),
    }
    # Of the body, servers may take markup.
    body = GLib.markup_escape_text(notice.body)
    expiry = _STAYS if notice.urgency == CRITICAL else -1
    told = ("sessiond", shown.number, DESKTOP_ENTRY, notice.title, body, actions, hints, expiry)
    return GLib.Variant("(susssasa{sv}i)", told)


def _values(heard: Callable[..., None]) -> Callable[..., None]:
    return lambda *signal: heard(*signal[-1].unpack())
