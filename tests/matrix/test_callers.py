"""Each method, called by the session's user and by a stranger, with polkit and without."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from sessiond.bus.connection import Connection, connect
from sessiond.bus.transport import ADDRESS_VARIABLE
from sessiond.session.manager import Manager
from tests.matrix.conftest import MatrixWorld
from tests.matrix.methods import METHODS, By, Entry
from tests.matrix.stage import DONE, Stage
from tests.support.bus import start_private_bus
from tests.support.polkit import BUS_POLICY, start_polkit
from tests.support.users import acting_as

OWNER = 65534
STRANGER = 1
"""A bus lets nobody in whom the user database does not know."""
POLICY = Path(__file__).parents[2] / "packaging/dbus/org.sessiond.Overlay1.conf"


@pytest.fixture(params=[False, True], ids=["without-polkit", "with-polkit"])
def polkit(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def bus(polkit: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bus like the system's, with polkit or without; nobody is at the machine."""
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="sessiond-bus-", dir="/tmp")
        directory = Path(stack.enter_context(made))
        directory.chmod(0o755)
        policies = [POLICY, BUS_POLICY] if polkit else [POLICY]
        address = stack.enter_context(start_private_bus(directory, policy_files=policies))
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        if polkit:
            stack.enter_context(start_polkit(directory, address))
        yield


@asynccontextmanager
async def connected_as(uid: int) -> AsyncIterator[Connection]:
    """A connection that the bus takes for one of another user."""
    async with AsyncExitStack() as stack:
        with acting_as(uid):
            connected = await stack.enter_async_context(connect())
        yield connected


def allowed(entry: Entry, uid: int, polkit: bool) -> str:
    """Return what comes of a call."""
    if entry.by is By.ANYONE:
        return DONE
    if polkit:
        owners = uid == OWNER and entry.harmless
        return DONE if owners else "InteractiveAuthorizationRequired"
    return DONE if uid == OWNER and entry.by is By.OWNER else "NotAuthorized"


@pytest.mark.parametrize("uid", [OWNER, STRANGER], ids=["owner", "stranger"])
async def test_who_may(world: MatrixWorld, polkit: bool, uid: int) -> None:
    wrong = []
    async with world.served() as (manager, root), connected_as(uid) as caller:
        for entry in METHODS:
            stage = Stage(root, "s", user="root" if entry.maintenance else "nobody", uid=OWNER)
            # By the owner, if that is who asks then: what root has scheduled, only root can cancel.
            first = caller if uid == OWNER and not polkit else None
            await world.session(manager, stage, entry, by=first)
            before = known(manager)
            found, said = await stage.outcome(entry, by=caller)
            wanted = allowed(entry, uid, polkit)
            if found != wanted:
                wrong.append(f"{entry}: {wanted} expected, found {found}: {said}")
            elif wanted != DONE:
                assert f"As uid {uid} you may" in said
                assert known(manager) == before, str(entry)
            stage.close()
            for session in tuple(manager.sessions):
                await manager.close(session)
    assert not wrong, "\n".join(wrong)
    world.assert_nothing_left()


def known(manager: Manager) -> object:
    """Return all that a call could have changed."""
    return manager.maintenance, [
        (session.id, session.record, session.timer.inhibitors.all, session.last_job)
        for session in manager.sessions.values()
    ]
