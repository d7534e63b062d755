"""Persist: move a volatile session to disk while it runs.

What does not change is copied first: a new upper is pushed, as for a snapshot, and the layers below
it are copied while programs go on writing; again, until little was written meanwhile. Only for that
rest are the writers held. What was copied is read back from the disk and compared. Then the record
on disk is written, which is the moment at which the session becomes persistent, and the merged view
is switched over to the copies. A crash before that moment leaves the volatile session as it was,
one after it the persistent one, complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import trio

from sessiond.errors import Failed, NoSpace, SessiondError
from sessiond.session.faults import explained
from sessiond.session.model import LayerNumber, SessionRecord, StorageKind
from sessiond.session.mounts import sync_file_system
from sessiond.session.space import measure
from sessiond.session.tree import Digests, copy_trees, tree_bytes
from sessiond.session.verify import verify_trees

if TYPE_CHECKING:
    from sessiond.session.jobs import Job
    from sessiond.session.session import Session

T = TypeVar("T")

log = logging.getLogger(__name__)

_MOST_ROUNDS = 4
"""Layers pushed at most, for a session that writes as fast as the disk takes it."""
_LITTLE = 16 << 20
"""Bytes that may be copied while writers wait."""
_REPORT_SECONDS = 0.2


async def move_to_disk(session: Session, job: Job, *, verify: bool = True) -> None:
    """Make `session` persistent; within its operation. Rolls back when it fails or is cancelled.

    With `verify`, what was written is read back from the disk first. For a session that is
    persistent, return when all its changes are on disk. Raises `NoSpace`, `Failed`,
    `ImageUnavailable`.
    """
    if session.storage is StorageKind.PERSISTENT:
        await session.view.require().sync()
        return
    move = _Move(session, job, verify=verify)
    try:
        await move.copy_while_running()
        await move.switch_over()
    except BaseException as error:
        with trio.CancelScope(shield=True):
            try:
                await move.roll_back()
            except SessiondError as undo:
                raise Failed(f"{error} Then going back failed as well. {undo}") from error
        raise
    finally:
        with trio.CancelScope(shield=True):
            await move.drop_volatile()


class _Move:
    """One attempt. `_copied` are the layers that are on disk, and cannot change any more."""

    def __init__(self, session: Session, job: Job, *, verify: bool) -> None:
        self._session = session
        self._store = session.services.store
        self._job = job
        self._verify = verify
        self._copied: set[LayerNumber] = set()
        self._bytes_copied = 0
        self._bytes_read_back = 0
        self._bytes_total = 0
        self._next_report = 0.0
        self._made_storage = False
        self._recorded = False
        self._volatile: SessionRecord | None = None
        """What the session was; once that is set there is no way back."""

    @property
    def _target(self) -> SessionRecord:
        return self._session.record.model_copy(update={"storage": StorageKind.PERSISTENT})

    async def copy_while_running(self) -> None:
        """Copy all layers but an upper with little in it."""
        await self._in_thread(self._require_space)
        await trio.to_thread.run_sync(self._store.create_on_disk, self._target)
        self._made_storage = True
        for _ in range(_MOST_ROUNDS):
            await self._session.switch(self._session.record.committed())
            await self._in_thread(self._copy_committed)
            if await self._in_thread(self._upper_bytes) <= _LITTLE:
                return

    async def switch_over(self) -> None:
        """Hold writers, copy the upper, and make the copies the session."""
        async with self._session.view.require().frozen():
            await self._in_thread(self._copy_upper)
            await trio.lowlevel.checkpoint_if_cancelled()
            target = self._target
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._store.write, target)
                self._recorded = True
                await self._session.view.serve(target, moved=True)
                self._volatile = self._session.record
                self._session.adopt(target)

    async def drop_volatile(self) -> None:
        """Forget the volatile session, if it has moved.

        Where both are found at start, the persistent one counts.
        """
        if self._volatile is None:
            return
        try:
            await trio.to_thread.run_sync(self._store.forget, self._volatile)
            await self._session.settling.begin()
        except SessiondError as error:
            log.error("Session %s is persistent, but: %s", self._volatile.id, error)  # noqa: TRY400

    async def roll_back(self) -> None:
        """Remove what was written to disk, unless the session has moved there. Raises `Failed`."""
        if self._volatile is not None:
            return
        if self._recorded:
            await trio.to_thread.run_sync(self._store.forget, self._target)
        if self._made_storage:
            self._session.services.delete_soon(
                await trio.to_thread.run_sync(
                    self._store.discard, self._session.id, StorageKind.PERSISTENT
                )
            )

    # In a thread, each

    async def _in_thread(self, function: Callable[[], T]) -> T:
        with explained(f"copy session {self._session.id} to disk"):
            return await trio.to_thread.run_sync(function)

    def _require_space(self) -> None:
        record = self._session.record
        self._bytes_total = sum(
            tree_bytes(self._store.layer(record, number), trio.from_thread.check_cancelled)
            for number in record.all_layers
        )
        space = measure(self._store.storage(self._target).parent)
        if self._bytes_total > space.bytes_total - space.bytes_used:
            raise NoSpace(
                f"Session {record.id} takes {self._bytes_total} bytes, and only "
                f"{space.bytes_total - space.bytes_used} are free for persistent sessions; "
                "make room on that disk."
            )
        if record.quota is not None and self._bytes_total > record.quota.bytes:
            raise NoSpace(
                f"Session {record.id} takes {self._bytes_total} bytes, and its quota on disk is "
                f"{record.quota.bytes}; delete files or snapshots."
            )

    def _copy_committed(self) -> None:
        record = self._session.record
        self._copy(sorted(record.all_layers - {record.upper} - self._copied))

    def _upper_bytes(self) -> int:
        record = self._session.record
        return tree_bytes(self._store.layer(record, record.upper), trio.from_thread.check_cancelled)

    def _copy_upper(self) -> None:
        self._copy([self._session.record.upper])

    def _copy(self, numbers: Sequence[LayerNumber]) -> None:
        """Copy layers; on disk, and verified, when this returns."""
        digests: dict[LayerNumber, Digests] = {number: {} for number in numbers}
        for number in numbers:
            self._copy_layer(number, digests[number] if self._verify else None)
        sync_file_system(self._store.storage(self._target))
        if self._verify:
            for number in numbers:
                self._verify_layer(number, digests.pop(number))
        self._copied.update(numbers)

    def _copy_layer(self, number: LayerNumber, digests: Digests | None) -> None:
        source, target = self._layers(number)
        for directory in (target, target / "work"):
            directory.mkdir(mode=0o700, exist_ok=True)
        copy_trees(
            source,
            target,
            _contents(source),
            progress=self._count_copied,
            check=trio.from_thread.check_cancelled,
            digests=digests,
        )

    def _verify_layer(self, number: LayerNumber, digests: Digests) -> None:
        source, target = self._layers(number)
        with explained(f"verify the copy of session {self._session.id}, which stays in RAM"):
            verify_trees(
                source,
                target,
                _contents(source),
                digests,
                progress=self._count_read_back,
                check=trio.from_thread.check_cancelled,
            )

    def _layers(self, number: LayerNumber) -> tuple[Path, Path]:
        record = self._session.record
        return self._store.layer(record, number), self._store.layer(self._target, number)

    def _count_copied(self, count: int) -> None:
        self._bytes_copied += count
        self._report()

    def _count_read_back(self, count: int) -> None:
        self._bytes_read_back += count
        self._report()

    def _report(self) -> None:
        self._bytes_total = max(self._bytes_total, self._bytes_copied)
        now = time.monotonic()
        if now >= self._next_report:
            self._next_report = now + _REPORT_SECONDS
            done = self._bytes_copied
            if self._verify:
                done = (done + min(self._bytes_read_back, done)) // 2
            trio.from_thread.run_sync(self._job.report, done, self._bytes_total)


def _contents(layer: Path) -> tuple[str, ...]:
    """Return what belongs to a layer's contents: of the workdir, only the index of hard links."""
    return ("fs", "work/index") if (layer / "work/index").is_dir() else ("fs",)
