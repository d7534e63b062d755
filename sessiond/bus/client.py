"""sessiond as seen from another process: typed proxies for its D-Bus objects.

    async with client.connect() as sessiond:
        session = await sessiond.session("live")
        job = await session.reset()
        await job.wait(progress=lambda info: print(info.progress))

Failures are those of `sessiond.errors`, as if the daemon were in this process; `Unreachable` when
the bus or the daemon does not answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple, TypeVar

import trio
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.alias_generators import to_pascal

from sessiond import errors
from sessiond.bus import connection, names
from sessiond.bus.connection import CALL_TIMEOUT, Connection
from sessiond.bus.signals import Match, Signals
from sessiond.bus.wire import BusError, Variant, WireError
from sessiond.errors import SessiondError
from sessiond.session.model import ArchiveKind as ArchiveKind
from sessiond.session.model import ChangeSummary as ChangeSummary
from sessiond.session.model import SessionId, SnapshotName

OPERATION_TIMEOUT = 300.0
"""Seconds that calls may take which mount, unmount, or walk through a session."""
_TYPING_TIMEOUT = 330.0
"""Seconds more, where a person may be asked for a password: a little longer than sessiond waits."""

Option = bool | float | str | list[str]
"""Value of an option."""

_EPOCH = datetime.fromtimestamp(0, UTC)
_ERRORS = {name: kind for kind, name in names.ERRORS.items()}
_UNREACHABLE = frozenset(
    f"{names.DBUS}.Error.{reason}"
    for reason in ("Disconnected", "NameHasNoOwner", "NoReply", "ServiceUnknown", "TimedOut")
)
_ACTIVATION_FAILED = f"{names.DBUS}.Error.Spawn."


def _moment(microseconds: object) -> object:
    if not isinstance(microseconds, int):
        return microseconds
    return _EPOCH + timedelta(microseconds=microseconds) if microseconds else None


_Moment = Annotated[datetime, BeforeValidator(_moment)]


class _Info(BaseModel):
    """Properties of an object; those that a later daemon adds are passed over."""

    model_config = ConfigDict(alias_generator=to_pascal, frozen=True)


@dataclass(frozen=True, slots=True)
class Difference:
    """One path that differs.

    `path` begins at the merged root; bytes that are not UTF-8 are surrogate escapes.
    """

    path: str
    kind: str
    """``added``, ``contents``, ``metadata``, ``deleted``, ``type`` or ``renamed``."""
    type: str
    """``file``, ``directory``, ``symlink`` or ``other``."""
    size: int
    """In bytes; 0 where it is deleted."""
    old_size: int = 0
    """The same before; 0 where it is added."""
    source: str | None = None
    """The path before, if it is renamed."""
    changed: str | None = None
    """``contents`` or ``metadata``, if it is renamed and that differs, too."""
    content: tuple[str, str] | str | None = None
    """The text of a file, before and now, if it was asked for and has changed; or why it is not
    told: ``binary``, ``large`` or ``forbidden``.
    """


@dataclass(frozen=True, slots=True)
class ShadowedFile:
    """One path that both a session and its image have changed; paths as in `Difference`."""

    path: str
    type: str
    """``file``, ``directory``, ``symlink``, ``other``, or ``none`` if the session removed it."""
    outcome: str
    """``kept``, ``dropped`` or ``saved``: what a rebase did, or would do."""
    now: bool
    """Whether that is in the session as it is now."""
    snapshots: tuple[str, ...]
    """In which snapshots it is."""
    saved_as: str


class Program(NamedTuple):
    """Processes of one name that use a session."""

    name: str
    pids: list[int]
    uid: int
    unit: str
    """Of systemd's, that they belong to; may be empty."""


class Inhibitor(NamedTuple):
    """Someone who holds back the resets of a session that come by themselves."""

    who: str
    why: str
    uid: int
    since: _Moment


class ManagerInfo(_Info):
    """Properties of the manager."""

    version: str
    features: tuple[str, ...]
    profiles: tuple[str, ...]
    images: tuple[str, ...]
    guests: tuple[str, ...]
    """Names of the users that were made on demand, and are there."""
    maintenance: str
    """The profile whose image is being maintained; empty if none is."""
    maintenance_message: str
    maintenance_session: Annotated[str, BeforeValidator(names.session_of)]
    """Id of the session in which that is done."""


class SessionInfo(_Info):
    """Properties of a session; `last_reset` is None when it has never been reset."""

    id: str
    user: str
    uid: int
    profile: str
    image: str
    mount_point: str
    storage: str
    state: str
    failure: str
    """Why the state is ``failed``."""
    bytes_used: int
    bytes_limit: int
    inodes_used: int
    inodes_limit: int
    space_level: str
    """``normal``, ``warning`` or ``critical``."""
    pending: int
    """How many files are written in RAM still, since before it moved to disk."""
    created_at: _Moment
    last_reset: Annotated[datetime | None, BeforeValidator(_moment)]
    next_reset: Annotated[datetime | None, BeforeValidator(_moment)]
    """When it is reset by itself; None if never, as things are."""
    next_reset_reason: str
    inhibitors: tuple[Inhibitor, ...]
    """Who holds back such resets."""
    keep: tuple[str, ...]
    """Rules for what outlives resets."""
    snapshots: tuple[str, ...]
    """Object paths, oldest first."""
    last_job: str
    """Object path of the job that runs, or else ran last; ``/`` if there was none."""


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A file of which the disk has what it contained a moment ago."""

    path: str
    programs: tuple[str, ...]
    """Names of those that have it open; none if that cannot be seen."""


@dataclass(frozen=True, slots=True)
class CommittedPath:
    """A file or directory that was committed, and what it takes on disk."""

    path: str
    bytes: int


class SnapshotInfo(_Info):
    """Properties of a snapshot; `parent` is the object path of the one below it, or ``/``."""

    name: str
    description: str
    created_at: _Moment
    parent: str
    automatic: bool
    """Made by sessiond by itself."""
    pinned: bool
    """Not to be deleted by rules."""
    inexact: tuple[str, ...]
    """Paths of files that programs wrote to while it was made."""
    size: int
    """Bytes that its layers take on disk; 0 unless `size_valid`."""
    exclusive: int
    """Bytes of them that are given back when it is deleted; 0 unless `size_valid`."""
    size_valid: bool
    """Whether all its layers are counted."""


class JobInfo(_Info):
    """Properties of a job."""

    operation: str
    session: str
    """Id of the session."""
    progress: float
    """0 to 1; meaningful when `progress_valid`."""
    progress_valid: bool
    bytes: int
    conflicts: tuple[Program, ...]
    """What used the session when the job began to end that."""
    started_by_uid: int
    state: str
    """``running``, ``succeeded`` or ``failed``."""
    error_name: str
    error_message: str


@dataclass(frozen=True, slots=True)
class Event:
    """A signal of the daemon; `session` is the id in its path, or empty."""

    path: str
    session: str
    interface: str
    member: str
    arguments: tuple[object, ...]


class Events:
    """Iterates over the signals of the daemon."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        message = await anext(self._signals)
        return Event(
            message.path,
            names.session_of(message.path),
            message.interface,
            message.member,
            message.values(),
        )


class _Lines:
    """Reads a list from a pipe. Raises `Failed` when it ends without being complete."""

    def __init__(self, stream: trio.lowlevel.FdStream) -> None:
        self._stream = stream
        self._unread = bytearray()

    async def _values(self) -> dict[str, Any]:
        line = await self._line()
        try:
            values = json.loads(line)
        except ValueError:  # of the line that was being written then, a part
            raise self._early() from None
        if "complete" in values:
            raise StopAsyncIteration
        if "error" in values:
            raise errors.Failed(f"The list of changes ends early: {values['error']}")
        assert isinstance(values, dict)
        return values

    async def _line(self) -> bytes:
        while b"\n" not in self._unread:
            part = await self._stream.receive_some()
            if not part:
                raise self._early()
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return bytes(line)

    def _early(self) -> SessiondError:
        return errors.Failed(
            "The list of changes ends early; the log of sessiond says why. List them again."
        )


class Differences(_Lines):
    """Iterates over a list of differences. Raises `Failed` when it ends without being complete."""

    def __aiter__(self) -> Differences:
        return self

    async def __anext__(self) -> Difference:
        values = await self._values()
        return Difference(
            values["path"],
            values["kind"],
            values["type"],
            values["size"],
            values.get("old_size", 0),
            values.get("from"),
            values.get("changed"),
            _content(values.get("content")),
        )


class ShadowedFiles(_Lines):
    """Iterates over a list of what is shadowed. Raises `Failed` as `Differences` does."""

    def __aiter__(self) -> ShadowedFiles:
        return self

    async def __anext__(self) -> ShadowedFile:
        values = await self._values()
        return ShadowedFile(
            values["path"],
            values["type"],
            values["outcome"],
            values["now"],
            tuple(values["snapshots"]),
            values.get("saved_as", ""),
        )


_I = TypeVar("_I", bound=_Info)
_Objects = TypeAdapter(dict[str, dict[str, dict[str, object]]])
_Summary = TypeAdapter(ChangeSummary)
_Committed = TypeAdapter(list[tuple[str, int]])
_PendingFiles = TypeAdapter(list[tuple[str, tuple[str, ...]]])


class _Proxy:
    """An object of the daemon; a call to one that has ended raises `gone`."""

    _interface: str

    def __init__(self, connection: Connection, path: str, gone: SessiondError) -> None:
        self.path = path
        self._connection = connection
        self._gone = gone

    async def _call(
        self,
        member: str,
        signature: str = "",
        *values: object,
        timeout: float = CALL_TIMEOUT,
        interactive: bool | None = None,
    ) -> tuple[object, ...]:
        asking = self._connection.interactive if interactive is None else interactive
        with _translated(self._gone):
            return await self._connection.call(
                names.BUS,
                self.path,
                self._interface,
                member,
                signature,
                *values,
                timeout=timeout + (_TYPING_TIMEOUT if asking else 0.0),
                interactive=asking,
            )

    async def property_values(self) -> dict[str, object]:
        """Return its properties as the bus has them."""
        with _translated(self._gone):
            (values,) = await self._connection.call(
                names.BUS, self.path, names.PROPERTIES, "GetAll", "s", self._interface
            )
        assert isinstance(values, dict)
        return values

    async def managed_objects(self) -> dict[str, dict[str, dict[str, object]]]:
        """Return those of all objects but the manager, by path and interface."""
        with _translated(self._gone):
            (objects,) = await self._connection.call(
                names.BUS, names.ROOT_PATH, names.OBJECT_MANAGER, "GetManagedObjects"
            )
            return _Objects.validate_python(objects)


class Job(_Proxy):
    """A long operation."""

    _interface = names.JOB

    def __init__(self, connection: Connection, path: str) -> None:
        gone = errors.Failed("The daemon has forgotten the job: too many others have ended since.")
        super().__init__(connection, path, gone)

    async def info(self) -> JobInfo:
        """Return its properties."""
        return validated(JobInfo, await self.property_values())

    async def cancel(self) -> None:
        """Ask it to stop; it then fails with `Cancelled`, unless it has ended before."""
        await self._call("Cancel")

    async def wait(self, progress: Callable[[JobInfo], None] | None = None) -> None:
        """Return when the job has succeeded; raise its error when it has failed.

        `progress` is called at once, and each time that a property of the job changes.
        """
        match = Match(names.BUS, path=self.path)
        with _translated(self._gone):
            # Whatever happens between these two is in the properties, and in the signals as well.
            async with self._connection.signals(match) as signals:
                values = await self.property_values()
                while (info := validated(JobInfo, values)).state == "running":
                    if progress is not None:
                        progress(info)
                    values |= await _next_change(signals)
        if progress is not None:
            progress(info)
        if info.state == "failed":
            raise _error(info.error_name, info.error_message)


class Snapshot(_Proxy):
    """A snapshot of a session."""

    _interface = names.SNAPSHOT

    def __init__(self, connection: Connection, session_id: str, name: str) -> None:
        path = names.snapshot_path(SessionId(session_id), SnapshotName(name))
        gone = errors.NoSuchSnapshot(f"There is no snapshot {name!r} of a session {session_id!r}.")
        super().__init__(connection, path, gone)

    async def info(self) -> SnapshotInfo:
        """Return its properties."""
        return validated(SnapshotInfo, await self.property_values())

    async def delete(self) -> None:
        """Delete it, and what only it kept."""
        await self._call("Delete", timeout=OPERATION_TIMEOUT)

    async def export(self, target: int, *, kind: ArchiveKind = ArchiveKind.OCI) -> Job:
        """Start to write it to `target`, a pipe, which the caller closes."""
        options = {"format": Variant("s", kind.value)}
        (path,) = await self._call("Export", "ha{sv}", os.dup(target), options)
        return Job(self._connection, str(path))

    async def rename(self, name: str) -> None:
        """Give it another name; this proxy is of no use afterwards."""
        await self._call("Rename", "s", name)

    async def describe(self, description: str) -> None:
        """Give it another description."""
        await self._call("Describe", "s", description)

    async def pin(self, pinned: bool) -> None:
        """Keep it from being deleted by rules, or leave it to them again."""
        await self._call("Pin", "b", pinned)


class Session(_Proxy):
    """A session."""

    _interface = names.SESSION

    def __init__(self, connection: Connection, session_id: str) -> None:
        path = names.session_path(SessionId(session_id))
        super().__init__(
            connection, path, errors.NoSuchSession(f"There is no session {session_id!r}.")
        )
        self.id = session_id

    async def info(self) -> SessionInfo:
        """Return its properties."""
        return validated(SessionInfo, await self.property_values())

    async def wait(self) -> None:
        """Return when it is mounted, and nothing is being done to it.

        Raises `Failed` if it is not mounted and will not be, `NoSuchSession` if it is being closed.
        """
        with _translated(self._gone):
            # Whatever happens between these two is in the properties, and in the signals as well.
            async with self._connection.signals(Match(names.BUS, path=self.path)) as signals:
                values = await self.property_values()
                while (info := validated(SessionInfo, values)).state in ("starting", "busy"):
                    values |= await _next_change(signals)
        if info.state == "closing":
            raise self._gone
        if info.state == "failed":
            raise errors.Failed(f"Session {self.id} is not mounted: {info.failure}")

    async def reset(self, **options: Option) -> Job:
        """Start to make it pristine again.

        Options: `terminate` (bool), `grace` (seconds), `snapshot_first` (True, or a name) and
        `keep` (paths that stay as they are).
        """
        return await self._start("Reset", "a{sv}", _options(options))

    async def restore(self, snapshot: str, **options: Option) -> Job:
        """Start to bring it back to one of its snapshots.

        Options: those of `reset` but `keep`, and `undo` (bool, by default true): what is replaced
        is kept as an automatic snapshot.
        """
        return await self._start("Restore", "sa{sv}", snapshot, _options(options))

    async def schedule_reset(self, at: datetime | None = None, **options: Option) -> None:
        """Have it reset at a time, or, by an option, `in_` or `idle` so many seconds.

        Others are `warning` (seconds) and those of `reset`.
        """
        moment = 0 if at is None else (at - _EPOCH) // timedelta(microseconds=1)
        await self._call("ScheduleReset", "ta{sv}", moment, _options(options))

    async def cancel_scheduled_reset(self) -> None:
        """Forget what `schedule_reset` has asked for."""
        await self._call("CancelScheduledReset")

    @asynccontextmanager
    async def inhibit(self, who: str, why: str) -> AsyncIterator[None]:
        """Hold back resets that come by themselves while the context is open."""
        (descriptor,) = await self._call("Inhibit", "ss", who, why)
        assert isinstance(descriptor, int)
        try:
            yield
        finally:
            os.close(descriptor)

    async def conflicts(self) -> list[Program]:
        """Return the programs that use it now."""
        (programs,) = await self._call("Conflicts", timeout=OPERATION_TIMEOUT)
        assert isinstance(programs, list)
        return [Program(*one) for one in programs]

    async def persist(self, *, verify: bool = True) -> Job:
        """Start to move it to disk, so that it survives a reboot.

        Unless `verify` is false, what was written is read back before that counts.
        """
        options = {} if verify else {"verify": Variant("b", False)}
        return await self._start("Persist", "a{sv}", options)

    async def commit(self, paths: Sequence[str]) -> Job:
        """Start to save what is at paths, so that it outlives resets and the session."""
        return await self._start("Commit", "asa{sv}", list(paths), {})

    async def uncommit(self, paths: Sequence[str], *, delete: bool = False) -> None:
        """Have what was committed there be the image's from the next reset on.

        With `delete`, what is kept there is deleted then.
        """
        options = {"delete": Variant("b", True)} if delete else {}
        await self._call("Uncommit", "asa{sv}", list(paths), options, timeout=OPERATION_TIMEOUT)

    async def committed(self) -> list[CommittedPath]:
        """Return what was committed."""
        (files,) = await self._call("Committed", "a{sv}", {}, timeout=OPERATION_TIMEOUT)
        with _translated(self._gone):
            return [CommittedPath(*one) for one in _Committed.validate_python(files)]

    async def set_keep(self, rules: Sequence[str]) -> None:
        """Have what these rules name outlive resets. For root."""
        await self._call("SetKeep", "asa{sv}", list(rules), {}, timeout=OPERATION_TIMEOUT)

    async def pending_files(self, *, interactive: bool | None = None) -> list[PendingFile]:
        """Return the files that are written in RAM still, and by whom.

        `interactive` as with `connect`, if given.
        """
        (files,) = await self._call(
            "PendingFiles", "a{sv}", {}, timeout=OPERATION_TIMEOUT, interactive=interactive
        )
        with _translated(self._gone):
            return [PendingFile(*file) for file in _PendingFiles.validate_python(files)]

    async def rebase(self, *, conflicts: str | None = None, remount: bool = False) -> Job:
        """Start to put it over the image that there is now."""
        options = {} if conflicts is None else {"conflicts": Variant("s", conflicts)}
        if remount:
            options["remount"] = Variant("b", True)
        return await self._start("Rebase", "a{sv}", options)

    async def import_snapshot(self, name: str, source: int, *, description: str = "") -> Job:
        """Start to make a snapshot of an OCI layer or a squashfs, which `source` gives, a pipe.

        The caller closes that.
        """
        options = {"description": Variant("s", description)} if description else {}
        return await self._start("Import", "hsa{sv}", os.dup(source), name, options)

    async def last_job(self) -> JobInfo | None:
        """Return the job that runs, or else ran last, also before a restart; None if none did."""
        path = (await self.info()).last_job
        return None if path == "/" else await Job(self._connection, path).info()

    async def cancel(self) -> None:
        """Cancel the job that runs; nothing happens if there is none."""
        path = (await self.info()).last_job
        if path != "/":
            await Job(self._connection, path).cancel()

    async def _start(self, member: str, signature: str, *values: object) -> Job:
        (path,) = await self._call(member, signature, *values)
        return Job(self._connection, str(path))

    async def snapshot(self, name: str, *, description: str = "", pinned: bool = False) -> Snapshot:
        """Take a snapshot of it."""
        options = {"description": Variant("s", description)} if description else {}
        if pinned:
            options["pinned"] = Variant("b", True)
        await self._call("Snapshot", "sa{sv}", name, options, timeout=OPERATION_TIMEOUT)
        return self.snapshot_named(name)

    def snapshot_named(self, name: str) -> Snapshot:
        """Return the proxy of a snapshot, which may not exist."""
        return Snapshot(self._connection, self.id, name)

    async def snapshots(self) -> list[SnapshotInfo]:
        """Return its snapshots, oldest first."""
        objects = await self.managed_objects()
        found = [
            validated(SnapshotInfo, interfaces[names.SNAPSHOT])
            for path, interfaces in objects.items()
            if path.startswith(f"{self.path}/") and names.SNAPSHOT in interfaces
        ]
        if not found and self.path not in objects:
            raise self._gone
        return sorted(found, key=lambda info: info.created_at)

    async def changes(
        self,
        *,
        start: str = "",
        end: str = "",
        directories: int = 0,
        depth: int = 1,
        interactive: bool | None = None,
    ) -> ChangeSummary:
        """Count what differs from a snapshot, or the image, to another one, or to its state now.

        Also below so many `directories`, those with most bytes, `depth` levels down at most.
        `interactive` as with `connect`, if given.
        """
        breakdown = _options({"directories": directories, "depth": depth}) if directories else {}
        (summary,) = await self._call(
            "Changes",
            "a{sv}",
            _states(start, end) | breakdown,
            timeout=OPERATION_TIMEOUT,
            interactive=interactive,
        )
        with _translated(self._gone):
            return _Summary.validate_python(summary)

    @asynccontextmanager
    async def diff(
        self, *, start: str = "", end: str = "", content: bool = False
    ) -> AsyncIterator[Differences]:
        """List the same while the context is open; with `content`, also what text has changed."""
        options = _states(start, end) | ({"content": Variant("b", True)} if content else {})
        (descriptor,) = await self._call("OpenDiff", "a{sv}", options)
        assert isinstance(descriptor, int)
        async with trio.lowlevel.FdStream(descriptor) as stream:
            yield Differences(stream)

    @asynccontextmanager
    async def shadowed(self) -> AsyncIterator[ShadowedFiles]:
        """List what both it and its image have changed while the context is open."""
        (descriptor,) = await self._call("OpenShadowed", "a{sv}", {})
        assert isinstance(descriptor, int)
        async with trio.lowlevel.FdStream(descriptor) as stream:
            yield ShadowedFiles(stream)

    async def close(self) -> None:
        """End it: unmount, and forget its changes."""
        await self._call("Close", "a{sv}", {}, timeout=OPERATION_TIMEOUT)


class Client(_Proxy):
    """The daemon: its manager object, from which all others come."""

    _interface = names.MANAGER

    def __init__(self, connection: Connection) -> None:
        gone = errors.Failed(f"{names.BUS} has no object {names.ROOT_PATH}.")
        super().__init__(connection, names.ROOT_PATH, gone)

    async def info(self) -> ManagerInfo:
        """Return its properties."""
        return validated(ManagerInfo, await self.property_values())

    async def sessions(self) -> list[SessionInfo]:
        """Return all sessions, by their ids."""
        found = [
            validated(SessionInfo, interfaces[names.SESSION])
            for interfaces in (await self.managed_objects()).values()
            if names.SESSION in interfaces
        ]
        return sorted(found, key=lambda info: info.id)

    async def create(self, user: str, profile: str, *, session_id: str | None = None) -> Session:
        """Create a session and mount it."""
        options = {} if session_id is None else {"id": Variant("s", session_id)}
        (path,) = await self._call(
            "CreateSession", "ssa{sv}", user, profile, options, timeout=OPERATION_TIMEOUT
        )
        return Session(self._connection, names.session_of(str(path)))

    async def session(self, session_id: str) -> Session:
        """Return the session of that id."""
        await self._call("GetSession", "s", session_id)
        return Session(self._connection, session_id)

    def session_named(self, session_id: str) -> Session:
        """Return the proxy of a session, which may not exist."""
        return Session(self._connection, session_id)

    async def session_of(self, uid: int) -> Session:
        """Return the session of a user."""
        (path,) = await self._call("GetSessionByUser", "u", uid)
        return Session(self._connection, names.session_of(str(path)))

    async def create_guest(self) -> tuple[str, int]:
        """Make a user without a password; return the name and uid."""
        name, uid = await self._call("CreateGuest", "", timeout=OPERATION_TIMEOUT)
        assert isinstance(uid, int)
        return str(name), uid

    async def remove_guest(self, name: str) -> None:
        """End all processes of such a user, and remove all that they own."""
        await self._call("RemoveGuest", "s", name, timeout=OPERATION_TIMEOUT)

    async def begin_maintenance(
        self, profile: str, message: str, *, session_id: str | None = None
    ) -> Session:
        """Make a session in which a profile's image is maintained, and no others meanwhile."""
        options = {} if session_id is None else {"id": Variant("s", session_id)}
        (path,) = await self._call(
            "BeginMaintenance", "ssa{sv}", profile, message, options, timeout=OPERATION_TIMEOUT
        )
        return Session(self._connection, names.session_of(str(path)))

    async def finish_maintenance(self) -> Job:
        """Start to make a new image; when that is done, the maintenance has ended."""
        (path,) = await self._call("FinishMaintenance", "a{sv}", {})
        return Job(self._connection, str(path))

    async def cancel_maintenance(self) -> None:
        """End the maintenance without a new image."""
        await self._call("CancelMaintenance", "a{sv}", {}, timeout=OPERATION_TIMEOUT)

    async def returned(self) -> None:
        """Return once the daemon is on the bus, which does not start it for this."""
        present = Match(names.DBUS, interface=names.DBUS, member="NameOwnerChanged", arg0=names.BUS)
        async with self._connection.signals(present) as changes:
            while (await self._connection.call_bus("NameHasOwner", "s", names.BUS)) != (True,):
                await anext(changes)

    @asynccontextmanager
    async def events(self) -> AsyncIterator[Events]:
        """Listen to all signals of the daemon while the context is open.

        Iteration raises `Unreachable` when the daemon ends.
        """
        match = Match(names.BUS, path_namespace=names.ROOT_PATH)
        with _translated(self._gone):
            async with self._connection.signals(match) as signals:
                yield Events(signals)


@asynccontextmanager
async def connect(
    address: str | None = None, *, interactive: bool = False
) -> AsyncIterator[Client]:
    """Connect to the daemon on the bus at `address`, by default the system bus.

    With `interactive`, what takes a password has the user asked for it, by the agent of the desktop
    or one that this process has started; else it fails with `AuthorizationRequired`.
    Raises `ConfigError` when the address is unusable, `Unreachable` when no bus is there. It is
    also raised, and the body cancelled, when the bus goes away while the context is open.
    """
    async with connection.connect(address) as connected:
        connected.interactive = interactive
        yield Client(connected)


def _content(told: Any) -> tuple[str, str] | str | None:
    return (told["old"], told["new"]) if isinstance(told, dict) else told


def _states(start: str, end: str) -> dict[str, Variant]:
    return {key: Variant("s", name) for key, name in (("from", start), ("to", end)) if name}


async def _next_change(signals: Signals) -> dict[str, object]:
    """Return the properties that the next signal tells of."""
    message = await anext(signals)
    if message.interface != names.PROPERTIES:
        return {}
    _interface, changed, _invalidated = message.values()
    assert isinstance(changed, dict)
    return changed


def _options(options: Mapping[str, Option]) -> dict[str, Variant]:
    """Return options as the bus has them: a name has hyphens there, and may be one of Python's."""
    types = {bool: "b", int: "x", float: "d", str: "s", list: "as"}
    return {
        name.removesuffix("_").replace("_", "-"): Variant(types[type(value)], value)
        for name, value in options.items()
    }


def validated(model: type[_I], values: dict[str, object]) -> _I:
    """Return the properties of an object, typed. Raises `Failed` for those of another version."""
    with _translated(errors.Failed("The daemon has no such object.")):
        return model.model_validate(values)


@contextmanager
def _translated(gone: SessiondError) -> Iterator[None]:
    """Raise errors of the bus as what they mean; that an object does not exist, as `gone`."""
    try:
        yield
    except BusError as error:
        if error.name == names.UNKNOWN_OBJECT:
            raise gone from error
        raise _error(error.name, error.text) from error
    except WireError as error:
        raise errors.InvalidName(str(error)) from error
    except ValidationError as error:
        raise errors.Failed(
            f"The daemon's answer is not understood; is it of another version? {error}"
        ) from error


def _error(name: str, text: str) -> SessiondError:
    if name in _ERRORS:
        return _ERRORS[name](text)
    if name == names.ACCESS_DENIED:
        return errors.NotAuthorized(f"The bus does not let you do this: {text}")
    if name in _UNREACHABLE or name.startswith(_ACTIVATION_FAILED):
        return errors.Unreachable(
            f"sessiond does not answer ({text}). Start it with 'systemctl start sessiond'."
        )
    return errors.Failed(f"{name}: {text}")
