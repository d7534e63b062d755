"""Guests: users that are made on demand, and of whom nothing stays.

Guest number 17 is ``guest-17``, with a uid and a home of its own. No number is ever given out
twice, also over crashes and reboots: a file that nobody has found belongs to nobody, ever.

``STATE/guests.json`` has the numbers of which there may be a trace; each is there before anything
is made for it, and until nothing is left. The account itself is a user record in ``/run/userdb``,
made last and withdrawn first: as long as it is there, so is the guest. So whatever dies, a number
without such a record is one whose traces are to be removed, and after a reboot no guest has one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated

import trio
from pydantic import BaseModel, ConfigDict, Field

from sessiond.config import AbsolutePath, GuestsTable
from sessiond.errors import Failed, InvalidName, SessiondError
from sessiond.session import durable, mount_point
from sessiond.session.accounts import Account
from sessiond.session.faults import explained, quoted
from sessiond.session.model import Uid
from sessiond.session.records import BadRecordError, read
from sessiond.session.services import Services
from sessiond.session.tree import remove_tree

log = logging.getLogger(__name__)

NOBODY = Uid(2_100_000_000)
"""The uid of guest number 0, who is nobody. Those above it are nobody's either by
https://systemd.io/UIDS-GIDS (1879048192 to 2147352575), nor of SSSD's default for Active Directory
(up to 2000199999).
"""
_LAST = 2147352575

_FILE = "guests.json"


def is_guests(uid: Uid) -> bool:
    """Say whether it is one that guests, and nobody else, have."""
    return NOBODY < uid <= _LAST


_Number = Annotated[int, Field(ge=1, le=_LAST - NOBODY)]


class _Guest(BaseModel):
    """A number that was given out, and of which there may be a trace."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: _Number
    home: AbsolutePath

    @property
    def account(self) -> Account:
        return Account(f"guest-{self.number}", Uid(NOBODY + self.number))


class _GuestsRecord(BaseModel):
    """The contents of ``guests.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=1, le=1)] = 1
    next: Annotated[int, Field(ge=1)] = 1
    guests: tuple[_Guest, ...] = ()


class Guests:
    """Those of this machine. For one manager.

    `settings` counts for those that are made from then on.
    """

    settings: GuestsTable

    def __init__(
        self,
        services: Services,
        state: Path,
        runtime: Path,
        settings: GuestsTable,
        end_sessions: Callable[[Uid], Awaitable[None]],
        has_session: Callable[[Uid], bool],
    ) -> None:
        """`state`, `runtime`: directories of sessiond's, in which no one else removes anything."""
        self.settings = settings
        self._records = services.surroundings.user_records
        self._belongings = services.surroundings.belongings
        self._nursery = services.nursery
        self._state = state
        self._apart = (state, runtime)
        self._end_sessions = end_sessions
        self._has_session = has_session
        self._file = state / _FILE
        self._record: _GuestsRecord | None = None
        self._making = trio.Lock()
        self._writing = trio.Lock()
        self._removing: dict[int, trio.Event] = {}

    @property
    def names(self) -> list[str]:
        """Of all that are there."""
        return [guest.account.name for guest in self._there()]

    def is_guest(self, uid: Uid) -> bool:
        """Say whether it is that of a guest who is there, or of whom something may be left."""
        return self._of(uid) is not None

    def has_gone(self, uid: Uid) -> bool:
        """Say whether it is that of a guest who is not there, though something may be left."""
        guest = self._of(uid)
        return guest is not None and not self._records.is_published(guest.account)

    def uid_of(self, name: str) -> Uid:
        """Return the uid of one who is or was there. Raises `InvalidName`, `Failed`."""
        number = re.fullmatch("guest-([1-9][0-9]{0,9})", name)
        if number is not None and int(number[1]) < self._require_record().next:
            return Uid(NOBODY + int(number[1]))
        known = ", ".join(self.names) or "none"
        raise InvalidName(f"There is no guest {quoted(name)}; the guests are: {known}.")

    # They come

    async def create(self) -> Account:
        """Make a guest, who has no password and a home of their own.

        Raises `NoSpace`, `NotSupported` and `Failed`; nothing is left of them then.
        """
        async with self._making:
            there = len(self._there())
            if there >= self.settings.limit:
                raise Failed(
                    f"There are {there} guests, the most that there may be ([guests] limit). "
                    "Remove one first: 'sessionctl guest list' tells their names."
                )
            with explained("make a guest"):
                guest = await self._take_number()
            try:
                with trio.CancelScope(shield=True), explained("make a guest"):
                    await trio.to_thread.run_sync(self._make, guest)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._remove_logged(guest)
                raise
        log.info("%s is a guest, with uid %d.", guest.account.name, guest.account.uid)
        return guest.account

    async def _take_number(self) -> _Guest:
        """Note that a number is given out. Raises `OSError`, `Failed`."""
        record = self._require_record()
        home = await trio.to_thread.run_sync(self._home)
        number = record.next
        while True:
            if NOBODY + number > _LAST:
                raise Failed("All numbers for guests have been given out.")
            guest = _Guest(number=number, home=home / f"guest-{number}")
            if not await trio.to_thread.run_sync(self._is_taken, guest):
                break
            log.warning("There is a user or file %s already; it is left out.", guest.home.name)
            number += 1
        await self._write(lambda record: {"next": number + 1, "guests": (*record.guests, guest)})
        return guest

    def _home(self) -> Path:
        what = f"directory {self.settings.home} for the homes of guests"
        below = self.settings.home / "guest"
        return mount_point.resolve_trusted(below, what, "Choose another: home in [guests].").parent

    def _is_taken(self, guest: _Guest) -> bool:
        return os.path.lexists(guest.home) or self._records.is_taken(guest.account)

    def _make(self, guest: _Guest) -> None:
        # It is root's until all is there, so nobody is in the way.
        os.mkdir(guest.home, 0o700)
        _copy(self.settings.skeleton, guest.home, guest.account.uid)
        guest.home.chmod(0o700)
        self._records.publish(guest.account, guest.home, self.settings.shell)

    # They go

    async def remove(self, uid: Uid) -> None:
        """Remove a guest, with all that they own; nothing is done if they are removed already.

        Files in unusual places are looked for later. Raises `Failed` if something cannot be
        removed; then that is tried again by the next manager.
        """
        guest = self._of(uid)
        if guest is not None and guest.number in self._removing:
            await self._removing[guest.number].wait()
        if guest is None or self.has_gone(uid):
            return
        with trio.CancelScope(shield=True):
            failures = await self._remove(guest)
        if failures:
            raise Failed(
                f"Guest {guest.account.name} is removed, but not all that they owned: "
                f"{'; '.join(failures)}."
            )

    async def _remove(self, guest: _Guest) -> list[str]:
        """Return what could not be removed."""
        account = guest.account
        self._removing[guest.number] = done = trio.Event()
        failures: list[str] = []
        try:
            try:
                # From now on nobody can log in, and no service acts for them.
                await trio.to_thread.run_sync(self._records.withdraw, account)
                await self._belongings.end_processes(account.uid, NOBODY)
            except (SessiondError, OSError) as error:
                failures.append(_as_part(error))
            try:
                await self._end_sessions(account.uid)
            except SessiondError as error:
                failures.append(_as_part(error))
            kept = self._state / "kept" / str(account.uid)
            try:
                await trio.to_thread.run_sync(remove_tree, kept)
                failures += await trio.to_thread.run_sync(
                    self._belongings.remove, account, guest.home, self._apart
                )
            except OSError as error:
                failures.append(f"{kept}: {error.strerror}")
        finally:
            del self._removing[guest.number]
            done.set()
        for failure in failures:
            log.error("Of guest %s this could not be removed: %s", account.name, failure)
        self._nursery.start_soon(self._search, guest, not failures)
        return failures

    async def _remove_logged(self, guest: _Guest) -> None:
        if guest.number not in self._removing:
            await self._remove(guest)

    async def _search(self, guest: _Guest, is_clean: bool) -> None:
        """Look for what they have left elsewhere; if nothing is left, they are forgotten.

        When this is cancelled, or fails, the next manager begins again with the removal.
        """
        failures = await self._belongings.search(guest.account.uid, self._apart)
        for failure in failures:
            log.error("Of guest %s this could not be removed: %s", guest.account.name, failure)
        if failures or not is_clean:
            return
        try:
            await self._write(
                lambda record: {"guests": tuple(one for one in record.guests if one != guest)}
            )
        except OSError as error:
            log.warning("%s cannot be written: %s.", self._file, error.strerror)
            return
        log.info("Nothing is left of guest %s.", guest.account.name)

    # The manager's start

    def load(self) -> None:
        """Read which guests there may be; first of all. What prevents it is logged. Blocks."""
        try:
            self._record = read(self._file, _GuestsRecord)
        except FileNotFoundError:
            self._record = _GuestsRecord()
        except (OSError, BadRecordError) as error:
            log.error(  # noqa: TRY400
                "%s cannot be read, so no guests are made and none is removed: %s.",
                self._file,
                error,
            )

    async def recover(self) -> None:
        """Have those removed of whom nobody has a session, or any process. Call it when sessions
        are served; it goes on in the background.
        """
        for guest in () if self._record is None else self._record.guests:
            account = guest.account
            if not self._records.is_published(account) or not (
                self._has_session(account.uid)
                or await trio.to_thread.run_sync(self._belongings.has_processes, account.uid)
            ):
                self._nursery.start_soon(self._remove_logged, guest)

    # What is known of them

    def _there(self) -> Collection[_Guest]:
        known = () if self._record is None else self._record.guests
        return [guest for guest in known if self._records.is_published(guest.account)]

    def _of(self, uid: Uid) -> _Guest | None:
        known = () if self._record is None else self._record.guests
        return next((guest for guest in known if guest.account.uid == uid), None)

    def _require_record(self) -> _GuestsRecord:
        if self._record is None:
            raise Failed(
                f"{self._file} cannot be read; the log says why. Put it back, or, if no file of a "
                "former guest can be left on this machine, remove it. Then restart sessiond."
            )
        return self._record

    async def _write(self, change: Callable[[_GuestsRecord], Mapping[str, object]]) -> None:
        """Write what `change` makes of the record. Raises `OSError`; then it is as before."""
        async with self._writing:
            record = self._require_record()
            changed = record.model_copy(update=change(record))
            text = changed.model_dump_json().encode()
            await trio.to_thread.run_sync(durable.replace, self._file, text)
            self._record = changed


def _as_part(error: SessiondError | OSError) -> str:
    return str(error).rstrip(".")


def _copy(source: Path, target: Path, uid: Uid) -> None:
    """Copy what is in a directory of root's to another; it is `uid`'s then. Raises `OSError`."""
    with os.scandir(source) as entries:
        for entry in entries:
            new = target / entry.name
            if entry.is_dir(follow_symlinks=False):
                new.mkdir(mode=0o700)
                _copy(Path(entry.path), new, uid)
            else:
                shutil.copy2(entry.path, new, follow_symlinks=False)
                os.chown(new, uid, uid, follow_symlinks=False)
    shutil.copystat(source, target)
    os.chown(target, uid, uid)
