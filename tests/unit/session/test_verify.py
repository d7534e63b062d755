"""A copy that is not as it should be is found out, on the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sessiond.session.mounts import sync_file_system
from sessiond.session.tree import Digests, copy_trees, unchecked
from sessiond.session.verify import verify_trees
from tests.support import trees
from tests.support.disks import make_image
from tests.support.recording_disk import mounted_image
from tests.support.trees import Device, Dir, File, Link, Symlink, Whiteout

NAMES = ("fs", "index")
NEEDLE = b"a needle in a disk".ljust(4096, b"!")


def copied(directory: Path) -> tuple[Path, Path, Digests]:
    """A tree with one of each, and its copy."""
    source, target = directory / "source", directory / "target"
    (source / "index").mkdir(parents=True)
    (source / "fs").mkdir()
    trees.build(
        {
            "file": File(content=b"data" * 1000, mode=0o640, xattrs={"user.a": b"1"}),
            "sparse": File(content=b"end", hole=3 << 20),
            "empty": File(),
            "directory": Dir(
                {
                    "link": Link("file"),
                    "symlink": Symlink("/etc/passwd"),
                    "device": Device(stat.S_IFCHR, 1, 3),
                    "gone": Whiteout(),
                    "below": Dir({"needle": File(content=NEEDLE)}),
                },
                mode=0o750,
            ),
        },
        str(source / "fs"),
    )
    os.link(source / "fs/file", source / "index/00fb")
    target.mkdir(exist_ok=True)
    digests: Digests = {}
    copy_trees(source, target, NAMES, progress=lambda _: None, check=unchecked, digests=digests)
    return source, target, digests


def verify(source: Path, target: Path, digests: Digests) -> int:
    read: list[int] = []
    sync_file_system(target)
    verify_trees(source, target, NAMES, digests, progress=read.append, check=unchecked)
    return sum(read)


def changed(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Change the contents of the directory `name` with its times as they were."""

    def and_back(fs: Path) -> None:
        before = (fs / name).stat()
        change(fs / name)
        os.utime(fs / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    return and_back


def rewritten(path: Path) -> None:
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"DATA")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def made_anew(path: Path, make: Callable[[Path], object]) -> None:
    before = path.lstat()
    path.unlink()
    make(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns), follow_symlinks=False)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "contents": ("fs/file", lambda fs: rewritten(fs / "file")),
    "a hole": ("fs/sparse", lambda fs: os.truncate(fs / "sparse", 3 << 20)),
    "size": ("fs/empty", lambda fs: (fs / "empty").write_bytes(b"\0")),
    "time": ("fs/file", lambda fs: os.utime(fs / "file", (1, 1))),
    "mode": ("fs/file", lambda fs: (fs / "file").chmod(0o600)),
    "owner": ("fs/empty", lambda fs: os.chown(fs / "empty", 7, -1)),
    "group": ("fs/directory", lambda fs: os.chown(fs / "directory", -1, 7)),
    "attribute": ("fs/file", lambda fs: os.setxattr(fs / "file", "user.a", b"2")),
    "attribute gone": ("fs/file", lambda fs: os.removexattr(fs / "file", "user.a")),
    "new attribute": ("fs/empty", lambda fs: os.setxattr(fs / "empty", "trusted.b", b"")),
    "missing": ("fs/empty", changed(".", lambda fs: (fs / "empty").unlink())),
    "superfluous": ("fs/new", changed(".", lambda fs: (fs / "new").touch())),
    "link": (
        "index/00fb",
        lambda fs: made_anew(fs.parent / "index/00fb", lambda path: path.write_bytes(b"data")),
    ),
    "symlink": (
        "fs/directory/symlink",
        changed(
            "directory",
            lambda top: made_anew(top / "symlink", lambda path: path.symlink_to("/etc/shadow")),
        ),
    ),
    "device": (
        "fs/directory/device",
        changed(
            "directory",
            lambda top: made_anew(
                top / "device", lambda path: os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
            ),
        ),
    ),
    "directory": ("fs/directory/below", lambda fs: (fs / "directory/below").chmod(0o777)),
}  # fmt: skip


@pytest.mark.root
def test_a_faithful_copy(tmp_path: Path) -> None:
    source, target, digests = copied(tmp_path)
    assert verify(source, target, digests) >= 4000 + len(NEEDLE) + len("end")


@pytest.mark.root
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(tmp_path: Path, damage: str) -> None:
    source, target, digests = copied(tmp_path)
    name, change = DAMAGE[damage]
    change(target / "fs")
    with pytest.raises(OSError) as caught:
        verify(source, target, digests)
    assert caught.value.filename == str(target / name)


@pytest.mark.root
def test_what_is_written_to_the_source_meanwhile_is_no_damage(tmp_path: Path) -> None:
    """By a program that has the file open: passthrough cannot be held."""
    source, target, digests = copied(tmp_path)
    (source / "fs/file").write_bytes(b"more")
    verify(source, target, digests)


@pytest.mark.root
def test_contents_are_read_from_the_disk(real: Path) -> None:
    """And not from what the kernel remembers of them: the disk is damaged behind its back."""
    (real / "target").mkdir()
    image = make_image("ext4", str(real))
    with mounted_image(image, str(real / "target")):
        source, target, digests = copied(real)
        verify(source, target, digests)
        assert (target / "fs/directory/below/needle").read_bytes() == NEEDLE
        with open(image, "r+b") as disk:
            position = disk.read().index(NEEDLE)
            disk.seek(position + 100)
            disk.write(b"?")
        assert (target / "fs/directory/below/needle").read_bytes() == NEEDLE
        with pytest.raises(OSError, match="read back") as caught:
            verify(source, target, digests)
        assert caught.value.filename == str(target / "fs/directory/below/needle")
