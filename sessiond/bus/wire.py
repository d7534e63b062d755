"""D-Bus messages as values, and their form on the wire. Pure: no input or output.

The only module that imports dbus_next, and all it takes from there is the marshalling of values:
its connections need asyncio or GLib, and its services neither name what they return nor know who
calls. What is left is so little that any other marshaller can replace it.

A body stays encoded until `Message.values` is called, so whoever receives a message can look at its
header first and refuse it unread: Python takes 4 µs for each value, and anyone may send a million.
"""

# dbus_next has annotations on some of its functions only.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.signature import SignatureTree, SignatureType
from dbus_next.signature import Variant as _EncodedVariant

HEAD_SIZE = 16
"""Bytes of a message that tell how long it is."""

MESSAGE_LIMIT = 128 << 20
"""Longest message that the D-Bus specification allows, in bytes."""

BODY_LIMIT = 16 << 20
"""Longest body that is sent, in bytes. A system bus disconnects whoever sends 32 MiB."""

NO_REPLY_EXPECTED = 1
"""Flag of a call whose caller does not wait for an answer."""

ALLOW_INTERACTIVE_AUTHORIZATION = 4
"""Flag of a call whose caller is ready to wait while a person is asked for a password."""

_LITTLE, _BIG = ord("l"), ord("B")
_PROTOCOL_VERSION = 1
_HEADER_FIELDS_AT = 12


class WireError(ValueError):
    """A value does not fit its D-Bus type, or a message is malformed."""


class BusError(Exception):
    """An error as it travels on the bus: a D-Bus error name and a sentence."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name
        self.text = text


class Kind(IntEnum):
    """Type of a message; the numbers are the protocol's."""

    CALL = 1
    REPLY = 2
    ERROR = 3
    SIGNAL = 4


class _Field(IntEnum):
    PATH = 1
    INTERFACE = 2
    MEMBER = 3
    ERROR_NAME = 4
    REPLY_SERIAL = 5
    DESTINATION = 6
    SENDER = 7
    SIGNATURE = 8
    UNIX_FDS = 9


_FIELD_TYPES = {
    _Field.PATH: "o",
    _Field.INTERFACE: "s",
    _Field.MEMBER: "s",
    _Field.ERROR_NAME: "s",
    _Field.REPLY_SERIAL: "u",
    _Field.DESTINATION: "s",
    _Field.SENDER: "s",
    _Field.SIGNATURE: "g",
    _Field.UNIX_FDS: "u",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A value to be sent with its type. Received variants come as their plain value."""

    signature: str
    value: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message. Absent header fields are empty strings or 0.

    A message owns its `descriptors`: whoever ends its way closes it, or takes them over.
    """

    kind: Kind
    serial: int = 0
    flags: int = 0
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    body: bytes = b""
    big_endian: bool = False
    descriptors: tuple[int, ...] = ()

    def values(self) -> tuple[object, ...]:
        """Decode the body. Raises `WireError`.

        A descriptor among the arguments comes as its number in this process; one that did not
        arrive, because this process may not open more, raises `WireError`.
        """
        types = _types(self.signature)
        values = _decode(types, self.body, 0, self.big_endian)
        return tuple(
            self._descriptor(value) if kind.signature == "h" else value
            for kind, value in zip(types, values, strict=True)
        )

    def _descriptor(self, index: object) -> int:
        if isinstance(index, int) and index < len(self.descriptors):
            return self.descriptors[index]
        raise WireError("A descriptor of the message did not arrive.")

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def pack(signature: str, values: Sequence[object]) -> tuple[bytes, tuple[int, ...]]:
    """Encode the arguments of a message: its body, and the descriptors to send with it.

    `values` of type ``h`` are descriptors, which pass to the message; they are closed when the
    arguments do not fit the signature, which raises `WireError`. ``h`` within containers is not
    supported.
    """
    descriptors: list[int] = []
    plain: list[object] = []
    types = _types(signature)
    for kind, value in zip(types, values, strict=False):
        if kind.signature == "h" and isinstance(value, int):
            plain.append(len(descriptors))
            descriptors.append(value)
        else:
            plain.append(value)
    plain += values[len(types) :]
    try:
        return _encode(signature, plain), tuple(descriptors)
    except WireError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def encode(message: Message) -> bytes:
    """Return `message` as bytes, without its descriptors. Raises `WireError`."""
    present = {
        _Field.PATH: message.path,
        _Field.INTERFACE: message.interface,
        _Field.MEMBER: message.member,
        _Field.ERROR_NAME: message.error_name,
        _Field.REPLY_SERIAL: message.reply_serial,
        _Field.DESTINATION: message.destination,
        _Field.SIGNATURE: message.signature,
        _Field.UNIX_FDS: len(message.descriptors),
    }
    fields = [[f.value, Variant(_FIELD_TYPES[f], v)] for f, v in present.items() if v]
    header = _encode(
        "yyyyuua(yv)",
        [
            _LITTLE,
            message.kind.value,
            message.flags,
            _PROTOCOL_VERSION,
            len(message.body),
            message.serial,
            fields,
        ],
    )
    return header + bytes(-len(header) % 8) + message.body


def remaining(head: bytes) -> int:
    """Return how many bytes follow the first `HEAD_SIZE` of a message. Raises `WireError`."""
    if head[0] not in (_LITTLE, _BIG) or head[3] != _PROTOCOL_VERSION:
        raise WireError("What came is no D-Bus message.")
    order = ">" if head[0] == _BIG else "<"
    body_size, _serial, fields_size = struct.unpack_from(f"{order}III", head, 4)
    size: int = fields_size + -fields_size % 8 + body_size
    if HEAD_SIZE + size > MESSAGE_LIMIT:
        raise WireError(f"A message of {size} bytes is longer than D-Bus allows.")
    return size


def decode(data: bytes, descriptors: Sequence[int] = ()) -> Message:
    """Return the message in `data`, which then owns `descriptors`; its body is not looked at.

    Raises `WireError`; `descriptors` then stay the caller's.
    """
    big_endian = data[0] == _BIG
    order = ">" if big_endian else "<"
    body_size, serial = struct.unpack_from(f"{order}II", data, 4)
    body_at = len(data) - body_size
    fields = _header_fields(data[:body_at], big_endian)

    def text(field: _Field) -> str:
        value = fields.get(field, "")
        if not isinstance(value, str):
            raise WireError(f"Header field {field.name} has the wrong type.")
        return value

    reply_serial = fields.get(_Field.REPLY_SERIAL, 0)
    if not isinstance(reply_serial, int):
        raise WireError("Header field REPLY_SERIAL has the wrong type.")
    return Message(
        kind=_kind(data[1]),
        serial=serial,
        flags=data[2],
        path=text(_Field.PATH),
        interface=text(_Field.INTERFACE),
        member=text(_Field.MEMBER),
        error_name=text(_Field.ERROR_NAME),
        reply_serial=reply_serial,
        destination=text(_Field.DESTINATION),
        sender=text(_Field.SENDER),
        signature=text(_Field.SIGNATURE),
        body=data[body_at:],
        big_endian=big_endian,
        descriptors=tuple(descriptors),
    )


def _kind(number: int) -> Kind:
    try:
        return Kind(number)
    except ValueError as error:
        raise WireError(f"Messages of type {number} are unknown.") from error


def _header_fields(header: bytes, big_endian: bool) -> dict[int, object]:
    (pairs,) = _decode(_types("a(yv)"), header, _HEADER_FIELDS_AT, big_endian)
    if not isinstance(pairs, list):
        raise WireError("The header of a message is malformed.")
    return dict(pairs)


def shown(text: str) -> str:
    """Return `text` with what a D-Bus string may not hold written as escapes."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def split(signature: str) -> tuple[str, ...]:
    """Return the complete types that `signature` consists of. Raises `WireError`."""
    return tuple(kind.signature for kind in _types(signature))


class _Decoder(Unmarshaller):
    """dbus_next's, except that a variant comes as its plain value.

    The original also caches each signature for good, and senders choose those of variants.
    """

    def read_variant(self, _type: SignatureType | None = None) -> object:
        (kind,) = _types(self.read_signature())
        return self.read_argument(kind)


class _Encoder(Marshaller):
    """dbus_next's, except that it takes our `Variant` and refuses what a bus disconnects for."""

    def write_string(self, value: str, _type: SignatureType | None = None) -> int:
        if "\0" in value:
            raise WireError(f"{value!r} contains a NUL, which D-Bus does not allow in a string.")
        return int(super().write_string(value))


@lru_cache(maxsize=256)
def _types(signature: str) -> tuple[SignatureType, ...]:
    try:
        return tuple(SignatureTree(signature).types)
    except ValueError as error:
        raise WireError(f"{signature!r} is no D-Bus signature: {error}") from error


def _decode(
    types: Sequence[SignatureType], data: bytes, offset: int, big_endian: bool
) -> list[object]:
    decoder = _Decoder(io.BytesIO())
    decoder.buf = bytearray(data)
    decoder.offset = offset
    decoder.endian = _BIG if big_endian else _LITTLE
    try:
        return [decoder.read_argument(kind) for kind in types]
    except (ValueError, TypeError, EOFError, struct.error, RecursionError) as error:
        raise WireError(f"A message is malformed: {error}") from error


def _encode(signature: str, values: Sequence[object]) -> bytes:
    try:
        data = bytes(_Encoder(signature, [_to_library(value) for value in values]).marshall())
    except WireError:
        raise
    except UnicodeEncodeError as error:
        raise WireError(
            f"{error.object!r} is not UTF-8, which D-Bus strings have to be."
        ) from error
    except (ValueError, TypeError) as error:
        raise WireError(f"The values do not fit the D-Bus types {signature!r}: {error}") from error
    if len(data) > BODY_LIMIT:
        raise WireError(f"A message of {len(data)} bytes is too long; {BODY_LIMIT} are allowed.")
    return data


def _to_library(value: object) -> object:
    match value:
        case Variant():
            return _EncodedVariant(value.signature, _to_library(value.value))
        case dict():
            return {key: _to_library(item) for key, item in value.items()}
        case list() | tuple():
            return [_to_library(item) for item in value]
        case _:
            return value
