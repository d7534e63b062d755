"""The D-Bus methods of a running daemon, called with whatever D-Bus can carry."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.bus import names
from sessiond.bus.connection import Connection, connect
from sessiond.bus.interface import Interface
from sessiond.bus.objects import JobObject, ManagerObject, SessionObject, SnapshotObject
from sessiond.bus.wire import BusError, Variant
from tests.support import trees
from tests.support.daemon import Daemon, own_daemon
from tests.support.fuzzing import fuzz

pytestmark = pytest.mark.root

_SESSION = f"{names.ROOT_PATH}/session/victim"
_OBJECTS: tuple[tuple[str, type[Interface]], ...] = (
    (names.ROOT_PATH, ManagerObject),
    (_SESSION, SessionObject),
    (f"{_SESSION}/snapshot/first", SnapshotObject),
    (f"{names.ROOT_PATH}/job/1", JobObject),
)
_STANDARD = (
    (names.PROPERTIES, "Get", "ss"),
    (names.PROPERTIES, "GetAll", "s"),
    (names.PROPERTIES, "Set", "ssv"),
    (names.INTROSPECTABLE, "Introspect", ""),
    (names.OBJECT_MANAGER, "GetManagedObjects", ""),
    (names.PEER, "Ping", ""),
)

_TEXT = st.sampled_from(
    ["victim", "first", "second", "root", "guest", "nobody", "id", "description", "force", ""]
) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300)
_PLAIN = {
    "s": _TEXT,
    "u": st.integers(0, 2**32 - 1),
    "t": st.integers(0, 2**64 - 1),
    "i": st.integers(-(2**31), 2**31 - 1),
    "b": st.booleans(),
    "d": st.floats(),
    "o": st.sampled_from(["/", _SESSION]),
    "as": st.lists(_TEXT, max_size=3),
    "ay": st.binary(max_size=8),
    "h": st.builds(os.open, st.sampled_from(["/dev/null", "/", "/proc/self/mem"]), st.just(0)),
}
_VARIANTS = st.sampled_from(sorted(_PLAIN)).flatmap(
    lambda kind: st.builds(Variant, st.just(kind), _PLAIN[kind])
)
_BY_TYPE: dict[str, st.SearchStrategy[object]] = {
    **_PLAIN,
    "v": _VARIANTS | st.builds(Variant, st.just("v"), _VARIANTS),
    "a{sv}": st.just({}) | st.just({}) | st.dictionaries(_TEXT, _VARIANTS, max_size=3),
}


@st.composite
def _calls(draw: st.DrawFn) -> tuple[str, str, str, str, list[object]]:
    """Draw a call: path, interface, member, and arguments, mostly of the types that it takes."""
    path, offered = draw(st.sampled_from(_OBJECTS))
    if draw(st.integers(0, 3)):
        interface = offered.name
        member = draw(st.sampled_from(sorted(offered.methods)))
        types = [argument.type for argument in offered.methods[member].inputs]
    else:
        interface, member, text = draw(st.sampled_from(_STANDARD))
        types = list(text)
    if not draw(st.integers(0, 5)):
        types = draw(st.lists(st.sampled_from(sorted(_BY_TYPE)), max_size=4))
    values = [draw(_BY_TYPE[kind]) for kind in types]
    return path, interface, member, "".join(types), values


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon with the session ``kept``, which no call can name."""
    with own_daemon() as daemon:
        image = daemon.directory / "image"
        image.mkdir()
        trees.build({"motd": b"Welcome.\n"}, str(image))
        daemon.configure({"profile.guest": {"image": str(image), "size": "4M"}})
        daemon.start()
        daemon.sessionctl("create", "root", "guest", "--id", "kept")
        yield daemon
        assert daemon.sessions()["kept"]["state"] == "active"
        assert (daemon.root("kept") / "motd").read_bytes() == b"Welcome.\n"
        daemon.stop()


@given(st.lists(_calls(), min_size=4, max_size=12))
@fuzz(40)
async def test_any_call_is_answered(
    daemon: Daemon, calls: list[tuple[str, str, str, str, list[object]]]
) -> None:
    async with connect(daemon.environment["DBUS_SYSTEM_BUS_ADDRESS"]) as connection:
        await _answered(
            connection,
            names.ROOT_PATH,
            names.MANAGER,
            "CreateSession",
            "ssa{sv}",
            ["root", "guest", {"id": Variant("s", "victim")}],
        )
        for call in calls:
            await _answered(connection, *call)
    assert daemon.runs
    assert "Traceback" not in daemon.log()


async def _answered(
    connection: Connection,
    path: str,
    interface: str,
    member: str,
    types: str,
    values: list[object],
) -> None:
    """Call a method; a D-Bus error is an answer as well."""
    try:
        results = await connection.call(names.BUS, path, interface, member, types, *values)
    except BusError:
        return
    if (interface, member) == (names.SESSION, "OpenDiff"):
        (descriptor,) = results
        assert isinstance(descriptor, int)
        os.close(descriptor)
