"""What callers can do to sessions: authorised, options checked, carried out, answered by a path.

Sessions are called on by their own objects and, by id, by the manager's; both end here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial

from sessiond.bus import names
from sessiond.bus.authorisation import Action, NewSession, apart_from_owner, authorise
from sessiond.bus.comparisons import Comparisons
from sessiond.bus.interface import Caller
from sessiond.bus.limits import ROOT, Limit
from sessiond.bus.options import (
    ChangesOptions,
    CreateOptions,
    DiffOptions,
    ExportOptions,
    ImportOptions,
    NoOptions,
    PersistOptions,
    RebaseOptions,
    ResetOptions,
    RestoreOptions,
    ScheduleOptions,
    SnapshotOptions,
    UncommitOptions,
    parse,
)
from sessiond.bus.wire import BusError, Variant, shown
from sessiond.errors import InvalidOption, NoSuchSession
from sessiond.session.conflicts import Program
from sessiond.session.jobs import Job
from sessiond.session.manager import Manager, Session
from sessiond.session.model import ArchiveKind, Breakdown, Conflicts, Uid

Options = Mapping[str, object]

EPOCH = datetime.fromtimestamp(0, UTC)
"""From which the bus counts times."""

INHIBITORS_OF_USER = 16
"""In one session."""
INHIBITOR_TEXT_LIMIT = 200

SEARCHES_OF_USER = 2
"""Each takes a process for a moment."""

SUMS_OF_USER = 2
"""Each looks at all files that were committed."""


def as_values(programs: Iterable[Program]) -> list[tuple[str, list[int], int, str]]:
    """Return programs as the bus has them, ``a(sauus)``."""
    return [(shown(one.name), list(one.pids), one.uid, shown(one.unit)) for one in programs]


def _moment(microseconds: int) -> datetime | None:
    """Return a time of the bus; None for 0, never. Raises `InvalidOption`."""
    try:
        return EPOCH + timedelta(microseconds=microseconds) if microseconds else None
    except OverflowError:
        raise InvalidOption("'at' is too far away: microseconds since 1970 are needed.") from None


class Operations:
    """See the module; `publish` makes a job known on the bus and returns its path.

    All raise `NotAuthorized`, `InvalidOption` where they take options, and what the manager raises.
    """

    def __init__(self, manager: Manager, publish: Callable[[Job], str]) -> None:
        self._manager = manager
        self._publish = publish
        self._comparisons = Comparisons()
        self._searches = Limit(
            SEARCHES_OF_USER,
            "You are looking for programs {most} times, the most that a user may at once. Wait for "
            "an answer, then try again.",
            exempt={ROOT},
        )
        self._sums = Limit(
            SUMS_OF_USER,
            "You ask {most} times what was committed, the most that a user may at once. Wait for "
            "an answer, then try again.",
            exempt={ROOT},
        )

    async def create(self, caller: Caller, user: str, profile: str, options: Options) -> str:
        chosen = parse(CreateOptions, options)
        await authorise(caller, Action.CREATE, NewSession(chosen.id or "", user, profile))
        session = await self._manager.create(user, profile, session_id=chosen.id)
        return names.session_path(session.id)

    async def create_guest(self, caller: Caller) -> tuple[str, int]:
        await authorise(caller, Action.GUESTS)
        return await self._manager.guests.create()

    async def remove_guest(self, caller: Caller, name: str) -> None:
        await authorise(caller, Action.GUESTS, NewSession("", name, ""))
        guests = self._manager.guests
        await guests.remove(guests.uid_of(name))

    async def log_in(self, caller: Caller, uid: int, process: int) -> tuple[str, str]:
        await authorise(caller, Action.LOG_IN, NewSession("", str(uid), ""))
        login = await self._manager.log_in(Uid(uid), process)
        path = "/" if login.session is None else names.session_path(login.session.id)
        return path, shown(login.warning)

    async def log_out(self, caller: Caller, uid: int) -> None:
        await authorise(caller, Action.LOG_IN, NewSession("", str(uid), ""))
        await self._manager.log_out(Uid(uid))

    async def begin_maintenance(
        self, caller: Caller, profile: str, message: str, options: Options
    ) -> str:
        uid = await authorise(caller, Action.MAINTAIN)
        chosen = parse(CreateOptions, options)
        session = await self._manager.begin_maintenance(
            profile, message, session_id=chosen.id, started_by=uid
        )
        return names.session_path(session.id)

    async def finish_maintenance(self, caller: Caller, options: Options) -> str:
        uid = await authorise(caller, Action.MAINTAIN)
        parse(NoOptions, options)
        return self._publish(self._manager.finish_maintenance(started_by=uid))

    async def cancel_maintenance(self, caller: Caller, options: Options) -> None:
        await authorise(caller, Action.MAINTAIN)
        parse(NoOptions, options)
        await self._manager.cancel_maintenance()

    async def reset(self, caller: Caller, session: Session, options: Options) -> str:
        uid = await authorise(caller, Action.RESET, session)
        manner = parse(ResetOptions, options).manner()
        await session.undisturbed()
        return self._publish(session.reset(started_by=uid, manner=manner))

    async def schedule_reset(
        self, caller: Caller, session: Session, at: int, options: Options
    ) -> None:
        uid = await authorise(caller, Action.RESET, session)
        chosen = parse(ScheduleOptions, options)
        await session.timer.schedule(
            uid,
            at=_moment(at),
            after=chosen.after,
            idle=chosen.idle,
            warning=chosen.warning,
            manner=chosen.manner(),
        )

    async def cancel_scheduled_reset(self, caller: Caller, session: Session) -> None:
        uid = await authorise(caller, Action.RESET, session)
        await session.timer.cancel(uid)

    async def inhibit(self, caller: Caller, session: Session, who: str, why: str) -> int:
        uid = await authorise(caller, Action.INHIBIT, session)
        for text, name in ((who, "who"), (why, "why")):
            if len(text) > INHIBITOR_TEXT_LIMIT:
                raise InvalidOption(f"{name!r} has more than {INHIBITOR_TEXT_LIMIT} characters.")
        inhibitors = session.timer.inhibitors
        own = sum(one.uid == uid for one in inhibitors.all)
        if own >= INHIBITORS_OF_USER:
            raise BusError(
                names.LIMITS_EXCEEDED,
                f"You hold back resets of this session {own} times, which is the most. Close a "
                "descriptor, then try again.",
            )
        return inhibitors.add(uid, who, why)

    async def conflicts(
        self, caller: Caller, session: Session
    ) -> list[tuple[str, list[int], int, str]]:
        caller_uid = await authorise(caller, Action.LIST_CONFLICTS, session)
        with self._searches.share(caller_uid):
            return as_values(await session.conflicts())

    async def snapshot(self, caller: Caller, session: Session, name: str, options: Options) -> str:
        await authorise(caller, Action.SNAPSHOT, session)
        chosen = parse(SnapshotOptions, options)
        await session.undisturbed()
        record = await session.snapshots.make(
            name, description=chosen.description, pinned=chosen.pinned
        )
        return names.snapshot_path(session.id, record.name)

    async def restore(self, caller: Caller, session: Session, name: str, options: Options) -> str:
        uid = await authorise(caller, Action.RESTORE, session)
        chosen = parse(RestoreOptions, options)
        await session.undisturbed()
        return self._publish(
            session.restore(name, started_by=uid, manner=chosen.manner(), undo=chosen.undo)
        )

    async def persist(self, caller: Caller, session: Session, options: Options) -> str:
        uid = await authorise(caller, Action.PERSIST, session)
        chosen = parse(PersistOptions, options)
        await session.undisturbed()
        return self._publish(session.persist(started_by=uid, verify=chosen.verify))

    async def rebase(self, caller: Caller, session: Session, options: Options) -> str:
        uid = await authorise(caller, Action.REBASE, session)
        chosen = parse(RebaseOptions, options)
        conflicts = None if chosen.conflicts is None else Conflicts(chosen.conflicts)
        source = self._manager.source_of(session)
        return self._publish(
            session.rebase(source, conflicts=conflicts, remount=chosen.remount, started_by=uid)
        )

    async def commit(
        self, caller: Caller, session: Session, paths: list[str], options: Options
    ) -> str:
        uid = await authorise(caller, Action.COMMIT, session)
        parse(NoOptions, options)
        await session.undisturbed()
        return self._publish(session.commit(paths, started_by=uid))

    async def uncommit(
        self, caller: Caller, session: Session, paths: list[str], options: Options
    ) -> None:
        await authorise(caller, Action.COMMIT, session)
        chosen = parse(UncommitOptions, options)
        await session.undisturbed()
        await session.uncommit(paths, delete=chosen.delete)

    async def committed(
        self, caller: Caller, session: Session, options: Options
    ) -> list[tuple[str, int]]:
        uid = await authorise(caller, Action.COMPARE, session)
        parse(NoOptions, options)
        with self._sums.share(uid):
            return [(shown(one.path), one.bytes) for one in await session.committed()]

    async def set_keep(
        self, caller: Caller, session: Session, rules: list[str], options: Options
    ) -> None:
        # The profile's rules are root's, whoever owns the session.
        await authorise(caller, Action.KEEP, NewSession(session.id, session.user, session.profile))
        parse(NoOptions, options)
        await session.set_keep(rules)

    async def close(self, caller: Caller, session: Session, options: Options) -> None:
        # What a login's session covers may be its user's own directory, and the image: once it is
        # uncovered, they can change that for good.
        await authorise(
            caller, Action.CLOSE, apart_from_owner(session) if session.of_login else session
        )
        parse(NoOptions, options)
        # Permission may have taken minutes: there may be another session of that id by now.
        if self._manager.get(session.id) is not session:
            raise NoSuchSession(f"Session {session.id} has been closed already.")
        await self._manager.close(session.id)

    async def changes(
        self, caller: Caller, session: Session, options: Options
    ) -> dict[str, Variant]:
        uid = await authorise(caller, Action.COMPARE, session)
        asked = parse(ChangesOptions, options)
        breakdown = Breakdown(asked.directories, asked.depth)
        states = (asked.start, asked.end)
        summary = await self._comparisons.count(uid, session, states, breakdown)
        return {
            "added": Variant("t", summary.added),
            "changed": Variant("t", summary.changed),
            "deleted": Variant("t", summary.deleted),
            "renamed": Variant("t", summary.renamed),
            "bytes": Variant("t", summary.bytes),
            "largest": Variant("a(sst)", [(shown(path), *what) for path, *what in summary.largest]),
            "directories": Variant(
                "a(sttttt)", [(shown(path), *sums) for path, *sums in summary.directories]
            ),
        }

    async def open_diff(self, caller: Caller, session: Session, options: Options) -> int:
        uid = await authorise(caller, Action.COMPARE, session)
        asked = parse(DiffOptions, options)
        session.snapshots.require(asked.start, asked.end)
        reader = uid if asked.content else None
        write = partial(session.differences.write, start=asked.start, end=asked.end, reader=reader)
        return self._comparisons.open_list(uid, session, write, caller.start_soon)

    async def pending_files(
        self, caller: Caller, session: Session, options: Options
    ) -> list[tuple[str, list[str]]]:
        await authorise(caller, Action.COMPARE, session)
        parse(NoOptions, options)
        return [
            (shown(file.path), [shown(program) for program in file.programs])
            for file in await session.pending_files()
        ]

    async def open_shadowed(self, caller: Caller, session: Session, options: Options) -> int:
        uid = await authorise(caller, Action.COMPARE, session)
        parse(NoOptions, options)
        write = partial(session.differences.shadowed, self._manager.source_of(session))
        return self._comparisons.open_list(uid, session, write, caller.start_soon)

    async def export_snapshot(
        self, caller: Caller, session: Session, name: str, target: int, options: Options
    ) -> str:
        # Not for owners: a snapshot has files in it that they may not read in the merged view.
        uid = await authorise(caller, Action.EXPORT, apart_from_owner(session))
        kind = ArchiveKind(parse(ExportOptions, options).format)
        return self._publish(session.snapshots.export(name, target, kind, started_by=uid))

    async def import_snapshot(
        self, caller: Caller, session: Session, source: int, name: str, options: Options
    ) -> str:
        # Nor this: an archive may have files of others in it, set-user-ID programs, devices.
        uid = await authorise(caller, Action.IMPORT, apart_from_owner(session))
        chosen = parse(ImportOptions, options)
        description = chosen.description
        job = session.snapshots.add(name, source, description=description, started_by=uid)
        return self._publish(job)

    async def delete_snapshot(self, caller: Caller, session: Session, name: str) -> None:
        await authorise(caller, Action.EDIT_SNAPSHOT, session)
        await session.undisturbed()
        await session.snapshots.delete(name)

    async def rename_snapshot(
        self, caller: Caller, session: Session, name: str, new_name: str
    ) -> None:
        await authorise(caller, Action.EDIT_SNAPSHOT, session)
        await session.undisturbed()
        await session.snapshots.rename(name, new_name)

    async def describe_snapshot(
        self, caller: Caller, session: Session, name: str, description: str
    ) -> None:
        await authorise(caller, Action.EDIT_SNAPSHOT, session)
        await session.snapshots.describe(name, description)

    async def pin_snapshot(self, caller: Caller, session: Session, name: str, pinned: bool) -> None:
        await authorise(caller, Action.EDIT_SNAPSHOT, session)
        await session.snapshots.pin(name, pinned)
