"""Rebase: a session goes on over another image than it was built on.

All its layers are rebased, those of snapshots as well (`sessiond.overlay.rebase`), while it is not
mounted. First what is shadowed is listed, and the list is kept in the storage. Then the record says
that the session is being rebased, and only then the layers are changed: a crash in the course
leaves a session that cannot be mounted before the rest is done, which the next start does. The
record with the new image is written last, when all that is on disk.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import trio

from sessiond.errors import Failed, ImageUnavailable, NotSupported
from sessiond.overlay.rebase import Conflicts, Shadowed, Target, rebase, tidy
from sessiond.session import layer_size
from sessiond.session.clock import Instant
from sessiond.session.faults import explained
from sessiond.session.images import Image
from sessiond.session.model import ImageChange, ImageSource, LayerNumber, SessionRecord
from sessiond.session.mounts import sync_file_system
from sessiond.session.records import fsync_directory
from sessiond.session.store import Store

if TYPE_CHECKING:
    from sessiond.session.session import Session

T = TypeVar("T")

log = logging.getLogger(__name__)

_LIST = "shadowed.jsonl"
_COMPLETE = b'{"complete": true}\n'
_LINES = 256
"""Lines that are found out before they are written."""
_PATIENCE = 60.0
"""Seconds without a reader after which a list is given up."""
_AT_LEAST = datetime.fromtimestamp(0, UTC)


def old_image(path: Path) -> Path:
    """Return where the image that was at `path` before is kept, if it is."""
    return path.with_name(path.name + ".old")


async def follow_image(session: Session, source: ImageSource) -> None:
    """Have a session that is about to be mounted mind what is at `source` now, as it is to.

    It may be mounted in the course. Only within an operation. Raises `ImageUnavailable`, `NoSpace`,
    `Failed`.
    """
    record = session.record
    if record.image_changed is ImageChange.REFUSE and not record.rebasing:
        return
    try:
        found = await session.services.images.inspect(source)
    except ImageUnavailable as error:
        if record.rebasing:
            raise
        log.warning("Session %s stays on its image: %s", session.id, error)
        return
    if not record.rebasing and not _differ(found, record.image):
        return
    if record.rebasing or record.image_changed is ImageChange.REBASE:
        await _rebase(session, source, record.rebase_conflicts)
    else:
        await _discard(session, source)


def _differ(one: str, other: str) -> bool:
    """Say whether two digests are those of different images. Directories never are: each may hold
    anything tomorrow; that it does not is the user's affair.
    """
    directories = all(digest.startswith("directory-") for digest in (one, other))
    return one != other and not directories


async def rebase_now(
    session: Session, source: ImageSource, conflicts: Conflicts, *, remount: bool
) -> None:
    """Rebase a session on demand and mount it again. Only within an operation.

    Raises `NotSupported` if it is mounted, and not to be unmounted; `ImageUnavailable`, `NoSpace`,
    `Failed`.
    """
    found = await session.services.images.inspect(source)
    if session.view.mount is not None:
        if not _differ(found, session.image):
            return
        if not remount:
            raise NotSupported(
                f"Session {session.id} is in use on its image, {session.image}, and goes on so. It "
                "can be rebased when it is not mounted, or with the option 'remount': then "
                "programs lose the files that they have open in it."
            )
    # To be gone on with, until it is mounted again: it is the only way back as well.
    with trio.CancelScope(shield=True):
        await session.view.unmount()
        try:
            await _rebase(session, source, conflicts)
        finally:
            if not session.record.rebasing:
                await session.view.show()


async def _discard(session: Session, source: ImageSource) -> None:
    """Start anew on another image. What was changed and snapshots are deleted: all of it was over
    the old image.
    """
    image = await session.services.images.acquire(source)
    before = session.record.image
    await session.view.exchange_image(image)
    try:
        after = session.record.discarded(Instant.now(session.services.surroundings.clock))
        await session.switch(after.rebased(source, image.digest, image.built))
    except BaseException:
        with trio.CancelScope(shield=True):
            await session.view.exchange_image(None)
        raise
    log.warning(
        "Session %s is on another image now, %s instead of %s; its changes and snapshots are "
        "deleted.",
        session.id,
        image.digest,
        before,
    )


async def _rebase(session: Session, source: ImageSource, conflicts: Conflicts) -> None:
    images = session.services.images
    image = await images.acquire(source)
    try:
        async with _old_image(session) as base:
            work = _Work(session.services.store, session.record, image, base)
            await _rebase_layers(session, work, conflicts)
        await session.write(session.record.rebased(source, image.digest, image.built))
    except BaseException:
        with trio.CancelScope(shield=True):
            await images.release(image)
        raise
    session.upkeep.recount(session.record.all_layers)
    log.info("Session %s is rebased: it goes on over image %s.", session.id, image.digest)
    await session.view.exchange_image(image)


async def _rebase_layers(session: Session, work: _Work, conflicts: Conflicts) -> None:
    def in_words(function: Callable[[], T]) -> T:
        with explained(f"rebase session {session.id}"):
            return function()

    with trio.CancelScope(shield=True):
        if not (session.record.rebasing and work.list.exists()):
            await trio.to_thread.run_sync(in_words, lambda: work.write_list(conflicts))
        await session.write(session.record.model_copy(update={"rebasing": True}))
        await trio.to_thread.run_sync(in_words, lambda: work.apply(conflicts))


@asynccontextmanager
async def _old_image(session: Session) -> AsyncIterator[Path | None]:
    """Hand out the root of the image that a session was built on; None if it is gone."""
    images, record = session.services.images, session.record
    places = [
        record.source,
        record.source.model_copy(update={"path": old_image(record.source.path)}),
    ]
    image = await images.acquire_old(record.image, places)
    if image is None:
        log.warning(
            "Session %s is rebased without the image that it was built on, %s, which is gone: "
            "files of the new one that are younger count as changed.",
            session.id,
            record.image,
        )
        yield None
        return
    try:
        yield image.root
    finally:
        await images.release(image)


class _Work:
    """The layers of a session that is not mounted, and what is to be done with them."""

    def __init__(
        self, store: Store, record: SessionRecord, image: Image, base: Path | None
    ) -> None:
        self._store = store
        self._record = record
        self._image = image
        self._base = base
        self._storage = store.storage(record)
        self.list = self._storage / _LIST

    def _targets(self) -> Iterator[tuple[LayerNumber, Target]]:
        """Yield all layers; one that is above another comes first."""
        store, record = self._store, self._record
        since = record.image_built or record.created_at
        for number, below in record.stacks():
            layer = store.layer(record, number)
            lowers = [store.layer(record, lower) / "fs" for lower in below]
            yield (
                number,
                Target(
                    upper=os.fsencode(layer / "fs"),
                    work=os.fsencode(layer / "work"),
                    lowers=[os.fsencode(path) for path in (*lowers, self._image.root)],
                    base=None if self._base is None else os.fsencode(self._base),
                    since_ns=int((since - _AT_LEAST).total_seconds()) * 10**9,
                ),
            )

    def lines(self, conflicts: Conflicts) -> Generator[bytes, None, None]:
        """Yield the list of what is shadowed. Raises OSError."""
        snapshots = {
            number: [one.name for one in self._record.snapshots if number in one.layers]
            for number in self._record.all_layers
        }
        for number, target in self._targets():
            now = number == self._record.upper or number in self._record.layers
            for one in rebase(target, conflicts, apply=False, check=_check):
                yield _line(one, now=now, snapshots=snapshots[number])

    def write_list(self, conflicts: Conflicts) -> None:
        new = self._storage / f"{_LIST}.new"
        try:
            with open(new, "wb", opener=_private) as file:
                file.writelines(self.lines(conflicts))
                file.write(_COMPLETE)
                file.flush()
                os.fsync(file.fileno())
            new.rename(self.list)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        fsync_directory(self._storage)

    def apply(self, conflicts: Conflicts) -> None:
        """Rebase all layers; that is on disk then. Raises OSError."""
        targets = list(self._targets())
        for _, target in targets:
            for _ in rebase(target, conflicts, apply=True, check=_check):
                pass
        for _, target in reversed(targets):
            tidy(target, check=_check)
        for number, _ in targets:
            layer_size.forget_bytes(self._store.layer(self._record, number))
        sync_file_system(self._storage)


def _check() -> None:
    trio.from_thread.check_cancelled()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


_TYPES = {0: "none", stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


def _line(one: Shadowed, *, now: bool, snapshots: Sequence[str]) -> bytes:
    told: dict[str, object] = {
        "path": "/" + os.fsdecode(one.path),
        "type": _TYPES.get(stat.S_IFMT(one.mode), "other"),
        "outcome": one.outcome.value,
        "now": now,
        "snapshots": snapshots,
    }
    if one.saved_as:
        told["saved_as"] = "/" + os.fsdecode(one.saved_as)
    return json.dumps(told).encode() + b"\n"


async def write_shadowed(session: Session, source: ImageSource, target: int) -> None:
    """Write a list of what both the session and its image have changed to `target`, a pipe that
    does not block: of a session that is not mounted since it has another image now, what its rebase
    would find; of others, what the last has found.

    Lines of JSON: ``{"path": str, "type": "file"|"directory"|"symlink"|"other"|"none", "outcome":
    "kept"|"dropped"|"saved", "now": bool, "snapshots": [str], "saved_as": str}``; after the last
    comes ``{"complete": true}``. Returns when the list has ended, early when the reader hangs up.
    Raises `ImageUnavailable`, `Failed`.
    """
    with suppress(BrokenPipeError):
        await _write_shadowed(session, source, target)


async def _write_shadowed(session: Session, source: ImageSource, target: int) -> None:
    images, record = session.services.images, session.record
    found = record.image
    if session.view.mount is None and not record.rebasing:
        found = await images.inspect(source)
    if not _differ(found, record.image):
        stored = session.services.store.storage(record) / _LIST
        with closing(_read(stored)) as lines:
            await _pass_on(lines, target)
        return
    image = await images.acquire(source)
    try:
        async with _old_image(session) as base:
            work = _Work(session.services.store, record, image, base)
            with closing(work.lines(record.rebase_conflicts)) as lines:
                await _pass_on(lines, target)
        await _write(target, _COMPLETE)
    finally:
        await images.release(image)


def _read(file: Path) -> Generator[bytes, None, None]:
    try:
        with open(file, "rb") as stored:
            yield from stored
    except FileNotFoundError:
        yield _COMPLETE


async def _pass_on(lines: Iterator[bytes], target: int) -> None:
    def some() -> bytes:
        with explained("list what is shadowed"):
            return b"".join(islice(lines, _LINES))

    while part := await trio.to_thread.run_sync(some):
        await _write(target, part)


async def _write(target: int, data: bytes) -> None:
    while data:
        with trio.move_on_after(_PATIENCE) as waiting:
            await trio.lowlevel.wait_writable(target)
        if waiting.cancelled_caught:
            raise Failed(f"nothing was read of it for {_PATIENCE:.0f} seconds")
        try:
            data = data[os.write(target, data) :]
        except BlockingIOError:
            continue
