"""A manager that dies while somebody logs in or out: the next one sees to it."""

from __future__ import annotations

import pwd
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import trio

from sessiond.session import logins
from sessiond.session.manager import Manager, Session
from sessiond.session.model import SessionState, Uid
from tests.crash import sessions
from tests.crash.sessions import LOGINS, Life, RealStorage
from tests.support.sessions import World
from tests.support.waiting import until


@pytest.fixture(params=LOGINS)
def user(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def nobody_is_here(tmp_path: Path) -> Iterator[None]:
    """Whoever was here when the manager died has gone before the next one looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logins, "USER_RUNTIME_DIRECTORIES", tmp_path)
        yield


def uid_of(user: str) -> Uid:
    return Uid(pwd.getpwnam(user).pw_uid)


async def enter(manager: Manager, user: str) -> Session:
    login = await manager.log_in(uid_of(user), 0)
    assert login.session is not None
    return login.session


def work(user: str) -> Life:
    """Return the life in which a user comes, and leaves something behind."""

    async def life(world: World, manager: Manager) -> None:
        session = await enter(manager, user)
        await world.mount(session.id).write("file", b"contents")

    return life


def come(user: str) -> Life:
    async def life(_: World, manager: Manager) -> None:
        await enter(manager, user)

    return life


def come_and_go(user: str) -> Life:
    async def life(_: World, manager: Manager) -> None:
        await enter(manager, user)
        await manager.log_out(uid_of(user))

    return life


async def after(top: Path, user: str) -> bool:
    """Have the next manager start, and the user come and go once more; return whether what they
    had left was there.
    """
    world = RealStorage(top)
    async with world.manager() as manager:
        lasting = LOGINS[user] == "lasting"
        if lasting:
            await until(lambda: all(map(is_at_rest, manager.sessions.values())))
        else:
            await until(lambda: not manager.sessions)
        session = await enter(manager, user)
        assert session.state is SessionState.ACTIVE
        found = (world.mount(session.id).stack.upper.fs / "file").exists()
        await manager.log_out(uid_of(user))
        assert is_at_rest(session) if lasting else not manager.sessions
        return found


def is_at_rest(session: Session) -> bool:
    return session.state is SessionState.INACTIVE


@pytest.mark.parametrize("life", [come, come_and_go])
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_death(scratch: str, user: str, life: Callable[[str], Life], every: int) -> None:
    lasting = LOGINS[user] == "lasting"
    for point in count(step=every):
        with sessions.machine(scratch, work(user)) as top:
            lived = sessions.die(top, life(user), die_at=point)
            assert trio.run(after, top, user) == lasting, lived.calls[-1]
        if not lived.died:
            break
    assert point > 5
