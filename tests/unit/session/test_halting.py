"""Programs stand still while a snapshot is made, and go on whatever happens then."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from sessiond import cgroups
from sessiond.config import Config
from sessiond.errors import Failed
from sessiond.session import halting
from sessiond.session.manager import Manager, Session
from sessiond.session.memory import MemoryMount
from sessiond.session.model import Manner, Stack
from tests.support.cgroups import own_cgroup
from tests.support.sessions import UID, USER, World

ExpectLog = Callable[[str], None]
CGROUP = f"user.slice/user-{UID}.slice"


class Hierarchy:
    """Files like those of one cgroup, and what becomes of its programs at each swap."""

    def __init__(self, directory: Path, runtime: Path) -> None:
        self.directory = directory
        self.notes = runtime / "halted"
        self.seen: list[tuple[bool, list[str]]] = []
        """For each exchange of layers, whether programs were stopped, and what notes there were."""

    def make(self, *, stopped: bool = False) -> None:
        (self.directory / CGROUP).mkdir(parents=True)
        self.control.write_text("1\n" if stopped else "0\n")
        self.control.with_name("cgroup.events").write_text("populated 1\n")

    @property
    def control(self) -> Path:
        return self.directory / CGROUP / "cgroup.freeze"

    @property
    def is_stopped(self) -> bool:
        return self.control.exists() and self.control.read_text() == "1\n"

    def look(self) -> None:
        self.seen.append((self.is_stopped, [note.name for note in self.notes.glob("*")]))

    def assert_gone_on(self) -> None:
        assert not self.is_stopped
        assert list(self.notes.glob("*")) == []


@pytest.fixture
def hierarchy(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hierarchy:
    hierarchy = Hierarchy(tmp_path / "cgroups", world.runtime)
    hierarchy.directory.mkdir()

    class LookingMount(MemoryMount):
        async def swap(
            self, stack: Stack, *, moved: bool = False, retained: bool = False
        ) -> tuple[str, ...]:
            inexact = await super().swap(stack, moved=moved, retained=retained)
            hierarchy.look()
            return inexact

    world.mounter.kind = LookingMount
    monkeypatch.setattr(halting, "_mounted_hierarchy", lambda: hierarchy.directory)
    monkeypatch.setattr(cgroups, "LONGEST", 600.0)
    return hierarchy


def config(world: World, cgroup: str = "user.slice/user-{uid}.slice") -> Config:
    values = world.config().model_dump(mode="json", exclude_unset=True)
    values["profile"]["volatile"]["cgroup"] = cgroup
    return Config.model_validate(values)


async def create(manager: Manager) -> Session:
    return await manager.create(USER, "volatile", session_id="s")


async def test_it_stops_them_and_lets_them_go_on(world: World, hierarchy: Hierarchy) -> None:
    hierarchy.make()
    async with world.manager(config(world)) as manager:
        session = await create(manager)
        await session.snapshots.make("one")
        assert hierarchy.seen == [(True, ["s"])]
        hierarchy.assert_gone_on()
        await session.snapshots.make("two")
        assert hierarchy.seen[1:] == [(True, ["s"])]
        hierarchy.assert_gone_on()


@pytest.mark.parametrize("operation", ["reset", "restore"])
async def test_also_before_what_a_job_replaces_is_kept(
    world: World, hierarchy: Hierarchy, operation: str
) -> None:
    """Once, and before changes are held."""
    hierarchy.make()
    async with world.manager(config(world)) as manager:
        session = await create(manager)
        await session.snapshots.make("one")
        await world.mount("s").write("new", b"")
        before = len(hierarchy.seen)
        if operation == "reset":
            manner = Manner(snapshot=True)
            await session.reset(started_by=UID, manner=manner).wait()
        else:
            await session.restore("one", started_by=UID).wait()
        assert hierarchy.seen[before] == (True, ["s"])
        assert world.mount("s").halted_times == 2
        hierarchy.assert_gone_on()


async def test_a_reset_stops_nobody(world: World, hierarchy: Hierarchy) -> None:
    hierarchy.make()
    async with world.manager(config(world)) as manager:
        session = await create(manager)
        await session.reset(started_by=UID).wait()
        assert hierarchy.seen == [(False, [])]


async def test_what_others_have_stopped_stays_so(world: World, hierarchy: Hierarchy) -> None:
    hierarchy.make(stopped=True)
    async with world.manager(config(world)) as manager:
        await (await create(manager)).snapshots.make("one")
        assert hierarchy.seen == [(True, [])]
        assert hierarchy.is_stopped


async def test_sessions_of_one_user_stop_them_in_turn(world: World, hierarchy: Hierarchy) -> None:
    hierarchy.make()
    async with world.manager(config(world)) as manager:
        sessions = [await manager.create(USER, "volatile") for _ in range(2)]
        async with trio.open_nursery() as nursery:
            for session in sessions:
                nursery.start_soon(session.snapshots.make, "one")
        assert sorted(hierarchy.seen) == [(True, [one.id]) for one in sessions]
        hierarchy.assert_gone_on()


@pytest.mark.parametrize("call", ["halt", "swap"])
async def test_they_go_on_when_the_mount_fails(
    world: World, hierarchy: Hierarchy, call: str, expect_log: ExpectLog
) -> None:
    hierarchy.make()
    async with world.manager(config(world)) as manager:
        session = await create(manager)
        world.mounter.injected[call] = [Failed("It is gone.")]
        if call == "halt":
            await session.snapshots.make("one")
            expect_log("Programs of session s are not stopped for a snapshot: It is gone.")
        else:
            with pytest.raises(Failed, match="It is gone"):
                await session.snapshots.make("one")
        hierarchy.assert_gone_on()


async def test_nobody_is_stopped_where_that_cannot_be_noted(
    world: World, hierarchy: Hierarchy, expect_log: ExpectLog
) -> None:
    """Or a death now would leave them so."""
    hierarchy.make()
    async with world.manager(config(world)) as manager:
        session = await create(manager)
        hierarchy.notes.write_bytes(b"in the way")
        await session.snapshots.make("one")
        assert world.mount("s").halted_times == 0
        expect_log("Could not note that the programs of session s stand still")


async def test_a_cgroup_that_is_not_there(world: World, hierarchy: Hierarchy) -> None:
    """Its user has not logged in."""
    async with world.manager(config(world)) as manager:
        await (await create(manager)).snapshots.make("one")
        assert world.mount("s").halted_times == 0


async def test_a_cgroup_elsewhere(
    world: World, hierarchy: Hierarchy, expect_log: ExpectLog
) -> None:
    hierarchy.make()
    (hierarchy.directory / "link").symlink_to(hierarchy.directory / CGROUP)
    async with world.manager(config(world, "link")) as manager:
        await (await create(manager)).snapshots.make("one")
        assert world.mount("s").halted_times == 0
        expect_log("are not stopped for a snapshot: [Errno 40]")


async def test_where_there_are_no_cgroups(
    world: World, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    monkeypatch.setattr(halting, "_mounted_hierarchy", lambda: None)
    async with world.manager(config(world)) as manager:
        await (await create(manager)).snapshots.make("one")
        expect_log("No hierarchy of cgroups of version 2 is mounted here")


async def test_the_next_manager_lets_them_go_on(
    world: World, hierarchy: Hierarchy, expect_log: ExpectLog
) -> None:
    hierarchy.make(stopped=True)
    hierarchy.notes.mkdir(parents=True)
    (hierarchy.notes / "s").write_text(CGROUP)
    (hierarchy.notes / "gone").write_text("user.slice/user-77.slice")
    (hierarchy.notes / "begun").write_text("")
    async with world.manager(config(world)):
        hierarchy.assert_gone_on()
        expect_log("another sessiond had stopped them")


async def test_a_note_that_cannot_be_obeyed_yet_stays(
    world: World, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    hierarchy.notes.mkdir(parents=True)
    (hierarchy.notes / "s").write_text(CGROUP)
    monkeypatch.setattr(halting, "_mounted_hierarchy", lambda: None)
    async with world.manager(config(world)):
        assert os.listdir(hierarchy.notes) == ["s"]
        expect_log("may still stand still")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="to make a cgroup takes root")
async def test_sessiond_does_not_stop_itself(
    world: World, hierarchy: Hierarchy, expect_log: ExpectLog
) -> None:
    with own_cgroup() as cgroup:
        worker = cgroup.start("print(flush=True)\nimport signal\nsignal.pause()")
        async with world.manager(config(world, cgroup.name)) as manager:
            session = await create(manager)
            world.mount("s").worker = worker.pid
            await session.snapshots.make("one")
            assert world.mount("s").halted_times == 0
            expect_log(f"sessiond itself, process {worker.pid}, is in cgroup {cgroup.name}")
