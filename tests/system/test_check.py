"""sessionctl check of real sessions: beside the daemon, without it, and after damage."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

from tests.support.daemon import Daemon

CODE = {"clean": 0, "failed": 1, "not found": 3, "busy": 5, "damaged": 13, "repaired": 14}


def check(daemon: Daemon, *arguments: str, code: str = "clean") -> list[tuple[str, str, int]]:
    """Return kind, path and layer of what is found."""
    done = daemon.sessionctl(
        "check", "--config", str(daemon.configuration), "--json", *arguments, code=CODE[code]
    )
    found = json.loads(done.stdout)["findings"]
    return [(one["kind"], one["path"], one["layer"]) for one in found]


def work_in(daemon: Daemon, session: str) -> None:
    """Do what leaves marks of all kinds, in the upper and in a snapshot."""
    root = daemon.root(session)
    (root / "srv").rename(root / "renamed")
    (root / "etc/motd").write_text("changed")
    (root / "etc/hosts").unlink()
    daemon.sessionctl("snapshot", session, "first")
    (root / "renamed/data").rename(root / "data")
    (root / "etc/motd").unlink()
    (root / "new").mkdir()
    (root / "data/file7").rename(root / "new/file7")


def test_a_session_from_its_making_to_its_repair(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "lasting", "--id", "s")
    daemon.sessionctl("create", "root", "guest", "--id", "v")
    for session in ("s", "v"):
        work_in(daemon, session)

    # Beside the daemon: the snapshots are looked at, the uppers are in use.
    assert sorted(kind for kind, _, _ in check(daemon)) == ["served", "served"]
    check(daemon, "s", code="busy")
    check(daemon, "--repair", code="busy")
    daemon.sessionctl("close", "v")

    daemon.stop()
    assert check(daemon) == []
    state = ("--state-directory", str(daemon.state))
    assert daemon.sessionctl("check", *state).stdout == (
        "Checked 1 session, 2 layers: nothing was found.\n"
    )
    upper = daemon.state / "sessions/s/layers/2/fs"
    os.mknod(upper / "gone", stat.S_IFCHR)
    (upper / "new/file").touch()
    os.setxattr(upper / "new/file", "trusted.overlay.opaque", b"y")
    damage = [("whiteout-over-nothing", "gone", 2), ("opaque-on-file", "new/file", 2)]
    assert sorted(check(daemon, "s", code="damaged")) == sorted(damage)
    assert sorted(check(daemon, "--repair", code="repaired")) == sorted(damage)
    assert check(daemon, "--repair") == []

    daemon.start()
    root = daemon.root("s")
    assert (root / "new/file7").read_text() == "x" * 7
    assert (root / "data/file8").read_text() == "x" * 8
    assert sorted(os.listdir(root)) == ["data", "etc", "home", "new", "renamed"]


def test_an_image_in_a_file_is_mounted_for_the_check_alone(idle_daemon: Daemon) -> None:
    daemon = idle_daemon
    image = daemon.directory / "image.squashfs"
    subprocess.run(
        ["mksquashfs", daemon.directory / "image", image, "-quiet", "-no-progress"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    daemon.configure({"profile.lasting": {"image": str(image), "storage": "persistent"}})
    daemon.start()
    daemon.sessionctl("create", "root", "lasting", "--id", "s")
    work_in(daemon, "s")
    daemon.stop()
    daemon.environment["TMPDIR"] = str(daemon.directory)
    before = daemon.mounts(), loop_devices(image), private_places(daemon)
    assert check(daemon) == []
    os.mknod(daemon.state / "sessions/s/layers/2/fs/gone", stat.S_IFCHR)
    assert check(daemon, "s") == [("whiteout-over-nothing", "gone", 2)]
    assert (daemon.mounts(), loop_devices(image), private_places(daemon)) == before

    image.rename(daemon.directory / "away")
    assert check(daemon, code="damaged") == [("image-unavailable", str(image), None)]
    daemon.start()
    assert check(daemon, code="damaged") == [("image-unavailable", str(image), None)]


def loop_devices(image: Path) -> str:
    return subprocess.run(["losetup", "-j", image], check=True, capture_output=True).stdout.decode()


def private_places(daemon: Daemon) -> list[str]:
    return [name for name in os.listdir(daemon.directory) if name.startswith("sessiond-check-")]
