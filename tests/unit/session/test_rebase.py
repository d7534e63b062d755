"""Sessions that find another image than they were built on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from sessiond.errors import Failed, ImageUnavailable, NoSpace, NotSupported
from sessiond.overlay.rebase import Conflicts
from sessiond.session import rebase
from sessiond.session.manager import Manager, Session
from sessiond.session.model import SessionState, SnapshotName, StorageKind, Uid
from tests.support.rebasing import NEW, NEWER, OLD, Machine
from tests.support.sessions import UID, USER
from tests.support.waiting import until

pytestmark = pytest.mark.root

ExpectLog = Callable[[str], None]


@pytest.fixture
def machine(real: Path) -> Machine:
    machine = Machine(real)
    machine.pack(OLD)
    return machine


async def listed(manager: Manager, session: Session) -> list[dict[str, object]]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    await session.differences.shadowed(manager.source_of(session), writer)
    os.close(writer)
    with open(reader) as stream:
        lines = [json.loads(line) for line in stream]
    assert lines.pop() == {"complete": True}
    return lines


def is_shadowed(outcome: str, **more: object) -> dict[str, object]:
    told = {"path": "/etc/a", "type": "file", "outcome": outcome, "now": True}
    return {**told, "snapshots": ["one"], **more}


async def test_refuse_and_rebase_on_demand(machine: Machine, expect_log: ExpectLog) -> None:
    async with machine.manager() as manager:
        await machine.make_session(manager)
        assert await listed(manager, manager.get("s")) == []
    machine.pack(NEW)
    async with machine.manager() as manager:
        session = manager.get("s")
        assert session.state is SessionState.FAILED
        assert "is not the one" in session.failure
        # The old image is gone: all that is younger than it may have changed.
        assert await listed(manager, session) == [is_shadowed("kept")]
        one = SnapshotName("one")
        os.setxattr(machine.layer(1), "trusted.sessiond.bytes", b"1 999999")
        before = session.image
        source = manager.source_of(session)
        job = session.rebase(source, conflicts=Conflicts.SAVE, started_by=Uid(UID))
        await job.wait()
        expect_log("is rebased without the image")
        assert session.state is SessionState.ACTIVE
        assert session.image != before
        machine.assert_in_order(session)
        saved = is_shadowed("saved", saved_as="/etc/a.sessiond-old")
        assert await listed(manager, session) == [saved]
        assert sorted(os.listdir(machine.layer(1) / "fs/etc")) == ["a.sessiond-old"]
        # What it takes is counted anew.
        await until(lambda: session.snapshots.size(one).known)
        assert session.snapshots.size(one).bytes != 999_999
        # Nothing is to be done now.
        await session.rebase(source, started_by=Uid(UID)).wait()
    async with machine.manager() as manager:
        assert manager.get("s").state is SessionState.ACTIVE


async def test_rebase_at_the_start_with_the_old_image(machine: Machine) -> None:
    async with machine.manager(image_changed="rebase", rebase_conflicts="drop") as manager:
        await machine.make_session(manager)
    machine.pack(NEW, keep_old=True)
    async with machine.manager() as manager:
        session = manager.get("s")
        assert session.state is SessionState.ACTIVE
        assert session.storage is StorageKind.PERSISTENT
        machine.assert_in_order(session)
        assert await listed(manager, session) == [is_shadowed("dropped")]
        assert os.listdir(machine.layer(1) / "fs/etc") == []
        assert os.listdir(machine.layer(2) / "fs/etc") == ["b"]
        assert list(session.snapshots) == ["one"]
        assert manager.images == (session.image,)  # the old one is unmounted again


async def test_an_image_that_moved_is_followed_by_the_profile(machine: Machine) -> None:
    async with machine.manager(image_changed="rebase") as manager:
        await machine.make_session(manager)
    other = machine.directory / "other.squashfs"
    machine.image.rename(other)
    machine.pack(NEW)
    machine.image.rename(machine.directory / "v2.squashfs")
    other.rename(machine.image)
    async with machine.manager(image=str(machine.directory / "v2.squashfs")) as manager:
        session = manager.get("s")
        assert session.record.source.path.name == "v2.squashfs"
        assert await listed(manager, session) == [is_shadowed("kept")]
        machine.assert_in_order(session)


async def test_discard(machine: Machine, expect_log: ExpectLog) -> None:
    async with machine.manager(image_changed="discard") as manager:
        await machine.make_session(manager)
    machine.pack(NEW)
    async with machine.manager() as manager:
        expect_log("its changes and snapshots are deleted")
        session = manager.get("s")
        assert session.state is SessionState.ACTIVE
        assert session.snapshots == {}
        assert session.record.layers == ()
        assert os.listdir(machine.layer(session.record.upper) / "fs") == []
        only = [str(session.record.upper)]
        await until(lambda: os.listdir(machine.layer(0).parent) == only)


async def test_an_image_that_is_no_image_changes_nothing(
    machine: Machine, expect_log: ExpectLog
) -> None:
    async with machine.manager(image_changed="rebase") as manager:
        await machine.make_session(manager)
        before = manager.get("s").record
    machine.image.write_bytes(b"nothing")
    async with machine.manager() as manager:
        session = manager.get("s")
        expect_log("stays on its image")
        assert session.state is SessionState.FAILED
        assert session.record == before


async def test_a_session_in_use_is_only_rebased_if_it_may_be_unmounted(machine: Machine) -> None:
    async with machine.manager() as manager:
        await machine.make_session(manager)
        session = manager.get("s")
        source = manager.source_of(session)
        old = session.image
        await session.rebase(source, started_by=Uid(UID)).wait()
        mount = machine.mounter.mounts[session.id]
        assert mount.mounted
        machine.pack(NEW)
        with pytest.raises(NotSupported, match="in use on its image"):
            await session.rebase(source, started_by=Uid(UID)).wait()
        assert mount.mounted
        await session.rebase(source, remount=True, started_by=Uid(UID)).wait()
        assert not mount.mounted
        assert machine.mounter.mounts[session.id].mounted
        assert session.state is SessionState.ACTIVE
        assert session.image != old
        machine.assert_in_order(session)
        # The old image was mounted still, so it is known what has changed.
        assert await listed(manager, session) == [is_shadowed("kept")]


async def test_a_rebase_that_cannot_begin_leaves_the_session_as_it_was(machine: Machine) -> None:
    async with machine.manager() as manager:
        await machine.make_session(manager)
        session = manager.get("s")
        os.setxattr(machine.layer(2) / "fs/etc/b", "trusted.overlay.metacopy", b"")
        before = session.record
        machine.pack(NEW)
        source = manager.source_of(session)
        with pytest.raises(Failed, match="only the metadata"):
            await session.rebase(source, remount=True, started_by=Uid(UID)).wait()
        assert session.record == before
        assert session.state is SessionState.ACTIVE
        assert machine.mounter.mounts[session.id].mounted


async def test_without_space_a_rebase_does_not_begin(machine: Machine) -> None:
    async with machine.manager(storage="tmpfs", size="1M") as manager:
        session = await manager.create(USER, "p", session_id="s")
        upper = machine.directory / "run/sessions/s/storage/layers/1/fs"
        for number in range(300):  # more than fit into the block that the list may still get
            (upper / f"{number}".rjust(200, "x")).symlink_to("nowhere")
        before = session.record
        machine.pack({f"{number}".rjust(200, "x"): NEWER for number in range(300)})
        with open(upper / "filler", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        source = manager.source_of(session)
        with pytest.raises(NoSpace):
            await session.rebase(source, remount=True, started_by=Uid(UID)).wait()
        assert session.record == before
        assert machine.mounter.mounts[session.id].mounted
        assert not list(machine.directory.glob("run/sessions/s/storage/shadowed.*"))
        (upper / "filler").unlink()
        await session.rebase(source, remount=True, started_by=Uid(UID)).wait()
        assert session.image != before.image
        stored = machine.directory / "run/sessions/s/storage/shadowed.jsonl"
        assert len(stored.read_bytes().splitlines()) == 301


@pytest.mark.parametrize("old_returns", [False, True])
async def test_a_rebase_that_was_begun_is_ended_at_the_next_start(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog, *, old_returns: bool
) -> None:
    async with machine.manager(rebase_conflicts="drop") as manager:
        await machine.make_session(manager)
    os.link(machine.image, machine.directory / "kept")
    machine.pack(NEW)
    with monkeypatch.context() as patch:

        def fail(_: object) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(rebase, "sync_file_system", fail)
        async with machine.manager() as manager:
            session = manager.get("s")
            source = manager.source_of(session)
            with pytest.raises(Failed, match="Could not rebase session s: Input/output error"):
                await session.rebase(source, started_by=Uid(UID)).wait()
            assert session.state is SessionState.FAILED
            with pytest.raises(ImageUnavailable):
                await session.reset(started_by=Uid(UID)).wait()
    if old_returns:
        # Its layers are no more those that were over it.
        machine.image.rename(machine.directory / "new")
        (machine.directory / "kept").rename(machine.image)
    async with machine.manager() as manager:
        session = manager.get("s")
        assert session.state is SessionState.ACTIVE
        assert not session.record.rebasing
        machine.assert_in_order(session)
        # What was found first is told still.
        assert await listed(manager, session) == [is_shadowed("dropped")]


async def test_a_list_whose_reader_has_gone_ends(machine: Machine) -> None:
    async with machine.manager() as manager:
        await machine.make_session(manager)
        reader, writer = os.pipe()
        os.close(reader)
        await manager.get("s").differences.shadowed(manager.source_of(manager.get("s")), writer)
        os.close(writer)


async def test_a_list_that_nobody_reads_is_given_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with machine.manager() as manager:
        await machine.make_session(manager)
        session = manager.get("s")
        stored = machine.directory / "state/sessions/s/shadowed.jsonl"
        stored.write_bytes(b'{"path": "/etc/a"}\n' * 10_000)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with pytest.raises(Failed, match="nothing was read of it"):
            await session.differences.shadowed(manager.source_of(session), writer)
        os.close(reader)
        os.close(writer)
