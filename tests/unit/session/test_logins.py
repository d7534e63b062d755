"""Logins: who gets which session, for how long, and what becomes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sessiond.config import Config
from sessiond.errors import Busy, ImageUnavailable, InvalidOption, SessiondError
from sessiond.session import logins
from sessiond.session.manager import Manager, Session
from sessiond.session.model import SessionState, Uid
from tests.support.guests import FewBelongings
from tests.support.sessions import World
from tests.support.waiting import until

DAEMON, SYNC = Uid(1), Uid(4)
"""Users that every machine has."""


@pytest.fixture(autouse=True)
def user_runtime_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where systemd has a directory for each user whose manager runs."""
    directory = tmp_path / "user"
    (directory / str(DAEMON)).mkdir(parents=True)
    monkeypatch.setattr(logins, "USER_RUNTIME_DIRECTORIES", directory)
    return directory


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that lets users in."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process
        process.kill()


def config(world: World, **rules: dict[str, object]) -> Config:
    values = world.config().model_dump(mode="json", exclude_unset=True)
    return Config.model_validate({**values, "login": rules})


@asynccontextmanager
async def manager(world: World, profile: str, **rule: object) -> AsyncIterator[Manager]:
    """One for which `daemon` gets a session; left as a crash leaves it."""
    rules = {"daemons": {"user": "daemon", "profile": profile, **rule}}
    async with world.manager(config(world, **rules)) as manager:
        yield manager


def sessions(manager: Manager) -> list[Session]:
    return list(manager.sessions.values())


async def log_in(manager: Manager, uid: Uid = DAEMON, process: int = 0) -> Session:
    login = await manager.log_in(uid, process)
    assert login.session is not None
    assert login.warning == ""
    return login.session


@pytest.mark.parametrize("profile", ["volatile", "lasting"])
async def test_a_session_is_there_while_its_user_is(world: World, profile: str) -> None:
    async with manager(world, profile) as manager_:
        session = await log_in(manager_)
        assert (session.user, session.profile, session.state) == ("daemon", profile, "active")
        assert await log_in(manager_) is session
        await world.mount(session.id).write("file", b"contents")
        await manager_.log_out(DAEMON)
        if profile == "volatile":
            assert not sessions(manager_)
            assert not list((world.runtime / "sessions").iterdir())
            return
        assert session.state is SessionState.INACTIVE
        assert not world.mount(session.id).mounted
        assert "when daemon logs in" in session.failure
        assert await log_in(manager_) is session
        assert session.state is SessionState.ACTIVE
        assert session.failure == ""
        assert (world.mount(session.id).stack.upper.fs / "file").read_bytes() == b"contents"


async def test_a_process_keeps_a_session(world: World, process: subprocess.Popen[bytes]) -> None:
    async with manager(world, "volatile") as manager_:
        for _ in range(2):  # as sudo does
            session = await log_in(manager_, process=process.pid)
        await log_in(manager_)
        await manager_.log_out(DAEMON)
        assert sessions(manager_) == [session]
        process.kill()
        await until(lambda: not sessions(manager_))


async def test_nobody_logs_in_by_a_process_that_is_gone(
    world: World, expect_log: Callable[[str], None]
) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    async with manager(world, "volatile") as manager_:
        for pid in (process.pid, 2**32 - 1):
            with pytest.raises(InvalidOption, match=f"no process {pid}"):
                await manager_.log_in(DAEMON, pid)
            assert not sessions(manager_)
        expect_log("The login is refused")


async def test_who_has_no_session(world: World) -> None:
    rules: dict[str, dict[str, object]] = {
        "none": {"user": ["root", "bin"]},
        "all": {"profile": "volatile"},
        "group": {"user": ["sync", "games"], "group": "nogroup", "profile": "volatile"},
        "guests": {"class": "guest", "user": "man", "profile": "volatile"},
    }
    found = {}
    async with world.manager(config(world, **rules)) as manager:
        for uid in (0, 2, 1, int(SYNC), 5, 6, 65534, 99_999_999):
            found[uid] = (await manager.log_in(Uid(uid), 0)).session is not None
    assert [uid for uid, session in found.items() if session] == [SYNC]


async def test_the_first_rule_counts(world: World) -> None:
    rules: dict[str, dict[str, object]] = {
        "first": {"user": "daemon"},
        "second": {"user": "daemon", "profile": "volatile"},
    }
    async with world.manager(config(world, **rules)) as manager:
        assert (await manager.log_in(DAEMON, 0)).session is None


@pytest.mark.parametrize("profile", ["volatile", "lasting"])
async def test_a_restart_finds_who_is_here(
    world: World, profile: str, process: subprocess.Popen[bytes]
) -> None:
    rules = {"all": {"user": ["daemon", "sync"], "profile": profile}}
    world.config = lambda **_: Config.model_validate(  # type: ignore[method-assign]
        {**values, "login": rules}
    )
    values = World.config(world).model_dump(mode="json", exclude_unset=True)
    async with world.crashing_manager() as before:
        here = (await log_in(before)).id
        await log_in(before, SYNC)
        other = await log_in(before, SYNC, process.pid)
        gone = other.id
    # The directory of `sync` is not there; and its process ends while nobody looks.
    process.kill()
    process.wait()
    async with world.manager() as manager:
        assert manager.get(here).state is SessionState.ACTIVE
        if profile == "volatile":
            await until(lambda: [*manager.sessions] == [here])
        else:
            await until(lambda: manager.get(gone).state is SessionState.INACTIVE)
            assert (await log_in(manager, SYNC)).id == gone


async def test_what_is_on_disk_stays_unmounted_until_its_user_comes(world: World) -> None:
    async with manager(world, "lasting") as before:
        session = await log_in(before)
        await world.mount(session.id).write("file", b"contents")
        await session.snapshots.make("one")
        await before.log_out(DAEMON)
    shutil.rmtree(world.runtime)
    world.mounter.mounts.clear()
    world.mounts.mounted.clear()
    async with manager(world, "lasting") as manager_:
        (session,) = sessions(manager_)
        assert session.state is SessionState.INACTIVE
        assert not world.mounter.mounts
        # It can be reset and tidied up, and is not mounted by that.
        await session.reset(started_by=Uid(0)).wait()
        await session.snapshots.delete("one")
        assert session.state is SessionState.INACTIVE
        assert not world.mounter.mounts
        with pytest.raises(SessiondError, match="is mounted when daemon logs in"):
            await session.differences.count()
        assert await log_in(manager_) is session
        assert not (world.mount(session.id).stack.upper.fs / "file").exists()


@pytest.mark.parametrize("otherwise", ["refuse", "unprotected"])
async def test_a_session_that_cannot_be_made(
    world: World, otherwise: str, expect_log: Callable[[str], None]
) -> None:
    async with manager(world, "volatile", otherwise=otherwise) as manager_:
        os.rename(world.image, world.directory / "elsewhere")
        if otherwise == "refuse":
            with pytest.raises(ImageUnavailable, match="cannot be read"):
                await manager_.log_in(DAEMON, 0)
        else:
            login = await manager_.log_in(DAEMON, 0)
            assert login.session is None
            assert "what you do stays" in login.warning
            assert "cannot be read" in login.warning
        expect_log("which login rule daemons asks for, cannot be made")
        assert not sessions(manager_)
        os.rename(world.directory / "elsewhere", world.image)
        session = await log_in(manager_)
        await manager_.log_out(DAEMON)
        assert session not in sessions(manager_)


async def test_no_new_session_during_a_maintenance(
    world: World, expect_log: Callable[[str], None]
) -> None:
    async with manager(world, "volatile") as manager_:
        manager_._maintenance.require_none = refuse  # type: ignore[method-assign]
        with pytest.raises(Busy):
            await manager_.log_in(DAEMON, 0)
        expect_log("An image is being maintained")


def refuse() -> None:
    raise Busy("An image is being maintained.")


async def test_what_was_asked_for_before_a_logout_is_finished(world: World) -> None:
    async with manager(world, "volatile") as manager_:
        session = await log_in(manager_)
        await world.mount(session.id).write("file", b"contents")
        job = session.persist(started_by=DAEMON)
        await manager_.log_out(DAEMON)
        await job.wait()
        assert session.state is SessionState.INACTIVE
        assert await log_in(manager_) is session
        copied = world.mount(session.id).stack.lowers[0]
        assert (copied / "file").read_bytes() == b"contents"


async def test_nothing_of_the_user_s_goes_on_where_the_image_is_uncovered(world: World) -> None:
    belongings = world.surroundings.belongings
    assert isinstance(belongings, FewBelongings)
    values = config(world).model_dump(mode="json", exclude_unset=True)
    image = str(world.image)
    values["profile"]["home"] = {"image": image, "mount_point": image}
    for profile, log in (("volatile", []), ("home", ["processes"])):
        values["login"] = {"all": {"user": "daemon", "profile": profile}}
        async with world.manager(Config.model_validate(values)) as manager:
            await log_in(manager)
            await manager.log_out(DAEMON)
            assert not sessions(manager)
            assert belongings.log == log


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="to give a home away takes root")
@pytest.mark.parametrize("has_manager", [False, True])
async def test_a_guest_who_has_gone_meanwhile(
    world: World,
    process: subprocess.Popen[bytes],
    has_manager: bool,
    user_runtime_directories: Path,
) -> None:
    """What they have left running does not keep them."""
    belongings = world.surroundings.belongings
    assert isinstance(belongings, FewBelongings)
    async with world.crashing_manager() as before:
        guest = await before.guests.create()
        await before.log_in(guest.uid, process.pid)
        if has_manager:
            await before.log_in(guest.uid, 0)
            (user_runtime_directories / str(guest.uid)).mkdir()
        belongings.busy.add(guest.uid)
    process.kill()
    process.wait()
    async with world.manager() as manager:
        await until(lambda: not manager.guests.names)


async def test_notes_that_are_not_understood(
    world: World, expect_log: Callable[[str], None]
) -> None:
    world.runtime.mkdir()
    (world.runtime / "logins.json").write_text('{"users": {"1": {"processes": "all"}}}')
    async with manager(world, "volatile") as manager_:
        await log_in(manager_)
    expect_log("logins.json is not understood")


async def test_the_image_of_each_user(world: World, expect_log: Callable[[str], None]) -> None:
    (world.directory / "daemon").mkdir()
    values = config(world).model_dump(mode="json", exclude_unset=True)
    image = str(world.directory / "{user}")
    values["profile"]["home"] = {"image": image, "mount_point": image}
    values["profile"]["home-elsewhere"] = {"image": image}
    values["login"] = {"all": {"user": ["daemon", "sync"], "profile": "home"}}
    async with world.manager(Config.model_validate(values)) as manager:
        session = await log_in(manager)
        assert session.record.source.path == world.directory / "daemon"
        assert session.mount_point == world.directory / "daemon"
        with pytest.raises(ImageUnavailable, match=f"is in session {session.id}"):
            await manager.create("daemon", "home-elsewhere")
        with pytest.raises(ImageUnavailable):
            await manager.log_in(SYNC, 0)
        expect_log("sync cannot be read")
