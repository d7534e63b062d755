"""A real mount made as the manager makes it: forked worker, control socket, `/dev/fuse`."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sessiond.fuse import device
from sessiond.fuse.mounter import FuseMount, FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.session.model import SessionId, Stack, UpperDirectories
from sessiond.session.mounter import MountRequest


@pytest.fixture(scope="session", params=["epochs", "names"])
def mounter(request: pytest.FixtureRequest) -> Iterator[FuseMounter]:
    """Also as on kernels before 6.16, which have to be told of each name that is out of date."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "names":
            patch.setattr(device, "has_epochs", lambda: False)
        spawner = Spawner.start()
        yield FuseMounter(spawner)
        spawner.close()


class Playground:
    """An image, uppers on demand, and a place to mount them."""

    def __init__(self, directory: Path, mounter: FuseMounter) -> None:
        self._directory = directory
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
        return Stack(upper, (*committed, self.image))

    @asynccontextmanager
    async def mounted(self, stack: Stack) -> AsyncIterator[FuseMount]:
        request = MountRequest(SessionId("test"), self.root, stack, nosuid=False, nodev=False)
        mount = await self._mounter.mount(request)
        try:
            yield mount
        finally:
            await mount.unmount()


@pytest.fixture
def playground(mounter: FuseMounter) -> Iterator[Playground]:
    with tempfile.TemporaryDirectory() as directory:
        yield Playground(Path(directory), mounter)
