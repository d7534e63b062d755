"""One session: what is recorded of it, and the operations that change that and what is served.

The record on disk always names what is served, or what is about to be: a crash between the two
loses nothing that was written before the operation, or all that the operation was to throw away.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio

from sessiond.errors import (
    Cancelled,
    Failed,
    Interrupted,
    NoSpace,
    SessiondError,
)
from sessiond.journal import Event, event
from sessiond.session import conflicts, kept, rebase
from sessiond.session.clock import Instant
from sessiond.session.conflicts import Program
from sessiond.session.differences import Differences
from sessiond.session.flattening import Flattening
from sessiond.session.images import Image
from sessiond.session.jobs import Job
from sessiond.session.kept import CommittedPath
from sessiond.session.model import (
    AT_ONCE,
    Conflicts,
    ImageSource,
    LayerNumber,
    Manner,
    Operation,
    PendingFile,
    ScheduledReset,
    SessionId,
    SessionRecord,
    SessionState,
    SnapshotRecord,
    StorageKind,
    Uid,
    Usage,
)
from sessiond.session.observer import Observer
from sessiond.session.persist import move_to_disk
from sessiond.session.reset_timer import ResetTimer
from sessiond.session.restore import automatic_name, restore
from sessiond.session.schedule import Due, Why
from sessiond.session.services import Services
from sessiond.session.settling import Settling
from sessiond.session.snapshots import Snapshots
from sessiond.session.space import LimitedBy, SpaceLevel, SpaceWatch, measure
from sessiond.session.transfers import Transfers
from sessiond.session.tree import Check
from sessiond.session.turn import Turn
from sessiond.session.upkeep import Upkeep
from sessiond.session.view import View

log = logging.getLogger(__name__)

LAYERS_LIMIT = 250
"""Most layers of a session, the upper included: snapshots must not fill the directory of records,
which is in RAM for volatile sessions, nor the worker's table of descriptors.
"""


class Session:
    """One user's merged view. Attributes are read-only for others."""

    def __init__(
        self, record: SessionRecord, services: Services, image: Image | None = None
    ) -> None:
        """A session that is not mounted yet. It owns `image`, if that is acquired already."""
        self.services = services
        self.record = record
        self.state = SessionState.STARTING
        self.failure = ""
        """Why the state is FAILED, as a sentence."""
        self.resting = False
        """Its user is not logged in: it is not mounted, whatever is done to it."""
        self.listed = False
        """Observers know of it; told only of sessions they know. Set by the manager."""
        self.turn = Turn(self)
        self.view = View(self, image)
        self.snapshots = Snapshots(self)
        self.differences = Differences(self)
        self.transfers = Transfers(self)
        self.timer = ResetTimer(self)
        """Resets that come by themselves, and what holds them back."""
        self.upkeep = Upkeep(self)
        self.flattening = Flattening(self)
        self.settling = Settling(self)
        self._space = SpaceWatch(record.thresholds)
        self._deletions = 0
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()

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
    def of_login(self) -> bool:
        """Whether it is there while its user is logged in; see `logins`."""
        return self.record.login

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
    def last_job(self) -> Job | None:
        """The job that runs, or else ran last."""
        return self.turn.last_job

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
        return self._space.usage(self.services.store.storage(self.record), self.limited_by)

    @property
    def space_level(self) -> SpaceLevel:
        """How full the storage was when it was looked at last."""
        return self._space.level

    @property
    def limited_by(self) -> LimitedBy:
        if self.storage is StorageKind.TMPFS:
            return LimitedBy.FILE_SYSTEM
        return LimitedBy.NOTHING if self.record.quota is None else LimitedBy.QUOTA

    # What may be done to it

    def reset(self, *, started_by: Uid, manner: Manner = AT_ONCE, scheduled: bool = False) -> Job:
        """Go back to the image; snapshots are kept. With `scheduled`, it is what was scheduled.

        How long it takes does not depend on how much was changed, but on what `manner` leaves as
        it is. Raises `Busy`, `NoSuchSession`, `SnapshotExists`.
        """
        return self._start_switch(
            Operation.RESET,
            started_by,
            manner,
            lambda: self._reset(scheduled, manner.keep),
            layers=(),
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
        await self.turn.become_idle()
        scheduled = due.why is Why.SCHEDULED
        job = self.reset(started_by=due.asked_by, manner=due.manner, scheduled=scheduled)
        await job.wait()

    async def schedule(self, scheduled: ScheduledReset | None) -> None:
        """Have a reset come at another time, in place of what was scheduled before; None: no more.

        Raises `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        with self.turn.operating("a reset is being scheduled"):
            await self.write(self.record.model_copy(update={"scheduled": scheduled}))

    async def conflicts(self) -> tuple[Program, ...]:
        """Return the programs that use the merged view now. Raises `NoSuchSession`, `Failed`."""
        self.view.require()
        device = await trio.to_thread.run_sync(self.services.mounts.device, self.mount_point)
        if device is None:
            return ()
        return await conflicts.find(self.services.surroundings.processes, device)

    def persist(self, *, started_by: Uid, verify: bool = True) -> Job:
        """Make the session survive a reboot. Raises `Busy`, `NoSuchSession`.

        With `verify`, what was written is read back and compared before that counts. For a session
        that is persistent already, the job ends when all its changes are on disk.
        """
        return self.turn.start_job(
            Operation.PERSIST, started_by, lambda job: move_to_disk(self, job, verify=verify)
        )

    def commit(self, paths: list[str], *, started_by: Uid) -> Job:
        """Save what is at `paths` now, so that it outlives resets and this session.

        Raises `InvalidOption`, `NotSupported`, `Busy`, `NoSuchSession`.
        """
        rules = kept.committed_rules(self.record, paths)
        return self.turn.start_job(
            Operation.COMMIT,
            started_by,
            lambda job: kept.commit(self, job, paths, rules),
            committing=rules,
        )

    async def uncommit(self, paths: list[str], *, delete: bool = False) -> None:
        """Have what was committed at `paths` be as in the image from the next reset on.

        With `delete`, what is kept there is deleted then. Raises `InvalidOption`, `NotSupported`,
        `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        with self.turn.operating("a commit is being taken back"):
            await kept.uncommit(self, paths, delete=delete)

    async def committed(self) -> list[CommittedPath]:
        """Return what was committed, with its sizes. Raises `NoSuchSession`, `Failed`."""
        self.turn.require_open()
        return await kept.committed(self)

    async def set_keep(self, rules: list[str], *, when_idle: bool = False) -> None:
        """Have what `rules` name outlive resets; those that are gone hold until the next one.

        `when_idle`: wait for an operation that runs. Raises `InvalidOption`, `NotSupported`,
        `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        checked = kept.checked_rules(self.record, rules)
        if when_idle:
            await self.turn.become_idle()
        with self.turn.operating("the rules for what is kept are being changed"):
            await self.write(self.record.with_keep(checked))
            with trio.CancelScope(shield=True):
                await kept.use_rules(self)

    @property
    def pending(self) -> int:
        """How many files are written in RAM still, since before the session moved to disk."""
        return self.settling.pending

    async def pending_files(self) -> list[PendingFile]:
        """Return these files, and who has them open. Raises `NoSuchSession`, `Failed`."""
        return await self.settling.files()

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
        return self.turn.start_job(
            Operation.REBASE,
            started_by,
            lambda _: rebase.rebase_now(self, source, wanted, remount=remount),
        )

    def publish_image(
        self, install: Callable[[Session, Job], Awaitable[None]], *, started_by: Uid
    ) -> Job:
        """Have `install` make an image of the merged view. Raises `Busy`, `NoSuchSession`."""
        return self.turn.start_job(Operation.MAINTENANCE, started_by, partial(install, self))

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
            self.snapshots.require_unused(manner.snapshot)

        async def body(job: Job) -> None:
            if manner.terminate:
                await self._terminate(job, manner)
            if manner.snapshot is False and not manner.keep:
                await switch()
                return
            # Held, so that nothing is written between, and lost.
            async with self._held(manner):
                if manner.snapshot is not False:
                    await self._keep_first(job, manner, besides)
                await switch()
            if self.storage is StorageKind.PERSISTENT:
                await self.view.require().sync()

        return self.turn.start_job(operation, started_by, body, layers=layers)

    def _held(self, manner: Manner) -> AbstractAsyncContextManager[None]:
        """Hold changes back; programs stand still only for a snapshot, which takes but a moment."""
        if manner.snapshot is not False:
            return self.view.held()
        return nullcontext() if self.view.mount is None else self.view.mount.frozen()

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
        await self.snapshots.switch_and_keep(after, snapshot, besides=besides)

    async def _terminate(self, job: Job, manner: Manner) -> None:
        try:
            device = await trio.to_thread.run_sync(self.services.mounts.device, self.mount_point)
            if device is not None:
                await conflicts.terminate(
                    self.services.surroundings.processes,
                    device,
                    owner=self.uid,
                    asked_by=job.started_by,
                    grace=manner.grace,
                    report=job.report_conflicts,
                )
        except SessiondError as error:
            # It goes on, or whoever can bring this about could keep a session from being reset.
            log.error("%s The %s of session %s goes on.", error, job.operation, self.id)  # noqa: TRY400

    async def _reset(self, scheduled: bool, retained: tuple[str, ...]) -> None:
        now = Instant.now(self.services.surroundings.clock)
        rules_before = self.record.keep_rules
        after = self.record.reset(now, scheduled=scheduled, partly=bool(retained))
        await self.switch(after, retained=retained)
        with trio.CancelScope(shield=True):  # it is done: what belongs to it is, too
            if self.record.keep_rules != rules_before:
                await kept.use_rules(self)
            await kept.discard_unwanted(self)
        self.tell(lambda observer: observer.reset_done(self))

    # Its life, as led by the manager

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be the parent of all the session's tasks, until `end`."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self.upkeep.run)
                nursery.start_soon(self.flattening.run)
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
        await self.turn.become_idle()
        if self.view.mount is not None:
            return
        self.resting = False
        with self.turn.operating("it is being mounted", self.state):
            try:
                if again and self.id in self.services.mounter.left() and await self.view.adopt():
                    return
                if again:
                    await trio.to_thread.run_sync(self.view.detach_stale)
                if source is not None:
                    await rebase.follow_image(self, source)
                if self.view.mount is None:
                    await self.view.show()
            except SessiondError as error:
                self.failure = str(error)
                raise

    async def rest(self) -> None:
        """Unmount it until it is started, after what is being done to it. Never fails."""
        await self.turn.become_idle()
        self.resting = True
        with self.turn.operating("it is being unmounted"), trio.CancelScope(shield=True):
            await self.view.end()
            self.failure = f"It is mounted when {self.user} logs in."

    async def leave(self) -> None:
        """Stop what is going on in the session; all else is for the next manager to find."""
        await self._stop(
            Interrupted(f"The job on session {self.id} was undone, since sessiond was restarted.")
        )

    async def end(self) -> None:
        """Stop what is going on in the session and unmount it; the files stay. Never fails."""
        self.set_state(SessionState.CLOSING)
        with trio.CancelScope(shield=True):
            await self._stop(
                Cancelled(f"The job on session {self.id} ended, since that is being closed.")
            )
            await self.view.end()

    async def _stop(self, reason: SessiondError) -> None:
        """Let nothing new begin, give up the job that runs, and end all tasks."""
        self.turn.close(reason)
        self.transfers.stop(reason)
        with trio.CancelScope(shield=True):
            await self.turn.become_idle()
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel()
                await self._ended.wait()

    def check_space(self) -> None:
        """Tell observers if the storage has become fuller or emptier by a level."""
        try:
            space = measure(self.services.store.storage(self.record))
        except OSError as error:
            if not self.turn.closing:
                log.warning("The storage of session %s cannot be measured: %s", self.id, error)
            return
        level = self._space.new_level(space)
        if self._space.level is SpaceLevel.CRITICAL:
            self.upkeep.wake()
        if level is not None:
            used, total = space.bytes_used, space.bytes_total
            self.tell_changed()
            self.tell(lambda observer: observer.space_low(self, level, used, total))

    # What its parts have in common

    async def undisturbed(self) -> None:
        """Wait for what nobody has asked for, and nobody is to be refused for; it is short."""
        await self.turn.undisturbed()

    def start_soon(self, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a task, which must not raise, until the session ends."""
        assert self._nursery is not None, "the session's run() was not started"
        self._nursery.start_soon(function, *arguments)

    def set_state(self, state: SessionState) -> None:
        """Be in that state from now on."""
        if state is not self.state:
            self.state = state
            self.tell_changed()

    def tell_changed(self) -> None:
        """Let observers know that something about the session is another."""
        self.tell(lambda observer: observer.session_changed(self))

    def tell(self, what: Callable[[Observer], None]) -> None:
        """Let observers know of something, if they know of the session."""
        if self.listed:
            self.services.observers.tell(what)

    def tell_reset_scheduled(self, when: datetime, why: Why) -> None:
        """Let observers know that the session is about to be reset by itself."""
        self.tell(lambda observer: observer.reset_scheduled(self, when, why))

    def event(self, kind: Event, **facts: str | None) -> dict[str, object]:
        """Return the `extra` of a line of the log about this session."""
        known = {"session": self.id, "user": self.user, "profile": self.profile}
        return event(kind, **known, **facts)

    # Record and layers

    async def switch(
        self, after: SessionRecord, *, halting: bool = False, retained: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        """Record `after`, whose upper is a new one, and serve it; if that fails, all is as before.

        With `halting`, the session's programs stand still at that moment, where that can be had.
        Paths that are `retained` stay as they are; precondition: `Mount.frozen`, then. Returns what
        `Mount.swap` does. Only within an operation. Cannot be cancelled but while something is
        being retained. Raises `ImageUnavailable`, `NoSpace`, `Failed`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        before = self.record
        self.require_few(after)
        recorded = False
        with trio.CancelScope(shield=True) as scope:
            below = await self.view.below(after)
            try:
                gives_back = before.upper not in after.all_layers
                make_upper = self.services.store.make_upper
                await trio.to_thread.run_sync(make_upper, after, below, gives_back)
                if retained:
                    scope.shield = False
                    await self._retain(after, retained)
                    scope.shield = True
                await trio.to_thread.run_sync(self.services.store.write, after)
                recorded = True
                async with self.services.halting.halted(self) if halting else nullcontext():
                    inexact = await self.view.serve(after, retained=bool(retained))
            except BaseException as error:
                await self._go_back(before, after, error, recorded=recorded)
                raise
        self.adopt(after)
        return inexact

    async def _retain(self, after: SessionRecord, paths: tuple[str, ...]) -> None:
        """Bring what is shown at these paths into the upper of `after`, which is empty."""
        try:
            await self.view.require().retain(paths, self.services.store.upper(after))
        except NoSpace as error:
            raise NoSpace(
                f"There is no space in session {self.id} to keep {', '.join(paths)} over the "
                "reset. Delete files, or reset it without keeping that."
            ) from error

    def require_few(self, after: SessionRecord) -> None:
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
        self.delete_layers({after.upper})

    def adopt(self, after: SessionRecord) -> None:
        """Take `after`, which is on disk and served, as the record; delete layers it lacks."""
        unused = self.record.all_layers - after.all_layers
        self.delete_layers(unused)
        self.record = after
        self.flattening.consider()
        self.timer.look()
        self.tell_changed()
        self.upkeep.wake()

    async def replace_layers(self, after: SessionRecord) -> None:
        """Record `after`, which has fewer layers and shows the same, and serve it.

        Only within an operation. Raises `NoSpace`, `Failed`: the layers are served as before.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.services.store.write, after)
            try:
                await self.view.serve(after)
            except BaseException:
                # Both are right; but what may be served has to be there.
                await trio.to_thread.run_sync(self.services.store.write, self.record)
                raise
            self.adopt(after)

    async def write(self, after: SessionRecord) -> None:
        """Record `after`, which has no layers that are not there. Only within an operation.

        Raises `NoSpace`, `Failed`; all is as before then.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.services.store.write, after)
        self.adopt(after)

    def delete_layers(self, numbers: Iterable[LayerNumber]) -> None:
        """Delete layers that are not served any more, after whatever reads them."""
        self.delete_unread(number for number in numbers if not self.differences.postpone(number))

    def delete_unread(self, numbers: Iterable[LayerNumber]) -> None:
        layers = [self.services.store.layer(self.record, number) for number in sorted(numbers)]
        if layers:
            remove = partial(self.services.store.remove_layer, self.record)
            self._deletions += 1
            self.start_soon(self._delete_trees, layers, remove)

    async def _delete_trees(
        self, layers: list[Path], remove: Callable[[Path, Check], None]
    ) -> None:
        await self.services.delete_trees(layers, remove)
        self._deletions -= 1
