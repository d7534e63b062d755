"""The connection itself: what is lost, late, too much or forged."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from sessiond.bus import connection as connection_module
from sessiond.bus import names, signals
from sessiond.bus.connection import Connection, Reply, connect
from sessiond.bus.signals import Match
from sessiond.bus.transport import ADDRESS_VARIABLE, socket_names
from sessiond.bus.wire import BusError, Message
from sessiond.errors import ConfigError, Unreachable
from tests.support.bus import start_private_bus
from tests.support.waiting import until

PATH = "/test"
INTERFACE = "test.Interface"


def descriptors() -> set[str]:
    """Return what this process has open, apart from what is made to look."""
    gc.collect()  # what other tests have left behind
    return {
        f"{entry}:{os.readlink(f'/proc/self/fd/{entry}')}"
        for entry in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{entry}")
    }


async def echo(_connection: Connection, message: Message) -> Reply:
    return message.signature, message.values()


async def ignore(_connection: Connection, _message: Message) -> Reply:
    return "", []


async def never(_connection: Connection, _message: Message) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


async def give_pipe(_connection: Connection, _message: Message) -> Reply:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.write(writer, b"hello")
    os.close(writer)
    return "h", [reader]


async def fault(_connection: Connection, _message: Message) -> Reply:
    raise ZeroDivisionError("a secret")


async def test_a_call_is_answered(private_bus: str) -> None:
    async with connect(handler=echo) as service, connect() as caller:
        values = await caller.call(
            service.unique_name, PATH, INTERFACE, "Echo", "sas", "x", ["y", "z"]
        )
        assert values == ("x", ["y", "z"])


async def test_a_call_without_an_answer_ends(private_bus: str) -> None:
    async with connect(handler=never) as service, connect() as caller:
        with pytest.raises(Unreachable, match="has not answered Never within"):
            await caller.call(service.unique_name, PATH, INTERFACE, "Never", timeout=0.01)


async def test_a_call_can_be_cancelled(private_bus: str) -> None:
    async with connect(handler=never) as service, connect() as caller:
        with trio.move_on_after(0.01) as scope:
            await caller.call(service.unique_name, PATH, INTERFACE, "Never", timeout=math.inf)
        assert scope.cancelled_caught
        assert await caller.call_bus("GetId")


async def test_a_caller_is_told_when_the_service_vanishes(private_bus: str) -> None:
    async with connect() as caller, trio.open_nursery() as nursery:

        async def call(service: str) -> None:
            with pytest.raises(BusError) as caught:
                await caller.call(service, PATH, INTERFACE, "Never")
            assert caught.value.name == "org.freedesktop.DBus.Error.NoReply"

        async with connect(handler=never) as service:
            nursery.start_soon(call, service.unique_name)
            await until(service._calls.total)


async def test_a_fault_is_logged_and_told_without_detail(
    private_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(handler=fault) as service, connect() as caller:
        with pytest.raises(BusError) as caught:
            await caller.call(service.unique_name, PATH, INTERFACE, "Fault")
    assert caught.value.name == "org.freedesktop.DBus.Error.Failed"
    assert "secret" not in caught.value.text
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "test.Interface.Fault on /test" in record.message
    assert record.exc_info is not None


async def test_an_answer_that_does_not_fit_is_a_fault(
    private_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def misfit(_connection: Connection, _message: Message) -> Reply:
        return "u", ["no number"]

    async with connect(handler=misfit) as service, connect() as caller:
        with pytest.raises(BusError, match="Internal error"):
            await caller.call(service.unique_name, PATH, INTERFACE, "Misfit")
    assert "Misfit" in caplog.text


async def test_descriptors_travel_and_do_not_leak(private_bus: str) -> None:
    async with connect(handler=give_pipe) as service, connect() as caller:
        before = descriptors()
        for _ in range(300):
            (descriptor,) = await caller.call(service.unique_name, PATH, INTERFACE, "Give")
            assert isinstance(descriptor, int)
            assert not os.get_inheritable(descriptor)
            assert os.read(descriptor, 100) == b"hello"
            os.close(descriptor)
        await until(lambda: descriptors() == before)


async def test_descriptors_that_nobody_wants_are_closed(private_bus: str) -> None:
    async with connect(handler=ignore) as service, connect() as caller:
        before = descriptors()

        def null() -> int:
            return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

        async with caller.signals(Match(service.unique_name)) as heard:
            for _ in range(50):
                with pytest.raises(BusError):
                    await caller.call("no.such.Name", PATH, INTERFACE, "Take", "h", null())
                await caller.call(service.unique_name, PATH, INTERFACE, "Take", "h", null())
                service.emit(PATH, INTERFACE, "Take", "h", null())
                await anext(heard)
        await until(lambda: descriptors() == before)


async def test_nothing_is_left_open(private_bus: str) -> None:
    before = descriptors()
    async with (
        connect(handler=give_pipe) as service,
        connect() as caller,
        caller.signals(Match(service.unique_name)),
    ):
        caller.emit(PATH, INTERFACE, "Signal")
    assert descriptors() == before


async def test_a_long_call_is_refused_unread(private_bus: str) -> None:
    async with connect(handler=echo) as service, connect() as caller:
        with pytest.raises(BusError, match="at most 65536 are read") as caught:
            await caller.call(service.unique_name, PATH, INTERFACE, "Echo", "s", "x" * (2 << 20))
        assert caught.value.name == names.LIMITS_EXCEEDED
        assert await caller.call(service.unique_name, PATH, INTERFACE, "Echo", "s", "x") == ("x",)


async def test_calls_beyond_the_limit_are_refused(
    private_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "CALLS_AT_ONCE", 2)
    async with (
        connect(handler=never) as service,
        connect() as caller,
        trio.open_nursery() as nursery,
    ):
        for _ in range(2):
            nursery.start_soon(caller.call, service.unique_name, PATH, INTERFACE, "Never")
        await until(lambda: service._calls.total() == 2)
        with pytest.raises(BusError) as caught:
            await caller.call(service.unique_name, PATH, INTERFACE, "Never")
        assert caught.value.name == names.LIMITS_EXCEEDED
        nursery.cancel_scope.cancel()


async def test_callers_wait_for_room(private_bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "QUEUE_LIMIT", 1)
    async with (
        connect(handler=echo) as service,
        connect() as caller,
        trio.open_nursery() as nursery,
    ):
        for _ in range(100):
            nursery.start_soon(
                caller.call, service.unique_name, PATH, INTERFACE, "Echo", "s", "x" * 10_000
            )


async def test_a_bus_that_takes_nothing_is_given_up(
    private_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "QUEUE_HARD_LIMIT", 1000)

    async def flood() -> None:
        async with connect() as connection:
            for _ in range(100):
                connection.emit(PATH, INTERFACE, "Signal", "s", "x" * 100)
            await trio.sleep_forever()

    with pytest.raises(Unreachable, match=r"left \d+ bytes unread"):
        await flood()


async def test_bursts_are_survived(private_bus: str) -> None:
    async with connect(handler=echo) as service, connect() as caller:
        match = Match(service.unique_name, path=PATH)
        async with caller.signals(match) as heard, trio.open_nursery() as nursery:

            async def call(number: int) -> None:
                for _ in range(50):
                    values = await caller.call(
                        service.unique_name, PATH, INTERFACE, "Echo", "i", number
                    )
                    assert values == (number,)

            for number in range(20):
                nursery.start_soon(call, number)
            for number in range(3000):
                service.emit(PATH, INTERFACE, "Signal", "i", number)
            for number in range(3000):
                assert (await anext(heard)).values() == (number,)


async def test_only_wanted_signals_are_heard(private_bus: str) -> None:
    async with connect() as service, connect() as listener:
        match = Match(service.unique_name, path_namespace="/a", member="Wanted")
        async with listener.signals(match) as heard:
            service.emit("/a", INTERFACE, "Unwanted")
            service.emit("/ab", INTERFACE, "Wanted", "s", "elsewhere")
            service.emit("/a/b", INTERFACE, "Wanted", "s", "here")
            assert (await anext(heard)).values() == ("here",)


async def test_forged_signals_are_not_heard(private_bus: str) -> None:
    async with connect() as service, connect() as listener:
        assert await service.request_name("test.Name")
        async with listener.signals(Match("test.Name", path=PATH)) as heard:
            await trio.run_process(
                [
                    *("gdbus", "emit", "--system", "--dest", listener.unique_name),
                    *("--object-path", PATH, "--signal", f"{INTERFACE}.Done", "'forged'"),
                ]
            )
            service.emit(PATH, INTERFACE, "Done", "s", "true")
            assert (await anext(heard)).values() == ("true",)


async def test_a_listener_is_told_when_the_sender_vanishes(private_bus: str) -> None:
    async with connect() as listener:
        async with connect() as service:
            assert await service.request_name("test.Name")
            subscription = listener.signals(Match("test.Name"))
            heard = await subscription.__aenter__()
            service.emit(PATH, INTERFACE, "Last")
        assert (await anext(heard)).member == "Last"
        with pytest.raises(Unreachable, match=r"test\.Name has left the bus"):
            await anext(heard)
        await subscription.__aexit__(None, None, None)
        with pytest.raises(Unreachable, match="not on the bus"):
            async with listener.signals(Match("test.Name")):
                raise AssertionError


async def test_a_slow_listener_is_told_that_it_lost_signals(
    private_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SIGNALS_AT_ONCE", 3)
    async with (
        connect() as service,
        connect() as listener,
        listener.signals(Match(service.unique_name)) as heard,
    ):
        for _ in range(10):
            service.emit(PATH, INTERFACE, "Signal")
        await service.call_bus("GetId")
        await listener.call_bus("GetId")
        for _ in range(3):
            await anext(heard)
        with pytest.raises(Unreachable, match="lost"):
            await anext(heard)


async def test_the_body_ends_with_the_bus(bus_directory: Path) -> None:
    async def outlive_the_bus() -> None:
        with ExitStack() as stack:
            address = stack.enter_context(start_private_bus(bus_directory))
            async with connect(address):
                stack.close()
                await trio.sleep_forever()

    with pytest.raises(Unreachable, match="lost: the bus has closed the connection"):
        await outlive_the_bus()


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
async def test_an_error_of_the_body_comes_out_unwrapped(
    private_bus: str, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        async with connect():
            raise error


async def test_peers_are_known_by_uid(private_bus: str) -> None:
    async with connect() as connection:
        assert await connection.uid_of(connection.unique_name) == os.geteuid()
        with pytest.raises(BusError):
            await connection.uid_of(":1.9999")


@pytest.mark.parametrize(
    ("address", "sockets"),
    [
        ("unix:path=/run/a%20b", ["/run/a b"]),
        ("unix:abstract=/tmp/x,guid=12", ["\0/tmp/x"]),
        ("tcp:host=a,port=1;unix:guid=1,path=/b;unix:path=/c;", ["/b", "/c"]),
    ],
)
def test_addresses(address: str, sockets: list[str]) -> None:
    assert socket_names(address) == sockets


@pytest.mark.parametrize("address", ["tcp:host=a,port=1", "nonsense", "unix:runtime=yes"])
async def test_an_unusable_address_is_a_mistake_in_the_configuration(address: str) -> None:
    with pytest.raises(ConfigError, match=ADDRESS_VARIABLE):
        async with connect(address):
            raise AssertionError


def listening_nowhere(_directory: Path) -> str:
    return "gone"


def listening_to_something_else(directory: Path) -> str:
    path = directory / "file"
    path.touch()
    return "file"


@pytest.mark.parametrize("make", [listening_nowhere, listening_to_something_else])
async def test_no_bus_is_one_clear_sentence(
    bus_directory: Path, make: Callable[[Path], str]
) -> None:
    address = f"unix:path={bus_directory / make(bus_directory)}"
    with pytest.raises(Unreachable, match=f"no message bus at {address} .*systemctl start dbus"):
        async with connect(address):
            raise AssertionError


async def test_what_is_no_bus_is_not_taken_for_one(bus_directory: Path) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(bus_directory / "http"))
    listener.listen()

    async def serve() -> None:
        peer, _ = await listener.accept()
        with peer:
            await peer.recv(100)
            await peer.send(b"HTTP/1.1 400 Bad Request\r\n")
            await peer.recv(100)

    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with pytest.raises(Unreachable, match=r"HTTP/1\.1 400 Bad Request"):
                async with connect(f"unix:path={bus_directory / 'http'}"):
                    raise AssertionError


async def test_an_abstract_socket_will_do(bus_directory: Path) -> None:
    address = f"unix:abstract=sessiond-test-{os.getpid()}"
    with start_private_bus(bus_directory, address=address):
        async with connect(address) as connection:
            assert connection.unique_name.startswith(":")
