"""Logins: sessions that are there while their user is.

A user is here as long as systemd's user manager runs for them, or a process that has let them in,
as PAM calls it: `login`, `sshd`, a display manager's, `cron`. All of these are watched rather than
believed: what dies without a word has gone, also while no manager was there to see it. Only that
the user manager goes has to be said, by its unit; after a restart it is looked at.

When nobody keeps it any more, a session in RAM is closed, and one on disk is unmounted until its
user comes back. A guest is removed.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import trio
from pydantic import BaseModel, ConfigDict, ValidationError

from sessiond.config import LoginTable
from sessiond.errors import Busy, InvalidOption, SessiondError
from sessiond.journal import Event, event
from sessiond.session import conflicts, durable, guests
from sessiond.session.accounts import Account, account_of, groups_of
from sessiond.session.faults import explained
from sessiond.session.guests import is_guests
from sessiond.session.model import SessionId, SessionState, StorageKind, Uid
from sessiond.session.services import Services
from sessiond.session.session import Session

log = logging.getLogger(__name__)

ROOT = Uid(0)
FIRST_PERSON = 1000
"""Lowest uid of accounts that are people's, as in login.defs(5)."""
NOBODY = 65534

USER_RUNTIME_DIRECTORIES = Path("/run/user")
"""systemd has a directory there while a user's manager runs (user-runtime-dir@.service)."""


class _Process(NamedTuple):
    """A process, which is not mistaken for a later one with its pid."""

    pid: int
    started: int
    """In clock ticks since the machine has started, as proc_pid_stat(5) has it."""


class _Presence(BaseModel):
    """What keeps a user's session."""

    model_config = ConfigDict(extra="forbid")

    user_manager: bool = False
    processes: set[_Process] = set()

    @property
    def is_over(self) -> bool:
        return not (self.user_manager or self.processes)


class _Presences(BaseModel):
    """All of them, as they are noted for the next manager."""

    model_config = ConfigDict(extra="forbid")

    users: dict[Uid, _Presence] = {}


def find_rule(rules: Mapping[str, LoginTable], uid: Uid) -> tuple[Account, str, LoginTable] | None:
    """Return who has `uid`, and the name of the rule for them, and that; None if there is none.

    Takes as long as where accounts come from. Raises `Failed`, `InvalidName`.
    """
    with explained("find the user who logs in"):
        account = None if uid == ROOT else account_of(uid)  # somebody has to be able to mend things
        if account is None:
            return None
        person = account.uid >= FIRST_PERSON and account.uid != NOBODY
        for name, rule in rules.items():
            if not (person if rule.user is None else account.name in rule.user):
                continue
            if rule.group is not None and groups_of(account).isdisjoint(rule.group):
                continue
            if rule.class_ == "guest" and not is_guests(uid):
                continue
            return account, name, rule
    return None


class Login(NamedTuple):
    """What has become of a login."""

    session: Session | None
    warning: str = ""
    """What the user has to know, as sentences: why there is no session although there should be."""


@dataclass(frozen=True)
class Opening:
    """What the manager does for logins."""

    make: Callable[[Account, str], Awaitable[Session]]
    """Make a session of a profile."""
    start: Callable[[Session], Awaitable[None]]
    """Mount one that is not; raises what prevents it."""
    close: Callable[[str], Awaitable[None]]
    remove_guest: Callable[[Uid], Awaitable[None]]
    """With their sessions."""


class Logins:
    """Who is here, and what is done about it."""

    def __init__(
        self,
        services: Services,
        sessions: Mapping[SessionId, Session],
        rules: Callable[[], Mapping[str, LoginTable]],
        opening: Opening,
        runtime: Path,
    ) -> None:
        self._services = services
        self._sessions = sessions
        self._rules = rules
        self._opening = opening
        self._file = runtime / "logins.json"
        self._here: dict[Uid, _Presence] = {}
        self._gone: list[Uid] = []
        """Guests who have gone while no manager was there."""
        self._locks: defaultdict[Uid, trio.Lock] = defaultdict(trio.Lock)

    # They come

    async def log_in(self, uid: Uid, process: int) -> Login:
        """Open the session of a user as the rules say, unless it is; for as long as `process` is
        there, or the user's manager if that is 0.

        Raises what prevents it, if the login is to be refused for that.
        """
        found = await trio.to_thread.run_sync(find_rule, self._rules(), uid)
        if found is None or found[2].profile is None:
            if is_guests(uid):
                self._come(uid, process)  # they are removed when they go
            return Login(None)
        account, name, rule = found
        assert rule.profile is not None
        try:
            return Login(await self._enter(account, rule.profile, process))
        except SessiondError as error:
            unprotected = rule.otherwise == "unprotected"
            log.error(  # noqa: TRY400
                "The session of %s, which login rule %s asks for, cannot be made: %s The login is "
                "%s.",
                account.name,
                name,
                error,
                "let in without one" if unprotected else "refused",
                extra=event(Event.LOGIN_FAILED, user=account.name, profile=rule.profile),
            )
            if not unprotected:
                raise
            return Login(None, f"You work without a session: what you do stays. {error}")

    async def _enter(self, account: Account, profile: str, process: int) -> Session:
        async with self._locks[account.uid]:
            try:
                self._come(account.uid, process)
                return await self._open(account, profile)
            except BaseException:
                self._go(account.uid, process)
                raise

    async def _open(self, account: Account, profile: str) -> Session:
        session = self._session_of(account.uid)
        if session is None:
            return await self._opening.make(account, profile)
        if session.state is SessionState.CLOSING:
            raise Busy(f"Session {session.id} is being closed. Log in again in a moment.")
        if session.view.mount is None:
            await self._opening.start(session)
        return session

    def _session_of(self, uid: Uid) -> Session | None:
        for session in self._sessions.values():
            if session.record.login and session.uid == uid:
                return session
        return None

    # They go

    async def log_out(self, uid: Uid) -> None:
        """Take note that a user's manager has gone, and mind what that means for the session."""
        self._go(uid, 0)
        await self._leave(uid)

    async def _leave(self, uid: Uid) -> None:
        """End the session of a user who is not here, or all of a guest. What fails is logged."""
        if not is_guests(uid) and (session := self._session_of(uid)) is not None:
            # What they have asked for last, such as to keep it all, comes to its end. Who logs in
            # again meanwhile finds the session.
            await session.turn.become_idle()
        async with self._locks[uid]:
            if self.is_here(uid):
                return
            try:
                if is_guests(uid):
                    await self._opening.remove_guest(uid)
                elif (session := self._session_of(uid)) is not None:
                    await self._end(session)
            except SessiondError as error:
                log.error("After the logout of uid %d: %s", uid, error)  # noqa: TRY400

    async def _end(self, session: Session) -> None:
        if session.view.mount is not None:
            await self._end_programs(session)
        if session.storage is StorageKind.TMPFS:
            await self._opening.close(session.id)
        elif session.state is not SessionState.INACTIVE:
            await session.rest()

    async def _end_programs(self, session: Session) -> None:
        """End what the user has left running in it: it would find nothing there any more.

        Where the image is what the view covers, end all that the user runs: that could change it.
        """
        services = self._services
        try:
            if session.record.source.path == session.mount_point:
                belongings = services.surroundings.belongings
                await belongings.end_processes(session.uid, guests.NOBODY)
            device = await trio.to_thread.run_sync(services.mounts.device, session.mount_point)
            if device is not None:
                await conflicts.terminate(
                    services.surroundings.processes,
                    device,
                    owner=session.uid,
                    asked_by=session.uid,
                    grace=session.record.reset_rules.grace,
                    report=lambda _: None,
                )
        except SessiondError as error:
            log.error("Programs of %s may go on: %s", session.user, error)  # noqa: TRY400

    # Who is here

    def is_here(self, uid: Uid) -> bool:
        """Say whether a user is logged in."""
        return uid in self._here

    async def recover(self) -> None:
        """Find out who is here still. Raises `Failed`; call it first of all."""
        with explained("read who is logged in"):
            noted = await trio.to_thread.run_sync(self._read)
        for uid, presence in noted.users.items():
            presence.user_manager &= (USER_RUNTIME_DIRECTORIES / str(uid)).exists()
            let_in = bool(presence.processes)
            presence.processes = {one for one in presence.processes if _started(one.pid) == one[1]}
            if is_guests(uid) and let_in and not presence.processes:
                self._gone.append(uid)  # as in `_go`
            elif not presence.is_over:
                self._here[uid] = presence
                for process in presence.processes:
                    self._watch(uid, process)

    def leave_absent(self) -> None:
        """Have sessions end whose users have gone while no manager was there."""
        for session in self._sessions.values():
            if session.record.login and not self.is_here(session.uid):
                self._services.nursery.start_soon(self._leave, session.uid)
        for uid in self._gone:
            self._services.nursery.start_soon(self._leave, uid)

    def _come(self, uid: Uid, process: int) -> None:
        """Take note of what keeps a session from now on.

        Raises `InvalidOption` for a process that there is not, `NoSpace`, `Failed`.
        """
        started = _started(process) if process else None
        if process and started is None:
            raise InvalidOption(f"There is no process {process}, so nobody logs in by it.")
        presence = self._here.setdefault(uid, _Presence())
        if started is None:
            presence.user_manager = True
        elif (one := _Process(process, started)) not in presence.processes:
            presence.processes.add(one)
            self._watch(uid, one)
        with explained("take note of a login"):
            self._write()

    def _go(self, uid: Uid, process: int) -> None:
        presence = self._here.get(uid)
        if presence is None:
            return
        if process:
            presence.processes = {one for one in presence.processes if one.pid != process}
        # What a guest has left running, which keeps their manager, does not keep them.
        if not process or (is_guests(uid) and not presence.processes):
            presence.user_manager = False
        if presence.is_over:
            del self._here[uid]
        try:
            self._write()
        except OSError as error:
            # The next manager looks whether they are there.
            log.warning("It cannot be noted who is logged in: %s.", error.strerror)

    def _watch(self, uid: Uid, process: _Process) -> None:
        self._services.nursery.start_soon(self._wait_gone, uid, process)

    async def _wait_gone(self, uid: Uid, process: _Process) -> None:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(process.pid)
            try:
                if _started(process.pid) == process.started:
                    await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        self._go(uid, process.pid)
        await self._leave(uid)

    def _read(self) -> _Presences:
        try:
            return _Presences.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return _Presences()
        except ValidationError:
            log.exception("%s is not understood; nobody counts as logged in.", self._file)
            return _Presences()

    def _write(self) -> None:
        durable.replace(self._file, _Presences(users=self._here).model_dump_json().encode())


def _started(pid: int) -> int | None:
    """Return when a process has started; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(b")")[2].split()[19])  # starttime, the 22nd field
