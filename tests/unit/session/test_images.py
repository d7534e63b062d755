"""Images: real squashfs, erofs and ext4 files, and what becomes of broken ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import trio

from sessiond.errors import ImageUnavailable
from sessiond.session import loop
from sessiond.session.images import Images
from sessiond.session.loop import attached
from sessiond.session.memory import MemoryMounts
from sessiond.session.model import ImageSource
from sessiond.session.mounts import SystemMounts
from tests.support.waiting import until

KINDS = ("squashfs", "erofs", "ext4")


def make_image(kind: str, directory: Path) -> Path:
    """A file with a file system in which there are ``file`` and a 2 MiB ``noise``."""
    content = directory / "content"
    content.mkdir()
    (content / "file").write_text("from the image")
    (content / "noise").write_bytes(os.urandom(2 << 20))
    image = directory / f"image.{kind}"
    commands = {
        "squashfs": ["mksquashfs", content, image, "-quiet", "-no-progress"],
        "erofs": ["mkfs.erofs", "-Enoinline_data", image, content],
        "ext4": ["mkfs.ext4", "-q", "-d", content, image, "8M"],
    }
    subprocess.run(commands[kind], check=True, capture_output=True)
    return image


@pytest.fixture
async def images(real: Path) -> Images:
    images = Images(real, SystemMounts())
    await images.prepare()
    return images


@pytest.mark.root
@pytest.mark.parametrize("kind", KINDS)
async def test_an_image_file_is_mounted_once_and_read_only(
    images: Images, real: Path, kind: str
) -> None:
    source = ImageSource(path=make_image(kind, real))
    first = await images.acquire(source)
    second = await images.acquire(source)
    assert first == second
    assert first.kind == kind
    assert first.digest.startswith(kind)
    assert images.digests == (first.digest,)
    assert (first.root / "file").read_text() == "from the image"
    with pytest.raises(OSError, match="Read-only"):
        (first.root / "new").touch()
    await images.release(first)
    assert SystemMounts().file_system(first.root) == kind
    await images.release(second)
    assert SystemMounts().file_system(first.root) is None
    assert not first.root.exists()
    assert str(source.path) not in Path("/proc/self/mountinfo").read_text()


def loop_device(target: Path) -> Path:
    """Where sysfs tells of the loop device that is mounted at `target`."""
    with open("/proc/self/mountinfo") as table:
        (line,) = [line.split() for line in table if line.split()[4] == str(target)]
    return Path("/sys/block", Path(line[line.index("-") + 2]).name, "loop")


def holds(device: Path, file: Path) -> bool:
    """Whether the loop device is `file`'s; once let go of, it may be another process's."""
    try:
        return (device / "backing_file").read_text() == f"{file}\n"
    except OSError:
        return False


@pytest.mark.root
async def test_an_image_is_read_with_direct_io_where_its_disk_can(
    images: Images, real: Path
) -> None:
    file = make_image("ext4", real)
    image = await images.acquire(ImageSource(path=file))
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct I/O here")
    device = loop_device(image.root)
    assert (device / "dio").read_text() == "1\n"
    assert holds(device, file)
    await images.release(image)
    # udev may have it open for a moment.
    await until(lambda: not holds(device, file))


@pytest.mark.root
async def test_no_loop_device_outlives_who_set_it_up(real: Path) -> None:
    file = make_image("squashfs", real)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with attached(file) as device:
            os.write(writer, os.fsencode(device))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    device = os.fsdecode(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    assert device.startswith("/dev/loop")
    await until(lambda: not holds(Path("/sys/block", Path(device).name, "loop"), file))


@pytest.mark.root
@pytest.mark.parametrize("kind", KINDS)
async def test_a_truncated_image_is_refused(images: Images, real: Path, kind: str) -> None:
    image = make_image(kind, real)
    os.truncate(image, image.stat().st_size // 2)
    with pytest.raises(ImageUnavailable, match="is truncated: it has"):
        await images.acquire(ImageSource(path=image))
    assert images.digests == ()


@pytest.mark.root
@pytest.mark.parametrize("kind", KINDS)
async def test_a_corrupt_image_is_refused(images: Images, real: Path, kind: str) -> None:
    image = make_image(kind, real)
    with image.open("r+b") as file:
        # All of the superblock but what identifies it, and its size.
        match kind:
            case "squashfs":
                file.seek(12)
                file.write(b"\xff" * 20)
            case "erofs":
                file.seek(1024 + 4)
                file.write(b"\xff" * 8 + b"\0" + b"\xff" * 23)
            case _:
                file.seek(1024 + 88)
                file.write(b"\xff" * 100)
    with pytest.raises(ImageUnavailable, match=rf"looks like {kind} but cannot be mounted"):
        await images.acquire(ImageSource(path=image))
    assert images.digests == ()
    assert list((real / "images").iterdir()) == []


@pytest.mark.root
async def test_a_machine_without_loop_devices_is_a_reason(
    images: Images, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_CONTROL", "/dev/loop-control.missing")
    image = make_image("squashfs", real)
    with pytest.raises(ImageUnavailable, match=r"loop-control.missing: No such file.* container"):
        await images.acquire(ImageSource(path=image))


@pytest.mark.root
async def test_a_directory_is_cloned_without_the_mounts_below(images: Images, real: Path) -> None:
    directory = real / "directory"
    (directory / "below").mkdir(parents=True)
    (directory / "file").touch()
    SystemMounts().mount_tmpfs(directory / "below", size="1M", inodes=None)
    (directory / "below" / "hidden").touch()
    image = await images.acquire(ImageSource(path=directory))
    assert sorted(os.listdir(image.root)) == ["below", "file"]
    assert os.listdir(image.root / "below") == []
    with pytest.raises(OSError, match="Read-only"):
        (image.root / "new").touch()
    (directory / "new").touch()
    # What is mounted below later does not appear in the image either.
    (directory / "later").mkdir()
    SystemMounts().mount_tmpfs(directory / "later", size="1M", inodes=None)
    assert SystemMounts().file_system(image.root / "later") is None
    await images.release(image)


@pytest.mark.root
async def test_the_root_of_the_machine_is_an_image(images: Images) -> None:
    image = await images.acquire(ImageSource(path=Path("/")))
    assert (image.root / "etc" / "passwd").read_bytes() == Path("/etc/passwd").read_bytes()
    await images.release(image)


@pytest.mark.root
async def test_what_a_dead_daemon_has_left_is_used_or_unmounted(real: Path) -> None:
    left = Images(real, SystemMounts())
    await left.prepare()
    image = await left.acquire(ImageSource(path=make_image("squashfs", real)))
    other = await left.acquire(ImageSource(path=Path("/")))
    device = image.root.stat().st_dev
    (real / "images" / "not-mounted").mkdir()
    images = Images(real, SystemMounts())
    await images.prepare()
    assert not (real / "images" / "not-mounted").exists()
    assert (await images.acquire(image.source)).root.stat().st_dev == device
    await images.unmount_unused()
    assert SystemMounts().file_system(other.root) is None
    assert image.root.stat().st_dev == device
    await images.release(image)
    assert SystemMounts().mounted_below(real) == []
    assert list((real / "images").iterdir()) == []


async def test_verity_that_this_machine_lacks_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = fake_squashfs(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    mounts = MemoryMounts()
    images = Images(tmp_path, mounts)
    await images.prepare()
    with pytest.raises(ImageUnavailable, match=r"dm-verity.*veritysetup is not installed"):
        await images.acquire(ImageSource(path=image, verity_root_hash="ab" * 32))
    assert mounts.mounted == {}
    with pytest.raises(ImageUnavailable, match=r"directory .* cannot be protected"):
        await images.acquire(ImageSource(path=tmp_path, verity_root_hash="ab" * 32))


@pytest.mark.root
async def test_a_hash_tree_in_the_image_is_found_behind_the_file_system(
    real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = real / "said"
    program = real / "veritysetup"
    program.write_text(f'#!/bin/sh\necho "$@" >>{said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{real}:{os.environ['PATH']}")
    file, hashes = fake_squashfs(real, used=4097), real / "hashes"
    hashes.write_bytes(bytes(4096))
    images = Images(real, MemoryMounts())
    await images.prepare()
    digest = ""
    for where in (None, hashes):
        source = ImageSource(path=file, verity_root_hash="ab" * 32, verity_hash_device=where)
        image = await images.acquire(source)
        await images.release(image)
        digest = image.digest
    inside, beside = said.read_text().splitlines()
    name, root_hash, device = f"sessiond-{digest}", "ab" * 32, "(/dev/loop[0-9]+)"
    opening = rf"open --hash-offset=8192 -- {device} {name} \1 {root_hash}"
    assert re.fullmatch(opening, inside)
    opening = rf"open -- {device} {name} (?!\1 ){device} {root_hash}"
    assert re.fullmatch(opening, beside)


def fake_squashfs(directory: Path, used: int = 4096) -> Path:
    image = directory / "image"
    image.write_bytes(b"hsqs" + bytes(36) + used.to_bytes(8, "little") + bytes(8144))
    return image


async def test_a_file_system_that_the_kernel_lacks_is_a_reason(tmp_path: Path) -> None:
    images = Images(tmp_path, MemoryMounts(unsupported={"squashfs"}))
    await images.prepare()
    with pytest.raises(ImageUnavailable, match="this kernel does not support"):
        await images.acquire(ImageSource(path=fake_squashfs(tmp_path)))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file"),
        (b"", "holds no squashfs, erofs or ext4"),
        (b"hsqs", "holds no squashfs, erofs or ext4"),
        (b"PK\3\4" * 1000, "holds no squashfs, erofs or ext4"),
        (bytes(1 << 17), "holds no squashfs, erofs or ext4"),
    ],
)
async def test_what_is_no_image_is_refused(
    tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    image = tmp_path / "image"
    if content is not None:
        image.write_bytes(content)
    images = Images(tmp_path, MemoryMounts())
    await images.prepare()
    with pytest.raises(ImageUnavailable, match=complaint):
        await images.acquire(ImageSource(path=image))


async def test_a_fifo_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    images = Images(tmp_path, MemoryMounts())
    await images.prepare()
    with pytest.raises(ImageUnavailable, match="neither a directory nor a file"):
        await images.acquire(ImageSource(path=tmp_path / "fifo"))


async def test_a_changed_image_is_another_image(tmp_path: Path) -> None:
    image = fake_squashfs(tmp_path)
    images = Images(tmp_path, MemoryMounts())
    await images.prepare()
    before = await images.acquire(ImageSource(path=image))
    os.utime(image, ns=(0, 0))
    after = await images.acquire(ImageSource(path=image))
    assert before.digest != after.digest
    assert set(images.digests) == {before.digest, after.digest}


async def test_a_mounted_image_that_is_known_needs_no_file(tmp_path: Path) -> None:
    mounts = MemoryMounts()
    source = ImageSource(path=tmp_path / "image")
    source.path.write_bytes(b"hsqs" + bytes(36) + (4096).to_bytes(8, "little") + bytes(4048))
    earlier = Images(tmp_path, mounts)
    await earlier.prepare()
    image = await earlier.acquire(source)
    images = Images(tmp_path, mounts)
    await images.prepare()
    source.path.unlink()
    with pytest.raises(ImageUnavailable):
        await images.acquire(source)
    assert await images.acquire(source, known=image.digest) == image
    await images.release(image)
    with pytest.raises(ImageUnavailable):
        await images.acquire(source, known=image.digest)


async def test_two_tasks_share_one_mount(tmp_path: Path) -> None:
    images = Images(tmp_path, MemoryMounts())
    await images.prepare()
    source = ImageSource(path=fake_squashfs(tmp_path))
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(images.acquire, source)
    (digest,) = images.digests
    image = await images.acquire(source)
    for _ in range(6):
        assert images.digests == (digest,)
        await images.release(image)
    assert images.digests == ()
