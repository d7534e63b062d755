"""A real mount made as the manager makes it: forked worker, control socket, `/dev/fuse`."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sessiond.fuse import data_path
from sessiond.fuse.mounter import FuseMount, FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.session.model import DataPath, KeptLayers, SessionId, Stack, UpperDirectories
from sessiond.session.mounter import MountRequest

NO_SUCH_DATA_PATH = "this kernel does not have the data path"


@pytest.fixture(scope="session")
def mounter() -> Iterator[FuseMounter]:
    spawner = Spawner.start()
    with tempfile.TemporaryDirectory() as sockets:
        yield FuseMounter(spawner, Path(sockets))
    spawner.close()


class Playground:
    """An image, uppers on demand, and a place to mount them."""

    def __init__(self, directory: Path, mounter: FuseMounter, data_path: DataPath) -> None:
        self._directory = directory
        self.data_path = data_path
        self._mounter = mounter
        self._layers = 0
        self.image = directory / "image"
        self.image.mkdir()
        self.root = directory / "root"
        self.root.mkdir()

    def stack(self, *committed: Path) -> Stack:
        """A new upper over `committed` layers over the image."""
        self._layers += 1
        layer = self._directory / f"layer{self._layers}"
        for name in ("fs", "work"):
            (layer / name).mkdir(parents=True)
        upper = UpperDirectories(layer / "fs", layer / "work")
        return Stack(upper, (*committed, self.image), orphans=self._directory / "orphans")

    def kept(self, *rules: str) -> KeptLayers:
        """The layers of what outlives resets, and which paths that is."""
        directory = self._directory / "kept"
        for name in ("fs", "work"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        upper = UpperDirectories(directory / "fs", directory / "work")
        return KeptLayers(upper, directory / "orphans", rules)

    @asynccontextmanager
    async def mounted(
        self, stack: Stack, reachable: tuple[Path, ...] = (), keep: KeptLayers | None = None
    ) -> AsyncIterator[FuseMount]:
        request = MountRequest(
            SessionId("test"),
            self.root,
            stack,
            nosuid=False,
            nodev=False,
            data_path=self.data_path,
            reachable=reachable or (self._directory,),
            keep=keep,
        )
        mount = await self._mounter.mount(request)
        try:
            yield mount
        finally:
            await mount.unmount()

    @asynccontextmanager
    async def on_small_disk(self, size: str) -> AsyncIterator[Playground]:
        """Another playground, of which everything is on a tmpfs of that size."""
        disk = self._directory / "small"
        disk.mkdir()
        await trio.run_process(["mount", "-t", "tmpfs", "-o", f"size={size}", "x", disk])
        try:
            yield Playground(disk, self._mounter, self.data_path)
        finally:
            await trio.run_process(["umount", "-l", disk])

    @property
    def descriptors_follow_copy_ups(self) -> bool:
        """Whether a descriptor from before a copy-up reads what is written after it."""
        return self.data_path is not DataPath.PASSTHROUGH


@pytest.fixture(params=DataPath)
def playground(request: pytest.FixtureRequest, mounter: FuseMounter) -> Iterator[Playground]:
    if request.param not in data_path.available():
        pytest.skip(f"{NO_SUCH_DATA_PATH}: {request.param}")
    with tempfile.TemporaryDirectory() as directory:
        yield Playground(Path(directory), mounter, request.param)
