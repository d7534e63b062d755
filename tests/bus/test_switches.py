"""How a reset or restore is gone about: options and what is told of programs."""

from __future__ import annotations

import os
import re
import sys
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest
import trio

from sessiond.bus import client, names
from sessiond.bus.client import Client
from sessiond.bus.connection import connect
from sessiond.bus.interface import Caller, Interface, Property, method
from sessiond.bus.logind import LogindPresence
from sessiond.bus.objects import microseconds
from sessiond.bus.operations import INHIBITORS_OF_USER
from sessiond.bus.options import SwitchOptions, parse
from sessiond.bus.tree import ObjectTree
from sessiond.bus.wire import BusError
from sessiond.errors import Failed, InvalidName, InvalidOption, NotSupported
from sessiond.session.conflicts import Program
from sessiond.session.model import AT_ONCE, Manner, SessionId, SnapshotName, Uid
from sessiond.session.presence import Attendance
from sessiond.session.schedule import Why
from tests.bus.fake_manager import EPOCH, FakeManager
from tests.support.waiting import until

EDITOR = Program("edit\udcff", (11, 12), Uid(1000), "session-2.scope")


def manner(options: dict[str, object]) -> Manner:
    return parse(SwitchOptions, options).manner()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, AT_ONCE),
        ({"terminate": True}, Manner(terminate=True, grace=10)),
        ({"terminate": True, "grace": 3}, Manner(terminate=True, grace=3)),
        ({"grace": 0.5}, Manner(grace=0.5)),
        ({"snapshot-first": "kept"}, Manner(snapshot=SnapshotName("kept"))),
        ({"snapshot-first": True}, Manner(snapshot=True)),
        ({"snapshot-first": False}, AT_ONCE),
    ],
)
def test_options(options: dict[str, object], wanted: Manner) -> None:
    assert manner(options) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("terminate", 1),
        ("grace", -1),
        ("grace", 601),
        ("grace", float("nan")),
        ("grace", True),
        ("grace", "10"),
        ("snapshot-first", 1),
        ("snapshot_first", True),
        ("snapshot", "kept"),
    ],
)
def test_bad_options_are_named(key: str, value: object) -> None:
    with pytest.raises(InvalidOption, match=re.escape(repr(key))):
        manner({key: value})


@pytest.mark.parametrize("name", ["", "../etc", "a b", "x" * 65])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        manner({"snapshot-first": name})


async def test_options_reach_the_session(sessiond: Client, serving: FakeManager) -> None:
    serving.jobs_finish_at_once = True
    session = await sessiond.session("live")
    await session.snapshot("old")
    await session.reset(terminate=True, grace=3, snapshot_first="kept")
    await session.restore("old", terminate=True)
    wanted = Manner(terminate=True, grace=3, snapshot=SnapshotName("kept"))
    assert [job.manner for job in serving.jobs] == [wanted, Manner(terminate=True)]


async def test_programs_are_told(sessiond: Client, serving: FakeManager) -> None:
    serving.sessions["live"].programs = (EDITOR,)
    session = await sessiond.session("live")
    told = client.Program("edit\\udcff", [11, 12], 1000, "session-2.scope")
    assert await session.conflicts() == [told]
    job = await session.reset(terminate=True)
    serving.jobs[0].conflicts = (EDITOR,)
    serving.jobs[0].finish()
    assert (await job.info()).conflicts == (told,)


# Resets that come by themselves


async def test_a_reset_is_scheduled(sessiond: Client, serving: FakeManager) -> None:
    session = await sessiond.session("live")
    at = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    await session.schedule_reset(at, terminate=True)
    await session.schedule_reset(in_=90, warning=1.5)
    await session.schedule_reset(idle=600.0)
    await session.cancel_scheduled_reset()
    nothing = {"at": None, "after": None, "idle": None, "warning": None, "manner": AT_ONCE}
    uid = os.getuid()
    assert serving.sessions["live"].timer.asked == [
        (uid, nothing | {"at": at, "manner": Manner(terminate=True)}),
        (uid, nothing | {"after": 90, "warning": 1.5}),
        (uid, nothing | {"idle": 600}),
        (uid, {}),
    ]


async def test_a_time_beyond_all_calendars(sessiond: Client) -> None:
    with pytest.raises(BusError, match="too far away"):
        await sessiond._connection.call(
            names.BUS,
            names.session_path(SessionId("live")),
            names.SESSION,
            "ScheduleReset",
            "ta{sv}",
            2**64 - 1,
            {},
        )


async def test_it_is_told_before(sessiond: Client, serving: FakeManager) -> None:
    timer = serving.sessions["live"].timer
    async with sessiond.events() as events:
        timer.next_reset, timer.reason = EPOCH, Why.DAILY
        serving.tell("reset_scheduled", serving.sessions["live"], EPOCH, "daily")
        event = await anext(events)
    assert event.member == "ResetScheduled"
    assert event.arguments == (microseconds(EPOCH), "daily")
    info = await (await sessiond.session("live")).info()
    assert (info.next_reset, info.next_reset_reason) == (EPOCH, "daily")


async def test_an_inhibitor_is_there_until_it_is_closed(
    sessiond: Client, serving: FakeManager, nursery: trio.Nursery
) -> None:
    inhibitors = serving.sessions["live"].timer.inhibitors
    nursery.start_soon(inhibitors.watch)
    session = await sessiond.session("live")
    async with session.inhibit("Player", "A film"):
        (held,) = (await session.info()).inhibitors
        assert (held.who, held.why, held.uid) == ("Player", "A film", os.getuid())
    await until(lambda: not inhibitors.all)
    assert (await session.info()).inhibitors == ()


async def test_who_leaves_the_bus_holds_nothing(
    serving: FakeManager, nursery: trio.Nursery
) -> None:
    inhibitors = serving.sessions["live"].timer.inhibitors
    nursery.start_soon(inhibitors.watch)
    script = (
        "import trio; from sessiond.bus import client\n"
        "async def main():\n"
        "    async with client.connect() as c:\n"
        "        async with (await c.session('live')).inhibit('a', 'b'):\n"
        "            await trio.sleep_forever()\n"
        "trio.run(main)"
    )
    process = await trio.lowlevel.open_process([sys.executable, "-c", script])
    await until(lambda: inhibitors.all)
    process.kill()
    await process.wait()
    await until(lambda: not inhibitors.all)


async def test_inhibitors_are_limited(sessiond: Client, serving: FakeManager) -> None:
    session = await sessiond.session("live")
    async with AsyncExitStack() as stack:
        for _ in range(INHIBITORS_OF_USER):
            await stack.enter_async_context(session.inhibit("a", "b"))
        with pytest.raises(Failed, match="LimitsExceeded"):
            await stack.enter_async_context(session.inhibit("a", "b"))
    with pytest.raises(InvalidOption):
        await stack.enter_async_context(session.inhibit("a", "b" * 201))


# logind


class Login(Interface):
    """A part of logind's manager."""

    name = "org.freedesktop.login1.Manager"

    @method("GetUser", "u uid", "o user")
    async def get_user(self, _caller: Caller, uid: int) -> str:
        if uid != 1000:
            raise BusError("org.freedesktop.login1.NoSuchUser", "Nobody.")
        return "/org/freedesktop/login1/user/_1000"


class User(Interface):
    """A part of logind's users."""

    name = "org.freedesktop.login1.User"
    properties = (
        Property("State", "s"),
        Property("IdleHint", "b"),
        Property("IdleSinceHintMonotonic", "t"),
    )

    def __init__(self, values: dict[str, object]) -> None:
        self._values = values

    def property_values(self) -> dict[str, object]:
        return self._values


@pytest.mark.parametrize(
    ("uid", "state", "idle", "since", "expected"),
    [
        (1000, "active", False, 5_000_000, Attendance(logged_in=True)),
        (1000, "online", True, 5_500_000, Attendance(logged_in=True, idle_since=5.5)),
        (1000, "lingering", True, 0, Attendance(logged_in=False)),
        (1000, "closing", False, 0, Attendance(logged_in=False)),
        (1001, "active", False, 0, Attendance(logged_in=False)),
    ],
)
async def test_logind_knows_who_is_there(
    private_bus: str, uid: int, state: str, idle: bool, since: int, expected: Attendance
) -> None:
    tree = ObjectTree("/org/freedesktop/login1", lambda *_: None)
    tree.add("/org/freedesktop/login1", Login())
    values = {"State": state, "IdleHint": idle, "IdleSinceHintMonotonic": since}
    tree.add("/org/freedesktop/login1/user/_1000", User(values))
    async with connect(private_bus, handler=tree.handle) as bus:
        assert await bus.request_name("org.freedesktop.login1")
        assert await LogindPresence(private_bus).attendance(Uid(uid)) == expected


async def test_without_logind_nobody_knows(private_bus: str) -> None:
    with pytest.raises(NotSupported, match="logind"):
        await LogindPresence(private_bus).attendance(Uid(1000))
