"""An upper is the kernel's as much as ours: written by either, shown the same by both."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

import pytest

from tests.support import libc, trees
from tests.support.checker import assert_clean
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import FileSystem, Layers
from tests.support.posix import append, write
from tests.support.sessiond_overlay import SessiondOverlay
from tests.support.trees import Device, Dir, Fifo, File, Link, Symlink, Tree
from tests.support.views import make_layers

LOWER: Tree = {
    "bin": Dir({"tool": File(b"#!", mode=0o4755), "alias": Link("bin/tool")}, mode=0o755),
    "etc": {"conf": b"x=1\n", "conf.d": {"a": b"a", "b": b"b"}, "link": Symlink("conf")},
    "home": Dir({"user": Dir({"mail": {"new": {"1": b"m"}}}, uid=1000, gid=1000)}, mode=0o711),
    "dev": {"null": Device(stat.S_IFCHR, 1, 3), "pipe": Fifo()},
    "var": {"log": {"1": b"1", "2": b"2"}, "sparse": File(b"end", hole=10 << 20)},
}
LOWEST: Tree = {"etc": {"conf.d": {"b": b"hidden", "c": b"c"}}, "usr": {"share": {"doc": b"d"}}}


def files(root: str) -> None:
    """Create, change and remove files."""
    append(f"{root}/etc/conf", b"y=2\n")
    append(f"{root}/bin/alias", b"/bin/sh")
    os.unlink(f"{root}/etc/conf.d/b")
    os.unlink(f"{root}/var/log/1")
    write(f"{root}/var/log/1", b"again")
    append(f"{root}/var/sparse", b"!")
    os.chmod(f"{root}/bin/tool", 0o755)
    os.chown(f"{root}/dev/null", 5, 6)
    os.setxattr(f"{root}/etc/conf", "user.note", b"changed")
    os.setxattr(f"{root}/etc", "trusted.overlay.opaque", b"a program's own")
    os.lchown(f"{root}/etc/link", 7, 7)


def directories(root: str) -> None:
    """Rename, replace and remove directories."""
    os.rename(f"{root}/home/user", f"{root}/home/renamed")
    os.rename(f"{root}/home/renamed/mail", f"{root}/mail")
    write(f"{root}/mail/new/2", b"m2")
    os.mkdir(f"{root}/home/user")
    os.rename(f"{root}/usr/share", f"{root}/home/user/share")
    for path in ("var/log/1", "var/log/2"):
        os.unlink(f"{root}/{path}")
    os.rmdir(f"{root}/var/log")
    os.mkdir(f"{root}/var/log")
    libc.renameat2(f"{root}/var", f"{root}/etc/conf.d", libc.RENAME_EXCHANGE)


def links(root: str) -> None:
    """Link, unlink and make special files."""
    os.link(f"{root}/etc/conf", f"{root}/etc/conf.hard")
    os.link(f"{root}/bin/tool", f"{root}/tool")
    os.unlink(f"{root}/bin/alias")
    os.link(f"{root}/dev/pipe", f"{root}/pipe")
    os.symlink("conf", f"{root}/etc/other")
    os.mknod(f"{root}/dev/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    trees.bind_socket(f"{root}/dev/log")
    os.rename(f"{root}/etc/conf.hard", f"{root}/etc/conf")  # does nothing: one file
    os.rename(f"{root}/dev/pipe", f"{root}/home/pipe")
    os.unlink(f"{root}/dev/null")
    os.mkfifo(f"{root}/dev/null")


WORKLOADS: list[Callable[[str], None]] = [files, directories, links]

KERNEL, SESSIOND = KernelOverlay(), SessiondOverlay()


@pytest.mark.parametrize(
    ("writers", "reader"),
    [
        ((SESSIOND, SESSIOND, SESSIOND), KERNEL),
        ((KERNEL, KERNEL, KERNEL), SESSIOND),
        ((KERNEL, SESSIOND, KERNEL), SESSIOND),
        ((SESSIOND, KERNEL, SESSIOND), KERNEL),
    ],
    ids=["to-kernel", "from-kernel", "from-kernel-in-turns", "to-kernel-in-turns"],
)
@pytest.mark.parametrize("storage", ["two-disks", "one-disk"])
def test_written_by_one_read_by_the_other(
    writers: tuple[FileSystem, ...], reader: FileSystem, storage: str, disk: str, fast: str
) -> None:
    """Each workload begins where another file system left off; a plain directory is the oracle."""
    layers = make_layers((LOWER, LOWEST), {}, disk, disk if storage == "one-disk" else fast)
    plain, root = f"{fast}/plain", f"{fast}/root"
    os.mkdir(plain)
    os.mkdir(root)
    trees.build_flat(trees.merge(LOWER, LOWEST), plain)
    begun = os.stat(layers.upper or "").st_ctime_ns
    for workload, writer in zip(WORKLOADS, writers, strict=True):
        workload(plain)
        expected = trees.snapshot(plain, recent_ns=begun)
        with writer.mounted(layers, root):
            workload(root)
            exact = trees.snapshot(root)
            trees.assert_same(expected, trees.snapshot(root, recent_ns=begun), writer.name)
        assert_clean(*checked(layers))
    with reader.mounted(layers, root):
        trees.assert_same(exact, trees.snapshot(root), f"{reader.name} shows another tree")


def test_attributes_of_a_metacopy_are_those_of_the_upper(disk: str, fast: str) -> None:
    """While it is open, too: the contents that are read then are another file's."""
    lower, upper, work, root = (f"{fast}/{name}" for name in ("lower", "upper", "work", "root"))
    for directory in (lower, upper, work, root):
        os.mkdir(directory)
    trees.build({"file": File(b"data", xattrs={"user.of": b"lower"})}, lower)
    meta = {"user.of": b"upper", "trusted.overlay.metacopy": b""}
    trees.build({"file": File(b"", xattrs=meta)}, upper)
    os.truncate(f"{upper}/file", 4)
    for data_path in ("passthrough", "cached", "plain"):
        with (
            SessiondOverlay(data_path).mounted(Layers([lower], upper, work), root),
            open(f"{root}/file", "rb") as file,
        ):
            assert file.read() == b"data"
            assert os.getxattr(file.fileno(), "user.of") == b"upper"


def test_metacopy_written_by_the_kernel(disk: str, fast: str) -> None:
    """The upper has the metadata, a lower still the data, even under another name."""
    layers = make_layers(({"file": b"the data", "other": b"more data"},), {}, disk, fast)
    root = f"{fast}/root"
    os.mkdir(root)
    with KERNEL.mounted(layers, root, "metacopy=on", "redirect_dir=on", "index=on"):
        os.chmod(f"{root}/file", 0o600)
        os.chown(f"{root}/other", 3, 3)
        os.rename(f"{root}/other", f"{root}/renamed")
        expected = trees.snapshot(root)
    assert_clean(*checked(layers))
    with SESSIOND.mounted(layers, root):
        trees.assert_same(expected, trees.snapshot(root), "metacopy is not followed")
        os.chmod(f"{root}/file", 0o640)
        append(f"{root}/renamed", b", and yet more")
        expected = trees.snapshot(root)
        assert expected[b"renamed"].size == len("more data, and yet more")
        assert expected[b"file"].size == len("the data")
    assert_clean(*checked(layers))
    with KERNEL.mounted(layers, root, "metacopy=on", "redirect_dir=on", "index=on"):
        trees.assert_same(expected, trees.snapshot(root), "the kernel shows another tree")


def checked(layers: Layers) -> tuple[str, str, Sequence[str]]:
    """Return layers as the checker takes them."""
    assert layers.upper is not None
    assert layers.work is not None
    return layers.upper, layers.work, layers.lowers


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_kernel_with_all_its_features_leaves_nothing_to_complain_of(
    workload: Callable[[str], None], disk: str, fast: str
) -> None:
    layers = make_layers((LOWER, LOWEST), {}, disk, disk)
    root = f"{fast}/root"
    os.mkdir(root)
    features = ("metacopy=on", "redirect_dir=on", "index=on", "nfs_export=off", "xino=on")
    with KERNEL.mounted(layers, root, *features):
        workload(root)
    assert_clean(*checked(layers))
