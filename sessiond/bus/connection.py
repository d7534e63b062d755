"""A trio-native connection to a message bus: calls out, calls in, signals both ways.

A connection lives within `async with connect(...)` and owns the tasks that work for it: one reads,
one writes, and one runs for each call that came in. When the bus goes away the body is cancelled
and `Unreachable` raised.

Nothing grows without bound. Calls that come in are refused beyond `CALLS_AT_ONCE`, beyond
`CALLS_OF_USER` of one user, and when longer than `CALL_SIZE_LIMIT`. Whoever calls or answers waits
while more than `QUEUE_LIMIT` bytes are still to be sent. Signals cannot wait, so a bus that takes
none of them for long is given up.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from sessiond.bus import names, wire
from sessiond.bus.limits import ROOT, Limit
from sessiond.bus.signals import Match, Signals
from sessiond.bus.transport import Transport, system_bus_address
from sessiond.bus.wire import BusError, Kind, Message, WireError
from sessiond.errors import Unreachable

log = logging.getLogger(__name__)

CALL_TIMEOUT = 25.0
"""Seconds to wait for an answer unless told otherwise; libdbus's and sd-bus's default."""

CALLS_AT_ONCE = 1024
CALLS_OF_USER = 64
"""For each user but root; also for each sender of whom the bus has yet to say which user it is."""
CALLS_OF_STRANGERS = 512
"""For all of those together."""
CALL_SIZE_LIMIT = 64 << 10
"""Longest body of a call that is read, in bytes; none of ours takes much more than a few names."""

QUEUE_LIMIT = 4 << 20
QUEUE_HARD_LIMIT = 16 * QUEUE_LIMIT
FLUSH_TIMEOUT = 2.0
"""Seconds that what is still to be sent has when the connection ends."""

_CREDENTIALS_KEPT = 1024

Reply = tuple[str, Sequence[object]]
"""Signature and values of an answer."""

CallHandler = Callable[["Connection", Message], Awaitable[Reply]]
"""Answers a call, or raises `BusError`. Does not close the message's descriptors."""


@dataclass(slots=True)
class _Pending:
    """A call that waits for its answer."""

    answered: trio.Event = field(default_factory=trio.Event)
    reply: Message | None = None


class Connection:
    """See the module. Made by `connect` only."""

    unique_name: str = ""
    interactive: bool = False
    """Calls let whoever is called have the user asked for a password, unless they say otherwise."""

    def __init__(self, transport: Transport, nursery: trio.Nursery, handler: CallHandler) -> None:
        self.failure: Unreachable | None = None
        self._transport = transport
        self._nursery = nursery
        self._handler = handler
        self._calls = Limit(
            CALLS_AT_ONCE, "{most} calls are being answered, which is the most. Try again later."
        )
        own = (
            "{most} of your calls are being answered, the most that a user may have. Wait for an "
            "answer, then try again."
        )
        self._calls_of_user = Limit(CALLS_OF_USER, own, exempt={ROOT})
        self._calls_of_stranger = Limit(CALLS_OF_USER, own)
        self._calls_of_strangers = Limit(
            CALLS_OF_STRANGERS, "{most} calls of new callers wait. Try again later."
        )
        self._last_serial = 0
        self._pending: dict[int, _Pending] = {}
        self._listeners: set[Signals] = set()
        self._uids: OrderedDict[str, int] = OrderedDict()
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._queued = 0
        self._ended = False
        self._filled = trio.lowlevel.ParkingLot()
        self._taken = trio.lowlevel.ParkingLot()

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *values: object,
        timeout: float = CALL_TIMEOUT,
        interactive: bool | None = None,
    ) -> tuple[object, ...]:
        """Call a method and return what it returned; the caller closes descriptors among that.

        `interactive`, if given, takes the place of the attribute.
        Raises `BusError` when it answers with an error, `Unreachable` when it does not answer
        within `timeout` seconds, `WireError` when `values` do not fit `signature`.
        """
        message = self._message(
            Kind.CALL, path, interface, member, signature, values, destination=destination
        )
        if self.interactive if interactive is None else interactive:
            message = replace(message, flags=wire.ALLOW_INTERACTIVE_AUTHORIZATION)
        pending = self._pending[message.serial] = _Pending()
        try:
            with trio.fail_after(timeout):
                await self._send(message)
                await pending.answered.wait()
            reply, pending.reply = pending.reply, None
        except trio.TooSlowError:
            raise Unreachable(
                f"{destination} has not answered {member} within {timeout:g} seconds."
            ) from None
        finally:
            del self._pending[message.serial]
            if pending.reply is not None:
                pending.reply.close()
        assert reply is not None
        return _result(reply)

    def call_unanswered(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *values: object,
    ) -> None:
        """Call a method, behind what was sent before, and do not wait. Raises `WireError`."""
        message = self._message(
            Kind.CALL, path, interface, member, signature, values, destination=destination
        )
        self._post(replace(message, flags=wire.NO_REPLY_EXPECTED))

    async def call_bus(
        self, member: str, signature: str = "", *values: object
    ) -> tuple[object, ...]:
        """Call a method of the bus itself; the same errors as `call`."""
        return await self.call(names.DBUS, names.DBUS_PATH, names.DBUS, member, signature, *values)

    async def request_name(self, name: str) -> bool:
        """Take a bus name and tell whether it is ours. Raises `BusError` when that is forbidden."""
        do_not_queue, primary_owner = 4, 1
        (outcome,) = await self.call_bus("RequestName", "su", name, do_not_queue)
        return outcome == primary_owner

    async def uid_of(self, unique_name: str) -> int:
        """Return the user id of a peer. Raises `BusError` when it has left the bus.

        Kept for those who called last: a bus never gives the same unique name twice.
        """
        if unique_name in self._uids:
            self._uids.move_to_end(unique_name)
            return self._uids[unique_name]
        (credentials,) = await self.call_bus("GetConnectionCredentials", "s", unique_name)
        uid = credentials.get("UnixUserID") if isinstance(credentials, dict) else None
        if not isinstance(uid, int):
            raise BusError(
                names.ACCESS_DENIED,
                f"The bus does not tell the user of {unique_name}.",
            )
        self._uids[unique_name] = uid
        if len(self._uids) > _CREDENTIALS_KEPT:
            self._uids.popitem(last=False)
        return uid

    @asynccontextmanager
    async def signals(self, match: Match) -> AsyncIterator[Signals]:
        """Listen to signals while the context is open.

        Raises `Unreachable` when the sender is not on the bus.
        """
        listener = Signals(match)
        owner_changed = Match(
            names.DBUS, interface=names.DBUS, member="NameOwnerChanged", arg0=match.sender
        )
        rules = [owner_changed.rule(), match.rule()]
        self._listeners.add(listener)
        try:
            for rule in rules:
                await self.call_bus("AddMatch", "s", rule)
            listener.follow(await self._owner_of(match.sender))
            yield listener
        finally:
            self._listeners.remove(listener)
            listener.close()
            for rule in rules:
                self._remove_match(rule)

    def emit(
        self, path: str, interface: str, member: str, signature: str = "", *values: object
    ) -> None:
        """Send a signal to all who listen, behind what was sent before. Raises `WireError`."""
        self._post(self._message(Kind.SIGNAL, path, interface, member, signature, values))

    def start_soon(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run a task, which must not raise, for as long as the connection."""
        self._nursery.start_soon(function, *arguments)

    async def _register(self) -> None:
        try:
            (unique_name,) = await self.call_bus("Hello")
        except BusError as error:
            raise Unreachable(f"The message bus does not let us in: {error.text}") from error
        self.unique_name = str(unique_name)

    async def _owner_of(self, name: str) -> str:
        if name == names.DBUS:
            return name
        try:
            (owner,) = await self.call_bus("GetNameOwner", "s", name)
        except BusError as error:
            raise Unreachable(f"{name} is not on the bus: {error.text}") from error
        return str(owner)

    def _remove_match(self, rule: str) -> None:
        self.call_unanswered(names.DBUS, names.DBUS_PATH, names.DBUS, "RemoveMatch", "s", rule)

    def _message(
        self,
        kind: Kind,
        path: str,
        interface: str,
        member: str,
        signature: str,
        values: Sequence[object],
        destination: str = "",
    ) -> Message:
        body, descriptors = wire.pack(signature, values)
        return Message(
            kind=kind,
            serial=self._next_serial(),
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body,
            descriptors=descriptors,
        )

    def _next_serial(self) -> int:
        self._last_serial = self._last_serial % 0xFFFFFFFF + 1
        return self._last_serial

    async def _send(self, message: Message) -> None:
        """Send a message once there is room; its descriptors are closed whatever happens."""
        try:
            while self._queued > QUEUE_LIMIT:
                await self._taken.park()
        except BaseException:
            message.close()
            raise
        self._post(message)

    def _post(self, message: Message) -> None:
        if self._ended:
            message.close()
            return
        try:
            data = wire.encode(message)
        except WireError:
            message.close()
            raise
        self._queue.append((data, message.descriptors))
        self._queued += len(data)
        self._filled.unpark()
        if self._queued > QUEUE_HARD_LIMIT:
            self._lose(f"it has left {self._queued} bytes unread")

    def _lose(self, reason: str) -> None:
        self.failure = Unreachable(f"The connection to the message bus is lost: {reason}.")
        self._nursery.cancel_scope.cancel()

    async def _write(self) -> None:
        try:
            while True:
                while not self._queue:
                    await self._filled.park()
                data, descriptors = self._queue[0]
                await self._transport.send(data, descriptors)
                self._queue.popleft()
                self._queued -= len(data)
                for descriptor in descriptors:
                    os.close(descriptor)
                self._taken.unpark_all()
        except OSError as error:
            self._lose(str(error))
        finally:
            self._ended = True
            for _data, descriptors in self._queue:
                for descriptor in descriptors:
                    os.close(descriptor)

    async def _read(self) -> None:
        try:
            while True:
                message = await self._transport.receive()
                if message is not None:
                    await self._route(message)
        except (OSError, EOFError, WireError) as error:
            self._lose(str(error))

    async def _route(self, message: Message) -> None:
        match message.kind:
            case Kind.CALL:
                await self._accept(message)
            case Kind.SIGNAL:
                self._distribute(message)
            case Kind.REPLY | Kind.ERROR:
                pending = self._pending.get(message.reply_serial)
                if pending is None or pending.reply is not None:
                    message.close()
                else:
                    pending.reply = message
                    pending.answered.set()

    def _distribute(self, message: Message) -> None:
        message.close()  # Signals that carry descriptors are none of ours.
        message = replace(message, descriptors=())
        if message.sender == names.DBUS and message.member == "NameOwnerChanged":
            name, _old, new_owner = message.values()
            for listener in self._listeners:
                listener.owner_changed(str(name), str(new_owner))
        for listener in self._listeners:
            listener.offer(message)

    async def _accept(self, message: Message) -> None:
        """Begin to answer, or refuse at once: all others wait for this."""
        with ExitStack() as shares:
            try:
                _require_short(message)
                self._admit(message.sender, self._uids.get(message.sender), shares)
            except BusError as error:
                await self._send_reply(message, _error_reply(error))
                message.close()
            else:
                self._nursery.start_soon(self._answer, message, shares.pop_all())

    def _admit(self, sender: str, uid: int | None, shares: ExitStack) -> None:
        """Take what a call needs; `uid` is None until the bus has told. Raises `BusError`."""
        if uid is None:
            shares.enter_context(self._calls_of_stranger.share(sender))
            shares.enter_context(self._calls_of_strangers.share(None))
        else:
            # First, so that who floods is told so, rather than that all are busy.
            shares.enter_context(self._calls_of_user.share(uid))
            shares.enter_context(self._calls.share(None))

    async def _answer(self, message: Message, shares: ExitStack) -> None:
        try:
            with shares:
                await self._send_reply(message, await self._reply_to(message, shares))
        finally:
            message.close()

    async def _reply_to(self, message: Message, shares: ExitStack) -> Message:
        try:
            uid = await self.uid_of(message.sender)
            shares.close()
            self._admit(message.sender, uid, shares)
            signature, values = await self._handler(self, message)
            body, descriptors = wire.pack(signature, values)
        except BusError as error:
            return _error_reply(error)
        except Exception:
            log.exception(
                "%s.%s on %s, called by %s, failed",
                message.interface,
                message.member,
                message.path,
                message.sender,
            )
            return _error_reply(
                BusError(names.DBUS_FAILED, "Internal error; the log of the service has it.")
            )
        return Message(kind=Kind.REPLY, signature=signature, body=body, descriptors=descriptors)

    async def _send_reply(self, call: Message, reply: Message) -> None:
        if call.flags & wire.NO_REPLY_EXPECTED:
            reply.close()
            return
        await self._send(
            replace(
                reply,
                serial=self._next_serial(),
                reply_serial=call.serial,
                destination=call.sender,
            )
        )

    async def _flush(self) -> None:
        with trio.move_on_after(FLUSH_TIMEOUT):
            while self._queue:
                await self._taken.park()


async def _no_objects(_connection: Connection, message: Message) -> Reply:
    raise BusError(names.UNKNOWN_OBJECT, f"There is no object {message.path}.")


@asynccontextmanager
async def connect(
    address: str | None = None, *, handler: CallHandler = _no_objects
) -> AsyncIterator[Connection]:
    """Connect to the bus at `address`, by default the system bus; answer calls with `handler`.

    Raises `ConfigError` when the address is unusable, and `Unreachable` when no bus is there. It is
    also raised, and the body cancelled, when the bus goes away while the context is open.
    """
    transport = await Transport.connect(address or system_bus_address())
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            connection = Connection(transport, nursery, handler)
            nursery.start_soon(connection._read)
            nursery.start_soon(connection._write)
            try:
                await connection._register()
                yield connection
                await connection._flush()
            except (Exception, KeyboardInterrupt) as error:
                failure = error  # Carried past the nursery, which would wrap it into a group.
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # An interrupt hits whichever task runs, or this one while it waits for the others.
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        failure = KeyboardInterrupt()
    finally:
        transport.close()
    failure = failure or connection.failure
    if failure is not None:
        raise failure


def _result(reply: Message) -> tuple[object, ...]:
    """Return the values of a reply, and close the descriptors that are not among them."""
    try:
        values = reply.values()
    except WireError as error:
        reply.close()
        raise BusError(names.INCONSISTENT_MESSAGE, str(error)) from error
    if reply.kind is Kind.ERROR:
        reply.close()
        text = values[0] if values and isinstance(values[0], str) else ""
        raise BusError(reply.error_name, text)
    types = wire.split(reply.signature)
    wanted = {value for kind, value in zip(types, values, strict=True) if kind == "h"}
    for descriptor in reply.descriptors:
        if descriptor not in wanted:
            os.close(descriptor)
    return values


def _require_short(message: Message) -> None:
    if len(message.body) > CALL_SIZE_LIMIT:
        raise BusError(
            names.LIMITS_EXCEEDED,
            f"The call has {len(message.body)} bytes; at most {CALL_SIZE_LIMIT} are read.",
        )


def _error_reply(error: BusError) -> Message:
    body, _ = wire.pack("s", [wire.shown(error.text)])
    return Message(kind=Kind.ERROR, error_name=error.name, signature="s", body=body)
