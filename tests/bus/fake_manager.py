"""A manager whose sessions are nothing but values: what the service calls, and how it is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import trio

from sessiond.errors import (
    Busy,
    Cancelled,
    Failed,
    InvalidName,
    NoSuchProfile,
    NoSuchSession,
    NoSuchSnapshot,
    SessiondError,
    SessionExists,
    SnapshotExists,
)
from sessiond.session import model
from sessiond.session.accounts import Account
from sessiond.session.conflicts import Program
from sessiond.session.inhibitors import Inhibitors
from sessiond.session.kept import CommittedPath
from sessiond.session.logins import Login
from sessiond.session.maintenance import MaintenanceRecord
from sessiond.session.model import (
    AT_ONCE,
    NO_BREAKDOWN,
    ArchiveKind,
    Breakdown,
    ChangeSummary,
    Conflicts,
    DirectoryChanges,
    ImageSource,
    LargeFile,
    LayerNumber,
    Manner,
    Operation,
    PendingFile,
    SessionId,
    SessionState,
    SnapshotName,
    SnapshotRecord,
    StorageKind,
    Uid,
    Usage,
    snapshot_name,
)
from sessiond.session.schedule import Why
from sessiond.session.space import SpaceLevel
from sessiond.session.upkeep import SnapshotSize

EPOCH = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


class FakeJob:
    """A job that the test moves on."""

    def __init__(
        self,
        manager: FakeManager,
        number: int,
        session: FakeSession,
        operation: Operation,
        uid: Uid,
    ) -> None:
        self.id = number
        self.session = session.id
        self.operation = operation
        self.started_by = uid
        self.progress = 0.0
        self.progress_valid = False
        self.bytes = 0
        self.conflicts: tuple[Program, ...] = ()
        self.manner = AT_ONCE
        self.error: SessiondError | None = None
        self.finished = False
        self._manager = manager

    def move(self, progress: float) -> None:
        self.progress, self.progress_valid, self.bytes = progress, True, 4096
        self._manager.tell("job_changed", self)

    def finish(self, error: SessiondError | None = None) -> None:
        if self.finished:
            return
        self.finished, self.error = True, error
        self._manager.tell("job_completed", self)

    def cancel(self) -> None:
        self.finish(Cancelled(f"The {self.operation} was cancelled."))


class FakeTimer:
    """Remembers what was asked for."""

    def __init__(self) -> None:
        self.next_reset: datetime | None = None
        self.reason: Why | None = None
        self.inhibitors = Inhibitors(lambda: None)
        self.asked: list[tuple[Uid, dict[str, object]]] = []

    async def schedule(self, by: Uid, **when: object) -> None:
        self.asked.append((by, when))

    async def cancel(self, by: Uid) -> None:
        self.asked.append((by, {}))


class FakeSnapshots(dict[SnapshotName, SnapshotRecord]):
    """Those of a session, by name."""

    def __init__(self, session: FakeSession) -> None:
        super().__init__()
        self._session = session

    def size(self, name: str) -> SnapshotSize:
        return self._session.size

    def require(self, *names: str) -> None:
        for name in filter(None, names):
            self.record(name)

    async def make(
        self, name: str, *, description: str = "", pinned: bool = False
    ) -> SnapshotRecord:
        await self._session.snapshot_gate.wait()
        checked = snapshot_name(name)
        if checked in self:
            raise SnapshotExists(f"Session {self._session.id} already has a snapshot {name}.")
        number = len(self) + 1
        record = SnapshotRecord(
            name=checked,
            description=description,
            created_at=EPOCH.replace(hour=7 + number),
            layers=tuple(LayerNumber(n) for n in range(number, 0, -1)),
            pinned=pinned,
        )
        self[checked] = record
        self._session.manager.tell("snapshot_added", self._session, record)
        return record

    async def delete(self, name: str) -> None:
        record = self.record(name)
        del self[record.name]
        self._session.manager.tell("snapshot_removed", self._session, record)

    async def rename(self, name: str, new_name: str) -> None:
        checked = snapshot_name(new_name)
        record = self.record(name)
        del self[record.name]
        self[checked] = record.model_copy(update={"name": checked})
        self._session.manager.tell("session_changed", self._session)

    async def describe(self, name: str, description: str) -> None:
        self._edit(name, description=description)

    async def pin(self, name: str, pinned: bool) -> None:
        self._edit(name, pinned=pinned)

    def export(self, name: str, target: int, kind: ArchiveKind, *, started_by: Uid) -> FakeJob:
        self.record(name)
        os.write(target, b"the archive" if kind is ArchiveKind.OCI else b"hsqs")
        return self._session.start(Operation.EXPORT, started_by)

    def add(self, name: str, source: int, *, description: str = "", started_by: Uid) -> FakeJob:
        self._session.imported[name] = os.read(source, 4096)
        return self._session.start(Operation.IMPORT, started_by)

    def _edit(self, name: str, **changed: object) -> None:
        record = self.record(name)
        self[record.name] = record.model_copy(update=changed)
        self._session.manager.tell("session_changed", self._session)

    def record(self, name: str) -> SnapshotRecord:
        if name not in self:
            raise NoSuchSnapshot(f"Session {self._session.id} has no snapshot {name!r}.")
        return self[SnapshotName(name)]


class FakeDifferences:
    """Those of a session."""

    def __init__(self, session: FakeSession) -> None:
        self._session = session

    async def count(
        self, start: str = "", end: str = "", breakdown: Breakdown = NO_BREAKDOWN
    ) -> ChangeSummary:
        session = self._session
        await session.changes_gate.wait()
        session.snapshots.require(start, end)
        session.compared = (start, end)
        session.breakdown = breakdown
        told = session.summary.directories[: breakdown.directories]
        return replace(session.summary, directories=told)

    async def write(
        self, target: int, start: str = "", end: str = "", *, reader: Uid | None = None
    ) -> None:
        session = self._session
        session.compared = (start, end)
        session.diff_reader = reader
        result = session.diff_body(target)
        if hasattr(result, "__await__"):
            await result
        with suppress(BrokenPipeError):
            os.write(target, session.diff_end)

    async def shadowed(self, source: ImageSource, target: int) -> None:
        line = {
            "path": "/etc/motd",
            "type": "file",
            "outcome": "saved",
            "now": True,
            "snapshots": ["monday"],
            "saved_as": "/etc/motd.sessiond-old",
        }
        os.write(target, json.dumps(line).encode() + b"\n" + self._session.diff_end)


class FakeSession:
    """A session of the user with uid 65534, unless told otherwise."""

    def __init__(self, manager: FakeManager, name: str, user: str, uid: int) -> None:
        self.id = SessionId(name)
        self.user = user
        self.uid = Uid(uid)
        self.profile = "live"
        self.of_login = False
        self.image = "/images/root.squashfs"
        self.mount_point = Path(f"/run/sessiond/sessions/{name}/root")
        self.storage = StorageKind.TMPFS
        self.state = SessionState.ACTIVE
        self.failure = ""
        self.created_at = EPOCH
        self.last_reset: datetime | None = None
        self.snapshots = FakeSnapshots(self)
        self.differences = FakeDifferences(self)
        self.keep: tuple[str, ...] = ("/home/*/Documents",)
        self.commits: list[str] = []
        self.deleted: list[str] = []
        self.last_job: FakeJob | None = None
        self.usage = Usage(4096, 1 << 40, 3, 1000)
        self.space_level = SpaceLevel.NORMAL
        self.summary = ChangeSummary(
            added=1,
            changed=2,
            deleted=3,
            bytes=1 << 40,
            renamed=4,
            largest=(LargeFile("/film", "added", 1 << 39),),
            directories=(DirectoryChanges("/", 1, 2, 3, 4, 1 << 40),),
        )
        self.breakdown = NO_BREAKDOWN
        self.diff_body: Callable[[int], object] = lambda target: None
        """Writes the list of differences, or raises."""
        self.diff_end = b'{"complete": true}\n'
        self.compared = ("", "")
        self.pending = 0
        self.files: list[PendingFile] = []
        """Those that are pending."""
        self.diff_reader: Uid | None = None
        self.verified: bool | None = None
        """What was asked for when it was to be persisted."""
        self.undo = True
        self.size = SnapshotSize(8192, 4096, True)
        """Of each snapshot."""
        self.programs: tuple[Program, ...] = ()
        self.timer = FakeTimer()
        self.changes_gate = trio.Event()
        self.changes_gate.set()
        self.snapshot_gate = trio.Event()
        self.snapshot_gate.set()
        self.rebased_with: object = None
        self.imported: dict[str, bytes] = {}
        """What came with each name."""
        self.manager = manager

    def start(self, operation: Operation, started_by: Uid) -> FakeJob:
        if self.id not in self.manager.sessions:
            raise NoSuchSession(f"Session {self.id} has been closed.")
        running = [j for j in self.manager.jobs if j.session == self.id and not j.finished]
        if running:
            raise Busy(f"Session {self.id} is busy: job {running[0].id}, a {running[0].operation}.")
        job = FakeJob(self.manager, len(self.manager.jobs) + 1, self, operation, started_by)
        self.manager.jobs.append(job)
        self.last_job = job
        self.manager.tell("job_added", job)
        if self.manager.jobs_finish_at_once or self.manager.jobs_finish_with:
            job.finish(self.manager.jobs_finish_with)
        return job

    async def undisturbed(self) -> None:
        await trio.lowlevel.checkpoint()

    def reset(self, *, started_by: Uid, manner: Manner = AT_ONCE) -> FakeJob:
        job = self.start(Operation.RESET, started_by)
        job.manner = manner
        return job

    def restore(
        self, name: str, *, started_by: Uid, manner: Manner = AT_ONCE, undo: bool = True
    ) -> FakeJob:
        self.snapshots.record(name)
        self.undo = undo
        job = self.start(Operation.RESTORE, started_by)
        job.manner = manner
        return job

    async def conflicts(self) -> tuple[Program, ...]:
        return self.programs

    def persist(self, *, started_by: Uid, verify: bool = True) -> FakeJob:
        self.verified = verify
        return self.start(Operation.PERSIST, started_by)

    def rebase(
        self,
        source: ImageSource,
        *,
        conflicts: Conflicts | None = None,
        remount: bool = False,
        started_by: Uid,
    ) -> FakeJob:
        self.rebased_with = (source, conflicts, remount)
        return self.start(Operation.REBASE, started_by)

    def commit(self, paths: list[str], *, started_by: Uid) -> FakeJob:
        self.commits += paths
        return self.start(Operation.COMMIT, started_by)

    async def uncommit(self, paths: list[str], *, delete: bool = False) -> None:
        self.commits = [path for path in self.commits if path not in paths]
        self.deleted += paths if delete else ()

    async def committed(self) -> list[CommittedPath]:
        return [CommittedPath(path, 4096) for path in self.commits]

    async def set_keep(self, rules: list[str]) -> None:
        self.keep = tuple(rules)
        self.manager.tell("session_changed", self)

    async def pending_files(self) -> list[PendingFile]:
        return self.files


class FakeGuests:
    """``guest-1`` is there."""

    def __init__(self) -> None:
        self.names = ["guest-1"]

    async def create(self) -> Account:
        number = len(self.names) + 1
        self.names.append(f"guest-{number}")
        return Account(self.names[-1], Uid(2_100_000_000 + number))

    def uid_of(self, name: str) -> Uid:
        if name not in self.names:
            raise InvalidName(f"There is no guest {name!r}.")
        return Uid(2_100_000_000 + int(name.removeprefix("guest-")))

    async def remove(self, uid: Uid) -> None:
        self.names.remove(f"guest-{uid - 2_100_000_000}")


class FakeManager:
    """Profiles: ``live``, and ``broken``, which brings out a fault."""

    features = ("passthrough",)
    profiles = ("live",)
    images = ("/images/root.squashfs",)

    def __init__(self) -> None:
        self.sessions: dict[SessionId, FakeSession] = {}
        self.guests = FakeGuests()
        self.jobs: list[FakeJob] = []
        self.jobs_finish_at_once = False
        self.maintenance: MaintenanceRecord | None = None
        self.jobs_finish_with: SessiondError | None = None
        self._observers: list[object] = []

    def observe(self, observer: object) -> None:
        self._observers.append(observer)

    def tell(self, event: str, *arguments: object, **named: object) -> None:
        for observer in self._observers:
            getattr(observer, event)(*arguments, **named)

    def add(self, name: str, user: str = "nobody", uid: int = 65534) -> FakeSession:
        if name in self.sessions:
            raise SessionExists(f"There is a session {name} already.")
        session = FakeSession(self, name, user, uid)
        self.sessions[session.id] = session
        self.tell("session_added", session)
        return session

    async def log_in(self, uid: Uid, process: int) -> Login:
        return Login(None, f"uid {uid} by process {process}")

    async def log_out(self, uid: Uid) -> None:
        pass

    async def begin_maintenance(
        self, profile: str, message: str, *, session_id: str | None = None, started_by: Uid
    ) -> FakeSession:
        if self.maintenance is not None:
            raise Busy(f"Profile {self.maintenance.profile} is being maintained.")
        session = self.add(session_id or "maintenance", "root", 0)
        self.maintenance = MaintenanceRecord(
            profile=profile,
            message=message,
            session=session.id,
            image=Path("/images/root.squashfs"),
            digest="squashfs-1",
            boot="1",
            started_by=started_by,
            started_at=EPOCH,
        )
        self.tell("maintenance_changed", begun=True)
        return session

    def finish_maintenance(self, *, started_by: Uid) -> FakeJob:
        if self.maintenance is None:
            raise Failed("No maintenance is going on.")
        session = self.sessions[self.maintenance.session]
        return session.start(Operation.MAINTENANCE, started_by)

    async def cancel_maintenance(self) -> None:
        if self.maintenance is None:
            raise Failed("No maintenance is going on.")
        name, self.maintenance = self.maintenance.session, None
        await self.close(name)
        self.tell("maintenance_changed", begun=False)

    async def create(
        self, user: str, profile: str, *, session_id: str | None = None
    ) -> FakeSession:
        if profile == "broken":
            raise ZeroDivisionError("a fault, with secrets in it")
        if profile not in self.profiles:
            raise NoSuchProfile(f"There is no profile {profile!r}.")
        name = f"{user}-1" if session_id is None else session_id
        return self.add(model.session_id(name), user)

    def get(self, name: str) -> FakeSession:
        try:
            return self.sessions[model.session_id(name)]
        except KeyError:
            raise NoSuchSession(f"There is no session {name!r}.") from None

    def source_of(self, session: FakeSession) -> ImageSource:
        return ImageSource(path=Path(session.image))

    def by_uid(self, uid: Uid) -> FakeSession:
        for session in self.sessions.values():
            if session.uid == uid:
                return session
        raise NoSuchSession(f"Uid {uid} has no session.")

    async def close(self, name: str) -> None:
        session = self.get(name)
        for job in self.jobs:
            if job.session == session.id and not job.finished:
                job.cancel()
        del self.sessions[session.id]
        self.tell("session_removed", session)
