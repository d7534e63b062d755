"""Jobs: long operations on a session, with progress and cancellation.

A session has at most one job at a time; a second one is refused with `Busy`, which names the first.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import trio

from sessiond.errors import Cancelled, Failed, Interrupted, SessiondError
from sessiond.journal import Event, event
from sessiond.session.conflicts import Program
from sessiond.session.model import JobRecord, Operation, SessionId, SessionRecord, Uid

if TYPE_CHECKING:
    from sessiond.session.observer import Observers

log = logging.getLogger(__name__)

_ERRORS = {kind.__name__: kind for kind in SessiondError.__subclasses__()}


class JobNumbers:
    """Numbers for jobs: one that a client may still know is not used for another."""

    def __init__(self) -> None:
        self._last = 0

    def take(self) -> int:
        """Return a new number."""
        self._last += 1
        return self._last

    def skip(self, number: int) -> None:
        """`number` has been used, by an earlier manager."""
        self._last = max(self._last, number)


class Job:
    """One running or finished operation. Attributes are read-only for others."""

    id: int
    session: SessionId
    operation: Operation
    started_by: Uid
    progress: float
    """0 to 1; meaningful when `progress_valid`."""
    progress_valid: bool
    bytes: int
    """Bytes still to be, or already, copied in all; 0 where the operation copies nothing."""
    error: SessiondError | None
    finished: bool
    conflicts: tuple[Program, ...]
    """What used the merged view when the job began to end that; empty if it did not."""

    def __init__(
        self,
        number: int,
        session: SessionRecord,
        operation: Operation,
        started_by: Uid,
        observers: Observers,
    ) -> None:
        self.id = number
        self.session = session.id
        self._user = session.user
        self.operation = operation
        self.started_by = started_by
        self.progress = 0.0
        self.progress_valid = False
        self.bytes = 0
        self.error = None
        self.finished = False
        self.conflicts = ()
        self._observers = observers
        self._scope = trio.CancelScope()
        self._stopped_by: SessiondError | None = None
        self._finished = trio.Event()

    @classmethod
    def of_earlier_manager(
        cls, noted: JobRecord, session: SessionRecord, observers: Observers
    ) -> Job:
        """Return the last job of a session, as a manager that is gone has `noted` it.

        If it was not finished, it has either had its effect on the session or none.
        """
        job = cls(noted.number, session, noted.operation, noted.started_by, observers)
        if noted.finished:
            if noted.error:
                job.error = _ERRORS.get(noted.error, Failed)(noted.message)
        elif not noted.was_done(session):
            job.error = Interrupted(
                f"The {job.operation} of session {job.session} was running when sessiond ended, "
                "and was undone; start it again."
            )
        job._settle()
        return job

    @property
    def outcome(self) -> str:
        """Say in a word how it has ended, for those who count."""
        if self.error is None:
            return "succeeded"
        return "cancelled" if isinstance(self.error, Cancelled) else "failed"

    @property
    def in_words(self) -> str:
        """Say what runs, for those who have to wait for it."""
        done = f", and is {self.progress:.0%} done" if self.progress_valid else ""
        return (
            f"job {self.id}, a {self.operation} started by uid {self.started_by}, is running{done}"
        )

    def noted(self, begun: JobRecord) -> JobRecord:
        """Return what is to be noted in place of `begun`, now that there is an outcome."""
        return begun.model_copy(
            update={
                "finished": True,
                "error": type(self.error).__name__ if self.error else "",
                "message": str(self.error) if self.error else "",
            }
        )

    def cancel(self) -> None:
        """Ask the job to stop; it rolls back and completes with `Cancelled`.

        If it is too late for that, it completes as if nothing had been asked.
        """
        self.stop(Cancelled(f"The {self.operation} of session {self.session} was cancelled."))

    def stop(self, reason: SessiondError) -> None:
        """The same, with another error than `Cancelled`."""
        if self._stopped_by is None:
            self._stopped_by = reason
            self._scope.cancel()

    async def wait(self) -> None:
        """Return when the job has succeeded; raise its error when it has failed."""
        await self._finished.wait()
        if self.error is not None:
            raise self.error

    def report(self, done: int, total: int) -> None:
        """Say how many bytes of how many are copied."""
        self.bytes = total
        self.progress_valid = total > 0
        self.progress = min(done / total, 1.0) if total else 0.0
        self._observers.tell(lambda observer: observer.job_changed(self))

    def report_conflicts(self, programs: Sequence[Program]) -> None:
        """Say what uses the merged view, and is about to be ended."""
        self.conflicts = tuple(programs)
        self._observers.tell(lambda observer: observer.job_changed(self))

    async def run(self, body: Callable[[Job], Awaitable[None]]) -> None:
        """Run `body` and keep its outcome; `finish` has to follow. A fault in it is logged here."""
        try:
            with self._scope:
                await body(self)
        except SessiondError as error:
            self.error = error
        except trio.Cancelled:
            self.error = self._stopped_by or Cancelled(
                f"The {self.operation} of session {self.session} ended with the session."
            )
            raise
        except Exception:
            log.exception("The %s of session %s failed by a fault.", self.operation, self.session)
            self.error = Failed(
                f"The {self.operation} of session {self.session} failed by a fault in sessiond; "
                "its log has the details."
            )
        if self._scope.cancelled_caught:
            self.error = self._stopped_by

    def finish(self) -> None:
        """Let everyone know of the outcome."""
        self.log_outcome()
        self._settle()
        self._observers.tell(lambda observer: observer.job_completed(self))

    def log_outcome(self) -> None:
        """Say in the log how it has ended."""
        log.info(
            "The %s of session %s for uid %d %s",
            self.operation,
            self.session,
            self.started_by,
            "is done" if self.error is None else f"is not done: {self.error}",
            extra=event(
                Event.JOB_ENDED,
                session=self.session,
                user=self._user,
                caller_uid=self.started_by,
                operation=self.operation.value,
                job=self.id,
                outcome=self.outcome,
                error=None if self.error is None else type(self.error).__name__,
            ),
        )

    def _settle(self) -> None:
        if self.error is None:
            self.progress, self.progress_valid = 1.0, True
        self.finished = True
        self._finished.set()
