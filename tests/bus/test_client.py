"""The typed client."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from sessiond.bus import client, names, service
from sessiond.bus.client import Client, Event, JobInfo
from sessiond.bus.connection import Connection, Reply, connect
from sessiond.bus.wire import BusError, Message
from sessiond.errors import (
    Busy,
    Cancelled,
    Failed,
    NoSuchSession,
    NoSuchSnapshot,
    NotAuthorized,
    Unreachable,
)
from sessiond.session.model import (
    Breakdown,
    ChangeSummary,
    DirectoryChanges,
    LargeFile,
    SessionId,
)
from tests.bus.fake_manager import EPOCH, FakeManager


async def test_properties_come_typed(sessiond: Client, serving: FakeManager) -> None:
    serving.sessions["live"].last_reset = datetime(2024, 1, 2, tzinfo=UTC)
    serving.add("other", "alice", 1000)
    live, other = await sessiond.sessions()
    assert live == await (await sessiond.session("live")).info()
    assert (other.id, other.user, other.uid, other.last_reset) == ("other", "alice", 1000, None)
    assert live.created_at == EPOCH
    assert live.last_reset == datetime(2024, 1, 2, tzinfo=UTC)
    assert live.bytes_limit == 1 << 40
    assert (await sessiond.info()).profiles == ("live",)


async def test_a_session_from_creation_to_close(sessiond: Client, serving: FakeManager) -> None:
    session = await sessiond.create("alice", "live", session_id="a.1")
    assert session.id == "a.1"
    assert (await sessiond.session_of(65534)).id == "live"
    largest = (LargeFile("/film", "added", 1 << 39),)
    assert await session.changes() == ChangeSummary(1, 2, 3, 1 << 40, 4, largest)
    broken_down = await session.changes(directories=5, depth=2)
    assert broken_down.directories == (DirectoryChanges("/", 1, 2, 3, 4, 1 << 40),)
    assert serving.sessions[SessionId(session.id)].breakdown == Breakdown(5, 2)
    snapshot = await session.snapshot("fresh", description="as it was")
    await session.changes(start="fresh")
    assert serving.sessions[SessionId(session.id)].compared == ("fresh", "")
    with pytest.raises(NoSuchSnapshot):
        await session.changes(end="none")
    assert (await snapshot.info()).description == "as it was"
    await snapshot.describe("as it still is")
    await snapshot.pin(True)
    info = await snapshot.info()
    assert (info.description, info.pinned, info.automatic) == ("as it still is", True, False)
    assert (info.size, info.exclusive, info.size_valid) == (8192, 4096, True)
    await snapshot.rename("old")
    with pytest.raises(NoSuchSnapshot):
        await snapshot.info()
    (only,) = await session.snapshots()
    assert only.name == "old"
    await session.snapshot_named("old").delete()
    assert await session.snapshots() == []
    await session.close()
    with pytest.raises(NoSuchSession):
        await session.info()
    with pytest.raises(NoSuchSession):
        await session.snapshots()
    assert list(serving.sessions) == ["live"]


async def test_a_job_is_followed_to_its_end(sessiond: Client, serving: FakeManager) -> None:
    job = await (await sessiond.session("live")).persist()
    seen: list[JobInfo] = []

    def move_on(info: JobInfo) -> None:
        seen.append(info)
        if not info.progress_valid:
            serving.jobs[0].move(0.25)
        elif info.progress == 0.25:
            serving.jobs[0].move(0.75)
        elif info.state == "running":
            serving.jobs[0].finish()

    await job.wait(move_on)
    assert [info.progress for info in seen] == [0, 0.25, 0.75, 0.75]
    assert [info.state for info in seen] == ["running", "running", "running", "succeeded"]
    assert seen[-1].bytes == 4096
    assert seen[-1].session == "live"


async def test_a_job_that_is_over_before_it_is_awaited(
    sessiond: Client, serving: FakeManager
) -> None:
    serving.jobs_finish_at_once = True
    job = await (await sessiond.session("live")).reset()
    await job.wait()
    assert (await job.info()).state == "succeeded"


async def test_a_failed_job_raises_its_error(sessiond: Client, serving: FakeManager) -> None:
    session = await sessiond.session("live")
    job = await session.reset()
    with pytest.raises(Busy, match="Session live is busy: job 1, a reset"):
        await session.persist()
    await job.cancel()
    with pytest.raises(Cancelled, match="The reset was cancelled"):
        await job.wait()


async def test_waiting_ends_with_the_daemon(private_bus: str, manager: FakeManager) -> None:
    async with client.connect() as sessiond, trio.open_nursery() as daemon:
        await daemon.start(service.serve, manager)
        job = await (await sessiond.session("live")).reset()

        async def wait() -> None:
            with trio.CancelScope(shield=True), pytest.raises(Unreachable, match="left the bus"):
                await job.wait(lambda _info: daemon.cancel_scope.cancel())

        daemon.start_soon(wait)


async def test_events_are_told(sessiond: Client, serving: FakeManager) -> None:
    async with sessiond.events() as events:
        serving.add("other")
        serving.tell("reset_done", serving.sessions["live"])
        seen = [await anext(events) for _ in range(3)]
    assert [event.member for event in seen] == ["InterfacesAdded", "SessionNew", "ResetDone"]
    assert seen[1].arguments == ("other", f"{names.ROOT_PATH}/session/other")
    assert seen[2] == Event(
        f"{names.ROOT_PATH}/session/live", "live", names.SESSION, "ResetDone", ()
    )


def write_lines(*lines: object) -> object:
    def write(target: int) -> None:
        for line in lines:
            os.write(target, (json.dumps(line) + "\n").encode())

    return write


async def test_differences_are_listed(sessiond: Client, serving: FakeManager) -> None:
    expected = [
        client.Difference("/etc/a\udcff\n", "added", "file", 5),
        client.Difference("/usr", "metadata", "directory", 0),
    ]
    serving.sessions["live"].diff_body = write_lines(
        *({"path": d.path, "kind": d.kind, "type": d.type, "size": d.size} for d in expected)
    )
    async with (await sessiond.session("live")).diff() as differences:
        assert [difference async for difference in differences] == expected


@pytest.mark.parametrize(
    ("error", "told"),
    [(Failed("The disk is on fire."), "disk is on fire"), (ValueError("secret"), "Internal error")],
)
async def test_a_list_that_ends_early_is_an_error(
    sessiond: Client, serving: FakeManager, error: Exception, told: str
) -> None:
    def fail(target: int) -> None:
        write_lines({"path": "x", "kind": "added", "type": "file", "size": 1})(target)
        raise error

    serving.sessions["live"].diff_body = fail
    async with (await sessiond.session("live")).diff() as differences:
        assert (await anext(differences)).path == "x"
        with pytest.raises(Failed, match=told):
            await anext(differences)


@pytest.mark.parametrize(
    "end", [b"", b'{"path": "x", ', b'{"path": "x", {"error": "A worker died."}\n']
)
async def test_a_list_that_is_cut_off_is_an_error(
    sessiond: Client, serving: FakeManager, end: bytes
) -> None:
    serving.sessions["live"].diff_end = end
    async with (await sessiond.session("live")).diff() as differences:
        with pytest.raises(Failed, match="ends early"):
            await anext(differences)


async def test_without_a_daemon(private_bus: str) -> None:
    async with client.connect() as sessiond:
        with pytest.raises(Unreachable, match="systemctl start sessiond"):
            await sessiond.sessions()
        with pytest.raises(Unreachable):
            async with sessiond.events():
                raise AssertionError


async def test_without_a_bus(bus_directory: Path) -> None:
    with pytest.raises(Unreachable, match="no message bus"):
        async with client.connect(f"unix:path={bus_directory}/none"):
            raise AssertionError


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        (names.ACCESS_DENIED, NotAuthorized),
        ("org.freedesktop.DBus.Error.NoReply", Unreachable),
        ("org.freedesktop.DBus.Error.Spawn.ChildExited", Unreachable),
        (names.UNKNOWN_METHOD, Failed),
        ("org.sessiond.Overlay1.Error.Busy", Busy),
        ("org.sessiond.Overlay1.Error.FromTheFuture", Failed),
    ],
)
async def test_errors_of_the_bus_are_translated(
    private_bus: str, name: str, raised: type[Exception]
) -> None:
    async def refuse(_connection: Connection, _message: Message) -> Reply:
        raise BusError(name, "the reason")

    async with connect(handler=refuse) as other, client.connect() as sessiond:
        assert await other.request_name(names.BUS)
        with pytest.raises(raised, match="the reason"):
            await sessiond.sessions()


async def test_a_daemon_of_another_version_is_told(private_bus: str) -> None:
    async def answer(_connection: Connection, _message: Message) -> Reply:
        return "a{sv}", [{}]

    async with connect(handler=answer) as other, client.connect() as sessiond:
        assert await other.request_name(names.BUS)
        with pytest.raises(Failed, match="another version"):
            await sessiond.info()
