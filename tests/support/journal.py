"""The other end of the journal's socket."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

BOUND = 20.0


class Journal:
    """Receives what is logged at the socket `path`, as systemd-journald does."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(BOUND)

    def receive(self) -> list[tuple[str, bytes]]:
        """Return the fields of the next message."""
        return _fields(self._socket.recv(1 << 20))

    def close(self) -> None:
        self._socket.close()


def _fields(message: bytes) -> list[tuple[str, bytes]]:
    """Read both forms of https://systemd.io/JOURNAL_NATIVE_PROTOCOL/."""
    found = []
    while message:
        line, _, message = message.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", message)
            value, message = message[8 : 8 + size], message[8 + size + 1 :]
        found.append((name.decode("ascii"), value))
    return found
