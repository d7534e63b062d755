"""Programs of a session stand still while a snapshot of it is made, so that it is of one moment.

What programs write past the overlay, to files that are open or mapped, nothing else can hold back.
They are stopped by the freezer of their cgroup, directly, and not by systemd's FreezeUnit: that
takes a bus and a manager who answer, has no limit of time, and would leave the unit frozen if this
process died. systemd passes over what others do with the freezer of its units.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import trio

from sessiond.cgroups import Freezer
from sessiond.errors import Failed, SessiondError
from sessiond.overlay import syscalls
from sessiond.session.faults import explained
from sessiond.session.model import SessionId
from sessiond.session.mounter import Mount
from sessiond.session.mounts import mount_table

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)


class Halting:
    """Stops the programs of all sessions of one manager; those of one cgroup once at a time.

    A note is written before, and removed when they go on, so that they do in any case: see
    `end_left`, and `sessiond.cgroups` for what needs no note.
    """

    def __init__(self, runtime: Path) -> None:
        """`runtime`: the directory of sessiond's that a reboot clears."""
        self._notes = runtime / "halted"
        self._locks: dict[str, trio.Lock] = {}
        self._sessions: set[SessionId] = set()

    @asynccontextmanager
    async def halted(self, session: Session) -> AsyncIterator[None]:
        """Have the programs of a session, if their cgroup is known and there, stand still at the
        next exchange of layers or hold, within the session's operation.

        Within another such context it does nothing. What prevents it is logged, never raised.
        """
        cgroup, mount = session.record.cgroup, session.view.mount
        if cgroup is None or mount is None or session.id in self._sessions:
            yield
            return
        self._sessions.add(session.id)
        # Who came second would take what the first has stopped for stopped by others.
        lock = self._locks.setdefault(cgroup, trio.Lock())
        try:
            async with lock, self._halted(session.id, mount, cgroup):
                yield
        finally:
            self._sessions.remove(session.id)
            if not lock.statistics().tasks_waiting:
                self._locks.pop(cgroup, None)

    @asynccontextmanager
    async def _halted(self, session: SessionId, mount: Mount, cgroup: str) -> AsyncIterator[None]:
        freezer = await self._prepare(session, mount, cgroup)
        if freezer is None:
            yield
            return
        with closing(freezer):
            try:
                with freezer.limited():
                    await _ask(session, mount, freezer)
                    yield
            finally:
                (self._notes / session).unlink(missing_ok=True)

    async def _prepare(self, session: SessionId, mount: Mount, cgroup: str) -> Freezer | None:
        ours = (os.getpid(), mount.worker)
        try:
            return await trio.to_thread.run_sync(self._open_noted, session, cgroup, ours)
        except FileNotFoundError:
            log.info("There is no cgroup %s, and so no program of session %s.", cgroup, session)
        except (OSError, SessiondError) as error:
            _log_not_halted(session, error)
        return None

    def _open_noted(self, session: SessionId, cgroup: str, ours: Collection[int]) -> Freezer | None:
        """Open the freezer of a cgroup, and write the note; None if others have stopped the
        programs there already, and will let them go on.

        Raises OSError, FileNotFoundError if there is no such cgroup, `NoSpace`, and `Failed`, also
        if one of the processes `ours` is in it, or below.
        """
        for process in ours:
            if _is_in(process, cgroup):
                raise Failed(f"sessiond itself, process {process}, is in cgroup {cgroup}.")
        directory = self._open_directory(cgroup)
        try:
            freezer = Freezer.open(directory)
        finally:
            os.close(directory)
        try:
            if not freezer.is_set:
                self._note(session, cgroup)
                return freezer
        except BaseException:
            freezer.close()
            raise
        freezer.close()
        return None

    def _open_directory(self, cgroup: str) -> int:
        """Open a cgroup, never one elsewhere. Raises OSError, `Failed`."""
        hierarchy = _mounted_hierarchy()
        if hierarchy is None:
            raise Failed("No hierarchy of cgroups of version 2 is mounted here.")
        root = os.open(hierarchy, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return syscalls.open_beneath(root, os.fsencode(cgroup))
        finally:
            os.close(root)

    # For the next manager

    def _note(self, session: SessionId, cgroup: str) -> None:
        with explained(f"note that the programs of session {session} stand still"):
            self._notes.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._notes / session).write_bytes(os.fsencode(cgroup))

    def end_left(self) -> None:
        """Let programs go on that a manager has stopped and left so. Never fails."""
        with suppress(FileNotFoundError):
            for note in self._notes.iterdir():
                self._end(note)

    def _end(self, note: Path) -> None:
        try:
            # Empty if the manager died before it had stopped anything.
            if cgroup := os.fsdecode(note.read_bytes()):
                directory = self._open_directory(cgroup)
                try:
                    with closing(Freezer.open(directory)) as freezer:
                        freezer.thaw()
                finally:
                    os.close(directory)
                log.warning(
                    "The programs in cgroup %s go on; another sessiond had stopped them.", cgroup
                )
        except FileNotFoundError:
            pass  # and so are they
        except (OSError, SessiondError) as error:
            log.error("The programs that %s tells of may still stand still: %s", note, error)  # noqa: TRY400
            return
        note.unlink(missing_ok=True)


async def _ask(session: SessionId, mount: Mount, freezer: Freezer) -> None:
    try:
        await mount.halt(freezer)
    except SessiondError as error:
        _log_not_halted(session, error)


def _log_not_halted(session: SessionId, error: OSError | SessiondError) -> None:
    log.warning("Programs of session %s are not stopped for a snapshot: %s", session, error)


def _is_in(process: int, cgroup: str) -> bool:
    """Say whether a process is in a cgroup, or in one below it (cgroups(7))."""
    try:
        lines = Path(f"/proc/{process}/cgroup").read_bytes().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    own = next((line[3:] for line in lines if line.startswith(b"0::")), b"/")
    return PurePosixPath(os.fsdecode(own)).is_relative_to(PurePosixPath("/", cgroup))


def _mounted_hierarchy() -> Path | None:
    """Return where the hierarchy is mounted as a whole, as far as this process may see it."""
    return next(
        (one.target for one in mount_table() if one.kind == "cgroup2" and one.root == Path("/")),
        None,
    )
