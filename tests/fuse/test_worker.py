"""The worker as a process: what it reports, how it ends, and what it survives."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pyfuse3
import pytest
import trio

from sessiond.errors import Failed
from sessiond.fuse.operations import OverlayOperations
from sessiond.session.model import Stack, UpperDirectories
from tests.fuse.conftest import Playground
from tests.support.mounts import is_mounted


async def test_death_of_the_worker_is_noticed(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        os.kill(mount.worker, signal.SIGKILL)
        await mount.wait_died()
        with pytest.raises(Failed, match="gone"):
            await mount.changes()
    assert not is_mounted(str(playground.root))


async def test_the_worker_ends_with_the_mount(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        process = os.pidfd_open(mount.worker)
        await mount.unmount()
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(process)
        os.close(process)
        await mount.wait_died()


async def test_a_stack_that_cannot_be_served_is_refused(playground: Playground) -> None:
    stack = playground.stack()
    missing = Stack(UpperDirectories(stack.upper.fs, Path("/nonexistent")), stack.lowers)
    with pytest.raises(Failed, match="/nonexistent: workdir does not exist"):
        async with playground.mounted(missing):
            pass
    assert not is_mounted(str(playground.root))


async def test_a_full_upper_is_reported_and_hurts_nothing_else(playground: Playground) -> None:
    async with playground.on_small_disk("1m") as small:
        (small.image / "file").write_bytes(b"x" * 300_000)
        async with small.mounted(small.stack()) as mount:
            with (
                pytest.raises(OSError, match="No space left"),
                open(small.root / "big", "wb") as big,
            ):
                big.write(b"x" * (2 << 20))
            with (
                pytest.raises(OSError, match="No space left"),
                open(small.root / "file", "r+b", buffering=0) as file,
            ):
                file.write(b"y")
            assert (small.root / "file").read_bytes() == b"x" * 300_000
            await mount.swap(small.stack())
            assert os.listdir(small.root) == ["file"]


class _Broken:
    """A core with a fault."""

    def __init__(self) -> None:
        nodes = SimpleNamespace(get=lambda number: None)
        self.view = SimpleNamespace(node=self._node, nodes=nodes)
        self.pending = None

    def _node(self, number: int) -> None:
        raise ValueError("a fault")


async def test_an_unforeseen_exception_is_logged_once_and_answered_with_eio(
    caplog: pytest.LogCaptureFixture,
) -> None:
    operations = OverlayOperations(_Broken())  # type: ignore[arg-type]
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.unlink(7, b"na\xffme", None)  # type: ignore[arg-type]
    assert os.strerror(caught.value.errno) == "Input/output error"
    (record,) = caplog.records
    assert record.getMessage() == "unlink of 'node 7/na\\udcffme' failed"
    assert record.exc_info is not None
