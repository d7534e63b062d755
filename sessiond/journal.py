"""What is logged, and where to: the systemd journal, with fields, or else stderr, as text.

All goes through `logging`. Where stderr is connected to the journal, records are sent to its socket
instead, by the protocol of https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: that keeps what happened
(`event`) in fields that programs can ask for. The protocol takes fewer lines than the use of a
library would. Of processes that a handler is inherited by, lines go to stderr: workers see no file
systems but their own.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
from enum import StrEnum
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")

_FIELD_LIMIT = 64 << 10
"""Longest value of a field, in bytes: a message has to fit into a datagram."""

_PATIENCE = 1.0
"""Seconds that the journal may be too busy to take a message; the daemon stands still meanwhile."""

_PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}
"""Those of syslog."""


class Event(StrEnum):
    """What happened, for programs: the value is the record's MESSAGE_ID. See docs/monitoring.md."""

    REQUEST = "4ed3257e65f94519911f34c9c29a284d"
    """A call that takes permission was answered."""
    JOB_ENDED = "c95b4421f61f4229a9ce6f8e7dd4c8fc"
    SESSION_STARTED = "d51c7765c02445a08f70fb76445fb7cd"
    SESSION_ENDED = "74e862088b394b318dcb364a12114101"
    SNAPSHOT_MADE = "2759f08bdcfc4f43baee857c5b685593"
    SNAPSHOT_DELETED = "9a5c9947b72f4de699226ca859f04da6"
    IMAGE_DAMAGED = "2f10a13c807e4548b6b1e7ae06b50400"
    """dm-verity has found a block that does not match the root hash."""
    LOGIN_FAILED = "2c7e54887af1493f96d37a1252d822e5"
    """A session could not be made for who logs in."""
    WORKER_DIED = "af0b1e139e3d42b4a31ce35f17bf7ae7"


def event(kind: Event, **facts: str | int | None) -> dict[str, object]:
    """Return the `extra` of a call of a logger: what the record is about.

    It becomes the fields MESSAGE_ID and, for each of `facts` that is not None, SESSIOND_NAME. What
    they hold may come from anyone: it cannot end a field or begin another.
    """
    known = {f"SESSIOND_{name.upper()}": fact for name, fact in facts.items() if fact is not None}
    return {"journal_fields": {"MESSAGE_ID": kind.value, **known}}


class JournalHandler(logging.Handler):
    """Sends records to the journal's `path`; what it does not take goes to `fallback`."""

    def __init__(self, path: Path, fallback: logging.Handler) -> None:
        super().__init__()
        self._path = str(path)
        self._fallback = fallback
        self._pid = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_PATIENCE)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            if os.getpid() == self._pid:
                # By name each time: the journal may have been started anew.
                self._socket.sendto(self._message(record), self._path)
                return
        except OSError:
            pass
        self._fallback.handle(record)

    def close(self) -> None:
        """See `logging.Handler`."""
        self._socket.close()
        super().close()

    def _message(self, record: logging.LogRecord) -> bytes:
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": _priority(record),
            "SYSLOG_IDENTIFIER": "sessiond",
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
            **getattr(record, "journal_fields", {}),
        }
        return b"".join(_field(name, str(value)) for name, value in fields.items())


def _field(name: str, value: str) -> bytes:
    """Encode with the length before the value, so that nothing in the value has a meaning."""
    data = value.encode(errors="backslashreplace")[:_FIELD_LIMIT]
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)


def _priority(record: logging.LogRecord) -> int:
    return _PRIORITIES.get(record.levelno, 6)


class _LineFormatter(logging.Formatter):
    """Each line with its priority, as the journal reads it from stderr; see sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_priority(record)}>"
        return prefix + super().format(record).replace("\n", f"\n{prefix}")


def log_to_journal_or_stderr() -> None:
    """Set `logging` up for the daemon."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    stream = os.fstat(sys.stderr.fileno())
    if os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}":
        handler.setFormatter(_LineFormatter())
        handler = JournalHandler(SOCKET, handler)
    else:
        handler.setFormatter(logging.Formatter("sessiond: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
