"""What makes a file the same file: st_ino and st_dev, across copy-up, rename and remount."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.conformance.conftest import FILE_SYSTEMS
from tests.support import trees
from tests.support.posix import append, opened, write
from tests.support.trees import Link, Symlink, Tree
from tests.support.views import Merge, View

LOWER: Tree = {
    "file": b"1",
    "hard": Link("file"),
    "d": {"inside": b"2", "sub": {"deep": b"3"}},
    "link": Symlink("file"),
    "both": {"low": b""},
}
UPPER: Tree = {"up": b"4", "both": {"high": b""}}


@pytest.fixture(params=FILE_SYSTEMS)
def one_disk(request: pytest.FixtureRequest, disk: str) -> Iterator[Merge]:
    """Make views with all layers on one file system, as a persistent session may have them."""
    merge = Merge(FILE_SYSTEMS[request.param], disk, disk)
    yield merge
    merge.close()


def identities(view: View) -> dict[bytes, tuple[int, int]]:
    """Return device and inode number of all there is."""
    return {
        path: (status.st_dev, status.st_ino)
        for path in trees.snapshot(view.root)
        for status in [os.lstat(os.fsencode(view.root) + b"/" + path)]
    }


def expect_stable_identities(view: View) -> None:
    """Copy everything up, and demand that each file stays what it was."""
    before = identities(view)
    assert len({device for device, _ in before.values()}) == 1
    files = [identity for path, identity in before.items() if path != b"hard"]
    assert len(set(files)) == len(files), "two files share an inode number"
    with opened(view / "file", os.O_RDWR) as file:
        assert os.fstat(file).st_ino == before[b"file"][1]
    for name in ("file", "d/inside", "d/sub/deep", "up"):
        append(view / name, b"+")
    for name in ("d", "d/sub", "both", "both/low"):
        os.chmod(view / name, 0o700)
    os.lchown(view / "link", 1, 1)
    assert identities(view) == before
    devices = before.copy()
    view.remount()
    # The device is of the mount; inode numbers are to stay.
    assert {path: inode for path, (_, inode) in identities(view).items()} == {
        path: inode for path, (_, inode) in devices.items()
    }


def test_across_file_systems(merge: Merge) -> None:
    expect_stable_identities(merge(LOWER, upper=UPPER))


def test_on_one_file_system(one_disk: Merge) -> None:
    expect_stable_identities(one_disk(LOWER, upper=UPPER))


def test_across_rename(merge: Merge) -> None:
    view = merge(LOWER, upper=UPPER)
    before = identities(view)
    os.rename(view / "d/inside", view / "renamed")
    os.rename(view / "d", view / "e")
    os.rename(view / "file", view / "e/file")
    after = identities(view)
    moved = {b"renamed": b"d/inside", b"e": b"d", b"e/sub/deep": b"d/sub/deep", b"e/file": b"file"}
    for new, old in moved.items():
        assert after[new] == before[old], new
    view.remount()
    after = identities(view)
    for new, old in moved.items():
        assert after[new][1] == before[old][1], new


def test_a_new_file_is_another(merge: Merge) -> None:
    """While the old one is open, also where the layers' file systems use inode numbers again."""
    view = merge({"low": b"1"}, upper={"up": b"2"})
    for name in ("low", "up"):
        with opened(view / name) as old:
            for _ in range(3):
                os.unlink(view / name)
                write(view / name, b"new")
                assert os.stat(view / name).st_ino != os.fstat(old).st_ino


def test_open_descriptors_keep_their_number(merge: Merge) -> None:
    view = merge({"file": b"1"})
    with opened(view / "file") as old:
        inode = os.fstat(old).st_ino
        append(view / "file", b"2")
        assert os.fstat(old).st_ino == inode == os.stat(view / "file").st_ino
