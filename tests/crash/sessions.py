"""A machine with sessions, on which managers die; and what the next one makes of it.

Storage is mounted for real. Merged views are not: what programs would write in them is written into
their uppers, and what they would show is read from the layers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import trio

from sessiond.config import Config
from sessiond.session.manager import Manager, Session
from sessiond.session.memory import MemoryMount, MemoryMounter
from sessiond.session.model import StorageKind
from sessiond.session.mounts import Mounts, SystemMounts, sync_file_system
from tests.support import fault_points
from tests.support.fault_points import Lived
from tests.support.sessions import World
from tests.support.waiting import until

Life: TypeAlias = "Callable[[World, Manager], Awaitable[object]]"
"""What a manager does."""

Files: TypeAlias = "dict[str, bytes]"

LOGINS = {"daemon": "volatile", "sync": "lasting"}
"""Users that every machine has, and the profiles of their sessions."""

LAST_WORDS: Files = {}
"""What programs write into a merged view just before it is frozen."""


class _Mount(MemoryMount):
    async def sync(self) -> None:
        """See `Mount`: what was written into the upper is there for real."""
        await super().sync()
        await trio.to_thread.run_sync(sync_file_system, self.stack.upper.fs)

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """See `Mount`: there is someone who writes until then, and does not synchronise it."""
        for name, content in LAST_WORDS.items():
            await self.write(name, content)
        async with super().frozen():
            yield


class _Mounts(SystemMounts):
    """The tmpfs that the tests run on stands for a disk."""

    def is_in_ram(self, _: Path) -> bool:
        return False


@dataclass
class RealStorage(World):
    """A machine on which everything but merged views is mounted for real."""

    mounter: MemoryMounter = field(default_factory=lambda: MemoryMounter(_Mount))
    mounts: Mounts = field(default_factory=_Mounts)  # type: ignore[assignment]

    def config(self, **sessions: str) -> Config:
        """See `World`; some keep what the user commits, and one is over an image file."""
        config = super().config(**sessions).model_dump(mode="json", exclude_unset=True)
        profiles = config["profile"]
        for name in tuple(profiles):
            profiles[f"{name}-keeping"] = profiles[name] | {"keep": []}
        config["login"] = {name: {"user": user, "profile": name} for user, name in LOGINS.items()}
        profiles["packed"] = profiles["volatile"] | {"image": str(self.directory / "squashfs")}
        return Config.model_validate(config)


@dataclass(frozen=True)
class Found:
    """What there is of a session: where, its files, and those of its snapshots."""

    storage: StorageKind
    files: Files
    snapshots: dict[str, Files]
    said: frozenset[object]
    """What people have said of it."""


State: TypeAlias = "dict[str, Found]"
"""Sessions by their ids."""


@contextmanager
def machine(directory: str, life: Life) -> Iterator[Path]:
    """Provide a machine whose first manager did `life` and died; nothing stays mounted there."""
    top = Path(tempfile.mkdtemp(dir=directory))
    try:
        die(top, life)
        yield top
    finally:
        mounts = SystemMounts()
        for target in mounts.mounted_below(top):
            mounts.detach(target)
        shutil.rmtree(top)


def die(top: Path, life: Life, *, die_at: int | None = None) -> Lived:
    """Have a manager start and do `life`; it dies after that, or before its change `die_at`."""
    return fault_points.run(lambda _: trio.run(_live, top, life), lambda: None, die_at=die_at)


async def _live(top: Path, life: Life) -> None:
    world = RealStorage(top)
    async with world.manager() as manager:
        await life(world, manager)
        os._exit(0)  # instead of the clean end of the manager


def recovered(top: Path) -> State:
    """Have the next manager start; return what it serves.

    Fails unless it removes whatever is of no use.
    """
    return trio.run(_recover, top)


async def _recover(top: Path) -> State:
    world = RealStorage(top)
    async with world.manager() as manager:
        state = {
            session.id: Found(
                session.storage, _served(world, session), _kept(session), _said(session)
            )
            for session in manager.sessions.values()
        }
        for base in (world.runtime, world.state):
            await until(partial(_holds_only, base / "trash", set()))
            assert not (base / "set-aside").exists()
            assert {path.name for path in (base / "sessions").iterdir()} <= state.keys()
        for session in manager.sessions.values():
            await until(partial(_has_only_its_layers, session))
    return state


def _has_only_its_layers(session: Session) -> bool:
    """As its record is now: flattening goes on."""
    layers = session.services.store.storage(session.record) / "layers"
    return _holds_only(layers, {str(number) for number in session.record.all_layers})


def _holds_only(directory: Path, names: set[str]) -> bool:
    return {path.name for path in directory.iterdir()} == names


def _served(world: World, session: Session) -> Files:
    stack = world.mount(session.id).stack
    return _merged((stack.upper.fs, *stack.lowers[:-1]))


def _kept(session: Session) -> dict[str, Files]:
    store, record = session.services.store, session.record
    return {
        "automatic" if snapshot.automatic else str(snapshot.name): _merged(
            store.layer(record, number) / "fs" for number in snapshot.layers
        )
        for snapshot in record.snapshots
    }


def _said(session: Session) -> frozenset[object]:
    record = session.record
    snapshots = [(one.description, one.pinned) for one in record.snapshots]
    scheduled = record.scheduled and record.scheduled.after
    return frozenset((*snapshots, scheduled, record.keep_rules, record.maintenance))


def _merged(layers: Iterable[Path]) -> Files:
    files: Files = {}
    for layer in layers:
        for path in layer.iterdir():
            files.setdefault(path.name, path.read_bytes())
    return files
