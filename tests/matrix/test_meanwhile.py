"""Each method while something else is done to the session, over mounts in memory.

What goes on is held: at the writing of the record, which all that changes a session comes to; or,
as people can do it, by a pipe that nobody reads from or writes to.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import trio

from sessiond.bus import names
from sessiond.bus.wire import BusError
from sessiond.session.manager import Manager, Session
from sessiond.session.memory import MemoryMount
from sessiond.session.model import Operation, SessionRecord, SessionState
from sessiond.session.store import Store
from tests.matrix.conftest import MatrixWorld
from tests.matrix.methods import METHODS, Entry, Meanwhile
from tests.matrix.stage import DONE, ERRORS, Outcome, Stage
from tests.support.waiting import BOUND, until

BY_NAME = {str(entry): entry for entry in METHODS}
JOBS = {
    Operation.RESET: BY_NAME["Session.Reset"],
    Operation.RESTORE: BY_NAME["Session.Restore"],
    Operation.PERSIST: BY_NAME["Session.Persist"],
    Operation.REBASE: BY_NAME["Session.Rebase"],
    Operation.COMMIT: BY_NAME["Session.Commit"],
    Operation.MAINTENANCE: BY_NAME["Manager.FinishMaintenance"],
    Operation.EXPORT: BY_NAME["Snapshot.Export"],
    Operation.IMPORT: BY_NAME["Session.Import"],
}
TRANSFERS = (Operation.EXPORT, Operation.IMPORT)
IN_TEST = (Operation.REBASE, Operation.EXPORT, None)
RUNNING = [
    pytest.param(
        entry, operation, id=str(entry), marks=() if operation in IN_TEST else pytest.mark.soak
    )
    for entry, operation in (
        *((entry, operation) for operation, entry in JOBS.items()),
        (BY_NAME["Session.Snapshot"], None),
        (BY_NAME["Session.Close"], None),
    )
]
"""What goes on, and of which kind of job that is."""


class Gate:
    """Where what is done to one session waits."""

    def __init__(self) -> None:
        self._session = ""
        self.reached = threading.Event()
        self._open = threading.Event()

    def shut(self, session: str) -> None:
        """Hold what comes next for that session."""
        self.reached.clear()
        self._open.clear()
        self._session = session

    def open(self) -> None:
        """Let it go on."""
        self._session = ""
        self._open.set()

    def pass_through(self, session: str) -> None:
        """Wait in a thread until it is open."""
        if session == self._session:
            self.reached.set()
            assert self._open.wait(BOUND)


@pytest.fixture
def gate(world: MatrixWorld, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """What writes or removes a record, or synchronises a merged view, comes through it."""
    gate = Gate()
    for name in ("write", "forget"):
        function = getattr(Store, name)

        def passing(store: Store, record: SessionRecord, function: object = function) -> None:
            gate.pass_through(record.id)
            function(store, record)  # type: ignore[operator]

        monkeypatch.setattr(Store, name, passing)

    class Mount(MemoryMount):
        async def sync(self) -> None:
            pass_through = partial(gate.pass_through, self.request.session)
            await trio.to_thread.run_sync(pass_through, abandon_on_cancel=True)
            await super().sync()

    world.mounter.kind = Mount
    return gate


class Holding(Stage):
    """A stage whose pipes nobody reads from, or writes to."""

    def archive(self) -> int:
        return self.stuck()

    def drain(self) -> int:
        return self.clogged()


@dataclass
class Running:
    """What goes on."""

    stage: Stage
    entry: Entry
    operation: Operation | None
    job: str = ""
    outcome: Outcome | None = None

    @property
    def number(self) -> str:
        return self.job.rpartition("/")[2]

    async def run(self) -> None:
        if self.operation is None:
            self.outcome = await self.stage.outcome(self.entry)
        else:
            results = await self.stage.call(self.entry)
            self.job = str(results[0])
            self.outcome = await self.stage.result(self.entry, results)


@asynccontextmanager
async def running(
    stage: Stage, gate: Gate, entry: Entry, operation: Operation | None
) -> AsyncIterator[Running]:
    """Have `entry` called, and held until the end of the context."""
    gate.shut(stage.session)
    going_on = Running(stage, entry, operation)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(going_on.run)
        if operation in TRANSFERS:
            await until(lambda: going_on.job)
            gate.open()
        else:
            await until(gate.reached.is_set)
        yield going_on


def expected(entry: Entry, operation: Operation | None) -> Meanwhile:
    """Return what becomes of a call while that goes on."""
    if operation in TRANSFERS and entry.meanwhile is Meanwhile.REFUSED:
        return Meanwhile.AT_ONCE  # these hold nobody up
    if operation is Operation.MAINTENANCE and entry.name in ("CreateSession", "BeginMaintenance"):
        return Meanwhile.REFUSED
    return entry.meanwhile


async def tried(
    world: MatrixWorld,
    manager: Manager,
    stage: Stage,
    gate: Gate,
    entry: Entry,
    doing: Entry,
    operation: Operation | None,
) -> str:
    """Call `entry` while `doing` goes on; return what is not as it should be."""
    maintained = entry.maintenance or doing.maintenance
    await world.session(manager, stage, entry, maintained=maintained, profile="kept-packed")
    session = manager.get(stage.session)
    if operation is Operation.EXPORT:
        await session.snapshots.delete(stage.snapshot)
        await world.mount(stage.session).write("large", bytes(3 << 20))
        await session.snapshots.make(stage.snapshot)
    if operation is Operation.REBASE:
        world.pack(int(world.packed.stat().st_mtime_ns) % 1_000_000_000)
    holding = Holding(stage.connection, stage.session)
    async with running(holding, gate, doing, operation) as going_on:
        stage.job = going_on.job or stage.job
        said = await met(stage, gate, entry, session, going_on)
        await release(stage, gate, going_on)
    holding.close()
    assert going_on.outcome is not None
    if going_on.outcome[0] not in (DONE, "Cancelled", "NoSuchSession"):
        said += f"; {doing} fails: {going_on.outcome}"
    return said


async def met(stage: Stage, gate: Gate, entry: Entry, session: Session, going_on: Running) -> str:
    """Call `entry`; return what is not as it should be."""
    if going_on.entry.closes and going_on.operation is None:
        return told(entry, entry.closing, await stage.outcome(entry))
    match expected(entry, going_on.operation):
        case Meanwhile.REFUSED:
            return await refused(stage, entry, going_on)
        case Meanwhile.AT_ONCE:
            return await carried_out(stage, gate, entry, going_on)
        case Meanwhile.ENDS_IT:
            return await ended_for(stage, gate, entry, session)


def told(entry: Entry, wanted: str, found: Outcome) -> str:
    """Return what is not as it should be, in words."""
    assert found[0] in {DONE, *ERRORS}, found
    return "" if found[0] == wanted else f"{entry}: {wanted} expected, found {found}"


async def refused(stage: Stage, entry: Entry, going_on: Running) -> str:
    found = await stage.outcome(entry)
    if going_on.job and entry.name not in ("CreateSession", "BeginMaintenance"):
        for word in (f"job {going_on.number}", f"a {going_on.operation}", "uid 0"):
            if word not in found[1]:
                return f"{entry} does not tell {word!r}: {found}"
    return told(entry, "Busy", found)


async def carried_out(stage: Stage, gate: Gate, entry: Entry, going_on: Running) -> str:
    """Call what is answered before what goes on has ended."""
    operation, wanted = going_on.operation, DONE
    if operation is Operation.REBASE and entry.harmless:
        wanted = entry.unmounted  # which the session is meanwhile
    if (operation, entry.name) == (Operation.PERSIST, "Import"):
        wanted = "Failed"  # its layer is not where the session is, in the end
    try:
        results = await stage.call(entry)
    except BusError as error:
        return told(entry, wanted, (error.name.rpartition(".")[2], error.text))
    if operation not in TRANSFERS:
        await release(stage, gate, going_on)
    return told(entry, wanted, await stage.result(entry, results))


async def ended_for(stage: Stage, gate: Gate, entry: Entry, session: Session) -> str:
    """Call what waits for the end of what goes on, which it asks for."""
    found: list[Outcome] = []

    async def end() -> None:
        found.append(await stage.outcome(entry))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await until(lambda: session.state is SessionState.CLOSING)
        gate.open()
    return told(entry, DONE, found[0])


async def release(stage: Stage, gate: Gate, going_on: Running) -> None:
    """Let what goes on come to an end; what would take longer is cancelled."""
    if going_on.operation in (*TRANSFERS, Operation.MAINTENANCE):
        await stage.connection.call(names.BUS, going_on.job, names.JOB, "Cancel", "")
    gate.open()


@pytest.mark.parametrize(("doing", "operation"), RUNNING)
async def test_what_is_asked_for_meanwhile(
    world: MatrixWorld,
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
    doing: Entry,
    operation: Operation | None,
) -> None:
    wrong = []
    async with world.served() as (manager, connection):
        for entry in METHODS:
            maintained = entry.maintenance or doing.maintenance
            if maintained and (entry.keeps or doing.keeps):
                continue
            stage = Stage(connection, "maintenance" if maintained else "s")
            said = await tried(world, manager, stage, gate, entry, doing, operation)
            if said:
                wrong.append(said)
            elif entry.closes and expected(entry, operation) is not Meanwhile.REFUSED:
                await until(lambda: stage.session not in manager.sessions)  # noqa: B023
            if stage.session in manager.sessions:
                await manager.get(stage.session).turn.become_idle()
                assert await stage.outcome(BY_NAME["Session.Reset"]) == (DONE, ""), str(entry)
                assert os.listdir(world.mount(stage.session).stack.upper.fs) == [], str(entry)
            stage.close()
            for session in tuple(manager.sessions):
                await manager.close(session)
    assert not wrong, "\n".join(wrong)
    assert [one for one in caplog.records if one.exc_info] == []
    world.assert_nothing_left()
