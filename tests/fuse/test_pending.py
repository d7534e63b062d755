"""Files that are open for writing while their layers move to another disk, and workers that die."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from sessiond.errors import Failed, NoSpace
from sessiond.fuse.mounter import FuseMount, FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.overlay import syscalls
from sessiond.session.model import DataPath, Stack, UpperDirectories
from sessiond.session.mounts import SystemMounts
from sessiond.session.processes import SystemProcesses
from sessiond.session.tree import copy_trees, unchecked
from tests.fuse.conftest import Playground
from tests.fuse.test_recovery import PUBLISHING, RECOVERING, Order, attended, program, succeed
from tests.support.disks import make_image
from tests.support.recording_disk import mounted_image
from tests.support.waiting import until


class Moving:
    """A session with two places to be: in RAM, and on disk."""

    def __init__(self, directory: Path, mounter: FuseMounter, data_path: DataPath) -> None:
        self.ram, self.disk = directory / "ram", directory / "disk"
        for place in (self.ram, self.disk):
            for name in ("layer/fs", "layer/work", "orphans"):
                (place / name).mkdir(parents=True)
        self.playground = Playground(directory, mounter, data_path)
        self.root = self.playground.root
        self._layers = 0

    @property
    def is_kept(self) -> bool:
        """Whether the kernel goes on writing where it did."""
        return self.playground.data_path is DataPath.PASSTHROUGH

    def stack(self, place: Path, *lowers: Path) -> Stack:
        upper = UpperDirectories(place / "layer/fs", place / "layer/work")
        former = self.ram / "orphans" if place == self.disk else None
        image = self.playground.image
        return Stack(upper, (*lowers, image), orphans=place / "orphans", former=former)

    def next_layer(self, *lowers: Path) -> Stack:
        """A new upper on disk."""
        self._layers += 1
        layer = self.disk / f"layer{self._layers}"
        for name in ("fs", "work"):
            (layer / name).mkdir(parents=True)
        upper = UpperDirectories(layer / "fs", layer / "work")
        return replace(self.stack(self.disk, *lowers), upper=upper)

    @asynccontextmanager
    async def mounted(self) -> AsyncIterator[FuseMount]:
        places = (self.ram, self.disk, self.playground.image)
        async with self.playground.mounted(self.stack(self.ram), places) as mount:
            yield mount

    async def move(self, mount: FuseMount) -> None:
        """As Persist does; what was in RAM, and has nowhere to be kept, is gone."""
        async with mount.frozen():
            shutil.rmtree(self.disk / "layer/fs")
            copy_trees(
                self.ram / "layer",
                self.disk / "layer",
                ("fs",),
                progress=lambda _: None,
                check=unchecked,
            )
            await mount.swap(self.stack(self.disk), moved=True)
        shutil.rmtree(self.ram / "layer")

    def on_disk(self, name: str = "file") -> bytes:
        return (self.disk / "layer/fs" / name).read_bytes()

    async def wait_settled(self, mount: FuseMount) -> None:
        while (await mount.pending()).in_use:
            await trio.lowlevel.checkpoint()
        assert os.listdir(self.ram / "orphans") == []


@pytest.fixture(params=RECOVERING)
def moving(request: pytest.FixtureRequest, mounter: FuseMounter) -> Iterator[Moving]:
    with tempfile.TemporaryDirectory() as directory:
        yield Moving(Path(directory), mounter, request.param)


async def test_what_is_written_after_deaths_is_on_disk(moving: Moving) -> None:
    file = moving.root / "file"
    async with moving.mounted() as mount:
        with open(file, "w+b", buffering=0) as writer:
            writer.write(b"0")
            await moving.move(mount)
            for number in range(1, 4):
                await succeed(mount)
                await program(lambda number=number: writer.write(b"%d" % number))  # type: ignore[misc]
                written = b"0123"[: number + 1]
                assert await program(file.read_bytes) == written
                assert file.stat() == os.fstat(writer.fileno())
                if number == 2:
                    os.fsync(writer.fileno())
                    assert moving.on_disk() == written
            pending = await mount.pending()
            assert list(pending.files.values()) == ["/file"] * moving.is_kept
            assert pending.count == pending.in_use == moving.is_kept
        await until(lambda: moving.on_disk() == b"0123")
        await moving.wait_settled(mount)
        file.write_bytes(b"new")
        assert moving.on_disk() == b"new"


async def programs_with(mount_point: Path, inode: int) -> set[str]:
    device = SystemMounts().device(mount_point)
    assert device is not None
    async with SystemProcesses().using(device, {inode}) as found:
        return {one.program for one in found if inode in one.files}


async def test_who_has_it_open_is_known(moving: Moving) -> None:
    own = Path("/proc/self/comm").read_text().strip()
    async with moving.mounted() as mount:
        with open(moving.root / "file", "w+b", buffering=0) as file:
            file.write(b"1")
            pages = mmap.mmap(file.fileno(), 1)
            await moving.move(mount)
            await succeed(mount)
            inode = (moving.root / "file").stat().st_ino
            files = (await mount.pending()).files
            assert files == ({inode: "/file"} if moving.is_kept else {})
            assert await programs_with(moving.root, inode) == {own}
        assert await programs_with(moving.root, inode) == {own}  # mapped
        pages.close()
        assert await programs_with(moving.root, inode) == set()


CHANGES: dict[str, Callable[[Path], object]] = {
    "rename": lambda root: (root / "file").rename(root / "renamed"),
    "link": lambda root: os.link(root / "file", root / "linked"),
    "chmod": lambda root: (root / "file").chmod(0o604),
    "times": lambda root: os.utime(root / "file", (1, 2)),
    "truncate": lambda root: os.truncate(root / "file", 1),
    "replaced": lambda root: (root / "other").rename(root / "file"),
    "exchanged": lambda root: syscalls.rename(
        syscalls.At(os.open(root, os.O_PATH), b"file"),
        syscalls.At(os.open(root, os.O_PATH), b"other"),
        syscalls.RENAME_EXCHANGE,
    ),
    "removed": lambda root: (root / "file").unlink(),
}


def picture(root: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_mode, path.stat().st_nlink)
        for path in root.iterdir()
    }


@pytest.mark.parametrize("change", CHANGES)
async def test_changes_of_a_file_that_is_pending(moving: Moving, change: str) -> None:
    async with moving.mounted() as mount:
        (moving.root / "other").write_bytes(b"another")
        with open(moving.root / "file", "w+b", buffering=0) as writer:
            writer.write(b"12")
            await moving.move(mount)
            await succeed(mount)
            await program(lambda: CHANGES[change](moving.root))
            before = await program(lambda: picture(moving.root))
            await succeed(mount)
            assert await program(lambda: picture(moving.root)) == before
            assert os.fstat(writer.fileno()).st_nlink == (
                0 if change in {"removed", "replaced"} else 2 if change == "link" else 1
            )
            os.pwrite(writer.fileno(), b"3", 2)
            wanted = b"1\x003" if change == "truncate" else b"123"
            assert os.pread(writer.fileno(), 9, 0) == wanted
            after = picture(moving.root)
        await moving.wait_settled(mount)
        assert picture(moving.root) == after
    upper = moving.disk / "layer/fs"
    assert {path.name: path.read_bytes() for path in upper.iterdir() if path.is_file()} == {
        name: content for name, (content, _, _) in after.items()
    }


async def test_removed_files_that_are_open(moving: Moving) -> None:
    """They stay in RAM: there is no name under which they could be on disk."""
    async with moving.mounted() as mount:
        with open(moving.root / "file", "w+b", buffering=0) as writer:
            writer.write(b"1")
            (moving.root / "file").unlink()
            await moving.move(mount)
            for times in range(1, 4):
                await succeed(mount)
                assert await program(lambda: os.pread(writer.fileno(), 9, 0)) == b"1" * times
                writer.write(b"1")
            pending = await mount.pending()
            assert pending.in_use
            assert pending.count == 0
        await moving.wait_settled(mount)


async def test_a_mapping_that_outlives_its_descriptor(moving: Moving) -> None:
    async with moving.mounted() as mount:
        with open(moving.root / "file", "w+b", buffering=0) as file:
            file.write(b"aaaa")
            pages = mmap.mmap(file.fileno(), 4)
        with pages:
            pages[0:1] = b"b"
            await moving.move(mount)
            await succeed(mount)
            pages[1:2] = b"b"
            assert (await program((moving.root / "file").read_bytes))[:2] == b"bb" or (
                not moving.is_kept
            )
            await mount.sync()
            await succeed(mount)
            pages[2:3] = b"b"
            pages.flush()
            await mount.sync()
            assert moving.on_disk() == b"bbba"
        await mount.sync()
        await moving.wait_settled(mount)


@pytest.mark.parametrize("after", ["snapshot", "reset"])
async def test_layers_that_are_exchanged_later(moving: Moving, after: str) -> None:
    file = moving.root / "file"
    async with moving.mounted() as mount:
        with open(file, "w+b", buffering=0) as writer:
            writer.write(b"1")
            await moving.move(mount)
            await succeed(mount)
            writer.write(b"2")
            lowers = [moving.disk / "layer/fs"] if after == "snapshot" else []
            await mount.swap(later := moving.next_layer(*lowers))
            assert moving.on_disk() == b"12"
            await succeed(mount)
            await program(lambda: writer.write(b"3"))
            assert os.pread(writer.fileno(), 9, 0) == b"123"
            assert file.exists() == (after == "snapshot")
        await moving.wait_settled(mount)
        if moving.is_kept or after == "snapshot":
            assert moving.on_disk() == b"12"  # a layer of before
        assert (later.upper.fs / "file").exists() == (after == "snapshot")
        if after == "snapshot":
            assert (later.upper.fs / "file").read_bytes() == b"123"


@pytest.mark.parametrize("death", ["no death", "death"])
async def test_what_a_reset_retains(moving: Moving, death: str) -> None:
    """What is written before, between its two steps, and after goes to the file that stays."""
    file = moving.root / "docs/file"
    async with moving.mounted() as mount:
        file.parent.mkdir()
        with (
            open(file, "w+b", buffering=0) as writer,
            open(moving.root / "other", "wb", 0) as other,
        ):
            writer.write(b"0")
            await moving.move(mount)
            for number in (1, 2):
                stack = moving.next_layer()
                writer.write(b"b")
                other.write(b"b")
                async with mount.frozen():
                    await mount.retain(("/docs",), stack.upper)
                    if moving.is_kept:  # with other data paths, it waits
                        writer.write(b"d")
                    await mount.swap(stack, retained=True)
                if not moving.is_kept:
                    writer.write(b"d")
                assert not (moving.root / "other").exists()
                if death == "death":
                    await succeed(mount)
                await program(lambda: writer.write(b"a"))
                written = b"0" + b"bda" * number
                assert await program(file.read_bytes) == written
                assert file.stat() == os.fstat(writer.fileno())
                assert file.stat().st_nlink == 1
                os.fsync(writer.fileno())
                assert (stack.upper.fs / "docs/file").read_bytes() == written
            writer.write(b"end")
        await moving.wait_settled(mount)
        assert file.read_bytes() == written + b"end"
        assert (stack.upper.fs / "docs/file").read_bytes() == written + b"end"


async def test_a_disk_that_is_full(moving: Moving, tmp_path: Path) -> None:
    """What does not fit stays in RAM, where programs have it, until it does."""
    image = make_image("ext4", str(tmp_path))
    with mounted_image(image, str(moving.disk)):
        for name in ("layer/fs", "layer/work", "orphans"):
            (moving.disk / name).mkdir(parents=True)
        async with moving.mounted() as mount:
            with open(moving.root / "file", "w+b", buffering=0) as writer:
                writer.write(b"1")
                await moving.move(mount)
                if not moving.is_kept:
                    return
                filler = moving.disk / "filler"
                with suppress(OSError), open(filler, "wb", buffering=0) as full:
                    while True:
                        full.write(bytes(1 << 20))
                written = b"2" * (1 << 20)
                os.pwrite(writer.fileno(), written, 0)
                with pytest.raises(OSError, match="No space left"):
                    await program(lambda: os.fsync(writer.fileno()))
                with pytest.raises(NoSpace, match="/file"):
                    await mount.sync()
                await succeed(mount)
                assert await program((moving.root / "file").read_bytes) == written
                assert moving.on_disk() == b"1"
                async with mount.frozen():
                    with pytest.raises(NoSpace):
                        await mount.retain(("/file",), moving.next_layer().upper)
            with pytest.raises(NoSpace):
                await mount.sync()
            assert (await mount.pending()).count == 1
            filler.unlink()
            await mount.sync()
            await moving.wait_settled(mount)
            assert moving.on_disk() == written


@pytest.fixture(scope="module")
def dying() -> Iterator[tuple[FuseMounter, Order]]:
    """A mounter whose workers die when they are told to."""
    order = Order()
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name in PUBLISHING:
            patch.setattr(syscalls, name, order.watched(getattr(syscalls, name)))
        spawner = Spawner.start()
        yield FuseMounter(spawner, Path(directory)), order
        spawner.close()


async def synchronise(mount: FuseMount) -> None:
    """Try until no worker dies over it."""
    while True:
        try:
            return await mount.sync()
        except Failed:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("step_of", "when"),
    [
        ("fsync", "after"),
        ("close", "before"),
        pytest.param("fsync", "before", marks=pytest.mark.soak),
        pytest.param("close", "after", marks=pytest.mark.soak),
    ],
)
async def test_death_at_each_step_of_a_renewal(
    dying: tuple[FuseMounter, Order], tmp_path: Path, step_of: str, when: str
) -> None:
    mounter, order = dying
    died, step = True, 0
    while died:
        step += 1
        (tmp_path / str(step)).mkdir()
        moving = Moving(tmp_path / str(step), mounter, DataPath.PASSTHROUGH)
        async with moving.mounted() as mount, attended(mount):
            with open(moving.root / "file", "wb", buffering=0) as writer:
                os.link(moving.root / "file", moving.root / "link")
                writer.write(b"one")
                await moving.move(mount)
                writer.write(b"two")
                order.give(when, step)
                if step_of == "fsync":
                    await program(lambda writer=writer: os.fsync(writer.fileno()))  # type: ignore[misc]
                    assert moving.on_disk() == moving.on_disk("link") == b"onetwo"
                    died = order.withdraw()
                    writer.write(b"three")
            await synchronise(mount)
            wanted = b"onetwothree" if step_of == "fsync" else b"onetwo"
            if step_of == "close":
                died = order.withdraw()
            for name in ("file", "link"):
                assert moving.on_disk(name) == wanted, step
                path = moving.root / name
                # The last close is settled beside that, and the worker may have died over it.
                assert await program(path.read_bytes) == wanted, step
                assert (await program(path.stat)).st_nlink == 2, step
            await moving.wait_settled(mount)
    assert step > 1
