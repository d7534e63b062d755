"""Fixtures: a bus, and the whole service on it over a machine in memory."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sessiond.bus import service
from sessiond.bus.connection import Connection, connect
from sessiond.bus.transport import ADDRESS_VARIABLE
from sessiond.config import Config
from sessiond.session import maintenance
from sessiond.session.manager import Manager
from sessiond.session.memory import MemoryMounter
from tests.matrix.methods import By, Entry
from tests.matrix.stage import DONE, Stage
from tests.support.bus import start_private_bus
from tests.support.sessions import World
from tests.support.waiting import until


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Layers are made of what only root can make."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.skipif(os.geteuid() != 0, reason="layers take root"))


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bus of one's own, which is the system's for this process."""
    with (
        tempfile.TemporaryDirectory(prefix="sessiond-bus-", dir="/tmp") as directory,
        start_private_bus(Path(directory)) as address,
    ):
        Path(directory).chmod(0o755)
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        yield address


class MatrixWorld(World):
    """A machine with a profile for each kind of session; nothing is really mounted."""

    @property
    def packed(self) -> Path:
        """An image that is a file."""
        return self.directory / "image.squashfs"

    def pack(self, made_at: int) -> None:
        """Have another image; nobody looks beyond its first bytes."""
        head = b"hsqs" + bytes(4) + struct.pack("<I28xQ", made_at, 96)
        self.packed.write_bytes(head.ljust(96, b"\0"))

    def config(self, **sessions: str) -> Config:
        config = super().config(**sessions).model_dump(mode="json", exclude_unset=True)
        profiles = config["profile"]
        profiles["other"] = dict(profiles["volatile"])
        profiles["packed"] = profiles["volatile"] | {"image": str(self.packed)}
        profiles["kept-packed"] = dict(profiles["packed"])
        profiles["kept-packed"]["reset"] = {"daily": "03:00"}
        for name in ("volatile", "lasting", "kept-packed"):
            profiles[name]["keep"] = []
        return Config.model_validate(config)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[tuple[Manager, Connection]]:
        """A manager, and a connection of root's to the bus that it is on."""
        async with self.manager() as manager, trio.open_nursery() as nursery:
            await nursery.start(service.serve, manager)
            async with connect() as connection:
                yield manager, connection
            for base in (self.runtime, self.state):
                await until(lambda base=base: not any((base / "trash").iterdir()))  # type: ignore[misc]
            nursery.cancel_scope.cancel()

    async def session(
        self,
        manager: Manager,
        stage: Stage,
        entry: Entry,
        *,
        by: Connection | None = None,
        maintained: bool = False,
        profile: str = "volatile",
    ) -> None:
        """Make the session, a snapshot, a change, and what `entry` needs, which is made `by`."""
        if maintained or entry.maintenance:
            await manager.begin_maintenance("packed", "", session_id=stage.session, started_by=0)
        else:
            await manager.create(stage.user, profile, session_id=stage.session)
        await self.mount(stage.session).write("kept", b"kept")
        await manager.get(stage.session).snapshots.make(stage.snapshot)
        if entry.before is not None:
            first = None if entry.before.by is By.ROOT else by
            assert await stage.outcome(entry.before, by=first) == (DONE, "")
        await manager.get(stage.session).turn.become_idle()
        await self.mount(stage.session).write("mine", b"mine")

    def assert_nothing_left(self) -> None:
        """All sessions have been closed."""
        for base in (self.runtime, self.state):
            for name in ("sessions", "trash"):
                assert list((base / name).iterdir()) == []
            assert not (base / "set-aside").exists()
        assert not (self.state / "maintenance.json").exists()
        assert list(self.directory.glob(".image*")) == []
        assert self.mounts.mounted == {}


@pytest.fixture
def world(tmp_path: Path, bus: str, monkeypatch: pytest.MonkeyPatch) -> MatrixWorld:
    """A machine in memory, on that bus."""
    # What is packed is what is mounted, and that is nothing here.
    monkeypatch.setattr(maintenance, "_compare", lambda _layers, _new: None)
    world = MatrixWorld(tmp_path, MemoryMounter())
    world.pack(1)
    return world
