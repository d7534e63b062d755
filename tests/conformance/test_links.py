"""Hard links, symbolic links and special files."""

from __future__ import annotations

import os
import socket
import stat
from errno import EEXIST, ELOOP, ENOENT, ENXIO, EPERM

from tests.support import trees
from tests.support.posix import append, fails, names, opened, read, write
from tests.support.trees import Device, Fifo, Link, Socket, Symlink
from tests.support.views import Merge, View


def expect_one_file(view: View, *paths: str, links: int | None = None) -> None:
    """Demand that all paths are one inode with as many links."""
    found = {
        (status.st_dev, status.st_ino, status.st_nlink, status.st_size)
        for status in (os.lstat(view / path) for path in paths)
    }
    assert len(found) == 1
    assert found.pop()[2] == (len(paths) if links is None else links)


def test_link_of_a_lower_file(merge: Merge) -> None:
    view = merge({"a": b"one", "d": {}})
    os.link(view / "a", view / "b")
    os.link(view / "b", view / "d/c")
    append(view / "d/c", b" file")
    assert read(view / "a") == read(view / "b") == b"one file"
    expect_one_file(view, "a", "b", "d/c")
    view.remount()
    expect_one_file(view, "a", "b", "d/c")
    os.unlink(view / "a")
    expect_one_file(view, "b", "d/c")
    assert read(view / "b") == b"one file"


def test_lower_links_across_copy_up(merge: Merge) -> None:
    """All names of a lower file are copied up as one; this is what `index=on` is about."""
    view = merge({"a": b"one", "b": Link("a"), "d": {"c": Link("a")}})
    expect_one_file(view, "a", "b", "d/c")
    inode = os.stat(view / "a").st_ino
    append(view / "a", b" more")
    assert read(view / "b") == read(view / "d/c") == b"one more"
    expect_one_file(view, "a", "b", "d/c")
    os.chmod(view / "b", 0o600)
    expect_one_file(view, "a", "b", "d/c")
    view.remount()
    append(view / "d/c", b" yet")
    assert read(view / "a") == read(view / "b") == b"one more yet"
    expect_one_file(view, "a", "b", "d/c")
    assert os.stat(view / "d/c").st_ino == inode


def test_link_counts_of_lower_links(merge: Merge) -> None:
    view = merge({"a": b"one", "b": Link("a"), "c": Link("a")})
    os.unlink(view / "b")
    expect_one_file(view, "a", "c")
    os.chmod(view / "c", 0o600)
    expect_one_file(view, "a", "c")
    os.link(view / "c", view / "e")
    expect_one_file(view, "a", "c", "e")
    view.remount()
    expect_one_file(view, "a", "c", "e")
    os.unlink(view / "c")
    os.rename(view / "a", view / "moved")
    expect_one_file(view, "moved", "e")
    view.remount()
    expect_one_file(view, "moved", "e")
    os.unlink(view / "e")
    with opened(view / "moved") as last:
        os.unlink(view / "moved")
        assert os.fstat(last).st_nlink == 0


def test_lower_link_copied_up_in_a_renamed_directory(merge: Merge) -> None:
    view = merge({"d": {"a": b"one"}, "b": Link("d/a")})
    os.rename(view / "d", view / "e")
    append(view / "e/a", b"!")
    assert read(view / "b") == b"one!"
    expect_one_file(view, "e/a", "b")


def test_links_replaced_one_by_one(merge: Merge) -> None:
    view = merge({"a": b"old", "b": Link("a")})
    write(view / "new", b"new")
    os.rename(view / "new", view / "a")
    assert (read(view / "a"), read(view / "b")) == (b"new", b"old")
    expect_one_file(view, "b")
    append(view / "b", b"er")
    assert read(view / "a") == b"new"
    view.remount()
    assert (read(view / "a"), read(view / "b")) == (b"new", b"older")
    expect_one_file(view, "a")


def test_link_refusals(merge: Merge) -> None:
    view = merge({"d": {}, "a": b"", "b": b""})
    with fails(EPERM):
        os.link(view / "d", view / "e")
    with fails(EEXIST):
        os.link(view / "a", view / "b")
    with fails(ENOENT):
        os.link(view / "nothing", view / "e")
    assert names(view.root) == {"d", "a", "b"}


def test_links_of_other_kinds(merge: Merge) -> None:
    view = merge({"s": Symlink("x"), "f": Fifo(), "c": Device(stat.S_IFCHR, 1, 3)})
    for name in "sfc":
        os.link(view / name, view / f"{name}2", follow_symlinks=False)
        expect_one_file(view, name, f"{name}2")
    assert os.readlink(view / "s2") == "x"


def test_symlinks(merge: Merge) -> None:
    long = "x/" * 2000
    view = merge({"low": Symlink("target"), "dangling": Symlink("nowhere"), "target": b"t"})
    os.symlink(long, view / "long")
    os.symlink(b"\xff\n", os.fsencode(view / "odd"))
    os.symlink("loop", view / "loop")
    assert os.readlink(view / "low") == "target"
    assert os.readlink(view / "long") == long
    assert os.readlink(os.fsencode(view / "odd")) == b"\xff\n"
    assert os.lstat(view / "long").st_size == len(long)
    assert read(view / "low") == b"t"
    with fails(ENOENT):
        os.stat(view / "dangling")
    with fails(ELOOP):
        os.stat(view / "loop")
    with fails(ELOOP):
        os.open(view / "low", os.O_RDONLY | os.O_NOFOLLOW)
    os.unlink(view / "low")
    assert read(view / "target") == b"t"
    write(view / "dangling", b"made")
    assert read(view / "nowhere") == b"made"


def test_symlinks_keep_their_own_metadata(merge: Merge) -> None:
    view = merge({"link": Symlink("target"), "target": b""})
    before = trees.snapshot(view.root)[b"target"]
    os.lchown(view / "link", 5, 6)
    os.utime(view / "link", ns=(1, 2), follow_symlinks=False)
    os.setxattr(view / "link", "trusted.x", b"1", follow_symlinks=False)
    after = trees.snapshot(view.root)
    assert after[b"target"] == before
    link = after[b"link"]
    assert (link.uid, link.gid, link.mtime_ns) == (5, 6, 2)
    assert link.xattrs == (("trusted.x", b"1"),)


def test_device_nodes(merge: Merge) -> None:
    view = merge({"null": Device(stat.S_IFCHR, 1, 3, mode=0o666), "z": Device(stat.S_IFCHR, 1, 5)})
    os.mknod(view / "zero", stat.S_IFCHR | 0o640, os.makedev(1, 5))
    os.mknod(view / "loop", stat.S_IFBLK | 0o600, os.makedev(7, 300000 % 2**20))
    assert os.stat(view / "zero").st_rdev == os.makedev(1, 5)
    assert os.stat(view / "loop").st_rdev == os.makedev(7, 300000)
    assert stat.S_ISBLK(os.stat(view / "loop").st_mode)
    write(view / "null", b"into nothing")
    assert os.stat(view / "null").st_mtime_ns == trees.MTIME_NS
    with opened(view / "zero") as zero:
        assert os.read(zero, 4) == bytes(4)
    os.chown(view / "null", 3, 3)
    os.unlink(view / "z")
    assert names(view.root) == {"null", "zero", "loop"}
    view.remount()
    assert os.stat(view / "null").st_rdev == os.makedev(1, 3)
    assert os.stat(view / "loop").st_rdev == os.makedev(7, 300000)


def test_whiteouts_cannot_be_made_by_hand(merge_layers: Merge) -> None:
    view = merge_layers({"a": b""})
    with fails(EPERM):
        os.mknod(view / "w", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    assert names(view.root) == {"a"}


def test_fifos(merge: Merge) -> None:
    view = merge({"low": Fifo(mode=0o600)})
    os.mkfifo(view / "new")
    for name in ("low", "new"):
        with fails(ENXIO):
            os.open(view / name, os.O_WRONLY | os.O_NONBLOCK)
        with (
            opened(view / name, os.O_RDONLY | os.O_NONBLOCK) as reader,
            opened(view / name, os.O_WRONLY | os.O_NONBLOCK) as writer,
        ):
            os.write(writer, b"through")
            assert os.read(reader, 10) == b"through"
    os.chmod(view / "low", 0o622)
    assert stat.S_ISFIFO(os.stat(view / "low").st_mode)


def test_sockets(merge: Merge) -> None:
    view = merge({"low": Socket(), "run": {}})
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        before = os.getcwd()
        os.chdir(view / "run")
        try:
            server.bind("s")
            server.listen()
            client.connect("s")
            os.rename("s", "t")
            with socket.socket(socket.AF_UNIX) as second:
                second.connect("t")
        finally:
            os.chdir(before)
        connection, _ = server.accept()
        with connection:
            client.sendall(b"hello")
            assert connection.recv(10) == b"hello"
    assert stat.S_ISSOCK(os.stat(view / "run/t").st_mode)
    os.chmod(view / "low", 0o600)
    assert stat.S_ISSOCK(os.stat(view / "low").st_mode)
    os.unlink(view / "low")
    os.unlink(view / "run/t")
