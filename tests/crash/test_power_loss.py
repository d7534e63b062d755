"""Each operation on a persistent upper, and the power gone at any moment of it."""

from __future__ import annotations

import os
import random
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from sessiond.overlay.overlay import Overlay
from tests.crash.layers import Bench, assert_name_by_name, assert_one_of
from tests.crash.operations import Operation, operations
from tests.crash.selection import SOAK
from tests.support.core_views import find
from tests.support.disks import FILE_SYSTEMS, make_image
from tests.support.mounts import Layers
from tests.support.recording_disk import RecordingDisk, mounted_image, torn
from tests.support.trees import Snapshot

BY_NAME = {operation.name: operation for operation in operations() if not operation.in_place}
OPERATIONS_AT_A_TIME = 30


@dataclass
class Run:
    """An operation on an upper of its own, on a disk that is recorded."""

    operation: Operation
    layers: Layers
    synced: bool
    """What the operation changed is synchronised when it is done; else only a directory is."""
    start: int = 0
    end: int = 0
    """Positions on the disk: before, nothing has happened; after, all is durable."""
    after: Snapshot | None = None


class Machine:
    """A disk with layers, on which operations run, and the power is cut."""

    def __init__(self, directory: str, kind: str, chosen: Sequence[Operation]) -> None:
        self._kind = kind
        image = make_image(kind, directory)
        self._mount_point = f"{directory}/disk"
        os.mkdir(self._mount_point)
        os.mkdir(f"{directory}/recorded")
        self.disk = RecordingDisk(image, f"{directory}/recorded")
        with mounted_image(image, self._mount_point):
            self._bench = Bench.make(self._mount_point)
            with self._bench.layers() as layers:
                self.before = self._bench.found_here(layers)
            self.runs = [
                Run(operation, self._bench.make_layers(), synced)
                for operation in chosen
                for synced in (True, False)
            ]

    def run_all(self) -> None:
        """Run all operations on the recorded disk."""
        with self.disk.mounted(self._mount_point):
            for run in self.runs:
                overlay = self._bench.open(run.layers)
                run.start = self.disk.position
                run.operation.run(overlay)
                if run.synced:
                    for path in run.operation.synced:
                        _synchronise(overlay, path)
                    run.end = self.disk.position
                else:
                    _synchronise(overlay, run.operation.synced[-1])
                overlay.close()
            os.sync()
            for run in self.runs:
                run.end = run.end or self.disk.position
                run.after = self._bench.found_here(run.layers)

    def cut_power_at_flushes(self) -> None:
        """Check what is found if the power goes right after any of the flushes."""
        records = self.disk.records()
        flushes = [number for number, record in enumerate(records) if record.is_flush]
        assert len(flushes) > len(self.runs) / 2, "what was synchronised was not flushed"
        done = self.runs[-1].start
        for flush in flushes:
            if records[flush].end <= done or flush == flushes[-1]:
                self._check(records[:flush], records[flush].end)

    def cut_power_anywhere(self, chance: random.Random) -> None:
        """Check what is found if the power goes between two flushes, with any blocks written."""
        records = self.disk.records()
        flush = 0
        for number, record in enumerate(records):
            if record.is_flush:
                self._check(
                    [*records[:flush], *torn(records[flush:number], chance)], records[flush].end
                )
                flush = number

    def _check(self, writes: Sequence[object], position: int) -> None:
        """`position`: what had been recorded up to there is on the disk for sure."""
        with self.disk.after_power_loss(writes, self._mount_point):
            for run in self._near(position):
                found = self._bench.found_here(run.layers, run.operation.spare_whiteout)
                assert run.after is not None
                what = f"{run.operation.name}, power lost at {position}, synced at {run.end}"
                before = run.after if position >= run.end else self.before
                if self._kind == "btrfs":
                    assert_name_by_name(before, run.after, found, what)
                else:
                    assert_one_of(before, run.after, found, what)

    def _near(self, position: int) -> Iterator[Run]:
        """Return what is going on at a position, and what is just durable."""
        started = [run for run in self.runs if run.start <= position]
        yield from started[-3:]


def _synchronise(overlay: Overlay, path: str) -> None:
    node = find(overlay, path)
    if node.is_directory:
        overlay.fsync(node, data_only=False)
    elif stat.S_ISREG(node.kind):
        overlay.open_file(node, write=False)
        overlay.fsync(node, data_only=False)
        overlay.release_file(node)
    else:  # cannot be opened
        overlay.view.stack.sync()


def _cut(directory: str, kind: str, chosen: Sequence[Operation]) -> Machine:
    os.mkdir(directory)
    machine = Machine(directory, kind, chosen)
    machine.run_all()
    machine.cut_power_at_flushes()
    return machine


@pytest.mark.parametrize(
    "chosen",
    [
        ("chmod plain", "truncate to 5 plain", "link hard to free", "unlink lower/a"),
        ("create a file of 9 at gone", "rename lower to emptied", "exchange lower/a to newdir"),
    ],
    ids=["files", "directories"],
)
def test_power_loss(scratch: str, chosen: Sequence[str]) -> None:
    _cut(tempfile.mkdtemp(dir=scratch) + "/ext4", "ext4", [BY_NAME[name] for name in chosen])


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(round(6 * SOAK) or 1))
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_power_loss_in_any_operation(scratch: str, kind: str, number: int) -> None:
    """`number`: which of as many operations as fit on a disk; different ones each time."""
    chance = random.Random(number)
    chosen = chance.sample(list(BY_NAME.values()), OPERATIONS_AT_A_TIME)
    machine = _cut(f"{scratch}/{kind}-{number}", kind, chosen)
    machine.cut_power_anywhere(chance)
