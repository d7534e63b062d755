"""Who may do what: modes, owners, setgid directories, sticky ones, ACLs, and bits that must go."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from errno import EACCES, EPERM

import pytest

from tests.support import libc, trees
from tests.support.posix import append, fails, names, opened, read, umask, write
from tests.support.trees import Dir, File, Symlink, Tree, Whiteout, acl
from tests.support.users import NOBODY, SOMEBODY, acting_as
from tests.support.views import Merge

OPEN = Dir(mode=0o777)


def mode_of(path: str) -> int:
    """Return the permission bits, with setuid, setgid and sticky."""
    return stat.S_IMODE(os.lstat(path).st_mode)


def owner_of(path: str) -> tuple[int, int]:
    """Return user and group."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def test_modes_are_enforced(merge: Merge) -> None:
    view = merge(
        {
            "private": File(b"secret", mode=0o600),
            "public": File(b"open", mode=0o644),
            "theirs": File(b"own", mode=0o600, uid=NOBODY, gid=NOBODY),
            "group": File(b"group", mode=0o640, gid=SOMEBODY),
            "locked": Dir({"x": b""}, mode=0o700),
            "listed": Dir({"x": b""}, mode=0o744),
            "passed": Dir({"x": b"through"}, mode=0o711),
        }
    )
    with acting_as(NOBODY):
        for path in ("private", "group", "locked/x", "listed/x"):
            with fails(EACCES):
                os.open(view / path, os.O_RDONLY)
        assert read(view / "public") == b"open"
        assert read(view / "theirs") == b"own"
        assert read(view / "passed/x") == b"through"
        assert os.listdir(view / "listed") == ["x"]
        for path in ("locked", "passed"):
            with fails(EACCES):
                os.listdir(view / path)
        for attempt in (
            lambda: os.open(view / "public", os.O_WRONLY),
            lambda: os.truncate(view / "public", 0),
            lambda: write(view / "new", b""),
            lambda: os.mkdir(view / "new"),
            lambda: os.unlink(view / "theirs"),
            lambda: os.rename(view / "theirs", view / "mine"),
            lambda: os.setxattr(view / "public", "user.x", b"1"),
            lambda: os.utime(view / "public"),
        ):
            with fails(EACCES):
                attempt()
        for attempt in (
            lambda: os.chmod(view / "public", 0o666),
            lambda: os.chown(view / "theirs", 0, 0),
            lambda: os.utime(view / "public", ns=(1, 2)),
        ):
            with fails(EPERM):
                attempt()
        append(view / "theirs", b"ed")
    with acting_as(NOBODY, groups=[SOMEBODY]):
        assert read(view / "group") == b"group"
    assert read(view / "theirs") == b"owned"
    assert owner_of(view / "theirs") == (NOBODY, NOBODY)


def test_new_things_belong_to_their_maker(merge: Merge) -> None:
    view = merge({"d": OPEN, "w": b""}, upper={"w": Whiteout()})
    os.chmod(view.root, 0o777)
    with acting_as(NOBODY, SOMEBODY), umask(0o027):
        write(view / "d/file", b"")
        os.mkdir(view / "d/dir")
        os.symlink("x", view / "d/link")
        os.mkfifo(view / "d/fifo")
        os.mkdir(view / "w")
    for name, mode in (("d/file", 0o640), ("d/dir", 0o750), ("d/fifo", 0o640), ("w", 0o750)):
        assert (owner_of(view / name), mode_of(view / name)) == ((NOBODY, SOMEBODY), mode)
    assert owner_of(view / "d/link") == (NOBODY, SOMEBODY)


def test_setgid_directories(merge: Merge) -> None:
    view = merge({"d": Dir(mode=0o2777, gid=SOMEBODY)}, upper={"u": Dir(mode=0o2777, gid=SOMEBODY)})
    for parent in ("d", "u"):
        with acting_as(NOBODY), umask(0):
            write(view / f"{parent}/file", b"")
            os.mkdir(view / f"{parent}/dir", 0o755)
            os.mkdir(view / f"{parent}/dir/dir", 0o755)
            os.symlink("x", view / f"{parent}/link")
            # Not in the group, so not allowed to make a setgid file of it.
            os.close(os.open(view / f"{parent}/setgid", os.O_CREAT | os.O_WRONLY, 0o2775))
        assert owner_of(view / f"{parent}/file") == (NOBODY, SOMEBODY)
        assert owner_of(view / f"{parent}/link") == (NOBODY, SOMEBODY)
        assert mode_of(view / f"{parent}/dir") == mode_of(view / f"{parent}/dir/dir") == 0o2755
        assert owner_of(view / f"{parent}/dir/dir") == (NOBODY, SOMEBODY)
        assert mode_of(view / f"{parent}/setgid") == 0o775


def test_sticky_directories(merge: Merge) -> None:
    theirs, others = File(b"", uid=NOBODY), File(b"", uid=SOMEBODY, mode=0o666)
    view = merge({"tmp": Dir({"theirs": theirs, "others": others, "z": others}, mode=0o1777)})
    with acting_as(NOBODY):
        attempts: tuple[Callable[[], object], ...] = (
            lambda: os.unlink(view / "tmp/others"),
            lambda: os.rename(view / "tmp/others", view / "tmp/x"),
            lambda: os.rename(view / "tmp/theirs", view / "tmp/others"),
        )
        for attempt in attempts:
            with fails(EPERM):
                attempt()
        append(view / "tmp/others", b"allowed")
        os.rename(view / "tmp/theirs", view / "tmp/mine")
        os.unlink(view / "tmp/mine")
    assert names(view / "tmp") == {"others", "z"}


def test_default_acls_are_inherited(merge: Merge) -> None:
    default = acl(
        ("u", None, 7), ("u", SOMEBODY, 6), ("g", None, 5), ("m", None, 7), ("o", None, 0)
    )
    view = merge({"d": Dir(mode=0o777, xattrs={"system.posix_acl_default": default})})
    with umask(0o077):
        os.close(os.open(view / "d/file", os.O_CREAT | os.O_WRONLY, 0o664))
        os.mkdir(view / "d/dir", 0o775)
        os.mkfifo(view / "d/fifo", 0o664)
        os.symlink("x", view / "d/link")
    expected = acl(
        ("u", None, 6), ("u", SOMEBODY, 6), ("g", None, 5), ("m", None, 6), ("o", None, 0)
    )
    for name in ("file", "fifo"):
        assert mode_of(view / f"d/{name}") == 0o660
        assert os.getxattr(view / f"d/{name}", "system.posix_acl_access") == expected
    assert mode_of(view / "d/dir") == 0o770
    assert os.getxattr(view / "d/dir", "system.posix_acl_default") == default
    assert os.listxattr(view / "d/link", follow_symlinks=False) == []
    with acting_as(SOMEBODY):
        append(view / "d/file", b"by ACL")
    with acting_as(NOBODY), fails(EACCES):
        os.open(view / "d/file", os.O_RDONLY)


def test_acls_are_enforced_and_follow_the_mode(merge: Merge) -> None:
    access = acl(("u", None, 6), ("u", SOMEBODY, 6), ("g", None, 0), ("m", None, 6), ("o", None, 0))
    denied = acl(("u", None, 6), ("u", SOMEBODY, 0), ("g", None, 4), ("m", None, 4), ("o", None, 4))
    view = merge(
        {
            "granted": File(b"1", mode=0o660, xattrs={"system.posix_acl_access": access}),
            "denied": File(b"2", mode=0o644, xattrs={"system.posix_acl_access": denied}),
            "plain": File(b"3", mode=0o600),
        }
    )
    with acting_as(SOMEBODY):
        append(view / "granted", b"+")
        with fails(EACCES):
            os.open(view / "denied", os.O_RDONLY)
        with fails(EACCES):
            os.open(view / "plain", os.O_RDONLY)
        with fails(EPERM):
            os.setxattr(view / "plain", "system.posix_acl_access", access)
    os.setxattr(view / "plain", "system.posix_acl_access", access)
    assert mode_of(view / "plain") == 0o660
    os.chmod(view / "granted", 0o640)
    with acting_as(SOMEBODY):
        assert read(view / "plain") == b"3"
        with fails(EACCES):
            os.open(view / "granted", os.O_WRONLY)
    os.removexattr(view / "plain", "system.posix_acl_access")
    with acting_as(SOMEBODY), fails(EACCES):
        os.open(view / "plain", os.O_RDONLY)
    view.remount()
    assert mode_of(view / "granted") == 0o640


def test_asking_for_acls_that_are_not_there(merge: Merge) -> None:
    view = merge({"file": b"", "d": {}, "link": Symlink("file")})
    for name in ("file", "d"):
        for kind in ("access", "default"):
            with pytest.raises(OSError, match="No data available"):
                os.getxattr(view / name, f"system.posix_acl_{kind}")
        assert os.listxattr(view / name) == []


CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""cap_net_bind_service+ep, as setcap(8) writes it."""


def test_privileges_go_when_others_write(merge: Merge) -> None:
    lower: Tree = {
        "setuid": File(b"#!/bin/sh\n", mode=0o4777),
        "setgid": File(b"#!/bin/sh\n", mode=0o2777),
        "cut": File(b"#!/bin/sh\n", mode=0o6777),
        "not-executable": File(b"data", mode=0o2767, gid=SOMEBODY),
    }
    view = merge(lower, upper={f"u-{name}": node for name, node in lower.items()})
    # The group's own members may write to a setgid file that is no program.
    with acting_as(NOBODY, groups=[SOMEBODY]):
        for name in ("setuid", "setgid", "not-executable"):
            append(view / name, b"evil\n")
            append(view / f"u-{name}", b"evil\n")
        for name in ("cut", "u-cut"):
            os.truncate(view / name, 0)
    modes = {"setuid": 0o777, "setgid": 0o777, "cut": 0o777, "not-executable": 0o2767}
    for prefix in ("", "u-"):
        assert {name: mode_of(view / (prefix + name)) for name in modes} == modes


def test_privileges_go_with_the_owner(merge: Merge) -> None:
    view = merge({"a": File(b"", mode=0o6755), "d": Dir(mode=0o6755), "b": File(mode=0o2745)})
    os.chown(view / "a", 1, 1)
    os.chown(view / "d", 1, 1)
    os.chown(view / "b", 1, 1)
    assert (mode_of(view / "a"), mode_of(view / "d")) == (0o755, 0o6755)
    assert mode_of(view / "b") == 0o2745


def test_capabilities_go_with_any_write(merge: Merge) -> None:
    capable = File(b"#!", mode=0o777, xattrs={"security.capability": CAPABILITY})
    lower: Tree = dict.fromkeys(("write", "truncate", "chown", "chmod"), capable)
    view = merge(lower, upper={f"u-{name}": node for name, node in lower.items()})
    for prefix in ("", "u-"):
        assert os.getxattr(view / f"{prefix}write", "security.capability") == CAPABILITY
        append(view / f"{prefix}write", b"evil")
        os.truncate(view / f"{prefix}truncate", 1)
        os.chown(view / f"{prefix}chown", 1, 1)
        os.chmod(view / f"{prefix}chmod", 0o755)
        for name in ("write", "truncate", "chown"):
            assert os.listxattr(view / f"{prefix}{name}") == [], name
        assert os.getxattr(view / f"{prefix}chmod", "security.capability") == CAPABILITY


def test_chmod_by_one_not_in_the_group(merge: Merge) -> None:
    view = merge({"file": File(b"", uid=NOBODY, gid=SOMEBODY)})
    with acting_as(NOBODY):
        os.chmod(view / "file", 0o2755)
    assert mode_of(view / "file") == 0o755


def test_owner_may_give_to_own_groups_only(merge: Merge) -> None:
    view = merge({"file": File(b"", uid=NOBODY, gid=NOBODY)})
    with acting_as(NOBODY, groups=[SOMEBODY]):
        os.chown(view / "file", -1, SOMEBODY)
        with fails(EPERM):
            os.chown(view / "file", -1, 0)
        with fails(EPERM):
            os.chown(view / "file", SOMEBODY, -1)
    assert owner_of(view / "file") == (NOBODY, SOMEBODY)


def test_times(merge: Merge) -> None:
    view = merge({"file": File(b"", uid=NOBODY, mode=0o600), "free": File(b"", mode=0o666)})
    os.utime(view / "file", ns=(1, 4_102_444_800_000_000_001))
    status = os.stat(view / "file")
    assert (status.st_atime_ns, status.st_mtime_ns) == (1, 4_102_444_800_000_000_001)
    with acting_as(NOBODY):
        os.utime(view / "file", ns=(5, 6))
        os.utime(view / "free")
        with fails(EPERM):
            os.utime(view / "free", ns=(5, 6))
    assert os.stat(view / "file").st_mtime_ns == 6
    assert os.stat(view / "free").st_mtime_ns > trees.MTIME_NS


def test_one_time_alone(merge: Merge) -> None:
    view = merge({"omit": b"", "now": File(b"", mode=0o666)})
    libc.utimensat(view / "omit", (5, 6), (0, libc.UTIME_OMIT))
    status = os.stat(view / "omit")
    assert (status.st_atime_ns, status.st_mtime_ns) == (5_000_000_006, trees.MTIME_NS)
    libc.utimensat(view / "omit", (0, libc.UTIME_OMIT), (7, 8))
    status = os.stat(view / "omit")
    assert (status.st_atime_ns, status.st_mtime_ns) == (5_000_000_006, 7_000_000_008)
    with acting_as(NOBODY):
        libc.utimensat(view / "now", (0, libc.UTIME_NOW), (0, libc.UTIME_NOW))
        with fails(EPERM):
            libc.utimensat(view / "now", (0, libc.UTIME_OMIT), (0, libc.UTIME_NOW))
        libc.utimensat(view / "omit", (0, libc.UTIME_OMIT), (0, libc.UTIME_OMIT))
    assert os.stat(view / "now").st_mtime_ns > trees.MTIME_NS
    view.remount()
    assert os.stat(view / "omit").st_mtime_ns == 7_000_000_008


def test_change_time_never_goes_back(merge: Merge) -> None:
    view = merge({"file": b""})
    changes: tuple[Callable[[], object], ...] = (
        lambda: os.chmod(view / "file", 0o600),
        lambda: os.setxattr(view / "file", "user.x", b""),
        lambda: os.link(view / "file", view / "link"),
        lambda: os.unlink(view / "link"),
    )
    for change in changes:
        before = os.stat(view / "file").st_ctime_ns
        change()
        assert os.stat(view / "file").st_ctime_ns >= before
    assert os.stat(view / "file").st_ctime_ns > trees.MTIME_NS


def test_descriptors_keep_the_rights_they_were_opened_with(merge: Merge) -> None:
    view = merge({"file": File(b"secret", mode=0o600, uid=NOBODY)})
    with acting_as(NOBODY):
        file = os.open(view / "file", os.O_RDWR)
    os.chown(view / "file", 0, 0)
    with acting_as(NOBODY):
        assert os.pread(file, 6, 0) == b"secret"
        os.pwrite(file, b"SECRET", 0)
        os.close(file)
        with fails(EACCES):
            os.open(view / "file", os.O_RDONLY)
    with opened(view / "file") as again:
        assert os.pread(again, 6, 0) == b"SECRET"
