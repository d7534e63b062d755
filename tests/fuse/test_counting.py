"""The count that a worker keeps, with the kernel writing into files by itself; and its limits."""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import trio

from sessiond.control import ChangeCounts
from sessiond.fuse.counting import Counting
from sessiond.fuse.mounter import FuseMount
from sessiond.overlay import syscalls, tally
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.session.model import (
    WHOLE,
    Breakdown,
    ChangeSummary,
    DataPath,
    DirectoryChanges,
    LargeFile,
    Lowers,
    Span,
)
from tests.fuse.conftest import Playground
from tests.unit.overlay.conftest import new_file

pytestmark = pytest.mark.root

MIB = 1 << 20


async def listed(mount: FuseMount) -> ChangeSummary:
    """Count what the full comparison tells."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    await mount.diff(write)
    os.close(write)
    with open(read) as file:
        *lines, _ = map(json.loads, file)
    kinds = Counter(line["kind"] for line in lines)
    added, deleted, renamed = (kinds.pop(kind, 0) for kind in ("added", "deleted", "renamed"))
    files = [LargeFile(line["path"], line["kind"], line["size"]) for line in lines if line["size"]]
    return ChangeSummary(
        added,
        kinds.total(),
        deleted,
        sum(file.size for file in files),
        renamed,
        tuple(sorted(files, key=lambda file: (-file.size, file.path))[:10]),
    )


async def assert_counts(mount: FuseMount, **numbers: int) -> None:
    """What is counted is what is listed, and these numbers."""
    counted = await mount.changes()
    assert counted == await listed(mount)
    assert {name: getattr(counted, name) for name in numbers} == numbers


async def test_files_that_stay_open(playground: Playground) -> None:
    (playground.image / "old").write_bytes(b"before")
    async with playground.mounted(playground.stack()) as mount:
        with (
            open(playground.root / "old", "r+b", buffering=0) as old,
            open(playground.root / "new", "wb", buffering=0) as new,
        ):
            await assert_counts(mount, added=1, bytes=0)
            new.write(b"12345")
            await assert_counts(mount, added=1, bytes=5)
            new.write(b"67")
            old.write(b"B")
            await assert_counts(mount, added=1, changed=1, bytes=13)
            os.pwrite(old.fileno(), b"b", 0)
            os.utime(old.fileno(), ns=(1, (playground.image / "old").stat().st_mtime_ns))
            await assert_counts(mount, added=1, changed=0, bytes=7)
        await assert_counts(mount, added=1, bytes=7)


async def test_files_that_are_opened_again_and_again(playground: Playground) -> None:
    """Also for reading in between, from when a worker might let others write without asking it."""
    path = playground.root / "log"
    async with playground.mounted(playground.stack()) as mount:
        for number in range(1, 5):
            with open(path, "ab") as file:
                file.write(b"x")
            await assert_counts(mount, added=1, bytes=2 * number - 1)
            assert len(path.read_bytes()) == 2 * number - 1
            with open(path, "ab") as file:
                file.write(b"y")
            await assert_counts(mount, added=1, bytes=2 * number)


async def test_the_largest_are_told(playground: Playground) -> None:
    for number in range(8):
        (playground.image / f"old{number}").write_bytes(b"x" * (100 + number))
    async with playground.mounted(playground.stack()) as mount:
        for number in range(8):
            (playground.root / f"new{number}").write_bytes(b"x" * (200 + number))
        (playground.root / "old0").rename(playground.root / "renamed0")
        with open(playground.root / "old7", "ab") as file:
            file.write(b"x" * 50)
        counted = await mount.changes()
        assert counted == await listed(mount)
        assert counted.largest[-2:] == (
            LargeFile("/old7", "contents", 157),
            LargeFile("/renamed0", "renamed", 100),
        )


async def test_where_most_has_changed(playground: Playground) -> None:
    (playground.image / "etc").mkdir()
    (playground.image / "etc/old").write_bytes(bytes(50))
    (playground.image / "etc/gone").write_bytes(bytes(50))
    first = playground.stack()
    breakdown = Breakdown(100, 2)
    async with playground.mounted(first) as mount:
        root = playground.root
        (root / "home/guest/.cache/deep").mkdir(parents=True)
        (root / "home/guest/.cache/deep/page").write_bytes(bytes(1000))
        (root / "home/guest/b\udcff").mkdir()
        (root / "home/guest/b\udcff/letter").write_bytes(bytes(10))
        (root / "etc/gone").unlink()
        (root / "etc/old").rename(root / "home/new")
        counted = (await mount.changes(WHOLE, breakdown)).directories
        assert counted == (
            DirectoryChanges("/", 7, 0, 1, 1, 1060),
            DirectoryChanges("/home", 6, 0, 0, 1, 1060),
            DirectoryChanges("/home/guest", 5, 0, 0, 0, 1010),
            DirectoryChanges("/etc", 0, 0, 1, 0, 0),
        )
        assert (await mount.changes(WHOLE, Breakdown(2, 0))).directories == counted[:1]
        assert (await mount.changes(WHOLE, Breakdown(2, 3))).directories == counted[:2]
        # Not from the count that is kept:
        await mount.swap(playground.stack(first.upper.fs))
        frozen = Lowers((first.upper.fs, playground.image))
        assert (await mount.changes(Span(end=frozen), breakdown)).directories == counted


async def test_files_that_are_mapped_after_they_are_closed(playground: Playground) -> None:
    (playground.image / "file").write_bytes(bytes(4096))
    async with playground.mounted(playground.stack()) as mount:
        with open(playground.root / "file", "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        await assert_counts(mount, changed=0)
        mapped[0] = 1
        mapped.flush()
        await assert_counts(mount, changed=1)
        mapped.close()


async def test_large_files_are_compared_when_the_count_is_asked_for(playground: Playground) -> None:
    (playground.image / "large").write_bytes(bytes(3 * MIB))
    before = (playground.image / "large").stat()
    async with playground.mounted(playground.stack()) as mount:
        with open(playground.root / "large", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        await assert_counts(mount, changed=1, bytes=3 * MIB)
        with open(playground.root / "large", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")
        os.utime(playground.root / "large", ns=(1, before.st_mtime_ns))
        await assert_counts(mount, changed=0, bytes=0)


async def test_layers_that_are_exchanged(playground: Playground) -> None:
    (playground.image / "file").write_bytes(b"before")
    first = playground.stack()
    async with playground.mounted(first) as mount:
        (playground.root / "new").write_bytes(b"12")
        with open(playground.root / "open", "wb", buffering=0) as file:
            await assert_counts(mount, added=2, bytes=2)
            await mount.swap(playground.stack(first.upper.fs))
            file.write(b"345")
            (playground.root / "file").unlink()
            await assert_counts(mount, added=2, deleted=1, bytes=5)
        (playground.root / "new").rename(playground.root / "other")
        (playground.root / "open").unlink()
        await assert_counts(mount, added=1, deleted=1, bytes=2)
        await mount.swap(playground.stack())
        await assert_counts(mount, added=0, deleted=0, bytes=0)


async def test_a_worker_goes_on_counting_for_one_that_has_died(playground: Playground) -> None:
    if playground.data_path is DataPath.PLAIN:
        return
    async with playground.mounted(playground.stack()) as mount:
        with open(playground.root / "file", "wb", buffering=0) as file:
            file.write(b"1")
            await assert_counts(mount, added=1, bytes=1)
            os.kill(mount.worker, signal.SIGKILL)
            await mount.wait_died()
            await mount.recover()
            await assert_counts(mount, added=1, bytes=1)
            file.write(b"2")
            await assert_counts(mount, added=1, bytes=2)


async def test_a_file_that_gets_its_name_while_it_is_open(playground: Playground) -> None:
    if playground.data_path is DataPath.PLAIN:
        return
    async with playground.mounted(playground.stack()) as mount:
        root = os.open(playground.root, os.O_PATH)
        fd = os.open(playground.root, os.O_TMPFILE | os.O_RDWR)
        os.write(fd, b"1")
        await assert_counts(mount, added=0)
        syscalls.link_descriptor(fd, At(root, b"file"))
        await assert_counts(mount, added=1, bytes=1)
        os.write(fd, b"2")
        os.link(playground.root / "file", playground.root / "another")
        await assert_counts(mount, added=2, bytes=4)
        os.write(fd, b"3")
        os.close(fd)
        os.close(root)
        await assert_counts(mount, added=2, bytes=6)


async def test_more_names_than_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally, "_NAMES_LIMIT", 10)
    for name in ("image", "upper", "work"):
        (tmp_path / name).mkdir()
    paths = [os.fsencode(tmp_path / name) for name in ("image", "upper", "work")]
    overlay = Overlay(Stack.open(paths[:1], *paths[1:]))
    counting = Counting(overlay.view, trio.CapacityLimiter(1))
    for number in range(20):
        overlay.release_file(overlay.create_file(overlay.view.root, b"%d" % number, new_file())[0])
        assert await counting.count() == ChangeCounts(added=number + 1)
    for number in range(20):
        overlay.unlink(overlay.view.root, b"%d" % number)
        assert await counting.count() == ChangeCounts(added=19 - number)
    overlay.close()
