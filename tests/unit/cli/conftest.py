"""Fixtures: sessionctl as a process, against the D-Bus service over a manager of mere values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sessiond.bus import service
from sessiond.bus.transport import ADDRESS_VARIABLE
from tests.bus.fake_manager import FakeManager
from tests.support.bus import start_private_bus


class Sessionctl:
    """Runs sessionctl on the bus at `address`."""

    def __init__(self, address: str) -> None:
        self.environment = os.environ | {ADDRESS_VARIABLE: address, "LC_ALL": "C.UTF-8"}

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "sessiond.cli.main", *arguments]

    async def __call__(
        self, *arguments: str, code: int = 0, user: int | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end, which has to be `code`."""
        done = await trio.run_process(
            self.command(*arguments),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=self.environment,
            user=user,
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        if code:
            assert done.stderr.startswith(b"sessionctl: ")
            assert done.stderr.count(b"\n") == 1, "one line says all"
        return done

    async def lines(self, *arguments: str) -> list[str]:
        """Return the lines for people, without what is blank at their ends."""
        printed = (await self(*arguments)).stdout.decode()
        return [line.rstrip() for line in printed.splitlines()]

    async def json(self, *arguments: str) -> object:
        """Return what it tells programs."""
        return json.loads((await self(*arguments, "--json")).stdout)


@pytest.fixture
def address() -> Iterator[str]:
    """The address of a bus of the test's own, in a directory that everyone can search."""
    with tempfile.TemporaryDirectory(prefix="sessionctl-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        with start_private_bus(Path(directory)) as address:
            yield address


@pytest.fixture
def sessionctl(address: str) -> Sessionctl:
    return Sessionctl(address)


@pytest.fixture
async def manager(address: str, nursery: trio.Nursery) -> FakeManager:
    """A manager with one session, ``live``, of uid 65534, served on the bus."""
    manager = FakeManager()
    manager.add("live")

    async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await service.serve(manager, address=address, task_status=task_status)

    await nursery.start(serve)
    return manager
