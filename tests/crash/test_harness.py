"""What the other tests here rely on: processes die where they should, and disks remember."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import threading
from pathlib import Path

import pytest

from tests.support import fault_points
from tests.support.disks import make_image
from tests.support.recording_disk import Record, RecordingDisk, torn

_SYS_OPENAT2 = 437


def test_a_process_dies_before_each_change(tmp_path: Path) -> None:
    def change(directory: Path) -> None:
        (directory / "a").mkdir()
        (directory / "a").rename(directory / "b")
        assert os.listdir(directory) == ["b"]
        (directory / "b").rmdir()

    assert fault_points.run(change, lambda: tmp_path).calls == ("mkdir", "rename", "rmdir")
    states = []
    for point in range(4):
        lived = fault_points.run(change, lambda: tmp_path, die_at=point)
        states.append(os.listdir(tmp_path))
        assert lived.died == (point < 3)
        for path in tmp_path.iterdir():
            path.rmdir()
    assert states == [[], ["a"], ["b"], []]


def test_preparing_has_no_fault_points(tmp_path: Path) -> None:
    lived = fault_points.run(lambda _: None, lambda: (tmp_path / "a").mkdir())
    assert lived.calls == ()
    assert (tmp_path / "a").is_dir()


def test_changes_of_other_threads_count(tmp_path: Path) -> None:
    def in_thread(directory: Path) -> None:
        thread = threading.Thread(target=(directory / "a").mkdir)
        thread.start()
        thread.join()

    assert fault_points.run(in_thread, lambda: tmp_path).calls == ("mkdir",)
    (tmp_path / "a").rmdir()
    assert fault_points.run(in_thread, lambda: tmp_path, die_at=0).died
    assert not (tmp_path / "a").exists()


def test_what_is_written_into_no_file_changes_nothing() -> None:
    reader, writer = os.pipe()
    assert fault_points.run(lambda _: os.write(writer, b"x"), lambda: None).calls == ()
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)


def test_flags_tell_whether_opening_changes_something(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None)
    path = os.fsencode(tmp_path / "new")

    def openat2(flags: int) -> None:
        how = struct.pack("QQQ", flags, 0o600 if flags & os.O_CREAT else 0, 0)
        assert libc.syscall(_SYS_OPENAT2, -100, path, how, len(how)) >= 0

    create = os.O_CREAT | os.O_RDWR
    assert fault_points.run(openat2, lambda: create).calls == ("openat2",)
    assert fault_points.run(openat2, lambda: os.O_RDONLY).calls == ()
    for flags, calls in ((os.O_RDWR, ()), (os.O_TRUNC | os.O_RDWR, ("openat",))):
        opened = fault_points.run(lambda flags: os.open(path, flags), lambda flags=flags: flags)
        assert opened.calls == calls
    anonymous = os.O_TMPFILE | os.O_RDWR
    assert fault_points.run(lambda _: os.open(tmp_path, anonymous), lambda: None).calls


def test_what_raises_in_the_process_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="the action failed"):
        fault_points.run(lambda _: os.rmdir("/proc/self"), lambda: None)


def test_a_disk_has_what_was_flushed(scratch: str) -> None:
    directory, mount_point = f"{scratch}/harness", f"{scratch}/harness/mounted"
    os.makedirs(mount_point)
    os.mkdir(f"{directory}/recorded")
    disk = RecordingDisk(make_image("ext4", directory), f"{directory}/recorded")
    with disk.mounted(mount_point):
        Path(mount_point, "first").write_bytes(b"1")
        os.sync()
        middle = disk.position
        Path(mount_point, "second").write_bytes(b"2")
    names = []
    for writes in (
        [],
        [record for record in disk.records() if record.end <= middle],
        disk.records(),
    ):
        with disk.after_power_loss(writes, mount_point):
            names.append(set(os.listdir(mount_point)) - {"lost+found"})
    assert names == [set(), {"first"}, {"first", "second"}]


def test_any_sectors_may_get_to_the_disk() -> None:
    write = Record(0, 8192, b"\0" * 4096 + b"\1" * 4096 + b"\2" * 4096)
    seen = {
        tuple((record.offset, record.data[:1]) for record in torn([write], random.Random(seed)))
        for seed in range(1000)
    }
    sectors = [(8192, b"\0"), (12288, b"\1"), (16384, b"\2")]
    assert seen == {
        tuple(sector for number, sector in enumerate(sectors) if chosen >> number & 1)
        for chosen in range(8)
    }
