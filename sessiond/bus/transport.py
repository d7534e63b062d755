"""The socket to a message bus: addresses, authentication, and whole messages in and out.

One task may send while another receives; not two of either.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from urllib.parse import unquote

import trio

from sessiond.bus import wire
from sessiond.bus.wire import Message, WireError
from sessiond.errors import ConfigError, Unreachable

ADDRESS_VARIABLE = "DBUS_SYSTEM_BUS_ADDRESS"
DEFAULT_ADDRESS = "unix:path=/run/dbus/system_bus_socket"

CONNECT_TIMEOUT = 25.0
"""Seconds that a bus has to accept and authenticate a connection."""

_DESCRIPTORS_PER_MESSAGE = 253
"""SCM_MAX_FD of the kernel."""

_AUTH_LINE_LIMIT = 16384
_RECEIVE_SIZE = 1 << 18


def system_bus_address() -> str:
    """Return the address of the system bus."""
    return os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS


def socket_names(address: str) -> list[str]:
    """Return the names of the Unix sockets in a D-Bus address; abstract ones begin with NUL.

    Raises `ConfigError` when there is none.
    """
    names = []
    for entry in filter(None, address.split(";")):
        transport, _, options = entry.partition(":")
        pairs = dict(option.partition("=")[::2] for option in options.split(","))
        if transport == "unix" and "path" in pairs:
            names.append(unquote(pairs["path"]))
        elif transport == "unix" and "abstract" in pairs:
            names.append("\0" + unquote(pairs["abstract"]))
    if not names:
        raise ConfigError(
            f"The bus address {address!r} names no Unix socket. "
            f"Set {ADDRESS_VARIABLE} to something like {DEFAULT_ADDRESS!r}, or unset it."
        )
    return names


class Transport:
    """An authenticated connection on which descriptors can be passed."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock

    @classmethod
    async def connect(cls, address: str) -> Transport:
        """Connect to the first bus of `address` that answers.

        Raises `ConfigError` when the address is unusable, `Unreachable` when no bus is there.
        """
        failure: Exception | None = None
        for name in socket_names(address):
            sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                with trio.fail_after(CONNECT_TIMEOUT):
                    await sock.connect(name)
                    await _authenticate(sock)
            except (OSError, WireError, trio.TooSlowError) as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                return cls(sock)
        raise Unreachable(
            f"There is no message bus at {address} ({_reason(failure)}). "
            f"Start it, as with 'systemctl start dbus', or set {ADDRESS_VARIABLE} to another."
        ) from failure

    async def receive(self) -> Message | None:
        """Return the next message, or None in place of one that is malformed.

        Raises `OSError`, `EOFError` or `WireError` when the connection can be used no more.
        """
        descriptors: list[int] = []
        try:
            head = await self._receive_exactly(wire.HEAD_SIZE, descriptors)
            data = head + await self._receive_exactly(wire.remaining(head), descriptors)
        except BaseException:
            _close(descriptors)
            raise
        try:
            return wire.decode(data, descriptors)
        except WireError:
            # Its end is known, so those behind it can be read. The bus checks what it passes on:
            # this is a type of message that a later D-Bus brings.
            _close(descriptors)
            return None

    async def _receive_exactly(self, size: int, descriptors: list[int]) -> bytes:
        data = bytearray()
        while len(data) < size:
            part, ancillary, _flags, _address = await self._socket.recvmsg(
                min(size - len(data), _RECEIVE_SIZE),
                socket.CMSG_SPACE(_DESCRIPTORS_PER_MESSAGE * 4),
                socket.MSG_CMSG_CLOEXEC,
            )
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array.array("i")
                    received.frombytes(content[: len(content) // 4 * 4])
                    descriptors.extend(received)
            if not part:
                raise EOFError("the bus has closed the connection")
            data += part
        return bytes(data)

    async def send(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Send one encoded message; `descriptors` stay open here. Raises `OSError`."""
        rest = memoryview(data)
        if descriptors:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
            rest = rest[await self._socket.sendmsg([rest], [rights]) :]
        while rest:
            rest = rest[await self._socket.send(rest) :]

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


async def _authenticate(sock: trio.socket.SocketType) -> None:
    """Say who we are by the socket's credentials, and ask for descriptor passing."""
    uid = str(os.geteuid()).encode().hex()
    await _send_line(sock, f"\0AUTH EXTERNAL {uid}", expected="OK")
    await _send_line(sock, "NEGOTIATE_UNIX_FD", expected="AGREE_UNIX_FD")
    await _send_line(sock, "BEGIN")


async def _send_line(sock: trio.socket.SocketType, line: str, expected: str = "") -> None:
    rest = f"{line}\r\n".encode()
    while rest:
        rest = rest[await sock.send(rest) :]
    if not expected:
        return
    answer = b""
    while not answer.endswith(b"\r\n"):
        part = await sock.recv(_AUTH_LINE_LIMIT)
        answer += part
        if not part or len(answer) > _AUTH_LINE_LIMIT:
            raise WireError("it ended the conversation while we said who we are")
    if answer.split()[0] != expected.encode():
        raise WireError(
            f"it answered {answer.decode(errors='replace').strip()!r} to {line.strip(chr(0))!r}"
        )


def _reason(failure: Exception | None) -> str:
    if isinstance(failure, trio.TooSlowError):
        return f"no answer within {CONNECT_TIMEOUT:g} seconds"
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return str(failure)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
