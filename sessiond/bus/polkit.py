"""polkit, asked through its D-Bus API whether a caller may do something.

The interface is org.freedesktop.PolicyKit1.Authority of the polkit reference manual. polkit finds
out by itself, from the caller's unique name, who that is and whether in an active local session.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

import trio

from sessiond.bus import names
from sessiond.bus.connection import CALL_TIMEOUT, Connection
from sessiond.bus.limits import Limit
from sessiond.bus.wire import BusError, Variant, WireError
from sessiond.errors import Unreachable

log = logging.getLogger(__name__)

PATIENCE = 300.0
"""Seconds that a person has to answer a question."""
QUESTIONS_OF_USER = 4
"""At once; each may be a window on the user's screen."""
QUESTIONS_IN_ALL = 64

_BUS = "org.freedesktop.PolicyKit1"
_PATH = "/org/freedesktop/PolicyKit1/Authority"
_AUTHORITY = f"{_BUS}.Authority"
_ALLOW_USER_INTERACTION = 1

_ABSENT = frozenset({f"{names.DBUS}.Error.ServiceUnknown", f"{names.DBUS}.Error.NameHasNoOwner"})
"""What a bus says of a name that nobody has, and that it knows no program for."""


class Verdict(Enum):
    """What polkit says."""

    YES = auto()
    NO = auto()
    """Also after a question that was not answered as it had to be."""
    AUTHENTICATE = auto()
    """Yes, if the caller, or an administrator, gave a password; but nobody could be asked."""
    ABSENT = auto()
    """There is no polkit on this bus."""
    UNKNOWN = auto()
    """There is one, but it does not answer, or does not know the action."""


class Polkit:
    """Asks; within limits, where a person has to be asked for a password."""

    def __init__(self) -> None:
        self._of_user = Limit(
            QUESTIONS_OF_USER,
            "You are being asked {most} questions already. Answer one of them, then try again.",
        )
        self._in_all = Limit(
            QUESTIONS_IN_ALL, "{most} users are being asked for passwords. Try again later."
        )
        self._numbers = count(1)
        self._complaint = ""

    async def check(
        self,
        connection: Connection,
        caller: str,
        uid: int,
        action: str,
        details: Mapping[str, str],
        *,
        interactive: bool,
    ) -> Verdict:
        """Return whether `caller`, a unique name, may do `action`; `details` are for rules.

        Where polkit wants a password and `interactive` is set, the agent of the caller's session
        asks for one: that takes as long as a person takes, but ends when the caller leaves the bus.
        Raises `BusError` LimitsExceeded.
        """
        question = _Question(connection, caller, action, dict(details))
        verdict = await self._ask(question)
        if verdict is not Verdict.AUTHENTICATE or not interactive:
            return verdict
        with self._of_user.share(uid), self._in_all.share(None):
            return await self._ask_person(question, str(next(self._numbers)))

    async def _ask(
        self,
        question: _Question,
        *,
        flags: int = 0,
        cancellation: str = "",
        timeout: float = CALL_TIMEOUT,
    ) -> Verdict:
        try:
            verdict = await question.ask(flags, cancellation, timeout)
        except (BusError, Unreachable, WireError) as error:
            if isinstance(error, BusError) and error.name in _ABSENT:
                return Verdict.ABSENT
            # Anyone can have this happen again and again: it is told once.
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("polkit does not answer: %s", error)  # noqa: TRY400
            return Verdict.UNKNOWN
        self._complaint = ""
        return verdict

    async def _ask_person(self, question: _Question, cancellation: str) -> Verdict:
        """The same with a dialogue. Once the caller has left the bus, polkit itself ends that."""
        verdict: Verdict | None = None
        try:
            with trio.move_on_after(PATIENCE):
                verdict = await self._ask(
                    question,
                    flags=_ALLOW_USER_INTERACTION,
                    cancellation=cancellation,
                    timeout=2 * PATIENCE,
                )
        finally:
            if verdict is None:
                question.withdraw(cancellation)
        return verdict or Verdict.NO


@dataclass(frozen=True, slots=True)
class _Question:
    """One action of one caller."""

    connection: Connection
    caller: str
    action: str
    details: dict[str, str]

    async def ask(self, flags: int, cancellation: str, timeout: float) -> Verdict:
        subject = ("system-bus-name", {"name": Variant("s", self.caller)})
        (result,) = await self.connection.call(
            _BUS,
            _PATH,
            _AUTHORITY,
            "CheckAuthorization",
            "(sa{sv})sa{ss}us",
            subject,
            self.action,
            self.details,
            flags,
            cancellation,
            timeout=timeout,
        )
        assert isinstance(result, list)
        authorised, challenge, _details = result
        if authorised:
            return Verdict.YES
        return Verdict.AUTHENTICATE if challenge else Verdict.NO

    def withdraw(self, cancellation: str) -> None:
        self.connection.call_unanswered(
            _BUS, _PATH, _AUTHORITY, "CancelCheckAuthorization", "s", cancellation
        )
