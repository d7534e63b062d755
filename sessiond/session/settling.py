"""What a session that has moved to disk still has in RAM, until nothing is left there.

Files that programs had open for writing are written there until their last close; the worker copies
them to disk, see `sessiond.overlay.pending`. Until then their storage stays mounted, with nothing
else in it, so that they are not lost if the worker or the manager dies.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import trio

from sessiond.errors import SessiondError
from sessiond.session.model import NOTHING_PENDING, PendingFile, StorageKind

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0


class Settling:
    """Looks after what one session has left in RAM."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known = NOTHING_PENDING
        self._running = False
        self._looking = trio.Lock()
        """Whoever asks often shall not have /proc looked through many times at once."""

    @property
    def pending(self) -> int:
        """How many files are still written in RAM."""
        return self._known.count

    async def files(self) -> list[PendingFile]:
        """Return which, and by whom. Raises `NoSuchSession`, `Failed`."""
        session = self._session
        if session.storage is StorageKind.TMPFS:
            return []
        pending = await session.view.require().pending()
        async with self._looking:
            programs = await self._programs_with(pending.files.keys())
        return [
            PendingFile(path, tuple(sorted(programs.get(inode, ()))))
            for inode, path in sorted(pending.files.items(), key=lambda item: item[1])
        ]

    async def _programs_with(self, files: Collection[int]) -> Mapping[int, set[str]]:
        """Return the names of the programs that have each of these files open."""
        found: defaultdict[int, set[str]] = defaultdict(set)
        services = self._session.services
        device = await trio.to_thread.run_sync(services.mounts.device, self._session.mount_point)
        if device is not None and files:
            async with services.surroundings.processes.using(device, files) as processes:
                for process in processes:
                    for file in process.files:
                        found[file].add(process.program)
        return found

    async def begin(self) -> None:
        """Give back the RAM of a session that has moved to disk, now or as soon as that can be.

        Raises `NoSuchSession`, `Failed`, if it is not now.
        """
        try:
            await self.look()
        finally:
            self._session.start_soon(self.run)

    async def run(self) -> None:
        """Return when nothing is left in RAM, or when it is unmounted; at once if it runs."""
        store, session = self._session.services.store, self._session
        if self._running or session.storage is StorageKind.TMPFS:
            return
        self._running, said = True, ""
        try:
            while session.view.mount is not None and store.has_volatile_storage(session.id):
                try:
                    await self.look()
                except SessiondError as error:
                    # A worker that has died has a successor in a moment.
                    if said != str(error):
                        said = str(error)
                        log.warning("Session %s has left something in RAM: %s", session.id, said)
                await trio.sleep(_LOOK_SECONDS)
        finally:
            self._running = False

    async def look(self) -> None:
        """Find out what is left; drop the storage if nothing is there.

        Raises `NoSuchSession`, `Failed`.
        """
        store, session = self._session.services.store, self._session
        before, self._known = self._known, await session.view.require().pending()
        if before.count != self._known.count:
            session.tell_changed()
        # Only now: a worker that answers serves what is on disk.
        if self._known.in_use:
            await trio.to_thread.run_sync(store.empty_volatile_storage, session.id)
        else:
            await trio.to_thread.run_sync(store.drop_volatile_storage, session.id)
            log.info("Session %s has nothing in RAM any more.", session.id)
