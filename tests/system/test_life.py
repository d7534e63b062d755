"""The life of sessions: from their creation over all operations to their end, and after crashes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import trees
from tests.support.daemon import MANAGER, Daemon, wait_until


def change(root: Path) -> None:
    """Create, change and delete something."""
    (root / "etc/new").write_text("new\n")
    (root / "etc/motd").write_text("Changed.\n")
    (root / "etc/hosts").unlink()


CHANGES = {"/etc/new": "added", "/etc/motd": "contents", "/etc/hosts": "deleted"}


def test_the_main_job_by_busctl(daemon: Daemon) -> None:
    made = daemon.busctl("call", *MANAGER, "CreateSession", "ssa{sv}", "root", "guest", "0")
    assert made == 'o "/org/sessiond/Overlay1/session/root_2d1"\n'
    root = daemon.root("root-1")
    pristine = trees.snapshot(str(root))
    change(root)
    assert daemon.differences("root-1") == CHANGES
    daemon.busctl("call", *MANAGER, "SnapshotSession", "ssa{sv}", "root-1", "changed", "0")
    assert daemon.differences("root-1") == CHANGES

    with subprocess.Popen(["cat"], cwd=root / "srv", stdin=subprocess.PIPE) as bystander:
        daemon.sessionctl("reset", "root-1")
        trees.assert_same(pristine, trees.snapshot(str(root)))
        assert bystander.poll() is None
        assert os.listdir(f"/proc/{bystander.pid}/cwd/data")

    daemon.sessionctl("restore", "root-1", "changed")
    assert daemon.differences("root-1") == CHANGES
    assert (root / "etc/motd").read_text() == "Changed.\n"
    daemon.busctl("call", *MANAGER, "CloseSession", "sa{sv}", "root-1", "0")
    assert daemon.sessions() == {}
    assert not any(mount.endswith("/root") for mount in daemon.mounts())


def test_the_image_is_only_read(daemon: Daemon) -> None:
    image = str(daemon.directory / "image")
    before = trees.snapshot(image)
    daemon.sessionctl("create", "root", "guest", "--id", "one")
    subprocess.run(
        ["rm", "-rf", daemon.root("one") / "etc", daemon.root("one") / "srv"], check=True
    )
    trees.assert_same(before, trees.snapshot(image))


def test_sessions_over_one_image_are_apart(daemon: Daemon) -> None:
    for session in ("one", "two"):
        daemon.sessionctl("create", "root", "guest", "--id", session)
    change(daemon.root("one"))
    assert daemon.differences("one") == CHANGES
    assert daemon.differences("two") == {}


def test_a_clean_end_keeps_persistent_sessions_and_ends_volatile_ones(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "lasting", "--id", "kept")
    daemon.sessionctl("create", "root", "guest", "--id", "moved")
    daemon.sessionctl("create", "root", "guest", "--id", "lost")
    for session in ("kept", "moved", "lost"):
        change(daemon.root(session))
    daemon.sessionctl("snapshot", "moved", "then")
    daemon.sessionctl("persist", "moved")
    before = {name: trees.snapshot(str(daemon.root(name))) for name in ("kept", "moved")}

    daemon.stop()
    assert daemon.mounts() == []

    daemon.start()
    assert set(daemon.sessions()) == {"kept", "moved"}
    for session, tree in before.items():
        trees.assert_same(tree, trees.snapshot(str(daemon.root(session))))
        assert daemon.differences(session) == CHANGES
    daemon.sessionctl("reset", "moved")
    daemon.sessionctl("restore", "moved", "then")
    assert daemon.differences("moved") == CHANGES


@pytest.mark.parametrize("profile", ["guest", "lasting"])
def test_sessions_are_mounted_again_after_a_crash(daemon: Daemon, profile: str) -> None:
    daemon.sessionctl("create", "root", profile, "--id", "one")
    change(daemon.root("one"))
    daemon.kill()
    daemon.start()
    assert daemon.sessions()["one"]["state"] == "active"
    assert daemon.differences("one") == CHANGES
    assert daemon.mounts().count(str(daemon.root("one"))) == 1


def test_configured_sessions_are_there_when_the_daemon_is_ready(idle_daemon: Daemon) -> None:
    text = idle_daemon.configuration.read_text()
    idle_daemon.configuration.write_text(
        text + '[session.kiosk]\nuser = "root"\nprofile = "guest"\n'
    )
    idle_daemon.start()
    assert (idle_daemon.root("kiosk") / "etc/motd").read_text() == "Welcome.\n"


def test_a_reload_makes_newly_configured_sessions(daemon: Daemon) -> None:
    with open(daemon.configuration, "a") as configuration:
        configuration.write('[session.kiosk]\nuser = "root"\nprofile = "guest"\n')
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: "kiosk" in daemon.sessions())
    assert (daemon.root("kiosk") / "etc/motd").read_text() == "Welcome.\n"
