"""What managers do on a machine with sessions: each operation that changes one."""

from __future__ import annotations

import os
import tarfile
from io import BytesIO

from sessiond.session.manager import Manager
from tests.crash.sessions import Life
from tests.support.sessions import UID, USER, World

FILES = {"first": b"1" * 100, "second": b"2" * 5000}
PROFILES = ("volatile", "lasting")


def given(profile: str) -> Life:
    """Return the life that leaves session ``s`` with a snapshot, and another session."""

    async def life(world: World, manager: Manager) -> None:
        await manager.create(USER, "lasting", session_id="other")
        await world.mount("other").write("file", b"of another session")
        session = await manager.create(USER, profile, session_id="s")
        await world.mount("s").write("first", b"old")
        await session.snapshots.make("one")
        for name, content in FILES.items():
            await world.mount("s").write(name, content)

    return life


async def nothing(world: World, manager: Manager) -> None:
    """Only start, as every other life does first."""


async def create_volatile(world: World, manager: Manager) -> None:
    await manager.create(USER, "volatile", session_id="new")


async def create_lasting(world: World, manager: Manager) -> None:
    await manager.create(USER, "lasting", session_id="new")


async def snapshot(world: World, manager: Manager) -> None:
    await manager.get("s").snapshots.make("two")


async def rename_snapshot(world: World, manager: Manager) -> None:
    await manager.get("s").rename_snapshot("one", "two")


async def delete_snapshot(world: World, manager: Manager) -> None:
    await manager.get("s").delete_snapshot("one")


async def restore(world: World, manager: Manager) -> None:
    await manager.get("s").restore("one", started_by=UID).wait()


async def reset(world: World, manager: Manager) -> None:
    await manager.get("s").reset(started_by=UID).wait()


async def persist(world: World, manager: Manager) -> None:
    await manager.get("s").persist(started_by=UID).wait()


async def import_snapshot(world: World, manager: Manager) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with open(writer, "wb") as pipe, tarfile.open(fileobj=pipe, mode="w|") as archive:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    await manager.get("s").snapshots.add("new", reader, started_by=UID).wait()


async def close(world: World, manager: Manager) -> None:
    await manager.close("s")


async def shut_down(world: World, manager: Manager) -> None:
    await manager.shut_down()


LIVES: tuple[Life, ...] = (
    *(nothing, create_volatile, create_lasting, snapshot, rename_snapshot, delete_snapshot),
    *(restore, reset, persist, import_snapshot, close, shut_down),
)
