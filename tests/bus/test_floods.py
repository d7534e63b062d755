"""Callers who ask for too much: they are refused, and all others are served."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from sessiond.bus import comparisons, connection, names
from sessiond.bus.connection import Connection, connect
from sessiond.bus.limits import Limit
from sessiond.bus.wire import BusError, Message
from sessiond.session.model import Uid
from tests.bus.fake_manager import FakeManager
from tests.support.users import NOBODY, acting_as
from tests.support.waiting import until

pytestmark = pytest.mark.root

OWNER = NOBODY
STRANGER = 1
"""A bus lets nobody in whom the user database does not know."""

SESSION_PATH = f"{names.ROOT_PATH}/session/live"


@asynccontextmanager
async def connected_as(uid: int) -> AsyncIterator[Connection]:
    """A connection that the bus takes for one of another user."""
    async with AsyncExitStack() as stack:
        with acting_as(uid):
            connected = await stack.enter_async_context(connect())
        yield connected


class Held:
    """A service whose method ``Hold`` is answered when the test says so."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.held = 0

    async def handle(self, _connection: Connection, message: Message) -> tuple[str, list[object]]:
        if message.member == "Hold":
            self.held += 1
            await self.gate.wait()
        return "", []


async def call(caller: Connection, service: Connection, member: str) -> str:
    """Return the name of the error that a call is answered with, or nothing."""
    try:
        await caller.call(service.unique_name, "/", "test.Interface", member)
    except BusError as error:
        return error.name
    return ""


async def test_a_user_has_so_many_calls_whatever_the_number_of_connections(
    private_bus: str, nursery: trio.Nursery
) -> None:
    held = Held()
    async with (
        connect(handler=held.handle) as service,
        connected_as(OWNER) as first,
        connected_as(OWNER) as second,
        connected_as(STRANGER) as other,
        connect() as root,
    ):
        for number in range(connection.CALLS_OF_USER):
            nursery.start_soon(call, (first, second)[number % 2], service, "Hold")
        await until(lambda: held.held == connection.CALLS_OF_USER)
        assert await call(first, service, "Ping") == names.LIMITS_EXCEEDED
        assert await call(second, service, "Ping") == names.LIMITS_EXCEEDED
        async with connected_as(OWNER) as third:
            assert await call(third, service, "Ping") == names.LIMITS_EXCEEDED
        assert await call(other, service, "Ping") == ""
        # From here on it is known to be root.
        assert await call(root, service, "Ping") == ""
        for _ in range(connection.CALLS_OF_USER + 1):
            nursery.start_soon(call, root, service, "Hold")
        await until(lambda: held.held == 2 * connection.CALLS_OF_USER + 1)
        held.gate.set()
        await until(lambda: service._calls.total() == 0)
        assert await call(first, service, "Ping") == ""


async def test_a_flood_of_one_connection_is_refused_and_others_are_served(
    private_bus: str, nursery: trio.Nursery
) -> None:
    """All calls are sent before the bus can have told who sends them."""
    held = Held()
    outcomes: list[str] = []

    async def flood(caller: Connection) -> None:
        outcomes.append(await call(caller, service, "Hold"))

    async with (
        connect(handler=held.handle) as service,
        connected_as(OWNER) as flooder,
        connected_as(STRANGER) as other,
    ):
        for _ in range(2000):
            nursery.start_soon(flood, flooder)
        await until(lambda: held.held)
        assert await call(other, service, "Ping") == ""
        await until(lambda: len(outcomes) == 2000 - connection.CALLS_OF_USER)
        assert set(outcomes) == {names.LIMITS_EXCEEDED}
        assert held.held == connection.CALLS_OF_USER
        held.gate.set()
        await until(lambda: len(outcomes) == 2000)


async def test_callers_whom_the_bus_has_yet_to_name_share_a_part_of_all_calls(
    private_bus: str, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CALLS_OF_STRANGERS", 3)
    named = trio.Event()
    held = Held()
    held.gate.set()
    async with (
        connect(handler=held.handle) as service,
        connected_as(OWNER) as known,
        connected_as(STRANGER) as new,
        connected_as(STRANGER) as newer,
    ):
        assert await call(known, service, "Ping") == ""
        uid_of = service.uid_of

        async def uid_of_later(unique_name: str) -> int:
            if unique_name != known.unique_name:
                await named.wait()
            return await uid_of(unique_name)

        monkeypatch.setattr(service, "uid_of", uid_of_later)
        for _ in range(3):
            nursery.start_soon(call, new, service, "Hold")
        await until(lambda: service._calls_of_strangers.total() == 3)
        assert await call(newer, service, "Ping") == names.LIMITS_EXCEEDED
        assert await call(known, service, "Ping") == ""
        named.set()
        await until(lambda: held.held == 3)
        assert await call(newer, service, "Ping") == ""


async def compare(caller: Connection, path: str, member: str) -> tuple[object, ...]:
    return await caller.call(names.BUS, path, names.SESSION, member, "a{sv}", {})


async def test_comparisons_have_limits_for_each_user_and_session(
    serving: FakeManager, nursery: trio.Nursery
) -> None:
    """Root's do not count for the owner, and neither keeps the other from comparing or closing."""
    session = serving.sessions["live"]
    other = serving.add("other")
    other.uid = session.uid = Uid(OWNER)
    session.diff_body = other.diff_body = lambda _target: trio.sleep_forever()
    session.changes_gate = trio.Event()
    opened: list[object] = []
    of_user, of_session = comparisons.COMPARISONS_OF_USER, comparisons.COMPARISONS_OF_SESSION
    async with connected_as(OWNER) as owner, connect() as root:
        nursery.start_soon(compare, owner, SESSION_PATH, "Changes")
        await until(lambda: session.changes_gate.statistics().tasks_waiting)
        for _ in range(of_user - 1):
            opened += await compare(owner, SESSION_PATH, "OpenDiff")
        for path in (SESSION_PATH, f"{names.ROOT_PATH}/session/other"):
            for member in ("Changes", "OpenDiff"):
                with pytest.raises(BusError, match="8 comparisons") as caught:
                    await compare(owner, path, member)
                assert caught.value.name == names.LIMITS_EXCEEDED
        for _ in range(of_session - of_user):
            opened += await compare(root, SESSION_PATH, "OpenDiff")
        with pytest.raises(BusError, match="16 comparisons of that session") as caught:
            await compare(root, SESSION_PATH, "OpenDiff")
        assert caught.value.name == names.LIMITS_EXCEEDED
        session.changes_gate.set()
        await until(lambda: not session.changes_gate.statistics().tasks_waiting)
        await compare(owner, SESSION_PATH, "Changes")
        await owner.call(names.BUS, SESSION_PATH, names.SESSION, "Close", "a{sv}", {})
    for descriptor in opened:
        assert isinstance(descriptor, int)
        os.close(descriptor)


async def test_who_vanishes_has_its_share_until_its_call_ends(serving: FakeManager) -> None:
    session = serving.sessions["live"]
    session.changes_gate = trio.Event()
    async with connected_as(OWNER) as owner:
        for _ in range(comparisons.COMPARISONS_OF_USER):
            async with trio.open_nursery() as nursery:
                waiting = session.changes_gate.statistics().tasks_waiting
                nursery.start_soon(compare, owner, SESSION_PATH, "Changes")
                await until(
                    lambda: session.changes_gate.statistics().tasks_waiting > waiting  # noqa: B023
                )
                nursery.cancel_scope.cancel()
    async with connected_as(OWNER) as owner:
        with pytest.raises(BusError, match="8 comparisons"):
            await compare(owner, SESSION_PATH, "Changes")
        session.changes_gate.set()
        await until(lambda: not session.changes_gate.statistics().tasks_waiting)
        await compare(owner, SESSION_PATH, "Changes")


def test_a_share_is_given_back_whatever_happens() -> None:
    limit = Limit(1, "At most {most}.", exempt={0})
    with limit.share(7), limit.share(0), limit.share(0), limit.share(8):
        assert limit.total() == 4
        with pytest.raises(BusError, match=r"At most 1\."), limit.share(7):
            raise AssertionError
    with pytest.raises(ZeroDivisionError), limit.share(7):
        raise ZeroDivisionError
    assert limit.total() == 0
