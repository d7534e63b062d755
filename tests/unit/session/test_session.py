"""Operations on sessions over mounts in memory: what is recorded, served, told and deleted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from sessiond.errors import (
    Busy,
    Cancelled,
    Failed,
    InvalidName,
    InvalidOption,
    NoSpace,
    NoSuchSession,
    NoSuchSnapshot,
    SnapshotExists,
)
from sessiond.session.attempts import Attempts
from sessiond.session.manager import Manager, Session
from sessiond.session.model import SessionState
from sessiond.session.store import Store
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

ExpectLog = Callable[[str], None]


def recorded(world: World, session: Session) -> object:
    """The record as the next daemon would find it."""
    found = Store(world.runtime, world.state, world.mounts).load()
    assert not found.garbage
    (record,) = found.records
    assert record == session.record
    return record


async def settled(world: World, session: Session) -> None:
    """Wait until no layers are on disk but those of the record, and check the record on disk."""
    storage = world.storage(session.id) if session.storage == "tmpfs" else world.disk(session.id)
    expected = sorted(str(number) for number in session.record.all_layers)
    await until(lambda: world.layers(storage) == expected)
    await until(lambda: not any((world.state / "trash").iterdir()))
    recorded(world, session)


async def create(manager: Manager, profile: str = "volatile") -> Session:
    return await manager.create(USER, profile, session_id="s")


def upper_file(world: World, name: str) -> Path:
    return world.mount("s").stack.upper.fs / name


# Reset


async def test_reset_serves_an_empty_upper_over_the_image(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        old = world.mount("s").stack
        upper_file(world, "file").write_text("changed")
        await session.reset(started_by=UID).wait()
        new = world.mount("s").stack
        assert new.upper.fs != old.upper.fs
        assert list(new.upper.fs.iterdir()) == []
        assert new.lowers == old.lowers
        assert session.last_reset is not None
        assert session.state is SessionState.ACTIVE
        await settled(world, session)
    assert world.recorder.without_changes() == [
        "added s active",
        "job reset",
        "reset s",
        "done reset NoneType",
        "removed s",
    ]


async def test_reset_drops_committed_layers_and_keeps_snapshots(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        snapshot = await session.snapshots.make("one")
        await session.reset(started_by=UID).wait()
        assert len(world.mount("s").stack.lowers) == 1
        assert session.snapshots == {"one": snapshot}
        assert session.record.all_layers == {1, 3}
        await settled(world, session)


async def test_the_root_of_a_new_upper_looks_like_the_image(world: World) -> None:
    world.image.chmod(0o2751)
    async with world.manager() as manager:
        await create(manager)
        image = world.mount("s").stack.lowers[-1]
        image.chmod(0o2751)
        await manager.get("s").reset(started_by=UID).wait()
        upper = world.mount("s").stack.upper.fs
        assert upper.stat().st_mode & 0o7777 == 0o2751
        assert upper.stat().st_mtime_ns == image.stat().st_mtime_ns


@pytest.mark.parametrize("operation", ["reset", "snapshot", "restore"])
async def test_when_the_swap_fails_all_is_as_before(world: World, operation: str) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("first")
        before, stack = session.record, world.mount("s").stack
        world.mounter.injected["swap"] = [Failed("The layer cannot be opened.")]
        with pytest.raises(Failed, match="cannot be opened"):
            await perform(session, operation)
        assert world.mount("s").stack == stack
        assert session.record == before.model_copy(update={"next_layer": session.record.next_layer})
        assert session.record.next_layer > before.next_layer
        assert session.state is SessionState.ACTIVE
        await settled(world, session)


async def test_what_is_noted_of_a_snapshot_can_be_changed(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("one", description="first", pinned=True)
        assert session.record.snapshot("one").pinned
        await session.snapshots.pin("one", False)
        await session.snapshots.describe("one", "the first")
        one = session.record.snapshot("one")
        assert (one.description, one.pinned, one.automatic) == ("the first", False, False)
        recorded(world, session)
        with pytest.raises(InvalidOption, match="1001 characters"):
            await session.snapshots.describe("one", "x" * 1001)
        for change in (session.snapshots.describe("two", ""), session.snapshots.pin("two", True)):
            with pytest.raises(NoSuchSnapshot):
                await change
        job = session.reset(started_by=UID)
        for change in (session.snapshots.describe("one", ""), session.snapshots.pin("one", True)):
            with pytest.raises(Busy, match="a reset started by uid 0, is running"):
                await change
        await job.wait()


async def test_a_snapshot_tells_what_is_not_exact(world: World, expect_log: ExpectLog) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        world.mount("s").inexact = ("/busy",)
        snapshot = await session.snapshots.make("one")
        world.mount("s").inexact = ()
        assert snapshot.inexact == ("/busy",)
        assert session.record.snapshot("one") == snapshot
        assert (await session.snapshots.make("two")).inexact == ()
        await settled(world, session)
        expect_log("1 files of a later moment")


async def perform(session: Session, operation: str) -> None:
    match operation:
        case "reset":
            await session.reset(started_by=UID).wait()
        case "restore":
            await session.restore("first", started_by=UID).wait()
        case "persist":
            await session.persist(started_by=UID).wait()
        case _:
            await session.snapshots.make("second")


@pytest.mark.parametrize("operation", ["reset", "snapshot", "restore"])
@pytest.mark.parametrize("step", ["make_upper", "write"])
async def test_when_the_disk_is_full_all_is_as_before(
    world: World, operation: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("first")
        before, stack = session.record, world.mount("s").stack

        def full(*_: object) -> None:
            raise NoSpace("Its storage is full.")

        with monkeypatch.context() as patch:
            patch.setattr(Store, step, full)
            with pytest.raises(NoSpace):
                await perform(session, operation)
        assert world.mount("s").stack == stack
        assert session.record.layers == before.layers
        assert session.record.upper == before.upper
        await session.reset(started_by=UID).wait()
        await settled(world, session)


async def test_when_going_back_fails_both_errors_are_told_and_nothing_is_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        before = session.record
        write = Store.write

        def once(store: Store, record: object) -> None:
            if session.record != before:
                raise Failed("The disk is gone.")
            write(store, record)  # type: ignore[arg-type]

        world.mounter.injected["swap"] = [Failed("The layer is gone.")]
        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", once)
            with pytest.raises(Failed, match=r"layer is gone.*disk is gone"):
                await session.reset(started_by=UID).wait()
        # The record on disk names layer 2, which must be there for the next daemon.
        assert world.layers(world.storage("s")) == ["1", "2"]
        assert session.record.next_layer == 3
        await session.reset(started_by=UID).wait()
        assert world.mount("s").stack.upper.fs.parent.name == "3"


# Snapshots


async def test_snapshot_commits_the_upper(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        first_upper = world.mount("s").stack.upper.fs
        snapshot = await session.snapshots.make("one", description="the first")
        stack = world.mount("s").stack
        assert stack.lowers[0] == first_upper
        assert snapshot.layers == (1,)
        assert session.snapshots == {"one": snapshot}
        await settled(world, session)
        assert "snapshot s one" in world.recorder.events


async def test_restore_serves_the_layers_of_the_snapshot(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        upper_file(world, "kept").touch()
        await session.snapshots.make("one")
        upper_file(world, "lost").touch()
        await session.snapshots.make("two")
        await session.restore("one", started_by=UID).wait()
        stack = world.mount("s").stack
        assert [path.name for path in stack.lowers[0].iterdir()] == ["kept"]
        assert len(stack.lowers) == 2
        assert list(stack.upper.fs.iterdir()) == []
        assert session.record.all_layers == {4, 2, 1}
        await settled(world, session)
        await session.restore("two", started_by=UID).wait()
        assert [path.parent.name for path in world.mount("s").stack.lowers[:2]] == ["2", "1"]


async def test_deleting_a_snapshot_keeps_layers_that_are_in_use(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("one")
        await session.snapshots.make("two")
        await session.snapshots.delete("two")
        assert session.record.all_layers == {3, 2, 1}
        await session.restore("one", started_by=UID, undo=False).wait()
        assert session.record.all_layers == {4, 1}
        await session.snapshots.delete("one")
        assert session.record.all_layers == {4, 1}
        await session.reset(started_by=UID).wait()
        assert session.record.all_layers == {5}
        await settled(world, session)
        with pytest.raises(NoSuchSnapshot, match="snapshots are: none"):
            await session.snapshots.delete("one")


async def test_renaming_a_snapshot(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("one", description="kept")
        await session.snapshots.make("two")
        await session.snapshots.rename("one", "uno")
        assert list(session.snapshots) == ["uno", "two"]
        assert session.record.snapshot("uno").description == "kept"
        with pytest.raises(SnapshotExists):
            await session.snapshots.rename("uno", "two")
        with pytest.raises(InvalidName):
            await session.snapshots.rename("uno", "..")
        recorded(world, session)
        assert world.recorder.without_changes()[-2:] == ["no snapshot s one", "snapshot s uno"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a\nb", "é", "\udcff", "x" * 65])
async def test_snapshot_names_are_checked(world: World, name: str) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        with pytest.raises(InvalidName):
            await session.snapshots.make(name)


async def test_bad_snapshots_are_refused(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("one")
        with pytest.raises(SnapshotExists):
            await session.snapshots.make("one")
        with pytest.raises(InvalidOption, match="1001 characters"):
            await session.snapshots.make("two", description="x" * 1001)
        with pytest.raises(NoSuchSnapshot, match="snapshots are: one"):
            session.restore("two", started_by=UID)
        assert session.state is SessionState.ACTIVE


# Comparisons


async def test_states_are_compared_by_the_names_of_snapshots(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("one")
        await session.snapshots.make("two")
        served = world.mount("s").stack.lowers
        await session.differences.count("one", "two")
        compared = world.mount("s").compared
        assert compared.start is not None
        assert compared.end is not None
        assert (compared.start.paths, compared.end.paths) == (served[1:], served)
        await session.differences.count(end="one")
        assert world.mount("s").compared.start is None
        with pytest.raises(NoSuchSnapshot, match="snapshots are: one, two"):
            await session.differences.count("three")


async def test_layers_stay_as_long_as_they_are_compared(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("one")
        await session.reset(started_by=UID).wait()
        mount = world.mount("s")
        mount.differences = [{"path": "x" * 4000}] * 100  # more than a pipe holds
        read, write = os.pipe()
        os.set_blocking(write, False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.differences.write, write, "one")
            await trio.testing.wait_all_tasks_blocked()
            await session.snapshots.delete("one")
            await session.reset(started_by=UID).wait()
            await until(lambda: world.layers(world.storage("s")) == ["1", "3", "4"])
            os.close(read)
        os.close(write)
        await settled(world, session)


async def test_the_view_stays_as_long_as_it_is_compared(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        world.mount("s").differences = [{"path": "x" * 4000}] * 100  # more than a pipe holds
        reads, writes = zip(os.pipe(), os.pipe(), strict=True)
        async with trio.open_nursery() as nursery:
            for write in writes:
                os.set_blocking(write, False)
                nursery.start_soon(session.differences.write, write)
                await trio.testing.wait_all_tasks_blocked()
                await session.reset(started_by=UID).wait()
            assert world.layers(world.storage("s")) == ["1", "2", "3"]
            os.close(reads[0])
            await until(lambda: world.layers(world.storage("s")) == ["2", "3"])
            os.close(reads[1])
        for write in writes:
            os.close(write)
        await settled(world, session)


# One operation at a time


async def test_a_second_operation_is_refused_by_name(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        job = session.reset(started_by=UID)
        assert session.state is SessionState.BUSY
        with pytest.raises(
            Busy, match=r"busy: job 1, a reset started by uid \d+, is running. Wait .* or cancel"
        ):
            session.persist(started_by=UID)
        with pytest.raises(
            Busy, match=r"busy: job 1, a reset started by uid \d+, is running. Wait .* or cancel"
        ):
            await session.snapshots.make("one")
        await job.wait()
        assert session.state is SessionState.ACTIVE
        assert job.finished
        assert job.error is None


async def test_a_job_that_is_cancelled_before_it_begins_changes_nothing(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        before = session.record
        job = session.reset(started_by=UID)
        job.cancel()
        with pytest.raises(Cancelled):
            await job.wait()
        assert session.record == before
        job.cancel()  # too late is no error
        assert "done reset Cancelled" in world.recorder.events


async def test_close_cancels_the_job_first(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        job = session.persist(started_by=UID)
        await manager.close("s")
        with pytest.raises(Cancelled, match="being closed"):
            await job.wait()
        assert not world.mount("s").mounted
        for operation in ("reset", "snapshot"):
            with pytest.raises(NoSuchSession):
                await perform(session, operation)
        with pytest.raises(NoSuchSession):
            await session.differences.count()
        with pytest.raises(NoSuchSession):
            manager.get("s")
        await until(lambda: not any((world.state / "trash").iterdir()))
    assert not any((world.state / "sessions").iterdir())


async def test_a_fault_in_a_job_is_an_error_of_the_job(
    world: World, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    async with world.manager() as manager:
        session = await create(manager)

        async def fault(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Session, "switch", fault)
        with pytest.raises(Failed, match="fault in sessiond"):
            await session.reset(started_by=UID).wait()
        assert session.state is SessionState.ACTIVE
    expect_log("reset of session s failed by a fault")


# Workers that die


BEYOND_RECOVERY = Failed("What was mounted is gone.")


async def test_another_worker_goes_on_for_a_dead_one(world: World, expect_log: ExpectLog) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        mount = world.mount("s")
        for times in (1, 2):
            mount.die()
            await until(lambda times=times: mount.recovered_times == times)  # type: ignore[misc]
        assert world.mount("s") is mount
        assert mount.mounted
        assert session.state is SessionState.ACTIVE
        assert "changed s failed" not in world.recorder.events
    expect_log("another goes on")


async def test_workers_that_die_one_after_the_other_are_not_succeeded_for_ever(
    world: World, expect_log: ExpectLog
) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        session.view._recoveries = Attempts(most=20, seconds=3600.0)
        mount = world.mount("s")
        for times in range(1, 21):
            mount.die()
            await until(lambda times=times: mount.recovered_times == times)  # type: ignore[misc]
        mount.die()
        await until(lambda: world.mount("s") is not mount)
    expect_log("another goes on")
    expect_log("ended unexpectedly")


async def test_where_no_other_can_go_on_it_is_mounted_again(
    world: World, expect_log: ExpectLog
) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        await session.snapshots.make("one")
        dead = world.mount("s")
        world.mounter.injected["recover"] = [BEYOND_RECOVERY]
        dead.die()
        await until(lambda: world.mount("s") is not dead)
        assert world.mount("s").stack == dead.stack
        assert not dead.mounted
        await until(lambda: session.state is SessionState.ACTIVE)
        assert session.failure == ""
        assert "changed s failed" in world.recorder.events
    expect_log("ended unexpectedly")


async def test_mounting_again_is_given_up_in_the_end(
    world: World, expect_log: ExpectLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sessiond.session.view._PAUSE_SECONDS", 0.0)
    async with world.manager() as manager:
        session = await create(manager)
        world.mounter.injected["mount"] = [Failed("There is no memory.")] * 5
        world.mounter.injected["recover"] = [BEYOND_RECOVERY]
        world.mount("s").die()
        await until(lambda: "given up" in session.failure)
        await until(lambda: session.state is SessionState.FAILED)
        with pytest.raises(Failed, match="There is no memory"):
            await session.differences.count()
        # Reset is what a user can still do about it.
        await session.reset(started_by=UID).wait()
        assert session.state is SessionState.ACTIVE
        await settled(world, session)
    expect_log("given up")


async def test_a_worker_that_dies_again_and_again_is_left_dead(
    world: World, expect_log: ExpectLog
) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        world.mounter.injected["recover"] = [BEYOND_RECOVERY] * 6
        for _ in range(5):
            dead = world.mount("s")
            dead.die()
            await until(lambda dead=dead: world.mount("s") is not dead)  # type: ignore[misc]
            await until(lambda: session.state is SessionState.ACTIVE)
        world.mount("s").die()
        await until(lambda: "given up" in session.failure)
    expect_log("given up")


async def test_the_death_of_a_worker_fails_the_job(world: World, expect_log: ExpectLog) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        dead = world.mount("s")
        world.mounter.injected["recover"] = [BEYOND_RECOVERY]
        job = session.persist(started_by=UID)
        dead.die()
        with pytest.raises(Failed, match=r"worker of session s (ended|is gone)"):
            await job.wait()
        await until(lambda: world.mount("s") is not dead)
        await until(lambda: session.state is SessionState.ACTIVE)
        assert session.storage == "tmpfs"
        await settled(world, session)
    expect_log("ended unexpectedly")


# Space


async def test_usage_of_a_volatile_session_has_limits(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager)
        assert session.usage.bytes_limit > session.usage.bytes_used > 0
        await manager.close("s")
        assert session.usage.bytes_limit > 0


async def test_usage_of_a_persistent_session_has_no_limit(world: World) -> None:
    async with world.manager() as manager:
        session = await create(manager, "lasting")
        assert session.usage.bytes_limit == session.usage.inodes_limit == 0
        assert session.usage.bytes_used > 0


async def test_space_is_watched_while_there_are_sessions(
    world: World, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    from sessiond.session import manager as manager_module
    from sessiond.session import session as module
    from sessiond.session.space import Space

    used = 50
    monkeypatch.setattr(manager_module, "_UNTOLD_SECONDS", 5)
    monkeypatch.setattr(module, "measure", lambda _: Space(used, 100, 0, 0))
    async with world.manager() as manager:
        session = await create(manager)

        def levels() -> list[str]:
            return [event for event in world.recorder.events if event.startswith("space")]

        for used, level in ((85, "warning"), (96, "critical"), (10, "normal")):  # noqa: B007
            await until(lambda level=level: levels()[-1:] == [f"space s {level}"])  # type: ignore[misc]
        await trio.sleep(60)
        assert len(levels()) == 3
        assert session.space_level == "normal"
