"""The D-Bus objects: the manager, sessions, snapshots and jobs. What they do is in `operations`."""

from __future__ import annotations

from datetime import datetime, timedelta

import sessiond
from sessiond.bus import names
from sessiond.bus.authorisation import Action, authorise
from sessiond.bus.interface import Caller, Change, Interface, Property, method, signal
from sessiond.bus.operations import EPOCH, Operations, Options, as_values
from sessiond.bus.wire import Variant, shown
from sessiond.session.jobs import Job
from sessiond.session.manager import Manager, Session
from sessiond.session.model import LayerNumber, SnapshotName, Uid

SESSION_NEW = signal("SessionNew", "s id, o session")
SESSION_REMOVED = signal("SessionRemoved", "s id, o session")
MAINTENANCE_ANNOUNCED = signal("MaintenanceAnnounced", "s profile, s message")
RESET_DONE = signal("ResetDone")
RESET_SCHEDULED = signal("ResetScheduled", "t when, s why")
SPACE_LOW = signal("SpaceLow", "s level, t used, t limit")
COMPLETED = signal("Completed", "b success, s error")


def microseconds(moment: datetime | None) -> int:
    """Return microseconds since 1970, as systemd's interfaces give times; 0 is never."""
    return 0 if moment is None else (moment - EPOCH) // timedelta(microseconds=1)


class ManagerObject(Interface):
    """All sessions."""

    name = names.MANAGER
    properties = (
        Property("Version", "s", Change.NEVER),
        Property("Features", "as"),
        Property("Profiles", "as", Change.SILENT),
        Property("Images", "as"),
        Property("Guests", "as", Change.SILENT),
        Property("Maintenance", "s"),
        Property("MaintenanceMessage", "s"),
        Property("MaintenanceSession", "o"),
    )
    signals = (SESSION_NEW, SESSION_REMOVED, MAINTENANCE_ANNOUNCED)

    def __init__(self, manager: Manager, operations: Operations) -> None:
        self._manager = manager
        self._operations = operations

    def property_values(self) -> dict[str, object]:
        maintenance = self._manager.maintenance
        return {
            "Version": sessiond.__version__,
            "Features": [shown(feature) for feature in self._manager.features],
            "Profiles": [shown(profile) for profile in self._manager.profiles],
            "Images": [shown(image) for image in self._manager.images],
            "Guests": self._manager.guests.names,
            "Maintenance": shown(maintenance.profile) if maintenance else "",
            "MaintenanceMessage": shown(maintenance.message) if maintenance else "",
            "MaintenanceSession": names.session_path(maintenance.session) if maintenance else "/",
        }

    @method("CreateSession", "s user, s profile, a{sv} options", "o session")
    async def create_session(
        self, caller: Caller, user: str, profile: str, options: Options
    ) -> str:
        return await self._operations.create(caller, user, profile, options)

    @method("GetSession", "s id", "o session")
    async def get_session(self, _caller: Caller, session_id: str) -> str:
        return names.session_path(self._manager.get(session_id).id)

    @method("GetSessionByUser", "u uid", "o session")
    async def get_session_by_user(self, _caller: Caller, uid: int) -> str:
        return names.session_path(self._manager.by_uid(Uid(uid)).id)

    @method("ListSessions", "", "a(susso) sessions")
    async def list_sessions(self, _caller: Caller) -> list[tuple[str, int, str, str, str]]:
        return [
            (s.id, s.uid, shown(s.user), shown(s.profile), names.session_path(s.id))
            for s in self._manager.sessions.values()
        ]

    @method("ResetSession", "s id, a{sv} options", "o job")
    async def reset_session(self, caller: Caller, session_id: str, options: Options) -> str:
        return await self._operations.reset(caller, self._manager.get(session_id), options)

    @method("SnapshotSession", "s id, s name, a{sv} options", "o snapshot")
    async def snapshot_session(
        self, caller: Caller, session_id: str, name: str, options: Options
    ) -> str:
        session = self._manager.get(session_id)
        return await self._operations.snapshot(caller, session, name, options)

    @method("PersistSession", "s id, a{sv} options", "o job")
    async def persist_session(self, caller: Caller, session_id: str, options: Options) -> str:
        return await self._operations.persist(caller, self._manager.get(session_id), options)

    @method("CreateGuest", "", "s name, u uid")
    async def create_guest(self, caller: Caller) -> tuple[str, int]:
        return await self._operations.create_guest(caller)

    @method("RemoveGuest", "s name")
    async def remove_guest(self, caller: Caller, name: str) -> None:
        await self._operations.remove_guest(caller, name)

    @method("Login", "u uid, u process", "o session, s warning")
    async def login(self, caller: Caller, uid: int, process: int) -> tuple[str, str]:
        return await self._operations.log_in(caller, uid, process)

    @method("Logout", "u uid")
    async def logout(self, caller: Caller, uid: int) -> None:
        await self._operations.log_out(caller, uid)

    @method("BeginMaintenance", "s profile, s message, a{sv} options", "o session")
    async def begin_maintenance(
        self, caller: Caller, profile: str, message: str, options: Options
    ) -> str:
        return await self._operations.begin_maintenance(caller, profile, message, options)

    @method("FinishMaintenance", "a{sv} options", "o job")
    async def finish_maintenance(self, caller: Caller, options: Options) -> str:
        return await self._operations.finish_maintenance(caller, options)

    @method("CancelMaintenance", "a{sv} options")
    async def cancel_maintenance(self, caller: Caller, options: Options) -> None:
        await self._operations.cancel_maintenance(caller, options)

    @method("CloseSession", "s id, a{sv} options")
    async def close_session(self, caller: Caller, session_id: str, options: Options) -> None:
        await self._operations.close(caller, self._manager.get(session_id), options)


class SessionObject(Interface):
    """One session."""

    name = names.SESSION
    properties = (
        Property("Id", "s", Change.NEVER),
        Property("User", "s", Change.NEVER),
        Property("Uid", "u", Change.NEVER),
        Property("Profile", "s", Change.NEVER),
        Property("Image", "s", Change.NEVER),
        Property("MountPoint", "s", Change.NEVER),
        Property("Storage", "s"),
        Property("State", "s"),
        Property("Failure", "s"),
        Property("BytesUsed", "t", Change.SILENT),
        Property("BytesLimit", "t"),
        Property("InodesUsed", "t", Change.SILENT),
        Property("InodesLimit", "t"),
        Property("SpaceLevel", "s"),
        Property("Pending", "u"),
        Property("CreatedAt", "t", Change.NEVER),
        Property("LastReset", "t"),
        Property("NextReset", "t"),
        Property("NextResetReason", "s"),
        Property("Inhibitors", "a(ssut)"),
        Property("Keep", "as"),
        Property("Snapshots", "ao"),
        Property("LastJob", "o"),
    )
    signals = (RESET_DONE, RESET_SCHEDULED, SPACE_LOW)

    def __init__(self, session: Session, operations: Operations) -> None:
        self._session = session
        self._operations = operations

    def property_values(self) -> dict[str, object]:
        session = self._session
        usage = session.usage
        return {
            "Id": session.id,
            "User": shown(session.user),
            "Uid": session.uid,
            "Profile": shown(session.profile),
            "Image": shown(session.image),
            "MountPoint": shown(str(session.mount_point)),
            "Storage": session.storage.value,
            "State": session.state.value,
            "Failure": shown(session.failure),
            "BytesUsed": usage.bytes_used,
            "BytesLimit": usage.bytes_limit,
            "InodesUsed": usage.inodes_used,
            "InodesLimit": usage.inodes_limit,
            "SpaceLevel": session.space_level.value,
            "Pending": session.pending,
            "CreatedAt": microseconds(session.created_at),
            "LastReset": microseconds(session.last_reset),
            "NextReset": microseconds(session.timer.next_reset),
            "NextResetReason": session.timer.reason or "",
            "Inhibitors": [
                (shown(one.who), shown(one.why), one.uid, microseconds(one.since))
                for one in session.timer.inhibitors.all
            ],
            "Keep": [shown(rule) for rule in session.keep],
            "Snapshots": [names.snapshot_path(session.id, name) for name in session.snapshots],
            "LastJob": names.job_path(session.last_job.id) if session.last_job else "/",
        }

    @method("Reset", "a{sv} options", "o job")
    async def reset(self, caller: Caller, options: Options) -> str:
        return await self._operations.reset(caller, self._session, options)

    @method("ScheduleReset", "t at, a{sv} options")
    async def schedule_reset(self, caller: Caller, at: int, options: Options) -> None:
        await self._operations.schedule_reset(caller, self._session, at, options)

    @method("CancelScheduledReset")
    async def cancel_scheduled_reset(self, caller: Caller) -> None:
        await self._operations.cancel_scheduled_reset(caller, self._session)

    @method("Inhibit", "s who, s why", "h lock")
    async def inhibit(self, caller: Caller, who: str, why: str) -> int:
        return await self._operations.inhibit(caller, self._session, who, why)

    @method("Conflicts", "", "a(sauus) programs")
    async def conflicts(self, caller: Caller) -> list[tuple[str, list[int], int, str]]:
        return await self._operations.conflicts(caller, self._session)

    @method("Snapshot", "s name, a{sv} options", "o snapshot")
    async def snapshot(self, caller: Caller, name: str, options: Options) -> str:
        return await self._operations.snapshot(caller, self._session, name, options)

    @method("Restore", "s snapshot, a{sv} options", "o job")
    async def restore(self, caller: Caller, name: str, options: Options) -> str:
        return await self._operations.restore(caller, self._session, name, options)

    @method("Persist", "a{sv} options", "o job")
    async def persist(self, caller: Caller, options: Options) -> str:
        return await self._operations.persist(caller, self._session, options)

    @method("Rebase", "a{sv} options", "o job")
    async def rebase(self, caller: Caller, options: Options) -> str:
        return await self._operations.rebase(caller, self._session, options)

    @method("Commit", "as paths, a{sv} options", "o job")
    async def commit(self, caller: Caller, paths: list[str], options: Options) -> str:
        return await self._operations.commit(caller, self._session, paths, options)

    @method("Uncommit", "as paths, a{sv} options")
    async def uncommit(self, caller: Caller, paths: list[str], options: Options) -> None:
        await self._operations.uncommit(caller, self._session, paths, options)

    @method("Committed", "a{sv} options", "a(st) files")
    async def committed(self, caller: Caller, options: Options) -> list[tuple[str, int]]:
        return await self._operations.committed(caller, self._session, options)

    @method("SetKeep", "as rules, a{sv} options")
    async def set_keep(self, caller: Caller, rules: list[str], options: Options) -> None:
        await self._operations.set_keep(caller, self._session, rules, options)

    @method("Close", "a{sv} options")
    async def close(self, caller: Caller, options: Options) -> None:
        await self._operations.close(caller, self._session, options)

    @method("Import", "h source, s name, a{sv} options", "o job")
    async def import_snapshot(
        self, caller: Caller, source: int, name: str, options: Options
    ) -> str:
        return await self._operations.import_snapshot(caller, self._session, source, name, options)

    @method("Changes", "a{sv} options", "a{sv} summary")
    async def changes(self, caller: Caller, options: Options) -> dict[str, Variant]:
        return await self._operations.changes(caller, self._session, options)

    @method("OpenDiff", "a{sv} options", "h stream")
    async def open_diff(self, caller: Caller, options: Options) -> int:
        return await self._operations.open_diff(caller, self._session, options)

    @method("PendingFiles", "a{sv} options", "a(sas) files")
    async def pending_files(self, caller: Caller, options: Options) -> list[tuple[str, list[str]]]:
        return await self._operations.pending_files(caller, self._session, options)

    @method("OpenShadowed", "a{sv} options", "h stream")
    async def open_shadowed(self, caller: Caller, options: Options) -> int:
        return await self._operations.open_shadowed(caller, self._session, options)


class SnapshotObject(Interface):
    """One snapshot of a session."""

    name = names.SNAPSHOT
    properties = (
        Property("Name", "s", Change.NEVER),
        Property("Description", "s"),
        Property("CreatedAt", "t", Change.NEVER),
        Property("Parent", "o"),
        Property("Automatic", "b", Change.NEVER),
        Property("Pinned", "b"),
        Property("Inexact", "as"),
        Property("Size", "t"),
        Property("Exclusive", "t"),
        Property("SizeValid", "b"),
    )

    def __init__(self, session: Session, name: SnapshotName, operations: Operations) -> None:
        """`name`: of a snapshot that there is, for as long as this object is asked."""
        self._session = session
        self._name = name
        self._operations = operations

    def property_values(self) -> dict[str, object]:
        record = self._session.snapshots[self._name]
        size = self._session.snapshots.size(self._name)
        return {
            "Name": self._name,
            "Description": shown(record.description),
            "CreatedAt": microseconds(record.created_at),
            "Parent": self._parent(record.layers),
            "Automatic": record.automatic,
            "Pinned": record.pinned,
            "Inexact": [shown(path) for path in record.inexact],
            "Size": size.bytes,
            "Exclusive": size.exclusive,
            "SizeValid": size.known,
        }

    def _parent(self, layers: tuple[LayerNumber, ...]) -> str:
        """Return the path of the snapshot this one was built on, or ``/``."""
        below = [
            record
            for record in self._session.snapshots.values()
            if len(record.layers) < len(layers)
            and record.layers == layers[len(layers) - len(record.layers) :]
        ]
        if not below:
            return "/"
        nearest = max(below, key=lambda record: len(record.layers))
        return names.snapshot_path(self._session.id, nearest.name)

    @method("Delete")
    async def delete(self, caller: Caller) -> None:
        await self._operations.delete_snapshot(caller, self._session, self._name)

    @method("Rename", "s name")
    async def rename(self, caller: Caller, name: str) -> None:
        await self._operations.rename_snapshot(caller, self._session, self._name, name)

    @method("Describe", "s description")
    async def describe(self, caller: Caller, description: str) -> None:
        await self._operations.describe_snapshot(caller, self._session, self._name, description)

    @method("Pin", "b pinned")
    async def pin(self, caller: Caller, pinned: bool) -> None:
        await self._operations.pin_snapshot(caller, self._session, self._name, pinned)

    @method("Export", "h target, a{sv} options", "o job")
    async def export(self, caller: Caller, target: int, options: Options) -> str:
        return await self._operations.export_snapshot(
            caller, self._session, self._name, target, options
        )


class JobObject(Interface):
    """One running or finished operation on `session`."""

    name = names.JOB
    properties = (
        Property("Operation", "s", Change.NEVER),
        Property("Session", "s", Change.NEVER),
        Property("StartedByUid", "u", Change.NEVER),
        Property("Progress", "d"),
        Property("ProgressValid", "b"),
        Property("Bytes", "t"),
        Property("Conflicts", "a(sauus)"),
        Property("State", "s"),
        Property("ErrorName", "s"),
        Property("ErrorMessage", "s"),
    )
    signals = (COMPLETED,)

    def __init__(self, job: Job, session: Session) -> None:
        self._job = job
        self._session = session

    def property_values(self) -> dict[str, object]:
        job = self._job
        return {
            "Operation": job.operation.value,
            "Session": job.session,
            "StartedByUid": job.started_by,
            # Rounded, so that a job of a million steps is not as many signals.
            "Progress": round(job.progress, 2),
            "ProgressValid": job.progress_valid,
            "Bytes": job.bytes,
            "Conflicts": as_values(job.conflicts),
            "State": self._state(),
            "ErrorName": names.error_name(job.error) if job.error else "",
            "ErrorMessage": shown(str(job.error)) if job.error else "",
        }

    def _state(self) -> str:
        if not self._job.finished:
            return "running"
        return "failed" if self._job.error else "succeeded"

    @method("Cancel")
    async def cancel(self, caller: Caller) -> None:
        await authorise(caller, Action.CANCEL, self._session)
        self._job.cancel()
