"""The audit trail: each call that takes permission, with who asked for what, and how it ended.

It is a part of the log; docs/monitoring.md says what is in it. How jobs end is logged by the
session layer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum

from sessiond.bus import names
from sessiond.bus.limits import ROOT
from sessiond.bus.wire import BusError
from sessiond.errors import AuthorizationRequired, NotAuthorized, SessiondError
from sessiond.journal import Event, event
from sessiond.session.attempts import Attempts
from sessiond.session.faults import quoted
from sessiond.session.model import Uid

log = logging.getLogger(__name__)

FAILURES_OF_USER = 100
FAILURES_SECONDS = 60.0
"""How many calls of a user that came to nothing are logged within how many seconds.

The journal drops what is more than so much of a service's, and by a flood of calls a user could
have it drop what tells of somebody's deeds.
"""

SHOWN = 256
"""Most characters of a name, which callers may make up, that are logged."""

_USERS_KEPT = 1024


class Outcome(StrEnum):
    """How a call ended; published as SESSIOND_OUTCOME and in the metrics."""

    DONE = "done"
    STARTED = "started"
    """The job that it asked for has begun."""
    REFUSED = "refused"
    """The caller may not do this."""
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """The connection to the bus was lost before the answer."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a caller wants to do."""

    caller: Uid
    operation: str
    """The name of the `Action`."""
    session: str = ""
    """The session's id; empty where there is none yet."""
    user: str = ""
    """Whose session it is, or is to be."""
    looks_only: bool = False
    """It changes nothing, and is the caller's right: not worth a line when it is done."""


class Audit:
    """Logs calls."""

    def __init__(self) -> None:
        self._failures: dict[Uid, _Failures] = {}

    def answered(self, attempt: Attempt, result: object) -> Outcome:
        """Log how a call has ended, by what it returns or raises; return that in a word."""
        outcome = _outcome(result)
        if self._is_worth_a_line(attempt, outcome):
            _log(attempt, outcome, result)
        return outcome

    def _is_worth_a_line(self, attempt: Attempt, outcome: Outcome) -> bool:
        if outcome not in (Outcome.REFUSED, Outcome.FAILED):
            return not (attempt.looks_only and outcome is Outcome.DONE)
        if attempt.caller == ROOT:
            return True
        if attempt.caller not in self._failures and len(self._failures) == _USERS_KEPT:
            del self._failures[next(iter(self._failures))]
        return self._failures.setdefault(attempt.caller, _Failures(attempt.caller)).next_is_told()


class _Failures:
    """Calls of one user that came to nothing."""

    def __init__(self, uid: Uid) -> None:
        self._uid = uid
        self._told = Attempts(most=FAILURES_OF_USER, seconds=FAILURES_SECONDS)
        self._untold = 0

    def next_is_told(self) -> bool:
        """Say whether one more is to be logged."""
        if not self._told.allowed():
            self._untold += 1
            return False
        if self._untold:
            log.warning("%d more calls of uid %d came to nothing.", self._untold, self._uid)
            self._untold = 0
        return True


def _outcome(result: object) -> Outcome:
    match result:
        case NotAuthorized() | AuthorizationRequired():
            return Outcome.REFUSED
        case Exception():
            return Outcome.FAILED
        case BaseException():
            return Outcome.INTERRUPTED
        case str() if names.job_of(result) is not None:
            return Outcome.STARTED
        case _:
            return Outcome.DONE


def _log(attempt: Attempt, outcome: Outcome, result: object) -> None:
    match result:
        case str(path) | (str(path), *_):
            pass
        case _:
            path = ""
    session = attempt.session or names.session_of(path)
    job = names.job_of(path)
    error = _error_name(result) if isinstance(result, Exception) else None
    details = f" as job {job}" if job is not None else f" ({error})" if error else ""
    log.log(
        logging.WARNING if outcome is Outcome.REFUSED else logging.INFO,
        "Request of uid %d: %s%s%s: %s%s",
        attempt.caller,
        attempt.operation,
        f", session {quoted(session)}" if session else "",
        f" of user {quoted(attempt.user)}" if attempt.user else "",
        outcome.value,
        details,
        extra=event(
            Event.REQUEST,
            caller_uid=attempt.caller,
            operation=attempt.operation,
            session=session[:SHOWN] or None,
            user=attempt.user[:SHOWN] or None,
            job=job,
            outcome=outcome.value,
            error=error,
        ),
    )


def _error_name(error: Exception) -> str:
    """Return what the D-Bus error is called, without what all of them begin with."""
    if isinstance(error, SessiondError):
        return names.error_name(error).rpartition(".")[2]
    return error.name.rpartition(".")[2] if isinstance(error, BusError) else "Failed"
