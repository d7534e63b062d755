"""What outlives resets, and the power gone at any moment: the session is in RAM, this is on disk.

What a program has synchronised is there, and the directories on the way to it; a commit is there,
whole, from the moment that it is recorded, and not before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sessiond.keep_rules import rule_for
from sessiond.overlay.commit import Commit
from sessiond.overlay.directory import NewObject
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.overlay import Overlay
from sessiond.session import durable
from tests.crash.operations import place
from tests.crash.test_keep_death import RULES, View, make, serve, view, write
from tests.support.core_views import find
from tests.support.disks import FILE_SYSTEMS, make_image
from tests.support.recording_disk import RecordingDisk, mounted_image

KINDS = [
    pytest.param(kind, marks=() if kind == "ext4" else pytest.mark.soak) for kind in FILE_SYSTEMS
]
COMMITTED = b"home/u/work"


class Machine:
    """A volatile session, whose kept layers are on a recorded disk."""

    def __init__(self, scratch: str, kind: str) -> None:
        self.top = make(scratch)
        directory = f"{scratch}/{kind}"
        os.makedirs(f"{directory}/recorded")
        self.state = self.top / "state"
        self.state.mkdir()
        self.disk = RecordingDisk(make_image(kind, directory), f"{directory}/recorded")
        with mounted_image(self.disk.image, str(self.state)):
            for name in ("kept", "kept-work"):
                (self.top / name).rmdir()
                (self.state / name).mkdir()
                (self.top / name).symlink_to(self.state / name)
        self.promised: list[tuple[int, str, bytes | None]] = []
        """What is there from a position on: contents by path, or nothing at it."""

    @contextmanager
    def session(self) -> Iterator[Overlay]:
        with self.disk.mounted(str(self.state)):
            overlay = serve(self.top, *RULES)
            try:
                yield overlay
            finally:
                overlay.close()

    def promise(self, path: str, data: bytes | None) -> None:
        self.promised.append((self.disk.position, f"/{path}", data))

    def save(self, overlay: Overlay, path: str, data: bytes) -> None:
        """Write and synchronise a file, as sync(1) and most editors do."""
        write(overlay, path, data)
        node = find(overlay, path)
        overlay.open_file(node, write=True)
        overlay.fsync(node, data_only=False)
        overlay.release_file(node)
        overlay.fsync(find(overlay, path.rpartition("/")[0]), data_only=False)
        self.promise(path, data)

    def recorded(self) -> bool:
        return (self.state / "committed").exists()

    def after_power_loss(self) -> View:
        """Return what the next session shows."""
        for name in ("upper", "work"):
            shutil.rmtree(self.top / name)
            (self.top / name).mkdir()
        committed = [rule_for(COMMITTED)] if self.recorded() else []
        return view(self.top, *RULES, *committed)


def commit(overlay: Overlay, state: Path) -> None:
    """Do what worker and manager do."""
    assert overlay.view.keep is not None
    Exchange(overlay).make_way(COMMITTED)
    with closing(
        Commit(overlay.view.stack.copy(), overlay.view.keep, [COMMITTED], lambda: False)
    ) as work:
        work.copy()
        work.sync()
        work.publish()
        durable.replace(state / "committed", b"")


@pytest.mark.parametrize("kind", KINDS)
def test_power_loss(scratch: str, kind: str) -> None:
    machine = Machine(scratch, kind)
    with machine.session() as overlay:
        machine.save(overlay, "home/u/docs/first", b"first" * 3000)
        overlay.create(*place(overlay, "home/new"), NewObject(0o040755, 0, 0))
        machine.save(overlay, "home/new/.rc", b"in a directory that the image lacks")
        machine.save(overlay, "home/u/.new", b"as editors save")
        overlay.rename(place(overlay, "home/u/.new"), place(overlay, "home/u/.rc"))
        overlay.fsync(find(overlay, "home/u"), data_only=False)
        machine.promise("home/u/.rc", b"as editors save")
        machine.promised = [one for one in machine.promised if one[1] != "/home/u/.new"]
        overlay.unlink(*place(overlay, "home/u/docs/letter"))
        overlay.fsync(find(overlay, "home/u/docs"), data_only=False)
        machine.promise("home/u/docs/letter", None)
        overlay.create(*place(overlay, "home/u/work"), NewObject(0o040755, 0, 0))
        for number in range(5):
            write(overlay, f"home/u/work/{number}", b"%d" % number * 5000)
        start = machine.disk.position
        commit(overlay, machine.state)
        end = machine.disk.position
        machine.save(overlay, "home/u/docs/last", b"last")
    work = {f"/home/u/work/{number}": b"%d" % number * 5000 for number in range(5)}
    records = machine.disk.records()
    flushes = 0
    for number, record in enumerate(records):
        if not record.is_flush:
            continue
        with machine.disk.after_power_loss(records[:number], str(machine.state)):
            recorded, found = machine.recorded(), machine.after_power_loss()
        what = f"power lost at {record.end}; committed from {start} to {end}"
        for position, path, data in machine.promised:
            if record.end > position:
                assert found.get(path) == data, f"{path}, {what}"
        shown = {path: data for path, data in found.items() if path.startswith("/home/u/work/")}
        assert shown == (work if recorded else {}), what
        assert recorded or record.end <= end, what
        flushes += start < record.end <= end
    assert flushes >= 3  # of the copies, of what publishes them, of the record
