"""Restore: back to a snapshot. What is replaced becomes a snapshot first, so it can be undone.

Changes are held back from the one to the other, so nothing is lost between. It takes two swaps: a
file that is open for writing leaves a layer that is frozen only for the upper just above it (see
`sessiond.overlay.writers`). The record between the two says so, and the next manager takes it as
that before, with the frozen layer in the stack.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING

import trio

from sessiond.errors import Failed, NoSpace, SessiondError
from sessiond.session.faults import explained
from sessiond.session.model import SessionRecord, SnapshotName, SnapshotRecord, StorageKind
from sessiond.session.tree import is_unchanged

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)

_GIVE_UP = (
    "Or give up what is replaced: restore with the option 'undo' set to false "
    "(sessionctl restore --no-undo)."
)


async def restore(session: Session, target: SnapshotRecord, *, undo: bool) -> None:
    """Serve the layers of `target`, within the session's operation.

    With `undo`, keep what is served now as an automatic snapshot, unless a snapshot has it already.
    Raises `ImageUnavailable`, `NoSpace`, `Failed`; all is as before then.
    """
    if not undo:
        await session.switch(session.record.with_new_upper(target.layers))
        return
    async with session.view.held():
        await _restore_held(session, target, mounted=session.view.mount is not None)
    if session.storage is StorageKind.PERSISTENT:
        # Not yet all that programs have written into the layer that is kept is on disk.
        await session.view.require().sync()


async def _restore_held(session: Session, target: SnapshotRecord, *, mounted: bool) -> None:
    before = session.record
    with _explaining():
        changed = await is_changed(session)
    if not changed and _is_kept(before):
        await session.switch(before.with_new_upper(target.layers))
        return
    replaced = before.committed() if changed else before
    snapshot = _automatic(replaced, target)
    if not (changed and mounted):  # nobody has a file of the upper open
        with _explaining():
            after = before.with_new_upper(target.layers)
            await session.snapshots.switch_and_keep(after, snapshot, besides=target)
        return
    begun = replaced.with_snapshots((*replaced.snapshots, snapshot))
    with _explaining():
        await session.switch(begun.model_copy(update={"restoring": snapshot.name}))
    try:
        after = session.record.with_new_upper(target.layers).with_snapshots(before.snapshots)
        await session.snapshots.switch_and_keep(after, snapshot, besides=target)
    except BaseException:
        await _undo(session)
        raise


@contextmanager
def _explaining() -> Iterator[None]:
    """Say of a failure what it keeps from being done, and what to do."""
    try:
        yield
    except (NoSpace, Failed) as error:
        raise type(error)(
            f"What is replaced cannot be kept as a snapshot. {error} {_GIVE_UP}"
        ) from error


async def is_changed(session: Session) -> bool:
    """Say whether the upper has changed anything. Raises `ImageUnavailable`, `Failed`."""
    store, record = session.services.store, session.record
    upper, below = store.upper(record).fs, await session.view.below(record)
    with explained(f"look into the upper of session {record.id}"):
        return not await trio.to_thread.run_sync(is_unchanged, upper, below)


def _is_kept(record: SessionRecord) -> bool:
    """Say whether the committed layers are the image's alone, or those of a snapshot."""
    return not record.layers or any(one.layers == record.layers for one in record.snapshots)


def _automatic(replaced: SessionRecord, target: SnapshotRecord) -> SnapshotRecord:
    now = datetime.now(UTC)
    return SnapshotRecord(
        name=automatic_name(replaced, "before-restore", now),
        description=f"What a restore of {target.name} has replaced",
        created_at=now,
        layers=replaced.layers,
        automatic=True,
    )


def automatic_name(record: SessionRecord, prefix: str, at: datetime) -> SnapshotName:
    """Return a name that no snapshot has; the time in it is UTC."""
    taken = {snapshot.name for snapshot in record.snapshots}
    first = f"{prefix}-{at:%Y%m%d-%H%M%S}"
    names = (SnapshotName(f"{first}-{number}" if number > 1 else first) for number in count(1))
    return next(name for name in names if name not in taken)


async def _undo(session: Session) -> None:
    """Take back the snapshot of a restore that has failed; the layer stays in the stack."""
    with trio.CancelScope(shield=True):
        try:
            await session.snapshots.undo_restore()
        except SessiondError as error:
            log.warning("Session %s keeps what a restore left that failed: %s", session.id, error)
