"""Maintenance where there is no room: nothing is lost, and it can be finished once there is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.errors import Cancelled, NoSpace
from sessiond.session.images import digest_of
from tests.space.conftest import ROOT, Machine, fill
from tests.support import libc
from tests.support.mounts import detach
from tests.support.waiting import until


@pytest.fixture
def image(machine: Machine) -> Iterator[Path]:
    """An image file on a file system of its own, of 1 MiB, on which profile ``lasting`` is."""
    images = machine.directory / "images"
    images.mkdir()
    libc.mount("images", str(images), "tmpfs", data="size=1M")
    image = images / "image.squashfs"
    pack = ["mksquashfs", machine.image, image, "-quiet", "-no-progress"]
    subprocess.run(pack, check=True, capture_output=True)
    machine.profiles["lasting"]["image"] = str(image)
    yield image
    detach(str(images))


async def test_no_room_for_the_new_image(machine: Machine, image: Path) -> None:
    old = digest_of(image)
    async with machine.manager() as manager:
        session = await manager.begin_maintenance("lasting", "", started_by=ROOT)
        (session.mount_point / "more").write_bytes(os.urandom(2 << 20))
        with pytest.raises(NoSpace, match="no space for the new image"):
            await manager.finish_maintenance(started_by=ROOT).wait()
        assert [path.name for path in image.parent.iterdir()] == [image.name]
        assert digest_of(image) == old
        assert manager.maintenance is not None
        (session.mount_point / "still").touch()
        subprocess.run(["mount", "-o", "remount,size=16M", image.parent], check=True)
        await manager.finish_maintenance(started_by=ROOT).wait()
        await until(lambda: not manager.sessions)
        made = await manager.create("root", "lasting")
        assert (made.mount_point / "more").stat().st_size == 2 << 20
        assert (made.mount_point / "still").exists()


async def test_no_room_for_its_session(machine: Machine, image: Path) -> None:
    machine.mount_disk()
    async with machine.manager() as manager:
        fill(machine.state, "bytes")
        with pytest.raises(NoSpace):
            await manager.begin_maintenance("lasting", "", started_by=ROOT)
        assert manager.maintenance is None
        assert manager.sessions == {}
        assert not (machine.state / "maintenance.json").exists()
        await manager.create("root", "volatile")


async def test_the_disk_of_its_session_is_filled_meanwhile(machine: Machine, image: Path) -> None:
    machine.mount_disk()
    old = digest_of(image)
    async with machine.manager() as manager:
        session = await manager.begin_maintenance("lasting", "", started_by=ROOT)
        (session.mount_point / "new").touch()
        fill(machine.state, "bytes")
        await manager.finish_maintenance(started_by=ROOT).wait()
        await until(lambda: not manager.sessions)
        assert manager.maintenance is None
    assert digest_of(image) != old
    assert not (machine.state / "maintenance.json").exists()


async def test_the_job_is_cancelled(
    machine: Machine, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = digest_of(image)
    tools = machine.directory / "tools"
    tools.mkdir()
    slow = tools / "mksquashfs"
    slow.write_text('#!/bin/sh\necho part >"$2"\nexec sleep 1000\n')
    slow.chmod(0o755)
    async with machine.manager() as manager:
        session = await manager.begin_maintenance("lasting", "", started_by=ROOT)
        with monkeypatch.context() as patched:
            patched.setenv("PATH", f"{tools}:{os.environ['PATH']}")
            job = manager.finish_maintenance(started_by=ROOT)
            await until(lambda: len(list(image.parent.iterdir())) == 2)
            job.cancel()
            with pytest.raises(Cancelled):
                await job.wait()
        assert [path.name for path in image.parent.iterdir()] == [image.name]
        assert manager.maintenance is not None
        (session.mount_point / "new").touch()
        await manager.finish_maintenance(started_by=ROOT).wait()
    assert digest_of(image) != old
