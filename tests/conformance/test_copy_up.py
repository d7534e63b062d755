"""Copy-up: the first change to a lower file keeps all else of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from errno import ENXIO

import pytest

from tests.support import trees
from tests.support.posix import append, fails, names, opened, read, write
from tests.support.trees import Device, Dir, Fifo, File, Symlink, Tree, acl
from tests.support.views import Merge, View

ACL = acl(("u", None, 6), ("u", 12345, 4), ("g", None, 4), ("m", None, 4), ("o", None, 0))
XATTRS = {"user.colour": b"blue", "trusted.secret": b"\0\xff", "system.posix_acl_access": ACL}

LOWER: Tree = {
    "d": Dir(
        {
            "file": File(b"contents\n", mode=0o640, uid=3, gid=4, xattrs=XATTRS),
            "link": Symlink("file", uid=5, gid=6, xattrs={"trusted.on": b"link"}),
            "null": Device(0o020000, 1, 3, mode=0o666, uid=7),
            "fifo": Fifo(mode=0o600, gid=8),
            "untouched": b"",
        },
        mode=0o2751,
        uid=9,
        gid=10,
        xattrs={"user.of": b"directory"},
    ),
}


def expect_only(view: View, path: str, change: Callable[[], None], *facts: str) -> None:
    """Run `change` and demand that nothing but `facts` of `path` differs after it."""
    before = trees.snapshot(view.root)
    change()
    after = trees.snapshot(view.root)
    name = os.fsencode(path)
    kept = {fact: getattr(before[name], fact) for fact in facts}
    assert {fact: getattr(after[name], fact) for fact in facts} != kept, "nothing was changed"
    after[name] = after[name]._replace(**kept)
    trees.assert_same(before, after, f"the change to {path} was not all")


def test_metadata_changes_only_itself(merge: Merge) -> None:
    view = merge(LOWER)
    # An ACL's mask follows the group bits of the mode, by POSIX.1e.
    expect_only(view, "d/file", lambda: os.chmod(view / "d/file", 0o400), "mode", "xattrs")
    expect_only(view, "d/null", lambda: os.chown(view / "d/null", 1, 1), "uid", "gid")
    expect_only(view, "d/fifo", lambda: os.chmod(view / "d/fifo", 0o622), "mode")
    expect_only(view, "d/link", lambda: os.lchown(view / "d/link", 1, -1), "uid")
    expect_only(view, "d", lambda: os.chmod(view / "d", 0o2700), "mode")
    expect_only(view, ".", lambda: os.chmod(view.root, 0o700), "mode")


def test_times_change_only_themselves(merge: Merge) -> None:
    view = merge(LOWER)
    for path in ("d/file", "d/link", "d/null", "d"):
        expect_only(
            view,
            path,
            lambda path=path: os.utime(  # type: ignore[misc]
                view / path, ns=(1, 1_000_000_001), follow_symlinks=False
            ),
            "mtime_ns",
        )
        assert os.lstat(view / path).st_atime_ns == 1


def test_writing_changes_only_contents(merge: Merge) -> None:
    view = merge(LOWER)
    expect_only(
        view,
        "d/file",
        lambda: append(view / "d/file", b"more"),
        *("size", "digest", "mtime_ns"),
    )
    assert read(view / "d/file") == b"contents\nmore"


def test_opening_for_write_changes_nothing_by_itself(merge: Merge) -> None:
    view = merge(LOWER)
    before = trees.snapshot(view.root)
    with opened(view / "d/file", os.O_RDWR) as file:
        assert os.pread(file, 8, 0) == b"contents"
    trees.assert_same(before, trees.snapshot(view.root))


def test_access_time_of_copied_file(merge: Merge) -> None:
    view = merge(LOWER)
    os.chmod(view / "d/file", 0o600)
    assert os.stat(view / "d/file").st_atime_ns == trees.MTIME_NS


def test_xattr_changes_only_itself(merge: Merge) -> None:
    view = merge(LOWER)
    for path in ("d/file", "d"):
        expect_only(
            view,
            path,
            lambda path=path: os.setxattr(view / path, "user.new", b"1"),  # type: ignore[misc]
            "xattrs",
        )
        expect_only(
            view,
            path,
            lambda path=path: os.removexattr(view / path, "user.new"),  # type: ignore[misc]
            "xattrs",
        )


def test_holes_stay_holes(merge: Merge) -> None:
    view = merge({"sparse": File(b"end", hole=64 << 20)})
    append(view / "sparse", b"!")
    status = os.stat(view / "sparse")
    assert status.st_size == (64 << 20) + 4
    assert status.st_blocks * 512 < 1 << 20
    with opened(view / "sparse") as file:
        assert os.pread(file, 10, 64 << 20) == b"end!"
        assert os.pread(file, 4096, 1 << 20) == bytes(4096)


def test_more_than_four_gib(merge: Merge) -> None:
    hole = (5 << 30) - 1
    view = merge({"huge": File(b"tail", hole=hole)})
    with opened(view / "huge", os.O_RDWR) as file:
        assert os.pread(file, 8, hole - 4) == b"\0\0\0\0tail"
        os.pwrite(file, b"mid", 4 << 30)
        os.ftruncate(file, hole + 2)
        assert os.pread(file, 8, hole) == b"ta"
        assert os.pread(file, 3, 4 << 30) == b"mid"
        assert os.lseek(file, 1 << 20, os.SEEK_DATA) >= 1 << 20
        assert os.fstat(file).st_blocks * 512 < 1 << 20
    view.remount()
    assert os.stat(view / "huge").st_size == hole + 2
    # Reading all of it, as is done with whatever a case leaves, takes half a minute where SEEK_DATA
    # finds no holes.
    os.unlink(view / "huge")


def test_seek_hole_and_data(merge: Merge) -> None:
    size = 1 << 20
    view = merge({"sparse": File(b"x" * 4096, hole=size)})
    for flags in (os.O_RDONLY, os.O_RDWR):
        with opened(view / "sparse", flags) as file:
            # A file system that keeps no book of holes may call everything data.
            found = os.lseek(file, 0, os.SEEK_DATA), os.lseek(file, 0, os.SEEK_HOLE)
            assert found in ((size, 0), (0, size + 4096))
            assert os.lseek(file, size, os.SEEK_HOLE) == size + 4096
            with fails(ENXIO):
                os.lseek(file, size + 4096, os.SEEK_DATA)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 65537, (1 << 20) + 1])
def test_contents_of_any_size(merge: Merge, size: int) -> None:
    content = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
    view = merge({"file": content})
    append(view / "file", b"+")
    assert read(view / "file") == content + b"+"


def test_truncation_without_and_with_copy(merge: Merge) -> None:
    lower: Tree = dict.fromkeys("abcde", b"0123456789")
    view = merge(lower)
    os.truncate(view / "a", 0)
    os.truncate(view / "b", 4)
    os.truncate(view / "c", 20)
    write(view / "d", b"new")
    with opened(view / "e", os.O_RDWR) as file:
        os.ftruncate(file, 3)
    assert [read(view / name) for name in "abcde"] == [
        *(b"", b"0123", b"0123456789" + bytes(10), b"new", b"012"),
    ]


def test_directories_above_are_copied_with_their_metadata(merge: Merge) -> None:
    deep = Dir({"c": Dir({"file": b"x"}, mode=0o701, gid=3)}, mode=0o2770, uid=2)
    view = merge({"a": Dir({"b": deep}, mode=0o1777, xattrs={"user.x": b"y"})})
    expect_only(view, "a/b/c/file", lambda: os.chmod(view / "a/b/c/file", 0o600), "mode")


def test_copied_up_once_is_found_in_the_upper(merge_layers: Merge) -> None:
    view = merge_layers({"a": b"1", "d": {"b": b"2", "c": b"3"}})
    assert view.layers is not None
    assert view.layers.upper is not None
    read(view / "d/b")
    assert names(view.layers.upper) == set()
    os.chmod(view / "d/b", 0o600)
    assert names(view.layers.upper) == {"d"}
    assert names(f"{view.layers.upper}/d") == {"b"}


def test_shared_mapping_writes(merge: Merge) -> None:
    view = merge({"file": b"0" * 8192})
    with (
        opened(view / "file", os.O_RDWR) as file,
        mmap.mmap(file, 8192, mmap.MAP_SHARED) as mapping,
    ):
        mapping[4094:4098] = b"abcd"
        mapping.flush()
        assert os.pread(file, 6, 4093) == b"0abcd0"
    assert read(view / "file")[4094:4098] == b"abcd"
    view.remount()
    assert read(view / "file")[4094:4098] == b"abcd"


def test_private_mapping_leaves_the_file_alone(merge: Merge) -> None:
    view = merge({"file": b"0" * 4096})
    with (
        opened(view / "file") as file,
        mmap.mmap(file, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping,
    ):
        mapping[0:4] = b"abcd"
        assert read(view / "file")[:4] == b"0000"


def test_readers_across_copy_up(merge: Merge) -> None:
    """A read-only descriptor from before a copy-up goes on; on overlayfs it may show old data."""
    view = merge({"file": b"before"})
    with opened(view / "file") as old:
        assert os.pread(old, 10, 0) == b"before"
        write(view / "file", b"after!")
        assert read(view / "file") == b"after!"
        assert os.pread(old, 10, 0) in (
            (b"after!",) if view.descriptors_follow_changes else (b"before", b"after!")
        )
        append(view / "file", b"more")
        if view.descriptors_follow_changes:
            assert os.pread(old, 20, 0) == b"after!more"
            assert os.fstat(old).st_size == 10
            assert os.path.samestat(os.fstat(old), os.stat(view / "file"))


def test_readers_and_writers_opened_in_any_order(merge: Merge) -> None:
    view = merge({"file": b"before"})
    with (
        opened(view / "file") as old,
        opened(view / "file", os.O_WRONLY) as writer,
        opened(view / "file") as new,
    ):
        os.pwrite(writer, b"AFTER", 0)
        assert os.pread(new, 10, 0) == b"AFTERe"
        if view.descriptors_follow_changes:
            assert os.pread(old, 10, 0) == b"AFTERe"
        with opened(view / "file", os.O_RDWR) as newer:
            assert os.pread(newer, 10, 0) == b"AFTERe"


def test_mapped_reader_across_copy_up(merge: Merge) -> None:
    view = merge({"file": b"before".ljust(4096)})
    with (
        opened(view / "file") as old,
        mmap.mmap(old, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as mapping,
    ):
        assert mapping[:6] == b"before"
        with opened(view / "file", os.O_RDWR) as writer:
            os.pwrite(writer, b"after!", 0)
            assert os.pread(writer, 6, 0) == b"after!"
        if view.descriptors_follow_changes:
            assert mapping[:6] == b"after!"
        else:
            assert mapping[:6] in (b"before", b"after!")
