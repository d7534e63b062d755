"""Each operation on a session that is on disk, or gets there, and the power gone meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from sessiond.session.manager import Manager
from sessiond.session.mounts import SystemMounts
from tests.crash import sessions
from tests.crash.lives import LIVES, given, persist, restore, snapshot
from tests.crash.sessions import Files, Life, State
from tests.support.disks import FILE_SYSTEMS, make_image
from tests.support.recording_disk import Record, RecordingDisk, mounted_image
from tests.support.sessions import World

CASES = [
    pytest.param(
        kind,
        life,
        profile,
        id=f"{life.__name__}-{profile}-{kind}",
        marks=() if kind == "ext4" and life in (snapshot, persist) else pytest.mark.soak,
    )
    for kind, life, profile in product(FILE_SYSTEMS, LIVES, ("lasting", "volatile"))
    if (life is persist) == (profile == "volatile")
]
UNSYNCED = "unsynced"
"""What the names of files begin with that nobody has synchronised."""


class Machine:
    """A machine whose persistent sessions are on a recorded disk."""

    def __init__(self, directory: str, kind: str) -> None:
        self._top = Path(directory)
        self._state = self._top / "state"
        self._state.mkdir()
        (self._top / "recorded").mkdir()
        image = make_image(kind, directory)
        self.disk = RecordingDisk(image, f"{directory}/recorded")
        self.layers = 0
        """How many there were when it was looked last."""

    def run(self, before: Life, life: Life) -> tuple[int, int]:
        """Let one manager do `before`, and the next one `life`; return when that was in the log."""
        with mounted_image(self.disk.image, str(self._state)):
            sessions.die(self._top, before)
        with self.disk.mounted(str(self._state)):
            start = self.disk.position
            sessions.die(self._top, life)
            return start, self.disk.position

    def after_power_loss(self, written: Sequence[Record]) -> State:
        """Return what the next manager serves if the disk has got only that."""
        mounts = SystemMounts()
        for target in mounts.mounted_below(self._top / "run"):
            mounts.detach(target)
        shutil.rmtree(self._top / "run", ignore_errors=True)
        with self.disk.after_power_loss(written, str(self._state)):
            found = sessions.recovered(self._top)
            self.layers = len(list(self._state.glob("sessions/*/layers/*")))
            return found


def after_writing(life: Life) -> Life:
    """Return the life in which a program writes before, and does not synchronise it."""

    async def written(world: World, manager: Manager) -> None:
        await world.mount("s").write(UNSYNCED, b"3" * 5000)
        await life(world, manager)

    return written


def without_unsynced(state: State) -> State:
    """Leave out what nobody has promised to keep."""
    return {
        session: replace(
            found,
            files=_synced(found.files),
            snapshots={name: _synced(files) for name, files in found.snapshots.items()},
        )
        for session, found in state.items()
    }


def _synced(files: Files) -> Files:
    return {name: data for name, data in files.items() if not name.startswith(UNSYNCED)}


@pytest.mark.parametrize(("kind", "life", "profile"), CASES)
def test_power_loss(
    scratch: str, monkeypatch: pytest.MonkeyPatch, kind: str, life: Life, profile: str
) -> None:
    monkeypatch.setitem(sessions.LAST_WORDS, f"{UNSYNCED} at last", b"4" * 5000)
    directory = f"{scratch}/{life.__name__}-{kind}"
    os.mkdir(directory)
    machine = Machine(directory, kind)
    start, end = machine.run(given(profile, life), after_writing(life))
    records = machine.disk.records()
    before = machine.after_power_loss([])
    after = machine.after_power_loss(records)
    states = without_unsynced(before), without_unsynced(after)
    for number, record in enumerate(records):
        if record.is_flush and record.end > start:
            found = machine.after_power_loss(records[:number])
            what = f"power lost at {record.end}, done at {end}"
            assert without_unsynced(found) in states, what
            if record.end > end:
                assert without_unsynced(found) == states[1], what
                if life in (snapshot, restore, persist):
                    assert found == after, what
