"""The manager: all sessions of this machine, and what may be done to them.

One trio task tree; every method is called from it. Who may call what is not decided here but in
`bus`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import trio

from sessiond.config import Config, Profile, ResetTable, seconds
from sessiond.errors import (
    ImageUnavailable,
    NoSuchProfile,
    NoSuchSession,
    SessiondError,
    SessionExists,
)
from sessiond.session import mount_point, ram
from sessiond.session.accounts import Account, find_account, session_ids
from sessiond.session.activity import ActivityWatch
from sessiond.session.clock import Instant
from sessiond.session.faults import explained, quoted
from sessiond.session.guests import Guests
from sessiond.session.halting import Halting
from sessiond.session.images import Image, Images
from sessiond.session.jobs import Job
from sessiond.session.logins import ROOT, Login, Logins, Opening
from sessiond.session.maintenance import (
    DEFAULT_ID,
    MAINTAINER,
    Maintenance,
    MaintenanceRecord,
)
from sessiond.session.model import (
    Conflicts,
    DataPath,
    ImageChange,
    ImageSource,
    Quota,
    ResetRules,
    SessionId,
    SessionRecord,
    SessionState,
    SnapshotRules,
    SpaceThresholds,
    StorageKind,
    Uid,
)
from sessiond.session.model import (
    session_id as checked_session_id,
)
from sessiond.session.mounter import Mounter
from sessiond.session.mounts import Mounts, SystemMounts
from sessiond.session.observer import Observer
from sessiond.session.services import Services
from sessiond.session.session import Session
from sessiond.session.store import Store
from sessiond.session.surroundings import Surroundings

__all__ = ["Manager", "Observer", "Session", "open_manager"]

log = logging.getLogger(__name__)

_SPACE_SECONDS = 5.0
"""How often the storage of sessions is looked at, as long as anything is written to it."""
_UNTOLD_SECONDS = 60.0
"""How often otherwise, for what is written through mappings."""


@asynccontextmanager
async def open_manager(
    config: Config,
    mounter: Mounter,
    *,
    mounts: Mounts | None = None,
    surroundings: Surroundings | None = None,
    features: Sequence[str] = (),
) -> AsyncIterator[Manager]:
    """Run a manager, which has no sessions before its `start`.

    The way out leaves sessions as they are, as a crash would; `Manager.shut_down` or
    `Manager.leave` come before it. `mounts` is the kernel's unless given, and `surroundings` the
    machine's; `features` is what there is to be said of `mounter`.
    """
    async with trio.open_nursery() as nursery:
        runtime = config.daemon.runtime_directory.resolve()
        mounts = SystemMounts() if mounts is None else mounts
        services = Services(
            store=Store(runtime, config.daemon.state_directory.resolve(), mounts),
            images=Images(runtime, mounts),
            mounts=mounts,
            mounter=mounter,
            nursery=nursery,
            surroundings=Surroundings() if surroundings is None else surroundings,
            halting=Halting(runtime),
        )
        manager = Manager(config, services, runtime, features)
        try:
            yield manager
        finally:
            nursery.cancel_scope.cancel()


class Manager:
    """All sessions; made by `open_manager`.

    Invariant: a session is in `sessions` exactly while its record is on disk.
    """

    sessions: Mapping[SessionId, Session]
    guests: Guests
    features: tuple[str, ...]

    def __init__(
        self, config: Config, services: Services, runtime: Path, features: Sequence[str]
    ) -> None:
        self._config = config
        self._services = services
        self._runtime = runtime
        self._ram = ram.RamBudget(
            runtime / "sessions", config.daemon.volatile_limit, services.mounts
        )
        self._sessions: dict[SessionId, Session] = {}
        self._being_created: dict[SessionId, Path] = {}
        self._populated = trio.Event()
        self._activity = ActivityWatch()
        state = config.daemon.state_directory.resolve()
        self._maintenance = Maintenance(services, state, self.close)
        self._logins = Logins(
            services,
            self._sessions,
            lambda: self._config.login,
            Opening(
                self._create_at_login,
                self._start,
                self.close,
                lambda uid: self.guests.remove(uid),
            ),
            runtime,
        )
        self.guests = Guests(
            services, state, runtime, config.guests, self._close_all_of, self._is_served
        )
        self.sessions = self._sessions
        self.features = tuple(features)

    @property
    def profiles(self) -> tuple[str, ...]:
        """Names of the configured profiles."""
        return tuple(sorted(self._config.profile))

    @property
    def images(self) -> tuple[str, ...]:
        """Digests of the images that are mounted."""
        return self._services.images.digests

    @property
    def maintenance(self) -> MaintenanceRecord | None:
        """The maintenance that goes on, if one does."""
        return self._maintenance.record

    def observe(self, observer: Observer) -> None:
        """Tell `observer` of all that happens from now on."""
        self._services.observers.add(observer)

    def get(self, session_id: str) -> Session:
        """Return a session; raises `NoSuchSession`."""
        session = self._sessions.get(SessionId(session_id))
        if session is None:
            raise NoSuchSession(f"There is no session {quoted(session_id)}.")
        return session

    def by_uid(self, uid: Uid) -> Session:
        """Return the oldest session of a user; raises `NoSuchSession`."""
        owned = [session for session in self._sessions.values() if session.uid == uid]
        if not owned:
            raise NoSuchSession(f"The user with uid {uid} has no session.")
        return min(owned, key=lambda session: session.created_at)

    # Sessions come

    async def create(self, user: str, profile: str, *, session_id: str | None = None) -> Session:
        """Make a session of `profile` for `user` and mount it; the id is ``USER-N`` unless given.

        Raises `InvalidName`, `NoSuchProfile`, `SessionExists`, `ImageUnavailable`, `NoSpace`,
        `Busy` during a maintenance, `Failed`; nothing is left of it then.
        """
        settings = self._settings(profile)
        self._maintenance.require_none()
        return await self._create(user, profile, settings, session_id)

    def _settings(self, profile: str) -> Profile:
        settings = self._config.profile.get(profile)
        if settings is None:
            known = ", ".join(self.profiles) or "none"
            raise NoSuchProfile(
                f"There is no profile {quoted(profile)}; the profiles are: {known}."
            )
        return settings

    async def _create(
        self,
        user: str,
        profile: str,
        settings: Profile,
        session_id: str | None,
        *,
        maintenance: bool = False,
        login: bool = False,
    ) -> Session:
        account = await trio.to_thread.run_sync(find_account, user)
        new_id = self._unused_id(account, session_id)
        target = self._mount_point(settings, new_id, account)
        self._require_kept_unused(settings, account, profile)
        with self._creating(new_id, target):
            source = image_source(settings, new_id, account)
            self._require_no_view(source.path)
            if source.path != settings.image:
                what = f"image {source.path}, which is that of one user,"
                mount_point.resolve_trusted(source.path, what, "Put it elsewhere.")
            image = await self._services.images.acquire(source)
            began = Instant.now(self._services.surroundings.clock)
            record = _new_record(new_id, account, profile, settings, target, image, began)
            record = record.model_copy(update={"maintenance": maintenance, "login": login})
            session = Session(record, self._services, image)
            await self._bring_up(session, image, settings)
        self._add(session)
        return session

    async def _create_at_login(self, account: Account, profile: str) -> Session:
        self._maintenance.require_none()
        return await self._create(account.name, profile, self._settings(profile), None, login=True)

    def source_of(self, session: Session) -> ImageSource:
        """Return where the image of a session is now, by its profile if that is still there."""
        settings = self._config.profile.get(session.profile)
        if settings is None:
            return session.record.source
        return image_source(settings, session.id, Account(session.user, session.uid))

    async def _bring_up(self, session: Session, image: Image, settings: Profile) -> None:
        store, record = self._services.store, session.record

        def make_storage() -> None:
            size, inodes = limits = ram.limits(settings.size, settings.inodes)
            volatile = record.storage is StorageKind.TMPFS
            with self._ram.claim(record.id, limits) if volatile else nullcontext():
                store.create(record, size=str(size), inodes=inodes)
            store.make_upper(record, image.root, False)
            store.write(record)

        try:
            await self._services.nursery.start(session.run)
            await trio.to_thread.run_sync(make_storage)
            await session.start()
        except BaseException:
            with trio.CancelScope(shield=True):
                await session.end()
                try:
                    await self._remove(record)
                except SessiondError as undo:
                    # At the next start it is removed as garbage, or served if it has a record.
                    log.error("Session %s could not be undone: %s", record.id, undo)  # noqa: TRY400
            raise

    def _unused_id(self, account: Account, wanted: str | None) -> SessionId:
        if wanted is None:
            return next(name for name in session_ids(account) if self._user_of(name) is None)
        name = checked_session_id(wanted)
        user = self._user_of(name)
        if user is not None:
            raise SessionExists(f"There is a session {name} already ({user}); use another id.")
        return name

    def _user_of(self, session: SessionId) -> str | None:
        """Say who uses an id, if anyone does."""
        if session in self._sessions:
            return f"of user {self._sessions[session].user}"
        if session in self._being_created:
            return "it is being created"
        files = self._services.store.used_by(session)
        return None if files is None else f"it is not served, but there are files in {files}"

    def _mount_point(self, settings: Profile, session: SessionId, account: Account) -> Path:
        if settings.mount_point is None:
            return self._services.store.runtime_directory(session) / "root"
        path = Path(_filled_in(settings.mount_point, session, account))
        # Before anything looks at the path: the manager never touches a merged view.
        self._require_apart(path)
        resolved = mount_point.resolve(path)
        self._require_apart(resolved)
        return resolved

    def _require_kept_unused(self, settings: Profile, account: Account, profile: str) -> None:
        for session in self._sessions.values() if settings.keep is not None else ():
            record = session.record
            if (record.uid, record.profile) == (account.uid, profile) and record.keep is not None:
                raise SessionExists(
                    f"What is kept for {account.name} in profile {profile} is in use by session "
                    f"{session.id}; close that."
                )

    def _require_apart(self, path: Path) -> None:
        taken = {session.mount_point: session.id for session in self._sessions.values()}
        taken |= {target: session for session, target in self._being_created.items()}
        for other, session in taken.items():
            if path == other or path in other.parents or other in path.parents:
                raise SessionExists(
                    f"The mount point {path} is taken: session {session} is mounted at {other}. "
                    "Close that session, or put {id} into mount_point."
                )

    def _require_no_view(self, path: Path) -> None:
        """Raise `ImageUnavailable` for an image in a merged view, which the manager never touches:
        who serves that may be dead, and what is in it changes.
        """
        for session in self._sessions.values():
            if session.mount_point in (path, *path.parents) and session.view.mount is not None:
                raise ImageUnavailable(
                    f"{path} is in session {session.id}, which is mounted at "
                    f"{session.mount_point}, and cannot be an image meanwhile."
                )

    @contextmanager
    def _creating(self, session: SessionId, target: Path) -> Iterator[None]:
        self._being_created[session] = target
        try:
            yield
        finally:
            del self._being_created[session]

    def _add(self, session: Session) -> None:
        self._sessions[session.id] = session
        self._populated.set()
        self._activity.watch([self._services.store.storage(session.record)])
        session.listed = True
        self._services.observers.tell(lambda observer: observer.session_added(session))

    async def log_in(self, uid: Uid, process: int) -> Login:
        """See `Logins.log_in`."""
        return await self._logins.log_in(uid, process)

    # Sessions go

    async def log_out(self, uid: Uid) -> None:
        """See `Logins.log_out`."""
        await self._logins.log_out(uid)

    async def close(self, session_id: str) -> None:
        """Unmount a session and delete all its files; a job that runs in it is cancelled first.

        Raises `NoSuchSession`, also when it is being closed already, and `Failed`: then it is
        unmounted, but found again at the next start.
        """
        session = self.get(session_id)
        if session.state is SessionState.CLOSING:
            raise NoSuchSession(f"Session {session.id} is being closed already.")
        with trio.CancelScope(shield=True):
            await session.end()
            try:
                await self._remove(session.record)
            finally:
                self._drop(session)
                await self._maintenance.session_closed(session.id)
        if session.record.maintenance:
            await self._create_configured()

    async def _close_all_of(self, uid: Uid) -> None:
        for session in tuple(self._sessions.values()):
            if session.uid == uid and session.state is not SessionState.CLOSING:
                await self.close(session.id)

    def _is_served(self, uid: Uid) -> bool:
        return any(session.uid == uid for session in self._sessions.values())

    async def _remove(self, record: SessionRecord) -> None:
        self._services.delete_soon(await trio.to_thread.run_sync(self._forget, record))

    def _forget(self, record: SessionRecord) -> tuple[Path, ...]:
        """Give up a session; return what is to be deleted."""
        store = self._services.store
        store.forget(record)
        return tuple(path for kind in StorageKind for path in store.discard(record.id, kind))

    def _drop(self, session: Session) -> None:
        del self._sessions[session.id]
        if not self._sessions:
            self._populated = trio.Event()
        session.listed = False
        self._services.observers.tell(lambda observer: observer.session_removed(session))

    # Maintenance of an image

    async def begin_maintenance(
        self, profile: str, message: str, *, session_id: str | None = None, started_by: Uid
    ) -> Session:
        """Make root's session on the image of `profile`, and no others until that has ended.

        Its changes are on disk, whatever the profile says. Raises `Busy` if there is a maintenance,
        `NoSuchProfile`, `NotSupported` for an image that cannot be replaced by a new one, and what
        `create` raises; all is as before then.
        """
        settings = self._settings(profile)
        new_id = checked_session_id(DEFAULT_ID if session_id is None else session_id)
        on_disk = settings.model_copy(
            update={
                "storage": "persistent",
                "quota": None,
                "quota_inodes": None,
                "mount_point": None,
                "image_changed": "refuse",
                # All that is done in it has to be in the new image, and to stay until then.
                "keep": None,
                "keep_quota": None,
                "keep_quota_inodes": None,
                "reset": ResetTable(),
            }
        )
        return await self._maintenance.begin(
            profile,
            image_source(settings, new_id, Account(MAINTAINER, ROOT)),
            message,
            partial(self._create, MAINTAINER, profile, on_disk, new_id, maintenance=True),
            new_id,
            started_by,
        )

    def finish_maintenance(self, *, started_by: Uid) -> Job:
        """Make a new image of the session, put it in place, and end the maintenance.

        If that fails, it goes on. Raises `Busy`, and `Failed` if there is none.
        """
        session = self.get(self._maintenance.require().session)
        return self._maintenance.finish(session, started_by=started_by)

    async def cancel_maintenance(self) -> None:
        """End the maintenance; the image is as it was. Raises `Failed`, also if there is none."""
        await self.close(self._maintenance.require().session)

    # The manager's own life

    async def start(self) -> None:
        """Serve again the sessions that there were, then create those that are configured.

        A session that cannot be served is logged, and FAILED if it existed before; the others are
        served. Raises `Failed`, `NoSpace` when nothing can be served at all.
        """
        store, mounts = self._services.store, self._services.mounts
        # First of all: programs stand still.
        await trio.to_thread.run_sync(self._services.halting.end_left)
        await trio.to_thread.run_sync(store.prepare)
        await self._logins.recover()
        mounter = self._services.mounter
        await trio.to_thread.run_sync(
            _detach_stale_views, mounts, self._runtime / "sessions", mounter.left()
        )
        await self._services.images.prepare()
        found = await trio.to_thread.run_sync(store.load)
        await trio.to_thread.run_sync(self.guests.load)
        ended = await trio.to_thread.run_sync(self._maintenance.recover, found.records)
        ended |= {one.id for one in found.records if self.guests.has_gone(one.uid)}
        garbage = list(found.garbage)
        for record in found.records:
            if record.id in ended:
                garbage += await trio.to_thread.run_sync(self._forget, record)
        await self._maintenance.recovered()
        async with trio.open_nursery() as nursery:
            for record in found.records:
                if record.id in ended:
                    continue
                session = Session(record, self._services)
                if record.id in found.jobs:
                    await session.turn.recover_job(found.jobs[record.id])
                await self._services.nursery.start(session.run)
                self._add(session)
                wanted = not record.login or self._logins.is_here(record.uid)
                if wanted or record.id in mounter.left():
                    nursery.start_soon(self._start_again, session)
                else:
                    await session.rest()
        self._logins.leave_absent()
        # After that: a worker may have to be told first that it serves something else now.
        await mounter.forget_left()
        # What was left of sessions that are not served; some have been moved since.
        for name in ("sessions", "set-aside", "trash"):
            await trio.to_thread.run_sync(
                _detach_stale_views, mounts, self._runtime / name, frozenset(self._sessions)
            )
        await self.guests.recover()
        await self._services.images.unmount_unused()
        self._services.delete_soon(garbage)
        self._services.nursery.start_soon(self._watch_space)
        self._services.nursery.start_soon(self._services.images.watch)
        await self._create_configured()

    async def reload(self, config: Config) -> None:
        """Use `config` for new sessions, create those that are new in it, retry those that FAILED.

        The directories stay where they are.
        """
        if config.daemon != self._config.daemon:
            log.warning("Changes in [daemon] take effect when sessiond is restarted.")
        before, self._config = self._config, config
        self.guests.settings = config.guests
        for session in tuple(self._sessions.values()):
            self._services.nursery.start_soon(self._reload_keep, session, before)
            if session.state is SessionState.FAILED:
                await self._start_again(session)
        await self._create_configured()

    async def _reload_keep(self, session: Session, before: Config) -> None:
        profile, old = (one.profile.get(session.profile) for one in (self._config, before))
        if profile is None or profile.keep is None or session.record.keep is None:
            return
        if old is not None and old.keep == profile.keep:
            return
        try:
            await session.set_keep(list(profile.keep), when_idle=True)
        except SessiondError as error:
            log.error(  # noqa: TRY400
                "Session %s keeps by its rules of before: %s", session.id, error
            )

    async def shut_down(self) -> None:
        """End all sessions: volatile ones for good, persistent ones until the next start."""
        async with trio.open_nursery() as nursery:
            for session in tuple(self._sessions.values()):
                nursery.start_soon(self._shut_down, session)

    async def leave(self) -> None:
        """Stop what is going on in sessions, and leave them mounted for the next manager."""
        async with trio.open_nursery() as nursery:
            for session in tuple(self._sessions.values()):
                nursery.start_soon(session.leave)

    async def _shut_down(self, session: Session) -> None:
        if session.state is SessionState.CLOSING:
            return  # whoever closes it goes on with that to the end
        store = self._services.store
        await session.end()
        try:
            if session.storage is StorageKind.TMPFS:
                await trio.to_thread.run_sync(store.forget, session.record)
            garbage = await trio.to_thread.run_sync(store.discard, session.id, StorageKind.TMPFS)
            await self._services.delete_trees(garbage)
        except SessiondError as error:
            log.error("Session %s is not ended cleanly: %s", session.id, error)  # noqa: TRY400
        self._drop(session)

    async def _start(self, session: Session) -> None:
        await session.start(again=True, source=self.source_of(session))

    async def _start_again(self, session: Session) -> None:
        try:
            await self._start(session)
        except SessiondError as error:
            log.error("Session %s is not served: %s", session.id, error)  # noqa: TRY400

    async def _create_configured(self) -> None:
        if self.maintenance is not None:
            return  # they are created when that has ended
        for name, wanted in self._config.session.items():
            if name in self._sessions:
                continue
            try:
                await self.create(wanted.user, wanted.profile, session_id=name)
            except SessiondError as error:
                log.error("Session %s is not created: %s", name, error)  # noqa: TRY400

    async def _watch_space(self) -> None:
        with closing(self._activity) as activity:
            while True:
                await self._populated.wait()
                sessions = tuple(self._sessions.values())
                # First, so that nothing is missed that is written while they are looked at.
                watched = activity.watch(
                    self._services.store.storage(session.record) for session in sessions
                )
                for session in sessions:
                    session.check_space()
                if watched:
                    with trio.move_on_after(_UNTOLD_SECONDS):
                        await activity.wait()
                await trio.sleep(_SPACE_SECONDS)


def image_source(settings: Profile, session: SessionId, account: Account) -> ImageSource:
    """Return where a profile has the image of a session."""
    return ImageSource(
        path=Path(_filled_in(str(settings.image), session, account)),
        verity_root_hash=settings.verity_root_hash,
        verity_hash_device=settings.verity_hash_device,
    )


def _filled_in(pattern: str, session: SessionId, account: Account) -> str:
    return pattern.format(id=session, user=account.name, uid=account.uid)


def _new_record(
    session: SessionId,
    account: Account,
    profile: str,
    settings: Profile,
    target: Path,
    image: Image,
    began: Instant,
) -> SessionRecord:
    unprivileged = account.uid != 0
    return SessionRecord(
        id=session,
        user=account.name,
        uid=account.uid,
        profile=profile,
        source=image.source,
        image=image.digest,
        image_built=image.built,
        image_changed=ImageChange(settings.image_changed),
        rebase_conflicts=Conflicts(settings.rebase_conflicts),
        mount_point=target,
        nosuid=unprivileged if settings.nosuid is None else settings.nosuid,
        nodev=unprivileged if settings.nodev is None else settings.nodev,
        data_path=DataPath(settings.data_path),
        cgroup=None if settings.cgroup is None else _filled_in(settings.cgroup, session, account),
        storage=StorageKind(settings.storage),
        quota=_quota(settings.quota, settings.quota_inodes),
        keep=settings.keep,
        keep_quota=_quota(settings.keep_quota, settings.keep_quota_inodes),
        thresholds=SpaceThresholds(
            warning=settings.space_warning, critical=settings.space_critical
        ),
        snapshot_rules=_snapshot_rules(settings),
        flatten_above=settings.snapshots.flatten_above,
        created_at=began.wall,
        began=began,
        reset_rules=_reset_rules(settings.reset),
    )


def _reset_rules(table: ResetTable) -> ResetRules:
    return ResetRules(
        idle=None if table.idle is None else seconds(table.idle),
        after=None if table.after is None else seconds(table.after),
        daily=table.daily,
        warning=seconds(table.warning),
        inhibit=seconds(table.inhibit),
        terminate=table.terminate,
        grace=seconds(table.grace),
    )


def _snapshot_rules(settings: Profile) -> SnapshotRules:
    rule = settings.snapshots
    most = None if rule.max_bytes is None else ram.size_in_bytes(rule.max_bytes)
    every = None if rule.every is None else seconds(rule.every)
    return SnapshotRules(count=rule.count, daily=rule.daily, max_bytes=most, every=every)


def _quota(limit: str | None, inodes: int | None) -> Quota | None:
    if limit is None:
        return None
    size = ram.size_in_bytes(limit)
    return Quota(bytes=size, inodes=ram.default_inodes(size) if inodes is None else inodes)


def _detach_stale_views(mounts: Mounts, directory: Path, kept: Collection[SessionId]) -> None:
    """Take away the merged views that a daemon has left, but those of `kept`; the storage of
    volatile sessions stays.
    """
    with explained(f"detach what is mounted below {directory}"):
        # The upper ones first: what is below one goes with it, and could not be reached through it.
        for target in reversed(mounts.mounted_below(directory)):
            session = target.relative_to(directory).parts[0]
            if session not in kept and target != directory / session / "storage":
                log.info("%s is unmounted: another sessiond has left it there.", target)
                mounts.detach(target)
