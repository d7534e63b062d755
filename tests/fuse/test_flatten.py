"""Layers merged under a merged view that is in use."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from sessiond.fuse.mounter import FuseMount
from sessiond.session.model import DataPath, Stack
from sessiond.session.mounter import MergeState
from tests.fuse.conftest import Playground
from tests.support import trees

Meanwhile = Callable[[], Awaitable[None]]


async def deep(playground: Playground, mount: FuseMount, first: Stack) -> Stack:
    """Write three layers, of which the upper two of the committed ones can be merged."""
    root = playground.root
    (root / "etc/motd").write_text("first")
    (root / "made/deep").mkdir(parents=True)
    (root / "made/deep/file").write_text("made")
    (root / "made/gone").write_text("gone")
    (root / "kept").write_text("kept")
    second = playground.stack(first.upper.fs)
    await mount.swap(second)
    (root / "etc/motd").write_text("second")
    (root / "etc/hosts").unlink()
    (root / "made/gone").unlink()
    (root / "made/deep/other").write_text("other")
    (root / "new").mkdir()
    (root / "new/mapped").write_bytes(b"m" * 10000)
    (root / "usr").rename(root / "new/usr")
    os.chmod(root / "made", 0o711)
    for number in range(60):
        (root / f"new/{number}").write_text(str(number))
    third = playground.stack(second.upper.fs, first.upper.fs)
    await mount.swap(third)
    (root / "made/deep/third").write_text("third")
    (root / "new/0").unlink()
    return third


def merged(stack: Stack) -> Stack:
    """Return the stack without its topmost lower."""
    return replace(stack, lowers=stack.lowers[1:])


async def merge(mount: FuseMount, stack: Stack, meanwhile: Meanwhile) -> int:
    """Merge the topmost lower of `stack` into the next; return in how many moments."""
    for moments in range(1, 10_000):
        state = await mount.merge(*stack.lowers[:2])
        assert state is not MergeState.NEVER
        await meanwhile()
        if state is MergeState.DONE:
            return moments
    raise AssertionError("it has no end")


def shown(root: Path) -> trees.Snapshot:
    """Return the view; the times of the root are those of the uppers, which nobody has made so."""
    view = trees.snapshot(str(root))
    return view | {b".": view[b"."]._replace(mtime_ns=0)}


def numbers(root: Path) -> dict[str, int]:
    return {str(path): path.stat(follow_symlinks=False).st_ino for path in (root, *root.rglob("*"))}


@pytest.fixture
def image(playground: Playground) -> Path:
    for directory in ("etc", "usr/lib", "system/proc"):
        (playground.image / directory).mkdir(parents=True)
    for name in ("etc/motd", "etc/hosts", "usr/lib/file"):
        (playground.image / name).write_text("image")
    return playground.image


async def test_nobody_notices(playground: Playground, image: Path) -> None:
    root = playground.root
    async with playground.mounted(first := playground.stack()) as mount:
        stack = await deep(playground, mount, first)
        inodes = numbers(root)
        held = os.open(root / "new/mapped", os.O_RDWR)
        directory = os.open(root / "made/deep", os.O_RDONLY)
        listing = os.scandir(root / "new")
        next(listing)
        await trio.run_process(["mount", "-t", "tmpfs", "inside", root / "system/proc"])
        try:
            with mmap.mmap(held, 0) as mapping:

                async def look() -> None:
                    trees.assert_same(before, shown(root), "while layers are being merged")
                    assert os.path.samestat(os.fstat(held), os.stat(root / "new/mapped"))
                    assert sorted(os.listdir(directory)) == ["file", "other", "third"]

                os.close(os.open(root / "system/proc/mounted", os.O_CREAT))
                before = shown(root)
                await merge(mount, stack, look)
                assert os.listdir(stack.lowers[0]) == []
                await mount.swap(merged(stack))
                shutil.rmtree(stack.lowers[0].parent)
                await look()
                mapping[0:2] = b"MM"
                assert os.listdir(root / "system/proc") == ["mounted"]
                assert len(list(listing)) >= 50
            os.pwrite(held, b"held", 100)
            (root / "new/mapped").write_bytes(os.pread(held, 200, 0))
            (root / "made/deep/file").write_text("changed")
            (root / "new/usr/lib/file").unlink()
            del inodes[str(root / "system/proc")]  # something is mounted there
            found = {path: number for path, number in numbers(root).items() if path in inodes}
            assert found == {path: inodes[path] for path in found}
            assert (root / "new/mapped").read_bytes()[:4] == b"MMmm"
        finally:
            os.close(held)
            os.close(directory)
            listing.close()
            await trio.run_process(["umount", root / "system/proc"])


async def test_programs_go_on_changing(playground: Playground, image: Path) -> None:
    root = playground.root
    async with playground.mounted(first := playground.stack()) as mount:
        stack = await deep(playground, mount, first)
        names, renamed = iter(range(1, 60)), os.stat(root / "new/usr").st_ino

        async def change() -> None:
            number = next(names)
            (root / f"new/{number}").rename(root / f"made/{number}")
            (root / f"made/{number}").write_text("changed")
            assert not (root / f"new/{number}").exists()
            (root / "etc/motd").write_text(f"change {number}")
            (root / f"new/usr/lib/{number}").touch()
            assert os.stat(root / "new/usr").st_ino == renamed
            (root / f"new/{59 - number % 20}").read_text()

        await merge(mount, stack, change)
        await mount.swap(merged(stack))
        changed = next(names)
        for number in range(1, 60):
            where = "made" if number < changed else "new"
            text = "changed" if number < changed else str(number)
            assert (root / f"{where}/{number}").read_text() == text
        before = shown(root)
    async with playground.mounted(merged(stack)):
        trees.assert_same(before, shown(root), "mounted again")


@pytest.mark.parametrize("at", [0, 1, 2, 3])
async def test_the_worker_dies(playground: Playground, image: Path, at: int) -> None:
    if playground.data_path is DataPath.PLAIN:
        pytest.skip("it leaves nothing to go on with")
    root = playground.root
    async with playground.mounted(first := playground.stack()) as mount:
        stack = await deep(playground, mount, first)
        held = os.open(root / "new/mapped", os.O_RDWR)
        motd = os.open(root / "etc/motd", os.O_RDONLY)
        before = shown(root)
        for _ in range(at):
            await mount.merge(*stack.lowers[:2])
        os.kill(mount.worker, signal.SIGKILL)
        await mount.wait_died()
        await mount.recover()
        trees.assert_same(before, shown(root))

        async def nothing() -> None:
            pass

        await merge(mount, stack, nothing)
        os.kill(mount.worker, signal.SIGKILL)
        await mount.wait_died()
        await mount.recover()
        await mount.swap(merged(stack))
        # As by a manager that could not write its record: the layer is there, and empty.
        await mount.swap(stack)
        await mount.swap(merged(stack))
        trees.assert_same(before, shown(root))
        os.pwrite(held, b"held", 0)
        assert (root / "new/mapped").read_bytes()[:6] == b"heldmm"
        assert os.pread(motd, 10, 0) == b"second"
        os.close(held)
        os.close(motd)


async def test_what_cannot_be_merged(playground: Playground, image: Path) -> None:
    root = playground.root
    async with playground.mounted(first := playground.stack()) as mount:
        (root / "usr/lib/changed").touch()
        second = playground.stack(first.upper.fs)
        await mount.swap(second)
        (root / "usr").rename(root / "renamed")
        third = playground.stack(second.upper.fs, first.upper.fs)
        await mount.swap(third)
        before = shown(root)
        others = (third.lowers[::-1][1:], third.lowers[1:], (third.upper.fs, third.lowers[0]))
        for pair in (third.lowers, *others):  # nor what is no pair of layers
            state = MergeState.MORE
            while state is MergeState.MORE:  # as while the worker counts what has changed
                state = await mount.merge(*pair[:2])
            assert state is MergeState.NEVER
        trees.assert_same(before, shown(root))
