"""What is kept of sessions: their records, and the directories of their layers.

    RUNTIME/sessions/ID/session.json   record of a volatile session
    RUNTIME/sessions/ID/storage/       its tmpfs
    RUNTIME/sessions/ID/root/          the usual mount point, of persistent sessions as well
    STATE/sessions/ID/session.json     record of a persistent session; the directory is its storage
    RUNTIME/sessions/ID/job.json       its last job, for a manager that is started again
    STORAGE/layers/N/{fs,work}/        layer N
    STORAGE/spare/{fs,work}/           an empty layer, for a reset when the storage is full
    STORAGE/drafts/NAME/{fs,work}/     a layer that is being imported, and gets a number at last
    session.json.spare                 see `durable`
    STATE/kept/                        what outlives resets, and sessions: see `kept`
    {RUNTIME,STATE}/trash/             being deleted
    {RUNTIME,STATE}/set-aside/         sessions whose record is missing or makes no sense

A session exists from the moment its record is written, and no longer once that is renamed. In the
directory of one that is being made there is ``session.new`` until the record is; in one that
is being deleted ``session.old``, which was it. Such a directory is garbage, and so is a layer that
no record names: they are removed at start, and a crash between any two steps needs no repair. A
directory without any of the three has lost its record by accident: it is set aside.

So that a session can be reset, restored, thinned out and closed when its storage or the disk is
full, what that takes is there before: an empty layer, and the space of the next record. A reset
takes the spare layer, and the one that it throws away is emptied and is the next spare. Nothing is
allocated for it, so it does not matter who else writes at that moment.

Functions block; for one session they are called by one thread at a time, except for `remove_layer`.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sessiond.config import NAME, NAME_LIMIT
from sessiond.errors import Failed, NotSupported, SessiondError
from sessiond.session import durable, quota
from sessiond.session.durable import FULL
from sessiond.session.faults import explained
from sessiond.session.kept import KeptFiles
from sessiond.session.model import (
    JobRecord,
    LayerNumber,
    SessionId,
    SessionRecord,
    StorageKind,
    UpperDirectories,
)
from sessiond.session.mounts import Mounts
from sessiond.session.records import (
    BadRecordError,
    NewerFormatError,
    fsync_directory,
    read_job,
    read_session,
)
from sessiond.session.tree import Check, copy_root, empty_tree, remove_tree

log = logging.getLogger(__name__)

# Files in the directory of a session; see above.
RECORD = "session.json"
BEING_MADE = "session.new"
BEING_DELETED = "session.old"
JOB = "job.json"
_SPARE_RECORD = durable.spare_of(Path(RECORD)).name
_ORPHANS = "orphans"
_WORKDIR = ("work/work", "work/index")
"""What the overlay makes in a workdir, unless it is there already."""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is at start."""

    records: tuple[SessionRecord, ...]
    jobs: Mapping[SessionId, JobRecord]
    """The last job of each session that had one since the machine has started."""
    garbage: tuple[Path, ...]
    """Directories to be deleted; nobody looks at them any more."""


@dataclass
class _Search:
    """What is found while the store is loaded."""

    records: dict[SessionId, SessionRecord] = field(default_factory=dict)
    jobs: dict[SessionId, JobRecord] = field(default_factory=dict)
    garbage: list[Path] = field(default_factory=list)
    left: set[SessionId] = field(default_factory=set)
    """Sessions that cannot be served, and whose files stay where they are."""


class Store:
    """Records and storage of all sessions of this machine."""

    def __init__(self, runtime: Path, state: Path, mounts: Mounts) -> None:
        self._bases = {StorageKind.TMPFS: runtime, StorageKind.PERSISTENT: state}
        self._mounts = mounts
        self._spares = threading.Lock()
        self.kept = KeptFiles(state)
        """What outlives resets."""

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

    @property
    def disk(self) -> Path:
        """A directory on disk, with the state of sessions."""
        return self._bases[StorageKind.PERSISTENT]

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
        return self.storage(record) / _ORPHANS

    def former_orphans(self, record: SessionRecord) -> Path | None:
        """The same, of a session on disk that was volatile once: may be missing."""
        if record.storage is StorageKind.TMPFS:
            return None
        return self._volatile_storage(record.id) / _ORPHANS

    def reachable(self, record: SessionRecord) -> tuple[Path, ...]:
        """The directories in which all present and future layers of a session are; some may be
        missing.
        """
        # One that is to move has no place on disk yet; one that is moving may be found in RAM.
        disk = self._bases[StorageKind.PERSISTENT] / "sessions"
        if record.storage is StorageKind.PERSISTENT:
            disk = self.storage(record)
        kept = () if record.keep is None else (self.kept.directory(record),)
        return self._volatile_storage(record.id), disk, *kept

    # Changes

    def create(self, record: SessionRecord, *, size: str, inodes: int | None) -> None:
        """Make empty storage for a new session; `size` and `inodes` limit a tmpfs.

        The id must be unused. Raises `Failed`, `NoSpace` or, for its quota, `NotSupported`;
        `discard` removes what is there then. It is `NotSupported`, too, where the disk is in RAM.
        """
        with explained(f"make the storage of session {record.id}"):
            runtime = self.runtime_directory(record.id)
            runtime.mkdir()
            runtime.chmod(0o711)
            self._directory(record.id, record.storage).mkdir(mode=0o700, exist_ok=True)
            (self._directory(record.id, record.storage) / BEING_MADE).touch(mode=0o600)
            storage = self.storage(record)
            if record.storage is StorageKind.PERSISTENT:
                self._require_disk(storage.parent)
            storage.mkdir(mode=0o700, exist_ok=True)
            if record.storage is StorageKind.TMPFS:
                self._mounts.mount_tmpfs(storage, size=size, inodes=inodes)
            self._furnish(record)

    def used_by(self, session: SessionId) -> Path | None:
        """Return where there are files of a session of that id, None if there are none."""
        directories = (self._directory(session, kind) for kind in StorageKind)
        return next((directory for directory in directories if directory.exists()), None)

    def create_on_disk(self, record: SessionRecord) -> None:
        """Make empty storage for a persistent `record` whose volatile session exists already.

        Raises `Failed`, `NoSpace` or, for its quota or where the disk is in RAM, `NotSupported`.
        """
        directory = self.storage(record)
        if (directory / RECORD).exists():
            raise Failed(
                f"There is another persistent session {record.id} in {directory}; move it away."
            )
        with explained(f"make persistent storage for session {record.id}"):
            self._require_disk(directory.parent)
            if directory.exists():
                self._to_trash(directory, StorageKind.PERSISTENT)
            directory.mkdir(mode=0o700)
            try:
                (directory / BEING_MADE).touch(mode=0o600)
                self._furnish(record)
                with self._spares:
                    self._make_spare(record, directory)  # who takes it gives it a root's metadata
            except BaseException:
                remove_tree(directory)
                raise

    def _require_disk(self, directory: Path) -> None:
        if self._mounts.is_in_ram(directory):
            raise NotSupported(
                f"{directory} is in RAM, so a session there would not survive a reboot. Mount a "
                "disk there, or name a directory on one: state_directory in [daemon]."
            )

    def _furnish(self, record: SessionRecord) -> None:
        storage = self.storage(record)
        if record.storage is StorageKind.PERSISTENT and record.quota is not None:
            quota.assign(storage, record.quota)
        (storage / "layers").mkdir(mode=0o700)
        self.orphans(record).mkdir(mode=0o700)
        fsync_directory(storage)
        fsync_directory(storage.parent)

    def enforce_quota(self, record: SessionRecord) -> None:
        """Make sure that the quota of a session on disk holds.

        Raises `NotSupported` or `Failed`: it must not be served then.
        """
        assert record.quota is not None
        with explained(f"set the quota of session {record.id}"):
            quota.ensure(self.storage(record), record.quota)

    def make_upper(self, record: SessionRecord, like: Path, may_take_spare: bool) -> None:
        """Make the empty upper of `record`, with a root like `like`, the tree just below it.

        The merged view shows for its root what the upper's root has. `may_take_spare`, where the
        storage is full: for who gives back another layer. Raises `Failed`, `NoSpace`.
        """
        layer, spare = self.layer(record, record.upper), self._spare(record)
        with explained(f"make a layer for session {record.id}"), self._spares:
            try:
                _make_layer(layer, like)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                remove_tree(layer)
                if not may_take_spare or not spare.exists():
                    raise
                copy_root(like, spare / "fs")
                spare.rename(layer)
            else:
                self._make_spare(record, like)
        with explained(f"make a layer for session {record.id}"):
            for directory in (layer / "fs", layer, layer.parent):
                fsync_directory(directory)

    def _make_spare(self, record: SessionRecord, like: Path) -> None:
        spare, unfinished = self._spare(record), self.unfinished_spare(record)
        if spare.exists() or unfinished.exists():
            return
        try:
            _make_layer(unfinished, like)
            unfinished.rename(spare)
        except OSError as error:
            if error.errno not in FULL:
                raise
            log.warning("The storage of session %s is too full for a spare layer.", record.id)
            remove_tree(unfinished)

    def remove_layer(self, record: SessionRecord, layer: Path, check: Check) -> None:
        """Delete a layer that nobody needs; if the spare one was taken, it becomes that.

        `check` may stop it, by raising; so may `OSError`. What is left is garbage.
        """
        spare, unfinished = self._spare(record), self.unfinished_spare(record)
        with self._spares:
            complete = all((layer / name).is_dir() for name in _WORKDIR)  # a copy may be without
            if complete and not spare.exists() and not unfinished.exists():
                layer.rename(unfinished)
                layer = unfinished
        if layer != unfinished:
            remove_tree(layer, check)
            return
        for name in ("fs", *_WORKDIR):
            empty_tree(layer / name, check)
        layer.rename(spare)

    def leftovers(self, record: SessionRecord) -> Iterator[Path]:
        """Return what a manager that died has left of layers that were no layers yet, or any more.

        Precondition: none runs.
        """
        if self.unfinished_spare(record).exists():
            yield self.unfinished_spare(record)
        if self._drafts(record).exists():
            yield from sorted(self._drafts(record).iterdir())

    def make_draft(self, record: SessionRecord, like: Path) -> Path:
        """Make a layer that `record` does not know, with a root like `like`; return its directory.

        It is garbage, unless `adopt_draft` makes it a layer. Raises `Failed`, `NoSpace`.
        """
        draft = self._drafts(record) / secrets.token_hex(8)
        with explained(f"make a layer for session {record.id}"):
            draft.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                _make_layer(draft, like)
            except OSError:
                remove_tree(draft)
                raise
        return draft

    def adopt_draft(self, record: SessionRecord, draft: Path, number: LayerNumber) -> None:
        """Make a draft, which is on disk, the layer `number`. Raises `Failed`, `NoSpace`."""
        layer = self.layer(record, number)
        with explained(f"make a layer of session {record.id}"):
            for name in _WORKDIR:
                fsync_directory(draft / name)
            for directory in (draft / "work", draft / "fs", draft):
                fsync_directory(directory)
            draft.rename(layer)
            fsync_directory(layer.parent)

    def write(self, record: SessionRecord) -> None:
        """Make `record` the one that counts; it is on disk when this returns.

        Raises `Failed` or `NoSpace`; the record before still counts then.
        """
        text = record.model_dump_json(indent=1).encode()
        with explained(f"write the record of session {record.id}"):
            file = self._record_file(record)
            durable.replace(file, text)
        with suppress(OSError):  # or the next manager does
            file.with_name(BEING_MADE).unlink()

    def forget(self, record: SessionRecord) -> None:
        """Give up the record, and so the session; its files become garbage. Raises `Failed`."""
        file = self._record_file(record)
        if not file.exists():
            return
        with explained(f"remove the record of session {record.id}"):
            file.rename(file.with_name(BEING_DELETED))
            fsync_directory(file.parent)

    def write_job(self, session: SessionId, job: JobRecord) -> None:
        """Note the last job of a session, until the machine ends. Raises `Failed`, `NoSpace`."""
        file = self.runtime_directory(session) / JOB
        with explained(f"note the job of session {session}"):
            durable.replace(file, job.model_dump_json(indent=1).encode())

    def discard(self, session: SessionId, kind: StorageKind) -> tuple[Path, ...]:
        """Take the files of a forgotten session out of the way; what is returned is to be deleted.

        Its merged view must be unmounted, except for a session that moved to disk: for that, only
        its volatile storage goes. Raises `Failed`.
        """
        directory = self._directory(session, kind)
        with explained(f"remove the files of session {session}"):
            if kind is StorageKind.TMPFS:
                self._mounts.detach(directory / "storage")
            if not directory.exists():
                return ()
            if kind is StorageKind.PERSISTENT:
                try:
                    quota.release(directory)
                except OSError as error:  # quotas were switched off, for one
                    log.warning("The quota of session %s is not given back: %s", session, error)
            return (self._to_trash(directory, kind),)

    def has_volatile_storage(self, session: SessionId) -> bool:
        """Say whether a session that moved to disk still has some; see `empty_volatile_storage`."""
        return self._volatile_storage(session).exists()

    def empty_volatile_storage(self, session: SessionId) -> None:
        """Give back the RAM of a session that moved to disk, but for the files among its orphans.

        Some of these may still be written to. Raises `Failed`.
        """
        storage = self._volatile_storage(session)
        with explained(f"remove the volatile layers of session {session}"):
            for path in storage.iterdir():
                if path.name != _ORPHANS:
                    remove_tree(path)

    def drop_volatile_storage(self, session: SessionId) -> None:
        """Give back the RAM of a session that moved to disk, all of it. Raises `Failed`."""
        storage = self._volatile_storage(session)
        with explained(f"remove the volatile storage of session {session}"):
            self._mounts.detach(storage)
            remove_tree(storage)
            for name in (BEING_DELETED, _SPARE_RECORD):
                storage.with_name(name).unlink(missing_ok=True)

    # At start

    def load(self) -> Found:
        """Return what can be served, and take everything else out of the way.

        A record that makes no sense, or is missing, is set aside with all its session's files; one
        of a newer format, or that cannot be read, is left where it is, and so is whatever is none
        of ours. All that is reported in the log, and keeps no other session from being served. No
        merged view may be mounted below the runtime directory. Raises `Failed`.
        """
        found = _Search()
        for kind in (StorageKind.PERSISTENT, StorageKind.TMPFS):
            base = self._bases[kind]
            with explained(f"look for sessions in {base}"):
                for directory in self._session_directories(base / "sessions"):
                    self._load(directory, kind, found)
                found.garbage += [
                    path for path in (base / "trash").iterdir() if _is_directory(path)
                ]
        return Found(tuple(found.records.values()), found.jobs, tuple(found.garbage))

    def _session_directories(self, base: Path) -> Iterator[Path]:
        for path in sorted(base.iterdir()):
            if _is_directory(path) and NAME.fullmatch(path.name) and len(path.name) <= NAME_LIMIT:
                yield path
            else:
                log.warning("%s is no directory of a session, and is left alone.", path)

    def _load(self, directory: Path, kind: StorageKind, found: _Search) -> None:
        session = SessionId(directory.name)
        try:
            if session in found.left:
                return  # of a persistent session: what belongs to it stays as well
            if session in found.records:
                self._drop_moved(directory, found)
            elif os.path.lexists(directory / RECORD):
                self._load_recorded(directory, kind, found)
            else:
                self._load_unrecorded(directory, kind, found)
            if kind is StorageKind.TMPFS and session in found.records:
                self._load_job(directory, found)
        except (NewerFormatError, OSError, SessiondError) as error:
            found.left.add(session)
            found.records.pop(session, None)
            log.error("Session %s is left as it is: %s", session, error)  # noqa: TRY400

    def _load_recorded(self, directory: Path, kind: StorageKind, found: _Search) -> None:
        session = SessionId(directory.name)
        try:
            record = read_session(directory / RECORD)
            _require_place(record, session, kind)
            if kind is StorageKind.TMPFS and self._mounts.file_system(self.storage(record)) is None:
                log.warning("Session %s was volatile, and ended with the last boot.", session)
                self.forget(record)
                found.garbage += self.discard(session, kind)
                return
            self._require_layers(record)
        except BadRecordError as error:
            self._set_aside(directory, kind, f"its record makes no sense: {error}")
            return
        for left_over in (BEING_MADE, BEING_DELETED):
            (directory / left_over).unlink(missing_ok=True)
        garbage = tuple(self._unknown_layers(record))
        # They are deleted later, by these names, which no other layer may get meanwhile.
        unknown = [int(path.name) for path in garbage if path.parent.name == "layers"]
        next_layer = LayerNumber(max([record.next_layer - 1, *unknown]) + 1)
        record = record.model_copy(update={"next_layer": next_layer})
        self.runtime_directory(session).mkdir(exist_ok=True)
        self.runtime_directory(session).chmod(0o711)
        found.records[session] = record.with_restore_undone()
        found.garbage += garbage

    def _load_unrecorded(self, directory: Path, kind: StorageKind, found: _Search) -> None:
        marks = (BEING_MADE, BEING_DELETED)
        contents = directory / ("layers" if kind is StorageKind.PERSISTENT else "storage")
        if os.path.lexists(contents) and not any((directory / mark).exists() for mark in marks):
            self._set_aside(directory, kind, f"its record, {RECORD}, is missing")
            return
        log.info("What was left of session %s in %s is removed.", directory.name, directory)
        found.garbage += self.discard(SessionId(directory.name), kind)

    def _drop_moved(self, directory: Path, found: _Search) -> None:
        """Drop what a session that is persistent has left where it was volatile, if anything.

        Both records are there if a crash came just as it had moved.
        """
        storage = directory / "storage"
        if self._mounts.file_system(storage) is not None:
            # Its worker may serve it still, or have files open there; see `settling`.
            log.info("Session %s had moved to disk, and has something in RAM.", directory.name)
        elif os.path.lexists(storage):
            found.garbage.append(self._to_trash(storage, StorageKind.TMPFS))
        for name in (RECORD, _SPARE_RECORD, BEING_MADE, BEING_DELETED):
            (directory / name).unlink(missing_ok=True)

    def _load_job(self, directory: Path, found: _Search) -> None:
        try:
            found.jobs[SessionId(directory.name)] = read_job(directory / JOB)
        except FileNotFoundError:
            pass
        except (BadRecordError, OSError) as error:
            log.warning("The last job of session %s is not known: %s.", directory.name, error)

    def _require_layers(self, record: SessionRecord) -> None:
        for number in sorted(record.all_layers):
            if not (self.layer(record, number) / "fs").is_dir():
                raise BadRecordError(f"it names layer {number}, which is not there")

    def _set_aside(self, directory: Path, kind: StorageKind, reason: str) -> None:
        aside = self._bases[kind] / "set-aside"
        aside.mkdir(mode=0o700, exist_ok=True)
        target = aside / f"{directory.name}-{secrets.token_hex(4)}"
        directory.rename(target)
        log.error(
            "Session %s cannot be served, for %s. All its files are kept in %s. To have it back, "
            "put a correct %s there, move that directory back to %s, and restart sessiond; to be "
            "rid of it, delete that directory.",
            directory.name,
            reason,
            target,
            RECORD,
            directory,
        )

    def _unknown_layers(self, record: SessionRecord) -> Iterator[Path]:
        known = {str(number) for number in record.all_layers}
        for path in sorted((self.storage(record) / "layers").iterdir()):
            if path.name in known:
                continue
            if _is_directory(path) and path.name.isdecimal():
                log.info("Layer %s, which session %s does not have, is removed.", path, record.id)
                yield path
            else:
                log.warning("%s is no layer of session %s, and is left alone.", path, record.id)
        yield from self.leftovers(record)

    # Names

    def _directory(self, session: SessionId, kind: StorageKind) -> Path:
        return self._bases[kind] / "sessions" / session

    def _volatile_storage(self, session: SessionId) -> Path:
        return self._directory(session, StorageKind.TMPFS) / "storage"

    def _record_file(self, record: SessionRecord) -> Path:
        return self._directory(record.id, record.storage) / RECORD

    def _spare(self, record: SessionRecord) -> Path:
        return self.storage(record) / "spare"

    def _drafts(self, record: SessionRecord) -> Path:
        return self.storage(record) / "drafts"

    def unfinished_spare(self, record: SessionRecord) -> Path:
        """A layer that was to be emptied and to become the spare one."""
        return self.storage(record) / "spare.new"

    def _to_trash(self, directory: Path, kind: StorageKind) -> Path:
        target = self._bases[kind] / "trash" / f"{directory.name}-{secrets.token_hex(4)}"
        try:
            directory.rename(target)
        except OSError as error:
            # No space for another name, or a quota of the administrator's on the trash: it has no
            # record, so it is garbage where it is, too.
            if error.errno not in {*FULL, errno.EXDEV}:
                raise
            return directory
        return target


def _require_place(record: SessionRecord, session: SessionId, kind: StorageKind) -> None:
    if (record.id, record.storage) != (session, kind):
        raise BadRecordError(f"it is that of a {record.storage} session {record.id}")


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _make_layer(layer: Path, like: Path) -> None:
    for name in ("", "fs", "work", *_WORKDIR):
        (layer / name).mkdir(mode=0o700, exist_ok=True)
    copy_root(like, layer / "fs")
