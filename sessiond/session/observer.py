"""Who is told of what happens to sessions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from sessiond.session.model import SnapshotRecord

if TYPE_CHECKING:
    from sessiond.session.jobs import Job
    from sessiond.session.session import Session


class Observer(Protocol):
    """Told, synchronously, of every change that outsiders may see. Never raises, never blocks."""

    def session_added(self, session: Session) -> None: ...
    def session_removed(self, session: Session) -> None: ...
    def session_changed(self, session: Session) -> None: ...
    def reset_done(self, session: Session) -> None: ...
    def reset_scheduled(self, session: Session, when: datetime, why: str) -> None: ...
    def space_low(self, session: Session, level: str, used: int, limit: int) -> None: ...
    def snapshot_added(self, session: Session, snapshot: SnapshotRecord) -> None: ...
    def snapshot_removed(self, session: Session, snapshot: SnapshotRecord) -> None: ...
    def job_added(self, job: Job) -> None: ...
    def job_changed(self, job: Job) -> None: ...
    def job_completed(self, job: Job) -> None: ...
    def maintenance_changed(self, *, begun: bool) -> None: ...
    def worker_died(self, session: Session, recovered_in: float | None) -> None:
        """`recovered_in` is how many seconds it took until another worker went on for it; None if
        none could, and the session is mounted again.
        """


class Observers:
    """All observers; each is told of everything, in the order in which they came."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def add(self, observer: Observer) -> None:
        """Tell `observer` of all that happens from now on."""
        self._observers.append(observer)

    def tell(self, event: Callable[[Observer], None]) -> None:
        """Tell every observer of `event`."""
        for observer in self._observers:
            event(observer)
