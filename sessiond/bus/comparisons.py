"""Two states of a session compared: counted, or listed for whoever asked.

A list goes through a pipe, since a message could not hold it. The reader gets one end, the session
writes to the other. The last line says how the list has ended: ``{"complete": true}``, or
``{"error": "..."}`` where there is still room for that. A list without either has ended early.

Each comparison keeps a thread of the session's worker, and the layers that it is about, so there
are limits: for each user, and for each session.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from sessiond.bus.limits import ROOT, Limit
from sessiond.errors import SessiondError
from sessiond.session.manager import Session
from sessiond.session.model import Breakdown, ChangeSummary

log = logging.getLogger(__name__)

States = tuple[str, str]
"""Names of the snapshots from and to which; empty for the image, and for the view as it is now."""

COMPARISONS_OF_USER = 8
COMPARISONS_OF_SESSION = 16
"""More than its owner can have, so that root can always compare, too."""


class Comparisons:
    """Those that go on."""

    def __init__(self) -> None:
        self._of_user = Limit(
            COMPARISONS_OF_USER,
            "You have {most} comparisons of sessions going on, the most that a user may have. Wait "
            "for one, or close a list of changes, and try again.",
            exempt={ROOT},
        )
        self._of_session = Limit(
            COMPARISONS_OF_SESSION,
            "{most} comparisons of that session are going on, which is the most. Wait for one, or "
            "close a list of changes, and try again.",
        )

    @contextmanager
    def _shares(self, uid: int, session: Session) -> Iterator[None]:
        with self._of_user.share(uid), self._of_session.share(session.id):
            yield

    async def count(
        self, uid: int, session: Session, states: States, breakdown: Breakdown
    ) -> ChangeSummary:
        """Count for `uid`. Raises `BusError` beyond the limits, and what the session raises."""
        with self._shares(uid, session):
            return await session.differences.count(*states, breakdown)

    def open_list(
        self,
        uid: int,
        session: Session,
        write: Callable[[int], Awaitable[None]],
        start: Callable[..., None],
    ) -> int:
        """Return a descriptor to read from, to be closed by whoever calls; `start` runs `write`,
        which is given the other end.

        Raises `BusError` beyond the limits.
        """
        with ExitStack() as shares:
            shares.enter_context(self._shares(uid, session))
            reader, writer = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(writer, False)  # the reader's end is a matter of its own
            start(self._write, session, write, writer, shares.pop_all())
            return reader

    async def _write(
        self,
        session: Session,
        write: Callable[[int], Awaitable[None]],
        target: int,
        shares: ExitStack,
    ) -> None:
        with shares:
            try:
                await write(target)
            except SessiondError as error:
                log.warning("Session %s: the list of changes ends early: %s", session.id, error)
                _write_error(target, str(error))
            except Exception:
                log.exception("Session %s: the list of changes failed", session.id)
                _write_error(target, "Internal error; the log of the service has it.")
            finally:
                os.close(target)


def _write_error(target: int, text: str) -> None:
    """Say why, if there is room for it; nobody waits for a reader."""
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(target, (json.dumps({"error": text}) + "\n").encode())
