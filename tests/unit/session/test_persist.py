"""Persist, over mounts in memory: at every step the session is whole, here or there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from sessiond.errors import Cancelled, Failed, NoSpace, NotSupported
from sessiond.session import persist as module
from sessiond.session.manager import Manager, Session
from sessiond.session.model import NOTHING_PENDING, PendingFile, PendingWrites, SessionState, Stack
from sessiond.session.records import read_session
from sessiond.session.store import Store
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

ExpectLog = Callable[[str], None]


async def create(world: World, manager: Manager) -> Session:
    """A session with a snapshot, and a file in each layer."""
    session = await manager.create(USER, "volatile", session_id="s")
    await world.mount("s").write("first", b"1")
    await session.snapshots.make("one")
    await world.mount("s").write("second", b"2" * 5000)
    return session


def contents(world: World) -> dict[str, bytes]:
    """Names and contents that the layers served now hold."""
    stack = world.mount("s").stack
    trees = (stack.upper.fs, *stack.lowers[:-1])
    return {path.name: path.read_bytes() for tree in trees for path in tree.iterdir()}


ALL = {"first": b"1", "second": b"2" * 5000}


def assert_volatile(world: World, session: Session) -> None:
    assert session.storage == "tmpfs"
    assert session.state is SessionState.ACTIVE
    assert world.mount("s").stack.upper.fs.is_relative_to(world.runtime)
    assert contents(world) == ALL
    assert not (world.disk("s") / "session.json").exists()
    record = read_session(world.runtime / "sessions/s/session.json")
    # Numbers of layers that were never recorded are skipped in memory only.
    assert record.next_layer <= session.record.next_layer
    assert session.record.gone_back_to(record) == session.record


async def test_persist_serves_the_copies_on_disk(world: World) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        job = session.persist(started_by=UID)
        await job.wait()
        assert job.progress == 1.0
        assert job.bytes >= 5001
        assert session.storage == "persistent"
        assert world.mount("s").stack.upper.fs.is_relative_to(world.state)
        assert world.mount("s").frozen_times == 1
        assert contents(world) == ALL
        assert not world.storage("s").exists()
        assert world.storage("s") not in world.mounts.mounted
        await session.restore("one", started_by=UID, undo=False).wait()
        assert contents(world) == {"first": b"1"}
    assert (world.disk("s") / "session.json").exists()

    async with world.manager() as manager:
        assert contents(world) == {"first": b"1"}
        assert list(manager.get("s").snapshots) == ["one"]


async def test_persist_of_a_persistent_session_waits_for_the_disk(world: World) -> None:
    async with world.manager() as manager:
        session = await manager.create(USER, "lasting", session_id="s")
        before = session.record
        await session.persist(started_by=UID).wait()
        assert session.record == before
        world.mounter.injected["sync"] = [NoSpace("The disk is full.")]
        with pytest.raises(NoSpace):
            await session.persist(started_by=UID).wait()


async def test_what_is_written_during_the_copy_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LITTLE", 0)
    rounds = []
    sync = module.sync_file_system

    def write_meanwhile(directory: Path) -> None:
        sync(directory)
        if world.mount("s").frozen_times == 0:
            rounds.append(directory)
            upper = world.mount("s").stack.upper.fs
            (upper / f"late{len(rounds)}").write_bytes(b"x" * 9000)

    monkeypatch.setattr(module, "sync_file_system", write_meanwhile)
    async with world.manager() as manager:
        session = await create(world, manager)
        await session.persist(started_by=UID).wait()
        assert len(rounds) == 4
        late = {f"late{number}": b"x" * 9000 for number in (1, 2, 3, 4)}
        assert contents(world) == ALL | late


@pytest.mark.parametrize("call", ["swap", "frozen", "second swap"])
async def test_when_the_mount_fails_the_session_stays_volatile(world: World, call: str) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        if call == "second swap":
            swap = type(world.mount("s")).swap

            async def fail_on_disk(
                stack: Stack, *, moved: bool = False, retained: bool = False
            ) -> None:
                if world.mount("s").frozen_times:
                    raise Failed("The worker refuses.")
                await swap(world.mount("s"), stack, moved=moved, retained=retained)

            world.mount("s").swap = fail_on_disk  # type: ignore[method-assign]
        else:
            world.mounter.injected[call] = [Failed("The worker refuses.")]
        with pytest.raises(Failed, match="The worker refuses"):
            await session.persist(started_by=UID).wait()
        assert_volatile(world, session)
        assert not world.disk("s").exists()


@pytest.mark.parametrize("step", ["create_on_disk", "write", "make_upper"])
async def test_when_the_disk_fails_the_session_stays_volatile(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    original = getattr(Store, step)

    def fail(store: Store, record: object, *arguments: object) -> None:
        if step == "make_upper" or record.storage == "persistent":  # type: ignore[attr-defined]
            raise Failed("The disk is gone.")
        original(store, record, *arguments)

    async with world.manager() as manager:
        session = await create(world, manager)
        with monkeypatch.context() as patch:
            patch.setattr(Store, step, fail)
            with pytest.raises(Failed, match="The disk is gone"):
                await session.persist(started_by=UID).wait()
        assert_volatile(world, session)
        await session.persist(started_by=UID).wait()
        assert contents(world) == ALL


@pytest.mark.parametrize("call_number", [1, 2])
async def test_when_the_copy_fails_the_session_stays_volatile(
    world: World, monkeypatch: pytest.MonkeyPatch, call_number: int
) -> None:
    calls = []

    def fail(directory: Path) -> None:
        calls.append(directory)
        if len(calls) == call_number:
            raise OSError(5, "Input/output error", str(directory))

    async with world.manager() as manager:
        session = await create(world, manager)
        with monkeypatch.context() as patch:
            patch.setattr(module, "sync_file_system", fail)
            with pytest.raises(Failed, match="Input/output error"):
                await session.persist(started_by=UID).wait()
        assert_volatile(world, session)


async def test_too_little_space_is_found_out_before_copying(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        before = session.record
        monkeypatch.setattr(module, "measure", lambda _: module_space(99, 100))
        with pytest.raises(NoSpace, match="only 1 are free"):
            await session.persist(started_by=UID).wait()
        assert session.record == before
        assert_volatile(world, session)


def module_space(used: int, total: int) -> object:
    from sessiond.session.space import Space

    return Space(used, total, 0, 0)


@pytest.mark.parametrize("call_number", [1, 2])
async def test_cancelling_rolls_back(
    world: World, monkeypatch: pytest.MonkeyPatch, call_number: int
) -> None:
    """Cancelled while committed layers are copied, and while the upper is, with writers held."""
    calls: list[str] = []
    async with world.manager() as manager:
        session = await create(world, manager)
        job = None
        copy = module.copy_trees

        def cancel_then_copy(*arguments: object, **options: object) -> None:
            calls.append("copy")
            # The first two copies are of committed layers, the third is of the upper.
            if len(calls) == call_number + 1:
                trio.from_thread.run_sync(job.cancel)  # type: ignore[union-attr]
            copy(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "copy_trees", cancel_then_copy)
        job = session.persist(started_by=UID)
        with pytest.raises(Cancelled):
            await job.wait()
        assert_volatile(world, session)
        assert not world.disk("s").exists()
        await world.mount("s").write("third", b"3")  # writers are not held any more


async def test_a_crash_after_the_record_finds_the_persistent_session(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both records are on disk between the moment of truth and the removal of the volatile one."""
    saved = world.directory / "saved"
    write = Store.write

    def write_and_save(store: Store, record: object) -> None:
        write(store, record)  # type: ignore[arg-type]
        if record.storage == "persistent":  # type: ignore[attr-defined]
            shutil.copytree(world.runtime, saved / "run")
            shutil.copytree(world.state, saved / "state")

    monkeypatch.setattr(Store, "write", write_and_save)
    async with world.manager() as manager:
        session = await create(world, manager)
        await session.persist(started_by=UID).wait()
    shutil.rmtree(world.runtime)
    shutil.rmtree(world.state)
    os.rename(saved / "run", world.runtime)
    os.rename(saved / "state", world.state)
    assert (world.runtime / "sessions" / "s" / "session.json").exists()
    world.mounts.mounted[world.storage("s")] = "tmpfs"

    async with world.manager() as manager:
        assert manager.get("s").storage == "persistent"
        assert contents(world) == ALL
        await until(lambda: not world.storage("s").exists())


async def test_a_failure_to_drop_the_volatile_session_is_only_logged(
    world: World, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    def fail(*_: object) -> None:
        raise Failed("It is in use.")

    async with world.manager() as manager:
        session = await create(world, manager)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "drop_volatile_storage", fail)
            await session.persist(started_by=UID).wait()
        assert session.storage == "persistent"
    expect_log("is persistent, but: It is in use.")


async def test_a_disk_that_forgets_is_found_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = module.copy_trees

    def copy_badly(source: Path, target: Path, *arguments: object, **options: object) -> None:
        copy(source, target, *arguments, **options)  # type: ignore[arg-type]
        file = target / "fs/second"
        if file.exists():
            before = file.stat()
            file.write_bytes(b"3" * 5000)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    async with world.manager() as manager:
        session = await create(world, manager)
        with monkeypatch.context() as patch:
            patch.setattr(module, "copy_trees", copy_badly)
            with pytest.raises(Failed, match=r"stays in RAM.*/fs/second"):
                await session.persist(started_by=UID).wait()
            assert_volatile(world, session)
            assert not world.disk("s").exists()
            await session.persist(started_by=UID, verify=False).wait()
        assert contents(world) == ALL | {"second": b"3" * 5000}


@pytest.mark.parametrize("call_number", [1, 3])
async def test_cancelling_what_is_being_read_back(
    world: World, monkeypatch: pytest.MonkeyPatch, call_number: int
) -> None:
    """Cancelled while committed layers are read back, and while the upper is."""
    calls: list[str] = []
    async with world.manager() as manager:
        session = await create(world, manager)
        job = None
        verify = module.verify_trees

        def cancel_then_verify(*arguments: object, **options: object) -> None:
            calls.append("verify")
            if len(calls) == call_number:
                trio.from_thread.run_sync(job.cancel)  # type: ignore[union-attr]
            verify(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "verify_trees", cancel_then_verify)
        job = session.persist(started_by=UID)
        with pytest.raises(Cancelled):
            await job.wait()
        assert len(calls) == call_number
        assert_volatile(world, session)
        assert not world.disk("s").exists()


async def test_a_disk_in_ram_is_none(world: World) -> None:
    """What is asked to survive a reboot must not only seem so."""
    world.mounts.in_ram = True
    async with world.manager() as manager:
        session = await create(world, manager)
        with pytest.raises(NotSupported, match="is in RAM, so"):
            await session.persist(started_by=UID).wait()
        assert_volatile(world, session)
        with pytest.raises(NotSupported, match="state_directory"):
            await manager.create(USER, "lasting", session_id="t")
        assert list(manager.sessions) == ["s"]


ONE_FILE = PendingWrites({7: "/var/log"}, 1, in_use=True)


def kept(world: World) -> set[str]:
    """What there is in the volatile storage."""
    return {path.name for path in world.storage("s").iterdir()}


async def test_files_that_are_open_stay_in_ram_until_they_are_closed(
    world: World, expect_log: ExpectLog, autojump_clock: object
) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        mount = world.mount("s")
        mount.pending_writes = ONE_FILE
        await session.persist(started_by=UID).wait()
        assert session.storage == "persistent"
        assert session.pending == 1
        assert await session.pending_files() == [PendingFile("/var/log", ())]
        assert kept(world) == {"orphans"}
        # A worker that dies changes nothing about that.
        mount.die()
        with pytest.raises(Failed):
            await session.pending_files()
        await until(lambda: mount.recovered_times)
        expect_log("another goes on for it")
        assert kept(world) == {"orphans"}
        mount.pending_writes = PendingWrites({}, 0, in_use=True)  # one that was removed
        world.recorder.events.clear()
        await until(lambda: session.pending == 0)
        assert "changed s active" in world.recorder.events
        assert kept(world) == {"orphans"}
        mount.pending_writes = NOTHING_PENDING
        await until(lambda: not world.storage("s").exists())
        assert world.storage("s") not in world.mounts.mounted
        assert await session.pending_files() == []


async def test_a_later_manager_looks_after_what_is_in_ram(
    world: World, autojump_clock: object
) -> None:
    async with world.crashing_manager() as manager:
        session = await create(world, manager)
        world.mount("s").pending_writes = ONE_FILE
        await session.persist(started_by=UID).wait()
    async with world.manager():
        # What is mounted anew has nothing open.
        await until(lambda: not world.storage("s").exists())


async def test_what_is_in_ram_goes_with_the_session(world: World) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        world.mount("s").pending_writes = ONE_FILE
        await session.persist(started_by=UID).wait()
        await manager.close("s")
        assert not world.storage("s").exists()
        assert not world.mounts.mounted.keys() & {world.storage("s")}


async def test_another_session_on_disk_is_not_overwritten(world: World) -> None:
    async with world.manager() as manager:
        session = await create(world, manager)
        world.disk("s").mkdir()
        (world.disk("s") / "session.json").write_text("precious")
        with pytest.raises(Failed, match="another persistent session s"):
            await session.persist(started_by=UID).wait()
        assert (world.disk("s") / "session.json").read_text() == "precious"
        shutil.rmtree(world.disk("s"))
        await until(lambda: session.state is SessionState.ACTIVE)
