"""Rows of sessions: what only sessiond does, by the whole daemon on a message bus of its own.

Each is run on a freshly started daemon, whose sessions are over one image and keep changes in RAM.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from sessiond.bus import client as bus
from tests.bench.materials import MIB, Materials
from tests.bench.peers import Peer, Sessiond
from tests.bench.rows import Scale, SkippedError, Unit
from tests.bench.view import drop_everything
from tests.support.bus import start_private_bus
from tests.support.daemon import Daemon

_PROFILE = "bench"
_FILES_PER_DIRECTORY = 1000


class SessionError(Exception):
    """sessiond did not do what it is for; the message says what."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A running daemon, and a connection to it."""

    daemon: Daemon
    sessiond: bus.Client
    materials: Materials
    shares_page_cache: bool
    """Whether the data path promises that sessions of one image do."""

    async def create(self, name: str) -> bus.Session:
        """Create a session."""
        return await self.sessiond.create("root", _PROFILE, session_id=name)

    async def create_several(self, count: int) -> list[Path]:
        """Create sessions, and return where they are mounted."""
        sessions = [await self.create(f"s{number}") for number in range(count)]
        return [self.daemon.root(session.id) for session in sessions]

    async def create_changed(self, files: int) -> bus.Session:
        """Create a session in which so many files have been made."""
        session = await self.create("changed")
        root = self.daemon.root(session.id)
        names = []
        for number in range(files):
            directory, file = divmod(number, _FILES_PER_DIRECTORY)
            if file == 0:
                (root / f"made-{directory}").mkdir()
            names.append(f"made-{directory}/{file}")
        self.materials.client(root, "create", names=names)
        return session


Work = Callable[[Machine], Awaitable[float]]
"""Does the work, and returns the figure."""


@dataclass(frozen=True, slots=True)
class SessionRow:
    """Work that only sessiond can do."""

    name: str
    work: Work
    unit: Unit = Unit.NANOSECONDS

    def prepare(self, materials: Materials) -> None:
        """Make the image."""
        _ = materials.large_file

    def measure(self, peer: Peer, materials: Materials) -> float:
        """Do the work once; raises `SkippedError` if the peer is not sessiond."""
        if not isinstance(peer, Sessiond):
            raise SkippedError(f"{peer.name} has no sessions")
        with _daemon(materials, peer.data_path) as daemon:
            return trio.run(self._work, daemon, materials, peer.data_path == "passthrough")

    async def _work(self, daemon: Daemon, materials: Materials, shares: bool) -> float:
        async with bus.connect(daemon.environment["DBUS_SYSTEM_BUS_ADDRESS"]) as sessiond:
            return await self.work(Machine(daemon, sessiond, materials, shares))


@contextmanager
def _daemon(materials: Materials, data_path: str) -> Iterator[Daemon]:
    """Yield a daemon that serves sessions by one data path; leave no trace of it."""
    with (
        # Names of sockets have to be short. Nothing is stored there: changes are kept in RAM.
        tempfile.TemporaryDirectory(prefix="sessiond-bench-") as name,
        start_private_bus(Path(name)) as address,
    ):
        daemon = Daemon(Path(name), address)
        daemon.environment["SESSIOND_DATAPATH"] = data_path
        image = str(materials.large_file.path)
        daemon.configure(
            {
                # Twenty sessions, none of which takes what it may.
                "daemon": {"volatile_limit": "none"},
                f"profile.{_PROFILE}": {"image": image},
            }
        )
        try:
            daemon.start()
            yield daemon
            daemon.stop()
        finally:
            daemon.clean_up()


def rows(scale: Scale) -> list[SessionRow]:
    """Return these rows, for so much work."""
    return [*_operations(scale), *_memory(scale)]


def _operations(scale: Scale) -> Iterator[SessionRow]:
    yield SessionRow("session create", _create)
    for files in scale.changes:
        yield SessionRow(f"session reset, changed files: {files:,}", _reset(files))
    files = scale.changes[1]
    yield SessionRow(f"session snapshot, changed files: {files:,}", _snapshot(files))
    yield SessionRow(f"session close, changed files: {files:,}", _close(files))


def _memory(scale: Scale) -> Iterator[SessionRow]:
    for count in scale.sessions:
        name = f"memory of each worker, sessions: {count}"
        yield SessionRow(name, _memory_of_workers(count), Unit.BYTES)
        name = f"memory of daemon and workers, sessions: {count}"
        yield SessionRow(name, _memory_of_all(count), Unit.BYTES)
    name = f"page cache after {scale.readers} sessions have read {scale.read_mib} MiB"
    yield SessionRow(name, _page_cache(scale.readers), Unit.BYTES)
    name = f"{name}, the image's own"
    yield SessionRow(name, _page_cache_of_image(scale.readers), Unit.BYTES)


# Operations: from the call on the bus to the end of its effect


async def _create(machine: Machine) -> float:
    """The image is in use by another session already."""
    await machine.create("first")
    began = time.monotonic_ns()
    session = await machine.create("second")
    (machine.daemon.root(session.id) / "file").stat()
    return time.monotonic_ns() - began


def _reset(files: int) -> Work:
    async def work(machine: Machine) -> float:
        session = await machine.create_changed(files)
        began = time.monotonic_ns()
        job = await session.reset()
        await job.wait()
        took = time.monotonic_ns() - began
        if (machine.daemon.root(session.id) / "made-0").exists():
            raise SessionError("what was made is there after a reset")
        return took

    return work


def _snapshot(files: int) -> Work:
    async def work(machine: Machine) -> float:
        session = await machine.create_changed(files)
        began = time.monotonic_ns()
        await session.snapshot("now")
        return time.monotonic_ns() - began

    return work


def _close(files: int) -> Work:
    async def work(machine: Machine) -> float:
        session = await machine.create_changed(files)
        began = time.monotonic_ns()
        await session.close()
        return time.monotonic_ns() - began

    return work


# Memory, by proportional set size: what processes share is divided between them


def _memory_of_workers(count: int) -> Work:
    async def work(machine: Machine) -> float:
        await machine.create_several(count)
        workers = [process for process in _descendants(machine.daemon.pid) if _is_worker(process)]
        if len(workers) != count:
            raise SessionError(f"{count} sessions have {len(workers)} workers")
        return sum(map(_proportional_set_size, workers)) / count

    return work


def _memory_of_all(count: int) -> Work:
    async def work(machine: Machine) -> float:
        await machine.create_several(count)
        manager = machine.daemon.pid
        return sum(map(_proportional_set_size, (manager, *_descendants(manager))))

    return work


def _descendants(ancestor: int) -> list[int]:
    """Return the processes that have been started by a process, or by those, and live."""
    found = []
    for thread in Path(f"/proc/{ancestor}/task").iterdir():
        for child in map(int, (thread / "children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _is_worker(process: int) -> bool:
    return Path(f"/proc/{process}/comm").read_text() == "sessiond-worker\n"


def _proportional_set_size(process: int) -> int:
    """Return bytes."""
    return _kib_of(Path(f"/proc/{process}/smaps_rollup"), "Pss") * 1024


# The page cache


def _page_cache(readers: int) -> Work:
    """By how much it grows; checks that data paths keep what they promise."""

    async def work(machine: Machine) -> float:
        roots = await machine.create_several(readers)
        drop_everything()
        before = _cached()
        _read_in_each(machine, roots)
        grown = _cached() - before
        size = machine.materials.scale.read_mib * MIB
        if machine.shares_page_cache and grown > 1.5 * size:
            raise SessionError(
                f"{readers} sessions hold {grown // MIB} MiB of a file of {size // MIB} MiB"
            )
        return grown

    return work


def _page_cache_of_image(readers: int) -> Work:
    async def work(machine: Machine) -> float:
        roots = await machine.create_several(readers)
        drop_everything()
        _read_in_each(machine, roots)
        image = str(machine.materials.large_file.path / "file")
        command = ["fincore", "--bytes", "--noheadings", "--output", "RES", image]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    return work


def _read_in_each(machine: Machine, roots: list[Path]) -> None:
    for root in roots:
        machine.materials.client(root, "read-sequentially", "file")


def _cached() -> int:
    """Return bytes."""
    return _kib_of(Path("/proc/meminfo"), "Cached") * 1024


def _kib_of(table: Path, key: str) -> int:
    for line in table.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.removesuffix("kB"))
    raise SessionError(f"{table} has no {key}")
