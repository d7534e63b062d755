"""`sessiond-reset --watch`: tells the desktop's user what happens to the session by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from gi.repository import Gio, GLib

from sessiond.desktop import phrases
from sessiond.desktop.daemon import BUS, MANAGER, Daemon, Failure
from sessiond.desktop.notifications import CRITICAL, NORMAL, Notice, Notifications
from sessiond.desktop.state import Session
from sessiond.words import _

APPLICATION = "org.sessiond.Reset.Watch"

LATER = 15 * 60
"""Seconds for which a reset is put off; then it is announced anew."""
_SOON = 60
"""Seconds before a reset from which it is told of, even if the announcement was missed."""
_SECOND = 1_000_000

_SPACE, _RESET, _MAINTENANCE = "space", "reset", "maintenance"


class Watch:
    """Follows one session, and shows what its user should know."""

    def __init__(
        self,
        daemon: Daemon,
        notifications: Notifications,
        choose: Callable[[list[Session]], Session | None],
        show_window: Callable[[], None],
    ) -> None:
        self._daemon = daemon
        self._notifications = notifications
        self._choose = choose
        self._show_window = show_window
        self._session: Session | None = None
        self._next_reset = 0
        """When the session was to be reset by itself, when that was looked at last."""
        self._announced = 0
        """The time for which a reset is announced; 0 if none is to come soon."""
        self._why = ""
        self._lock: int | None = None
        """What holds resets back while it is open."""
        self._ticking = False
        self._listening = False
        daemon.connect("changed", lambda _daemon: self._look())

    def _look(self) -> None:
        if self._daemon.present and not self._listening:
            self._listening = True
            self._daemon.on_signal(f"{BUS}.Session", "ResetScheduled", self._scheduled)
            self._daemon.on_signal(MANAGER, "MaintenanceAnnounced", self._maintained)
        session = self._choose(self._daemon.sessions())
        self._session = session
        self._look_at_reset()
        if session is None:
            self._let_go()
        self._tell_space("normal" if session is None else session.space_level)
        self._tell_reset()

    def _tell_space(self, level: str) -> None:
        if level == "normal":
            self._notifications.take_back(_SPACE)
            return
        critical = level == "critical"
        title = _("Your session is full") if critical else _("Your session is nearly full")
        body = _("Delete files or snapshots that you do not need, or reset the session.")
        self._notifications.show(
            _SPACE, Notice(title, body, CRITICAL if critical else NORMAL, self._showing())
        )

    def _look_at_reset(self) -> None:
        """Forget an announcement that no longer holds, and make up for one that was missed.

        The property may come after the signal that announces its value: only a change of it says
        that the announcement is over.
        """
        when = 0 if self._session is None else self._session.next_reset
        if when != self._next_reset:
            self._next_reset = when
            if abs(when - self._announced) > _SECOND:
                self._announced = 0
        if self._session is not None and when and _left(when) <= _SOON:
            self._announced = when
            self._why = self._session.next_reset_reason

    def _scheduled(self, path: str, when: int, why: str) -> None:
        if self._session is not None and path == self._session.path:
            self._announced, self._why = when, why
            self._tell_reset()

    def _tell_reset(self) -> None:
        """Show how long it is until the reset, as long as one is to come."""
        if not self._announced or self._session is None:
            self._notifications.take_back(_RESET)
            return
        body = " ".join(
            filter(
                None,
                (
                    phrases.reason(self._why),
                    _("Save what you need elsewhere."),
                ),
            )
        )
        title = _("Your session will be reset {remaining}").format(
            remaining=phrases.remaining(_left(self._announced))
        )
        actions = {_("Reset later"): self._put_off, **self._showing()}
        self._notifications.show(_RESET, Notice(title, body, CRITICAL, actions))
        if not self._ticking:
            self._ticking = True
            GLib.timeout_add_seconds(1, self._tick)

    def _tick(self) -> bool:
        self._ticking = False
        self._look_at_reset()
        self._tell_reset()
        return bool(GLib.SOURCE_REMOVE)

    def _put_off(self) -> None:
        if self._session is not None:
            arguments = GLib.Variant("(ss)", (_("Desktop"), _("The user is not ready yet.")))
            self._daemon.call_for_descriptor(
                self._session, "Inhibit", arguments, self._held, self._not_held
            )

    def _held(self, lock: int) -> None:
        self._let_go()
        self._lock = lock
        GLib.timeout_add_seconds(LATER, self._let_go_of, lock)

    def _let_go_of(self, lock: int) -> bool:
        if self._lock == lock:
            self._let_go()
        return bool(GLib.SOURCE_REMOVE)

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _not_held(self, failure: Failure) -> None:
        body = " ".join(filter(None, (phrases.failure(failure.name), failure.text)))
        self._notifications.take_back(_RESET)
        self._notifications.show(
            _RESET, Notice(_("The reset cannot be put off"), body, CRITICAL, self._showing())
        )

    def _maintained(self, _path: str, _profile: str, message: str) -> None:
        self._notifications.take_back(_MAINTENANCE)
        self._notifications.show(
            _MAINTENANCE, Notice(_("Maintenance of this machine begins"), phrases.shown(message))
        )

    def _showing(self) -> dict[str, Callable[[], None]]:
        return {_("Show…"): self._show_window}


def _left(when: int) -> float:
    return when / _SECOND - time.time()


def watch(choose: Callable[[list[Session]], Session | None], show_window: Sequence[str]) -> int:
    """Watch until the desktop ends, and return the exit code; `show_window` is a command.

    A second one on the same desktop ends at once.
    """
    application = Gio.Application(application_id=APPLICATION)
    kept: list[Watch] = []

    def start(application: Gio.Application) -> None:
        application.hold()
        daemon = Daemon()
        notifications = Notifications(application.get_dbus_connection())
        kept.append(Watch(daemon, notifications, choose, _running(show_window)))
        daemon.start()

    application.connect("startup", start)
    application.connect("activate", lambda _application: None)
    return int(application.run([]))


def _running(command: Sequence[str]) -> Callable[[], None]:
    def run() -> None:
        launched = Gio.Subprocess.new(list(command), Gio.SubprocessFlags.NONE)
        launched.wait_async(None, None)

    return run
