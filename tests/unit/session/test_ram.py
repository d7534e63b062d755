"""What volatile sessions may take of the machine's RAM."""

from __future__ import annotations

from pathlib import Path

import pytest

from sessiond.config import Config
from sessiond.errors import NoSpace
from sessiond.session import ram
from sessiond.session.model import Uid
from tests.support.sessions import UID, USER, World

MEMORY = 1 << 30


@pytest.fixture(autouse=True)
def machine_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "machine_ram", lambda: MEMORY)


def config(world: World, limit: str, **profile: object) -> Config:
    return Config.model_validate(
        {
            "daemon": {
                "runtime_directory": str(world.runtime),
                "state_directory": str(world.state),
                "volatile_limit": limit,
            },
            "profile": {"p": {"image": str(world.image), **profile}},
        }
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("2k", 2048), ("3M", 3 << 20), ("1G", 1 << 30), ("1T", 1 << 40), ("5%", 50)],
)
def test_sizes(text: str, size: int) -> None:
    assert ram.size_in_bytes(text, 1000) == size


def test_there_are_always_both_limits() -> None:
    assert ram.limits("25%", None) == (MEMORY // 4, MEMORY // 4 // 16384)
    assert ram.limits("1M", None) == (1 << 20, 1024)
    assert ram.limits("64M", 500) == (64 << 20, 500)


async def test_limits_that_cannot_be_honoured_together_are_refused(world: World) -> None:
    async with world.manager(config(world, "50%", size="25%", inodes=100)) as manager:
        await manager.create(USER, "p", session_id="one")
        with pytest.raises(NoSpace, match=r"Session two may take up to 256 MiB .* leave 256 MiB"):
            await manager.create(USER, "p", session_id="two")
        assert not (world.runtime / "sessions/two").exists()
        await manager.get("one").persist(started_by=Uid(UID)).wait()
        await manager.create(USER, "p", session_id="two")
        await manager.close("two")
        await manager.create(USER, "p", session_id="three")


async def test_files_take_ram_as_well(world: World) -> None:
    files = MEMORY // ram.INODE_BYTES
    async with world.manager(config(world, "100%", size="1M", inodes=files)) as manager:
        with pytest.raises(NoSpace):
            await manager.create(USER, "p", session_id="one")


@pytest.mark.parametrize("limit", ["none", "1000%"])
async def test_more_than_there_is_may_be_promised_on_request(world: World, limit: str) -> None:
    async with world.manager(config(world, limit, size="100%")) as manager:
        for number in range(5):
            await manager.create(USER, "p", session_id=f"{number}")


async def test_by_default_several_sessions_are_served(world: World) -> None:
    defaults = config(world, Config().daemon.volatile_limit)
    async with world.manager(defaults) as manager:
        for number in range(3):
            await manager.create(USER, "p", session_id=f"{number}")
        with pytest.raises(NoSpace, match="raise 'volatile_limit'"):
            await manager.create(USER, "p", session_id="one-too-many")


def test_numbers_are_shown_for_people() -> None:
    shown = [ram.shown_size(size) for size in (0, 1023, 1 << 20, 3 << 29, 1 << 42)]
    assert shown == ["0 bytes", "1023 bytes", "1 MiB", "1.5 GiB", "4096.0 GiB"]


def test_a_tmpfs_that_is_gone_takes_nothing(tmp_path: Path) -> None:
    from sessiond.session.mounts import SystemMounts

    assert SystemMounts().tmpfs_limits(tmp_path / "gone") == (0, 0)
    (tmp_path / "not mounted").mkdir()
    assert SystemMounts().tmpfs_limits(tmp_path / "not mounted") == (0, 0)
