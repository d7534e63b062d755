"""Directories as streams: positions, changes while they are read, and directories that are gone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOENT, ENOTEMPTY

from tests.support.libc import Directory
from tests.support.posix import fails, names, opened, read, write
from tests.support.trees import Tree
from tests.support.views import Merge

MANY = 3000


def many(prefix: str, count: int = MANY) -> dict[str, Tree | bytes]:
    """Return a directory of `count` empty files."""
    return {f"{prefix}{number:05}": b"" for number in range(count)}


@contextmanager
def stream(path: str) -> Iterator[Directory]:
    """Read a directory while the context is open."""
    directory = Directory(path)
    try:
        yield directory
    finally:
        directory.close()


def test_positions(merge: Merge) -> None:
    view = merge({"d": many("l", 300)}, upper={"d": many("u", 300)})
    with stream(view / "d") as directory:
        seen: list[tuple[int, bytes]] = []
        position = directory.tell()
        while (entry := directory.read()) is not None:
            seen.append((position, entry[0]))
            position = directory.tell()
        assert len({name for _, name in seen}) == 602
        for position, name in (seen[5], seen[300], seen[-1], seen[0]):
            directory.seek(position)
            entry = directory.read()
            assert entry is not None
            assert entry[0] == name


def test_rewind_sees_changes(merge: Merge) -> None:
    view = merge({"d": {"a": b"", "b": b""}})
    with stream(view / "d") as directory:
        assert set(directory.rest()) == {b"a", b"b"}
        write(view / "d/c", b"")
        os.unlink(view / "d/a")
        directory.rewind()
        assert set(directory.rest()) == {b"b", b"c"}


def test_deletion_while_listing(merge: Merge) -> None:
    """As rm -r does it: each name is deleted as soon as it has been read."""
    view = merge({"d": many("l")}, upper={"d": many("u")})
    removed = set()
    with stream(view / "d") as directory:
        while (entry := directory.read()) is not None:
            if entry[0] not in (b".", b".."):
                os.unlink(os.fsencode(view / "d/") + entry[0])
                removed.add(entry[0])
    assert len(removed) == 2 * MANY
    os.rmdir(view / "d")
    assert names(view.root) == set()


def test_creation_while_listing(merge: Merge) -> None:
    """What was there from beginning to end is listed exactly once, whatever else comes."""
    view = merge({"d": many("l")})
    seen = []
    with stream(view / "d") as directory:
        while (entry := directory.read()) is not None:
            seen.append(entry[0])
            if len(seen) % 100 == 0:
                write(view / f"d/new{len(seen)}", b"")
    stayed = [name for name in seen if name.startswith(b"l")]
    assert len(stayed) == len(set(stayed)) == MANY


def test_listed_inode_numbers(merge: Merge) -> None:
    view = merge({"d": {"low": b"", "copied": b"", "sub": {}}}, upper={"d": {"up": b"", "sub": {}}})
    os.chmod(view / "d/copied", 0o600)
    view.remount()
    with stream(view / "d") as directory:
        while (entry := directory.read()) is not None:
            name, inode, _ = entry
            if name != b"..":
                assert inode == os.lstat(os.fsencode(view / "d/") + name).st_ino, name


def test_removed_working_directory(merge: Merge) -> None:
    view = merge({"d": {"sub": {}}})
    before = os.getcwd()
    try:
        for path in ("d/sub", "d"):
            os.chdir(view / path)
            os.rmdir(view / path)
            assert os.listdir(".") == []
            for attempt in (os.getcwd, lambda: os.mkdir("x"), lambda: os.open("x", os.O_CREAT)):
                with fails(ENOENT):
                    attempt()
    finally:
        os.chdir(before)


def test_open_directory_survives_its_removal(merge: Merge) -> None:
    view = merge({"d": {}}, upper={"d": {}})
    with opened(view / "d") as directory:
        os.rmdir(view / "d")
        os.mkdir(view / "d")
        write(view / "d/x", b"")
        assert os.listdir(directory) == []


def test_rmdir_of_a_directory_with_content(merge: Merge) -> None:
    view = merge({"low": {"x": b""}, "both": {"x": b""}}, upper={"up": {"x": b""}, "both": {}})
    for name in ("low", "up", "both"):
        with fails(ENOTEMPTY):
            os.rmdir(view / name)
        assert read(view / f"{name}/x") == b""


def test_removal_of_trees(merge: Merge) -> None:
    tree: Tree = {"a": {"b": {"c": many("f", 50)}, "d": b""}, "e": b""}
    view = merge({"t": tree}, upper={"t": {"a": {"b": {"c": many("g", 50)}}}})
    shutil.rmtree(view / "t")
    assert names(view.root) == set()
    shutil.copytree("/etc/security", view / "t", symlinks=True)
    shutil.rmtree(view / "t")
    view.remount()
    assert names(view.root) == set()
