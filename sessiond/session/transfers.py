"""Snapshots that leave a session, or come to it, as archives through pipes.

These jobs do not hold their session: whoever reads or writes the other end takes the time that he
likes, and nobody else has to wait for that. An export reads layers that do not change; if they are
gone by its end, it fails without having completed the archive. An import fills a layer that no
record names, and only its last step, which publishes it, is an operation on the session.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from sessiond.errors import NoSuchSnapshot, SessiondError
from sessiond.overlay.layer import Layer
from sessiond.overlay.stack import Stack
from sessiond.session import pipes, squashfs
from sessiond.session.faults import explained
from sessiond.session.jobs import Job
from sessiond.session.model import (
    ArchiveKind,
    Operation,
    SessionRecord,
    SnapshotName,
    SnapshotRecord,
    Uid,
)
from sessiond.session.mounts import sync_file_system
from sessiond.session.oci_reader import Read, read_layer
from sessiond.session.oci_writer import write_layer
from sessiond.session.pipes import Pipe
from sessiond.session.tree import tree_bytes

if TYPE_CHECKING:
    from sessiond.session.session import Session

_REPORT_SECONDS = 0.2


class Transfers:
    """Those of one session that go on."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._jobs: set[Job] = set()

    def export(
        self, snapshot: SnapshotRecord, target: int, kind: ArchiveKind, *, started_by: Uid
    ) -> Job:
        """Begin to write a snapshot to the pipe `target`. Raises `InvalidOption`."""
        pipe = pipes.take(target, write=True)
        return self._start(
            Operation.EXPORT, started_by, pipe, lambda job: self._export(job, snapshot, pipe, kind)
        )

    def add(self, name: SnapshotName, description: str, source: int, *, started_by: Uid) -> Job:
        """Begin to make a snapshot of what the pipe `source` gives. Raises `InvalidOption`."""
        pipe = pipes.take(source, write=False)
        snapshot = partial(SnapshotRecord, name=name, description=description)
        return self._start(
            Operation.IMPORT, started_by, pipe, lambda job: self._import(job, snapshot, pipe)
        )

    def stop(self, reason: SessiondError) -> None:
        """Give all of them up."""
        for job in self._jobs:
            job.stop(reason)

    @property
    def read_layers(self) -> bool:
        """Whether committed layers are being read."""
        return any(job.operation is Operation.EXPORT for job in self._jobs)

    def _start(
        self,
        operation: Operation,
        started_by: Uid,
        pipe: int,
        body: Callable[[Job], Awaitable[None]],
    ) -> Job:
        services = self._session.services
        number = services.job_numbers.take()
        job = Job(number, self._session.record, operation, started_by, services.observers)
        self._jobs.add(job)
        services.observers.tell(lambda observer: observer.job_added(job))
        self._session.start_soon(self._run, job, pipe, body)
        return job

    async def _run(self, job: Job, pipe: int, body: Callable[[Job], Awaitable[None]]) -> None:
        try:
            await job.run(body)
        finally:
            os.close(pipe)
            self._jobs.discard(job)
            job.finish()

    async def _in_thread(self, action: str, function: Callable[[], None]) -> None:
        with explained(action):
            limiter = self._session.services.transfers
            await trio.to_thread.run_sync(function, limiter=limiter)

    # Out

    async def _export(
        self, job: Job, snapshot: SnapshotRecord, pipe: int, kind: ArchiveKind
    ) -> None:
        await self._session.flattening.rest()
        image = await self._session.view.image()
        record = self._session.record
        write = partial(self._write, job, record, snapshot, image.root, pipe, kind)
        await self._in_thread(f"export snapshot {snapshot.name} of session {record.id}", write)

    def _write(
        self,
        job: Job,
        record: SessionRecord,
        snapshot: SnapshotRecord,
        image: Path,
        pipe: int,
        kind: ArchiveKind,
    ) -> None:
        store, check = self._session.services.store, trio.from_thread.check_cancelled
        # By itself, a stack of these layers and no others.
        below = record.model_copy(update={"layers": snapshot.layers})
        total = sum(tree_bytes(path, check) for path in store.lowers(below))
        with closing(
            Stack.open(
                [os.fsencode(path) for path in (*store.lowers(below), image)],
                indexes=[os.fsencode(path) for path in store.indexes(below) if path.is_dir()],
            )
        ) as stack:
            report, target = _Report(job, total), Pipe(pipe, check)
            require_kept = partial(trio.from_thread.run_sync, self._require_kept, snapshot)
            if kind is ArchiveKind.SQUASHFS:
                squashfs.write_image(stack, target, store.disk, report, check, require_kept)
                return
            archive = write_layer(stack, target.write, report)
            require_kept()
            archive.complete()

    def _require_kept(self, snapshot: SnapshotRecord) -> None:
        # No layer's number is used twice: those that are there now have been there all the time.
        if not self._session.record.all_layers.issuperset(snapshot.layers):
            raise NoSuchSnapshot(
                f"The snapshot {snapshot.name} of session {self._session.id} was deleted while it "
                "was exported."
            )

    # In

    async def _import(self, job: Job, snapshot: Callable[..., SnapshotRecord], pipe: int) -> None:
        session, store = self._session, self._session.services.store
        image = await session.view.image()
        record = session.record
        draft = await trio.to_thread.run_sync(store.make_draft, record, image.root)
        published = False
        try:
            fill = partial(self._fill, job, draft / "fs", image.root, pipe)
            await self._in_thread(f"import a snapshot into session {record.id}", fill)
            await session.snapshots.publish_draft(draft, record, snapshot)
            published = True
        finally:
            if not published:
                session.services.delete_soon((draft,))

    def _fill(self, job: Job, target: Path, image: Path, pipe: int) -> None:
        check = trio.from_thread.check_cancelled
        report = _Report(job, 0)
        with (
            closing(Layer.open(os.fsencode(target), writable=True)) as layer,
            closing(Layer.open(os.fsencode(image), writable=False)) as below,
        ):
            source = Pipe(pipe, check)
            head, read = _peeked(source.read, len(squashfs.MAGIC))
            if head == squashfs.MAGIC:
                disk = self._session.services.store.disk
                squashfs.read_image(read, layer, below, disk, report, check)
            else:
                read_layer(read, layer, below, report)
        sync_file_system(target)


def _peeked(read: Read, size: int) -> tuple[bytes, Read]:
    """Return what comes first, at most `size` bytes, and what gives all, as `read` does."""
    head = b""
    while len(head) < size and (data := read(size - len(head))):
        head += data
    ahead = [head]

    def read_all(size: int) -> bytes:
        if not ahead:
            return read(size)
        first = ahead.pop()
        if len(first) > size:
            ahead.append(first[size:])
        return first[:size]

    return head, read_all if head else read


class _Report:
    """Tells a job how far it is; called in a thread."""

    def __init__(self, job: Job, total: int) -> None:
        """`total`: bytes; 0 where nobody knows."""
        self._job = job
        self._total = total
        self._done = 0
        self._next = 0.0

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _REPORT_SECONDS
            total = max(self._total, self._done) if self._total else 0
            trio.from_thread.run_sync(self._job.report, self._done, total)
