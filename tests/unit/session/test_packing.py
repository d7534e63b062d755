"""Images are made like others, and what goes wrong is said."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
import trio

from sessiond.errors import Failed, NoSpace, NotSupported
from sessiond.session.mounts import SystemMounts
from sessiond.session.packing import ReadOnlyPacker, packer_like
from tests.support.waiting import until


def ignore(_: int) -> None:
    """Nobody wants to know how large it is."""


@pytest.fixture
def content(tmp_path: Path) -> Path:
    content = tmp_path / "content"
    content.mkdir()
    (content / "file").write_bytes(os.urandom(2 << 20))
    return content


@pytest.mark.parametrize("compressor", ["gzip", "zstd"])
async def test_a_squashfs_is_like_the_one_before(
    tmp_path: Path, content: Path, compressor: str
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    pack = ["mksquashfs", content, old, "-quiet", "-no-progress", "-comp", compressor, "-b", "64K"]
    subprocess.run(pack, check=True, capture_output=True)
    await packer_like(old, "squashfs").pack(content, new, ignore)
    assert superblock(new) == superblock(old)


def superblock(image: Path) -> tuple[int, int]:
    """The size of blocks, and the number of the compressor."""
    size, compressor = struct.unpack_from("<I4xH", image.read_bytes(), 12)
    return size, compressor


@pytest.mark.parametrize("options", [[], ["-zlz4hc"]])
async def test_an_erofs_is_like_the_one_before(
    tmp_path: Path, content: Path, options: list[str]
) -> None:
    (content / "zeros").write_bytes(bytes(2 << 20))
    old, new = tmp_path / "old", tmp_path / "new"
    pack = ["mkfs.erofs", "--quiet", *options, old, content]
    subprocess.run(pack, check=True, capture_output=True)
    await packer_like(old, "erofs").pack(content, new, ignore)
    assert new.stat().st_size == old.stat().st_size


@pytest.mark.root
async def test_no_space(real: Path, content: Path) -> None:
    small = real / "small"
    small.mkdir()
    SystemMounts().mount_tmpfs(small, size="1M", inodes=None)
    packer = ReadOnlyPacker(
        "mksquashfs", ("-noappend", "-no-progress", "-quiet"), target_first=False
    )
    with pytest.raises(NoSpace, match="no space for the new image"):
        await packer.pack(content, small / "new", ignore)


async def test_a_failure_is_told_in_the_words_of_the_program(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho first; echo 'The reason.' >&2; exit 3\n")
    program.chmod(0o755)
    packer = ReadOnlyPacker(str(program), (), target_first=True)
    with pytest.raises(Failed, match=r"could not make the image: The reason\.$"):
        await packer.pack(tmp_path, tmp_path / "new", ignore)
    program.unlink()
    with pytest.raises(Failed, match=r"the image: it cannot be run: No such file or directory\.$"):
        await packer.pack(tmp_path, tmp_path / "new", ignore)


async def test_a_cancelled_program_has_ended(tmp_path: Path) -> None:
    program, told = tmp_path / "program", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ >{told}.new; mv {told}.new {told}; exec sleep 1000\n")
    program.chmod(0o755)
    async with trio.open_nursery() as nursery:
        packer = ReadOnlyPacker(str(program), (), target_first=True)
        nursery.start_soon(packer.pack, tmp_path, tmp_path / "new", ignore)
        await until(told.exists)
        nursery.cancel_scope.cancel()
    assert not Path("/proc", told.read_text().strip()).exists()


@pytest.mark.root
async def test_an_ext4_is_like_the_one_before_and_grows_if_it_has_to(
    real: Path, content: Path
) -> None:
    os.chmod(content, 0o1751)
    os.chown(content, 3, 4)
    old, new = real / "old", real / "new"
    options = ["-b", "1024", "-N", "32", "-O", "^has_journal"]
    subprocess.run(["mke2fs", "-q", "-t", "ext4", *options, old, "4M"], check=True)
    await packer_like(old, "ext4").pack(content, new, ignore)
    assert new.stat().st_size == old.stat().st_size
    for number in range(100):
        (content / f"file{number}").touch()
    (content / "more").write_bytes(os.urandom(3 << 20))
    new.unlink()
    await packer_like(old, "ext4").pack(content, new, ignore)
    assert new.stat().st_size > old.stat().st_size
    mounted = real / "mounted"
    mounted.mkdir()
    SystemMounts().mount_image(new, mounted, "ext4")
    assert sorted(os.listdir(mounted)) == sorted([*os.listdir(content), "lost+found"])
    assert (mounted / "more").read_bytes() == (content / "more").read_bytes()
    root = mounted.stat()
    assert (root.st_mode & 0o7777, root.st_uid, root.st_gid) == (0o1751, 3, 4)
    features = subprocess.check_output(
        ["dumpe2fs", "-h", new], text=True, stderr=subprocess.DEVNULL
    )
    assert "has_journal" not in features


def test_what_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotSupported, match="mksquashfs, which makes squashfs, is not installed"):
        packer_like(image, "squashfs")
