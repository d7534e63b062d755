"""The service over the real manager, on a machine in memory: the whole way but for the mounts."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from sessiond.bus import client, service
from sessiond.bus.client import Client, JobInfo
from sessiond.errors import (
    Busy,
    Cancelled,
    Failed,
    InvalidName,
    InvalidOption,
    NoSuchSession,
    NoSuchSnapshot,
    SessiondError,
)
from tests.support.sessions import USER, World
from tests.support.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
async def sessiond(private_bus: str, world: World, nursery: trio.Nursery) -> AsyncIterator[Client]:
    async with world.manager() as manager:
        await nursery.start(service.serve, manager)
        async with client.connect() as connected:
            yield connected


async def test_the_main_job(sessiond: Client, world: World) -> None:
    session = await sessiond.create(USER, "volatile")
    info = await session.info()
    assert (info.user, info.storage, info.state) == (USER, "tmpfs", "active")
    await world.mount(session.id).write("file", b"contents")
    snapshot = await session.snapshot("fresh", description="with a file")
    assert (await snapshot.info()).parent == "/"

    await (await session.reset()).wait()
    assert (await session.info()).last_reset is not None
    await (await session.restore("fresh")).wait()

    seen: list[JobInfo] = []
    await (await session.persist()).wait(seen.append)
    assert (seen[-1].state, seen[-1].progress) == ("succeeded", 1)
    info = await session.info()
    assert (info.storage, info.bytes_limit, info.state) == ("persistent", 0, "active")

    await snapshot.rename("old")
    assert [one.name for one in await session.snapshots()] == ["old"]
    await session.snapshot_named("old").delete()
    await session.close()
    assert await sessiond.sessions() == []


async def test_a_snapshot_goes_from_one_session_to_another(sessiond: Client, world: World) -> None:
    session = await sessiond.create(USER, "volatile", session_id="live")
    other = await sessiond.create(USER, "lasting", session_id="other")
    await world.mount("live").write("file", b"contents")
    snapshot = await session.snapshot("fresh")
    reader, writer = os.pipe2(os.O_CLOEXEC)
    out = await snapshot.export(writer)
    job = await other.import_snapshot("copy", reader, description="from live")
    os.close(writer)
    os.close(reader)
    await out.wait()
    await job.wait()
    assert (await job.info()).operation == "import"
    (copy,) = await other.snapshots()
    assert (copy.name, copy.description) == ("copy", "from live")
    await (await other.restore("copy")).wait()
    assert (world.mount("other").stack.lowers[0] / "file").read_bytes() == b"contents"
    with pytest.raises(InvalidOption, match="one end of a pipe"):
        await snapshot.export(os.open("/", os.O_RDONLY))


async def test_events_of_the_main_job(sessiond: Client) -> None:
    async with sessiond.events() as events:
        session = await sessiond.create(USER, "volatile")
        await (await session.reset()).wait()
        await session.close()
        seen = []
        async for event in events:
            seen.append(event.member)
            if event.member == "SessionRemoved":
                break
    told = [member for member in seen if member not in ("PropertiesChanged", "InterfacesAdded")]
    assert told == ["SessionNew", "ResetDone", "Completed", "InterfacesRemoved", "SessionRemoved"]


async def test_failures_come_through(sessiond: Client, world: World) -> None:
    session = await sessiond.create(USER, "volatile", session_id="live")
    with pytest.raises(InvalidName):
        await sessiond.create("no such user", "volatile")
    with pytest.raises(NoSuchSnapshot, match="its snapshots are: none"):
        await session.restore("fresh")
    world.mounter.injected["swap"] = [Failed("The disk is on fire.")]
    with pytest.raises(Failed, match="The disk is on fire"):
        await (await session.reset()).wait()
    assert (await session.info()).state == "active"


async def test_closing_ends_a_job(sessiond: Client, world: World) -> None:
    session = await sessiond.create(USER, "volatile", session_id="live")
    failures: list[SessiondError] = []

    async def wait() -> None:
        try:
            await job.wait()
        except SessiondError as error:
            failures.append(error)

    async with world.mount("live").frozen(), trio.open_nursery() as nursery:
        job = await session.persist()
        nursery.start_soon(wait)
        with pytest.raises(Busy):
            await session.reset()
        await session.close()
    assert isinstance(failures[0], Cancelled)
    with pytest.raises(NoSuchSession):
        await session.info()
    await until(lambda: not world.mounter.mounts["live"].mounted)
