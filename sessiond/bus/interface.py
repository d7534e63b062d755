"""What a D-Bus object offers: its methods, properties and signals, declared, and their XML.

An interface is a subclass of `Interface`: `@method` marks its methods, properties and signals are
listed. Arguments are written as introspection shows them: ``"s user, a{sv} options"``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol
from xml.etree import ElementTree

from sessiond.bus import names
from sessiond.bus.audit import Attempt
from sessiond.bus.polkit import Verdict
from sessiond.bus.wire import Variant

_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


class Caller(Protocol):
    """Who called a method."""

    attempt: Attempt | None
    """What the call wants to do, once that is known, if it takes permission."""

    async def uid(self) -> int:
        """Return the user id that the bus vouches for.

        Raises `BusError` when the caller has left the bus.
        """

    async def ask_polkit(self, action: str, details: Mapping[str, str]) -> Verdict:
        """Return what polkit says of an action of the caller's; see `Polkit.check`."""

    def start_soon(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run a task, which must not raise, for as long as the connection to the caller's bus."""


class Change(StrEnum):
    """How a property changes; the values are those of the annotation EmitsChangedSignal."""

    SIGNALLED = "true"
    SILENT = "false"
    NEVER = "const"


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a method or signal."""

    type: str
    name: str


@dataclass(frozen=True, slots=True)
class Method:
    """A method; `function` takes the object, the `Caller` and the arguments."""

    name: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    function: Callable[..., Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Property:
    """A property, which others may only read."""

    name: str
    type: str
    change: Change = Change.SIGNALLED


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal."""

    name: str
    arguments: tuple[Argument, ...]


def signature(arguments: Iterable[Argument]) -> str:
    """Return the D-Bus signature of `arguments`."""
    return "".join(argument.type for argument in arguments)


def method(
    name: str, inputs: str = "", outputs: str = ""
) -> Callable[[Callable[..., Awaitable[object]]], Method]:
    """Mark a coroutine as the D-Bus method `name`.

    It is called with the `Caller` and the values of `inputs`, and returns None, one value or a
    tuple, as `outputs` has it. It raises `SessiondError` or `BusError`; anything else counts as a
    fault of this program.
    """

    def mark(function: Callable[..., Awaitable[object]]) -> Method:
        return Method(name, _arguments(inputs), _arguments(outputs), function)

    return mark


def signal(name: str, arguments: str = "") -> Signal:
    """Declare the signal `name`."""
    return Signal(name, _arguments(arguments))


def _arguments(text: str) -> tuple[Argument, ...]:
    pairs = (argument.strip().split(" ") for argument in text.split(",") if argument)
    return tuple(Argument(kind, name) for kind, name in pairs)


class Interface:
    """One interface of one object."""

    name: ClassVar[str]
    methods: ClassVar[Mapping[str, Method]] = {}
    properties: ClassVar[tuple[Property, ...]] = ()
    signals: ClassVar[tuple[Signal, ...]] = ()

    def __init_subclass__(cls) -> None:
        marked = (value for value in vars(cls).values() if isinstance(value, Method))
        cls.methods = {method.name: method for method in marked}

    def property_values(self) -> dict[str, object]:
        """Return the value of each declared property, by its name."""
        return {}

    def property_variants(self) -> dict[str, Variant]:
        """Return the value of each declared property with its type, by its name."""
        values = self.property_values()
        return {p.name: Variant(p.type, values[p.name]) for p in self.properties}


def introspection(interfaces: Iterable[Interface], children: Iterable[str]) -> str:
    """Return the introspection XML of an object, given the names of the nodes below it."""
    node = ElementTree.Element("node")
    for interface in interfaces:
        node.append(_interface_element(interface))
    for child in children:
        ElementTree.SubElement(node, "node", name=child)
    ElementTree.indent(node)
    return _DOCTYPE + ElementTree.tostring(node, encoding="unicode") + "\n"


def _interface_element(interface: Interface) -> ElementTree.Element:
    element = ElementTree.Element("interface", name=interface.name)
    for method in interface.methods.values():
        child = ElementTree.SubElement(element, "method", name=method.name)
        _add_arguments(child, method.inputs, {"direction": "in"})
        _add_arguments(child, method.outputs, {"direction": "out"})
    for signal in interface.signals:
        child = ElementTree.SubElement(element, "signal", name=signal.name)
        _add_arguments(child, signal.arguments, {})
    for declared in interface.properties:
        child = ElementTree.SubElement(
            element, "property", name=declared.name, type=declared.type, access="read"
        )
        ElementTree.SubElement(
            child,
            "annotation",
            name=names.EMITS_CHANGED_SIGNAL,
            value=declared.change.value,
        )
    return element


def _add_arguments(
    element: ElementTree.Element, arguments: Iterable[Argument], attributes: dict[str, str]
) -> None:
    for argument in arguments:
        described = {"name": argument.name, "type": argument.type, **attributes}
        ElementTree.SubElement(element, "arg", described)


def result_values(method: Method, result: object) -> tuple[object, ...]:
    """Return what a method's function returned as the values of its outputs."""
    match len(method.outputs):
        case 0:
            return ()
        case 1:
            return (result,)
        case _:
            assert isinstance(result, tuple)
            return result
