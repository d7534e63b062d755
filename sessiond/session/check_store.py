"""The offline check of the store: records and directories, and the layers of each session.

It works without the daemon. Beside one that runs, it looks at what is at rest: records, images, and
layers that nobody writes to; nothing is repaired then. Each layer is checked over what is below it,
down to the image, which is mounted in a private place. What the store has and no record knows is
only looked for while no daemon runs, which makes and removes such things all the time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sessiond.config import NAME, NAME_LIMIT
from sessiond.errors import Busy, Failed, ImageUnavailable, NoSuchSession
from sessiond.overlay.check.checker import Target
from sessiond.session.check import (
    Found,
    Report,
    StoreKind,
    allow_descriptors,
    check_layer,
    failure,
)
from sessiond.session.faults import explained
from sessiond.session.images import Images
from sessiond.session.model import (
    LayerNumber,
    SessionId,
    SessionRecord,
    StorageKind,
    session_id,
)
from sessiond.session.mounts import Mounts, SystemMounts, mount_for_oneself
from sessiond.session.records import BadRecordError, NewerFormatError, read_job, read_session
from sessiond.session.store import BEING_DELETED, BEING_MADE, JOB, RECORD, Store
from sessiond.session.tree import remove_tree

_PRIVATE = 0o700
_PASSABLE = 0o711
"""Modes of directories: all users pass through some on the way to their mount points."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What of the store is to be checked."""

    state: Path
    runtime: Path | None
    """None where there are no volatile sessions: on another machine's disk."""
    session: str | None = None
    """Only this one."""
    repair: bool = False


def prepare_process() -> None:
    """Have what a check mounts gone with this process, whatever ends it. Raises `Failed`."""
    with explained("mount images in private"):
        mount_for_oneself()


async def check_store(scope: Scope, report: Report, *, mounts: Mounts | None = None) -> None:
    """Check records, leftovers, and the layers of all sessions, or of one.

    Raises `NoSuchSession`, `InvalidName`, `Failed`; `Busy` when something is in use that is to be
    repaired, or is the only thing to be checked.
    """
    allow_descriptors()
    if scope.runtime is None and not (scope.state / "sessions").is_dir():
        raise Failed(f"{scope.state} has no sessions: it is no state directory of sessiond.")
    wanted = None if scope.session is None else session_id(scope.session)
    with explained("check the sessions"), ExitStack() as undo:
        runs = scope.runtime is not None and _daemon_runs(scope.runtime, undo, hold=scope.repair)
        if runs and scope.repair:
            raise Busy(
                f"sessiond is running and uses {scope.runtime}, so nothing can be repaired; stop "
                "it first: systemctl stop sessiond."
            )
        check = _StoreCheck(scope, wanted, report, mounts or SystemMounts(), at_rest=not runs)
        await check.run()


def _daemon_runs(runtime: Path, undo: ExitStack, *, hold: bool) -> bool:
    """Say whether a daemon has its lock. With `hold`, none can start until `undo` is done."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    if hold:
        runtime.mkdir(mode=0o711, parents=True, exist_ok=True)
        flags |= os.O_CREAT
    try:
        lock = os.open(runtime / "lock", flags, 0o600)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return True
    if hold:
        undo.callback(os.close, lock)
    else:
        os.close(lock)
    return False


class _StoreCheck:
    """One run."""

    def __init__(
        self,
        scope: Scope,
        wanted: SessionId | None,
        report: Report,
        mounts: Mounts,
        *,
        at_rest: bool,
    ) -> None:
        self._bases = {StorageKind.PERSISTENT: scope.state}
        if scope.runtime is not None:
            self._bases[StorageKind.TMPFS] = scope.runtime
        self._store = Store(scope.runtime or scope.state, scope.state, mounts)
        self._wanted = wanted
        self._repair = scope.repair
        self._report = report
        self._mounts = mounts
        self._at_rest = at_rest

    async def run(self) -> None:
        persistent: set[str] = set()
        any_found = False
        for kind, base in self._bases.items():
            self._check_access(base, _mode(kind))
            self._check_access(base / "sessions", _mode(kind))
            for directory in self._session_directories(base):
                any_found = True
                record = self._look_at(directory, kind, persistent)
                if kind is StorageKind.PERSISTENT and (directory / RECORD).exists():
                    persistent.add(directory.name)
                if record is not None:
                    await self._check_session(record)
            if self._wanted is None:
                self._check_leftovers(base)
        if self._wanted is not None and not any_found:
            where = " or ".join(str(base / "sessions") for base in self._bases.values())
            raise NoSuchSession(f"There is no session {self._wanted} in {where}.")

    def _session_directories(self, base: Path) -> Iterator[Path]:
        for path in _entries(base / "sessions"):
            named = NAME.fullmatch(path.name) and len(path.name) <= NAME_LIMIT
            if self._wanted is not None and path.name != self._wanted:
                continue
            if named and path.is_dir() and not path.is_symlink():
                yield path
            else:
                self._found(StoreKind.FOREIGN, path)

    def _check_leftovers(self, base: Path) -> None:
        for path in _entries(base / "set-aside"):
            self._found(StoreKind.SET_ASIDE, path)
        if self._at_rest:
            for path in _entries(base / "trash"):
                self._found(StoreKind.TRASH, path, fix=partial(remove_tree, path))

    def _found(
        self,
        kind: StoreKind,
        path: Path,
        detail: str = "",
        *,
        session: str | None = None,
        layer: int | None = None,
        fix: Callable[[], None] | None = None,
    ) -> None:
        repaired = False
        if fix is not None and self._repair:
            try:
                fix()
            except OSError as error:
                detail = f"could not be repaired: {error.strerror}"
            else:
                repaired = True
        self._report.add(
            Found(
                kind=kind,
                path=os.fsencode(path),
                session=session,
                layer=layer,
                detail=detail,
                repaired=repaired,
            )
        )

    # Records

    def _look_at(
        self, directory: Path, kind: StorageKind, persistent: set[str]
    ) -> SessionRecord | None:
        """Return the record of a session whose layers can be checked, and tell of what it has
        besides.
        """
        name, file = directory.name, directory / RECORD
        volatile = kind is StorageKind.TMPFS
        marks = [
            directory / mark for mark in (BEING_MADE, BEING_DELETED) if (directory / mark).exists()
        ]
        self._check_job(directory / JOB)
        if not os.path.lexists(file):
            # Of a persistent session, the directory of its mount point.
            if self._at_rest and not (volatile and name in persistent):
                self._tell_unrecorded(directory, kind, marked=bool(marks))
            return None
        for mark in marks if self._at_rest else ():
            self._found(StoreKind.LEFTOVER, mark, session=name, fix=mark.unlink)
        if volatile and name in persistent:
            self._found(StoreKind.RECORD_TWICE, file, session=name)
            return None
        self._report.sessions += 1
        self._check_access(directory, _mode(kind), session=name)
        self._check_access(file, _PRIVATE, session=name)
        record = self._read(file, kind)
        if record is None:
            return None
        if volatile:
            storage = self._store.storage(record)
            if self._mounts.file_system(storage) is None:
                self._found(StoreKind.STORAGE_GONE, directory, session=name)
                return None
            self._check_access(storage, _PRIVATE, session=name)
        return record

    def _tell_unrecorded(self, directory: Path, kind: StorageKind, *, marked: bool) -> None:
        contents = directory / ("layers" if kind is StorageKind.PERSISTENT else "storage")
        if os.path.lexists(contents) and not marked:
            self._found(StoreKind.RECORD_MISSING, directory, session=directory.name)
        else:
            fix = partial(self._remove_session, directory)
            self._found(StoreKind.HALF_MADE, directory, session=directory.name, fix=fix)

    def _remove_session(self, directory: Path) -> None:
        self._mounts.detach(directory / "storage")
        remove_tree(directory)

    def _read(self, file: Path, kind: StorageKind) -> SessionRecord | None:
        session = file.parent.name
        tell = partial(self._found, session=session)
        try:
            record = read_session(file)
        except NewerFormatError:
            tell(StoreKind.RECORD_NEWER, file)
            return None
        except BadRecordError as error:
            tell(StoreKind.RECORD_UNREADABLE, file, str(error))
            return None
        except OSError as error:
            tell(StoreKind.RECORD_UNREADABLE, file, error.strerror or str(error))
            return None
        if record.id != session or record.storage is not kind:
            told = f"it is that of a {record.storage} session {record.id}"
            tell(StoreKind.RECORD_UNREADABLE, file, told)
            return None
        return record

    def _check_job(self, file: Path) -> None:
        try:
            read_job(file)
        except FileNotFoundError:
            pass
        except (BadRecordError, OSError) as error:
            session = file.parent.name
            self._found(
                StoreKind.JOB_UNREADABLE, file, str(error), session=session, fix=file.unlink
            )

    def _check_access(self, path: Path, most: int, *, session: str | None = None) -> None:
        """Find fault with `path` unless it is root's, and others have no rights beyond `most`."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        if stat.S_ISLNK(status.st_mode):
            return  # what is there, none of ours has made
        if status.st_uid == 0 and not stat.S_IMODE(status.st_mode) & 0o777 & ~most:
            return

        def fix() -> None:
            os.chown(path, 0, 0, follow_symlinks=False)
            path.chmod(stat.S_IMODE(status.st_mode) & most)

        told = f"it is uid {status.st_uid}'s, with mode {stat.S_IMODE(status.st_mode):04o}"
        self._found(StoreKind.EXPOSED, path, told, session=session, fix=fix)

    # Layers

    async def _check_session(self, record: SessionRecord) -> None:
        storage = self._store.storage(record)
        layers = storage / "layers"
        missing = False
        self._check_access(layers, _PRIVATE, session=record.id)
        for number in sorted(record.all_layers):
            layer = self._store.layer(record, number)
            if layer.is_dir():
                self._check_access(layer, _PRIVATE, session=record.id)
            else:
                missing = True
                tell = partial(self._found, session=record.id, layer=number)
                tell(StoreKind.LAYER_MISSING, layer)
        if self._at_rest and not any(map(_is_locked, _entries(layers))):
            self._check_unreferenced(record, layers)
            for path in _entries(self._store.orphans(record)):
                self._found(StoreKind.ORPHAN, path, session=record.id, fix=path.unlink)
            for path in self._store.leftovers(record):
                fix = partial(remove_tree, path)
                self._found(StoreKind.LEFTOVER, path, session=record.id, fix=fix)
        if missing:
            return
        async with self._image(record) as image:
            for number, below in _stacks(record):
                lowers = [self._store.layer(record, lower) / "fs" for lower in below]
                layer = self._store.layer(record, number)
                if not self._check_layer(record, layer, number, lowers, image):
                    return
            kept = self._store.kept.directory(record)
            if record.keep is not None and kept.is_dir():
                self._check_access(kept, _PRIVATE, session=record.id)
                self._check_layer(record, kept, None, [], image)

    def _check_unreferenced(self, record: SessionRecord, layers: Path) -> None:
        known = {str(number) for number in record.all_layers}
        for path in _entries(layers):
            if path.name in known:
                continue
            if path.name.isdecimal() and path.is_dir() and not path.is_symlink():
                fix = partial(remove_tree, path)
                self._found(StoreKind.LAYER_UNREFERENCED, path, session=record.id, fix=fix)
            else:
                self._found(StoreKind.FOREIGN, path, session=record.id)

    def _check_layer(
        self,
        record: SessionRecord,
        layer: Path,
        number: LayerNumber | None,
        below: list[Path],
        image: Path | None,
    ) -> bool:
        """Check one layer; return whether it makes sense to check others of the session.

        That of what outlives resets has no `number`.
        """
        lowers = [os.fsencode(lower) for lower in below]
        target = Target(
            upper=os.fsencode(layer / "fs"),
            work=os.fsencode(layer / "work"),
            lowers=lowers if image is None else [*lowers, os.fsencode(image)],
            complete=image is not None,
        )
        try:
            check_layer(target, self._report, repair=self._repair, session=record.id, layer=number)
        except OSError as error:
            tell = partial(self._found, session=record.id, layer=number)
            if error.errno == errno.EBUSY:
                if self._wanted is not None:
                    raise Busy(
                        f"Session {record.id} is in use, so it cannot be checked; stop sessiond "
                        "first: systemctl stop sessiond."
                    ) from error
                tell(StoreKind.SERVED, layer)
                return not self._repair
            if self._at_rest or layer.is_dir():
                tell(StoreKind.LAYER_UNREADABLE, layer, str(failure(error)))
        return True

    @asynccontextmanager
    async def _image(self, record: SessionRecord) -> AsyncIterator[Path | None]:
        """Yield where the image is mounted; None, and a finding, if it cannot be had."""
        runtime = self._bases.get(StorageKind.TMPFS)
        if runtime is not None and not record.rebasing:
            mounted = runtime / "images" / record.image
            if self._mounts.file_system(mounted) is not None:
                yield mounted
                return
        with _private_directory() as place:
            images = Images(place, self._mounts)
            await images.prepare()
            try:
                image = await images.acquire(record.source)
            except (ImageUnavailable, Failed) as error:
                self._no_image(record, str(error))
                yield None
                return
            try:
                if record.rebasing:
                    self._no_image(record, "the session is being rebased; start sessiond for that")
                    yield None
                elif image.digest == record.image or image.kind == "directory":
                    yield image.root
                else:
                    self._no_image(record, f"not the one that it was, {record.image}")
                    yield None
            finally:
                await images.release(image)

    def _no_image(self, record: SessionRecord, why: str) -> None:
        self._found(StoreKind.IMAGE_UNAVAILABLE, record.source.path, why, session=record.id)


@contextmanager
def _private_directory() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="sessiond-check-"))
    try:
        yield place
    finally:
        # Not as a tree: that would reach into an image that could not be unmounted.
        with suppress(OSError):
            (place / "images").rmdir()
            place.rmdir()


def _mode(kind: StorageKind) -> int:
    return _PRIVATE if kind is StorageKind.PERSISTENT else _PASSABLE


def _stacks(
    record: SessionRecord,
) -> Iterator[tuple[LayerNumber, tuple[LayerNumber, ...]]]:
    """Yield each layer once, the upper first, with what is below it, topmost first."""
    seen = set()
    stacks = [(record.upper, *record.layers), *(one.layers for one in record.snapshots)]
    for stack in stacks:
        for depth, number in enumerate(stack, 1):
            if number not in seen:
                seen.add(number)
                yield number, stack[depth:]


def _is_locked(layer: Path) -> bool:
    """Say whether a worker, which may have outlived its daemon, has `layer` for its upper.

    While layers are exchanged it may serve some that the record names no more.
    """
    try:
        fd = os.open(layer / "fs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _entries(directory: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(directory.iterdir())
    return []
