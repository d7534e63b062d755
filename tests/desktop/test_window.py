"""The window, used by pointer and keyboard, on the real daemon; each state leaves a screenshot."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.desktop.conftest import create
from tests.support.daemon import BOUND, Daemon, wait_until
from tests.support.desktop import PYTHON, STUBBORN, USER, Desktop, working_in


def test_a_session_is_reset_by_the_pointer(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    with working_in(home, "cat") as program, working_in(home, "tee", uid=0) as other:
        desktop.start()
        desktop.wait_text("2 added, 1 changed, 1 deleted")
        desktop.find("label", f"/home/{USER}/notes & <b>plans.txt")
        desktop.screenshot("session")
        desktop.click("push button", "Reset…")
        desktop.wait_text("goes on: it belongs to another user")
        shown = [one.name for one in desktop.widgets() if one.role == "label"]
        assert shown[shown.index("cat") + 1] == "will be closed"
        assert shown[shown.index("tee") + 1] == "goes on: it belongs to another user"
        desktop.screenshot("question")
        desktop.click("check box", "Keep a snapshot first")
        desktop.click("push button", "Reset")
        desktop.wait_text("The session has been reset")
        desktop.screenshot("reset")
        assert program.wait(BOUND) != 0
        assert other.poll() is None
    assert [one.name for one in home.iterdir()] == [".profile"]
    (snapshot,) = daemon.snapshots("desk")
    assert snapshot.startswith("before-reset-")
    desktop.click("push button", "Back")
    desktop.wait_text("Nothing has been changed")


def test_who_would_end_their_own_desktop_is_told(
    daemon: Daemon, desktop: Desktop, home: Path
) -> None:
    # As on a desktop whose programs were started by one that works in the session.
    shell = ["sh", "-c", f"cd {home}; {desktop.program} & wait"]
    with desktop.start_program(shell, {}, start_new_session=True) as started:
        try:
            desktop.find("push button", "Reset…")
            desktop.focus()
            desktop.press("Return")
            desktop.wait_text("This window may close, too")
            desktop.screenshot("own-desktop")
            desktop.press("alt+p")
            desktop.wait_text("goes on")
            assert not any("This window" in one.name for one in desktop.widgets())
        finally:
            os.killpg(started.pid, signal.SIGTERM)


def test_a_job_is_cancelled_by_the_keyboard(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    with working_in(home, PYTHON, "-c", STUBBORN) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        desktop.start()
        desktop.wait_focus("Reset…")
        desktop.focus()
        desktop.press("Return")
        desktop.wait_text("python3")
        desktop.wait_focus("Cancel")  # so that who presses Return twice loses nothing
        desktop.press("alt+r")
        desktop.wait_text("Resetting the session…")
        desktop.screenshot("progress")
        desktop.press("alt+c")
        desktop.wait_text("It was cancelled. The session is as it was.")
        desktop.screenshot("cancelled")
        assert program.poll() is None
    assert (home / "draft.txt").exists()
    desktop.press("Escape")
    desktop.wait_focus("Reset…")


def test_all_changes_are_listed(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    (home / "a\nb\N{RIGHT-TO-LEFT OVERRIDE}").touch()
    (home / "draft.txt").rename(home / "final.txt")
    desktop.start()
    desktop.wait_text("3 added")
    desktop.focus()
    desktop.press("alt+a")
    desktop.wait_text("5 paths differ.")
    desktop.find("label", f"/home/{USER}/notes & <b>plans.txt")
    desktop.find("label", f"/home/{USER}/a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}")
    desktop.screenshot("changes")
    desktop.click("push button", "Back")
    desktop.find("push button", "Reset…")


def test_snapshots_are_made_edited_restored_and_deleted(
    daemon: Daemon, desktop: Desktop, home: Path
) -> None:
    desktop.start()
    desktop.find("push button", "Reset…")
    desktop.focus()
    desktop.press("alt+2")
    desktop.wait_text("There are no snapshots")
    desktop.press("alt+k")
    desktop.wait_text("Keep a snapshot?")
    desktop.write("no/name")
    desktop.press("Return")
    desktop.wait_text("This name cannot be used.")
    desktop.screenshot("refused")
    desktop.press("Escape")
    desktop.wait_text("There are no snapshots")
    desktop.press("alt+k")
    desktop.wait_text("Keep a snapshot?")
    desktop.write("monday")
    desktop.press("Tab")
    desktop.write("Before the exam")
    desktop.press("Return")
    desktop.wait_text("Before the exam")
    assert daemon.snapshots("desk") == ["monday"]
    desktop.screenshot("snapshots")

    desktop.click("push button", "Edit snapshot monday")
    desktop.wait_text("Edit “monday”")
    desktop.screenshot("edit")
    desktop.write("tuesday")
    desktop.press("Return")
    desktop.click("push button", "Restore snapshot tuesday")
    desktop.wait_text("Restore “tuesday”?")
    desktop.screenshot("restore")
    (home / "draft.txt").unlink()
    desktop.press("alt+r")
    desktop.wait_text("The snapshot has been restored")
    assert (home / "draft.txt").exists()
    desktop.press("Return")

    desktop.click("push button", "Delete snapshot tuesday")
    desktop.wait_text("Delete “tuesday”?")
    desktop.screenshot("delete")
    desktop.press("alt+d")
    wait_until(lambda: "tuesday" not in daemon.snapshots("desk"))
    (undo,) = daemon.snapshots("desk")
    desktop.find("push button", f"Restore snapshot {undo}")


def test_what_comes_and_goes_is_followed(daemon: Daemon, desktop: Desktop) -> None:
    desktop.start()
    desktop.wait_text("There is no session")
    desktop.screenshot("no-session")
    create(daemon, USER, "desk")
    desktop.wait_text(f"Session of {USER}")
    daemon.kill()
    desktop.wait_text("sessiond cannot be reached")
    desktop.screenshot("no-daemon")
    daemon.start()
    desktop.wait_text(f"Session of {USER}")
    desktop.click("push button", "Reset…")
    desktop.wait_text("No program uses the session")
    daemon.sessionctl("close", "desk")
    desktop.wait_text("There is no session")


def test_what_others_do_to_the_session_is_shown(
    daemon: Daemon, desktop: Desktop, home: Path
) -> None:
    with working_in(home, PYTHON, "-c", STUBBORN) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        desktop.start()
        desktop.wait_text("2 added")
        with daemon.calling("reset", "desk", "--terminate") as other:
            desktop.wait_text("Resetting the session…")
            desktop.click("push button", "Cancel")
            desktop.wait_text("Cancelled")
            assert other.wait(BOUND) == 11


def test_without_space_nothing_is_lost(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    with suppress(OSError), open(home / "film", "wb", buffering=0) as film:
        while film.write(b"x" * 65536):
            pass
    for number in range(2000):
        try:
            (home / f"empty{number}").touch()
        except OSError:
            break
    desktop.start()
    desktop.wait_text("Storage is nearly full")
    desktop.focus()
    desktop.press("alt+2")
    desktop.wait_text("There are no snapshots")
    desktop.press("alt+k")
    desktop.wait_text("Keep a snapshot?")
    desktop.press("Return")
    desktop.wait_text("There is not enough space.")
    desktop.screenshot("no-space")
    assert (home / "draft.txt").exists()
    desktop.press("Escape", "alt+1")
    desktop.find("push button", "Reset…")
    desktop.press("alt+r")
    desktop.wait_text("No program uses the session")
    desktop.press("alt+r")
    desktop.wait_text("The session has been reset")
    assert not (home / "film").exists()


def test_a_job_outlives_the_daemon(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    with working_in(home, PYTHON, "-c", STUBBORN) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        desktop.start()
        desktop.find("push button", "Reset…")
        desktop.focus()
        desktop.press("Return")
        desktop.wait_text("python3")
        desktop.press("alt+r")
        desktop.wait_text("Resetting the session…")
        assert program.stdout.readline() == b"asked\n"  # by then the job has been noted
        daemon.kill()
        desktop.wait_text("Waiting for sessiond…")
        daemon.start()
        desktop.wait_text("It was interrupted, and the session is as it was.")
        desktop.screenshot("interrupted")
    assert (home / "draft.txt").exists()


def test_what_is_not_allowed_is_said(daemon: Daemon, desktop: Desktop) -> None:
    create(daemon, "root", "other")
    file = daemon.root("other") / "file"
    file.touch()
    desktop.start("--session", "other")
    desktop.wait_text("Session of root")
    desktop.wait_text("It is not known what was changed")
    desktop.click("push button", "Reset…")
    desktop.wait_text("The programs could not be listed")
    desktop.click("push button", "Reset")
    desktop.wait_text("You are not allowed to do this.")
    desktop.screenshot("not-allowed")
    assert file.exists()


def test_a_session_that_is_not_mounted(daemon: Daemon, desktop: Desktop) -> None:
    create(daemon, USER, "desk", "kiosk")
    image, away = daemon.directory / "image.squashfs", daemon.directory / "away"
    daemon.stop()
    image.rename(away)
    try:
        daemon.start()
        desktop.start()
        desktop.wait_text("The session is not mounted")
        desktop.screenshot("not-mounted")
        desktop.click("push button", "Reset…")
        desktop.wait_text("Reset this session?")
        desktop.click("push button", "Reset")
        desktop.wait_text("The image of this session is missing or damaged.")
        desktop.screenshot("image-unavailable")
    finally:
        away.rename(image)
    daemon.reload()
    wait_until(lambda: daemon.sessions()["desk"]["state"] == "active")
    desktop.press("Escape")
    desktop.wait_text("Nothing has been changed")


def test_without_a_message_bus(desktop: Desktop) -> None:
    desktop.start(environment={"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent"})
    desktop.wait_text("sessiond cannot be reached")


def test_a_second_one_shows_the_window_that_there_is(desktop: Desktop, home: Path) -> None:
    desktop.start()
    desktop.wait_text(f"Session of {USER}")
    assert desktop.start().wait(BOUND) == 0
    assert len([one for one in desktop.widgets() if one.role == "frame"]) == 1


def test_screen_readers_know_what_all_is(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    daemon.sessionctl("snapshot", "desk", "monday")
    desktop.start(environment={"LANG": "de_DE.UTF-8", "LC_ALL": ""})
    desktop.wait_text(f"Sitzung von {USER}")
    desktop.focus()
    used = {"push button", "check box", "text", "list item", "progress bar"}
    for keys, shown in (
        ((), "2 hinzugefügt"),
        (("Return",), "Diese Sitzung zurücksetzen?"),
        (("Escape", "alt+2"), "Schnappschuss monday wiederherstellen"),
        (("alt+l",), "Schnappschuss anlegen?"),
    ):
        if keys:
            desktop.press(*keys)
        desktop.wait_text(shown)
        told = [one for one in desktop.widgets() if one.role in used]
        assert told
        assert [one for one in told if "_" in one.name] == []
