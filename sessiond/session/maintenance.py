"""Maintenance: an administrator's session, of which a new image is made.

Meanwhile no other sessions are made; those that there are go on. There is one maintenance at a
time. Its state is a file, ``STATE/maintenance.json``, from before its session exists until that is
gone, so whatever dies, the machine goes back to what it was: a manager that is started again goes
on with it, but ends it after a reboot, and then the image is as it was.

The new image is written beside the old one, compared with the session, file by file, and exchanged
for the old one in one step, which then is ``IMAGE.old``. Sessions on that go on.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import trio
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from sessiond.errors import Busy, Failed, InvalidOption, NotSupported, SessiondError
from sessiond.overlay import sameness, syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.session import durable
from sessiond.session.faults import explained
from sessiond.session.images import digest_of
from sessiond.session.jobs import Job
from sessiond.session.model import ImageSource, SessionId, SessionRecord, Uid
from sessiond.session.model import Stack as Layers
from sessiond.session.packing import Packer, packer_like
from sessiond.session.rebase import old_image
from sessiond.session.records import fsync_directory
from sessiond.session.services import Services
from sessiond.session.session import Session
from sessiond.session.snapshots import DESCRIPTION_LIMIT

log = logging.getLogger(__name__)

MAINTAINER = "root"
"""Whose session it is."""
DEFAULT_ID = SessionId("maintenance")

_FILE = "maintenance.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LIMIT = 1 << 20


class MaintenanceRecord(BaseModel):
    """What is to be known of a maintenance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=1, le=1)] = 1
    profile: str
    message: str
    session: SessionId
    image: Path
    """The file, without symbolic links."""
    digest: str
    """Of the image that it began with."""
    boot: str
    """The boot id of the machine."""
    started_by: Uid
    started_at: AwareDatetime
    new: str = ""
    """Name of the new image, beside the old one, while there is one."""


class Maintenance:
    """The maintenance that goes on, if one does. For the manager only."""

    def __init__(
        self, services: Services, state: Path, end: Callable[[SessionId], Awaitable[None]]
    ) -> None:
        """`state`: the directory; `end` closes a session."""
        self._services = services
        self._file = state / _FILE
        self._end = end
        self.record: MaintenanceRecord | None = None

    def require_none(self) -> None:
        """Raise `Busy` if one goes on."""
        if self.record is not None:
            said = f": {self.record.message}" if self.record.message else ""
            raise Busy(
                f"The image of profile {self.record.profile} is being maintained, and no sessions "
                f"are made meanwhile{said.removesuffix('.')}."
            )

    # Beginning

    async def begin(
        self,
        profile: str,
        source: ImageSource,
        message: str,
        create: Callable[[], Awaitable[Session]],
        session: SessionId,
        started_by: Uid,
    ) -> Session:
        """Begin one: `create` makes its session. If that fails, all is as before.

        Raises `Busy`, `InvalidOption`, `NotSupported`, `ImageUnavailable`, and what `create` does.
        """
        self.require_none()
        if len(message) > DESCRIPTION_LIMIT:
            raise InvalidOption(
                f"The message is {len(message)} characters long; at most {DESCRIPTION_LIMIT} are "
                "allowed."
            )
        digest = await self._services.images.inspect(source)
        image = await trio.to_thread.run_sync(_require_replaceable, source, digest)
        self.require_none()  # another may have been quicker
        record = self.record = MaintenanceRecord(
            profile=profile,
            message=message,
            session=session,
            image=image,
            digest=digest,
            boot=_boot_id(),
            started_by=started_by,
            started_at=datetime.now(UTC),
        )
        try:
            with trio.CancelScope(shield=True):
                await self._write(record)
                begun = await create()
        except BaseException:
            await self._forget()
            raise
        log.warning("Maintenance of image %s begins: session %s.", image, session)
        self._services.observers.tell(lambda observer: observer.maintenance_changed(begun=True))
        return begun

    # Ending

    async def session_closed(self, session: SessionId) -> None:
        """The session has gone, and with it the maintenance, if it was that one's."""
        if self.record is not None and self.record.session == session:
            await self._over()

    async def _over(self) -> None:
        await self._forget()
        log.warning("The maintenance is over.")
        self._services.observers.tell(lambda observer: observer.maintenance_changed(begun=False))

    def require(self) -> MaintenanceRecord:
        """Return the one that goes on. Raises `Failed` if none does."""
        if self.record is None:
            raise Failed("No maintenance is going on.")
        return self.record

    def finish(self, session: Session, *, started_by: Uid) -> Job:
        """Make the new image; with that the maintenance is over, and its session then ends.

        Raises `Busy`.
        """
        job = session.publish_image(self._install, started_by=started_by)
        self._services.nursery.start_soon(self._end_after, job)
        return job

    async def _end_after(self, job: Job) -> None:
        try:
            await job.wait()
        except SessiondError:
            return  # it goes on, and can be finished again, or cancelled
        try:
            await self._end(job.session)
        except SessiondError as error:
            log.error("The session of the maintenance: %s", error)  # noqa: TRY400

    async def _install(self, session: Session, job: Job) -> None:
        record = self.require()
        image = record.image
        kind = record.digest.partition("-")[0]
        with explained(f"replace image {image}"):
            packer = await trio.to_thread.run_sync(packer_like, image, kind)
        await self._require_unchanged(record)
        new = image.with_name(_new_prefix(image) + secrets.token_hex(4))
        await self._write(record.model_copy(update={"new": new.name}))
        try:
            mount = session.view.require()
            await mount.sync()
            async with mount.frozen():
                await self._pack(packer, session, new, job)
                await self._verify(session, new)
            await self._require_unchanged(record)
            # No way back from here.
            with trio.CancelScope(shield=True), explained(f"replace image {image}"):
                await trio.to_thread.run_sync(_replace, image, new)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_remove, new)
                await self._write(record)
            raise
        log.warning("Image %s is replaced; %s is the one before.", image, old_image(image))
        with trio.CancelScope(shield=True):
            await self._over()

    async def _require_unchanged(self, record: MaintenanceRecord) -> None:
        found = await self._services.images.inspect(ImageSource(path=record.image))
        if found != record.digest:
            raise Failed(
                f"Image {record.image} was replaced since the maintenance began; put the old one "
                "back, or cancel the maintenance."
            )

    async def _pack(self, packer: Packer, session: Session, new: Path, job: Job) -> None:
        expected = (await trio.Path(self.require().image).stat()).st_blocks * 512

        def report(size: int) -> None:
            # What remains, after as much as the old one has, nobody knows.
            job.report(min(size, expected * 9 // 10), expected)

        await packer.pack(session.mount_point, new, report)

    async def _verify(self, session: Session, new: Path) -> None:
        """Mount the new image, and compare it with the session. Raises `Failed`."""
        layers = await session.view.served()
        images = self._services.images
        image = await images.acquire(ImageSource(path=new))
        try:
            with explained(f"compare {new} with session {session.id}"):
                found = await trio.to_thread.run_sync(_compare, layers, image.root)
        finally:
            await images.release(image)
        if found is not None:
            path, how = found
            raise Failed(
                f"The new image is not what session {session.id} shows: /{os.fsdecode(path)} "
                f"{how}. The old one stays. If something was writing to the session, end that and "
                "finish again."
            )

    # The manager's start

    def recover(self, sessions: Sequence[SessionRecord]) -> set[SessionId]:
        """Find out what an earlier manager was at; return the sessions that are to be removed.

        A maintenance of this boot goes on, unless its image was finished. Raises `Failed`.
        """
        with explained("look for a maintenance"):
            record = self._read()
            installed = False
            if record is not None and record.new:
                installed = _is_installed(record)
                record = record.model_copy(update={"new": ""})
            there = record is not None and any(one.id == record.session for one in sessions)
            if record is None or installed or not there or record.boot != _boot_id():
                if record is not None:
                    how = "with the new image" if installed else "and the image is as it was"
                    log.warning("The maintenance of image %s has ended, %s.", record.image, how)
                return {one.id for one in sessions if one.maintenance}
            durable.replace(self._file, record.model_dump_json().encode())
        self.record = record
        log.warning("The maintenance of image %s goes on.", record.image)
        return {one.id for one in sessions if one.maintenance and one.id != record.session}

    async def recovered(self) -> None:
        """What `recover` has returned is removed."""
        if self.record is None:
            await self._forget()

    def _read(self) -> MaintenanceRecord | None:
        try:
            text = self._file.read_bytes()[:_LIMIT]
            return MaintenanceRecord.model_validate_json(text)
        except FileNotFoundError:
            return None
        except ValidationError:
            log.error("%s makes no sense: what it stood for has ended.", self._file)  # noqa: TRY400
            return None

    async def _write(self, record: MaintenanceRecord) -> None:
        def write() -> None:
            with explained("note the maintenance"):
                durable.replace(self._file, record.model_dump_json().encode())

        await trio.to_thread.run_sync(write)
        self.record = record

    async def _forget(self) -> None:
        def remove() -> None:
            with explained("forget the maintenance"):
                if self._file.exists():
                    self._file.unlink()
                    fsync_directory(self._file.parent)
                durable.spare_of(self._file).unlink(missing_ok=True)

        with trio.CancelScope(shield=True):
            self.record = None
            await trio.to_thread.run_sync(remove)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _new_prefix(image: Path) -> str:
    return f".{image.name}.sessiond-new-"


def _require_replaceable(source: ImageSource, digest: str) -> Path:
    """Return the file of an image that a new one can be made for. Raises `NotSupported`."""
    image = source.path.resolve()
    if source.verity_root_hash is not None:
        raise NotSupported(
            f"Image {source.path} is protected by dm-verity, and a new one would have another root "
            "hash. Take verity_root_hash out of the profile, reload, maintain the image, protect "
            "it again (veritysetup format), and give the profile the new hash."
        )
    if image.is_dir():
        raise NotSupported(
            f"Image {source.path} is a directory, which is changed where it is: close the sessions "
            "on it, change it, and make them again. To maintain it, make an image file of it "
            "(mksquashfs), and name that in the profile."
        )
    if not image.is_file():
        raise NotSupported(
            f"Image {source.path} is a device, and a file cannot take its place. Maintain a copy "
            "of it in an image file, and write that to the device while no session is on it."
        )
    with explained(f"maintain image {image}"):
        packer_like(image, digest.partition("-")[0])
        for left_over in image.parent.glob(f"{_new_prefix(image)}*"):
            left_over.unlink()
    if not os.access(image.parent, os.W_OK):
        raise NotSupported(
            f"Nothing can be written to {image.parent}, where the new image would be made; move "
            "the image to a disk that can be written to, and correct its profile."
        )
    return image


def _compare(layers: Layers, new: Path) -> tuple[bytes, str] | None:
    stack = Stack.open(
        [os.fsencode(path) for path in (layers.upper.fs, *layers.lowers)],
        indexes=[
            os.fsencode(path)
            for path in (layers.upper.work / "index", *layers.indexes)
            if path.is_dir()
        ],
    )
    try:
        tree = Layer.open(os.fsencode(new), writable=False)
        try:
            return sameness.first_difference(stack, tree, trio.from_thread.check_cancelled)
        finally:
            tree.close()
    finally:
        stack.close()


def _replace(image: Path, new: Path) -> None:
    """Exchange the image for the new one, and keep it as the old one."""
    before = image.stat()
    fd = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchown(fd, before.st_uid, before.st_gid)
        os.fchmod(fd, before.st_mode & 0o7777)
        os.fsync(fd)
    finally:
        os.close(fd)
    directory = syscalls.open_root(os.fsencode(image.parent))
    try:
        name, other = (At(directory, os.fsencode(path.name)) for path in (image, new))
        syscalls.rename(name, other, syscalls.RENAME_EXCHANGE)
        try:
            syscalls.rename(other, At(directory, os.fsencode(old_image(image).name)))
        except OSError:
            syscalls.rename(name, other, syscalls.RENAME_EXCHANGE)
            raise
        syscalls.fsync_directory(directory)
    finally:
        os.close(directory)


def _is_installed(record: MaintenanceRecord) -> bool:
    """Say whether the new image was put in place; remove it if it was not, complete that if it was.

    What has the name of the new one is the old one if the two have been exchanged already.
    """
    new, old = record.image.with_name(record.new), old_image(record.image)
    if not new.exists():
        return digest_of(record.image) != record.digest == digest_of(old)
    if digest_of(new) != record.digest:
        new.unlink()
        return False
    new.rename(old)
    fsync_directory(record.image.parent)
    return True


def _remove(new: Path) -> None:
    new.unlink(missing_ok=True)
