"""The processes that use a file system, held so that none is mistaken for another."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

import trio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sessiond.errors import Failed
from sessiond.session import process_scan
from sessiond.session.model import Uid

log = logging.getLogger(__name__)

_PATIENCE = 10.0
"""Seconds that it may take to look at all processes."""
_PACKET = 1 << 16
_SCAN = Path(process_scan.__file__)


class Process(Protocol):
    """One process, for as long as it is held."""

    pid: int
    program: str
    """Its name (comm), which it can choose."""
    uid: Uid
    """The real user."""
    unit: str
    """The unit or scope of systemd's that it belongs to, such as ``session-2.scope``; or empty."""
    uses: Collection[str]
    """How it uses the file system: as its `cwd`, `root` or `exe`, by a `file` that it has open or a
    `map`. Anybody can give it open files, also unasked."""
    files: Collection[int]
    """Which of the files that were asked for it has open, or mapped as shared."""

    def is_of(self, uid: Uid) -> bool:
        """Say whether it has no other user's rights now, by any of its user ids."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""

    async def wait_ended(self) -> None:
        """Return when it has ended."""


class Processes(Protocol):
    """What the session layer asks about processes."""

    def using(
        self, device: str, files: Collection[int] = ()
    ) -> AbstractAsyncContextManager[Sequence[Process]]:
        """Hold all that have a file of a file system open or mapped, or as working directory, root
        or program. `device` is as /proc/PID/mountinfo has it: ``MAJOR:MINOR``. `files`: inode
        numbers there, some hundred at most, for `Process.files`.

        The file system is not touched, so what serves it may be dead. Raises `Failed`.
        """


class _Description(BaseModel):
    """What `process_scan` tells of a process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    program: str
    uids: tuple[Uid, Uid, Uid, Uid]
    unit: str
    uses: tuple[str, ...] = Field(min_length=1)
    files: frozenset[int]


class _HeldProcess:
    """Implements `Process`; `pidfd` is its own until `close`."""

    def __init__(self, description: _Description, pidfd: int) -> None:
        self.pid = description.pid
        self.program = description.program
        self.uid = description.uids[0]
        self.unit = description.unit
        self.uses: Collection[str] = description.uses
        self.files: Collection[int] = description.files
        self._pidfd = pidfd

    def is_of(self, uid: Uid) -> bool:
        try:
            return set(process_scan.uids(self.pid)) == {uid}
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait_ended(self) -> None:
        await trio.lowlevel.wait_readable(self._pidfd)

    def close(self) -> None:
        os.close(self._pidfd)


class SystemProcesses:
    """Those of this machine. Takes CAP_SYS_PTRACE to see, and CAP_KILL to signal, those of others.

    Not seen are threads that have open files or a working directory of their own.
    """

    @asynccontextmanager
    async def using(
        self, device: str, files: Collection[int] = ()
    ) -> AsyncIterator[Sequence[Process]]:
        found: list[_HeldProcess] = []
        try:
            await self._find([device, *map(str, files)], found)
            yield found
        finally:
            for process in found:
                process.close()

    async def _find(self, wanted: Sequence[str], found: list[_HeldProcess]) -> None:
        with trio.move_on_after(_PATIENCE):
            try:
                await _scan(wanted, found)
            except (OSError, EOFError, ValidationError) as error:
                raise Failed(
                    f"The processes that use a session cannot be found: {error}"
                ) from error
            return
        log.warning("Processes are not all looked at within %g seconds.", _PATIENCE)


async def _scan(wanted: Sequence[str], found: list[_HeldProcess]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with trio.socket.from_stdlib_socket(ours) as channel:
        with theirs:
            command = [sys.executable, "-I", "-S", str(_SCAN), *wanted]
            # In no directory that could be somebody's: a process is looked at in /proc.
            process = await trio.lowlevel.open_process(command, stdin=theirs, cwd="/")
        try:
            while (description := await _receive(channel, found)) is not None:
                found.append(description)
        finally:
            await _end(process)


async def _receive(
    channel: trio.socket.SocketType, found: list[_HeldProcess]
) -> _HeldProcess | None:
    packet, ancillary, _flags, _address = await channel.recvmsg(
        _PACKET, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
    )
    descriptors = [int.from_bytes(data, sys.byteorder) for _level, _kind, data in ancillary]
    if not packet:
        raise EOFError("the search ended early")
    values = json.loads(packet)
    if not values:
        return None
    return _HeldProcess(_Description.model_validate(values), descriptors[0])


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True), suppress(ProcessLookupError):
        process.kill()
        await process.wait()
