"""Extended attributes, and those among them that are the overlay's own."""

from __future__ import annotations

import os
from errno import E2BIG, EEXIST, ENODATA, EPERM, ERANGE

import pytest

from tests.support import trees
from tests.support.posix import append, fails
from tests.support.trees import Dir, Fifo, File, Symlink, Whiteout
from tests.support.users import NOBODY, acting_as
from tests.support.views import Merge


def test_set_get_list_remove(merge: Merge) -> None:
    values = {"user.low": b"lower", "trusted.low": b"\0\1"}
    view = merge({"file": File(b"", xattrs=values), "d": Dir(xattrs=values)})
    for name in ("file", "d"):
        path = view / name
        assert set(os.listxattr(path)) == values.keys()
        os.setxattr(path, "user.new", b"new", os.XATTR_CREATE)
        with fails(EEXIST):
            os.setxattr(path, "user.new", b"newer", os.XATTR_CREATE)
        with fails(ENODATA):
            os.setxattr(path, "user.none", b"", os.XATTR_REPLACE)
        os.setxattr(path, "user.low", b"replaced", os.XATTR_REPLACE)
        os.setxattr(path, "user.empty", b"")
        os.removexattr(path, "trusted.low")
        with fails(ENODATA):
            os.removexattr(path, "trusted.low")
        with fails(ENODATA):
            os.getxattr(path, "trusted.low")
        expected = {"user.new": b"new", "user.low": b"replaced", "user.empty": b""}
        assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == expected
        view.remount()
        assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == expected


def test_size_limits(merge: Merge) -> None:
    view = merge({"file": b""})
    os.setxattr(view / "file", "user.big", b"x" * 3000)
    assert os.getxattr(view / "file", "user.big") == b"x" * 3000
    with fails(E2BIG):
        os.setxattr(view / "file", "user.big", b"x" * 65537)
    with fails(ERANGE):
        os.setxattr(view / "file", "user." + "n" * 251, b"")


def test_symlinks_are_not_followed(merge: Merge) -> None:
    """Neither within the view, nor, which is worse, on the host, as root."""
    view = merge({"host": Symlink("/etc/passwd"), "target": b"", "link": Symlink("target")})
    for name in ("link", "host"):
        path = view / name
        os.setxattr(path, "trusted.mine", b"1", follow_symlinks=False)
        assert os.listxattr(path, follow_symlinks=False) == ["trusted.mine"]
        assert os.getxattr(path, "trusted.mine", follow_symlinks=False) == b"1"
        with fails(EPERM):
            os.setxattr(path, "user.mine", b"1", follow_symlinks=False)
        os.removexattr(path, "trusted.mine", follow_symlinks=False)
        os.setxattr(path, "trusted.mine", b"2", follow_symlinks=False)
    assert "trusted.mine" not in os.listxattr("/etc/passwd")
    assert os.listxattr(view / "target") == []


def test_who_may_use_which(merge: Merge) -> None:
    view = merge(
        {"file": File(b"", uid=NOBODY, xattrs={"trusted.x": b""}), "fifo": Fifo(uid=NOBODY)}
    )
    with acting_as(NOBODY):
        os.setxattr(view / "file", "user.mine", b"1")
        assert os.listxattr(view / "file") == ["user.mine"]
        with fails(EPERM):
            os.setxattr(view / "file", "trusted.mine", b"1")
        with fails(EPERM):
            os.setxattr(view / "fifo", "user.mine", b"1")
    with fails(EPERM):
        os.setxattr(view / "fifo", "user.mine", b"1")


def test_own_attributes_do_not_show(merge_layers: Merge) -> None:
    view = merge_layers(
        {"a": b"", "d": {"x": b"", "sub": {}}, "opaque": {"hidden": b""}},
        upper={"opaque": Dir({"seen": b""}, opaque=True), "w": Whiteout()},
    )
    append(view / "a", b"copied")
    os.rename(view / "d", view / "moved")
    os.link(view / "a", view / "linked")
    for path in trees.snapshot(view.root):
        full = os.fsencode(view.root) + b"/" + path
        assert os.listxattr(full, follow_symlinks=False) == [], path
        for name in ("origin", "opaque", "redirect", "impure", "nlink", "metacopy"):
            with fails(ENODATA):
                os.getxattr(full, f"trusted.overlay.{name}", follow_symlinks=False)


@pytest.mark.parametrize("name", ["trusted.overlay.opaque", "trusted.overlay.redirect"])
def test_own_attributes_set_by_programs_are_theirs(merge_layers: Merge, name: str) -> None:
    """Escaped on disk, so that a program that builds layers inside (a nested overlay) can work."""
    view = merge_layers({"d": {"x": b""}, "file": b""})
    for path in ("d", "file"):
        os.setxattr(view / path, name, b"y")
        assert os.getxattr(view / path, name) == b"y"
        assert os.listxattr(view / path) == [name]
    assert os.listdir(view / "d") == ["x"]
    view.remount()
    assert os.getxattr(view / "d", name) == b"y"
    assert os.listdir(view / "d") == ["x"]
    os.removexattr(view / "d", name)
    assert os.listxattr(view / "d") == []


def test_user_namespace_is_free_in_trusted_mode(merge: Merge) -> None:
    view = merge({"d": Dir({"x": b""}, xattrs={"user.overlay.opaque": b"y"})})
    assert os.getxattr(view / "d", "user.overlay.opaque") == b"y"
    os.setxattr(view / "d", "user.overlay.redirect", b"/elsewhere")
    assert set(os.listxattr(view / "d")) == {"user.overlay.opaque", "user.overlay.redirect"}
    view.remount()
    assert set(os.listxattr(view / "d")) == {"user.overlay.opaque", "user.overlay.redirect"}
