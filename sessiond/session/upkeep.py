"""What a session does about its snapshots by itself: makes them, counts what they take, and thins
them out.

One task for each session. It begins nothing while an operation runs, and an operation that is asked
for while it makes or deletes some is refused with `Busy`, as by any other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import trio

from sessiond.errors import NoSuchSession, SessiondError
from sessiond.session.layer_size import layer_bytes
from sessiond.session.model import LayerNumber, SessionRecord, SnapshotName, StorageKind
from sessiond.session.restore import automatic_name, is_changed
from sessiond.session.retention import Removal, exclusive, to_make_room, too_large, users
from sessiond.session.space import SpaceLevel

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)

_one_at_a_time = trio.CapacityLimiter(1)
"""Of all sessions, one layer is counted: others use the disk as well."""


class SnapshotSize(NamedTuple):
    """Bytes that a snapshot takes on disk."""

    bytes: int
    """All its layers, those included that others need as well."""
    exclusive: int
    """What is given back when it is deleted."""
    known: bool
    """False as long as some of its layers are not counted; both are 0 then."""


class Upkeep:
    """The task of one session, and what it knows."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sizes: dict[tuple[StorageKind, LayerNumber], int] = {}
        self._wanted = trio.Event()
        self._table: dict[SnapshotName, SnapshotSize] = {}
        self._table_of: SessionRecord | None = None
        self._due = math.inf
        """When to make the next one, as trio tells the time."""

    def wake(self) -> None:
        """Look at the snapshots again, soon: something has changed."""
        self._wanted.set()

    def recount(self, numbers: Collection[LayerNumber]) -> None:
        """Count these layers again, soon."""
        for number in numbers:
            self._sizes.pop((self._session.record.storage, number), None)
        self._table_of = None
        self.wake()

    def size(self, name: SnapshotName) -> SnapshotSize:
        """Return what the snapshot `name` takes, as far as it is known now."""
        record = self._session.record
        if record is not self._table_of:
            sizes, uses = self._known(record), users(record)
            self._table_of = record
            self._table = {}
            for one in record.snapshots:
                known = sizes.keys() >= set(one.layers)
                self._table[one.name] = SnapshotSize(
                    sum(sizes[number] for number in one.layers) if known else 0,
                    sum(sizes[number] for number in exclusive(one, uses)) if known else 0,
                    known,
                )
        return self._table[name]

    def _known(self, record: SessionRecord) -> dict[LayerNumber, int]:
        layers = record.all_layers
        return {
            number: size
            for (storage, number), size in self._sizes.items()
            if storage is record.storage and number in layers
        }

    async def run(self) -> None:
        """Do what is to be done, each time that the session is changed or its space is short."""
        self._due = trio.current_time() + _seconds_left(self._session.record)
        while True:
            self._wanted = trio.Event()
            try:
                if trio.current_time() >= self._due:
                    self._due += self._session.record.snapshot_rules.every or math.inf
                    await self._make()
                await self._count()
                await self._prune(lambda record: too_large(record, self._known(record)))
                if self._session.space_level is SpaceLevel.CRITICAL:
                    await self._make_room()
            except NoSuchSession:  # it is being closed
                return
            except SessiondError as error:
                log.warning("Snapshots of session %s: %s", self._session.id, error)
            with trio.move_on_at(self._due):
                await self._wanted.wait()

    async def _make(self) -> None:
        """Make an automatic snapshot, if anything was changed since the last one."""
        session = self._session
        await session.turn.become_idle()
        # One that is not mounted changes nothing, and is not mounted for this.
        if session.view.mount is None or not await is_changed(session):
            return
        await session.turn.become_idle()
        name = automatic_name(session.record, "timed", datetime.now(UTC))
        await session.snapshots.make(name, automatic=True)

    async def _count(self) -> None:
        """Count layers of snapshots that are not counted yet."""
        record = self._session.record
        snapshots = {number for one in record.snapshots for number in one.layers}
        merging = self._session.flattening.merging
        missing = sorted(snapshots - self._known(record).keys() - merging)
        for number in missing:
            layer = self._session.services.store.layer(record, number)
            try:
                size = await trio.to_thread.run_sync(
                    layer_bytes,
                    layer,
                    number,
                    trio.from_thread.check_cancelled,
                    limiter=_one_at_a_time,
                )
            except FileNotFoundError:  # deleted meanwhile, or moved to disk with the session
                continue
            except OSError as error:
                log.warning("Layer %s cannot be counted: %s", layer, error)
                continue
            self._sizes[record.storage, number] = size
        if missing:
            known = self._known(self._session.record)
            self._sizes = {(self._session.storage, number): size for number, size in known.items()}
            self._table_of = None
            self._session.tell_changed()

    async def _make_room(self) -> None:
        # What is deleted gives its space back only when its files are gone.
        if not self._session.is_deleting:
            await self._prune(to_make_room)

    async def _prune(self, choose: Callable[[SessionRecord], list[Removal]]) -> None:
        if choose(self._session.record):
            await self._session.snapshots.prune(choose)


def _seconds_left(record: SessionRecord) -> float:
    """Return how long it is until the next automatic snapshot is to be made.

    Whatever has happened to the clock, never longer than from one to the next.
    """
    every = record.snapshot_rules.every
    if every is None:
        return math.inf
    automatic = [one.created_at for one in record.snapshots if one.automatic]
    passed = (datetime.now(UTC) - max([record.created_at, *automatic])).total_seconds()
    return min(max(every - passed, 0.0), every)
