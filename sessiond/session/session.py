"""One session: what is served, what is recorded of it, and the operations that change both.

Between two checkpoints a task has the session to itself; over checkpoints, an operation holds it by
`_begin` and `_end`, and every other one is refused with `Busy`. The record on disk always names
what is served, or what is about to be: a crash between the two loses nothing that was written
before the operation, or all that the operation was to throw away.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio

from sessiond.errors import (
    Busy,
    Cancelled,
    Failed,
    ImageUnavailable,
    Interrupted,
    InvalidOption,
    NoSpace,
    NoSuchSession,
    SessiondError,
    SnapshotExists,
)
from sessiond.journal import Event, event
from sessiond.session import conflicts, kept, mount_point, rebase
from sessiond.session.attempts import Attempts
from sessiond.session.clock import Instant
from sessiond.session.conflicts import Program
from sessiond.session.faults import explained
from sessiond.session.flattening import FLATTENING, Flattening
from sessiond.session.images import Image
from sessiond.session.jobs import Job
from sessiond.session.model import (
    AT_ONCE,
    ChangeSummary,
    Conflicts,
    ImageSource,
    JobRecord,
    LayerNumber,
    Lowers,
    Manner,
    Operation,
    PendingFile,
    ScheduledReset,
    SessionId,
    SessionRecord,
    SessionState,
    SnapshotName,
    SnapshotRecord,
    Span,
    Stack,
    StorageKind,
    Uid,
    Usage,
    snapshot_name,
)
from sessiond.session.mounter import VIEW_TYPE, Mount, MountRequest
from sessiond.session.observer import Observer
from sessiond.session.persist import move_to_disk
from sessiond.session.reset_timer import ResetTimer
from sessiond.session.restore import automatic_name, restore
from sessiond.session.retention import Removal, outdated
from sessiond.session.schedule import Due, Why
from sessiond.session.services import Services
from sessiond.session.settling import Settling
from sessiond.session.space import LimitedBy, SpaceLevel, SpaceWatch, measure
from sessiond.session.transfers import Transfers
from sessiond.session.tree import Check
from sessiond.session.upkeep import SnapshotSize, Upkeep

log = logging.getLogger(__name__)

LAYERS_LIMIT = 250
"""Most layers of a session, the upper included: snapshots must not fill the directory of records,
which is in RAM for volatile sessions, nor the worker's table of descriptors.
"""

DESCRIPTION_LIMIT = 1000
"""Longest description of a snapshot, in characters."""

_PAUSE_SECONDS = 1.0


class Session:
    """One user's merged view. Attributes are read-only for others."""

    def __init__(
        self, record: SessionRecord, services: Services, image: Image | None = None
    ) -> None:
        """A session that is not mounted yet. It owns `image`, if that is acquired already."""
        self.services = services
        self.record = record
        self.mount: Mount | None = None
        """What is served; its worker may have died a moment ago. For this package only."""
        self.state = SessionState.STARTING
        self.failure = ""
        """Why the state is FAILED, as a sentence."""
        self.listed = False
        """Observers know of it; told only of sessions they know. Set by the manager."""
        self.last_job: Job | None = None
        """The job that runs, or else ran last."""
        self._image = image
        self._closing = False
        self._operation: str | None = None
        self._idle = trio.Event()
        self._job: Job | None = None
        self._attempts = Attempts(most=5, seconds=60.0)
        self._recoveries = Attempts(most=20, seconds=10.0)
        self._space = SpaceWatch(record.thresholds)
        self._compared: Counter[LayerNumber] = Counter()
        """Layers that comparisons read: they are deleted after that, if they are to be."""
        self._settling = Settling(self)
        self._deletions = 0
        self._upkeep = Upkeep(self)
        self.timer = ResetTimer(self)
        """Resets that come by themselves, and what holds them back."""
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()
        self._transfers = Transfers(self)
        self._flattening = Flattening(self)

    # What it is

    @property
    def id(self) -> SessionId:
        return self.record.id

    @property
    def user(self) -> str:
        return self.record.user

    @property
    def uid(self) -> Uid:
        return self.record.uid

    @property
    def profile(self) -> str:
        """Name of the profile that it was made from, which may be gone."""
        return self.record.profile

    @property
    def image(self) -> str:
        """Digest of its image."""
        return self.record.image

    @property
    def mount_point(self) -> Path:
        return self.record.mount_point

    @property
    def storage(self) -> StorageKind:
        return self.record.storage

    @property
    def created_at(self) -> datetime:
        return self.record.created_at

    @property
    def last_reset(self) -> datetime | None:
        return self.record.last_reset

    @property
    def snapshots(self) -> Mapping[SnapshotName, SnapshotRecord]:
        """By name, in the order in which they were made."""
        return {snapshot.name: snapshot for snapshot in self.record.snapshots}

    def snapshot_size(self, name: SnapshotName) -> SnapshotSize:
        """Return what a snapshot, which there is, takes on disk, as far as that is known now."""
        return self._upkeep.size(name)

    @property
    def is_deleting(self) -> bool:
        """Whether layers are being deleted, whose space is not given back yet."""
        return self._deletions > 0

    @property
    def keep(self) -> tuple[str, ...]:
        """The rules for what outlives resets."""
        return self.record.keep_rules

    @property
    def usage(self) -> Usage:
        """Bytes and inodes used now; of a session without a limit, those of the whole disk."""
        return self._space.usage(self.services.store.storage(self.record), self._limited_by)

    @property
    def space_level(self) -> SpaceLevel:
        """How full the storage was when it was looked at last."""
        return self._space.level

    @property
    def _limited_by(self) -> LimitedBy:
        if self.storage is StorageKind.TMPFS:
            return LimitedBy.FILE_SYSTEM
        return LimitedBy.NOTHING if self.record.quota is None else LimitedBy.QUOTA

    # What may be done to it

    def reset(self, *, started_by: Uid, manner: Manner = AT_ONCE, scheduled: bool = False) -> Job:
        """Go back to the image; snapshots are kept. With `scheduled`, it is what was scheduled.

        How long it takes does not depend on how much was changed. Raises `Busy`, `NoSuchSession`,
        `SnapshotExists`.
        """
        return self._start_switch(
            Operation.RESET, started_by, manner, lambda: self._reset(scheduled), layers=()
        )

    def restore(
        self, name: str, *, started_by: Uid, manner: Manner = AT_ONCE, undo: bool = True
    ) -> Job:
        """Go back to a snapshot.

        With `undo`, what is replaced is kept as an automatic snapshot, unless there is nothing to
        keep, or `manner` has it kept; where there is no space for that, the job fails with
        `NoSpace`. Raises `Busy`, `NoSuchSession`, `NoSuchSnapshot`, `SnapshotExists`.
        """
        target = self.record.snapshot(name)
        keep = undo and not manner.snapshot
        return self._start_switch(
            Operation.RESTORE,
            started_by,
            manner,
            lambda: restore(self, target, undo=keep),
            layers=target.layers,
            besides=target,
        )

    async def reset_when_idle(self, due: Due) -> None:
        """Carry out a reset that is due, after what is being done to the session.

        Raises `NoSuchSession`, `SnapshotExists`, and what the job fails with.
        """
        await self.become_idle()
        scheduled = due.why is Why.SCHEDULED
        job = self.reset(started_by=due.asked_by, manner=due.manner, scheduled=scheduled)
        await job.wait()

    async def schedule(self, scheduled: ScheduledReset | None) -> None:
        """Have a reset come at another time, in place of what was scheduled before; None: no more.

        Raises `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        with self.operating("a reset is being scheduled"):
            await self.write(self.record.model_copy(update={"scheduled": scheduled}))

    async def conflicts(self) -> tuple[Program, ...]:
        """Return the programs that use the merged view now. Raises `NoSuchSession`, `Failed`."""
        self.require_mount()
        device = await trio.to_thread.run_sync(self.services.mounts.device, self.mount_point)
        if device is None:
            return ()
        return await conflicts.find(self.services.surroundings.processes, device)

    def persist(self, *, started_by: Uid, verify: bool = True) -> Job:
        """Make the session survive a reboot. Raises `Busy`, `NoSuchSession`.

        With `verify`, what was written is read back and compared before that counts. For a session
        that is persistent already, the job ends when all its changes are on disk.
        """
        return self._start_job(
            Operation.PERSIST, started_by, lambda job: move_to_disk(self, job, verify=verify)
        )

    def commit(self, paths: list[str], *, started_by: Uid) -> Job:
        """Save what is at `paths` now, so that it outlives resets and this session.

        Raises `InvalidOption`, `NotSupported`, `Busy`, `NoSuchSession`.
        """
        rules = kept.committed_rules(self.record, paths)
        return self._start_job(
            Operation.COMMIT,
            started_by,
            lambda _: kept.commit(self, paths, rules),
            committing=rules,
        )

    async def set_keep(self, rules: list[str], *, when_idle: bool = False) -> None:
        """Have what `rules` name outlive resets; those that are gone hold until the next one.

        `when_idle`: wait for an operation that runs. Raises `InvalidOption`, `NotSupported`,
        `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        checked = kept.checked_rules(self.record, rules)
        if when_idle:
            await self.become_idle()
        with self.operating("the rules for what is kept are being changed"):
            await self.write(self.record.with_keep(checked))
            with trio.CancelScope(shield=True):
                await kept.use_rules(self)

    @property
    def pending(self) -> int:
        """How many files are written in RAM still, since before the session moved to disk."""
        return self._settling.pending

    async def pending_files(self) -> list[PendingFile]:
        """Return these files, and who has them open. Raises `NoSuchSession`, `Failed`."""
        return await self._settling.files()

    async def settle(self) -> None:
        """Give back the RAM of a session that has moved to disk, now or as soon as that can be.

        Raises `NoSuchSession`, `Failed`, if it is not now.
        """
        try:
            await self._settling.look()
        finally:
            self._tasks.start_soon(self._settling.run)

    def tell_changed(self) -> None:
        """Let observers know that something about the session is another."""
        self._tell(lambda observer: observer.session_changed(self))

    def rebase(
        self,
        source: ImageSource,
        *,
        conflicts: Conflicts | None = None,
        remount: bool = False,
        started_by: Uid,
    ) -> Job:
        """Go on over the image that is at `source` now; see `sessiond.session.rebase`.

        With `remount`, also if it is mounted: programs lose what they have open then. Raises
        `Busy`, `NoSuchSession`.
        """
        wanted = self.record.rebase_conflicts if conflicts is None else conflicts
        return self._start_job(
            Operation.REBASE,
            started_by,
            lambda _: rebase.rebase_now(self, source, wanted, remount=remount),
        )

    def publish_image(
        self, install: Callable[[Session, Job], Awaitable[None]], *, started_by: Uid
    ) -> Job:
        """Have `install` make an image of the merged view. Raises `Busy`, `NoSuchSession`."""
        return self._start_job(Operation.MAINTENANCE, started_by, partial(install, self))

    async def snapshot(
        self, name: str, *, description: str = "", pinned: bool = False, automatic: bool = False
    ) -> SnapshotRecord:
        """Keep the merged view as it is now, under `name`; on disk, if the session is.

        A `pinned` one is deleted by nobody but people; an `automatic` one nobody has asked for.
        Raises `InvalidName`, `SnapshotExists`, `InvalidOption`, `Busy`, `NoSuchSession`, `NoSpace`,
        `Failed`.
        """
        checked_name = snapshot_name(name)
        _check_description(description)
        with self.operating("a snapshot is being made"):
            self._require_unused(checked_name)
            after = self.record.committed()
            snapshot = SnapshotRecord(
                name=checked_name,
                description=description,
                created_at=datetime.now(UTC),
                layers=after.layers,
                pinned=pinned,
                automatic=automatic,
            )
            snapshot = await self.switch_and_keep(after, snapshot)
        if self.storage is StorageKind.PERSISTENT:
            # The record is on disk, but not yet all that programs have written into the layer.
            await self.require_mount().sync()
        return snapshot

    async def delete_snapshot(self, name: str) -> None:
        """Forget a snapshot; layers that nothing else needs are deleted in the background.

        Raises `NoSuchSnapshot`, `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        with self.operating("a snapshot is being deleted"):
            await self._forget_snapshots([Removal(self.record.snapshot(name), "")])

    async def rename_snapshot(self, name: str, new_name: str) -> None:
        """Give a snapshot another name.

        Raises `NoSuchSnapshot`, `InvalidName`, `SnapshotExists`, `Busy`, `NoSuchSession`,
        `NoSpace`, `Failed`.
        """
        checked_name = snapshot_name(new_name)
        with self.operating("a snapshot is being renamed"):
            old = self.record.snapshot(name)
            self._require_unused(checked_name)
            new = await self._edit(old, name=checked_name)
        self._tell(lambda observer: observer.snapshot_removed(self, old))
        self._tell(lambda observer: observer.snapshot_added(self, new))

    def export_snapshot(self, name: str, target: int, *, started_by: Uid) -> Job:
        """Write a snapshot to `target`, a pipe, as an OCI layer; other operations go on meanwhile.

        Raises `NoSuchSnapshot`, `InvalidOption`, `NoSuchSession`. The caller closes `target`.
        """
        self._require_open()
        return self._transfers.export(self.record.snapshot(name), target, started_by=started_by)

    def import_snapshot(
        self, name: str, source: int, *, description: str = "", started_by: Uid
    ) -> Job:
        """Make a snapshot of what `source` gives, a pipe; other operations go on meanwhile.

        Raises `InvalidName`, `SnapshotExists`, `InvalidOption`, `NoSuchSession`. The caller closes
        `source`.
        """
        self._require_open()
        checked_name = snapshot_name(name)
        _check_description(description)
        self._require_unused(checked_name)
        return self._transfers.add(checked_name, description, source, started_by=started_by)

    async def describe_snapshot(self, name: str, description: str) -> None:
        """Give a snapshot another description.

        Raises `InvalidOption`, `NoSuchSnapshot`, `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        _check_description(description)
        with self.operating("a snapshot is being described"):
            await self._edit(self.record.snapshot(name), description=description)

    async def pin_snapshot(self, name: str, pinned: bool) -> None:
        """Keep a snapshot until a person deletes it, or leave it to the rules again.

        Raises `NoSuchSnapshot`, `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        with self.operating("a snapshot is being pinned or released"):
            await self._edit(self.record.snapshot(name), pinned=pinned)

    async def _edit(self, old: SnapshotRecord, **changed: object) -> SnapshotRecord:
        new = old.model_copy(update=changed)
        snapshots = [new if other is old else other for other in self.record.snapshots]
        await self.write(self.record.with_snapshots(snapshots))
        return new

    async def _forget_snapshots(self, removals: Collection[Removal]) -> None:
        await self.write(self.record.without_snapshots([one.snapshot for one in removals]))
        self._tell_gone(removals)

    async def undo_restore(self) -> None:
        """Forget what a restore that has failed has kept; within an operation."""
        gone = [one for one in self.record.snapshots if one.name == self.record.restoring]
        await self.write(self.record.with_restore_undone())
        self._tell_gone([Removal(one, "the restore has failed") for one in gone])

    async def prune(self, choose: Callable[[SessionRecord], list[Removal]]) -> None:
        """Delete the snapshots that `choose` then returns, once no operation runs.

        Raises `NoSpace`, `Failed`.
        """
        await self.become_idle()
        removals = choose(self.record)
        if removals and not self._closing:
            with self.operating("snapshots are being thinned out"):
                await self._forget_snapshots(removals)

    def sizes_changed(self) -> None:
        """Tell observers that more is known of what snapshots take."""
        self._tell(lambda observer: observer.session_changed(self))

    def _tell_gone(self, removals: Collection[Removal]) -> None:
        def tell(observer: Observer) -> None:
            for removal in removals:
                observer.snapshot_removed(self, removal.snapshot)

        self._tell(tell)
        for snapshot, reason in removals:
            log.info(
                "Snapshot %s of session %s is deleted%s.",
                snapshot.name,
                self.id,
                f": {reason}" if reason else "",
                extra=self._event(
                    Event.SNAPSHOT_DELETED, snapshot=snapshot.name, reason=reason or None
                ),
            )

    async def changes(self, start: str = "", end: str = "") -> ChangeSummary:
        """Count what differs between two states: from a snapshot, or the image where `start` is
        empty, to another snapshot, or the merged view as it is now.

        Raises `NoSuchSession`, `NoSuchSnapshot`, `ImageUnavailable`, `Failed`.
        """
        with self._comparing(start, end):
            return await self.require_mount().changes(await self._span(start, end))

    async def diff(
        self, target: int, start: str = "", end: str = "", *, reader: Uid | None = None
    ) -> None:
        """Write what differs to a descriptor; see `Mount.diff`.

        States and failures are those of `changes`.
        """
        with self._comparing(start, end):
            await self.require_mount().diff(target, await self._span(start, end), reader)

    def require_snapshots(self, *names: str) -> None:
        """Raise `NoSuchSnapshot` unless there is a snapshot of each name that is not empty."""
        for name in filter(None, names):
            self.record.snapshot(name)

    @contextmanager
    def _comparing(self, *names: str) -> Iterator[None]:
        """Keep the layers of snapshots, which somebody may delete meanwhile."""
        layers = [layer for name in names if name for layer in self.record.snapshot(name).layers]
        self._compared.update(layers)
        try:
            yield
        finally:
            self._compared.subtract(layers)
            if not self._closing:
                self._delete_layers(set(layers) - self.record.all_layers)

    async def _span(self, start: str, end: str) -> Span:
        return Span(await self._lowers(start), await self._lowers(end))

    async def _lowers(self, name: str) -> Lowers | None:
        if not name:
            return None
        at = self.record.with_new_upper(self.record.snapshot(name).layers)
        stack = self._stack(at, await self._require_image())
        return Lowers(stack.lowers, stack.indexes)

    async def shadowed(self, source: ImageSource, target: int) -> None:
        """Write what is shadowed to a descriptor; see `sessiond.session.rebase`.

        Raises `ImageUnavailable`, `Failed`.
        """
        await rebase.write_shadowed(self, source, target)

    # Its life, as led by the manager

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be the parent of all the session's tasks, until `end`."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._upkeep.run)
                nursery.start_soon(self._flattening.run)
                task_status.started()
                await self.timer.run()
        finally:
            self._ended.set()

    async def start(self, *, again: bool = False, source: ImageSource | None = None) -> None:
        """Mount the merged view, if it is not mounted.

        With `again`, views that a manager that died has left at the mount point are taken away
        first; what others have mounted there stays. If there is another image at `source` than it
        was built on, that is minded as its record says. Raises what prevents it; the state is
        FAILED then.
        """
        await self.become_idle()
        if self.mount is not None:
            return
        with self.operating("it is being mounted", self.state):
            try:
                if again and self.id in self.services.mounter.left() and await self._adopt_view():
                    return
                if again:
                    await trio.to_thread.run_sync(self._detach_stale_views)
                if source is not None:
                    await rebase.follow_image(self, source)
                if self.mount is None:
                    await self.mount_view()
            except SessiondError as error:
                self.failure = str(error)
                raise

    async def _adopt_view(self) -> bool:
        """Go on with what an earlier manager has mounted, if that can be."""
        image = await self._require_image()
        self.record = await self._prepare_kept(self.record, image)
        request = self._mount_request(self.record, image)
        mount = await self.services.mounter.adopt(request)
        if mount is None:
            return False
        log.info("Session %s goes on at %s.", self.id, self.mount_point)
        self._own(mount)
        return True

    def _detach_stale_views(self) -> None:
        with explained(f"detach what is mounted at {self.mount_point}"):
            if self.services.mounts.file_system(self.mount_point) == VIEW_TYPE:
                log.info("%s is unmounted: another sessiond has left it there.", self.mount_point)
                self.services.mounts.detach(self.mount_point, only=VIEW_TYPE)

    async def leave(self) -> None:
        """Stop what is going on in the session; all else is for the next manager to find."""
        await self._stop(
            Interrupted(f"The job on session {self.id} was undone, since sessiond was restarted.")
        )

    async def end(self) -> None:
        """Stop what is going on in the session and unmount it; the files stay. Never fails."""
        self._set_state(SessionState.CLOSING)
        with trio.CancelScope(shield=True):
            await self._stop(
                Cancelled(f"The job on session {self.id} ended, since that is being closed.")
            )
            if self.mount is not None:
                await self.mount.unmount()
                self.mount = None
                log.info(
                    "Session %s is unmounted.", self.id, extra=self._event(Event.SESSION_ENDED)
                )
            if self._image is not None:
                await self.services.images.release(self._image)
                self._image = None

    async def _stop(self, reason: SessiondError) -> None:
        """Let nothing new begin, give up the job that runs, and end all tasks."""
        self._closing = True
        if self._job is not None:
            self._job.stop(reason)
        self._transfers.stop(reason)
        with trio.CancelScope(shield=True):
            await self.become_idle()
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel()
                await self._ended.wait()

    def check_space(self) -> None:
        """Tell observers if the storage has become fuller or emptier by a level."""
        try:
            space = measure(self.services.store.storage(self.record))
        except OSError as error:
            log.warning("The storage of session %s cannot be measured: %s", self.id, error)
            return
        level = self._space.new_level(space)
        if self._space.level is SpaceLevel.CRITICAL:
            self._upkeep.wake()
        if level is not None:
            used, total = space.bytes_used, space.bytes_total
            self._tell(lambda observer: observer.session_changed(self))
            self._tell(lambda observer: observer.space_low(self, level, used, total))

    # Operations: one at a time

    def _require_open(self) -> None:
        if self._closing:
            raise NoSuchSession(f"Session {self.id} is being closed, or has been.")

    def _begin(self, operation: str, state: SessionState) -> None:
        self._require_open()
        if self._operation is not None:
            running = self._job.in_words if self._job else self._operation
            hint = "Wait for that to end" + (", or cancel it." if self._job else ".")
            raise Busy(f"Session {self.id} is busy: {running}. {hint}")
        self._operation = operation
        self._idle = trio.Event()
        self._set_state(state)

    def _end(self) -> None:
        self._operation = None
        self._idle.set()
        if not self._closing:
            self._set_state(SessionState.FAILED if self.mount is None else SessionState.ACTIVE)

    @contextmanager
    def operating(self, operation: str, state: SessionState = SessionState.BUSY) -> Iterator[None]:
        self._begin(operation, state)
        try:
            yield
        finally:
            self._end()

    async def become_idle(self) -> None:
        """Wait until no operation runs; none can begin before the caller's next checkpoint."""
        while self._operation is not None:
            await self._idle.wait()

    def recount(self, numbers: Collection[LayerNumber]) -> None:
        """Count anew what is in those layers."""
        self._upkeep.recount(numbers)

    @property
    def merging(self) -> frozenset[LayerNumber]:
        """Layers that are being merged."""
        return self._flattening.merging

    def consider_flattening(self) -> None:
        """Look whether there are too many layers."""
        self._flattening.consider()

    @property
    def is_idle(self) -> bool:
        """Whether no operation runs."""
        return self._operation is None

    async def undisturbed(self) -> None:
        """Wait for what nobody has asked for, and nobody is to be refused for; it is short."""
        while self._operation == FLATTENING:
            await self._idle.wait()

    def _set_state(self, state: SessionState) -> None:
        if state is not self.state:
            self.state = state
            self._tell(lambda observer: observer.session_changed(self))

    def _event(self, kind: Event, **facts: str | None) -> dict[str, object]:
        """Return the `extra` of a line of the log about this session."""
        known = {"session": self.id, "user": self.user, "profile": self.profile}
        return event(kind, **known, **facts)

    def _tell(self, what: Callable[[Observer], None]) -> None:
        if self.listed:
            self.services.observers.tell(what)

    def _start_switch(
        self,
        operation: Operation,
        started_by: Uid,
        manner: Manner,
        switch: Callable[[], Awaitable[None]],
        *,
        layers: tuple[LayerNumber, ...],
        besides: SnapshotRecord | None = None,
    ) -> Job:
        """Start a job that exchanges the layers, `manner` first; `besides` is kept whatever comes.

        `layers`: see `JobRecord`.
        """
        if isinstance(manner.snapshot, str):
            self._require_unused(manner.snapshot)

        async def body(job: Job) -> None:
            if manner.terminate:
                await self._terminate(job, manner)
            if manner.snapshot is False:
                await switch()
                return
            # Held, so that nothing is written between, and lost.
            async with nullcontext() if self.mount is None else self.mount.frozen():
                await self._keep_first(job, manner, besides)
                await switch()
            if self.storage is StorageKind.PERSISTENT:
                await self.require_mount().sync()

        return self._start_job(operation, started_by, body, layers=layers)

    async def _keep_first(self, job: Job, manner: Manner, besides: SnapshotRecord | None) -> None:
        now, after = datetime.now(UTC), self.record.committed()
        name = manner.snapshot
        automatic = isinstance(name, bool)
        snapshot = SnapshotRecord(
            name=automatic_name(self.record, f"before-{job.operation}", now)
            if isinstance(name, bool)
            else name,
            description=f"What a {job.operation} has replaced",
            created_at=now,
            layers=after.layers,
            automatic=automatic,
        )
        await self.switch_and_keep(after, snapshot, besides=besides)

    async def _terminate(self, job: Job, manner: Manner) -> None:
        try:
            device = await trio.to_thread.run_sync(self.services.mounts.device, self.mount_point)
            if device is not None:
                await conflicts.terminate(
                    self.services.surroundings.processes,
                    device,
                    asked_by=job.started_by,
                    grace=manner.grace,
                    report=job.report_conflicts,
                )
        except SessiondError as error:
            # It goes on, or whoever can bring this about could keep a session from being reset.
            log.error("%s The %s of session %s goes on.", error, job.operation, self.id)  # noqa: TRY400

    def tell_reset_scheduled(self, when: datetime, why: Why) -> None:
        """Have observers know that the session is about to be reset by itself."""
        self._tell(lambda observer: observer.reset_scheduled(self, when, why))

    def _start_job(
        self,
        operation: Operation,
        started_by: Uid,
        body: Callable[[Job], Awaitable[None]],
        *,
        layers: tuple[LayerNumber, ...] | None = None,
        committing: tuple[str, ...] = (),
    ) -> Job:
        """`layers`: see `JobRecord`."""
        self._begin(f"a {operation} is running", SessionState.BUSY)
        number = self.services.job_numbers.take()
        job = Job(number, self.record, operation, started_by, self.services.observers)
        self._job = self.last_job = job
        self._tell(lambda observer: observer.job_added(job))
        self._tell(lambda observer: observer.session_changed(self))
        self._tasks.start_soon(self._run_job, job, body, layers, committing)
        return job

    async def _run_job(
        self,
        job: Job,
        body: Callable[[Job], Awaitable[None]],
        layers: tuple[LayerNumber, ...] | None,
        committing: tuple[str, ...],
    ) -> None:
        begun = JobRecord(
            number=job.id,
            operation=job.operation,
            started_by=job.started_by,
            storage=self.storage,
            upper=self.record.upper,
            layers=layers,
            image=self.record.image,
            committing=committing,
        )
        try:
            await self._note_job(begun)
            await self._flattening.rest()
            await job.run(body)
        finally:
            # Before anyone is told, so that a manager that dies now has told nothing else.
            await self._note_job(job.noted(begun))
            self._job = None
            self._end()
            job.finish()

    async def recover_job(self, noted: JobRecord) -> None:
        """Know the last job that an earlier manager has run, and how it has ended."""
        self.services.job_numbers.skip(noted.number)
        self.last_job = Job.of_earlier_manager(noted, self.record, self.services.observers)
        if not noted.finished:
            self.last_job.log_outcome()
            await self._note_job(self.last_job.noted(noted))

    async def _note_job(self, job: JobRecord) -> None:
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self.services.store.write_job, self.id, job)
            except SessiondError as error:
                # It goes on: a reset is what frees space.
                log.warning("%s Should sessiond die, it will not know of the job.", error)

    async def _reset(self, scheduled: bool) -> None:
        now = Instant.now(self.services.surroundings.clock)
        rules_before = self.record.keep_rules
        await self.switch(self.record.reset(now, scheduled=scheduled))
        if self.record.keep_rules != rules_before:
            await kept.use_rules(self)
        self._tell(lambda observer: observer.reset_done(self))

    # Record and layers

    async def switch(self, after: SessionRecord) -> tuple[str, ...]:
        """Record `after`, whose upper is a new one, and serve it; if that fails, all is as before.

        Returns what `Mount.swap` does. Only within an operation. Cannot be cancelled once begun.
        Raises `ImageUnavailable`, `NoSpace`, `Failed`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        before = self.record
        self._require_few(after)
        recorded = False
        with trio.CancelScope(shield=True):
            below = await self.below(after)
            try:
                gives_back = before.upper not in after.all_layers
                make_upper = self.services.store.make_upper
                await trio.to_thread.run_sync(make_upper, after, below, gives_back)
                await trio.to_thread.run_sync(self.services.store.write, after)
                recorded = True
                inexact = await self.serve(after)
            except BaseException as error:
                await self._go_back(before, after, error, recorded=recorded)
                raise
        self.adopt(after)
        return inexact

    async def switch_and_keep(
        self,
        after: SessionRecord,
        snapshot: SnapshotRecord,
        *,
        besides: SnapshotRecord | None = None,
    ) -> SnapshotRecord:
        """The same, with one more snapshot, and without those that the rules then no longer keep,
        but with `besides`. Returns what the record then has of `snapshot`.
        """
        kept = after.with_snapshots((*after.snapshots, snapshot))
        removals = [one for one in outdated(kept) if one.snapshot not in (snapshot, besides)]
        gone = [one.snapshot for one in removals]
        inexact = await self.switch(kept.without_snapshots(gone))
        if inexact:
            snapshot = await self._note_inexact(snapshot, inexact)
        log.info(
            "Snapshot %s of session %s is made.",
            snapshot.name,
            self.id,
            extra=self._event(Event.SNAPSHOT_MADE, snapshot=snapshot.name),
        )
        self._tell(lambda observer: observer.snapshot_added(self, snapshot))
        self._tell_gone(removals)
        return snapshot

    async def _note_inexact(
        self, snapshot: SnapshotRecord, inexact: tuple[str, ...]
    ) -> SnapshotRecord:
        log.warning(
            "Snapshot %s of session %s has %d files of a later moment than the rest, for programs "
            "wrote to them meanwhile.",
            snapshot.name,
            self.id,
            len(inexact),
        )
        noted = snapshot.model_copy(update={"inexact": inexact})
        others = [noted if one == snapshot else one for one in self.record.snapshots]
        try:
            await self.write(self.record.with_snapshots(others))
        except SessiondError as error:
            log.warning("%s That is not recorded.", error)
            return snapshot
        return noted

    async def below(self, record: SessionRecord) -> Path:
        """Return the tree just below the upper of `record`. Raises `ImageUnavailable`."""
        image = await self._require_image()
        return (*self.services.store.lowers(record), image.root)[0]

    def _require_few(self, after: SessionRecord) -> None:
        if len(after.all_layers) > max(LAYERS_LIMIT, len(self.record.all_layers)):
            raise NoSpace(
                f"Session {self.id} has {LAYERS_LIMIT} layers, which is the most; delete "
                "snapshots, or reset it, then try again."
            )

    async def _go_back(
        self, before: SessionRecord, after: SessionRecord, error: BaseException, *, recorded: bool
    ) -> None:
        self.record = after.gone_back_to(before)
        if recorded:
            try:
                await trio.to_thread.run_sync(self.services.store.write, self.record)
            except SessiondError as undo:
                # Not to be deleted: the record on disk names the new upper.
                raise Failed(f"{error} Then the record could not be put back. {undo}") from error
        self._delete_layers({after.upper})

    def adopt(self, after: SessionRecord) -> None:
        """Take `after`, which is on disk and served, as the record; delete layers it lacks."""
        unused = self.record.all_layers - after.all_layers
        self._delete_layers(unused)
        self.record = after
        self._flattening.consider()
        self.timer.look()
        self._tell(lambda observer: observer.session_changed(self))
        self._upkeep.wake()

    async def replace_layers(self, after: SessionRecord) -> None:
        """Record `after`, which has fewer layers and shows the same, and serve it.

        Only within an operation. Raises `NoSpace`, `Failed`: the layers are served as before.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.services.store.write, after)
            try:
                await self.serve(after)
            except BaseException:
                # Both are right; but what may be served has to be there.
                await trio.to_thread.run_sync(self.services.store.write, self.record)
                raise
            self.adopt(after)

    async def publish_draft(
        self, draft: Path, made_for: SessionRecord, snapshot: Callable[..., SnapshotRecord]
    ) -> None:
        """Make a draft, made for that record, the layer of a new snapshot.

        Waits for what goes on. Raises `SnapshotExists`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        await self.become_idle()
        with self.operating("a snapshot is being imported"):
            number, after = (
                self.record.next_layer,
                self.record.with_imported(snapshot, datetime.now(UTC)),
            )
            self._require_unused(after.snapshots[-1].name)
            self._require_few(after)
            if self.storage is not made_for.storage:
                raise Failed(
                    f"Session {self.id} has moved to disk while a snapshot was imported; import it "
                    "again."
                )
            with trio.CancelScope(shield=True):
                store = self.services.store
                await trio.to_thread.run_sync(store.adopt_draft, self.record, draft, number)
                try:
                    await self.write(after)
                except BaseException:
                    self._delete_layers({number})
                    raise
        self._tell(lambda observer: observer.snapshot_added(self, after.snapshots[-1]))

    async def write(self, after: SessionRecord) -> None:
        """Record `after`, which has no layers that are not there. Only within an operation.

        Raises `NoSpace`, `Failed`; all is as before then.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.services.store.write, after)
        self.adopt(after)

    def _delete_layers(self, numbers: Iterable[LayerNumber]) -> None:
        unread = sorted(number for number in numbers if not self._compared[number])
        layers = [self.services.store.layer(self.record, number) for number in unread]
        if layers:
            remove = partial(self.services.store.remove_layer, self.record)
            self._deletions += 1
            self._tasks.start_soon(self._delete_trees, layers, remove)

    async def _delete_trees(
        self, layers: list[Path], remove: Callable[[Path, Check], None]
    ) -> None:
        await self.services.delete_trees(layers, remove)
        self._deletions -= 1

    def _require_unused(self, name: SnapshotName) -> None:
        if name in self.snapshots:
            raise SnapshotExists(
                f"Session {self.id} has a snapshot {name!r} already; delete it, or use another "
                "name."
            )

    # Mount, and mount again

    async def serve(self, record: SessionRecord, *, moved: bool = False) -> tuple[str, ...]:
        """Switch the merged view over to the layers of `record`; mount it if it is not.

        With `moved`, they are copies of those served, and files that are open go on in them.
        Returns what `Mount.swap` does. Only within an operation. Raises `ImageUnavailable`,
        `NoSpace`, `Failed`; what was served before is served still then.
        """
        image = await self._require_image()
        if self.mount is None:
            await self._mount_view(record)
            return ()
        return await self.mount.swap(self._stack(record, image), moved=moved)

    async def served(self) -> Stack:
        """Return the layers that are served. Only within an operation."""
        return self._stack(self.record, await self._require_image())

    def _stack(self, record: SessionRecord, image: Image) -> Stack:
        store = self.services.store
        return Stack(
            upper=store.upper(record),
            lowers=(*store.lowers(record), image.root),
            indexes=store.indexes(record),
            orphans=store.orphans(record),
            former=store.former_orphans(record),
        )

    async def _require_image(self) -> Image:
        if self._image is None:
            image = await self.services.images.acquire(self.record.source, known=self.record.image)
            # A directory may hold anything tomorrow; that it is a fixed thing is the user's affair.
            directories = {image.kind, self.record.image.partition("-")[0]} == {"directory"}
            if image.digest != self.record.image and not directories:
                await self.services.images.release(image)
                raise ImageUnavailable(
                    f"Image {self.record.source.path} is not the one that session {self.id} was "
                    f"built on ({self.record.image}); put that back, rebase the session, or "
                    "close it."
                )
            if self.record.rebasing:
                await self.services.images.release(image)
                raise ImageUnavailable(
                    f"The rebase of session {self.id} was begun and has to end first; rebase it "
                    "again."
                )
            self._image = image
        return self._image

    async def _mount_view(self, record: SessionRecord) -> None:
        image = await self._require_image()
        if self._limited_by is LimitedBy.QUOTA:
            await trio.to_thread.run_sync(self.services.store.enforce_quota, record)
        record = await self._prepare_kept(record, image)
        if self.record.keep is not None:
            self.record = self.record.model_copy(update={"commits": record.commits})
        await trio.to_thread.run_sync(
            mount_point.prepare, record.mount_point, record.uid, self.services.mounts
        )
        mount = await self.services.mounter.mount(self._mount_request(record, image))
        log.info(
            "Session %s is mounted at %s.",
            record.id,
            record.mount_point,
            extra=self._event(Event.SESSION_STARTED),
        )
        self._own(mount)

    async def _prepare_kept(self, record: SessionRecord, image: Image) -> SessionRecord:
        """Have a place for what outlives resets; return the record with what was committed."""
        if record.keep is None:
            return record
        store = self.services.store.kept
        rules = await trio.to_thread.run_sync(store.prepare, record, image.root)
        record, before = kept.with_committed(record, rules), record
        if set(before.commits) - set(rules):  # a commit that a manager has died in
            await trio.to_thread.run_sync(store.write, record)
        return record

    def _mount_request(self, record: SessionRecord, image: Image) -> MountRequest:
        return MountRequest(
            session=record.id,
            mount_point=record.mount_point,
            stack=self._stack(record, image),
            nosuid=record.nosuid,
            nodev=record.nodev,
            data_path=record.data_path,
            reachable=(*self.services.store.reachable(record), image.root),
            keep=None if record.keep is None else self.services.store.kept.layers(record),
        )

    async def mount_view(self) -> None:
        """Mount what is recorded. Only within an operation; raises what prevents it."""
        await self._mount_view(self.record)

    async def unmount_view(self) -> None:
        """Take the merged view from whoever uses it, to be mounted again. Only within an operation.

        Never fails.
        """
        mount, self.mount = self.mount, None
        if mount is not None:
            await mount.unmount()

    async def exchange_image(self, image: Image | None) -> None:
        """Give back the image that is held, and hold `image`, which was acquired, instead."""
        before, self._image = self._image, image
        if before is not None:
            await self.services.images.release(before)

    def _own(self, mount: Mount) -> None:
        self.mount = mount
        self.failure = ""
        self._flattening.consider()
        self._tasks.start_soon(self._supervise, mount)
        self._tasks.start_soon(self._settling.run)

    async def _supervise(self, mount: Mount) -> None:
        """When the worker of `mount` dies, have another go on; if that fails, mount again."""
        await mount.wait_died()
        while self.mount is mount and not self._closing and await self._recover(mount):
            await mount.wait_died()
        if self.mount is not mount:  # it was unmounted
            return
        self.failure = f"The worker of session {self.id} ended unexpectedly."
        log.error(
            "%s It is started again.",
            self.failure,
            extra=self._event(Event.WORKER_DIED, outcome="remounted"),
        )
        self._tell(lambda observer: observer.worker_died(self, None))
        if self._job is not None:
            self._job.stop(Failed(f"{self.failure} Nothing was changed; try again."))
        await self.become_idle()
        if not self._closing:
            with self.operating("it is being mounted again", SessionState.FAILED):
                await mount.unmount()
                self.mount = None
                await self._mount_again()

    async def _recover(self, mount: Mount) -> bool:
        if not self._recoveries.allowed():
            return False
        died_at = trio.current_time()
        try:
            await mount.recover()
        except SessiondError as error:
            log.error("Session %s: %s", self.id, error)  # noqa: TRY400
            return False
        log.error(
            "The worker of session %s ended unexpectedly; another goes on for it.",
            self.id,
            extra=self._event(Event.WORKER_DIED, outcome="recovered"),
        )
        seconds = trio.current_time() - died_at
        self._tell(lambda observer: observer.worker_died(self, seconds))
        return True

    async def _mount_again(self) -> None:
        while self._attempts.allowed():
            try:
                await self._mount_view(self.record)
            except SessiondError as error:
                self.failure = str(error)
                log.error("Session %s cannot be mounted again: %s", self.id, error)  # noqa: TRY400
                await trio.sleep(_PAUSE_SECONDS)
            else:
                log.warning("Session %s is mounted again.", self.id)
                return
        self.failure += " Starting it again is given up; reset the session, or close it."
        log.error("%s", self.failure)

    async def layers_at_rest(self) -> None:
        """Return when nothing is done to committed layers."""
        await self._flattening.rest()

    @property
    def reads_layers(self) -> bool:
        """Whether committed layers are being read by others than the mount."""
        return self._transfers.read_layers

    async def require_image(self) -> Image:
        """Return the image, mounted. Raises `ImageUnavailable`, `Failed`."""
        return await self._require_image()

    def start_soon(self, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a task, which must not raise, until the session ends."""
        self._tasks.start_soon(function, *arguments)

    def require_mount(self) -> Mount:
        """Return the mount. Raises `NoSuchSession`, or `Failed` with why there is none."""
        self._require_open()
        if self.mount is None:
            raise Failed(f"Session {self.id} is not mounted. {self.failure}")
        return self.mount

    @property
    def _tasks(self) -> trio.Nursery:
        assert self._nursery is not None, "the session's run() was not started"
        return self._nursery


def _check_description(text: str) -> None:
    if len(text) > DESCRIPTION_LIMIT:
        raise InvalidOption(
            f"The description is {len(text)} characters long; at most {DESCRIPTION_LIMIT} are "
            "allowed."
        )
