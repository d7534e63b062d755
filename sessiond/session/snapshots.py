"""The snapshots of a session: names for lists of committed layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from sessiond.errors import Failed, InvalidOption, SessiondError, SnapshotExists
from sessiond.journal import Event
from sessiond.session.jobs import Job
from sessiond.session.model import (
    ArchiveKind,
    SessionRecord,
    SnapshotName,
    SnapshotRecord,
    StorageKind,
    Uid,
    snapshot_name,
)
from sessiond.session.observer import Observer
from sessiond.session.retention import Removal, outdated
from sessiond.session.upkeep import SnapshotSize

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)

DESCRIPTION_LIMIT = 1000
"""Longest description of a snapshot, in characters."""


class Snapshots(Mapping[str, SnapshotRecord]):
    """Those of one session: by name, in the order in which they were made."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getitem__(self, name: str) -> SnapshotRecord:
        for snapshot in self._session.record.snapshots:
            if snapshot.name == name:
                return snapshot
        raise KeyError(name)

    def __iter__(self) -> Iterator[SnapshotName]:
        return (snapshot.name for snapshot in self._session.record.snapshots)

    def __len__(self) -> int:
        return len(self._session.record.snapshots)

    def size(self, name: SnapshotName) -> SnapshotSize:
        """Return what a snapshot, which there is, takes on disk, as far as that is known now."""
        return self._session.upkeep.size(name)

    def require_unused(self, name: SnapshotName) -> None:
        """Raise `SnapshotExists` if there is a snapshot of that name."""
        if name in self:
            raise SnapshotExists(
                f"Session {self._session.id} has a snapshot {name!r} already; delete it, or use "
                "another name."
            )

    def require(self, *names: str) -> None:
        """Raise `NoSuchSnapshot` unless there is a snapshot of each name that is not empty."""
        for name in filter(None, names):
            self._session.record.snapshot(name)

    async def make(
        self, name: str, *, description: str = "", pinned: bool = False, automatic: bool = False
    ) -> SnapshotRecord:
        """Keep the merged view as it is now, under `name`; on disk, if the session is.

        A `pinned` one is deleted by nobody but people; an `automatic` one nobody has asked for.
        Raises `InvalidName`, `SnapshotExists`, `InvalidOption`, `Busy`, `NoSuchSession`, `NoSpace`,
        `Failed`.
        """
        checked_name = snapshot_name(name)
        _check_description(description)
        with self._session.turn.operating("a snapshot is being made"):
            self.require_unused(checked_name)
            after = self._session.record.committed()
            snapshot = SnapshotRecord(
                name=checked_name,
                description=description,
                created_at=datetime.now(UTC),
                layers=after.layers,
                pinned=pinned,
                automatic=automatic,
            )
            snapshot = await self.switch_and_keep(after, snapshot)
        if self._session.storage is StorageKind.PERSISTENT:
            # The record is on disk, but not yet all that programs have written into the layer.
            await self._session.view.require().sync()
        return snapshot

    async def delete(self, name: str) -> None:
        """Forget a snapshot; layers that nothing else needs are deleted in the background.

        Raises `NoSuchSnapshot`, `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        with self._session.turn.operating("a snapshot is being deleted"):
            await self._forget([Removal(self._session.record.snapshot(name), "")])

    async def rename(self, name: str, new_name: str) -> None:
        """Give a snapshot another name.

        Raises `NoSuchSnapshot`, `InvalidName`, `SnapshotExists`, `Busy`, `NoSuchSession`,
        `NoSpace`, `Failed`.
        """
        checked_name = snapshot_name(new_name)
        with self._session.turn.operating("a snapshot is being renamed"):
            old = self._session.record.snapshot(name)
            self.require_unused(checked_name)
            new = await self._edit(old, name=checked_name)
        self._session.tell(lambda observer: observer.snapshot_removed(self._session, old))
        self._session.tell(lambda observer: observer.snapshot_added(self._session, new))

    async def describe(self, name: str, description: str) -> None:
        """Give a snapshot another description.

        Raises `InvalidOption`, `NoSuchSnapshot`, `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        _check_description(description)
        with self._session.turn.operating("a snapshot is being described"):
            await self._edit(self._session.record.snapshot(name), description=description)

    async def pin(self, name: str, pinned: bool) -> None:
        """Keep a snapshot until a person deletes it, or leave it to the rules again.

        Raises `NoSuchSnapshot`, `Busy`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        with self._session.turn.operating("a snapshot is being pinned or released"):
            await self._edit(self._session.record.snapshot(name), pinned=pinned)

    async def _edit(self, old: SnapshotRecord, **changed: object) -> SnapshotRecord:
        new = old.model_copy(update=changed)
        snapshots = [new if other is old else other for other in self._session.record.snapshots]
        await self._session.write(self._session.record.with_snapshots(snapshots))
        return new

    def export(
        self, name: str, target: int, kind: ArchiveKind = ArchiveKind.OCI, *, started_by: Uid
    ) -> Job:
        """Write a snapshot to `target`, a pipe; other operations go on meanwhile.

        Raises `NoSuchSnapshot`, `InvalidOption`, `NoSuchSession`. The caller closes `target`.
        """
        self._session.turn.require_open()
        return self._session.transfers.export(
            self._session.record.snapshot(name), target, kind, started_by=started_by
        )

    def add(self, name: str, source: int, *, description: str = "", started_by: Uid) -> Job:
        """Make a snapshot of what `source` gives, a pipe; other operations go on meanwhile.

        Raises `InvalidName`, `SnapshotExists`, `InvalidOption`, `NoSuchSession`. The caller closes
        `source`.
        """
        self._session.turn.require_open()
        checked_name = snapshot_name(name)
        _check_description(description)
        self.require_unused(checked_name)
        return self._session.transfers.add(checked_name, description, source, started_by=started_by)

    async def publish_draft(
        self, draft: Path, made_for: SessionRecord, snapshot: Callable[..., SnapshotRecord]
    ) -> None:
        """Make a draft, made for that record, the layer of a new snapshot.

        Waits for what goes on. Raises `SnapshotExists`, `NoSuchSession`, `NoSpace`, `Failed`.
        """
        await self._session.turn.become_idle()
        with self._session.turn.operating("a snapshot is being imported"):
            number, after = (
                self._session.record.next_layer,
                self._session.record.with_imported(snapshot, datetime.now(UTC)),
            )
            self.require_unused(after.snapshots[-1].name)
            self._session.require_few(after)
            if self._session.storage is not made_for.storage:
                raise Failed(
                    f"Session {self._session.id} has moved to disk while a snapshot was imported; "
                    "import it again."
                )
            with trio.CancelScope(shield=True):
                store = self._session.services.store
                await trio.to_thread.run_sync(
                    store.adopt_draft, self._session.record, draft, number
                )
                try:
                    await self._session.write(after)
                except BaseException:
                    self._session.delete_layers({number})
                    raise
        self._session.tell(
            lambda observer: observer.snapshot_added(self._session, after.snapshots[-1])
        )

    async def prune(self, choose: Callable[[SessionRecord], list[Removal]]) -> None:
        """Delete the snapshots that `choose` then returns, once no operation runs.

        Raises `NoSpace`, `Failed`.
        """
        await self._session.turn.become_idle()
        removals = choose(self._session.record)
        if removals and not self._session.turn.closing:
            with self._session.turn.operating("snapshots are being thinned out"):
                await self._forget(removals)

    async def _forget(self, removals: Collection[Removal]) -> None:
        await self._session.write(
            self._session.record.without_snapshots([one.snapshot for one in removals])
        )
        self._tell_gone(removals)

    async def undo_restore(self) -> None:
        """Forget what a restore that has failed has kept; within an operation."""
        gone = [
            one
            for one in self._session.record.snapshots
            if one.name == self._session.record.restoring
        ]
        await self._session.write(self._session.record.with_restore_undone())
        self._tell_gone([Removal(one, "the restore has failed") for one in gone])

    async def switch_and_keep(
        self,
        after: SessionRecord,
        snapshot: SnapshotRecord,
        *,
        besides: SnapshotRecord | None = None,
    ) -> SnapshotRecord:
        """Do as `Session.switch`, with one more snapshot, and without those that the rules then no
        longer keep, but with `besides`. Returns what the record then has of `snapshot`.
        """
        kept = after.with_snapshots((*after.snapshots, snapshot))
        removals = [one for one in outdated(kept) if one.snapshot not in (snapshot, besides)]
        gone = [one.snapshot for one in removals]
        inexact = await self._session.switch(kept.without_snapshots(gone), halting=True)
        if inexact:
            snapshot = await self._note_inexact(snapshot, inexact)
        log.info(
            "Snapshot %s of session %s is made.",
            snapshot.name,
            self._session.id,
            extra=self._session.event(Event.SNAPSHOT_MADE, snapshot=snapshot.name),
        )
        self._session.tell(lambda observer: observer.snapshot_added(self._session, snapshot))
        self._tell_gone(removals)
        return snapshot

    async def _note_inexact(
        self, snapshot: SnapshotRecord, inexact: tuple[str, ...]
    ) -> SnapshotRecord:
        log.warning(
            "Snapshot %s of session %s has %d files of a later moment than the rest, for programs "
            "wrote to them meanwhile.",
            snapshot.name,
            self._session.id,
            len(inexact),
        )
        noted = snapshot.model_copy(update={"inexact": inexact})
        others = [noted if one == snapshot else one for one in self._session.record.snapshots]
        try:
            await self._session.write(self._session.record.with_snapshots(others))
        except SessiondError as error:
            log.warning("%s That is not recorded.", error)
            return snapshot
        return noted

    def _tell_gone(self, removals: Collection[Removal]) -> None:
        def tell(observer: Observer) -> None:
            for removal in removals:
                observer.snapshot_removed(self._session, removal.snapshot)

        self._session.tell(tell)
        for snapshot, reason in removals:
            log.info(
                "Snapshot %s of session %s is deleted%s.",
                snapshot.name,
                self._session.id,
                f": {reason}" if reason else "",
                extra=self._session.event(
                    Event.SNAPSHOT_DELETED, snapshot=snapshot.name, reason=reason or None
                ),
            )


def _check_description(text: str) -> None:
    if len(text) > DESCRIPTION_LIMIT:
        raise InvalidOption(
            f"The description is {len(text)} characters long; at most {DESCRIPTION_LIMIT} are "
            "allowed."
        )
