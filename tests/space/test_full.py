"""On a full upper, disk and `/run`, each operation works, or says `NoSpace` and changes nothing."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import pytest
import trio

from sessiond.errors import Failed, NoSpace, SessiondError
from sessiond.fuse import worker
from sessiond.fuse.mounter import FuseMount, FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.session import session as session_module
from sessiond.session.manager import Session
from sessiond.session.model import Manner, SessionState, StorageKind
from tests.space.conftest import ROOT, Machine, fill, reset, restore, settled
from tests.support import libc
from tests.support.mounts import detach
from tests.support.waiting import until

WHAT = pytest.mark.parametrize("what", ["bytes", "inodes"])
PROFILE = pytest.mark.parametrize("profile", ["volatile", "lasting"])


def names(session: Session) -> set[str]:
    return {path.name for path in session.mount_point.iterdir()}


def image_names(machine: Machine) -> set[str]:
    return {path.name for path in machine.image.iterdir()}


def disk_of(machine: Machine, profile: str) -> None:
    if profile == "lasting":
        machine.mount_disk("ext4", "-N", "256", "-m", "0", size="16M")


@WHAT
@PROFILE
async def test_what_works_when_the_upper_is_full(machine: Machine, what: str, profile: str) -> None:
    disk_of(machine, profile)
    async with machine.manager() as manager:
        session = await manager.create("root", profile, session_id="s")
        (session.mount_point / "kept").write_bytes(b"kept")
        await session.snapshots.make("first")
        for _ in range(3):  # what a reset takes has to be there the next time as well
            (session.mount_point / "directory").mkdir()
            (session.mount_point / "open").write_bytes(b"goes on")
            fill(session.mount_point, what)
            if (profile, what) != ("volatile", "bytes"):  # directories of a tmpfs take inodes only
                before = session.record
                with pytest.raises(NoSpace, match="delete files or snapshots, or reset"):
                    await session.snapshots.make("no-room")
                assert session.record.snapshots == before.snapshots
                assert session.record.layers == before.layers
            directory = os.open(session.mount_point / "directory", os.O_RDONLY)
            with open(session.mount_point / "open", "rb") as file:
                await reset(session)
                assert file.read() == b"goes on"
            assert names(session) == image_names(machine)
            with suppress(OSError):  # empty, or stale
                os.listdir(directory)
            os.close(directory)
            await settled(session)
        fill(session.mount_point, what)
        if (profile, what) != ("volatile", "bytes"):
            before = session.record
            with pytest.raises(NoSpace, match=r"cannot be kept.*delete files.*--no-undo"):
                await session.restore("first", started_by=ROOT).wait()
            assert session.record.snapshots == before.snapshots
            assert session.record.layers == before.layers
        await restore(session, "first")
        assert (session.mount_point / "kept").read_bytes() == b"kept"
        await settled(session)
        fill(session.mount_point, what)
        await session.snapshots.rename("first", "1")
        await session.snapshots.delete("1")
        await manager.close("s")
        assert not session.services.store.storage(session.record).exists()


async def test_a_snapshot_of_a_session_that_is_nearly_full(machine: Machine) -> None:
    """It fails at each of its steps in turn; all is as before then, and nothing is used up."""
    async with machine.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        paths = [session.mount_point / f"directory{number}/below/file" for number in range(3)]
        with ExitStack() as files:
            writers = []
            for path in paths:
                path.parent.mkdir(parents=True)
                writers.append(files.enter_context(open(path, "wb", buffering=0)))
            fill(session.mount_point, "inodes")
            fills = sorted(session.mount_point.glob("fill*"))
            before, written, failures = session.record, b"", set[type[SessiondError]]()
            while not session.record.snapshots:
                await trio.to_thread.run_sync(fills.pop().unlink)
                try:
                    await session.snapshots.make("snapshot")
                except SessiondError as error:
                    failures.add(type(error))
                    assert session.record.layers == before.layers
                written += b"x"
                for path, writer in zip(paths, writers, strict=True):
                    await trio.to_thread.run_sync(writer.write, b"x")
                    assert await trio.to_thread.run_sync(path.read_bytes) == written
                await until(lambda: not session.is_deleting)
            assert failures == {NoSpace, Failed}  # before there was no way back, and after that
        for path in paths:
            assert path.read_bytes() == written
        await manager.close("s")


@WHAT
@PROFILE
async def test_a_reset_of_a_full_session_that_is_to_leave_something(
    machine: Machine, what: str, profile: str
) -> None:
    """There may be no space for that; then all is as before, and it is reset without."""
    disk_of(machine, profile)
    async with machine.manager() as manager:
        session = await manager.create("root", profile, session_id="s")
        work = session.mount_point / "work"
        (work / "deep").mkdir(parents=True)
        (work / "deep/file").write_bytes(b"kept")
        fill(session.mount_point, what)
        before, refusal = names(session), ""
        try:
            await session.reset(started_by=ROOT, manner=Manner(keep=("/work",))).wait()
        except NoSpace as error:
            refusal = str(error)
        if refusal or (profile, what) == ("volatile", "inodes"):
            assert "no space in session s to keep /work over the reset" in refusal
            assert names(session) == before
        else:
            assert names(session) == image_names(machine) | {"work"}
        assert (work / "deep/file").read_bytes() == b"kept"
        assert (work / "deep/file").stat().st_nlink == 1
        await settled(session)
        await reset(session)
        assert names(session) == image_names(machine)
        await manager.close("s")


@WHAT
@PROFILE
async def test_what_is_open_can_be_removed_when_the_upper_is_full(
    machine: Machine, what: str, profile: str
) -> None:
    disk_of(machine, profile)
    async with machine.manager() as manager:
        session = await manager.create("root", profile, session_id="s")
        path = session.mount_point / "open"
        with open(path, "w+b", buffering=0) as file:
            file.write(b"goes on")
            fill(session.mount_point, what)
            path.unlink()
            file.seek(0)
            assert file.read() == b"goes on"
            assert os.fstat(file.fileno()).st_nlink == 0
        await manager.close("s")


@WHAT
@PROFILE
async def test_a_worker_that_dies_on_a_full_upper(
    machine: Machine, what: str, profile: str
) -> None:
    if "datapath-passthrough" not in machine.mounter.features:
        pytest.skip("there is no successor with the data path plain")
    disk_of(machine, profile)
    async with machine.manager() as manager:
        session = await manager.create("root", profile, session_id="s")
        path = session.mount_point / "open"
        with open(path, "w+b", buffering=0) as file:
            file.write(b"goes on")
            fill(session.mount_point, what)
            mount = session.view.mount
            assert isinstance(mount, FuseMount)
            os.kill(mount.worker, signal.SIGKILL)
            contents = await trio.to_thread.run_sync(path.read_bytes)
            assert contents == b"goes on"
            path.unlink()
        await reset(session)
        assert names(session) == image_names(machine)
        await settled(session)
        await manager.close("s")


@WHAT
@PROFILE
async def test_nobody_gets_in_between(machine: Machine, what: str, profile: str) -> None:
    """A session whose space is taken again as soon as it is free, by someone outside."""
    disk_of(machine, profile)
    async with machine.manager() as manager:
        session = await manager.create("root", profile, session_id="s")
        storage = session.services.store.storage(session.record)
        others = [storage / f"other{number}" for number in range(3)]
        for other in others:
            other.mkdir()
        for other in others:
            (session.mount_point / "file").touch()
            fill(other, what)
            await reset(session)
            assert names(session) == image_names(machine)
            await settled(session)


@WHAT
async def test_a_full_session_is_found_again(machine: Machine, what: str) -> None:
    disk_of(machine, "lasting")
    async with machine.manager() as manager:
        session = await manager.create("root", "lasting", session_id="s")
        fill(session.mount_point, what)
        before = names(session)
    async with machine.manager() as manager:
        session = manager.get("s")
        assert session.state is SessionState.ACTIVE, session.failure
        assert names(session) == before
        await reset(session)
        await settled(session)
        await manager.close("s")


@WHAT
async def test_a_full_disk(machine: Machine, what: str) -> None:
    machine.mount_disk("ext4", "-N", "256", "-m", "0", size="16M")
    async with machine.manager() as manager:
        volatile = await manager.create("root", "volatile", session_id="volatile")
        (volatile.mount_point / "file").write_bytes(b"contents")
        other = machine.state / "someone's"
        other.mkdir()
        fill(other, what)
        with pytest.raises(NoSpace, match="no space is left"):
            await manager.create("root", "lasting", session_id="lasting")
        assert list((machine.state / "sessions").iterdir()) == []
        assert set(manager.sessions) == {"volatile"}
        with pytest.raises(NoSpace):
            await volatile.persist(started_by=ROOT).wait()
        assert volatile.storage is StorageKind.TMPFS
        assert (volatile.mount_point / "file").read_bytes() == b"contents"
        (volatile.mount_point / "file").write_bytes(b"and more")
    async with machine.manager() as manager:
        await manager.create("root", "volatile", session_id="volatile")


@WHAT
async def test_a_session_that_was_persisted(machine: Machine, what: str) -> None:
    disk_of(machine, "lasting")
    async with machine.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        (session.mount_point / "file").touch()
        await session.persist(started_by=ROOT).wait()
        for _ in range(2):
            fill(machine.state, what)
            await reset(session)
            assert names(session) == image_names(machine)
            await settled(session)
            for path in machine.state.glob("*[0-9e]"):
                if path.is_file():
                    path.unlink()


@WHAT
async def test_a_full_run(machine: Machine, what: str) -> None:
    machine.mount_run()
    async with machine.manager() as manager:
        for profile in ("volatile", "lasting"):
            session = await manager.create("root", profile, session_id=profile)
            (session.mount_point / "file").touch()
            await session.snapshots.make("first")
        other = machine.runtime / "someone's"
        other.mkdir()
        fill(other, what)
        with pytest.raises(NoSpace, match="no space is left"):
            await manager.create("root", "volatile", session_id="third")
        assert set(manager.sessions) == {"volatile", "lasting"}
        assert not (machine.runtime / "sessions/third").exists()
        for session in manager.sessions.values():
            await reset(session)
            await restore(session, "first")
            await session.snapshots.delete("first")
            assert (session.mount_point / "file").exists()
        await manager.close("volatile")
    async with machine.manager() as manager:
        assert manager.get("lasting").state is SessionState.ACTIVE
        await manager.close("lasting")


async def test_there_are_only_so_many_layers(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a user could fill `/run` with the records of snapshots."""
    monkeypatch.setattr(session_module, "LAYERS_LIMIT", 4)
    async with machine.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        for number in range(3):
            await session.snapshots.make(f"{number}")
        with pytest.raises(NoSpace, match="has 4 layers, which is the most"):
            await session.snapshots.make("more")
        await restore(session, "1")
        await session.snapshots.delete("2")
        await session.snapshots.make("more")
        await reset(session)
        await settled(session)


@pytest.mark.soak
async def test_as_many_layers_as_there_may_be(machine: Machine) -> None:
    machine.mount_run(size="16M")
    machine.profiles["volatile"] |= {"inodes": 10_000}
    async with machine.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        for number in range(session_module.LAYERS_LIMIT - 1):
            (session.mount_point / f"{number}").touch()
            await session.snapshots.make(f"{number}", description="€" * 1000)
        assert len(names(session)) == len(image_names(machine)) + number + 1
        await reset(session)
        await restore(session, f"{number}")
        assert (session.mount_point / "0").exists()


@pytest.fixture
def started_with_full_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spawner]:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(worker, "rehearse", full)
    spawner = Spawner.start()  # it forks, so not in an async test
    yield spawner
    spawner.close()


async def test_a_full_tmp(machine: Machine, started_with_full_tmp: Spawner) -> None:
    machine.mounter = FuseMounter(started_with_full_tmp, machine.runtime / "workers")
    async with machine.manager() as manager:
        await manager.create("root", "volatile", session_id="s")


async def test_a_directory_tree_is_deleted_on_a_full_disk(machine: Machine) -> None:
    """To delete takes names in other directories, and these may take space."""
    disk_of(machine, "lasting")
    async with machine.manager() as manager:
        session = await manager.create("root", "lasting", session_id="s")
        for number in range(40):
            tree = session.mount_point / f"{number}" / ("x" * 200)
            tree.mkdir(parents=True)
            (tree / "file").touch()
        fill(session.mount_point, "bytes")
        upper = session.services.store.upper(session.record).fs
        await reset(session)
        await settled(session)
        assert not upper.exists()


def test_nothing_is_mounted_here() -> None:
    assert "sessiond-test" not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def connections(tmp_path: Path) -> Iterator[Path]:
    """What the kernel tells of FUSE connections: a directory for each."""
    libc.mount("connections", str(tmp_path), "fusectl")
    yield tmp_path
    detach(str(tmp_path))


@pytest.mark.parametrize("data_path", ["cached", "plain"])
async def test_a_write_that_had_to_wait_and_has_no_room(
    machine: Machine, connections: Path, data_path: str
) -> None:
    """It leaves nothing open: when the file is removed, its room is given back."""
    machine.profiles["volatile"]["data_path"] = data_path
    async with machine.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        root = session.mount_point
        waiting = connections / str(os.minor(root.stat().st_dev)) / "waiting"

        def write(file: BinaryIO) -> None:
            with pytest.raises(OSError, match="No space left"):
                file.write(bytes(1 << 16))

        fill(root, "bytes")
        with open(root / "big1048576", "ab", buffering=0) as file:
            async with trio.open_nursery() as nursery, session.view.require().frozen():
                nursery.start_soon(trio.to_thread.run_sync, write, file)
                await until(lambda: waiting.read_text() != "0\n")
        for path in root.glob("*big*"):
            path.unlink()
        storage = machine.runtime / "sessions/s/storage"
        await until(lambda: os.statvfs(storage).f_bfree > 3 * os.statvfs(storage).f_blocks // 4)
