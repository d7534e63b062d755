"""Differences of a session, streamed to whoever asked for them: a message could not hold them.

The reader gets one end of a pipe, the session writes to the other. When that fails, the last line
is ``{"error": "..."}``, so that a list which ends early does not pass for a complete one.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable

import trio

from sessiond.errors import Busy, SessiondError
from sessiond.session.manager import Session
from sessiond.session.model import SessionId

log = logging.getLogger(__name__)

STREAMS_AT_ONCE = 8
"""Streams that one session may have; each holds descriptors until its reader hangs up."""


class DiffStreams:
    """The streams that are being read."""

    def __init__(self) -> None:
        self._open: Counter[SessionId] = Counter()

    def open(self, session: Session, start: Callable[..., None]) -> int:
        """Return a descriptor to read from, to be closed by whoever calls; `start` runs the writer.

        Raises `Busy` when too many of the session are being read.
        """
        if self._open[session.id] >= STREAMS_AT_ONCE:
            raise Busy(
                f"{STREAMS_AT_ONCE} lists of changes of session {session.id} are being read. "
                "Read one to its end, or close it, and try again."
            )
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self._open[session.id] += 1
        start(self._write, session, writer)
        return reader

    async def _write(self, session: Session, target: int) -> None:
        try:
            await session.diff(target)
        except SessiondError as error:
            log.warning("Session %s: the list of changes ends early: %s", session.id, error)
            await _write_error(target, str(error))
        except Exception:
            log.exception("Session %s: the list of changes failed", session.id)
            await _write_error(target, "Internal error; the log of the service has it.")
        finally:
            os.close(target)
            self._open[session.id] -= 1
            if not self._open[session.id]:
                del self._open[session.id]


async def _write_error(target: int, text: str) -> None:
    line = json.dumps({"error": text}) + "\n"
    # Opened anew, since whether it blocks must not change for those who share `target`.
    own = os.open(f"/proc/self/fd/{target}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    async with trio.lowlevel.FdStream(own) as stream:
        try:
            await stream.send_all(line.encode())
        except trio.BrokenResourceError:
            return  # The reader has hung up, and needs no reason.
