"""What one reset leaves as it is, through a real mount: by programs, with files open."""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path

import pytest

from sessiond.errors import Failed
from sessiond.fuse.mounter import FuseMount
from sessiond.session.model import DataPath, Stack
from tests.fuse.conftest import Playground

pytestmark = pytest.mark.root


async def reset(mount: FuseMount, stack: Stack, *paths: str) -> None:
    async with mount.frozen():
        await mount.retain(paths, stack.upper)
        await mount.swap(stack, retained=True)


def populate(image: Path) -> None:
    (image / "home/u/docs").mkdir(parents=True)
    for name in ("home/u/docs/letter", "home/u/docs/gone", "home/u/other", "etc"):
        (image / name).write_text("image")


async def test_paths_stay_and_all_else_is_reset(playground: Playground) -> None:
    populate(playground.image)
    async with playground.mounted(playground.stack()) as mount:
        root = playground.root
        (root / "home/u/docs/letter").write_text("mine")
        (root / "home/u/docs/gone").unlink()
        (root / "home/u/docs/new").write_text("new")
        (root / "home/u/other").write_text("lost")
        (root / "home/v/deep").mkdir(parents=True, mode=0o700)
        (root / "home/v/deep/file").write_text("deep")
        os.mkfifo(root / "home/v/deep/pipe")
        (root / "home/v/deep/link").symlink_to("file")
        for _ in range(2):
            await reset(mount, playground.stack(), "/home/u/docs", "/home/v/deep", "/not/there")
            assert (root / "home/u/docs/letter").read_text() == "mine"
            assert sorted(os.listdir(root / "home/u/docs")) == ["letter", "new"]
            assert (root / "home/u/other").read_text() == "image"
            assert (root / "home/v/deep/link").read_text() == "deep"
            assert (root / "home/v/deep/pipe").is_fifo()
            assert sorted(os.listdir(root)) == ["etc", "home"]
            for name in ("home/u/docs/letter", "home/v/deep/pipe"):
                assert (root / name).stat().st_nlink == 1
        changes = await mount.changes()
        assert (changes.deleted, changes.changed) == (1, 1)
        await mount.swap(playground.stack())
        assert sorted(os.listdir(root / "home")) == ["u"]
        assert (root / "home/u/docs/letter").read_text() == "image"


async def test_what_is_open_goes_on(playground: Playground) -> None:
    populate(playground.image)
    async with playground.mounted(playground.stack()) as mount:
        docs = playground.root / "home/u/docs"
        with open(docs / "new", "w+b", buffering=0) as new, open(docs / "letter", "r+b", 0) as old:
            new.write(b"first")
            old.write(b"IM")
            with mmap.mmap(new.fileno(), 5) as mapped:
                directory = os.open(docs, os.O_PATH)
                await reset(mount, playground.stack(), "/home/u/docs")
                new.write(b"second")
                mapped[:5] = b"FIRST"
                mapped.flush()
                old.write(b"A")
                assert os.fstat(new.fileno()).st_nlink == 1
                os.unlink("gone", dir_fd=directory)
                os.close(directory)
            assert (docs / "new").read_bytes() == b"FIRSTsecond"
        assert (docs / "letter").read_bytes() == b"IMAge"
        assert sorted(os.listdir(docs)) == ["letter", "new"]
        await reset(mount, playground.stack(), "/home/u/docs")
        assert (docs / "new").read_bytes() == b"FIRSTsecond"


async def test_what_a_snapshot_has_is_kept_as_well(playground: Playground) -> None:
    populate(playground.image)
    first = playground.stack()
    async with playground.mounted(first) as mount:
        docs = playground.root / "home/u/docs"
        (docs / "new").write_text("snapshot")
        await mount.swap(playground.stack(first.upper.fs))
        (docs / "gone").unlink()
        with open(docs / "new") as reader:
            await reset(mount, playground.stack(), "/home/u/docs")
            assert reader.read() == "snapshot"
        (docs / "new").write_text("changed")
        assert not (docs / "gone").exists()
        assert (first.upper.fs / "home/u/docs/new").read_text() == "snapshot"
        await mount.swap(playground.stack(first.upper.fs))
        assert (docs / "new").read_text() == "snapshot"


async def test_only_while_changes_are_held(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        (playground.root / "new").write_text("new")
        stack = playground.stack()
        with pytest.raises(Failed, match="Nothing can be retained now"):
            await mount.retain(("/new",), stack.upper)
        async with mount.frozen():
            await mount.retain(("/new",), stack.upper)
        with pytest.raises(Failed, match="try again"):
            await mount.swap(stack, retained=True)
        assert (playground.root / "new").read_text() == "new"


async def test_a_worker_that_dies_in_between(playground: Playground) -> None:
    """Its successor has let programs write meanwhile, so what was retained counts for nothing."""
    if playground.data_path is DataPath.PLAIN:
        pytest.skip("a worker of that data path has no successor")
    async with playground.mounted(playground.stack()) as mount:
        (playground.root / "new").write_text("new")
        stack = playground.stack()
        async with mount.frozen():
            await mount.retain(("/new",), stack.upper)
            os.kill(mount.worker, signal.SIGKILL)
            await mount.wait_died()
            await mount.recover()
            with pytest.raises(Failed, match="try again"):
                await mount.swap(stack, retained=True)
        assert (playground.root / "new").read_text() == "new"
        await reset(mount, playground.stack(), "/new")
        assert (playground.root / "new").read_text() == "new"
