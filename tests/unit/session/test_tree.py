"""Copying and deleting whole trees."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.session.mounts import SystemMounts
from sessiond.session.tree import copy_root, copy_trees, remove_tree, tree_bytes, unchecked
from tests.support import trees
from tests.support.disks import make_image
from tests.support.recording_disk import mounted_image
from tests.support.trees import Device, Dir, Fifo, File, Link, Socket, Symlink, Whiteout

DEEP = 1500
"""More directories than Python's stack, or a path, can hold."""


def copy(source: Path, target: Path, *names: str) -> int:
    """Copy with nobody watching; return the bytes that were reported."""
    reported: list[int] = []
    target.mkdir()
    copy_trees(source, target, names, progress=reported.append, check=unchecked)
    return sum(reported)


def make_deep(top: Path, *, leaf: bool = True) -> None:
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for level in range(DEEP):
        os.mkdir("dir", dir_fd=here)
        below = os.open("dir", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
        if level % 1000 == 0:
            os.close(os.open("file", os.O_CREAT, dir_fd=here))
    if leaf:
        os.symlink("target", "leaf", dir_fd=here)
    os.close(here)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A directory for deep trees, which pytest itself could not delete."""
    (tmp_path / "deep").mkdir()
    yield tmp_path / "deep"
    remove_tree(tmp_path / "deep")


def test_plain_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "a" / "fs" / "below").mkdir(parents=True)
    (tmp_path / "a" / "fs" / "below" / "file").write_bytes(b"x" * 100_000)
    os.utime(tmp_path / "a" / "fs" / "below" / "file", ns=(1, 123_456_789_000_000_001))
    (tmp_path / "a" / "fs" / os.fsdecode(b"\xff\n*")).symlink_to("nowhere")
    os.utime(tmp_path / "a" / "fs", ns=(5, 6))
    assert copy(tmp_path / "a", tmp_path / "b", "fs") == 100_000
    trees.assert_same(
        trees.snapshot(str(tmp_path / "a" / "fs")), trees.snapshot(str(tmp_path / "b" / "fs"))
    )
    assert os.listdir(tmp_path / "b") == ["fs"]


def test_an_empty_tree_is_copied(tmp_path: Path) -> None:
    (tmp_path / "a" / "fs").mkdir(parents=True, mode=0o750)
    copy(tmp_path / "a", tmp_path / "b", "fs")
    assert (tmp_path / "b" / "fs").stat().st_mode == (tmp_path / "a" / "fs").stat().st_mode


@pytest.mark.root
def test_everything_is_kept_from_tmpfs_to_disk(real: Path) -> None:
    source, target = real / "tmpfs", real / "disk"
    source.mkdir()
    SystemMounts().mount_tmpfs(source, size="64M", inodes=None)
    acl = trees.acl(("u", None, 6), ("u", 1000, 4), ("g", None, 4), ("m", None, 4), ("o", None, 0))
    (source / "fs").mkdir()
    (source / "work" / "index").mkdir(parents=True)
    trees.build(
        {
            "file": File(content=b"data", mode=0o4711, uid=12, gid=34),
            "capable": File(
                mode=0o755,
                xattrs={"security.capability": bytes.fromhex("0100000200200000" + "00" * 12)},
            ),
            "sparse": File(content=b"end", hole=32 << 20),
            "acl": File(mode=0o640, xattrs={"system.posix_acl_access": acl}),
            "link to file": Link("file"),
            "directory": Dir(
                {
                    "gone": Whiteout(),
                    "device": Device(stat.S_IFCHR, 1, 3, mode=0o666),
                    "fifo": Fifo(mode=0o600, uid=7),
                    "socket": Socket(),
                    "symlink": Symlink("/etc/passwd", uid=99),
                    "third link": Link("file"),
                },
                mode=0o3775,
                uid=5,
                gid=6,
                opaque=True,
                xattrs={"trusted.overlay.redirect": b"/old", "system.posix_acl_default": acl},
            ),
        },
        str(source / "fs"),
    )
    os.setxattr(source / "fs", "trusted.overlay.impure", b"y")
    os.link(source / "fs" / "file", source / "work" / "index" / "00fb21")
    os.link(source / "fs" / "directory" / "gone", source / "fs" / "gone too", follow_symlinks=False)
    target.mkdir()
    (target / "work").mkdir()
    total: list[int] = []
    copy_trees(source, target, ("fs", "work/index"), progress=total.append, check=unchecked)
    trees.assert_same(trees.snapshot(str(source / "fs")), trees.snapshot(str(target / "fs")))
    assert os.getxattr(target / "fs", "trusted.overlay.impure") == b"y"
    assert os.path.samefile(target / "fs" / "file", target / "work" / "index" / "00fb21")
    assert (target / "fs" / "file").stat().st_nlink == 4
    assert sum(total) < 1 << 20
    assert (target / "fs" / "sparse").stat().st_blocks * 512 < 1 << 20
    assert sorted(os.listdir(target)) == ["fs", "work"]


@pytest.mark.root
def test_more_links_to_a_whiteout_than_the_disk_can_have(real: Path) -> None:
    """A tmpfs has no limit; ext4's is 65000."""
    source, target = real / "tmpfs", real / "disk"
    source.mkdir()
    SystemMounts().mount_tmpfs(source, size="256M", inodes=None)
    (source / "fs").mkdir()
    os.mknod(source / "fs" / "0", 0o020000, 0)
    directory = os.open(source / "fs", os.O_RDONLY)
    for number in range(1, 66_000):
        os.link("0", str(number), src_dir_fd=directory, dst_dir_fd=directory)
    os.close(directory)
    copy(source, target, "fs")
    assert len(os.listdir(target / "fs")) == 66_000


def test_deep_trees_are_measured_copied_and_deleted(deep: Path) -> None:
    (deep / "a").mkdir()
    make_deep(deep / "a" / "fs")
    assert tree_bytes(deep / "a") >= 0
    copy(deep / "a", deep / "b", "fs")
    here = os.open(deep / "b" / "fs", os.O_RDONLY)
    for _ in range(DEEP):
        below = os.open("dir", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    assert os.readlink("leaf", dir_fd=here) == "target"
    os.close(here)
    for tree in ("a", "b"):
        remove_tree(deep / tree)
        assert not (deep / tree).exists()


def test_tree_bytes_counts_what_is_stored(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "file").write_bytes(b"x" * 40_960)
    os.link(tmp_path / "d" / "e" / "file", tmp_path / "d" / "link")
    with open(tmp_path / "d" / "sparse", "wb") as file:
        file.truncate(1 << 30)
    assert 40_960 <= tree_bytes(tmp_path / "d") < 1 << 20


def test_wide_trees_are_deleted(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for outer in range(10):
        (top / str(outer) / "below").mkdir(parents=True)
        for inner in range(100):
            (top / str(outer) / "below" / str(inner)).touch()
    (top / "0" / "below" / "dangling").symlink_to("nowhere")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (top / "symlink to a directory").symlink_to(outside)
    remove_tree(top)
    assert not top.exists()
    assert (outside / "kept").exists()


def test_a_missing_tree_is_deleted_already(tmp_path: Path) -> None:
    remove_tree(tmp_path / "missing")


def test_a_symlink_is_not_a_tree(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    with pytest.raises(OSError):
        remove_tree(tmp_path / "link")
    assert (tmp_path / "d").exists()


@pytest.mark.root
@pytest.mark.parametrize("place", [("mounted",), ("d", "mounted"), ("d", "e", "mounted")])
def test_nothing_is_deleted_through_a_mount(real: Path, place: tuple[str, ...]) -> None:
    target = real / "top" / Path(*place)
    target.mkdir(parents=True)
    SystemMounts().mount_tmpfs(target, size="1M", inodes=None)
    (target / "precious").touch()
    with pytest.raises(OSError) as caught:
        remove_tree(real / "top")
    assert caught.value.errno == errno.EBUSY
    assert os.path.exists(next(iter(SystemMounts().mounted_below(real))) / "precious")


class StopError(Exception):
    pass


def test_copying_and_deleting_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "a" / "fs").mkdir(parents=True)
    for number in range(10):
        (tmp_path / "a" / "fs" / str(number)).touch()
    calls: list[None] = []

    def check() -> None:
        calls.append(None)
        if len(calls) > 4:
            raise StopError

    (tmp_path / "b").mkdir()
    with pytest.raises(StopError):
        copy_trees(tmp_path / "a", tmp_path / "b", ("fs",), progress=lambda _: None, check=check)
    assert len(os.listdir(tmp_path / "b" / "fs")) == 4
    calls.clear()
    with pytest.raises(StopError):
        remove_tree(tmp_path / "a", check)
    assert sum(len(files) for _, _, files in os.walk(tmp_path / "a")) == 7


@pytest.mark.root
def test_a_full_disk_names_the_file(real: Path) -> None:
    (real / "a" / "fs" / "d").mkdir(parents=True)
    (real / "a" / "fs" / "d" / "big").write_bytes(b"x" * (4 << 20))
    (real / "b").mkdir()
    SystemMounts().mount_tmpfs(real / "b", size="1M", inodes=None)
    with pytest.raises(OSError) as caught:
        copy_trees(real / "a", real / "b", ("fs",), progress=lambda _: None, check=unchecked)
    assert caught.value.errno == errno.ENOSPC
    assert "b/fs/d/big" in caught.value.filename


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_is_left_open(deep: Path) -> None:
    before = descriptors()
    (deep / "a").mkdir()
    make_deep(deep / "a" / "fs")
    copy(deep / "a", deep / "b", "fs")
    with pytest.raises(FileExistsError):
        copy_trees(deep / "a", deep / "b", ("fs",), progress=lambda _: None, check=unchecked)
    with pytest.raises(FileNotFoundError):
        copy_root(deep / "missing", deep / "b")
    remove_tree(deep / "a")
    remove_tree(deep / "b")
    assert descriptors() == before


@pytest.mark.root
def test_copy_root_leaves_out_what_overlayfs_notes(real: Path) -> None:
    source, target = real / "source", real / "target"
    source.mkdir()
    target.mkdir()
    for name in ("trusted.overlay.opaque", "trusted.overlay.overlay.opaque", "user.kept"):
        os.setxattr(source, name, b"y")
    os.chown(source, 3, 4)
    source.chmod(0o2750)
    os.utime(source, ns=(1_000_000_001, 2_000_000_002))
    copy_root(source, target)
    assert set(os.listxattr(target)) == {"trusted.overlay.overlay.opaque", "user.kept"}
    found = target.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (3, 4, 0o2750)
    assert found.st_mtime_ns == 2_000_000_002


def test_trees_are_deleted_on_btrfs(real: Path) -> None:
    """There, a descriptor lists nothing that has come since it was opened or rewound."""
    with mounted_image(make_image("btrfs", str(real)), str(real)):
        (real / "tree/layers/1/fs").mkdir(parents=True)
        (real / "tree/layers/1/work").mkdir()
        remove_tree(real / "tree")
        assert os.listdir(real) == []
