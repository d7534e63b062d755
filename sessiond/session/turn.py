"""Whose turn it is on a session: one operation at a time, which every other one is refused for.

Between two checkpoints a task has the session to itself; over checkpoints, an operation holds it,
and others are refused with `Busy`. An operation that takes long is a job.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from sessiond.errors import Busy, NoSuchSession, SessiondError
from sessiond.session.flattening import FLATTENING
from sessiond.session.jobs import Job
from sessiond.session.model import JobRecord, LayerNumber, Operation, SessionState, Uid

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)


class Turn:
    """That of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._operation: str | None = None
        self._idle = trio.Event()
        self._job: Job | None = None
        self.last_job: Job | None = None
        """The job that runs, or else ran last."""
        self.closing = False
        """Nothing new begins any more."""

    def require_open(self) -> None:
        """Raise `NoSuchSession` if the session is about to end, or has ended."""
        if self.closing:
            raise NoSuchSession(f"Session {self._session.id} is being closed, or has been.")

    def give_up(self, reason: SessiondError) -> None:
        """Have the job that runs, if one does, fail with `reason`."""
        if self._job is not None:
            self._job.stop(reason)

    def close(self, reason: SessiondError) -> None:
        """The same, and let nothing new begin."""
        self.closing = True
        self.give_up(reason)

    def _begin(self, operation: str, state: SessionState) -> None:
        self.require_open()
        if self._operation is not None:
            running = self._job.in_words if self._job else self._operation
            hint = "Wait for that to end" + (", or cancel it." if self._job else ".")
            raise Busy(f"Session {self._session.id} is busy: {running}. {hint}")
        self._operation = operation
        self._idle = trio.Event()
        self._session.set_state(state)

    def _end(self) -> None:
        self._operation = None
        self._idle.set()
        session = self._session
        if self.closing:
            return
        if session.view.mount is not None:
            session.set_state(SessionState.ACTIVE)
        else:
            session.set_state(SessionState.INACTIVE if session.resting else SessionState.FAILED)

    @contextmanager
    def operating(self, operation: str, state: SessionState = SessionState.BUSY) -> Iterator[None]:
        """Hold the session for an operation, named in words. Raises `Busy`, `NoSuchSession`."""
        self._begin(operation, state)
        try:
            yield
        finally:
            self._end()

    async def become_idle(self) -> None:
        """Wait until no operation runs; none can begin before the caller's next checkpoint."""
        while self._operation is not None:
            await self._idle.wait()

    @property
    def is_idle(self) -> bool:
        """Whether no operation runs."""
        return self._operation is None

    async def undisturbed(self) -> None:
        """Wait for what nobody has asked for, and nobody is to be refused for; it is short."""
        while self._operation == FLATTENING:
            await self._idle.wait()

    def start_job(
        self,
        operation: Operation,
        started_by: Uid,
        body: Callable[[Job], Awaitable[None]],
        *,
        layers: tuple[LayerNumber, ...] | None = None,
        committing: tuple[str, ...] = (),
    ) -> Job:
        """Hold the session for a job. Raises `Busy`, `NoSuchSession`.

        `layers`, `committing`: see `JobRecord`.
        """
        self._begin(f"a {operation} is running", SessionState.BUSY)
        session, services = self._session, self._session.services
        number = services.job_numbers.take()
        job = Job(number, session.record, operation, started_by, services.observers)
        self._job = self.last_job = job
        session.tell(lambda observer: observer.job_added(job))
        session.tell_changed()
        session.start_soon(self._run_job, job, body, layers, committing)
        return job

    async def _run_job(
        self,
        job: Job,
        body: Callable[[Job], Awaitable[None]],
        layers: tuple[LayerNumber, ...] | None,
        committing: tuple[str, ...],
    ) -> None:
        record = self._session.record
        begun = JobRecord(
            number=job.id,
            operation=job.operation,
            started_by=job.started_by,
            storage=record.storage,
            upper=record.upper,
            layers=layers,
            image=record.image,
            committing=committing,
        )
        try:
            await self._note_job(begun)
            await self._session.flattening.rest()
            await job.run(body)
        finally:
            # Before anyone is told, so that a manager that dies now has told nothing else.
            await self._note_job(job.noted(begun))
            self._job = None
            self._end()
            job.finish()

    async def _note_job(self, job: JobRecord) -> None:
        store = self._session.services.store
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(store.write_job, self._session.id, job)
            except SessiondError as error:
                # It goes on: a reset is what frees space.
                log.warning("%s Should sessiond die, it will not know of the job.", error)

    async def recover_job(self, noted: JobRecord) -> None:
        """Know the last job that an earlier manager has run, and how it has ended."""
        session, services = self._session, self._session.services
        services.job_numbers.skip(noted.number)
        self.last_job = Job.of_earlier_manager(noted, session.record, services.observers)
        if not noted.finished:
            self.last_job.log_outcome()
            await self._note_job(self.last_job.noted(noted))
