"""Fixtures: a bus of the test's own, and the service on it over a manager of mere values."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from sessiond.bus import client, service
from sessiond.bus.client import Client
from sessiond.bus.transport import ADDRESS_VARIABLE
from tests.bus.fake_manager import FakeManager
from tests.support.bus import start_private_bus


@pytest.fixture
def bus_directory() -> Iterator[Path]:
    """A directory that everyone can search."""
    with tempfile.TemporaryDirectory(prefix="sessiond-bus-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def private_bus(bus_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a bus, which is the system bus for this process and its children."""
    with start_private_bus(bus_directory) as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        yield address


@pytest.fixture
def manager() -> FakeManager:
    """A manager with one session, ``live``, of uid 65534."""
    manager = FakeManager()
    manager.add("live")
    return manager


@pytest.fixture
async def serving(private_bus: str, manager: FakeManager, nursery: trio.Nursery) -> FakeManager:
    """The manager, served on the private bus."""
    await nursery.start(service.serve, manager)
    return manager


@pytest.fixture
async def sessiond(serving: FakeManager) -> AsyncIterator[Client]:
    """A client of the served manager."""
    async with client.connect() as connected:
        yield connected
