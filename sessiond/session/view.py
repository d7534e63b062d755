"""The merged view of a session: what is mounted, watched over, and mounted again.

The worker that serves it may die at any moment. Another takes over then, and programs see a pause;
only where that fails it is mounted anew, and what programs had open is lost to them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from sessiond.errors import Failed, ImageUnavailable, SessiondError
from sessiond.journal import Event
from sessiond.session import kept, mount_point
from sessiond.session.attempts import Attempts
from sessiond.session.faults import explained
from sessiond.session.images import Image
from sessiond.session.model import SessionRecord, SessionState, Stack
from sessiond.session.mounter import VIEW_TYPE, Mount, MountRequest
from sessiond.session.space import LimitedBy

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0


class View:
    """That of one session."""

    def __init__(self, session: Session, image: Image | None) -> None:
        """A view that is not mounted yet. It owns `image`, if that is acquired already."""
        self._session = session
        self.mount: Mount | None = None
        """What is served; its worker may have died a moment ago."""
        self._image = image
        self._attempts = Attempts(most=5, seconds=60.0)
        self._recoveries = Attempts(most=20, seconds=10.0)

    async def serve(
        self, record: SessionRecord, *, moved: bool = False, retained: bool = False
    ) -> tuple[str, ...]:
        """Switch over to the layers of `record`; mount them if nothing is mounted.

        With `moved`, they are copies of those served, and files that are open go on in them. With
        `retained`, the upper has what `Mount.retain` has brought there.
        Returns what `Mount.swap` does. Only within an operation. Raises `ImageUnavailable`,
        `NoSpace`, `Failed`; what was served before is served still then.
        """
        image = await self.image()
        if self.mount is None:
            await self._show(record, image)
            return ()
        stack = self.stack(record, image)
        return await self.mount.swap(stack, moved=moved, retained=retained)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Hold changes back while the context is open, if anything is mounted.

        The session's programs stand still before that, until the layers have been exchanged.
        """
        if self.mount is None:
            yield
            return
        async with self._session.services.halting.halted(self._session), self.mount.frozen():
            yield

    async def show(self) -> None:
        """Mount what is recorded. Only within an operation; raises what prevents it."""
        await self._show(self._session.record, await self.image())

    async def adopt(self) -> bool:
        """Go on with what an earlier manager has mounted, if that can be."""
        session, image = self._session, await self.image()
        session.record = await self._prepare_kept(session.record, image)
        mount = await session.services.mounter.adopt(self._request(session.record, image))
        if mount is None:
            return False
        log.info("Session %s goes on at %s.", session.id, session.mount_point)
        self._own(mount)
        await kept.discard_unwanted(session)
        return True

    async def unmount(self) -> None:
        """Take the merged view from whoever uses it, to be mounted again. Only within an operation.

        Never fails.
        """
        mount, self.mount = self.mount, None
        if mount is not None:
            await mount.unmount()

    async def end(self) -> None:
        """Unmount it for good, and give the image back. Never fails."""
        if self.mount is not None:
            await self.unmount()
            log.info(
                "Session %s is unmounted.",
                self._session.id,
                extra=self._session.event(Event.SESSION_ENDED),
            )
        elif self._session.id in self._session.services.mounter.left():  # it was not adopted yet
            try:
                await trio.to_thread.run_sync(self.detach_stale)
            except SessiondError as error:
                log.error("%s", error)  # noqa: TRY400
        await self.exchange_image(None)

    def detach_stale(self) -> None:
        """Unmount what another manager has left at the mount point. Blocks; raises `Failed`."""
        mounts, path = self._session.services.mounts, self._session.mount_point
        with explained(f"detach what is mounted at {path}"):
            if mounts.file_system(path) == VIEW_TYPE:
                log.info("%s is unmounted: another sessiond has left it there.", path)
                mounts.detach(path, only=VIEW_TYPE)

    def require(self) -> Mount:
        """Return the mount. Raises `NoSuchSession`, or `Failed` with why there is none."""
        self._session.turn.require_open()
        if self.mount is None:
            why = self._session.failure or "What is being done to it has to end first."
            raise Failed(f"Session {self._session.id} is not mounted. {why}")
        return self.mount

    # What is shown

    async def image(self) -> Image:
        """Return the image, mounted. Raises `ImageUnavailable`, `Failed`."""
        if self._image is None:
            session, images = self._session, self._session.services.images
            record = session.record
            image = await images.acquire(record.source, known=record.image)
            # A directory may hold anything tomorrow; that it is a fixed thing is the user's affair.
            directories = {image.kind, record.image.partition("-")[0]} == {"directory"}
            if image.digest != record.image and not directories:
                await images.release(image)
                raise ImageUnavailable(
                    f"Image {record.source.path} is not the one that session {session.id} was "
                    f"built on ({record.image}); put that back, rebase the session, or close it."
                )
            if record.rebasing:
                await images.release(image)
                raise ImageUnavailable(
                    f"The rebase of session {session.id} was begun and has to end first; rebase it "
                    "again."
                )
            self._image = image
        return self._image

    async def exchange_image(self, image: Image | None) -> None:
        """Give back the image that is held, and hold `image`, which was acquired, instead."""
        before, self._image = self._image, image
        if before is not None:
            await self._session.services.images.release(before)

    async def served(self) -> Stack:
        """Return the layers that are served. Only within an operation."""
        return self.stack(self._session.record, await self.image())

    async def below(self, record: SessionRecord) -> Path:
        """Return the tree just below the upper of `record`. Raises `ImageUnavailable`."""
        return self.stack(record, await self.image()).lowers[0]

    def stack(self, record: SessionRecord, image: Image) -> Stack:
        """Return the layers of `record` on `image`."""
        store = self._session.services.store
        return Stack(
            upper=store.upper(record),
            lowers=(*store.lowers(record), image.root),
            indexes=store.indexes(record),
            orphans=store.orphans(record),
            former=store.former_orphans(record),
        )

    async def _show(self, record: SessionRecord, image: Image) -> None:
        session, services = self._session, self._session.services
        if session.resting:
            return
        if session.limited_by is LimitedBy.QUOTA:
            await trio.to_thread.run_sync(services.store.enforce_quota, record)
        record = await self._prepare_kept(record, image)
        if session.record.keep is not None:
            session.record = session.record.model_copy(update={"commits": record.commits})
        await trio.to_thread.run_sync(
            mount_point.prepare, record.mount_point, record.uid, services.mounts
        )
        mount = await services.mounter.mount(self._request(record, image))
        log.info(
            "Session %s is mounted at %s.",
            record.id,
            record.mount_point,
            extra=session.event(Event.SESSION_STARTED),
        )
        self._own(mount)
        await kept.discard_unwanted(session)

    async def _prepare_kept(self, record: SessionRecord, image: Image) -> SessionRecord:
        """Have a place for what outlives resets; return the record with what was committed."""
        if record.keep is None:
            return record
        store = self._session.services.store
        rules = await trio.to_thread.run_sync(store.kept.prepare, record, image.root)
        record, before = kept.with_committed(record, rules), record
        if set(before.commits) - set(rules):  # a commit that a manager has died in
            await trio.to_thread.run_sync(store.kept.write, record)
        return record

    def _request(self, record: SessionRecord, image: Image) -> MountRequest:
        store = self._session.services.store
        return MountRequest(
            session=record.id,
            mount_point=record.mount_point,
            stack=self.stack(record, image),
            nosuid=record.nosuid,
            nodev=record.nodev,
            data_path=record.data_path,
            reachable=(*store.reachable(record), image.root),
            keep=None if record.keep is None else store.kept.layers(record),
        )

    # Supervision

    def _own(self, mount: Mount) -> None:
        session = self._session
        self.mount, session.failure = mount, ""
        session.flattening.consider()
        session.start_soon(self._supervise, mount)
        session.start_soon(session.settling.run)

    async def _supervise(self, mount: Mount) -> None:
        """When the worker of `mount` dies, have another go on; if that fails, mount again."""
        session, turn = self._session, self._session.turn
        await mount.wait_died()
        while self.mount is mount and not turn.closing and await self._recover(mount):
            await mount.wait_died()
        if self.mount is not mount:  # it was unmounted
            return
        session.failure = f"The worker of session {session.id} ended unexpectedly."
        log.error(
            "%s It is started again.",
            session.failure,
            extra=session.event(Event.WORKER_DIED, outcome="remounted"),
        )
        session.tell(lambda observer: observer.worker_died(session, None))
        turn.give_up(Failed(f"{session.failure} Nothing was changed; try again."))
        await turn.become_idle()
        if not turn.closing:
            with turn.operating("it is being mounted again", SessionState.FAILED):
                await self.unmount()
                await self._show_again()

    async def _recover(self, mount: Mount) -> bool:
        session = self._session
        if not self._recoveries.allowed():
            return False
        died_at = trio.current_time()
        try:
            await mount.recover()
        except SessiondError as error:
            log.error("Session %s: %s", session.id, error)  # noqa: TRY400
            return False
        log.error(
            "The worker of session %s ended unexpectedly; another goes on for it.",
            session.id,
            extra=session.event(Event.WORKER_DIED, outcome="recovered"),
        )
        seconds = trio.current_time() - died_at
        session.tell(lambda observer: observer.worker_died(session, seconds))
        return True

    async def _show_again(self) -> None:
        session = self._session
        while self._attempts.allowed():
            try:
                await self.show()
            except SessiondError as error:
                session.failure = str(error)
                log.error("Session %s cannot be mounted again: %s", session.id, error)  # noqa: TRY400
                await trio.sleep(_PAUSE_SECONDS)
            else:
                log.warning("Session %s is mounted again.", session.id)
                return
        session.failure += " Starting it again is given up; reset the session, or close it."
        log.error("%s", session.failure)
