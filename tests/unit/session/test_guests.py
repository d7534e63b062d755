"""Guests: made, removed, and healed, over belongings in memory; see `guest_death` for deaths."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import trio

from sessiond.config import Config
from sessiond.errors import Failed, InvalidName, NoSpace, NotSupported
from sessiond.session import accounts, durable
from sessiond.session.accounts import Account
from sessiond.session.guests import NOBODY
from sessiond.session.manager import Manager
from sessiond.session.model import SessionId, Uid
from tests.support.guests import FewBelongings, UnknownUserRecords
from tests.support.sessions import World
from tests.support.waiting import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="to give a home away takes root"),
]


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    skeleton = world.directory / "skeleton"
    (skeleton / ".profile").write_text("umask 077\n")
    (skeleton / "Desktop").mkdir(mode=0o750)
    (skeleton / "Desktop/tool").write_text("#!/bin/sh\n")
    (skeleton / "Desktop/tool").chmod(0o4755)
    (skeleton / "link").symlink_to("/etc/shadow")
    return world


def records(world: World) -> UnknownUserRecords:
    assert isinstance(world.surroundings.user_records, UnknownUserRecords)
    return world.surroundings.user_records


def belongings(world: World) -> FewBelongings:
    assert isinstance(world.surroundings.belongings, FewBelongings)
    return world.surroundings.belongings


def home(world: World, number: int) -> Path:
    return world.directory / f"homes/guest-{number}"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def forgotten(world: World) -> None:
    """Wait until no guest of whom something may be left is noted."""
    await until(lambda: '"guests":[]' in (world.state / "guests.json").read_text())


def reboot(world: World) -> None:
    for directory in (world.directory / "userdb", world.runtime):
        shutil.rmtree(directory)


async def test_a_guest_has_a_home_and_is_known(world: World) -> None:
    async with world.manager() as manager:
        guest = await manager.guests.create()
        assert guest == Account("guest-1", Uid(NOBODY + 1))
        assert manager.guests.names == ["guest-1"]
        assert manager.guests.is_guest(guest.uid)
        assert not manager.guests.is_guest(Uid(NOBODY + 2))
        found = {path: path.lstat() for path in (home(world, 1), *home(world, 1).rglob("*"))}
        assert {path.name for path in found} == {"guest-1", ".profile", "Desktop", "tool", "link"}
        assert {(one.st_uid, one.st_gid) for one in found.values()} == {(guest.uid, guest.uid)}
        assert stat.S_IMODE(home(world, 1).stat().st_mode) == 0o700
        # What it would be as root's, it is not as the guest's.
        assert stat.S_IMODE((home(world, 1) / "Desktop/tool").stat().st_mode) == 0o755
        assert os.readlink(home(world, 1) / "link") == "/etc/shadow"
        assert Path("/etc/shadow").stat().st_uid == 0
        assert names(world.directory / "userdb") == {
            *("guest-1.user", "guest-1.group"),
            *(f"{guest.uid}.user", f"{guest.uid}.group"),
        }
        assert stat.S_IMODE((world.directory / "userdb").stat().st_mode) == 0o755


async def test_no_number_is_given_out_twice(world: World) -> None:
    async with world.manager() as manager:
        first = await manager.guests.create()
        await manager.guests.remove(first.uid)
        await forgotten(world)
        assert (await manager.guests.create()).name == "guest-2"
    reboot(world)
    async with world.manager() as manager:
        assert (await manager.guests.create()).name == "guest-3"


async def test_nothing_is_left_of_one_who_is_removed(world: World) -> None:
    async with world.manager() as manager:
        guest = await manager.guests.create()
        kept = world.state / f"kept/{guest.uid}/volatile"
        kept.mkdir(parents=True)
        await manager.guests.remove(guest.uid)
        assert belongings(world).log == ["processes", "files"]
        assert names(world.directory / "homes") == names(world.directory / "userdb") == set()
        assert not kept.parent.exists()
        assert manager.guests.names == []
        await forgotten(world)
        assert belongings(world).searched == [guest.uid]
        await until(lambda: not manager.guests.is_guest(guest.uid))
        await manager.guests.remove(guest.uid)  # LightDM does that as well
        assert manager.guests.uid_of("guest-1") == guest.uid


async def test_removals_at_the_same_time_are_one(world: World) -> None:
    async with world.manager() as manager:
        guest = await manager.guests.create()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(manager.guests.remove, guest.uid)
        await forgotten(world)
        assert belongings(world).log == ["processes", "files"]
        assert belongings(world).searched == [guest.uid]


@pytest.mark.parametrize(
    "name", ["root", "guest-2", "guest-0", "guest-01", "guest-", "guest-1\n", "guest-" + "9" * 5000]
)
async def test_who_is_no_guest_is_not_removed(world: World, name: str) -> None:
    async with world.manager() as manager:
        await manager.guests.create()
        with pytest.raises(InvalidName, match="the guests are: guest-1"):
            manager.guests.uid_of(name)
        await manager.guests.remove(Uid(0))
        assert manager.guests.names == ["guest-1"]
        assert belongings(world).log == []


async def test_there_is_a_limit(world: World) -> None:
    config = world.config().model_dump(mode="json", exclude_unset=True)
    config["guests"]["limit"] = 2
    async with world.manager(Config.model_validate(config)) as manager:
        for _ in range(2):
            await manager.guests.create()
        with pytest.raises(Failed, match="the most that there may be"):
            await manager.guests.create()
        config["guests"]["limit"] = 3
        await manager.reload(Config.model_validate(config))
        assert (await manager.guests.create()).name == "guest-3"


@pytest.mark.parametrize("what", ["directory", "link", "dangling", "user"])
async def test_what_is_there_already_is_left_alone(
    world: World, expect_log: Callable[[str], None], what: str
) -> None:
    others = world.directory / "others"
    others.mkdir()
    (others / "file").touch()
    match what:
        case "directory":
            home(world, 1).mkdir()
            (home(world, 1) / "file").touch()
        case "link":
            home(world, 1).symlink_to(others)
        case "dangling":
            home(world, 1).symlink_to(world.directory / "missing")
        case _:
            records(world).taken.add("guest-1")
    before = names(world.directory / "homes")
    async with world.manager() as manager:
        assert (await manager.guests.create()).name == "guest-2"
        expect_log("guest-1 already; it is left out")
        await manager.guests.remove(Uid(NOBODY + 2))
        await forgotten(world)
        # Its number has been passed over, but nobody was made with it.
        await manager.guests.remove(Uid(NOBODY + 1))
    assert names(world.directory / "homes") == before
    assert names(others) == {"file"}
    assert others.stat().st_uid == 0


async def test_homes_are_only_made_where_only_root_writes(world: World) -> None:
    (world.directory / "homes").chmod(0o777)
    async with world.manager() as manager:
        with pytest.raises(Failed, match="others than root may write to"):
            await manager.guests.create()
    assert names(world.directory / "homes") == set()


@pytest.mark.parametrize("trouble", ["unknown", "full", "no skeleton"])
async def test_who_cannot_be_made_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    errors: dict[str, type[Exception]] = {"unknown": NotSupported, "full": NoSpace}
    if trouble == "unknown":
        monkeypatch.setattr(
            UnknownUserRecords,
            "_require_known",
            lambda self, account: super(UnknownUserRecords, self)._require_known(account),
        )
    elif trouble == "full":

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copy2", full)
    else:
        shutil.rmtree(world.directory / "skeleton")
    async with world.manager() as manager:
        with pytest.raises(errors.get(trouble, Failed)):
            await manager.guests.create()
        assert names(world.directory / "homes") == set()
        assert manager.guests.names == []
        await forgotten(world)
    userdb = world.directory / "userdb"
    assert not userdb.exists() or names(userdb) == set()


async def test_a_full_disk_takes_no_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.manager() as manager:
        with monkeypatch.context() as patched:

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patched.setattr(durable, "replace", full)
            with pytest.raises(NoSpace):
                await manager.guests.create()
        assert names(world.directory / "homes") == set()
        assert (await manager.guests.create()).name == "guest-1"


async def test_what_cannot_be_removed_is_tried_again(
    world: World, expect_log: Callable[[str], None]
) -> None:
    async with world.manager() as manager:
        guest = await manager.guests.create()
        belongings(world).failures.append("/var/tmp/hers: Device or resource busy")
        with pytest.raises(Failed, match=r"not all .* /var/tmp/hers"):
            await manager.guests.remove(guest.uid)
        expect_log("/var/tmp/hers")
        assert manager.guests.names == []
        assert manager.guests.is_guest(guest.uid)
        await until(lambda: belongings(world).searched)
    belongings(world).failures.clear()
    async with world.manager():
        await forgotten(world)
    assert belongings(world).searched == [guest.uid, guest.uid]


async def test_a_reboot_ends_guests_and_their_sessions(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.manager() as manager:
        await with_sessions(manager, monkeypatch)
        (home(world, 1) / "file").touch()
    reboot(world)
    async with world.manager() as manager:
        assert manager.guests.names == []
        await forgotten(world)
        assert set(manager.sessions) == {"root"}
        assert names(world.directory / "homes") == set()


async def with_sessions(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> Account:
    """Make a guest with a session on disk, and another session on disk, of root's."""
    guest = await manager.guests.create()
    monkeypatch.setattr("sessiond.session.manager.find_account", lambda _: guest)
    await manager.create(guest.name, "lasting", session_id="guest")
    monkeypatch.setattr("sessiond.session.manager.find_account", accounts.find_account)
    await manager.create("root", "lasting", session_id="root")
    return guest


async def test_a_removal_ends_sessions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.manager() as manager:
        guest = await with_sessions(manager, monkeypatch)
        end = manager._services.surroundings.belongings.remove

        def remove(account: Account, home: Path, apart: Collection[Path]) -> list[str]:
            assert SessionId("guest") not in manager.sessions
            return end(account, home, apart)

        monkeypatch.setattr(belongings(world), "remove", remove)
        await manager.guests.remove(guest.uid)
        assert set(manager.sessions) == {"root"}


@pytest.mark.parametrize("has", ["nothing", "processes", "session"])
async def test_another_manager_leaves_guests_who_are_there(
    world: World, monkeypatch: pytest.MonkeyPatch, has: str
) -> None:
    async with world.crashing_manager() as manager:
        if has == "session":
            guest = await with_sessions(manager, monkeypatch)
        else:
            guest = await manager.guests.create()
    if has == "processes":
        belongings(world).busy.add(guest.uid)
    async with world.manager() as manager:
        if has == "nothing":
            await forgotten(world)
        assert manager.guests.names == ([] if has == "nothing" else ["guest-1"])
        assert home(world, 1).exists() == (has != "nothing")
        assert ("guest" in manager.sessions) == (has == "session")


@pytest.mark.parametrize("text", ["", "{}x", '{"format": 2}', '{"next": 0}', '{"guests": [{}]}'])
async def test_a_damaged_file_makes_no_guests(
    world: World, expect_log: Callable[[str], None], text: str
) -> None:
    world.state.mkdir()
    file = world.state / "guests.json"
    file.write_text(text)
    async with world.manager() as manager:
        expect_log("guests.json cannot be read")
        with pytest.raises(Failed, match=r"guests\.json cannot be read"):
            await manager.guests.create()
        with pytest.raises(Failed, match=r"guests\.json cannot be read"):
            manager.guests.uid_of("guest-1")
        await manager.create("root", "volatile")
    assert file.read_text() == text
