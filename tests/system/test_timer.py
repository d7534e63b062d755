"""Resets that come by themselves, in a running daemon."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, wait_until


@pytest.fixture
def box(daemon: Daemon) -> Path:
    """A file in a session, which a reset removes."""
    daemon.sessionctl("create", "root", "guest", "--id", "box")
    file = daemon.root("box") / "file"
    file.touch()
    return file


def status(daemon: Daemon) -> dict[str, object]:
    told = json.loads(daemon.sessionctl("status", "box", "--json").stdout)
    assert isinstance(told, dict)
    return told


def test_what_the_profile_says(idle_daemon: Daemon) -> None:
    image = str(idle_daemon.directory / "image")
    idle_daemon.configure(
        {
            "profile.kiosk": {"image": image, "size": "16M"},
            "profile.kiosk.reset": {"after": "1s", "warning": "0s"},
        }
    )
    idle_daemon.start()
    idle_daemon.sessionctl("create", "root", "kiosk", "--id", "box")
    (idle_daemon.root("box") / "file").touch()
    wait_until(lambda: not (idle_daemon.root("box") / "file").exists())
    wait_until(lambda: status(idle_daemon)["next_reset_reason"] == "after")


def test_what_was_asked_for_outlives_the_manager(daemon: Daemon, box: Path) -> None:
    daemon.sessionctl("schedule-reset", "box", "--in", "2h")
    wait_until(lambda: status(daemon)["next_reset"] is not None)
    planned = status(daemon)["next_reset"]
    daemon.kill()
    daemon.start()
    wait_until(lambda: status(daemon)["next_reset"] is not None)
    after = status(daemon)
    assert after["next_reset_reason"] == "scheduled"
    moments = [datetime.fromisoformat(str(when)) for when in (planned, after["next_reset"])]
    assert abs(moments[0] - moments[1]) < timedelta(seconds=2)
    daemon.sessionctl("cancel-reset", "box")
    wait_until(lambda: status(daemon)["next_reset"] is None)
    assert box.exists()


def test_a_command_holds_it_back(daemon: Daemon, box: Path) -> None:
    with daemon.calling("inhibit", "box", "--", "sleep", "1000") as player:
        wait_until(lambda: bool(status(daemon)["inhibitors"]))
        daemon.sessionctl("schedule-reset", "box", "--in", "0s")
        wait_until(lambda: status(daemon)["next_reset"] is None)  # root's holds for ever
        assert box.exists()
        player.kill()
        wait_until(lambda: not box.exists())


def test_without_logind_nobody_is_idle(daemon: Daemon, box: Path) -> None:
    refused = daemon.sessionctl("schedule-reset", "box", "--idle", "1s", code=10)
    assert "systemd-logind" in refused.stderr
    assert box.exists()
