"""`sessiond-reset --watch`: notifications of a desktop, and their buttons."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon import BOUND, Daemon, wait_until
from tests.support.desktop import NOTIFICATION_SERVER, PYTHON, USER, Desktop


class Notifications:
    """The desktop's, as its user sees and presses them."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server
        self._unread = b""

    def next(self) -> list[object]:
        """Return what the desktop is told next."""
        assert self._server.stdout is not None
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._server.stdout], [], [], BOUND)
            assert readable, "the desktop is told nothing"
            part = os.read(self._server.stdout.fileno(), 4096)
            assert part, "the notification service has ended"
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        told = json.loads(line)
        assert isinstance(told, list)
        return told

    def do(self, *what: object) -> None:
        """Press a button, or close one."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()


@contextmanager
def notifications(desktop: Desktop) -> Iterator[Notifications]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server_file = str(desktop.directory / NOTIFICATION_SERVER)
    with desktop.start_program([PYTHON, server_file], {}, **pipes) as server:
        shown = Notifications(server)
        try:
            assert shown.next() == ["ready"]
            yield shown
        finally:
            server.terminate()


def told_of(daemon: Daemon, name: str) -> str:
    """Return a property of the session, as busctl has it."""
    path, interface = "/org/sessiond/Overlay1/session/desk", "org.sessiond.Overlay1.Session"
    return daemon.busctl("get-property", "org.sessiond.Overlay1", path, interface, name)


def start(desktop: Desktop, shown: Notifications, home: Path) -> int:
    """Start to watch, and return the number of what it shows first: that the session is full."""
    (home / "film").write_bytes(b"x" * 15_500_000)
    desktop.start("--watch")
    what, number, title, _body, buttons, _urgency = shown.next()
    assert (what, buttons) == ("shown", ["Show…"])
    assert str(title).startswith("Your session is")
    assert isinstance(number, int)
    return number


def test_a_reset_is_announced_and_put_off(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    with notifications(desktop) as shown:
        start(desktop, shown, home)
        daemon.sessionctl("schedule-reset", "desk", "--in", "10min", "--warning", "10min")
        what, number, title, body, buttons, urgency = shown.next()
        assert (what, urgency) == ("shown", 2)
        assert title == "Your session will be reset in 10 minutes"
        assert body == "It was scheduled. Save what you need elsewhere."
        assert buttons == ["Reset later", "Show…"]
        shown.do("invoke", number, "Reset later")
        assert shown.next() == ["taken back", number]
        assert told_of(daemon, "Inhibitors").startswith('a(ssut) 1 "Desktop"')
        daemon.sessionctl("cancel-reset", "desk")

        # A reset of which the announcement was missed is told of all the same.
        desktop.end_programs()
        (home / "film").unlink()
        wait_until(lambda: told_of(daemon, "Inhibitors") == "a(ssut) 0\n")
        wait_until(lambda: told_of(daemon, "SpaceLevel") == 's "normal"\n')
        daemon.sessionctl("schedule-reset", "desk", "--in", "50s", "--warning", "0s")
        desktop.start("--watch")
        what, number, title, *_ = shown.next()
        assert what == "shown"
        assert str(title).endswith("seconds")
        daemon.sessionctl("cancel-reset", "desk")
        while (told := shown.next()[:2]) != ["taken back", number]:
            assert told == ["shown", number]  # it counts down, in place


def test_a_lack_of_space_is_told(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    with notifications(desktop) as shown:
        number = start(desktop, shown, home)
        assert desktop.start("--watch").wait(BOUND) == 0  # one is enough
        shown.do("invoke", number, "Show…")
        desktop.wait_text(f"Session of {USER}")
        desktop.wait_text("Storage is nearly full")
        (home / "film").unlink()
        while (told := shown.next()[:2]) != ["taken back", number]:
            assert told == ["shown", number]
        desktop.close_window()


def test_what_was_closed_by_hand_is_not_shown_again(
    daemon: Daemon, desktop: Desktop, home: Path
) -> None:
    with notifications(desktop) as shown:
        start(desktop, shown, home)
        daemon.sessionctl("schedule-reset", "desk", "--in", "100s", "--warning", "100s")
        number = shown.next()[1]
        shown.do("close", number)
        daemon.sessionctl("cancel-reset", "desk")
        daemon.sessionctl("maintenance", "begin", "kiosk", "--message", "Back at <noon>.")
        what, _number, title, body, *_ = shown.next()
        assert (what, title) == ("shown", "Maintenance of this machine begins")
        assert body == "Back at &lt;noon&gt;."
        daemon.sessionctl("maintenance", "cancel")


def test_without_notifications_it_goes_on(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    (home / "film").write_bytes(b"x" * 15_500_000)
    watching = desktop.start("--watch", stderr=subprocess.PIPE)
    assert watching.stderr is not None
    assert "sessiond-reset: no notification:" in watching.stderr.readline()
    assert watching.poll() is None
