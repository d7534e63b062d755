"""`sessiond-reset --now`, and how the program refuses to start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.desktop.conftest import create
from tests.support.daemon import BOUND, Daemon
from tests.support.desktop import PYTHON, STUBBORN, Desktop, working_in


def run(desktop: Desktop, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run the program, and return its exit code and what it has complained about."""
    process = desktop.start(*arguments, environment=environment, stderr=subprocess.PIPE)
    _, complaint = process.communicate(timeout=BOUND)
    return process.returncode, complaint


def test_a_key_resets_at_once(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    with working_in(home, "cat") as program:
        assert run(desktop, "--now") == (0, "")
        assert program.wait(BOUND) != 0
    assert [one.name for one in home.iterdir()] == [".profile"]
    assert daemon.snapshots("desk") == []


def test_a_snapshot_is_kept_and_programs_go_on(
    daemon: Daemon, desktop: Desktop, home: Path
) -> None:
    with working_in(home, "cat") as program:
        assert run(desktop, "--now", "--snapshot", "--leave-programs") == (0, "")
        assert program.poll() is None
    (snapshot,) = daemon.snapshots("desk")
    assert snapshot.startswith("before-reset-")


def test_failures_have_the_codes_of_sessionctl(daemon: Daemon, desktop: Desktop) -> None:
    code, complaint = run(desktop, "--now")
    assert code == 3
    assert complaint == "sessiond-reset: There is no such session, or it has been closed.\n"
    create(daemon, "root", "other")
    code, complaint = run(desktop, "--now", "--session", "other")
    assert code == 4
    assert "You are not allowed to do this. As uid 65534 you may not reset" in complaint
    code, complaint = run(desktop, "--now", LANG="de_DE.UTF-8", LC_ALL="")
    assert complaint == "sessiond-reset: Diese Sitzung gibt es nicht, oder sie wurde beendet.\n"
    daemon.kill()
    assert run(desktop, "--now")[0] == 7
    nowhere = {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent"}
    code, complaint = run(desktop, "--now", **nowhere)
    assert code == 7
    assert "The message bus of this machine cannot be used." in complaint


def test_a_job_that_is_cancelled_elsewhere(daemon: Daemon, desktop: Desktop, home: Path) -> None:
    with working_in(home, PYTHON, "-c", STUBBORN) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        process = desktop.start("--now", stderr=subprocess.PIPE)
        assert program.stdout.readline() == b"asked\n"
        daemon.sessionctl("cancel", "desk")
        _, complaint = process.communicate(timeout=BOUND)
        assert process.returncode == 11
        assert "It was cancelled." in complaint
    assert (home / "draft.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "complaint"),
    [
        (["--snapshot"], {}, 2, "--snapshot and --leave-programs go with --now."),
        (["--now", "--watch"], {}, 2, "not allowed with argument --now"),
        ([], {"DISPLAY": ":9999"}, 1, "There is no display for a window"),
    ],
)
def test_wrong_usage(
    desktop: Desktop,
    arguments: list[str],
    environment: dict[str, str],
    code: int,
    complaint: str,
) -> None:
    ended, said = run(desktop, *arguments, **environment)
    assert ended == code
    assert complaint in said
    assert "Traceback" not in said
