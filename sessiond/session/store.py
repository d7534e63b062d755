"""What is kept of sessions: their records, and the directories of their layers.

    RUNTIME/sessions/ID/session.json   record of a volatile session
    RUNTIME/sessions/ID/storage/       its tmpfs
    RUNTIME/sessions/ID/root/          the usual mount point, of persistent sessions as well
    STATE/sessions/ID/session.json     record of a persistent session; the directory is its storage
    STORAGE/layers/N/{fs,work}/        layer N
    STORAGE/reserve/                   given up when the storage is full, so that reset still works
    {RUNTIME,STATE}/trash/             being deleted
    {RUNTIME,STATE}/set-aside/         sessions with a record that cannot be read

A session exists from the moment its record is written, and no longer once that is removed. What no
record knows is garbage, and is removed at start: so a crash between any two steps needs no repair.

Functions block; for one session they are called by one thread at a time, except for `fill_reserve`.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sessiond.errors import Failed
from sessiond.session.faults import explained
from sessiond.session.model import (
    RECORD_FORMAT,
    LayerNumber,
    SessionId,
    SessionRecord,
    StorageKind,
    UpperDirectories,
)
from sessiond.session.mounts import Mounts
from sessiond.session.tree import copy_root, remove_tree

log = logging.getLogger(__name__)

_RECORD = "session.json"
_RESERVE_INODES = 16
_RESERVE_BYTES = 256 << 10
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Format(BaseModel):
    """What a record of any format has."""

    format: int


@dataclass(frozen=True, slots=True)
class Found:
    """What there is at start."""

    records: tuple[SessionRecord, ...]
    garbage: tuple[Path, ...]
    """Directories to be deleted; nobody looks at them any more."""


class Store:
    """Records and storage of all sessions of this machine."""

    def __init__(self, runtime: Path, state: Path, mounts: Mounts) -> None:
        self._bases = {StorageKind.TMPFS: runtime, StorageKind.PERSISTENT: state}
        self._mounts = mounts
        self._reserves = threading.Lock()

    def prepare(self) -> None:
        """Make the directories that hold all others. Raises `Failed`, `NoSpace`.

        On the way to mount points all users may pass, but not look; all else is root's alone.
        """
        with explained("prepare the directories of sessiond"):
            for kind, mode in ((StorageKind.TMPFS, 0o711), (StorageKind.PERSISTENT, 0o700)):
                base = self._bases[kind]
                base.mkdir(parents=True, exist_ok=True)
                for directory, its_mode in ((base, mode), (base / "sessions", mode)):
                    directory.mkdir(exist_ok=True)
                    directory.chmod(its_mode)
                (base / "trash").mkdir(mode=0o700, exist_ok=True)

    # Where things are

    def runtime_directory(self, session: SessionId) -> Path:
        """The directory of a session that a reboot clears."""
        return self._directory(session, StorageKind.TMPFS)

    def storage(self, record: SessionRecord) -> Path:
        """The directory, on the file system, that holds the layers."""
        directory = self._directory(record.id, record.storage)
        return directory if record.storage is StorageKind.PERSISTENT else directory / "storage"

    def layer(self, record: SessionRecord, number: LayerNumber) -> Path:
        """The directory of one layer: its tree, ``fs``, and what was its workdir."""
        return self.storage(record) / "layers" / str(number)

    def upper(self, record: SessionRecord) -> UpperDirectories:
        """The writable layer."""
        layer = self.layer(record, record.upper)
        return UpperDirectories(fs=layer / "fs", work=layer / "work")

    def lowers(self, record: SessionRecord) -> tuple[Path, ...]:
        """The committed layers of the merged view, topmost first."""
        return tuple(self.layer(record, number) / "fs" for number in record.layers)

    def indexes(self, record: SessionRecord) -> tuple[Path, ...]:
        """The indexes of hard links of the committed layers, topmost first."""
        return tuple(self.layer(record, number) / "work/index" for number in record.layers)

    def orphans(self, record: SessionRecord) -> Path:
        """Where removed files are kept while they are open."""
        return self.storage(record) / "orphans"

    # Changes

    def create(self, record: SessionRecord, *, size: str, inodes: int | None) -> None:
        """Make empty storage for a new session; `size` and `inodes` limit a tmpfs.

        The id must be unused. Raises `Failed` or `NoSpace`; `discard` removes what is there then.
        """
        with explained(f"make the storage of session {record.id}"):
            runtime = self.runtime_directory(record.id)
            runtime.mkdir()
            runtime.chmod(0o711)
            storage = self.storage(record)
            storage.mkdir(mode=0o700)
            if record.storage is StorageKind.TMPFS:
                self._mounts.mount_tmpfs(storage, size=size, inodes=inodes)
            (storage / "layers").mkdir(mode=0o700)
            _fsync_directory(storage.parent)
        self.fill_reserve(record)

    def used_by(self, session: SessionId) -> Path | None:
        """Return where there are files of a session of that id, None if there are none."""
        directories = (self._directory(session, kind) for kind in StorageKind)
        return next((directory for directory in directories if directory.exists()), None)

    def create_on_disk(self, record: SessionRecord) -> None:
        """Make empty storage for a persistent `record` whose volatile session exists already.

        Raises `Failed` or `NoSpace`.
        """
        directory = self.storage(record)
        if (directory / _RECORD).exists():
            raise Failed(
                f"There is another persistent session {record.id} in {directory}; move it away."
            )
        with explained(f"make persistent storage for session {record.id}"):
            if directory.exists():
                self._to_trash(directory, StorageKind.PERSISTENT)
            directory.mkdir(mode=0o700)
            (directory / "layers").mkdir(mode=0o700)
            _fsync_directory(directory.parent)
        self.fill_reserve(record)

    def make_upper(self, record: SessionRecord, like: Path) -> None:
        """Make the empty upper of `record`, with a root like `like`, the tree just below it.

        The merged view shows for its root what the upper's root has. Raises `Failed`, `NoSpace`.
        """
        upper = self.upper(record)

        def make() -> None:
            for directory in (upper.fs.parent, upper.fs, upper.work):
                directory.mkdir(mode=0o700, exist_ok=True)
            copy_root(like, upper.fs)

        with explained(f"make a layer for session {record.id}"):
            self._with_reserve(record, make)
            for directory in (upper.fs, upper.fs.parent, upper.fs.parent.parent):
                _fsync_directory(directory)

    def write(self, record: SessionRecord) -> None:
        """Make `record` the one that counts; it is on disk when this returns.

        Raises `Failed` or `NoSpace`; the record before still counts then.
        """
        text = record.model_dump_json(indent=1).encode()
        with explained(f"write the record of session {record.id}"):
            self._with_reserve(record, lambda: _write_durably(self._record_file(record), text))

    def forget(self, record: SessionRecord) -> None:
        """Remove the record, and so the session; its files become garbage. Raises `Failed`."""
        file = self._record_file(record)
        if not file.exists():
            return
        with explained(f"remove the record of session {record.id}"):
            file.unlink()
            _fsync_directory(file.parent)

    def discard(self, session: SessionId, kind: StorageKind) -> tuple[Path, ...]:
        """Take the files of a forgotten session out of the way; what is returned is to be deleted.

        Its merged view must be unmounted, except for a session that moved to disk: for that, only
        its volatile storage goes. Raises `Failed`.
        """
        directory = self._directory(session, kind)
        with explained(f"remove the files of session {session}"):
            if kind is StorageKind.TMPFS:
                self._mounts.detach(directory / "storage")
            try:
                return (self._to_trash(directory, kind),)
            except FileNotFoundError:
                return ()

    def drop_volatile_storage(self, session: SessionId) -> None:
        """Give back the RAM of a session that moved to disk. Raises `Failed`."""
        storage = self.runtime_directory(session) / "storage"
        with explained(f"remove the volatile storage of session {session}"):
            self._mounts.detach(storage)
            remove_tree(storage)

    # The reserve

    def fill_reserve(self, record: SessionRecord) -> None:
        """Set inodes and bytes aside, as far as there are any. Raises `Failed`."""
        reserve = self.storage(record) / "reserve"
        with explained(f"make the reserve of session {record.id}"), self._reserves:
            try:
                reserve.mkdir(mode=0o700, exist_ok=True)
                for number in range(_RESERVE_INODES):
                    (reserve / str(number)).touch(mode=0o600)
                with open(reserve / "0", "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                log.warning("The storage of session %s is too full for a reserve.", record.id)

    def _with_reserve(self, record: SessionRecord, action: Callable[[], None]) -> None:
        """Do `action`; where there is no space for it, again without the reserve."""
        try:
            action()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            with self._reserves:
                remove_tree(self.storage(record) / "reserve")
                action()

    # At start

    def load(self) -> Found:
        """Return the records that can be served, and take everything else out of the way.

        A record that makes no sense is set aside with all its session's files; one of a newer
        format, or that cannot be read, is left where it is. Both are reported in the log. No
        merged view may be mounted below the runtime directory. Raises `Failed`.
        """
        garbage: list[Path] = []
        found: dict[SessionId, SessionRecord] = {}
        with explained("read the records of sessions"):
            for kind in (StorageKind.PERSISTENT, StorageKind.TMPFS):
                for directory in _subdirectories(self._bases[kind] / "sessions"):
                    record = self._load(directory, kind, found, garbage)
                    if record is not None:
                        found[record.id] = record
                        garbage += self._unknown_layers(record)
            for record in found.values():
                self.runtime_directory(record.id).mkdir(exist_ok=True)
                self.runtime_directory(record.id).chmod(0o711)
            for base in self._bases.values():
                garbage += _subdirectories(base / "trash")
        return Found(tuple(found.values()), tuple(dict.fromkeys(garbage)))

    def _load(
        self,
        directory: Path,
        kind: StorageKind,
        found: dict[SessionId, SessionRecord],
        garbage: list[Path],
    ) -> SessionRecord | None:
        session = SessionId(directory.name)
        if session in found or not (directory / _RECORD).exists():
            # Both records are there if a crash came just as the session had moved to disk.
            (directory / _RECORD).unlink(missing_ok=True)
            garbage += self.discard(session, kind)
            return None
        try:
            record = self._parse(directory, kind)
        except (_NewerFormatError, OSError) as error:
            log.error("Session %s is left as it is: %s", session, error)  # noqa: TRY400
            return None
        except ValueError as error:
            kept = self._set_aside(directory, kind)
            log.error(  # noqa: TRY400
                "The record of session %s cannot be used: %s. All its files are kept in %s.",
                session,
                error,
                kept,
            )
            return None
        storage = self.storage(record)
        if kind is StorageKind.TMPFS and self._mounts.file_system(storage) is None:
            log.warning("Session %s was volatile, and ended with the last boot.", session)
            self.forget(record)
            garbage += self.discard(session, kind)
            return None
        return record

    def _parse(self, directory: Path, kind: StorageKind) -> SessionRecord:
        text = (directory / _RECORD).read_bytes()
        try:
            version = _Format.model_validate_json(text).format
            if version > RECORD_FORMAT:
                raise _NewerFormatError(
                    f"{directory / _RECORD} has format {version}, and this sessiond knows formats "
                    f"up to {RECORD_FORMAT}; use the sessiond that wrote it."
                )
            record = SessionRecord.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where + ': ' if where else ''}{first['msg']}") from None
        if record.id != directory.name or record.storage is not kind:
            raise ValueError(f"it is that of a {record.storage} session {record.id}")
        if kind is StorageKind.PERSISTENT or self._mounts.file_system(self.storage(record)):
            for number in record.all_layers:
                if not (self.layer(record, number) / "fs").is_dir():
                    raise ValueError(f"it names layer {number}, which is not there")
        return record

    def _set_aside(self, directory: Path, kind: StorageKind) -> Path:
        aside = self._bases[kind] / "set-aside"
        aside.mkdir(mode=0o700, exist_ok=True)
        target = aside / f"{directory.name}-{secrets.token_hex(4)}"
        directory.rename(target)
        return target

    def _unknown_layers(self, record: SessionRecord) -> Iterator[Path]:
        known = {str(number) for number in record.all_layers}
        for directory in _subdirectories(self.storage(record) / "layers"):
            if directory.name not in known:
                yield directory

    # Names

    def _directory(self, session: SessionId, kind: StorageKind) -> Path:
        return self._bases[kind] / "sessions" / session

    def _record_file(self, record: SessionRecord) -> Path:
        return self._directory(record.id, record.storage) / _RECORD

    def _to_trash(self, directory: Path, kind: StorageKind) -> Path:
        target = self._bases[kind] / "trash" / f"{directory.name}-{secrets.token_hex(4)}"
        directory.rename(target)
        return target


class _NewerFormatError(Exception):
    """The record was written by a later version."""


def _subdirectories(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())


def _write_durably(file: Path, text: bytes) -> None:
    temporary = file.with_suffix(".new")
    try:
        with open(temporary, "wb", opener=_private) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _fsync_directory(file.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _fsync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
