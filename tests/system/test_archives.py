"""Snapshots that leave a session and come to another; and sessions that have had very many."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from sessiond.cli.exit_codes import ExitCode
from tests.support import trees
from tests.support.daemon import MANAGER, Daemon, wait_until

ROUNDS = 20
"""Snapshots, so that the stack is deeper than it stays."""


def test_a_snapshot_moves_to_another_session(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "guest", "--id", "one")
    root = daemon.root("one")
    (root / "etc/motd").write_text("changed")
    (root / "etc/hosts").unlink()
    (root / "srv").rename(root / "moved")
    (root / "tool").write_bytes(os.urandom(3 << 20))
    (root / "tool").chmod(0o4755)
    os.setxattr(root / "tool", "user.note", b"\xff\0")
    expected = trees.snapshot(str(root))
    daemon.sessionctl("snapshot", "one", "all")
    file = daemon.directory / "all.tar"
    daemon.sessionctl("export", "one", "all", str(file))
    listed = subprocess.run(["tar", "-tf", file], capture_output=True, check=True)
    assert b"etc/.wh.hosts\n" in listed.stdout
    assert b".wh.srv\n" in listed.stdout
    daemon.sessionctl("create", "root", "guest", "--id", "two")
    daemon.sessionctl("import", "two", "copy", str(file), "--description", "from one")
    daemon.sessionctl("restore", "two", "copy")
    trees.assert_same(expected, trees.snapshot(str(daemon.root("two"))))
    daemon.sessionctl("close", "one")
    daemon.sessionctl("close", "two")


def test_a_snapshot_as_a_module_and_back(daemon: Daemon) -> None:
    """As live-boot stacks modules on its image; and as another session takes it."""
    daemon.sessionctl("create", "root", "guest", "--id", "one")
    root = daemon.root("one")
    (root / "etc/motd").write_text("changed")
    (root / "etc/hosts").unlink()
    (root / "tool").write_bytes(os.urandom(3 << 20))
    (root / "tool").chmod(0o4755)
    daemon.sessionctl("snapshot", "one", "all")
    file = daemon.directory / "all.squashfs"
    daemon.sessionctl("export", "one", "all", str(file))
    said = subprocess.run(["unsquashfs", "-ll", file], capture_output=True, check=True, text=True)
    assert "squashfs-root/etc/hosts" in said.stdout
    piped = daemon.sessionctl("export", "one", "all", "-", "--format", "oci")
    assert "changed" in piped.stdout
    module, view = daemon.directory / "module", daemon.directory / "view"
    for directory in (module, view):
        directory.mkdir()
    subprocess.run(["mount", "-o", "loop,ro", file, module], check=True)
    layers = f"lowerdir={module}:{daemon.directory / 'image'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, view], check=True)
    try:
        assert (view / "etc/motd").read_text() == "changed"
        assert not (view / "etc/hosts").exists()
        assert (view / "tool").stat().st_mode & 0o7777 == 0o4755
        assert (view / "tool").read_bytes() == (root / "tool").read_bytes()
        assert sorted(os.listdir(view)) == sorted(os.listdir(root))
    finally:
        subprocess.run(["umount", view, module], check=True)
    daemon.sessionctl("create", "root", "guest", "--id", "two")
    daemon.sessionctl("import", "two", "copy", str(file))
    daemon.sessionctl("restore", "two", "copy")
    assert daemon.differences("two") == daemon.differences("one")
    assert (daemon.root("two") / "tool").read_bytes() == (root / "tool").read_bytes()
    file.write_bytes(file.read_bytes()[:-200_000])
    refused = daemon.sessionctl("import", "two", "cut", str(file), code=ExitCode.FAILED)
    assert "cut off" in refused.stderr
    daemon.sessionctl("close", "one")
    daemon.sessionctl("close", "two")


def test_a_session_of_many_snapshots_stays_flat(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "guest", "--id", "deep")
    root, layers = daemon.root("deep"), daemon.runtime / "sessions/deep/storage/layers"
    with (
        open(root / "log", "w") as log,
        subprocess.Popen(["cat"], cwd=root / "srv", stdin=subprocess.PIPE) as bystander,
    ):
        for number in range(ROUNDS):
            print(number, file=log, flush=True)
            (root / f"srv/file{number}").write_text(str(number))
            (root / "etc/motd").write_text(str(number))
            daemon.busctl("call", *MANAGER, "SnapshotSession", "ssa{sv}", "deep", f"s{number}", "0")
            if number not in (3, 12):
                path = f"{MANAGER[1]}/session/deep/snapshot/s{number}"
                daemon.busctl("call", MANAGER[0], path, "org.sessiond.Overlay1.Snapshot", "Delete")
        expected = trees.snapshot(str(root))
        wait_until(lambda: _count(layers) <= 17)  # with the upper
        trees.assert_same(expected, trees.snapshot(str(root)))
        print("more", file=log, flush=True)
        assert bystander.poll() is None
    numbers = [str(number) for number in range(ROUNDS)]
    assert (root / "log").read_text().split() == [*numbers, "more"]
    daemon.sessionctl("restore", "deep", "s12")
    assert (root / "etc/motd").read_text() == "12"
    assert (root / "log").read_text().split() == numbers[:13]
    assert not (root / "srv/file13").exists()
    daemon.sessionctl("close", "deep")


def _count(layers: Path) -> int:
    return len(list(layers.iterdir()))
