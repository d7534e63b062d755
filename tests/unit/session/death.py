"""``python -m tests.unit.session.death OPERATION PROFILE STEP``: a manager dies at changes of disk.

Before each STEPth system call that changes something, a child process that carries out the
operation is killed; another one then starts a manager on what is left, and has to find all in
order. Prints the number of deaths. Processes are forked from one that has no threads yet.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from sessiond.errors import Interrupted
from sessiond.session.manager import Manager
from sessiond.session.model import Manner, SessionState, SnapshotName
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

CHANGES = frozenset(
    f"os.{call}"
    for call in (
        "chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir", "setxattr", "symlink",
        "truncate", "utime",
    )
)  # fmt: skip
"""Audit events of `os`; "open" is another."""


async def prepare(manager: Manager, profile: str) -> None:
    await manager.create(USER, profile, session_id="s")


async def create(manager: Manager, profile: str) -> None:
    await manager.create(USER, profile, session_id="new")


async def close(manager: Manager, _: str) -> None:
    await manager.close("s")


async def reset(manager: Manager, _: str) -> None:
    await manager.get("s").reset(started_by=UID).wait()


async def restore(manager: Manager, _: str) -> None:
    await manager.get("s").restore("one", started_by=UID).wait()


async def snapshot_and_reset(manager: Manager, _: str) -> None:
    manner = Manner(snapshot=SnapshotName("before"))
    await manager.get("s").reset(started_by=UID, manner=manner).wait()


async def partial_reset(manager: Manager, _: str) -> None:
    manner = Manner(keep=("/new",))
    await manager.get("s").reset(started_by=UID, manner=manner).wait()


async def persist(manager: Manager, _: str) -> None:
    await manager.get("s").persist(started_by=UID).wait()


OPERATIONS: dict[str, Callable[[Manager, str], Awaitable[None]]] = {
    operation.__name__: operation
    for operation in (create, close, reset, restore, snapshot_and_reset, partial_reset, persist)
}


def main(operation: str, profile: str, step: int) -> None:
    deaths = 0
    while kills(operation, profile, deaths * step):
        deaths += 1
    print(deaths)


def kills(operation: str, profile: str, after: int) -> bool:
    """Kill a manager `after` that many changes, unless it is done before, and start another."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        run(lambda: set_up(world, profile))
        survived = run(lambda: die(world, operation, profile, after), dies=True) == 0
        run(lambda: find(world, operation, profile, survived))
    return not survived


def run(body: Callable[[], Awaitable[None]], *, dies: bool = False) -> int:
    """Run `body` in a child; return how that ended, which has to be well unless it `dies`."""
    pid = os.fork()
    if pid == 0:
        try:
            trio.run(body)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status != 0 and not (dies and os.WTERMSIG(status) == signal.SIGKILL):
        sys.exit(f"a child ended with status {status}")
    return status


async def set_up(world: World, profile: str) -> None:
    async with world.crashing_manager() as manager:
        await prepare(manager, profile)
        await world.mount("s").write("file", b"kept")
        await manager.get("s").snapshots.make("one")
        await world.mount("s").write("new", b"kept, too")


async def die(world: World, operation: str, profile: str, after: int) -> None:
    left = after

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        flags = arguments[2] if event == "open" else 0
        assert isinstance(flags, int)
        if event in CHANGES or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    world.remember_mounts()
    async with world.crashing_manager() as manager:
        sys.addaudithook(count)
        await OPERATIONS[operation](manager, profile)
        # What is done in the background as well.
        await until(lambda: not any((world.runtime / "trash").iterdir()))
        await until(lambda: not any((world.state / "trash").iterdir()))
        os._exit(0)


async def find(world: World, operation: str, profile: str, done: bool) -> None:
    """Start a manager; all is in order, and as before the operation or as after it."""
    world.remember_mounts()
    async with world.crashing_manager() as manager:
        present = set(manager.sessions)
        assert present in expected(operation, done), present
        for session in manager.sessions.values():
            assert session.state is SessionState.ACTIVE, session.failure
            storage = session.services.store.storage(session.record)
            await until(
                lambda storage=storage, session=session: (  # type: ignore[misc]
                    set(world.layers(storage)) == set(map(str, session.record.all_layers))
                )
            )
            volatile = world.storage(session.id)
            if session.storage == "tmpfs":
                assert volatile.exists()
            else:
                await until(lambda volatile=volatile: not volatile.exists())  # type: ignore[misc]
            for directory in (storage, storage.parent):
                assert not (directory / "session.new").exists()
                assert not (directory / "session.old").exists()
        for base in (world.runtime, world.state):
            await until(lambda base=base: not any((base / "trash").iterdir()))  # type: ignore[misc]
            assert not (base / "set-aside").exists()
            assert {path.name for path in (base / "sessions").iterdir()} <= present
        if "s" in present:
            await check(world, manager, operation, profile, done)
        await create_again(manager, profile)


def expected(operation: str, done: bool) -> tuple[set[str], ...]:
    before, after = {
        "create": ({"s"}, {"s", "new"}),
        "close": ({"s"}, set()),
    }.get(operation, ({"s"}, {"s"}))
    return (after,) if done else (before, after)


async def check(world: World, manager: Manager, operation: str, profile: str, done: bool) -> None:
    session = manager.get("s")
    served = world.mount("s").stack
    layers = (served.upper.fs, *served.lowers)
    found = any((layer / "file").exists() for layer in layers)
    new = any((layer / "new").exists() for layer in layers)
    job = session.last_job
    if operation not in {"create", "close"} and job is not None:
        assert job.finished
        assert (job.error is None) == (done or (job.error is None))
        if job.error is not None:
            assert isinstance(job.error, Interrupted)
    match operation:
        case "reset" | "snapshot_and_reset":
            assert found == new == (job is None or job.error is not None)
        case "partial_reset":
            assert new
            assert found == (job is None or job.error is not None)
        case "restore":
            assert found
            assert new == (job is None or job.error is not None)
            kept = [one for one in session.snapshots.values() if one.automatic]
            assert len(kept) == (not new)
            if kept:
                trees = [session.services.store.layer(session.record, n) for n in kept[0].layers]
                assert any((tree / "fs/new").exists() for tree in trees)
        case "persist":
            assert found
            assert new
            moved = session.storage == "persistent"
            assert moved == (job is not None and job.error is None) or profile == "lasting"
        case _:
            assert found
            assert new


async def create_again(manager: Manager, profile: str) -> None:
    for name in ("s", "new"):
        if name not in manager.sessions:
            await manager.create(USER, profile, session_id=name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
