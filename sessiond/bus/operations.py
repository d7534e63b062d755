"""What callers can do to sessions: authorised, options checked, carried out, answered by a path.

Sessions are called on by their own objects and, by id, by the manager's; both end here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sessiond.bus import names
from sessiond.bus.authorisation import Action, NewSession, authorise
from sessiond.bus.comparisons import Comparisons
from sessiond.bus.interface import Caller
from sessiond.bus.options import (
    CompareOptions,
    CreateOptions,
    DiffOptions,
    NoOptions,
    PersistOptions,
    RestoreOptions,
    SnapshotOptions,
    parse,
)
from sessiond.bus.wire import Variant, shown
from sessiond.errors import NoSuchSession
from sessiond.session.jobs import Job
from sessiond.session.manager import Manager, Session

Options = Mapping[str, object]


class Operations:
    """See the module; `publish` makes a job known on the bus and returns its path.

    All raise `NotAuthorized`, `InvalidOption` where they take options, and what the manager raises.
    """

    def __init__(self, manager: Manager, publish: Callable[[Job], str]) -> None:
        self._manager = manager
        self._publish = publish
        self._comparisons = Comparisons()

    async def create(self, caller: Caller, user: str, profile: str, options: Options) -> str:
        chosen = parse(CreateOptions, options)
        await authorise(caller, Action.CREATE, NewSession(chosen.id or "", user, profile))
        session = await self._manager.create(user, profile, session_id=chosen.id)
        return names.session_path(session.id)

    async def reset(self, caller: Caller, session: Session, options: Options) -> str:
        uid = await authorise(caller, Action.RESET, session)
        parse(NoOptions, options)
        return self._publish(session.reset(started_by=uid))

    async def snapshot(self, caller: Caller, session: Session, name: str, options: Options) -> str:
        await authorise(caller, Action.SNAPSHOT, session)
        chosen = parse(SnapshotOptions, options)
        record = await session.snapshot(name, description=chosen.description, pinned=chosen.pinned)
        return names.snapshot_path(session.id, record.name)

    async def restore(self, caller: Caller, session: Session, name: str, options: Options) -> str:
        uid = await authorise(caller, Action.RESTORE, session)
        chosen = parse(RestoreOptions, options)
        return self._publish(session.restore(name, started_by=uid, undo=chosen.undo))

    async def persist(self, caller: Caller, session: Session, options: Options) -> str:
        uid = await authorise(caller, Action.PERSIST, session)
        chosen = parse(PersistOptions, options)
        return self._publish(session.persist(started_by=uid, verify=chosen.verify))

    async def commit(
        self, caller: Caller, session: Session, paths: list[str], options: Options
    ) -> str:
        uid = await authorise(caller, Action.COMMIT, session)
        parse(NoOptions, options)
        return self._publish(session.commit(paths, started_by=uid))

    async def set_keep(
        self, caller: Caller, session: Session, rules: list[str], options: Options
    ) -> None:
        # The profile's rules are root's, whoever owns the session.
        await authorise(caller, Action.KEEP, NewSession(session.id, session.user, session.profile))
        parse(NoOptions, options)
        await session.set_keep(rules)

    async def close(self, caller: Caller, session: Session, options: Options) -> None:
        await authorise(caller, Action.CLOSE, session)
        parse(NoOptions, options)
        # Permission may have taken minutes: there may be another session of that id by now.
        if self._manager.get(session.id) is not session:
            raise NoSuchSession(f"Session {session.id} has been closed already.")
        await self._manager.close(session.id)

    async def changes(
        self, caller: Caller, session: Session, options: Options
    ) -> dict[str, Variant]:
        uid = await authorise(caller, Action.COMPARE, session)
        asked = parse(CompareOptions, options)
        summary = await self._comparisons.count(uid, session, (asked.start, asked.end))
        return {
            "added": Variant("t", summary.added),
            "changed": Variant("t", summary.changed),
            "deleted": Variant("t", summary.deleted),
            "renamed": Variant("t", summary.renamed),
            "bytes": Variant("t", summary.bytes),
            "largest": Variant("a(sst)", [(shown(path), *what) for path, *what in summary.largest]),
        }

    async def open_diff(self, caller: Caller, session: Session, options: Options) -> int:
        uid = await authorise(caller, Action.COMPARE, session)
        asked = parse(DiffOptions, options)
        states = (asked.start, asked.end)
        return self._comparisons.open_list(
            uid, session, states, caller.start_soon, content=asked.content
        )

    async def pending_files(
        self, caller: Caller, session: Session, options: Options
    ) -> list[tuple[str, list[str]]]:
        await authorise(caller, Action.COMPARE, session)
        parse(NoOptions, options)
        return [
            (shown(file.path), [shown(program) for program in file.programs])
            for file in await session.pending_files()
        ]

    async def delete_snapshot(self, caller: Caller, session: Session, name: str) -> None:
        await authorise(caller, Action.EDIT_SNAPSHOT, session)
        await session.delete_snapshot(name)

    async def rename_snapshot(
        self, caller: Caller, session: Session, name: str, new_name: str
    ) -> None:
        await authorise(caller, Action.EDIT_SNAPSHOT, session)
        await session.rename_snapshot(name, new_name)

    async def describe_snapshot(
        self, caller: Caller, session: Session, name: str, description: str
    ) -> None:
        await authorise(caller, Action.EDIT_SNAPSHOT, session)
        await session.describe_snapshot(name, description)

    async def pin_snapshot(self, caller: Caller, session: Session, name: str, pinned: bool) -> None:
        await authorise(caller, Action.EDIT_SNAPSHOT, session)
        await session.pin_snapshot(name, pinned)
