"""Names and options that no sensible program sends."""

from __future__ import annotations

import pytest

from sessiond.bus import names, wire
from sessiond.bus.client import Client
from sessiond.bus.options import CreateOptions, NoOptions, SnapshotOptions, parse
from sessiond.bus.transport import Transport
from sessiond.bus.wire import BusError, Kind, Message, Variant
from sessiond.errors import (
    Failed,
    InvalidName,
    InvalidOption,
    NoSuchProfile,
    NoSuchSession,
    NoSuchSnapshot,
    SessionExists,
    SnapshotExists,
)
from tests.bus.fake_manager import FakeManager

BAD_NAMES = [
    "",
    "/",
    "a/b",
    ".",
    "..",
    "../../etc",
    "-rf",
    "a b",
    "a\n",
    "\x1b[31m",
    "é",
    "\udcff",
    "a\0b",
    "x" * 65,
    "x" * 60_000,
]


def short(name: str) -> str:
    return ascii(name[:12])


@pytest.mark.parametrize("name", BAD_NAMES, ids=short)
async def test_bad_names_are_refused_everywhere(
    sessiond: Client, serving: FakeManager, name: str
) -> None:
    session = await sessiond.session("live")
    with pytest.raises(InvalidName):
        await sessiond.session(name)
    with pytest.raises(InvalidName):
        await sessiond.create("nobody", "live", session_id=name)
    with pytest.raises(InvalidName):
        await session.snapshot(name)
    await session.snapshot("fresh")
    with pytest.raises(InvalidName):
        await session.snapshot_named("fresh").rename(name)
    with pytest.raises((InvalidName, NoSuchSnapshot)):
        await session.restore(name)
    assert list(serving.sessions) == ["live"]
    assert list(serving.sessions["live"].snapshots) == ["fresh"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=short)
async def test_bad_profiles_are_unknown(sessiond: Client, name: str) -> None:
    with pytest.raises((NoSuchProfile, InvalidName)):
        await sessiond.create("nobody", name)


async def test_a_name_of_two_mebibytes(sessiond: Client) -> None:
    with pytest.raises(Failed, match="at most 65536 are read"):
        await sessiond.session("x" * (2 << 20))
    assert len(await sessiond.sessions()) == 1


async def test_a_name_too_long_for_any_bus(sessiond: Client) -> None:
    with pytest.raises(InvalidName, match="too long"):
        await sessiond.session("x" * (20 << 20))
    assert len(await sessiond.sessions()) == 1


async def test_bytes_that_are_not_utf8_do_not_reach_us(
    sessiond: Client, serving: FakeManager, private_bus: str
) -> None:
    body, _ = wire.pack("s", ["live"])
    call = wire.encode(
        Message(
            kind=Kind.CALL,
            serial=1,
            destination=names.BUS,
            path=names.ROOT_PATH,
            interface=names.MANAGER,
            member="GetSession",
            signature="s",
            body=body.replace(b"live", b"\xff\xfe\xfd\xfc"),
        )
    )
    rude = await Transport.connect(private_bus)
    await rude.send(call, ())
    with pytest.raises((EOFError, OSError)):
        await rude.receive()
    rude.close()
    assert len(await sessiond.sessions()) == 1


async def test_one_of_each_that_does_not_exist_or_does(sessiond: Client) -> None:
    session = await sessiond.session("live")
    with pytest.raises(NoSuchSession):
        await sessiond.session("gone")
    with pytest.raises(NoSuchSession):
        await sessiond.session_of(4711)
    with pytest.raises(NoSuchSnapshot):
        await session.restore("gone")
    with pytest.raises(NoSuchSnapshot, match="no snapshot 'gone' of a session 'live'"):
        await session.snapshot_named("gone").delete()
    with pytest.raises(NoSuchProfile):
        await sessiond.create("nobody", "gone")
    with pytest.raises(SessionExists):
        await sessiond.create("nobody", "live", session_id="live")
    await session.snapshot("fresh")
    with pytest.raises(SnapshotExists):
        await session.snapshot("fresh")


@pytest.mark.parametrize(
    ("member", "arguments"),
    [
        ("CreateSession", ("ssa{sv}", "nobody", "live")),
        ("ResetSession", ("sa{sv}", "live")),
        ("SnapshotSession", ("ssa{sv}", "live", "fresh")),
        ("PersistSession", ("sa{sv}", "live")),
        ("CloseSession", ("sa{sv}", "live")),
    ],
)
async def test_unknown_options_are_refused(
    sessiond: Client, serving: FakeManager, member: str, arguments: tuple[str, ...]
) -> None:
    with pytest.raises(BusError, match="There is no option 'colour' here") as caught:
        await sessiond._connection.call(
            names.BUS,
            names.ROOT_PATH,
            names.MANAGER,
            member,
            *arguments,
            {"colour": Variant("s", "red")},
        )
    assert caught.value.name == "org.sessiond.Overlay1.Error.InvalidOption"
    assert list(serving.sessions) == ["live"]
    assert not serving.jobs


def test_the_complaint_tells_what_is_allowed() -> None:
    with pytest.raises(InvalidOption, match=r"'id' has to be a string: the session's id\."):
        parse(CreateOptions, {"id": 3})
    with pytest.raises(
        InvalidOption, match=r"Allowed: 'description', a string for people; 'pinned'"
    ):
        parse(SnapshotOptions, {"colour": "red"})
    with pytest.raises(InvalidOption, match="Allowed: none"):
        parse(NoOptions, {"force": True})


@pytest.mark.parametrize("value", [None, 1, True, 1.5, b"x", ["x"], {"x": "y"}])
def test_options_of_another_type_are_refused(value: object) -> None:
    with pytest.raises(InvalidOption, match="'description' has to be"):
        parse(SnapshotOptions, {"description": value})
