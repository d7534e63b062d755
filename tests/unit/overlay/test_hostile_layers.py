"""Layers that someone else has filled, or changes while they are served."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sessiond.overlay import origin, syscalls
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.layer import Layer
from sessiond.overlay.syscalls import At
from tests.unit.overlay.conftest import Bench, contents, find, names

pytestmark = pytest.mark.root


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "device", "symlink"])
def test_a_file_of_the_image_that_became_something_else_is_not_opened(
    bench: Bench, kind: str, write: bool
) -> None:
    """Users may change what is in an image that is a directory in use, such as /."""
    file = bench.layer("low") / "file"
    file.write_text("image")
    overlay = bench.overlay("low")
    node = find(overlay, "file")
    file.unlink()
    if kind == "symlink":
        file.symlink_to("/etc/passwd")
    else:
        mode, device = {
            "fifo": (stat.S_IFIFO | 0o600, 0),
            "device": (stat.S_IFCHR | 0o600, os.makedev(1, 5)),
        }[kind]
        os.mknod(file, mode, device)
    with pytest.raises(OSError):
        overlay.open_file(node, write=write)
    assert (bench.layer("upper") / "file").exists() is False


def test_a_device_of_the_image_cannot_be_opened_at_all(bench: Bench) -> None:
    """By the kernel's word, not by looking first: between a look and a use it may change."""
    os.mknod(bench.layer("low") / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (layer,) = bench.stack("low").lowers
    with pytest.raises(PermissionError):
        os.open(b"zero", os.O_RDONLY, dir_fd=layer.root)
    layer.close()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    directory = os.open(tmp_path, os.O_PATH)
    before = set(os.listdir("/proc/self/fd"))
    for name in (b"fifo", b"zero"):
        with pytest.raises(OSError, match="Stale file handle"):
            syscalls.open_file(At(directory, name), os.O_RDONLY)
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(directory)


def test_an_inode_number_that_is_used_again_is_another_file(bench: Bench) -> None:
    """A reset frees inode numbers while the kernel still holds nodes that had them."""
    (bench.layer("first") / "name").write_text("a file")
    overlay = bench.overlay("low", upper="first")
    node = find(overlay, "name")
    os.mkfifo(bench.layer("second") / "name")
    status = (bench.layer("second") / "name").stat()
    node.real = (status.st_dev, status.st_ino)
    Exchange(overlay).swap(bench.stack("low", upper="second"))
    assert not overlay.view.node(node.number).linked


_ORIGINS = {
    "empty": b"",
    "short": b"\0\xfb",
    "of another version": b"\1\xfb\x1d\0\1" + bytes(16) + b"12345678",
    "longer than a name can be": b"\0\xfb\xff\0\1" + bytes(16) + b"x" * 234,
    "huge": b"\xfb" * 3000,
    "of nothing": b"\0\xfb\x1d\0\1" + bytes(16) + b"12345678",
}


@pytest.mark.parametrize("value", _ORIGINS.values(), ids=_ORIGINS)
def test_a_forged_origin_is_none(bench: Bench, value: bytes) -> None:
    for name in ("upper", "middle"):
        (bench.layer(name) / name).write_text(name)
        os.setxattr(bench.layer(name) / name, "trusted.overlay.origin", value)
        os.link(bench.layer(name) / name, bench.layer(name) / f"{name}-too")
    overlay = bench.overlay("middle", "low")
    assert contents(overlay, "upper") == b"upper"
    for path in ("upper", "middle", "middle-too"):
        overlay.chmod(find(overlay, path), 0o600)
        assert overlay.view.stat(find(overlay, path)).st_mode & 0o777 == 0o600
    overlay.unlink(overlay.view.root, b"middle")
    assert names(overlay) == ["middle-too", "upper", "upper-too"]


def test_an_origin_of_a_file_elsewhere_gives_a_number_and_no_more(bench: Bench) -> None:
    """A handle may name any inode of the file system; nothing of it is read or changed."""
    secret = bench.directory / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    around = Layer.open(os.fsencode(bench.directory), writable=True)
    handle = origin.encode(around, around.at(b"secret"))
    around.close()
    assert handle is not None
    (bench.layer("upper") / "file").write_text("mine")
    os.setxattr(bench.layer("upper") / "file", "trusted.overlay.origin", handle)
    overlay = bench.overlay("low")
    assert contents(overlay, "file") == b"mine"
    overlay.chmod(find(overlay, "file"), 0o666)
    overlay.resize(find(overlay, "file"), 0)
    assert secret.read_text() == "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "value",
    [b"", b"U", b"Ux", b"U+", b"U+1e3", b"U+" + b"9" * 4000, b"U+99999999999999999", b"X+1"],
)
def test_a_forged_link_count_is_none(bench: Bench, value: bytes) -> None:
    (bench.layer("low") / "a").write_text("low")
    os.link(bench.layer("low") / "a", bench.layer("low") / "b")
    overlay = bench.overlay("low")
    overlay.chmod(find(overlay, "a"), 0o600)
    (index,) = (bench.layer("upper-work") / "index").iterdir()
    os.setxattr(index, "trusted.overlay.nlink", value)
    node = find(overlay, "a")
    assert 0 < overlay.view.link_count(node, overlay.view.stat(node)) < 10
    overlay.unlink(overlay.view.root, b"a")
    overlay.unlink(overlay.view.root, b"b")
