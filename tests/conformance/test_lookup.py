"""Names: what a merged view finds and lists."""

from __future__ import annotations

import os
import stat
from errno import EEXIST, ENAMETOOLONG, ENOENT, ENOTDIR, ENOTEMPTY

from tests.support.posix import fails, names, read, write
from tests.support.trees import Device, Dir, Fifo, Socket, Symlink, Tree, Whiteout
from tests.support.views import Merge

LOWEST: Tree = {
    "low": b"lowest",
    "shared": {"a": b"a of lowest", "b": b"b of lowest", "deep": {"x": b"x"}},
    "hidden": b"lowest",
    "replaced": {"inside": b"lowest"},
    "opaque": {"gone": b"", "kept": b"lowest"},
}
MIDDLE: Tree = {
    "shared": Dir({"b": b"b of middle", "c": b"c of middle"}, mode=0o711),
    "hidden": Whiteout(),
    "middle": b"middle",
}
UPPER: Tree = {
    "shared": Dir({"a": Whiteout(), "deep": {"y": b"y"}, "d": b"d of upper"}, mode=0o750, uid=7),
    "replaced": b"a file now",
    "opaque": Dir({"kept": b"upper"}, opaque=True),
    "middle": Whiteout(),
}


def test_topmost_layer_wins(merge: Merge) -> None:
    view = merge(MIDDLE, LOWEST, upper=UPPER)
    assert read(view / "low") == b"lowest"
    assert read(view / "shared/b") == b"b of middle"
    assert read(view / "shared/deep/x") == b"x"
    assert read(view / "shared/deep/y") == b"y"
    assert read(view / "replaced") == b"a file now"
    status = os.stat(view / "shared")
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o750, 7)


def test_listings_merge(merge: Merge) -> None:
    view = merge(MIDDLE, LOWEST, upper=UPPER)
    assert names(view.root) == {"low", "shared", "replaced", "opaque"}
    assert names(view / "shared") == {"b", "c", "d", "deep"}
    assert names(view / "shared/deep") == {"x", "y"}
    assert names(view / "opaque") == {"kept"}


def test_whiteouts_hide(merge: Merge) -> None:
    view = merge(MIDDLE, LOWEST, upper=UPPER)
    for path in ("hidden", "middle", "shared/a", "opaque/gone", "nowhere", "nowhere/deeper"):
        with fails(ENOENT):
            os.lstat(view / path)
        with fails(ENOENT):
            os.open(view / path, os.O_RDONLY)
    with fails(ENOTDIR):
        os.lstat(view / "replaced/inside")


def test_listing_follows_every_change(merge: Merge) -> None:
    view = merge({"d": {"a": b"", "b": b"", "sub": {"x": b""}}}, upper={"d": {"c": b""}})
    assert names(view / "d") == {"a", "b", "c", "sub"}
    os.unlink(view / "d/a")
    assert names(view / "d") == {"b", "c", "sub"}
    write(view / "d/a", b"again")
    os.rename(view / "d/b", view / "d/e")
    assert names(view / "d") == {"a", "c", "e", "sub"}
    os.mkdir(view / "d/new")
    os.symlink("a", view / "d/link")
    os.link(view / "d/c", view / "d/hard")
    assert names(view / "d") == {"a", "c", "e", "sub", "new", "link", "hard"}
    os.rename(view / "d/sub", view / "moved")
    assert names(view / "d") == {"a", "c", "e", "new", "link", "hard"}
    assert names(view / "moved") == {"x"}
    view.remount()
    assert names(view / "d") == {"a", "c", "e", "new", "link", "hard"}
    assert names(view / "moved") == {"x"}


def test_listed_types_are_true(merge: Merge) -> None:
    kinds: Tree = {
        "file": b"",
        "directory": {},
        "symlink": Symlink("file"),
        "fifo": Fifo(),
        "socket": Socket(),
        "character": Device(stat.S_IFCHR, 1, 3),
        "block": Device(stat.S_IFBLK, 7, 99),
    }
    view = merge({"lower": kinds}, upper={"upper": kinds})
    for where in ("lower", "upper"):
        with os.scandir(view / where) as listing:
            entries = {entry.name: entry for entry in listing}
        assert entries.keys() == kinds.keys()
        for name, entry in entries.items():
            mode = os.lstat(view / f"{where}/{name}").st_mode
            assert entry.is_file(follow_symlinks=False) == stat.S_ISREG(mode)
            assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(mode)
            assert entry.is_symlink() == stat.S_ISLNK(mode)


def test_recreated_directory_is_empty(merge: Merge) -> None:
    view = merge({"d": {"old": b"", "sub": {"older": b""}}})
    with fails(ENOTEMPTY):
        os.rmdir(view / "d")
    os.unlink(view / "d/old")
    os.unlink(view / "d/sub/older")
    os.rmdir(view / "d/sub")
    os.rmdir(view / "d")
    with fails(ENOENT):
        os.lstat(view / "d")
    os.mkdir(view / "d")
    assert names(view / "d") == set()
    os.mkdir(view / "d/sub")
    assert names(view / "d/sub") == set()
    view.remount()
    assert names(view / "d") == {"sub"}
    assert names(view / "d/sub") == set()


def test_removing_what_hides(merge: Merge) -> None:
    view = merge({"a": b"lower", "d": {"x": b""}}, upper={"a": b"upper", "d": {"x": b"upper"}})
    os.unlink(view / "a")
    os.unlink(view / "d/x")
    os.rmdir(view / "d")
    assert names(view.root) == set()
    view.remount()
    assert names(view.root) == set()


def test_creation_over_a_whiteout(merge: Merge) -> None:
    lower: Tree = dict.fromkeys(("file", "directory", "symlink", "fifo", "link"), b"lower")
    view = merge(lower, upper={"other": b"other", **dict.fromkeys(lower, Whiteout())})
    write(view / "file", b"new")
    os.mkdir(view / "directory")
    os.symlink("target", view / "symlink")
    os.mkfifo(view / "fifo")
    os.link(view / "other", view / "link")
    assert read(view / "file") == b"new"
    assert names(view / "directory") == set()
    assert os.readlink(view / "symlink") == "target"
    assert stat.S_ISFIFO(os.lstat(view / "fifo").st_mode)
    assert os.path.samefile(view / "other", view / "link")


def test_creation_over_what_is_there(merge: Merge) -> None:
    view = merge({"low": b"", "d": {}}, upper={"up": b""})
    for name in ("low", "d", "up"):
        with fails(EEXIST):
            os.open(view / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        with fails(EEXIST):
            os.mkdir(view / name)
        with fails(EEXIST):
            os.symlink("x", view / name)
        with fails(EEXIST):
            os.mkfifo(view / name)
        with fails(EEXIST):
            os.link(view / "low", view / name)


def test_names_are_bytes_of_up_to_255(merge: Merge) -> None:
    long, odd = "n" * 255, os.fsdecode(b"\xff\xfe\n\\ %s'\"" + b"\x80" * 246)
    view = merge({long: b"lower", odd: b"lower"})
    assert names(view.root) == {long, odd}
    os.chmod(view / long, 0o600)
    os.rename(view / odd, view / ("o" + odd[1:]))
    os.mkdir(view / ("m" * 255))
    os.unlink(view / long)
    assert names(view.root) == {"o" + odd[1:], "m" * 255}
    view.remount()
    assert names(view.root) == {"o" + odd[1:], "m" * 255}
    assert read(view / ("o" + odd[1:])) == b"lower"


def test_names_of_256_bytes_are_too_long(merge: Merge) -> None:
    view = merge({"a": b""})
    long = view / ("n" * 256)
    for attempt in (
        lambda: os.lstat(long),
        lambda: os.open(long, os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(long),
        lambda: os.symlink("x", long),
        lambda: os.link(view / "a", long),
        lambda: os.rename(view / "a", long),
        lambda: os.unlink(long),
        lambda: os.rmdir(long),
        lambda: os.mkfifo(long),
    ):
        with fails(ENAMETOOLONG):
            attempt()


def test_deep_paths(merge: Merge) -> None:
    """Deeper than PATH_MAX: whoever joins paths to reach a layer's file fails here."""
    name = "d" * 250
    lower: dict[str, Tree] = {"bottom": {}}
    for _ in range(12):
        lower = {name: lower}
    view = merge(lower)
    here = os.open(view.root, os.O_RDONLY)
    try:
        for level in range(24):
            if level >= 12:
                os.mkdir(name, dir_fd=here)
            there = os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = there
        with open(os.open("file", os.O_CREAT | os.O_RDWR, dir_fd=here), "r+b") as file:
            file.write(b"deep")
        assert os.listdir(here) == ["file"]
        os.rename("file", "renamed", src_dir_fd=here, dst_dir_fd=here)
        assert os.stat("renamed", dir_fd=here).st_size == 4
        os.unlink("renamed", dir_fd=here)
        for _ in range(12):
            there = os.open("..", os.O_RDONLY, dir_fd=here)
            os.rmdir(name, dir_fd=there)
            os.close(here)
            here = there
        assert os.listdir(here) == ["bottom"]
    finally:
        os.close(here)
