"""``python -m tests.unit.session.maintenance_death STEP``: a manager dies in a maintenance.

As in `death`: before each STEPth system call that changes the disk, from where the maintenance
begins to where it is over. What another manager then finds is either the old image or the new one,
and protected; also where the machine was started anew in between. Prints the number of deaths.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sessiond.overlay import syscalls
from sessiond.session import maintenance
from sessiond.session.images import digest_of
from sessiond.session.model import SessionState
from tests.support.sessions import USER, World
from tests.support.waiting import until
from tests.unit.session.death import CHANGES, run

SESSION = "maintenance"


class ImageWorld(World):
    """One whose image is a file."""

    @property
    def image(self) -> Path:
        return self.directory / "image.squashfs"

    def make_image(self) -> None:
        content = self.directory / "image"
        (content / "file").write_text("old")
        pack = ["mksquashfs", content, self.image, "-quiet", "-no-progress"]
        subprocess.run(pack, check=True, capture_output=True)


def main(step: int) -> None:
    deaths = 0
    while kills(deaths * step, reboot=bool(deaths % 2)):
        deaths += 1
    print(deaths)


def kills(after: int, *, reboot: bool) -> bool:
    """Kill a manager `after` that many changes, unless it is done before, and start another."""
    with tempfile.TemporaryDirectory() as directory:
        world = ImageWorld(Path(directory))
        world.make_image()
        old = digest_of(world.image)
        assert old is not None
        survived = run(lambda: die(world, after), dies=True) == 0
        run(lambda: find(world, old, survived=survived, reboot=reboot))
    return not survived


async def die(world: World, after: int) -> None:
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

    def exchange(*arguments: Any) -> None:
        change()
        rename(*arguments)

    rename = syscalls.rename  # not heard of: it is no function of Python's
    async with world.crashing_manager() as manager:
        sys.addaudithook(hear)
        syscalls.rename = exchange
        await manager.begin_maintenance("lasting", "", started_by=maintenance.Uid(0))
        await manager.finish_maintenance(started_by=maintenance.Uid(0)).wait()
        await until(lambda: not manager.sessions)
        await until(lambda: not any((world.state / "trash").iterdir()))
        os._exit(0)


async def find(world: World, old: str, *, survived: bool, reboot: bool) -> None:
    if reboot:
        maintenance._BOOT_ID = world.directory / "another-boot"
        maintenance._BOOT_ID.write_text("another")
    async with world.crashing_manager() as manager:
        now = digest_of(world.image)
        assert now is not None
        replaced = world.image.with_name(f"{world.image.name}.old")
        assert (now != old) == replaced.exists()
        assert not replaced.exists() or digest_of(replaced) == old
        if manager.maintenance is not None:
            assert now == old
            assert not survived
            assert not reboot
            assert manager.get(SESSION).state is SessionState.ACTIVE
            await manager.cancel_maintenance()
        assert now != old or not survived
        assert not (world.state / "maintenance.json").exists()
        assert manager.sessions == {}
        await until(lambda: not any((world.state / "trash").iterdir()))
        assert not any((world.state / "sessions").iterdir())
        assert not list(world.directory.glob(".image*"))
        session = await manager.create(USER, "volatile")
        assert session.image == now


if __name__ == "__main__":
    main(int(sys.argv[1]))
