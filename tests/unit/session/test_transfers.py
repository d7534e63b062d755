"""Exports and imports, over mounts in memory: they hold nobody up, and leave nothing behind."""

from __future__ import annotations

import os
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from pathlib import Path

import pytest
import trio
import trio.testing

from sessiond.errors import (
    Cancelled,
    Failed,
    InvalidName,
    InvalidOption,
    NoSuchSession,
    NoSuchSnapshot,
    SnapshotExists,
)
from sessiond.session import pipes
from sessiond.session.jobs import Job
from sessiond.session.manager import Manager, Session
from sessiond.session.model import ArchiveKind, SessionState
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers take root")

LARGE = os.urandom(3 << 20)
"""More than any pipe holds."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe: where to read, and where to write."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    yield reader, writer
    for descriptor in (reader, writer):
        with suppress(OSError):
            os.close(descriptor)


async def create(world: World, manager: Manager, profile: str = "volatile") -> Session:
    """A session with a snapshot of two layers, and an empty one above."""
    session = await manager.create(USER, profile, session_id="s")
    await world.mount("s").write("first", b"1")
    await session.snapshots.make("zero")
    await world.mount("s").write("large", LARGE)
    await session.snapshots.make("one")
    return session


async def archive_of(session: Session, name: str, pipe: tuple[int, int]) -> bytes:
    reader, writer = pipe
    job = session.snapshots.export(name, writer, started_by=UID)
    os.close(writer)
    data = await trio.to_thread.run_sync(_read_all, reader)
    await job.wait()
    return data


def _read_all(reader: int) -> bytes:
    parts = []
    while part := os.read(reader, 1 << 20):
        parts.append(part)
    return b"".join(parts)


@asynccontextmanager
async def stuck_export(session: Session, pipe: tuple[int, int]) -> AsyncIterator[Job]:
    """An export of which nobody reads more than the beginning."""
    job = session.snapshots.export("one", pipe[1], started_by=UID)
    await trio.to_thread.run_sync(os.read, pipe[0], 512)
    yield job


async def add(session: Session, name: str, data: bytes) -> Job:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    job = session.snapshots.add(name, reader, description="of old", started_by=UID)
    os.close(reader)

    def feed() -> None:
        with open(writer, "wb", buffering=0) as file, suppress(BrokenPipeError):
            file.write(data)

    await trio.to_thread.run_sync(feed)
    return job


def drafts(storage: Path) -> list[Path]:
    return list((storage / "drafts").glob("*"))


@pytest.mark.parametrize("profile", ["volatile", "lasting"])
async def test_a_snapshot_goes_out_and_comes_back(
    world: World, pipe: tuple[int, int], profile: str
) -> None:
    async with world.manager() as manager:
        session = await create(world, manager, profile)
        data = await archive_of(session, "one", pipe)
        with tarfile.open(fileobj=BytesIO(data)) as archive:
            assert sorted(archive.getnames()) == [".", "first", "large"]
        job = await add(session, "two", data)
        await job.wait()
        assert session.snapshots["two"].description == "of old"
        assert session.last_job is None
        await session.restore("two", started_by=UID).wait()
        stack = world.mount("s").stack
        (layer, _image) = stack.lowers
        assert {path.name: path.read_bytes() for path in layer.iterdir()} == {
            "first": b"1",
            "large": LARGE,
        }
        assert drafts(layer.parents[2]) == []
        events = world.recorder.without_changes()
        assert [event for event in events if "port" in event] == [
            "job export",
            "done export NoneType",
            "job import",
            "done import NoneType",
        ]
        assert "snapshot s two" in events


async def test_a_reader_who_stops_holds_nobody_up(world: World, pipe: tuple[int, int]) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        async with stuck_export(session, pipe) as job:
            assert session.state is SessionState.ACTIVE
            await session.snapshots.make("two")
            await session.reset(started_by=UID).wait()
            await session.persist(started_by=UID).wait()
            assert not job.finished
            assert 0 < job.progress < 1
            await manager.close("s")
        with pytest.raises(Cancelled):
            await job.wait()


async def test_who_reads_nothing_at_all_is_given_up(
    world: World, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "PATIENCE", 0.0)
    async with world.manager() as manager:
        session = await create(world, manager)
        job = session.snapshots.export("one", pipe[1], started_by=UID)
        with pytest.raises(Failed, match="Nothing was read"):
            await job.wait()
        job = session.snapshots.add("two", pipe[0], started_by=UID)
        os.read(pipe[0], 2 << 20)  # at once: the import would leave nothing to wait for
        with pytest.raises(Failed, match=r"Nothing was written|no tar"):
            await job.wait()
        await until(lambda: drafts(world.storage("s")) == [])


async def test_a_reader_who_goes_ends_the_export(world: World, pipe: tuple[int, int]) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        async with stuck_export(session, pipe) as job:
            os.close(pipe[0])
            with pytest.raises(Failed, match="closed early"):
                await job.wait()


async def test_an_export_can_be_cancelled(world: World, pipe: tuple[int, int]) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        async with stuck_export(session, pipe) as job:
            job.cancel()
            with pytest.raises(Cancelled):
                await job.wait()


async def test_what_is_deleted_meanwhile_is_not_complete(
    world: World, pipe: tuple[int, int]
) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        await session.reset(started_by=UID).wait()
        async with stuck_export(session, pipe) as job:
            await session.snapshots.delete("one")
            os.close(pipe[1])
            rest = await trio.to_thread.run_sync(_read_all, pipe[0])
            with pytest.raises((NoSuchSnapshot, Failed)):
                await job.wait()
        assert not rest.endswith(bytes(1024))


async def test_a_bad_archive_leaves_nothing(world: World) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        before = session.record
        for data in (b"no tar" * 500, LARGE):
            job = await add(session, "two", data)
            with pytest.raises(Failed, match="no tar"):
                await job.wait()
        assert session.record == before
        await until(lambda: drafts(world.storage("s")) == [])


async def test_an_import_can_be_cancelled(world: World, pipe: tuple[int, int]) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        job = session.snapshots.add("two", pipe[0], started_by=UID)
        await until(lambda: len(drafts(world.storage("s"))) == 1)
        await session.reset(started_by=UID).wait()
        job.cancel()
        with pytest.raises(Cancelled):
            await job.wait()
        await until(lambda: drafts(world.storage("s")) == [])


async def test_an_import_waits_for_its_turn_to_be_published(
    world: World, pipe: tuple[int, int]
) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        data = await archive_of(session, "zero", pipe)
        async with world.mount("s").frozen():
            moving = session.persist(started_by=UID)
            job = await add(session, "two", data)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not job.finished
        await moving.wait()
        with pytest.raises(Failed, match="import it again"):
            await job.wait()
        await (await add(session, "two", data)).wait()
        assert "two" in session.snapshots


async def test_what_cannot_begin(world: World, pipe: tuple[int, int]) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        with pytest.raises(NoSuchSnapshot):
            session.snapshots.export("two", pipe[1], started_by=UID)
        with pytest.raises(SnapshotExists):
            session.snapshots.add("one", pipe[0], started_by=UID)
        with pytest.raises(InvalidName):
            session.snapshots.add("no name", pipe[0], started_by=UID)
        with pytest.raises(InvalidOption, match="1001 characters"):
            session.snapshots.add("two", pipe[0], description="x" * 1001, started_by=UID)
        for descriptor in (os.open(world.directory, os.O_RDONLY), os.eventfd(0)):
            with pytest.raises(InvalidOption, match="has to be one end of a pipe"):
                session.snapshots.export("one", descriptor, started_by=UID)
            os.close(descriptor)
        await manager.close("s")
        with pytest.raises(NoSuchSession):
            session.snapshots.export("one", pipe[1], started_by=UID)


async def test_what_a_dead_manager_has_left_is_removed(world: World, pipe: tuple[int, int]) -> None:
    async with world.crashing_manager() as manager:
        session = await create(world, manager, "lasting")
        session.snapshots.add("two", pipe[0], started_by=UID)
        await until(lambda: len(drafts(world.disk("s"))) == 1)
        (world.disk("s") / "drafts/other").mkdir()
    async with world.manager() as manager:
        await until(lambda: drafts(world.disk("s")) == [])
        assert list(manager.get("s").snapshots) == ["zero", "one"]


async def test_a_snapshot_goes_out_and_comes_back_as_squashfs(
    world: World, pipe: tuple[int, int]
) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        reader, writer = pipe
        job = session.snapshots.export("one", writer, ArchiveKind.SQUASHFS, started_by=UID)
        os.close(writer)
        data = await trio.to_thread.run_sync(_read_all, reader)
        await job.wait()
        assert data.startswith(b"hsqs")
        assert job.bytes >= len(LARGE)
        await (await add(session, "two", data)).wait()
        await session.restore("two", started_by=UID).wait()
        (layer, _image) = world.mount("s").stack.lowers
        assert (layer / "large").read_bytes() == LARGE
        with pytest.raises(Failed, match="cut off"):
            await (await add(session, "three", data[:-8000])).wait()
        await until(lambda: drafts(world.storage("s")) == [])
