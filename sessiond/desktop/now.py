"""`sessiond-reset --now`: a reset without a window, for a key or a script."""

from __future__ import annotations

import sys
from collections.abc import Callable

from gi.repository import GLib

from sessiond.desktop import phrases
from sessiond.desktop.daemon import Daemon, Failure
from sessiond.desktop.state import RUNNING, Session

EXIT_CODES = {
    "NoSuchSession": 3,
    "NoSuchSnapshot": 3,
    "NoSuchProfile": 3,
    "NotAuthorized": 4,
    "InteractiveAuthorizationRequired": 4,
    "AccessDenied": 4,
    "Busy": 5,
    "NoSpace": 6,
    "Disconnected": 7,
    "NameHasNoOwner": 7,
    "NoReply": 7,
    "ServiceUnknown": 7,
    "TimedOut": 7,
    "SessionExists": 8,
    "SnapshotExists": 8,
    "ImageUnavailable": 9,
    "NotSupported": 10,
    "Cancelled": 11,
    "Interrupted": 12,
}
"""By the last part of the D-Bus error name, as sessionctl ends; all others are 1."""

NO_BUS = 7
INTERRUPTED_BY_USER = 130


class _Run:
    """Waits for the daemon, starts the job, and waits for its end."""

    def __init__(
        self, choose: Callable[[list[Session]], Session | None], options: dict[str, GLib.Variant]
    ) -> None:
        self._choose = choose
        self._options = options
        self._daemon = Daemon()
        self._daemon.connect("changed", lambda _daemon: self._look())
        self._loop = GLib.MainLoop()
        self._asked = False
        self._job = ""
        self._job_seen = False
        self._code = 0

    def run(self) -> int:
        """Return the exit code."""
        self._daemon.start()
        self._loop.run()
        return self._code

    def _look(self) -> None:
        if self._asked:
            self._follow()
        elif self._daemon.failure is not None:
            self._fail(self._daemon.failure)
        elif not self._daemon.present:
            self._fail(Failure("org.freedesktop.DBus.Error.ServiceUnknown", ""))
        else:
            self._ask()

    def _ask(self) -> None:
        session = self._choose(self._daemon.sessions())
        if session is None:
            self._fail(Failure("org.sessiond.Overlay1.Error.NoSuchSession", ""))
            return
        self._asked = True
        arguments = GLib.Variant("(a{sv})", (self._options,))
        self._daemon.call(session, "Reset", arguments, self._begun, self._fail)

    def _begun(self, path: str) -> None:
        self._job = path
        self._follow()

    def _follow(self) -> None:
        job = self._daemon.job(self._job) if self._job and self._daemon.present else None
        if job is None:
            if self._job_seen and self._daemon.present:
                self._fail(Failure("org.sessiond.Overlay1.Error.NoSuchJob", ""))
        elif job.state == RUNNING:
            self._job_seen = True
        elif job.error_name:
            self._fail(Failure(job.error_name, job.error_message))
        else:
            self._loop.quit()

    def _fail(self, failure: Failure) -> None:
        told = " ".join(filter(None, (phrases.failure(failure.name), failure.text)))
        print(f"sessiond-reset: {told}", file=sys.stderr)
        self._code = exit_code(failure)
        self._loop.quit()


def exit_code(failure: Failure) -> int:
    """Return the code that reports a failure."""
    if not failure.name or ".Spawn." in failure.name:
        return NO_BUS
    return EXIT_CODES.get(failure.name.rpartition(".")[2], 1)


def reset_now(
    choose: Callable[[list[Session]], Session | None], *, terminate: bool, snapshot: bool
) -> int:
    """Reset the session that is chosen, and return the exit code when that has ended.

    `terminate` closes the programs that use it first; `snapshot` keeps what there is.
    """
    options = {
        "terminate": GLib.Variant("b", terminate),
        "snapshot-first": GLib.Variant("b", snapshot),
    }
    try:
        return _Run(choose, options).run()
    except KeyboardInterrupt:
        return INTERRUPTED_BY_USER  # what was begun goes on
