"""``python -m tests.unit.session.guest_death OPERATION STEP``: a manager dies as guests come or go.

As in `death`: before each STEPth system call that changes the disk. The next manager has to find
each guest whole or leave nothing of them; also where the machine was started anew in between.
Prints the number of deaths.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from sessiond.overlay import syscalls
from sessiond.session.guests import NOBODY
from sessiond.session.manager import Manager
from sessiond.session.model import Uid
from tests.support.sessions import World
from tests.support.waiting import until
from tests.unit.session.death import CHANGES, run

FIRST = Uid(NOBODY + 1)


async def create_guest(manager: Manager) -> None:
    await manager.guests.create()


async def remove_guest(manager: Manager) -> None:
    await manager.guests.remove(FIRST)


OPERATIONS = {operation.__name__: operation for operation in (create_guest, remove_guest)}


def main(operation: str, step: int) -> None:
    deaths = 0
    while kills(operation, deaths * step, reboot=bool(deaths % 2)):
        deaths += 1
    print(deaths)


def kills(operation: str, after: int, *, reboot: bool) -> bool:
    """Kill a manager `after` that many changes, unless it is done before, and start another."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        for name in (".profile", "Desktop"):
            (world.directory / "skeleton" / name).mkdir()
            (world.directory / "skeleton" / name / "file").touch()
        run(lambda: set_up(world))
        survived = run(lambda: die(world, operation, after), dies=True) == 0
        if reboot:
            shutil.rmtree(world.directory / "userdb")
            shutil.rmtree(world.runtime)
        run(lambda: find(world, operation, survived=survived, reboot=reboot))
    return not survived


async def set_up(world: World) -> None:
    async with world.crashing_manager() as manager:
        await manager.guests.create()


async def die(world: World, operation: str, after: int) -> None:
    left = after

    def change() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        assert isinstance(flags, int)
        if event in CHANGES or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            change()

    def exchange(*arguments: object) -> None:
        change()
        rename(*arguments)  # type: ignore[arg-type]

    rename = syscalls.rename  # not heard of: it is no function of Python's
    hold(world)
    async with world.crashing_manager() as manager:
        sys.addaudithook(hear)
        syscalls.rename = exchange  # type: ignore[assignment]
        await OPERATIONS[operation](manager)
        if operation == "remove_guest":
            await until(lambda: not manager.guests.is_guest(FIRST))
        os._exit(0)


def hold(world: World) -> None:
    """Have the guests who are there be logged in."""
    belongings = world.surroundings.belongings
    belongings.busy.update({FIRST, Uid(NOBODY + 2)})  # type: ignore[attr-defined]


async def find(world: World, operation: str, *, survived: bool, reboot: bool) -> None:
    hold(world)
    homes, userdb = world.directory / "homes", world.directory / "userdb"
    async with world.crashing_manager() as manager:
        guests = set(manager.guests.names)
        expected = {"guest-1"} | ({"guest-2"} if operation == "create_guest" else set())
        if reboot:
            assert guests == set()
        elif survived:
            assert guests == (expected if operation == "create_guest" else set())
        else:
            assert guests <= expected
            assert operation == "remove_guest" or "guest-1" in guests
        await until(lambda: noted(world) == guests)
        assert {path.name for path in homes.iterdir()} == guests
        for name in guests:
            home = homes / name
            assert {path.name for path in home.rglob("*")} == {".profile", "Desktop", "file"}
            assert home.stat().st_uid == NOBODY + int(name[-1])
        found = {path.name for path in userdb.iterdir()} if userdb.exists() else set()
        numbers = {str(NOBODY + int(name[-1])) for name in guests}
        kinds = ("user", "group")
        assert found == {f"{one}.{kind}" for one in guests | numbers for kind in kinds}
        new = await manager.guests.create()
        assert new.uid > FIRST
        assert not survived or operation == "remove_guest" or new.name == "guest-3"


def noted(world: World) -> set[str]:
    """Return the guests of whom something may be left."""
    text = (world.state / "guests.json").read_text()
    return {name for name in (f"guest-{number}" for number in (1, 2)) if f'/{name}"' in text}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
