"""Restore keeps what it replaces: a snapshot, by which it can be undone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from sessiond.config import Config
from sessiond.errors import Failed, NoSpace, SessiondError
from sessiond.session import view
from sessiond.session.manager import Manager, Session
from sessiond.session.model import SessionRecord, SessionState, SnapshotRecord
from sessiond.session.restore import automatic_name
from sessiond.session.retention import AUTOMATIC_LIMIT
from sessiond.session.store import Store
from sessiond.session.view import View
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

ExpectLog = Callable[[str], None]


async def create(world: World, manager: Manager, profile: str = "volatile") -> Session:
    """A session with the file ``old``, and a snapshot ``one`` of that."""
    session = await manager.create(USER, profile, session_id="s")
    await world.mount("s").write("old", b"")
    await session.snapshots.make("one")
    return session


def automatic(session: Session) -> list[SnapshotRecord]:
    return [one for one in session.snapshots.values() if one.automatic]


def visible(world: World) -> set[str]:
    """Names in the layers that are served."""
    stack = world.mount("s").stack
    return {path.name for layer in (stack.upper.fs, *stack.lowers) for path in layer.iterdir()}


async def restore(session: Session, name: str, *, undo: bool = True) -> None:
    await session.restore(name, started_by=UID, undo=undo).wait()


async def as_recorded(world: World, session: Session) -> None:
    """Wait until the layers on disk are those of the record, and that is the one on disk."""
    storage = session.services.store.storage(session.record)
    expected = sorted(str(number) for number in session.record.all_layers)
    await until(lambda: world.layers(storage) == expected)
    (record,) = Store(world.runtime, world.state, world.mounts).load().records
    assert record == session.record


@pytest.mark.parametrize("profile", ["volatile", "lasting"])
async def test_a_restore_can_be_undone(world: World, profile: str) -> None:
    async with world.manager() as manager:
        session = await create(world, manager, profile)
        await world.mount("s").write("new", b"")
        await restore(session, "one")
        assert visible(world) == {"old"}
        (kept,) = automatic(session)
        assert kept.name.startswith("before-restore-20")
        assert kept.description == "What a restore of one has replaced"
        assert f"snapshot s {kept.name}" in world.recorder.events
        assert world.mount("s").frozen_times == 1
        await as_recorded(world, session)
        await restore(session, kept.name)
        assert visible(world) == {"old", "new"}
        assert automatic(session) == [kept]  # there was nothing to keep


async def test_without_undo_nothing_is_kept(world: World) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        await world.mount("s").write("new", b"")
        await restore(session, "one", undo=False)
        assert not automatic(session)
        assert session.record.all_layers == {1, 3}
        await as_recorded(world, session)


async def test_what_no_snapshot_has_is_kept_without_another_layer(world: World) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        await world.mount("s").write("new", b"")
        await session.snapshots.make("two")
        await session.snapshots.delete("two")
        await restore(session, "one")
        (kept,) = automatic(session)
        assert kept.layers == (2, 1)
        assert session.record.all_layers == {4, 2, 1}
        await as_recorded(world, session)


async def test_a_change_of_the_root_alone_is_kept(world: World) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        world.mount("s").stack.upper.fs.chmod(0o751)
        await restore(session, "one")
        assert automatic(session)


@pytest.mark.parametrize("changed", [True, False])
async def test_a_session_that_is_not_served_is_restored(
    world: World, changed: bool, expect_log: ExpectLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "_PAUSE_SECONDS", 0.0)
    async with world.manager() as manager:
        session = await create(world, manager)
        if changed:
            await world.mount("s").write("new", b"")
        world.mounter.injected["recover"] = [Failed("It is lost.")]
        world.mounter.injected["mount"] = [Failed("Not now.")] * 5
        world.mount("s").die()
        await until(lambda: session.state is SessionState.FAILED and "given up" in session.failure)
        expect_log("is given up")
        await restore(session, "one")
        assert session.state is SessionState.ACTIVE
        assert len(automatic(session)) == changed
        assert visible(world) == {"old"}
        await as_recorded(world, session)


def full(*_: object) -> None:
    raise NoSpace("Its storage is full.")


@pytest.mark.parametrize("step", ["make_upper", "write"])
async def test_without_room_for_it_the_restore_is_refused_with_what_to_do(
    world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        await world.mount("s").write("new", b"")
        before = session.record
        with monkeypatch.context() as patch:
            patch.setattr(Store, step, full)
            with pytest.raises(NoSpace, match=r"cannot be kept.*full.*--no-undo"):
                await restore(session, "one")
        assert visible(world) == {"old", "new"}
        assert session.record == before.model_copy(update={"next_layer": session.record.next_layer})
        await restore(session, "one", undo=False)
        await as_recorded(world, session)


@pytest.mark.parametrize("swap", [1, 2])
async def test_when_a_swap_fails_nothing_is_kept_and_nothing_lost(
    world: World, swap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = world.config().model_dump(mode="json", exclude_unset=True)
    tables["profile"]["volatile"]["snapshots"] = {"count": 2}
    async with world.manager(Config.model_validate(tables)) as manager:
        session = await create(world, manager)
        await session.snapshots.make("two")
        await world.mount("s").write("new", b"")
        snapshots = dict(session.snapshots)
        swaps: list[object] = []
        serve = View.serve

        async def fail_once(served: View, record: object, *, retained: bool) -> None:
            swaps.append(record)
            if len(swaps) == swap:
                raise Failed("The layer is gone.")
            await serve(served, record, retained=retained)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(View, "serve", fail_once)
            with pytest.raises(SessiondError, match="The layer is gone"):
                await restore(session, "one")
        assert session.snapshots == snapshots
        assert visible(world) == {"old", "new"}
        assert session.state is SessionState.ACTIVE
        await as_recorded(world, session)


@pytest.mark.parametrize("deadly_swap", [0, 1])
async def test_what_is_written_after_a_death_of_the_worker_is_not_lost(
    world: World, deadly_swap: int, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    """It was to hold changes until the restore is done; the next one does not."""
    async with world.manager() as manager:
        session = await create(world, manager)
        mount = world.mount("s")
        await mount.write("new", b"")
        snapshots = dict(session.snapshots)
        serve, swaps = View.serve, 0

        async def die_between(served: View, record: SessionRecord, *, retained: bool) -> object:
            nonlocal swaps
            if swaps == deadly_swap:
                mount.die()
                await until(lambda: mount.recovered_times)
                await mount.write("written", b"")
            swaps += 1
            return await serve(served, record, retained=retained)

        with monkeypatch.context() as patch:
            patch.setattr(View, "serve", die_between)
            with pytest.raises(Failed, match="try again"):
                await restore(session, "one")
        expect_log("another goes on")
        assert session.snapshots == snapshots
        assert visible(world) == {"old", "new", "written"}
        await as_recorded(world, session)
        await restore(session, "one")
        assert visible(world) == {"old"}


async def test_automatic_snapshots_do_not_pile_up(world: World) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        for number in range(AUTOMATIC_LIMIT + 2):
            await world.mount("s").write(f"new{number}", b"")
            await restore(session, "one")
        assert len(automatic(session)) == AUTOMATIC_LIMIT
        assert "one" in session.snapshots
        removed = [event for event in world.recorder.events if event.startswith("no snapshot")]
        assert len(removed) == 2
        await as_recorded(world, session)


async def test_names_of_one_second_differ(world: World) -> None:
    async with world.manager() as manager:
        record = (await create(world, manager)).record
        moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        first = automatic_name(record, "before-restore", moment)
        assert first == "before-restore-20260102-030405"
        (one,) = record.snapshots
        record = record.with_snapshots([one.model_copy(update={"name": first})])
        assert automatic_name(record, "before-restore", moment) == f"{first}-2"
