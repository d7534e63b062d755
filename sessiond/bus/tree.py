"""The objects of a service: calls are dispatched to them, and their changes announced.

Adds the standard interfaces: Introspectable, Peer, Properties, and ObjectManager at the root.
Objects outlive connections; what changes while there is none is not announced.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass

import trio

from sessiond.bus import names, wire
from sessiond.bus.audit import Attempt
from sessiond.bus.connection import Connection, Reply
from sessiond.bus.interface import (
    Caller,
    Change,
    Interface,
    Method,
    Signal,
    introspection,
    method,
    result_values,
    signal,
    signature,
)
from sessiond.bus.polkit import Polkit, Verdict
from sessiond.bus.wire import BusError, Message, Variant, WireError
from sessiond.errors import SessiondError

_MACHINE_ID = trio.Path("/etc/machine-id")


@dataclass(slots=True)
class _Sender:
    """The `Caller` who sent a message."""

    connection: Connection
    message: Message
    polkit: Polkit
    attempt: Attempt | None = None

    async def uid(self) -> int:
        return await self.connection.uid_of(self.message.sender)

    async def ask_polkit(self, action: str, details: Mapping[str, str]) -> Verdict:
        return await self.polkit.check(
            self.connection,
            self.message.sender,
            await self.uid(),
            action,
            details,
            interactive=bool(self.message.flags & wire.ALLOW_INTERACTIVE_AUTHORIZATION),
        )

    def start_soon(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        self.connection.start_soon(function, *arguments)


class ObjectTree:
    """Objects by path, each with one interface of its own; the one at `root` lists the others.

    `answered` is told how each call has ended that took permission: with what it returns, or an
    error.
    """

    def __init__(self, root: str, answered: Callable[[Attempt, object], None]) -> None:
        self.root = root
        self._answered = answered
        self._polkit = Polkit()
        self.connection: Connection | None = None
        self._objects: dict[str, Interface] = {}
        self._announced: dict[str, dict[str, object]] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._objects

    def below(self, path: str) -> list[str]:
        """Return the paths of all objects below `path`."""
        prefix = path.rstrip("/") + "/"
        return [other for other in self._objects if other.startswith(prefix)]

    def add(self, path: str, interface: Interface) -> None:
        """Publish an object, with InterfacesAdded."""
        self._objects[path] = interface
        self._announced[path] = interface.property_values()
        if path != self.root:
            content = {interface.name: interface.property_variants()}
            self._emit(self.root, _ObjectManager, _INTERFACES_ADDED, path, content)

    def remove(self, path: str) -> None:
        """Withdraw an object, with InterfacesRemoved."""
        interface = self._objects.pop(path)
        del self._announced[path]
        self._emit(self.root, _ObjectManager, _INTERFACES_REMOVED, path, [interface.name])

    def changed(self, path: str) -> None:
        """Announce the properties of an object that differ from what was announced last."""
        interface = self._objects[path]
        before = self._announced[path]
        now = self._announced[path] = interface.property_values()
        changes = {
            declared.name: Variant(declared.type, now[declared.name])
            for declared in interface.properties
            if declared.change is Change.SIGNALLED and now[declared.name] != before[declared.name]
        }
        if changes:
            self._emit(path, _Properties, _PROPERTIES_CHANGED, interface.name, changes, [])

    def emit(self, path: str, signal: Signal, *values: object) -> None:
        """Send a signal of the object at `path`."""
        self._emit(path, type(self._objects[path]), signal, *values)

    def _emit(self, path: str, interface: type[Interface], signal: Signal, *values: object) -> None:
        if self.connection is not None:
            self.connection.emit(
                path, interface.name, signal.name, signature(signal.arguments), *values
            )

    async def handle(self, connection: Connection, message: Message) -> Reply:
        """Answer a call. Raises `BusError`."""
        interface, method = self._find(message)
        expected = signature(method.inputs)
        if message.signature != expected:
            raise BusError(
                names.INVALID_ARGUMENTS,
                f"{method.name} takes '{expected}', but was called with '{message.signature}'.",
            )
        try:
            values = message.values()
        except WireError as error:
            raise BusError(names.INVALID_ARGUMENTS, str(error)) from error
        caller = _Sender(connection, message, self._polkit)
        try:
            result = await method.function(interface, caller, *values)
        except BaseException as error:
            self._tell(caller, error)
            if isinstance(error, SessiondError):
                raise BusError(names.error_name(error), str(error)) from error
            raise
        self._tell(caller, result)
        return signature(method.outputs), result_values(method, result)

    def _tell(self, caller: _Sender, outcome: object) -> None:
        if caller.attempt is not None:
            self._answered(caller.attempt, outcome)

    def _find(self, message: Message) -> tuple[Interface, Method]:
        offered = list(self._interfaces(message.path))
        if not offered:
            raise BusError(
                names.UNKNOWN_OBJECT,
                f"There is no object {message.path}. What it stood for has ended, or never was.",
            )
        # The interface of a call may be left out.
        asked = [i for i in offered if message.interface in ("", i.name)]
        if not asked:
            raise BusError(
                names.UNKNOWN_INTERFACE, f"{message.path} has no interface {message.interface}."
            )
        for interface in asked:
            if message.member in interface.methods:
                return interface, interface.methods[message.member]
        raise BusError(
            names.UNKNOWN_METHOD,
            f"{message.path} has no method {message.interface or '*'}.{message.member}.",
        )

    def _interfaces(self, path: str) -> Iterator[Interface]:
        own = self._objects.get(path)
        children = self._children(path)
        if own is not None:
            yield own
            yield _Properties(own)
        if path == self.root:
            yield _ObjectManager(self)
        if own is not None or children:
            yield _Introspectable(self, path)
            yield _Peer()

    def _children(self, path: str) -> list[str]:
        start = len(path.rstrip("/")) + 1
        return sorted({other[start:].partition("/")[0] for other in self.below(path)})

    def introspect(self, path: str) -> str:
        """Return the introspection XML of the object or inner node at `path`."""
        return introspection(self._interfaces(path), self._children(path))

    def managed(self) -> dict[str, dict[str, dict[str, Variant]]]:
        """Return the properties of all objects below the root, by path and interface."""
        return {
            path: {interface.name: interface.property_variants()}
            for path, interface in self._objects.items()
            if path != self.root
        }


_INTERFACES_ADDED = signal("InterfacesAdded", "o object_path, a{sa{sv}} interfaces_and_properties")
_INTERFACES_REMOVED = signal("InterfacesRemoved", "o object_path, as interfaces")
_PROPERTIES_CHANGED = signal(
    "PropertiesChanged",
    "s interface_name, a{sv} changed_properties, as invalidated_properties",
)


class _ObjectManager(Interface):
    name = names.OBJECT_MANAGER
    signals = (_INTERFACES_ADDED, _INTERFACES_REMOVED)

    def __init__(self, tree: ObjectTree) -> None:
        self._tree = tree

    @method("GetManagedObjects", "", "a{oa{sa{sv}}} objects")
    async def get_managed_objects(
        self, _caller: Caller
    ) -> dict[str, dict[str, dict[str, Variant]]]:
        return self._tree.managed()


class _Properties(Interface):
    name = names.PROPERTIES
    signals = (_PROPERTIES_CHANGED,)

    def __init__(self, of: Interface) -> None:
        self._of = of

    @method("Get", "s interface_name, s property_name", "v value")
    async def get(self, _caller: Caller, interface: str, name: str) -> Variant:
        return self._checked(interface, name)

    @method("GetAll", "s interface_name", "a{sv} properties")
    async def get_all(self, _caller: Caller, interface: str) -> dict[str, Variant]:
        return self._of.property_variants() if interface in ("", self._of.name) else {}

    @method("Set", "s interface_name, s property_name, v value")
    async def set(self, _caller: Caller, interface: str, name: str, _value: object) -> None:
        self._checked(interface, name)
        raise BusError(names.PROPERTY_READ_ONLY, f"Property {name} can only be read.")

    def _checked(self, interface: str, name: str) -> Variant:
        values = self._of.property_variants() if interface in ("", self._of.name) else {}
        if name not in values:
            raise BusError(names.UNKNOWN_PROPERTY, f"There is no property {interface}.{name} here.")
        return values[name]


class _Introspectable(Interface):
    name = names.INTROSPECTABLE

    def __init__(self, tree: ObjectTree, path: str) -> None:
        self._tree = tree
        self._path = path

    @method("Introspect", "", "s xml_data")
    async def introspect(self, _caller: Caller) -> str:
        return self._tree.introspect(self._path)


class _Peer(Interface):
    name = names.PEER

    @method("Ping")
    async def ping(self, _caller: Caller) -> None:
        """Answering is all."""

    @method("GetMachineId", "", "s machine_uuid")
    async def get_machine_id(self, _caller: Caller) -> str:
        try:
            return (await _MACHINE_ID.read_text()).strip()
        except OSError as error:
            raise BusError(names.DBUS_FAILED, f"{_MACHINE_ID}: {error.strerror}.") from error
