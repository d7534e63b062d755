"""What layers hold on disk, written by hand as other tools write it, and left there by changes."""

from __future__ import annotations

import os
import stat
from errno import EROFS

from tests.support import trees
from tests.support.posix import append, fails, names, read, write
from tests.support.trees import Dir, File, Tree, Whiteout
from tests.support.views import Merge, View


def upper_of(view: View) -> str:
    """Return the path of a view's upper layer."""
    assert view.layers is not None
    assert view.layers.upper is not None
    return view.layers.upper


def test_xattr_whiteouts(merge_layers: Merge) -> None:
    """An empty file with an xattr, in a directory marked `x`: what unprivileged tools write."""
    marked = {"trusted.overlay.opaque": b"x"}
    whiteout = File(b"", xattrs={"trusted.overlay.whiteout": b"y"})
    view = merge_layers(
        {"d": Dir({"gone": whiteout, "new": b""}, xattrs=marked)},
        {"d": {"gone": b"lowest", "kept": b"lowest"}},
    )
    assert names(view / "d") == {"new", "kept"}
    assert not os.path.lexists(view / "d/gone")
    write(view / "d/gone", b"back")
    assert names(view / "d") == {"new", "kept", "gone"}


def test_redirects_of_either_form(merge_layers: Merge) -> None:
    lower: Tree = {"a": {"old": {"x": b"x"}}, "b": {"y": b"y"}}
    absolute = Dir({"new": b""}, xattrs={"trusted.overlay.redirect": b"/a/old"})
    relative = Dir({}, xattrs={"trusted.overlay.redirect": b"b"})
    view = merge_layers(
        lower,
        upper={"moved": absolute, "c": relative, "b": Whiteout(), "a": {"old": Whiteout()}},
    )
    assert names(view.root) == {"a", "moved", "c"}
    assert names(view / "moved") == {"x", "new"}
    assert names(view / "c") == {"y"}
    assert names(view / "a") == set()


def test_whiteouts_left_on_disk(merge_layers: Merge) -> None:
    view = merge_layers({"file": b"", "d": {"x": b""}}, upper={"only-upper": b""})
    os.unlink(view / "file")
    os.unlink(view / "d/x")
    os.rmdir(view / "d")
    os.unlink(view / "only-upper")
    assert names(upper_of(view)) == {"file", "d"}
    for name in ("file", "d"):
        status = os.lstat(f"{upper_of(view)}/{name}")
        assert stat.S_ISCHR(status.st_mode)
        assert status.st_rdev == 0


def test_no_whiteout_where_nothing_is_hidden(merge_layers: Merge) -> None:
    view = merge_layers({"d": {}})
    write(view / "d/temporary", b"")
    os.unlink(view / "d/temporary")
    os.mkdir(view / "d/sub")
    write(view / "d/sub/file", b"")
    os.unlink(view / "d/sub/file")
    os.rmdir(view / "d/sub")
    assert names(f"{upper_of(view)}/d") == set()


def test_workdir_is_empty_after_changes(merge_layers: Merge) -> None:
    view = merge_layers({"a": b"1", "d": {"x": b"", "y": b""}})
    append(view / "a", b"2")
    os.unlink(view / "d/x")
    os.rename(view / "d", view / "e")
    os.mkdir(view / "d")
    os.rename(view / "a", view / "e/y")
    view.unmount()
    assert view.layers is not None
    assert names(f"{view.layers.work}/work") == set()
    view.mount()


def test_leftovers_in_the_workdir_are_cleaned(merge_layers: Merge) -> None:
    view = merge_layers({"a": b"1"})
    view.unmount()
    assert view.layers is not None
    leftovers: Tree = {"#1": b"half a copy", "#2": {"file": b""}, "#3": Whiteout()}
    trees.build(leftovers, f"{view.layers.work}/work")
    view.mount()
    assert names(view.root) == {"a"}
    assert names(f"{view.layers.work}/work") == set()


def test_many_lowers(merge_layers: Merge) -> None:
    lowers: list[Tree] = [
        {f"own{number}": b"", "shared": str(number).encode(), "d": {f"in{number}": b""}}
        for number in range(20)
    ]
    view = merge_layers(*lowers)
    assert read(view / "shared") == b"0"
    assert len(names(view / "d")) == 20
    assert len(names(view.root)) == 22


def test_nested_marks_are_unescaped(merge_layers: Merge) -> None:
    """A lower that holds the upper of a nested overlay, as a container image may."""
    nested = {"trusted.overlay.overlay.opaque": b"y"}
    view = merge_layers({"d": Dir({"x": b""}, xattrs=nested)}, {"d": {"below": b""}})
    assert os.listxattr(view / "d") == ["trusted.overlay.opaque"]
    assert names(view / "d") == {"x", "below"}
    os.chmod(view / "d", 0o700)
    assert os.listxattr(view / "d") == ["trusted.overlay.opaque"]
    assert names(view / "d") == {"x", "below"}


def test_view_without_upper(merge_layers: Merge) -> None:
    view = merge_layers({"a": b"1", "d": {"x": b""}}, {"b": b"2", "d": {"y": b""}})
    view.unmount()
    assert view.layers is not None
    assert view.file_system is not None
    with view.file_system.mounted(type(view.layers)(view.layers.lowers), view.root):
        assert names(view.root) == {"a", "b", "d"}
        assert names(view / "d") == {"x", "y"}
        assert read(view / "b") == b"2"
        for attempt in (
            lambda: os.open(view / "a", os.O_WRONLY),
            lambda: os.unlink(view / "a"),
            lambda: os.mkdir(view / "new"),
            lambda: os.chmod(view / "a", 0),
        ):
            with fails(EROFS):
                attempt()
        assert os.statvfs(view.root).f_flag & os.ST_RDONLY
    view.mount()
