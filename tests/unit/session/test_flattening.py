"""Which layers are merged, and when, over mounts in memory."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from sessiond.errors import Busy, Failed
from sessiond.session import flattening
from sessiond.session.flattening import FLATTENING, mergeable
from sessiond.session.manager import Manager, Session
from sessiond.session.model import LayerNumber, SessionRecord, SessionState, SnapshotRecord
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers take root")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flattening, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(flattening, "_LONG_PAUSE_SECONDS", 0.0)


def record(view: list[int], *snapshots: list[int]) -> SessionRecord:
    """A record with these stacks, topmost first, without the upper, which is 99."""
    return SessionRecord.model_construct(
        upper=LayerNumber(99),
        layers=tuple(map(LayerNumber, view)),
        snapshots=tuple(
            SnapshotRecord.model_construct(layers=tuple(map(LayerNumber, layers)))
            for layers in snapshots
        ),
    )


@pytest.mark.parametrize(
    ("found", "pairs"),
    [
        (record([]), []),
        (record([1]), []),
        (record([3, 2, 1]), [(2, 1), (3, 2)]),
        (record([3, 2, 1], [2, 1]), [(2, 1)]),
        (record([3, 2, 1], [1]), [(3, 2)]),
        (record([3, 2, 1], [3, 2, 1]), [(2, 1), (3, 2)]),
        # Another branch begins on 1: as on a snapshot that was restored, changed and deleted.
        (record([3, 2, 1], [5, 4, 1]), [(3, 2)]),
        (record([3, 2, 1], [5, 4]), [(2, 1), (3, 2)]),
    ],
)
def test_what_nothing_needs_by_itself_is_mergeable(
    found: SessionRecord, pairs: list[tuple[int, int]]
) -> None:
    assert mergeable(found) == pairs


async def deep(world: World, manager: Manager, profile: str = "volatile") -> Session:
    """A session with five layers, of which snapshots need two."""
    session = await manager.create(USER, profile, session_id="s")
    for number in range(5):
        await world.mount("s").write(f"file{number}", b"%d" % number)
        await world.mount("s").write("changed", b"%d" % number)
        await session.snapshots.make(f"s{number}")
    for number in (0, 2, 4):
        await session.snapshots.delete(f"s{number}")
    return session


def shown(world: World) -> dict[str, bytes]:
    stack = world.mount("s").stack
    merged: dict[str, bytes] = {}
    for layer in (stack.upper.fs, *stack.lowers[:-1]):
        for path in layer.iterdir():
            merged.setdefault(path.name, path.read_bytes())
    return merged


def flatten(session: Session, above: int = 0) -> None:
    """Have no more layers than that, of those that nothing needs by themselves."""
    session.record = session.record.model_copy(update={"flatten_above": above})
    session.flattening.consider()


ALL = {f"file{number}": b"%d" % number for number in range(5)} | {"changed": b"4"}


@pytest.mark.parametrize("profile", ["volatile", "lasting"])
async def test_a_deep_stack_becomes_flat(world: World, profile: str) -> None:
    async with world.manager() as manager:
        session = await deep(world, manager, profile)
        assert len(session.record.layers) == 5
        flatten(session, 4)
        await until(lambda: len(session.record.layers) == 4)
        await until(lambda: session.turn.is_idle)
        assert len(mergeable(session.record)) == 1, "no more than has to be"
        flatten(session)
        await until(lambda: mergeable(session.record) == [])
        assert len(session.record.layers) == 3
        assert shown(world) == ALL
        storage = world.storage("s") if profile == "volatile" else world.disk("s")
        await until(lambda: len(world.layers(storage)) == 4)
        assert "busy" not in " ".join(world.recorder.events[-3:])
        await session.restore("s3", started_by=UID).wait()
        assert shown(world) == {name: data for name, data in ALL.items() if name != "file4"} | {
            "changed": b"3"
        }
        await session.restore("s1", started_by=UID).wait()
        assert shown(world) == {"file0": b"0", "file1": b"1", "changed": b"1"}
        assert session.snapshots["s3"].layers[1:] == session.snapshots["s1"].layers
    if profile == "lasting":
        async with world.manager() as manager:
            assert shown(world) == {"file0": b"0", "file1": b"1", "changed": b"1"}


async def test_never_while_there_is_an_operation(world: World) -> None:
    async with world.manager() as manager:
        session = await deep(world, manager)
        before = session.record
        async with world.mount("s").frozen():
            job = session.persist(started_by=UID)
            await until(lambda: session.record.upper != before.upper)
            flatten(session)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(session.record.layers) == 6
        await job.wait()
        await until(lambda: mergeable(session.record) == [])
        assert shown(world) == ALL


async def test_never_while_a_snapshot_is_exported(world: World) -> None:
    async with world.manager() as manager:
        session = await deep(world, manager)
        await world.mount("s").write("large", bytes(3 << 20))
        await session.snapshots.make("large")
        reader, writer = os.pipe2(os.O_CLOEXEC)
        job = session.snapshots.export("large", writer, started_by=UID)
        os.close(writer)
        flatten(session)
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert len(session.record.layers) == 6
        with open(reader, "rb") as archive:
            data = await trio.to_thread.run_sync(archive.read)
        await job.wait()
        assert data.endswith(bytes(1024))
        await until(lambda: mergeable(session.record) == [])


@pytest.mark.parametrize("call", ["merge", "swap", "sync"])
async def test_what_fails_is_tried_again(world: World, call: str) -> None:
    async with world.manager() as manager:
        session = await deep(world, manager)
        world.mounter.injected[call] = [Failed("The worker is gone.")] * 2
        flatten(session)
        await until(lambda: mergeable(session.record) == [])
        assert world.mounter.injected[call] == []
        assert shown(world) == ALL
        assert session.state is SessionState.ACTIVE


async def test_the_one_moment_in_which_it_is_busy(world: World) -> None:
    async with world.manager() as manager:
        session = await deep(world, manager)
        with session.turn.operating(FLATTENING, SessionState.ACTIVE):
            assert session.state is SessionState.ACTIVE
            with pytest.raises(Busy, match="takes but a moment"):
                session.reset(started_by=UID)
            with trio.move_on_after(0.01) as waiting:
                await session.undisturbed()
            assert waiting.cancelled_caught
        await session.undisturbed()
        session.reset(started_by=UID)


def test_a_record_without_a_layer() -> None:
    found = record([3, 2, 1], [2, 1], [3, 2, 1], [1])
    after = found.without_layer(LayerNumber(2))
    assert after.layers == (3, 1)
    assert [snapshot.layers for snapshot in after.snapshots] == [(1,), (3, 1), (1,)]
