"""A machine with little room: `/run` and the disk of persistent sessions are small file systems."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from sessiond.config import Config
from sessiond.fuse.mounter import FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.session.manager import Manager, Session, open_manager
from sessiond.session.model import Uid
from sessiond.session.surroundings import Surroundings
from tests.support import libc
from tests.support.guests import FewBelongings, UnknownUserRecords, guests_table
from tests.support.mounts import detach
from tests.support.waiting import until

ROOT = Uid(0)

USER = 1000
"""Who fills: root may use blocks that are reserved for root."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these mount file systems."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root"))


class Machine:
    """Directories, profiles and a manager; everything is real."""

    def __init__(self, directory: Path, spawner: Spawner) -> None:
        self.directory = directory
        self.runtime = directory / "run"
        self.state = directory / "state"
        self.image = directory / "image"
        self.profiles: dict[str, dict[str, object]] = {
            "volatile": {"image": str(self.image), "size": "4M", "inodes": 200},
            "lasting": {"image": str(self.image), "storage": "persistent"},
        }
        self.daemon: dict[str, object] = {}
        self.mounter = FuseMounter(spawner, self.runtime / "workers")
        for name in ("image", "homes", "skeleton"):
            (directory / name).mkdir()
        self.image.chmod(0o777)
        for number in range(3):
            (self.image / f"file{number}").write_bytes(b"image" * number)

    def config(self) -> Config:
        return Config.model_validate(
            {
                "daemon": {
                    "runtime_directory": str(self.runtime),
                    "state_directory": str(self.state),
                    **self.daemon,
                },
                "guests": guests_table(self.directory),
                "profile": {
                    name: {**profile, "data_path": profile.get("data_path", "passthrough")}
                    for name, profile in self.profiles.items()
                },
            }
        )

    @asynccontextmanager
    async def manager(self) -> AsyncIterator[Manager]:
        """A manager, from its start to a clean end."""
        surroundings = Surroundings(
            user_records=UnknownUserRecords(self.directory / "userdb"), belongings=FewBelongings()
        )
        async with open_manager(self.config(), self.mounter, surroundings=surroundings) as manager:
            await manager.start()
            try:
                yield manager
            finally:
                with trio.CancelScope(shield=True):
                    await manager.shut_down()

    def mount_run(self, *, size: str = "8M", inodes: int = 400) -> None:
        self.runtime.mkdir()
        options = f"size={size},nr_inodes={inodes},mode=0755"
        libc.mount("run", str(self.runtime), "tmpfs", data=options)

    def mount_disk(
        self, kind: str = "ext4", *make: str, size: str = "24M", options: str = "loop"
    ) -> None:
        """Make and mount a disk for persistent sessions."""
        image = self.directory / "disk"
        self.state.mkdir()
        with open(image, "wb") as file:
            file.truncate(int(size.removesuffix("M")) << 20)
        quiet = ("-q", "-F") if kind == "ext4" else ("-q", "-f")
        subprocess.run([f"mkfs.{kind}", *quiet, *make, image], check=True)
        subprocess.run(["mount", "-t", kind, "-o", options, image, self.state], check=True)


@pytest.fixture(scope="session")
def spawner() -> Iterator[Spawner]:
    spawner = Spawner.start()
    yield spawner
    spawner.close()


@pytest.fixture
def machine(spawner: Spawner) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="sessiond-test-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        machine = Machine(Path(directory), spawner)
        yield machine
        for path in (machine.runtime, machine.state):
            detach(str(path))


def fill(directory: Path, what: str) -> None:
    """Write to `directory` until there are no bytes or no inodes left."""
    number = 0
    with suppress(OSError):
        while what == "inodes":
            (directory / f"fill{number}").touch()
            number += 1
        for chunk in (1 << 20, 4096, 1):  # to the last block
            with (
                suppress(OSError),
                open(directory / f"big{chunk}", "wb", buffering=0) as file,
            ):
                while file.write(bytes(chunk)):
                    pass
    contents = b"" if what == "inodes" else b"x"
    with pytest.raises(OSError, match=r"No space left|quota exceeded"):
        (directory / f"one of {what} more").write_bytes(contents)


async def reset(session: Session) -> None:
    await session.reset(started_by=ROOT).wait()


async def restore(session: Session, name: str) -> None:
    await session.restore(name, started_by=ROOT, undo=False).wait()


async def settled(session: Session) -> None:
    """Wait until what is not needed has been deleted, and the spare layer is there again."""
    storage = session.services.store.storage(session.record)
    wanted = {str(number) for number in session.record.all_layers}
    await until(lambda: {path.name for path in (storage / "layers").iterdir()} == wanted)
    await until((storage / "spare").exists)
