"""Layers that are exchanged under writers on a disk whose power goes."""

from __future__ import annotations

import os

import pytest

from sessiond.overlay.exchange import Exchange
from sessiond.overlay.overlay import Overlay
from tests.crash.layers import Bench, assert_name_by_name
from tests.crash.writers import WRITTEN, Writers, stack_of, view_of
from tests.support import core_views, trees
from tests.support.core_views import find
from tests.support.disks import FILE_SYSTEMS, make_image
from tests.support.recording_disk import RecordingDisk, mounted_image

KINDS = [
    pytest.param(kind, marks=() if kind == "ext4" else pytest.mark.soak) for kind in FILE_SYSTEMS
]
WRITTEN_FILES = ("new", "copied", "pair", "indexed")


class Disk:
    """A recorded disk, mounted at `mount_point`."""

    def __init__(self, directory: str, kind: str) -> None:
        self.mount_point = f"{directory}/disk"
        os.makedirs(self.mount_point)
        os.mkdir(f"{directory}/recorded")
        self.recording = RecordingDisk(make_image(kind, directory), f"{directory}/recorded")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_synchronised_of_kept_contents(scratch: str, kind: str) -> None:
    disk = Disk(f"{scratch}/kept-{kind}", kind)
    bench = Bench.make(scratch)
    volatile = bench.make_layers()
    with mounted_image(disk.recording.image, disk.mount_point):
        moved = bench.copy(volatile, disk.mount_point)
    done: list[int] = []
    with disk.recording.mounted(disk.mount_point):
        programs = Writers()
        overlay = Overlay(stack_of(volatile, bench), programs)
        files = {path: programs.open(overlay, path) for path in WRITTEN_FILES}
        Exchange(overlay).swap(stack_of(moved, bench), moved=True)
        for version in (1, 2):
            for path, file in files.items():
                os.pwrite(file, WRITTEN * 1000 * version, 0)
                _synchronise(overlay, path)
            done.append(disk.recording.position)
        overlay.close()
    sizes = [len(WRITTEN) * 1000 * version for version in (1, 2)]
    records = disk.recording.records()
    for number, record in enumerate(records):
        if not record.is_flush:
            continue
        with disk.recording.after_power_loss(records[:number], disk.mount_point):
            found = view_of(stack_of(moved, bench), bench)
        for path in WRITTEN_FILES:
            versions = sum(record.end > position for position in done)
            size = found[path.encode()].size
            assert size >= (0, *sizes)[versions], f"{path}, power lost at {record.end}"
            if size in sizes:
                content = trees.digest_of(WRITTEN * (size // len(WRITTEN)))
                assert found[path.encode()].digest == content, f"{path}, lost at {record.end}"


def _synchronise(overlay: Overlay, path: str) -> None:
    """As the worker does at fsync(2)."""
    node = find(overlay, path)
    overlay.pending.renew(node)
    file = overlay.open_storage(node)
    os.fsync(file)
    os.close(file)


@pytest.mark.parametrize("kind", KINDS)
def test_snapshot(scratch: str, kind: str) -> None:
    disk = Disk(f"{scratch}/snapshot-{kind}", kind)
    with mounted_image(disk.recording.image, disk.mount_point):
        bench = Bench.make(disk.mount_point)
        old = bench.make_layers()
        new, restored = bench.make_layers(empty=True), bench.make_layers(empty=True)
    with disk.recording.mounted(disk.mount_point):
        programs = Writers()
        overlay = Overlay(stack_of(old, bench), programs)
        files = [programs.open(overlay, path) for path in WRITTEN_FILES]
        before = core_views.snapshot(overlay, recent_ns=bench.start_ns)
        start = disk.recording.position
        Exchange(overlay).swap(stack_of(new, bench, old))
        overlay.view.stack.sync()
        end = disk.recording.position
        for file in files:
            os.pwrite(file, WRITTEN, 0)
        os.sync()
        overlay.close()
        for file in files:
            os.close(file)
    records = disk.recording.records()
    for number, record in enumerate(records):
        if record.is_flush and record.end >= start:
            upper = new if record.end <= end else restored
            with disk.recording.after_power_loss(records[:number], disk.mount_point):
                found = view_of(stack_of(upper, bench, old), bench)
            assert_name_by_name(before, before, found, f"lost at {record.end}, done at {end}")
