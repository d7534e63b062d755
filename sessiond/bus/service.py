"""sessiond on the bus: keeps the D-Bus objects like the manager's sessions, and serves them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

import trio

from sessiond.bus import names
from sessiond.bus.audit import Attempt, Audit
from sessiond.bus.connection import Connection, connect
from sessiond.bus.objects import (
    COMPLETED,
    MAINTENANCE_ANNOUNCED,
    RESET_DONE,
    RESET_SCHEDULED,
    SESSION_NEW,
    SESSION_REMOVED,
    SPACE_LOW,
    JobObject,
    ManagerObject,
    SessionObject,
    SnapshotObject,
    microseconds,
)
from sessiond.bus.operations import Operations
from sessiond.bus.tree import ObjectTree
from sessiond.bus.wire import BusError, shown
from sessiond.errors import ConfigError, Failed, SessiondError
from sessiond.session.jobs import Job
from sessiond.session.manager import Manager, Session
from sessiond.session.model import SnapshotRecord

log = logging.getLogger(__name__)

FINISHED_JOBS_KEPT = 32
"""Besides the last job of each session."""
RECONNECT_INTERVAL = 2.0
"""Seconds between attempts to find a lost bus again."""


class Service:
    """The objects on the bus, and the `Observer` by which they follow the manager.

    `answered` is told of each call that took permission: its operation, and how it has ended.
    """

    def __init__(self, manager: Manager, answered: Callable[[str, str], None]) -> None:
        self.tree = ObjectTree(names.ROOT_PATH, self._request_answered)
        self._audit = Audit()
        self._answered = answered
        self._manager = manager
        self._operations = Operations(manager, self._publish)
        self._finished: list[Job] = []
        self.tree.add(names.ROOT_PATH, ManagerObject(manager, self._operations))
        manager.observe(self)
        for session in manager.sessions.values():
            self.session_added(session)
            if session.last_job is not None:
                self._publish(session.last_job)
                if session.last_job.finished:
                    self._finished.append(session.last_job)

    def session_added(self, session: Session) -> None:
        path = names.session_path(session.id)
        self.tree.add(path, SessionObject(session, self._operations))
        self._follow_snapshots(session)
        self.tree.emit(names.ROOT_PATH, SESSION_NEW, session.id, path)
        self.tree.changed(names.ROOT_PATH)

    def session_removed(self, session: Session) -> None:
        path = names.session_path(session.id)
        for below in self.tree.below(path):
            self.tree.remove(below)
        self.tree.remove(path)
        self.tree.emit(names.ROOT_PATH, SESSION_REMOVED, session.id, path)
        self.tree.changed(names.ROOT_PATH)

    def session_changed(self, session: Session) -> None:
        self._follow_snapshots(session)
        self.tree.changed(names.session_path(session.id))
        self.tree.changed(names.ROOT_PATH)

    def reset_done(self, session: Session) -> None:
        self.tree.emit(names.session_path(session.id), RESET_DONE)

    def reset_scheduled(self, session: Session, when: datetime, why: str) -> None:
        path = names.session_path(session.id)
        self.tree.emit(path, RESET_SCHEDULED, microseconds(when), why)

    def space_low(self, session: Session, level: str, used: int, limit: int) -> None:
        self.tree.emit(names.session_path(session.id), SPACE_LOW, level, used, limit)

    def snapshot_added(self, session: Session, snapshot: SnapshotRecord) -> None:
        self.session_changed(session)

    def snapshot_removed(self, session: Session, snapshot: SnapshotRecord) -> None:
        self.session_changed(session)

    def job_added(self, job: Job) -> None:
        self._publish(job)

    def job_changed(self, job: Job) -> None:
        self.tree.changed(names.job_path(job.id))

    def maintenance_changed(self, *, begun: bool) -> None:
        self.tree.changed(names.ROOT_PATH)
        record = self._manager.maintenance
        if begun and record is not None:
            announced = (shown(record.profile), shown(record.message))
            self.tree.emit(names.ROOT_PATH, MAINTENANCE_ANNOUNCED, *announced)

    def job_completed(self, job: Job) -> None:
        path = names.job_path(job.id)
        self.tree.changed(path)
        error = shown(str(job.error)) if job.error else ""
        self.tree.emit(path, COMPLETED, job.error is None, error)
        self._finished.append(job)
        unwanted = [other for other in self._finished if not self._is_last(other)]
        for other in unwanted[:-FINISHED_JOBS_KEPT]:
            self._finished.remove(other)
            self.tree.remove(names.job_path(other.id))

    def worker_died(self, session: Session, recovered_in: float | None) -> None:
        """Not told: the session's state is, if it is not served for a while."""

    def _is_last(self, job: Job) -> bool:
        session = self._manager.sessions.get(job.session)
        return session is not None and session.last_job is job

    def _request_answered(self, attempt: Attempt, result: object) -> None:
        self._answered(attempt.operation, self._audit.answered(attempt, result).value)

    def _publish(self, job: Job) -> str:
        path = names.job_path(job.id)
        if path not in self.tree:
            self.tree.add(path, JobObject(job, self._manager.sessions[job.session]))
        return path

    def _follow_snapshots(self, session: Session) -> None:
        """Have an object for each snapshot of the session, under its present name, and no other."""
        wanted = {names.snapshot_path(session.id, name): name for name in session.snapshots}
        for path in self.tree.below(names.session_path(session.id)):
            if path not in wanted:
                self.tree.remove(path)
        for path, name in wanted.items():
            if path not in self.tree:
                self.tree.add(path, SnapshotObject(session, name, self._operations))
        for path in wanted:
            self.tree.changed(path)


async def serve(
    manager: Manager,
    *,
    address: str | None = None,
    answered: Callable[[str, str], None] = lambda operation, outcome: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `manager` on the bus at `address`, by default the system bus, until cancelled.

    A bus that is not there, denies us the name, or is lost is looked for until it is back, and the
    reason logged, once: sessions do not depend on it. Reports started when the name is taken, or
    could not be taken at once. `answered` is told of requests, as `Service` says.
    """
    service = Service(manager, answered)
    complaint = ""
    starting = True

    def report_started() -> None:
        nonlocal starting
        if starting:
            starting = False
            task_status.started()

    while True:
        try:
            async with connect(address, handler=service.tree.handle) as connection:
                service.tree.connection = connection
                await _take_name(connection)
                if complaint:
                    log.info("The message bus is back.")
                    complaint = ""
                report_started()
                await trio.sleep_forever()
        except SessiondError as error:
            if str(error) != complaint:
                complaint = str(error)
                log.error(  # noqa: TRY400
                    "%s Sessions go on without; trying to reach the bus again.", complaint
                )
        finally:
            service.tree.connection = None
        report_started()
        await trio.sleep(RECONNECT_INTERVAL)


async def _take_name(connection: Connection) -> None:
    try:
        ours = await connection.request_name(names.BUS)
    except BusError as error:
        raise ConfigError(
            f"The bus does not let this process be {names.BUS} ({error.text}). Run it as root, "
            f"with {names.BUS}.conf in /usr/share/dbus-1/system.d known to the bus."
        ) from error
    if not ours:
        raise Failed(f"Another process is {names.BUS} on this bus. Stop that sessiond first.")
