"""`sessiond-overlay` as a command: options, refusals, mount(8), and an upper that is full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, ENOSPC, EROFS

import pytest

from tests.support import libc, trees
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers, detach, is_mounted
from tests.support.posix import append, fails, names, read, write
from tests.support.sessiond_overlay import REPOSITORY, SessiondOverlay, run
from tests.support.trees import Dir, File, Tree
from tests.support.users import NOBODY, acting_as
from tests.support.views import make_layers

SESSIOND = SessiondOverlay()


@pytest.fixture
def layers(disk: str, fast: str) -> Layers:
    """One lower, and an upper on another file system."""
    return make_layers(({"a": b"lower", "d": {"x": b""}},), {}, disk, fast)


@pytest.fixture
def root(fast: str) -> str:
    """A mount point."""
    path = f"{fast}/root"
    os.mkdir(path)
    return path


def expect_refusal(mount_point: str, *options: str, about: str) -> None:
    """Demand one line that names what is wrong, a failure, and no mount."""
    done = run("-o", ",".join(options), mount_point)
    assert done.returncode not in (0, -9), done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("sessiond-overlay: ")
    assert about in done.stderr
    assert not is_mounted(mount_point)


def test_missing_directories(layers: Layers, root: str) -> None:
    lower, nowhere = layers.lowers[0], f"{root}/nowhere"
    upper = f"upperdir={layers.upper}"
    work = f"workdir={layers.work}"
    expect_refusal(root, f"lowerdir={nowhere}", upper, work, about=nowhere)
    expect_refusal(root, f"lowerdir={lower}:{nowhere}", upper, work, about=nowhere)
    expect_refusal(root, f"lowerdir={lower}", f"upperdir={nowhere}", work, about=nowhere)
    expect_refusal(root, f"lowerdir={lower}", upper, f"workdir={nowhere}", about=nowhere)
    expect_refusal(root, f"lowerdir={lower}/a", upper, work, about=f"{lower}/a")
    expect_refusal(nowhere, layers.options(), about=nowhere)
    expect_refusal(f"{lower}/a", layers.options(), about=f"{lower}/a")


def test_incomplete_and_unknown_options(layers: Layers, root: str) -> None:
    lower = f"lowerdir={layers.lowers[0]}"
    upper = f"upperdir={layers.upper}"
    expect_refusal(root, upper, f"workdir={layers.work}", about="lowerdir")
    expect_refusal(root, lower, upper, about="workdir")
    expect_refusal(root, lower, f"workdir={layers.work}", about="upperdir")
    expect_refusal(root, layers.options(), "frobnicate=yes", about="frobnicate")
    expect_refusal(root, layers.options(), "lowerdir=", about="lowerdir")


def test_no_mount_point(layers: Layers) -> None:
    done = run("-o", layers.options())
    assert done.returncode != 0
    assert "mountpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_upper_and_workdir_on_different_file_systems(layers: Layers, root: str, disk: str) -> None:
    expect_refusal(
        root,
        f"lowerdir={layers.lowers[0]}",
        f"upperdir={layers.upper}",
        f"workdir={disk}",
        about=disk,
    )


def test_workdir_within_upper(layers: Layers, root: str) -> None:
    os.mkdir(f"{layers.upper}/work")
    expect_refusal(
        root,
        f"lowerdir={layers.lowers[0]}",
        f"upperdir={layers.upper}",
        f"workdir={layers.upper}/work",
        about=f"{layers.upper}/work",
    )


@pytest.mark.parametrize("other", [SESSIOND, KernelOverlay()], ids=lambda other: str(other.name))
def test_upper_in_use(
    layers: Layers, root: str, fast: str, other: SessiondOverlay | KernelOverlay
) -> None:
    second = f"{fast}/second"
    os.mkdir(second)
    with other.mounted(layers, second):
        expect_refusal(root, layers.options(), about=layers.upper or "")
        assert read(f"{second}/a") == b"lower"
    with SESSIOND.mounted(layers, root):
        assert read(f"{root}/a") == b"lower"


@contextmanager
def orphans_adopted() -> Iterator[None]:
    """Be the parent of workers in the background, and wait for their end."""
    own = children()
    libc.adopt_orphans(True)
    try:
        yield
        for orphan in children() - own:
            os.waitpid(orphan, 0)
    finally:
        libc.adopt_orphans(False)


def children() -> set[int]:
    """Return the processes whose parent this one is."""
    found = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/stat", "rb") as file:
                parent = file.read().rpartition(b") ")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if int(parent) == os.getpid():
            found.add(int(process))
    return found


def test_in_the_background(layers: Layers, root: str) -> None:
    """Without -f the program returns when the view can be used, and the worker ends with it."""
    with orphans_adopted():
        try:
            done = run("-o", layers.options(), root)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert is_mounted(root)
            append(f"{root}/a", b"+")
            assert read(f"{root}/a") == b"lower+"
        finally:
            detach(root)
    with KernelOverlay().mounted(layers, root):
        assert read(f"{root}/a") == b"lower+"


@contextmanager
def installed(directory: str) -> Iterator[None]:
    """Have `sessiond-overlay` in /usr/local/sbin, as this process sees it.

    mount(8) runs mount.fuse3, which has a shell run the part of the type after ``fuse.``. mount(8)
    takes PATH out of the environment, so the shell looks in the system's directories only.
    """
    os.mkdir(f"{directory}/bin")
    program = f"{directory}/bin/sessiond-overlay"
    command = f'PYTHONPATH={REPOSITORY} exec {sys.executable} -m sessiond.fuse.mount "$@"'
    write(program, f"#!/bin/sh\n{command}\n".encode())
    os.chmod(program, 0o755)
    libc.mount(f"{directory}/bin", "/usr/local/sbin", "", libc.MS_BIND)
    try:
        yield
    finally:
        libc.umount("/usr/local/sbin")


def mount(options: str, source: str, mount_point: str) -> subprocess.CompletedProcess[str]:
    """Run mount(8)."""
    return subprocess.run(
        ["mount", "-t", "fuse.sessiond-overlay", "-o", options, source, mount_point],
        capture_output=True,
        text=True,
        check=False,
    )


def test_through_mount(layers: Layers, root: str, fast: str) -> None:
    with installed(fast), orphans_adopted():
        try:
            done = mount(f"{layers.options()},allow_other", "the-source", root)
            assert (done.returncode, done.stderr) == (0, "")
            with open("/proc/self/mountinfo") as table:
                line = next(line for line in table if f" {root} " in line)
            assert " - fuse.sessiond-overlay the-source " in line
            assert "allow_other" in line
            assert read(f"{root}/a") == b"lower"
            with acting_as(NOBODY):
                assert read(f"{root}/a") == b"lower"
        finally:
            detach(root)


def test_failure_through_mount_is_reported(root: str, fast: str) -> None:
    with installed(fast):
        done = mount("lowerdir=/nowhere", "source", root)
    assert done.returncode != 0
    assert "/nowhere" in done.stderr
    assert not is_mounted(root)


def test_source_is_shown(layers: Layers, root: str) -> None:
    with orphans_adopted():
        try:
            assert run("-o", layers.options(), "my-source", root).returncode == 0
            with open("/proc/self/mountinfo") as table:
                assert any(f" {root} " in line and " my-source " in line for line in table)
        finally:
            detach(root)


def test_others_are_kept_out_unless_allowed(layers: Layers, root: str) -> None:
    with SESSIOND.mounted(layers, root, "rw"), acting_as(NOBODY), fails(EACCES):
        os.listdir(root)
    with SESSIOND.mounted(layers, root, "allow_other"), acting_as(NOBODY):
        assert names(root) == {"a", "d"}


def test_read_only(layers: Layers, root: str) -> None:
    with SESSIOND.mounted(layers, root):
        append(f"{root}/a", b"+")
    before = trees.snapshot(layers.upper or "")
    with SESSIOND.mounted(layers, root, "ro"):
        assert read(f"{root}/a") == b"lower+"
        with fails(EROFS):
            os.open(f"{root}/a", os.O_WRONLY)
        with fails(EROFS):
            os.mkdir(f"{root}/new")
    trees.assert_same(
        before, trees.snapshot(layers.upper or ""), "a read-only mount changed its upper"
    )


def test_mount_flags(layers: Layers, root: str) -> None:
    with SESSIOND.mounted(layers, root, "nosuid", "nodev", "noexec"):
        flags = os.statvfs(root).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        assert flags & os.ST_NOEXEC
    with SESSIOND.mounted(layers, root):
        assert not os.statvfs(root).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)


def test_user_xattrs(disk: str, fast: str, root: str) -> None:
    """The same marks under user.overlay., as the kernel reads them with userxattr."""
    lower: Tree = {"d": {"hidden": b""}, "gone": {"x": b""}, "file": b"1"}
    layers = make_layers((lower,), {}, disk, fast)
    trees.build({"d": Dir({"seen": b""}, opaque=True)}, layers.upper or "", xattr_namespace="user")
    with SESSIOND.mounted(layers, root, "userxattr", "allow_other"):
        assert names(f"{root}/d") == {"seen"}
        append(f"{root}/file", b"2")
        os.unlink(f"{root}/gone/x")
        os.rmdir(f"{root}/gone")
        os.mkdir(f"{root}/gone")
        assert names(f"{root}/gone") == set()
        assert os.listxattr(f"{root}/d") == []
        os.setxattr(f"{root}/d", "trusted.overlay.opaque", b"mine")
        assert os.listxattr(f"{root}/d") == ["trusted.overlay.opaque"]
        shown = trees.snapshot(root)
    assert os.getxattr(f"{layers.upper}/gone", "user.overlay.opaque") == b"y"
    with KernelOverlay().mounted(layers, root, "userxattr"):
        trees.assert_same(shown, trees.snapshot(root), "the kernel shows another tree")


def test_separators_in_names(disk: str, fast: str, root: str) -> None:
    """Escaped as for the kernel's overlayfs."""
    lower = f"{disk}/a:b,c\\d"
    os.mkdir(lower)
    write(f"{lower}/x", b"found")
    escaped = lower.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    with SESSIOND.mounted(Layers([escaped]), root):
        assert read(f"{root}/x") == b"found"
    upper = make_layers(({},), {}, disk, fast)
    with SESSIOND.mounted(Layers([escaped], upper.upper, upper.work), root):
        append(f"{root}/x", b"+")


def test_relative_directories(layers: Layers, root: str) -> None:
    """Names are relative to where the program is started, as of any other."""
    lower = os.path.relpath(layers.lowers[0], REPOSITORY)
    with SESSIOND.mounted(Layers([lower]), root):
        assert read(f"{root}/a") == b"lower"


def test_full_upper(disk: str, fast: str, root: str) -> None:
    """The program hears of it, the mount lives on, and deleting makes room."""
    small = f"{fast}/small"
    os.mkdir(small)
    libc.mount("small", small, "tmpfs", data="size=1m,nr_inodes=64")
    try:
        lower: Tree = {"big": File(b"x" * (2 << 20)), "small": b"s", "d": {}}
        layers = make_layers((lower,), {}, disk, small)
        with SESSIOND.mounted(layers, root, "allow_other"):
            with fails(ENOSPC):
                write(f"{root}/new", b"y" * (2 << 20))
            attempts: tuple[Callable[[], object], ...] = (
                lambda: append(f"{root}/big", b"+"),
                lambda: append(f"{root}/new", b"z" * 65536),
                lambda: os.truncate(f"{root}/big", (2 << 20) - 1),
            )
            for attempt in attempts:
                with fails(ENOSPC):
                    attempt()
            assert read(f"{root}/big") == b"x" * (2 << 20)
            assert names(root) == {"big", "small", "d", "new"}
            os.unlink(f"{root}/new")
            append(f"{root}/small", b"ize")
            assert read(f"{root}/small") == b"size"
            with fails(ENOSPC):
                for number in range(100):
                    os.mkdir(f"{root}/d/{number}")
            for name in names(f"{root}/d"):
                os.rmdir(f"{root}/d/{name}")
            append(f"{root}/small", b"able")
            shown = trees.snapshot(root)
        with KernelOverlay().mounted(layers, root):
            trees.assert_same(shown, trees.snapshot(root), "the kernel shows another tree")
        assert names(f"{layers.work}/work") == set()
    finally:
        libc.umount(small, libc.MNT_DETACH)
