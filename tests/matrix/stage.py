"""A session on a bus, what callers bring along, and what comes of their calls."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import trio

from sessiond.bus import names
from sessiond.bus.connection import Connection
from sessiond.bus.interface import signature
from sessiond.bus.wire import BusError
from sessiond.session.model import SessionId, SnapshotName
from tests.support.waiting import BOUND

if TYPE_CHECKING:
    from tests.matrix.methods import Entry

DONE = "done"
"""The outcome of what went well. Others are names of errors, without what they all begin with."""

ERRORS = {name.rpartition(".")[2] for name in names.ERRORS.values()} | {
    name.rpartition(".")[2] for name in (names.UNKNOWN_OBJECT, names.LIMITS_EXCEEDED)
}
"""What docs/dbus.md says there is."""

Outcome = tuple[str, str]
"""`DONE` or an error, and what is said."""


class Stage:
    """One session, which has the snapshot ``first``; `close` it after use."""

    snapshot = SnapshotName("first")

    def __init__(
        self,
        connection: Connection,
        session: str,
        *,
        profile: str = "other",
        user: str = "root",
        uid: int = 0,
    ) -> None:
        """`user` owns the session; new sessions are theirs, of `profile`."""
        self.connection = connection
        self.session = SessionId(session)
        self.profile = profile
        self.user = user
        self.uid = uid
        self.job = names.job_path(0)
        """The one that ran last."""
        self.guest = "guest-1"
        """The one that was made last."""
        self._pipes = ExitStack()

    def path(self, interface: str) -> str:
        """Return the object that has an interface."""
        return {
            names.MANAGER: names.ROOT_PATH,
            names.SESSION: names.session_path(self.session),
            names.SNAPSHOT: names.snapshot_path(self.session, self.snapshot),
            names.JOB: self.job,
        }[interface]

    # What callers bring along

    def archive(self) -> int:
        """Return a pipe with an archive in it; the call that it is passed to closes it."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with (
            open(writer, "wb") as pipe,
            tarfile.open(fileobj=pipe, mode="w|") as archive,
        ):
            member = tarfile.TarInfo("imported")
            member.size = 20_000
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        return reader

    def drain(self) -> int:
        """Return a pipe that somebody reads; the call closes it."""
        reader, writer = os.pipe2(os.O_CLOEXEC)

        def read() -> None:
            with open(reader, "rb") as pipe:
                while pipe.read(1 << 16):
                    pass

        threading.Thread(target=read, daemon=True).start()
        return writer

    def clogged(self) -> int:
        """Return a pipe that nobody reads; the call closes it."""
        return self._pipe()[1]

    def stuck(self) -> int:
        """Return a pipe that nothing comes out of; the call closes it."""
        return self._pipe()[0]

    def _pipe(self) -> tuple[int, int]:
        """Return both ends of a pipe; others of each stay open until `close`."""
        ends = os.pipe2(os.O_CLOEXEC)
        for end in ends:
            self._pipes.callback(os.close, os.dup(end))
        return ends

    def close(self) -> None:
        """Let go of all pipes."""
        self._pipes.close()

    # What comes of calls

    async def call(self, entry: Entry, *, by: Connection | None = None) -> tuple[object, ...]:
        """Call a method, as `by` if given. Raises `BusError`."""
        name = entry.interface.name
        return await (by or self.connection).call(
            names.BUS,
            self.path(name),
            name,
            entry.name,
            signature(entry.interface.methods[entry.name].inputs),
            *entry.arguments(self),
        )

    async def outcome(self, entry: Entry, *, by: Connection | None = None) -> Outcome:
        """Call a method, and see what it begins to its end."""
        try:
            results = await self.call(entry, by=by)
        except BusError as error:
            return error.name.rpartition(".")[2], error.text
        return await self.result(entry, results)

    async def result(self, entry: Entry, results: tuple[object, ...]) -> Outcome:
        """See what a method has begun, which has returned `results`, to its end."""
        outputs = entry.interface.methods[entry.name].outputs
        for output, result in zip(outputs, results, strict=True):
            if output.name == "job":
                self.job = str(result)
                return await self.ended(self.job)
            if output.name == "name":
                self.guest = str(result)
            if isinstance(result, int) and output.type == "h":
                return await _read(result) if output.name == "stream" else _let_go(result)
        return DONE, ""

    async def ended(self, job: str) -> Outcome:
        """Wait for a job."""
        with trio.fail_after(BOUND):
            while (values := await self.properties(job, names.JOB))["State"] == "running":
                await trio.sleep(0.01)
        name = str(values["ErrorName"]).rpartition(".")[2]
        return name or DONE, str(values["ErrorMessage"])

    async def properties(self, path: str, interface: str) -> Mapping[str, object]:
        """Return the properties of an object."""
        (values,) = await self.connection.call(
            names.BUS, path, names.PROPERTIES, "GetAll", "s", interface
        )
        assert isinstance(values, dict)
        return values


async def _read(descriptor: int) -> Outcome:
    """Read a list to its end."""
    with open(descriptor, "rb") as stream, trio.fail_after(BOUND):
        text = await trio.to_thread.run_sync(stream.read, abandon_on_cancel=True)
    if text.endswith(b'{"complete": true}\n'):
        return DONE, ""
    return "Failed", text.decode()


def _let_go(descriptor: int) -> Outcome:
    os.close(descriptor)
    return DONE, ""
