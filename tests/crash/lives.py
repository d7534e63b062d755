"""What managers do on a machine with sessions: each operation that changes one."""

from __future__ import annotations

import os
import subprocess
import tarfile
from io import BytesIO

from sessiond.session.manager import Manager
from tests.crash.sessions import Life
from tests.support.sessions import UID, USER, World

FILES = {"first": b"1" * 100, "second": b"2" * 5000}
PROFILES = ("volatile", "lasting")


def given(profile: str, life: Life) -> Life:
    """Return the life that leaves session ``s`` with a snapshot, and another session.

    It is as `life` needs it, which is to be next.
    """
    if life in (set_keep, commit, uncommit):
        profile = f"{profile}-keeping"

    async def made(world: World, manager: Manager) -> None:
        if life in (begin_maintenance, cancel_maintenance):
            make = ["mksquashfs", world.image, world.directory / "squashfs", "-quiet"]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        await manager.create(USER, "lasting", session_id="other")
        await world.mount("other").write("file", b"of another session")
        session = await manager.create(USER, profile, session_id="s")
        await world.mount("s").write("first", b"old")
        if life is uncommit:
            await session.commit(["/first"], started_by=UID).wait()
        await session.snapshots.make("one")
        for name, content in FILES.items():
            await world.mount("s").write(name, content)
        if life is cancel_scheduled_reset:
            await schedule_reset(world, manager)
        if life is cancel_maintenance:
            await begin_maintenance(world, manager)

    return made


async def nothing(world: World, manager: Manager) -> None:
    """Only start, as every other life does first."""


async def create_volatile(world: World, manager: Manager) -> None:
    await manager.create(USER, "volatile", session_id="new")


async def create_lasting(world: World, manager: Manager) -> None:
    await manager.create(USER, "lasting", session_id="new")


async def snapshot(world: World, manager: Manager) -> None:
    await manager.get("s").snapshots.make("two")


async def rename_snapshot(world: World, manager: Manager) -> None:
    await manager.get("s").snapshots.rename("one", "two")


async def delete_snapshot(world: World, manager: Manager) -> None:
    await manager.get("s").snapshots.delete("one")


async def describe_snapshot(world: World, manager: Manager) -> None:
    await manager.get("s").snapshots.describe("one", "as it was")


async def pin_snapshot(world: World, manager: Manager) -> None:
    await manager.get("s").snapshots.pin("one", True)


async def schedule_reset(world: World, manager: Manager) -> None:
    await manager.get("s").timer.schedule(UID, after=3600)


async def cancel_scheduled_reset(world: World, manager: Manager) -> None:
    await manager.get("s").timer.cancel(UID)


async def set_keep(world: World, manager: Manager) -> None:
    await manager.get("s").set_keep(["/home/*/notes"])


async def commit(world: World, manager: Manager) -> None:
    await manager.get("s").commit(["/first"], started_by=UID).wait()


async def uncommit(world: World, manager: Manager) -> None:
    await manager.get("s").uncommit(["/first"], delete=True)


async def begin_maintenance(world: World, manager: Manager) -> None:
    await manager.begin_maintenance("packed", "Back at noon.", started_by=UID)


async def cancel_maintenance(world: World, manager: Manager) -> None:
    await manager.cancel_maintenance()


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
    *(describe_snapshot, pin_snapshot, schedule_reset, cancel_scheduled_reset),
    *(begin_maintenance, cancel_maintenance),
    *(set_keep, commit, uncommit, restore, reset, persist, import_snapshot, close, shut_down),
)
