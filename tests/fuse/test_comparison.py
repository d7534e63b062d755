"""The view compared with its image: what is told, and readers that do not read."""

from __future__ import annotations

import itertools
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from sessiond.errors import Failed, SessiondError
from sessiond.fuse import mounter as mounter_module
from sessiond.fuse.mounter import FuseMount, FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.session.model import ChangeSummary, DataPath, LargeFile, Lowers, Span
from tests.fuse.conftest import Playground
from tests.support.waiting import until


@pytest.fixture(scope="module")
def mounter() -> Iterator[FuseMounter]:
    spawner = Spawner.start()
    with tempfile.TemporaryDirectory() as sockets:
        yield FuseMounter(spawner, Path(sockets))
    spawner.close()


@pytest.fixture
def playground(mounter: FuseMounter) -> Iterator[Playground]:
    """Comparisons look at layers, and have nothing to do with how the view is served."""
    with tempfile.TemporaryDirectory() as directory:
        yield Playground(Path(directory), mounter, DataPath.PLAIN)


def pipe() -> tuple[int, int]:
    """A pipe whose writer does not block."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    return read, write


async def test_changes_and_diff(playground: Playground) -> None:
    (playground.image / "deleted").write_text("x")
    (playground.image / "touched").write_text("same")
    (playground.image / "changed").write_text("before")
    (playground.image / "moved").mkdir()
    (playground.image / "moved/inside").write_text("123")
    async with playground.mounted(playground.stack()) as mount:
        root = playground.root
        (root / "deleted").unlink()
        (root / "touched").write_text("same")
        os.utime(root / "touched", ns=(5, (playground.image / "touched").stat().st_mtime_ns))
        (root / "changed").write_text("after!")
        (root / "moved").rename(root / "new")
        (root / "b\udcffd").symlink_to("x")
        assert await mount.changes() == ChangeSummary(
            added=1,
            changed=1,
            deleted=1,
            renamed=1,
            bytes=6,
            largest=(LargeFile("/changed", "contents", 6),),
        )
        read, write = pipe()
        await mount.diff(write)
        os.close(write)
        with open(read) as file:
            *lines, last = map(json.loads, file)
        assert last == {"complete": True}
        assert {(line["path"], line["kind"], line["type"], line["size"]) for line in lines} == {
            ("/deleted", "deleted", "file", 0),
            ("/changed", "contents", "file", 6),
            ("/new", "renamed", "directory", 0),
            ("/b\udcffd", "added", "symlink", 0),
        }


async def test_any_two_states_are_compared(playground: Playground) -> None:
    (playground.image / "file").write_text("image")
    first = playground.stack()
    async with playground.mounted(first) as mount:
        root = playground.root
        (root / "first").touch()
        (root / "file").write_text("first")
        second = playground.stack(first.upper.fs)
        await mount.swap(second)
        (root / "first").unlink()
        third = playground.stack(second.upper.fs, first.upper.fs)
        await mount.swap(third)
        (root / "file").write_text("image")
        os.utime(root / "file", ns=(5, (playground.image / "file").stat().st_mtime_ns))
        one, two = (Lowers(stack.lowers) for stack in (second, third))

        async def counted(span: Span) -> tuple[int, int, int]:
            summary = await mount.changes(span)
            return summary.added, summary.changed, summary.deleted

        assert await counted(Span(end=one)) == (1, 1, 0)
        assert await counted(Span(end=two)) == (0, 1, 0)
        assert await counted(Span(one, two)) == (0, 0, 1)
        assert await counted(Span(two, one)) == (1, 0, 0)
        assert await counted(Span(one)) == (0, 1, 1)
        assert await counted(Span()) == (0, 0, 0)
        with pytest.raises(Failed, match="lower directory does not exist"):
            await mount.changes(Span(Lowers((playground.image / "gone",))))
        read, write = pipe()
        await mount.diff(write, Span(one, two))
        os.close(write)
        with open(read) as file:
            change, last = map(json.loads, file)
        assert (change["path"], change["kind"], last) == ("/first", "deleted", {"complete": True})


@asynccontextmanager
async def listing(mount: FuseMount, count: int) -> AsyncIterator[Callable[[], list[SessiondError]]]:
    """`count` lists that are not read, from when the worker writes; yields how they have failed."""
    failures: list[SessiondError] = []

    async def write_list(target: int) -> None:
        try:
            await mount.diff(target)
        except SessiondError as error:
            failures.append(error)

    pipes = [pipe() for _ in range(count)]
    try:
        async with trio.open_nursery() as nursery:
            for read, write in pipes:
                nursery.start_soon(write_list, write)
                await trio.lowlevel.wait_readable(read)
            yield lambda: failures
            nursery.cancel_scope.cancel()
    finally:
        for descriptor in itertools.chain(*pipes):
            os.close(descriptor)


@pytest.fixture
async def changed(playground: Playground) -> AsyncIterator[FuseMount]:
    """A mount that differs from its image by more than a pipe holds."""
    async with playground.mounted(playground.stack()) as mount:
        for number in range(1000):
            (playground.root / f"a-rather-long-name-to-fill-the-pipe-{number}").touch()
        yield mount


async def test_readers_that_never_read_keep_nobody_waiting(
    playground: Playground, changed: FuseMount
) -> None:
    """Not even when there are so many that the worker has no thread left to compare in."""
    async with listing(changed, 15):
        assert (await changed.changes()).added == 1000
        async with listing(changed, 1) as failures, trio.open_nursery() as nursery:

            async def count() -> None:
                with pytest.raises(Failed, match="ended while it was at work"):
                    await changed.changes()

            nursery.start_soon(count)
            await trio.testing.wait_all_tasks_blocked()
            await changed.swap(playground.stack())
            (playground.root / "file").touch()
            await changed.unmount()
            await until(failures)


async def test_a_list_that_nobody_reads_is_given_up(
    playground: Playground, changed: FuseMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounter_module, "READER_PATIENCE", 0.0)
    read, write = pipe()
    with pytest.raises(Failed, match="nothing of the list of changes was read for 0 seconds"):
        await changed.diff(write)
    os.close(write)
    with open(read) as lines:  # which ends: the worker has closed its end, too
        assert "complete" not in lines.read()


async def test_a_list_goes_on_as_long_as_it_is_read(
    playground: Playground, changed: FuseMount
) -> None:
    read, write = pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(changed.diff, write)
        await trio.lowlevel.wait_readable(read)
        os.close(write)
        listed = b""
        async with trio.lowlevel.FdStream(read) as stream:
            async for part in stream:
                listed += part
    *lines, last = map(json.loads, listed.splitlines())
    assert (len(lines), last) == (1000, {"complete": True})


async def test_a_reader_that_hangs_up_ends_its_list(
    playground: Playground, changed: FuseMount
) -> None:
    read, write = pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(changed.diff, write)
        await trio.lowlevel.wait_readable(read)
        os.close(read)
    os.close(write)


async def test_a_list_whose_worker_dies_is_not_complete(
    playground: Playground, changed: FuseMount
) -> None:
    async with listing(changed, 1) as failures:
        os.kill(changed.worker, signal.SIGKILL)
        await until(failures)
        assert "ended while it was at work on that; try again" in str(failures()[0])
