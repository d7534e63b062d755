"""Each method of the D-Bus interfaces where no bytes, or no inodes, are left."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sessiond.bus import service
from sessiond.bus.connection import Connection, connect
from sessiond.bus.transport import ADDRESS_VARIABLE
from sessiond.session.check import Found, Report
from sessiond.session.check_store import Scope, check_store
from sessiond.session.manager import Manager, Session
from sessiond.session.model import SessionState
from tests.matrix.methods import METHODS, Entry, Full
from tests.matrix.stage import DONE, ERRORS, Stage
from tests.space.conftest import Machine, fill, reset, restore, settled
from tests.support.bus import start_private_bus
from tests.support.waiting import until

IN_TEST = {(Full.UPPER, "inodes"), (Full.DISK, "bytes")}
CASES = [
    pytest.param(
        place,
        what,
        id=f"{place.name.lower()}-{what}",
        marks=() if (place, what) in IN_TEST else pytest.mark.soak,
    )
    for place in Full
    for what in ("bytes", "inodes")
]


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bus of one's own, which is the system's for this process."""
    with start_private_bus(tmp_path) as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        yield


class Place:
    """A machine on which something can be full."""

    def __init__(self, machine: Machine, full: Full) -> None:
        self.machine = machine
        self.full = full
        self.profile = "lasting" if full is Full.DISK else "volatile"
        if full is Full.RUN:
            machine.mount_run()
        if full in (Full.STATE, Full.DISK):
            machine.mount_disk("ext4", "-N", "256", "-m", "0", size="16M")
        machine.state.mkdir(exist_ok=True)
        packed = machine.state / "image.squashfs"
        make = ["mksquashfs", machine.image, packed, "-quiet", "-no-progress"]
        subprocess.run(make, check=True, capture_output=True)
        machine.profiles["other"] = dict(machine.profiles[self.profile])
        machine.profiles[self.profile]["keep"] = []
        machine.profiles["packed"] = {"image": str(packed)}

    @property
    def _others(self) -> Path:
        base = self.machine.runtime if self.full is Full.RUN else self.machine.state
        return base / "someone's"

    @asynccontextmanager
    async def served(self) -> AsyncIterator[tuple[Manager, Connection]]:
        """A manager, and a connection of root's to the bus that it is on."""
        async with self.machine.manager() as manager, trio.open_nursery() as nursery:
            await nursery.start(service.serve, manager)
            async with connect() as connection:
                yield manager, connection
            nursery.cancel_scope.cancel()

    def fill(self, session: Session, what: str) -> None:
        """Leave none of that."""
        if self.full is Full.UPPER:
            fill(session.mount_point, what)
        else:
            self._others.mkdir()
            fill(self._others, what)

    def make_room(self) -> None:
        """Undo it, unless it was in a session that there is no more."""
        shutil.rmtree(self._others, ignore_errors=True)

    async def assert_in_order(self, stage: Stage, manager: Manager) -> None:
        """The session works, and has lost nothing."""
        session = manager.get(stage.session)
        root = session.mount_point
        assert session.state is SessionState.ACTIVE, session.failure
        await reset(session)
        await settled(session)
        committed = {path.removeprefix("/") for path in session.keep}
        assert names(root) - committed == names(self.machine.image)
        for name in tuple(session.snapshots):
            await restore(session, name)
            kept = root / "kept"
            assert name == "imported" or kept.read_bytes() == b"kept", name
        # What fills it may be in a snapshot.
        await reset(session)
        for name in tuple(session.snapshots):
            await session.snapshots.delete(name)
        await settled(session)
        (root / "file0").write_bytes(b"written")
        (root / "new").mkdir()
        found: list[Found] = []
        scope = Scope(self.machine.state, self.machine.runtime)
        await check_store(scope, Report(found.append))
        assert [one for one in found if one.left] == []


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(("full", "what"), CASES)
async def test_each_method(
    machine: Machine, bus: None, caplog: pytest.LogCaptureFixture, full: Full, what: str
) -> None:
    place = Place(machine, full)
    wrong = []
    async with place.served() as (manager, connection):
        for entry in METHODS:
            if entry.maintenance and full is Full.UPPER:
                continue  # its session is on the disk
            stage = Stage(connection, "maintenance" if entry.maintenance else "s")
            outcome, said = await tried(place, manager, stage, entry, what)
            assert outcome in {DONE, *ERRORS}, said
            wanted = entry.full.get((full, what), DONE)
            if outcome != wanted:
                wrong.append(f"{entry}: {wanted} expected, found {outcome}: {said}")
            stage.close()
            for session in tuple(manager.sessions):
                await manager.close(session)
    assert not wrong, "\n".join(wrong)
    assert [one for one in caplog.records if one.exc_info] == []
    for base in (machine.runtime, machine.state):
        assert os.listdir(base / "sessions") == []


async def tried(
    place: Place, manager: Manager, stage: Stage, entry: Entry, what: str
) -> tuple[str, str]:
    """Call it with something full; return what came of it."""
    if entry.maintenance:
        session = await manager.begin_maintenance(
            "packed", "", session_id=stage.session, started_by=0
        )
    else:
        session = await manager.create("root", place.profile, session_id=stage.session)
    (session.mount_point / "kept").write_bytes(b"kept")
    await session.snapshots.make(stage.snapshot)
    if entry.before is not None:
        assert await stage.outcome(entry.before) == (DONE, "")
    await session.turn.become_idle()
    (session.mount_point / "mine").write_bytes(b"mine")
    place.fill(session, what)
    outcome = await stage.outcome(entry)
    place.make_room()
    if entry.closes and outcome[0] == DONE:
        await until(lambda: stage.session not in manager.sessions)
    if stage.session in manager.sessions:
        if outcome[0] != DONE or not entry.replaces:
            mine = await trio.to_thread.run_sync((session.mount_point / "mine").read_bytes)
            assert mine == b"mine", entry
        await place.assert_in_order(stage, manager)
    return outcome
