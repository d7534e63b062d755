"""Images that dm-verity protects, on a kernel that has it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from sessiond.errors import ImageUnavailable
from sessiond.fuse.spawner import Spawner
from sessiond.journal import Event
from sessiond.session import images as images_module
from sessiond.session import loop, verity
from sessiond.session.images import Images
from sessiond.session.model import DataPath, ImageSource, SessionState
from sessiond.session.mounts import SystemMounts
from tests.space.conftest import Machine, reset
from tests.support import trees
from tests.support.daemon import wait_until
from tests.support.waiting import until

NOISE = os.urandom(1 << 20)
"""What no image has compressed, so that its blocks are found again."""
IMAGE: trees.Tree = {"etc": {"motd": b"Welcome.\n"}, "noise": NOISE}
BLOCK = 4096


def pack(kind: str, directory: Path) -> Path:
    content, image = directory / "content", directory / f"image.{kind}"
    content.mkdir()
    trees.build(IMAGE, str(content))
    command = {
        "squashfs": ["mksquashfs", content, image, "-quiet", "-no-progress"],
        "erofs": ["mkfs.erofs", "--quiet", image, content],
    }[kind]
    subprocess.run(command, check=True, capture_output=True)
    return image


def protect(image: Path, hashes: Path) -> str:
    """Write a hash tree, behind the image or to another file; return the root hash."""
    command = ["veritysetup", "format", image, hashes]
    if hashes == image:
        size = -(-image.stat().st_size // BLOCK) * BLOCK
        os.truncate(image, size)
        command[2:2] = [f"--hash-offset={size}", f"--data-blocks={size // BLOCK}"]
    try:
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("there is no veritysetup")
    (root_hash,) = re.findall(r"^Root hash:\s*([0-9a-f]+)$", told, re.MULTILINE)
    return root_hash


def require_kernel(image: Path, hashes: Path, root_hash: str) -> None:
    name = f"sessiond-test-{os.getpid()}"
    command = ["veritysetup", "open", image, name, hashes, root_hash]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this kernel has no dm-verity: {done.stderr.strip()}")
    subprocess.run(["veritysetup", "close", name], check=True)


@pytest.fixture(params=["squashfs", "erofs"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ImageSource:
    """An image that is protected, with the hash tree in a file of its own."""
    image, hashes = pack(request.param, tmp_path), tmp_path / "hashes"
    root_hash = protect(image, hashes)
    require_kernel(image, hashes, root_hash)
    return ImageSource(path=image, verity_root_hash=root_hash, verity_hash_device=hashes)


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    spawner = Spawner.start()
    yield spawner
    spawner.close()


@pytest.fixture
def machine(source: ImageSource, spawner: Spawner) -> Iterator[Machine]:
    """Profiles over the image: one with another root hash, and one for each data path."""
    with tempfile.TemporaryDirectory(prefix="sessiond-test-", dir="/var/tmp") as directory:
        machine = Machine(Path(directory), spawner)
        profile: dict[str, object] = {
            "image": str(source.path),
            "size": "16M",
            "verity_root_hash": source.verity_root_hash,
            "verity_hash_device": str(source.verity_hash_device),
        }
        machine.profiles = {path: {**profile, "data_path": path} for path in DataPath}
        machine.profiles["wrong"] = {**profile, "verity_root_hash": "ab" * 32}
        yield machine
        for target in SystemMounts().mounted_below(Path(directory)):
            SystemMounts().detach(target)
        assert_gone(source)


def device(source: ImageSource) -> Path:
    """Where the device of an image is; other tests have others at the same time."""
    return Path("/dev/mapper", f"sessiond-{images_module._inspect(source).digest}")


def assert_gone(source: ImageSource) -> None:
    """Neither the device is left, nor the loop devices below it."""
    wait_until(lambda: not device(source).exists())
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # that of another test, which has just gone
            assert str(source.path.parent) not in file.read_text()


def damage(image: Path) -> None:
    """Change one bit in the middle of the noise."""
    offset = image.read_bytes().index(NOISE[len(NOISE) // 2 :][:64])
    with open(image, "r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


async def test_sessions_share_one_device(machine: Machine, source: ImageSource) -> None:
    async with machine.manager() as manager:
        one, two = [await manager.create("root", path) for path in ("passthrough", "plain")]
        for session in (one, two):
            assert (session.mount_point / "noise").read_bytes() == NOISE
            (session.mount_point / "noise").write_bytes(b"changed")
        await reset(one)
        assert (one.mount_point / "noise").read_bytes() == NOISE
        await manager.close(one.id)
        assert device(source).exists()
        await manager.close(two.id)
        assert_gone(source)
        # Of an image that is in use still, there is one device at most, too.
        one = await manager.create("root", "plain")
        (root,) = (machine.runtime / "images").iterdir()
        with open(root / "noise", "rb", buffering=0) as held:
            await manager.close(one.id)
            assert device(source).exists()
            two = await manager.create("root", "plain")
            assert held.read(9) == NOISE[:9]
        assert (two.mount_point / "noise").read_bytes() == NOISE


async def test_another_root_hash_is_refused(machine: Machine, source: ImageSource) -> None:
    async with machine.manager() as manager:
        with pytest.raises(ImageUnavailable, match=r"dm-verity.*verity_root_hash") as refused:
            await manager.create("root", "wrong")
        assert str(source.path) in str(refused.value)
        assert list((machine.runtime / "images").iterdir()) == []


@pytest.mark.parametrize("data_path", DataPath)
async def test_what_was_changed_in_the_image_cannot_be_read(
    machine: Machine, source: ImageSource, data_path: DataPath
) -> None:
    damage(source.path)
    async with machine.manager() as manager:
        session = await manager.create("root", data_path)
        noise, motd = session.mount_point / "noise", session.mount_point / "etc/motd"
        with pytest.raises(OSError, match="Input/output error") as failed:
            noise.read_bytes()
        assert failed.value.errno == errno.EIO
        with open(noise, "rb", buffering=0) as file:
            assert file.read(BLOCK) == NOISE[:BLOCK]
        # The session goes on, also with something else in its place.
        assert motd.read_text() == "Welcome.\n"
        noise.unlink()
        noise.write_text("quiet")
        assert session.state is SessionState.ACTIVE
        await reset(session)
        assert motd.read_text() == "Welcome.\n"
        with pytest.raises(OSError, match="Input/output error"):
            noise.read_bytes()


async def test_what_a_dead_daemon_has_left(tmp_path: Path, source: ImageSource) -> None:
    left = Images(tmp_path, SystemMounts())
    await left.prepare()
    await left.acquire(source)
    images = Images(tmp_path, SystemMounts())
    await images.prepare()
    image = await images.acquire(source)
    await images.unmount_unused()
    assert (image.root / "noise").read_bytes() == NOISE
    await images.release(image)
    assert_gone(source)
    # As when it died after the device was set up, and before that was mounted.
    image.root.mkdir()
    with loop.attached(source.path) as data:
        opening = ["veritysetup", "open", data, device(source).name, source.verity_hash_device]
        subprocess.run([*opening, source.verity_root_hash], check=True)
    assert device(source).exists()
    await Images(tmp_path, SystemMounts()).prepare()
    assert not image.root.exists()
    assert_gone(source)


@pytest.mark.parametrize("source", ["squashfs"], indirect=True)
async def test_damage_is_told(
    source: ImageSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    looked = 0

    def look(name: str) -> bool:
        nonlocal looked
        looked += 1
        return found(name)

    found = verity.is_damaged
    monkeypatch.setattr(verity, "is_damaged", look)
    monkeypatch.setattr(images_module, "_DAMAGE_SECONDS", 0.01)
    damage(source.path)
    images = Images(tmp_path, SystemMounts())
    await images.prepare()
    image = await images.acquire(source)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(images.watch)
        await until(lambda: looked)
        assert caplog.messages == []
        with pytest.raises(OSError, match="Input/output error"):
            (image.root / "noise").read_bytes()
        await until(lambda: caplog.messages)
        nursery.cancel_scope.cancel()
    await images.release(image)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"Image {source.path} is damaged: dm-verity has found")
    assert record.__dict__["journal_fields"]["MESSAGE_ID"] == Event.IMAGE_DAMAGED
    assert_gone(source)


async def test_a_hash_tree_in_the_image_file(tmp_path: Path, source: ImageSource) -> None:
    inside = ImageSource(path=source.path, verity_root_hash=protect(source.path, source.path))
    images = Images(tmp_path, SystemMounts())
    await images.prepare()
    image = await images.acquire(inside)
    assert (image.root / "noise").read_bytes() == NOISE
    await images.release(image)
    assert_gone(source)
