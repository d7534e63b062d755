"""The real `Mounter`: FUSE mounts, each served by a worker process.

The manager's side never looks into a merged view, not even with stat(2): waiting there for a dead
worker it could not be killed.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path

import trio
from pydantic import ValidationError

from sessiond import control
from sessiond.cgroups import Freezer
from sessiond.control import KeptLayers, LayerStack, Reply, Start
from sessiond.descriptors import DescriptorStore, NoDescriptorStore
from sessiond.errors import Failed, NoSpace, SessiondError
from sessiond.fuse import data_path
from sessiond.fuse.device import MS_NODEV, MS_NOSUID, detach, mount_device
from sessiond.fuse.spawner import Spawner
from sessiond.session.model import (
    NO_BREAKDOWN,
    WHOLE,
    Breakdown,
    ChangeSummary,
    DataPath,
    DirectoryChanges,
    LargeFile,
    Lowers,
    PendingWrites,
    SessionId,
    Span,
    Stack,
    Uid,
    UpperDirectories,
)
from sessiond.session.mounter import VIEW_TYPE, MergeState, MountRequest

log = logging.getLogger(__name__)

READER_PATIENCE = 60.0
"""Seconds that a worker waits for who reads a list of changes and does not go on."""


class FuseMounter:
    """Implements `Mounter`."""

    def __init__(
        self, spawner: Spawner, sockets: Path, descriptors: DescriptorStore | None = None
    ) -> None:
        """`sockets`: a directory, made if missing, where workers can be found by another manager.

        `descriptors` keeps mounts for one that finds no worker alive either.
        """
        self._spawner = spawner
        self._sockets = sockets
        self._descriptors = descriptors or NoDescriptorStore()
        self._inherited = dict(self._descriptors.inherited)
        self.features = tuple(f"datapath-{path}" for path in data_path.available())
        """How data reach the kernel on this machine, for people who ask why."""

    async def mount(self, request: MountRequest) -> FuseMount:
        """See `Mounter.mount`."""
        flags = MS_NOSUID * request.nosuid | MS_NODEV * request.nodev
        try:
            device = mount_device(
                request.mount_point, request.session, flags, fs_type=VIEW_TYPE, allow_other=True
            )
        except OSError as error:
            raise Failed(
                f"Session {request.session} cannot be mounted at {request.mount_point}: "
                f"{error.strerror}."
            ) from error
        mount = self._mount(request, device, os.memfd_create(f"sessiond-{request.session}"))
        try:
            await mount.start()
            await self._keep(request.session, mount)
        except BaseException:
            with trio.CancelScope(shield=True):
                await mount.unmount()
            raise
        return mount

    def _mount(self, request: MountRequest, device: int, journal: int) -> FuseMount:
        return FuseMount(
            request, self._spawner, device, journal, self._socket(request.session), self._drop
        )

    # For another manager, and from one before

    def _socket(self, session: SessionId) -> Path:
        return self._sockets / session

    async def _keep(self, session: SessionId, mount: FuseMount) -> None:
        for kind, descriptor in (("journal", mount.journal), ("device", mount.device)):
            await trio.to_thread.run_sync(self._descriptors.keep, f"{kind}-{session}", descriptor)

    async def _drop(self, session: SessionId) -> None:
        self._socket(session).unlink(missing_ok=True)
        for kind in ("device", "journal"):
            await trio.to_thread.run_sync(self._descriptors.drop, f"{kind}-{session}")

    def left(self) -> set[SessionId]:
        """See `Mounter.left`."""
        self._sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = {name.partition("-")[2] for name in self._inherited if name.startswith("device-")}
        return {SessionId(name) for name in kept | set(os.listdir(self._sockets))}

    async def adopt(self, request: MountRequest) -> FuseMount | None:
        """See `Mounter.adopt`."""
        mount = await self._find_worker(request)
        if mount is None:
            mount = await self._revive(request)
        if mount is not None:
            await self._keep(request.session, mount)
        return mount

    async def _find_worker(self, request: MountRequest) -> FuseMount | None:
        channel = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            await channel.connect(str(self._socket(request.session)))
            packet, descriptors = await control.receive(channel)
        except OSError:  # no worker, or it died in this moment
            channel.close()
            return None
        try:
            device, journal = descriptors
            report = Reply.model_validate_json(packet)
        except ValueError:
            channel.close()
            for descriptor in descriptors:
                os.close(descriptor)
            return None
        mount = self._mount(request, device, journal)
        try:
            await mount.attach(channel, report)
        except SessiondError:
            log.exception("The worker of session %s is of no use.", request.session)
            await mount.abandon()
            return None
        return mount

    async def _revive(self, request: MountRequest) -> FuseMount | None:
        device = self._inherited.pop(f"device-{request.session}", -1)
        journal = self._inherited.pop(f"journal-{request.session}", -1)
        if device < 0 or journal < 0:
            for descriptor in (device, journal):
                if descriptor >= 0:
                    os.close(descriptor)
            return None
        mount = self._mount(request, device, journal)
        try:
            await mount.revive()
        except SessiondError as error:
            log.error(  # noqa: TRY400
                "What served session %s cannot be gone on with: %s", request.session, error
            )
            await mount.abandon()
            return None
        return mount

    async def forget_left(self) -> None:
        """See `Mounter.forget_left`."""
        for name, descriptor in self._inherited.items():
            os.close(descriptor)
            await trio.to_thread.run_sync(self._descriptors.drop, name)
        self._inherited.clear()


def _layers(stack: Stack) -> LayerStack:
    return LayerStack(
        upper=stack.upper.fs,
        work=stack.upper.work,
        lowers=stack.lowers,
        indexes=stack.indexes,
        orphans=stack.orphans,
        former=stack.former,
    )


def _lowers(point: Lowers | None) -> control.Lowers | None:
    return None if point is None else control.Lowers(paths=point.paths, indexes=point.indexes)


class FuseMount:
    """Implements `Mount`. One request at a time is under way on the control socket."""

    def __init__(
        self,
        request: MountRequest,
        spawner: Spawner,
        device: int,
        journal: int,
        address: Path,
        unmounted: Callable[[SessionId], Awaitable[None]],
    ) -> None:
        """`device`: the FUSE connection; the kernel keeps it while this descriptor is open, worker
        or not. `journal`: what a worker leaves for the next one. Both are taken over.

        `address`: the socket at which another manager finds the worker. `unmounted` is called when
        nothing is left to be found.
        """
        self._request = request
        self._stack = request.stack
        self._rules = request.keep.rules if request.keep is not None else ()
        self._spawner = spawner
        self.device = device
        self.journal = journal
        self._address = address
        self._unmounted = unmounted
        self._channel: trio.socket.SocketType | None = None
        self._listener: socket.socket | None = None
        self._process = -1
        """A pidfd of the worker."""
        self._held = False
        """Whether changes are `frozen`; a worker that goes on for another does not hold them."""
        self._turn = trio.Lock()
        self._died = trio.Event()
        self._data_path = ""
        self.worker = 0
        """Process id of the worker, once it is ready."""

    async def start(self) -> None:
        """Start the worker; return when it serves. Raises `Failed`, `NoSpace`."""
        async with self._turn:
            await self._start(inherits=False)
        log.log(
            logging.INFO if self._data_path == self._request.data_path else logging.WARNING,
            "The data path of session %s is %s; %s was asked for.",
            self._request.session,
            self._data_path,
            self._request.data_path,
        )

    async def _start(self, *, inherits: bool) -> None:
        self._died = trio.Event()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = trio.socket.from_stdlib_socket(ours)
        start = Start(
            stack=_layers(self._stack),
            keep=self._kept_layers(),
            data_path=self._request.data_path,
            reachable=self._request.reachable,
            inherits=inherits,
        )
        with theirs:
            try:
                self._spawner.spawn(start, self.device, self.journal, theirs, self._listening())
            except OSError as error:
                raise Failed("The fork server is gone: restart sessiond.") from error
        self._know(_checked(await self._reply()))

    def _kept_layers(self) -> KeptLayers | None:
        keep = self._request.keep
        if keep is None:
            return None
        return KeptLayers(
            upper=keep.upper.fs, work=keep.upper.work, orphans=keep.orphans, rules=self._rules
        )

    def _listening(self) -> socket.socket:
        """Return the socket at which each worker of this mount in turn can be found.

        To replace a worker takes no space in its directory, which may be full by then.
        """
        if self._listener is None:
            self._listener = self._listen()
        return self._listener

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # In a directory that only root can enter.
            self._address.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._address.unlink(missing_ok=True)
            listener.bind(str(self._address))
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise Failed(
                f"The socket {self._address} cannot be made: {error.strerror or error}."
            ) from error
        return listener

    def _know(self, report: Reply) -> None:
        self.worker = report.worker or 0
        self._data_path = report.data_path or ""
        try:
            self._process = os.pidfd_open(self.worker)
        except OSError as error:
            raise self._gone() from error

    @contextmanager
    def _unless_it_dies(self) -> Iterator[None]:
        """Leave what the worker's death brings about to who waits for that: another can go on."""
        try:
            yield
        except SessiondError:
            if not self._died.is_set():
                raise

    async def attach(self, channel: trio.socket.SocketType, report: Reply) -> None:
        """Go on with a worker that another manager has started. Raises `Failed`, `NoSpace`.

        Should it die meanwhile, `wait_died` returns; so it is with `revive` and `recover`.
        """
        self._channel = channel
        with self._unless_it_dies():
            self._know(report)
            wanted = _layers(self._stack)
            if report.stack is not None and report.stack != wanted:
                # That manager had recorded what it was about to serve.
                moved = report.stack.orphans != wanted.orphans
                await self._ask(control.Swap(stack=wanted, moved=moved, held=moved))
            if self._request.keep is not None:
                await self.keep(self._rules)
            if report.frozen:
                await self._ask(control.Thaw())

    async def revive(self) -> None:
        """Start a worker for one that died with its manager. Raises `Failed`, `NoSpace`."""
        self._require_connection()
        async with self._turn:
            with self._unless_it_dies():
                await self._start(inherits=True)

    async def recover(self) -> None:
        """See `Mount.recover`."""
        async with self._turn:
            if self._data_path == DataPath.PLAIN:
                raise Failed("A worker with the data path 'plain' leaves nothing to go on with.")
            self._require_connection()
            self._hang_up()
            with self._unless_it_dies():
                await self._start(inherits=True)

    def _require_connection(self) -> None:
        if not _is_connected(self.device):
            raise Failed(f"What was mounted at {self._request.mount_point} is gone.")

    def _hang_up(self) -> None:
        """Close what belongs to one worker."""
        if self._channel is not None:
            self._channel.close()
        if self._process >= 0:
            trio.lowlevel.notify_closing(self._process)
            os.close(self._process)
            self._process = -1

    async def _ask(self, request: control.Request, descriptors: tuple[int, ...] = ()) -> Reply:
        async with self._turn:
            # Whole, or the next request would get this one's reply.
            with trio.CancelScope(shield=True):
                try:
                    await control.send(self._open_channel, request, descriptors)
                except OSError as error:
                    raise self._gone() from error
                reply = await self._reply()
        return _checked(reply)

    async def _ask_for_outcome(
        self,
        request: control.Changes | control.Diff | control.Sync | control.Retain,
        descriptors: tuple[int, ...] = (),
    ) -> Reply:
        """Ask for what takes long; other requests are served meanwhile."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with trio.socket.from_stdlib_socket(ours) as outcome:
            with theirs:
                await self._ask(request, (theirs.fileno(), *descriptors))
            return await self._outcome(outcome)

    async def _outcome(self, channel: trio.socket.SocketType) -> Reply:
        reply = await self._received(channel)
        if reply is None:
            # Another may go on for it by now.
            raise Failed(
                f"The worker of session {self._request.session} ended while it was at work on "
                "that; try again."
            )
        return _checked(reply)

    @property
    def _open_channel(self) -> trio.socket.SocketType:
        assert self._channel is not None, "start() was not called"
        return self._channel

    async def _reply(self) -> Reply:
        try:
            reply = await self._received(self._open_channel)
        except trio.ClosedResourceError:
            raise self._gone() from None
        if reply is None:
            raise self._gone()
        return reply

    async def _received(self, channel: trio.socket.SocketType) -> Reply | None:
        """Return the next reply, or None when the worker has gone."""
        try:
            packet, descriptors = await control.receive(channel)
        except OSError as error:
            raise self._nonsense() from error
        for fd in descriptors:
            os.close(fd)
        if not packet:
            return None
        try:
            return Reply.model_validate_json(packet)
        except ValidationError as error:
            raise self._nonsense() from error

    def _nonsense(self) -> SessiondError:
        return Failed(f"The worker of session {self._request.session} talks nonsense.")

    def _gone(self) -> SessiondError:
        self._died.set()
        return Failed(f"The worker of session {self._request.session} is gone.")

    async def swap(
        self, stack: Stack, *, moved: bool = False, retained: bool = False
    ) -> tuple[str, ...]:
        """See `Mount.swap`."""
        # A new upper is deleted if the worker dies before it has said that it serves it. So nothing
        # must be written there until then.
        hold = not self._held and stack.upper != self._stack.upper
        async with self.frozen() if hold else nullcontext():
            request = control.Swap(
                stack=_layers(stack), moved=moved, held=self._held, retained=retained
            )
            reply = await self._ask(request)
            self._stack = stack
        return reply.inexact

    async def halt(self, freezer: Freezer) -> None:
        """See `Mount.halt`."""
        await self._ask(control.Halt(), freezer.descriptors)

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """See `Mount.frozen`."""
        await self._ask(control.Freeze())
        self._held = True
        try:
            yield
        finally:
            self._held = False
            # Cancelled or not, programs may write again; who goes on for a dead worker lets them.
            with trio.CancelScope(shield=True), self._unless_it_dies():
                await self._ask(control.Thaw())

    async def changes(
        self, span: Span = WHOLE, breakdown: Breakdown = NO_BREAKDOWN
    ) -> ChangeSummary:
        """See `Mount.changes`."""
        request = control.Changes(
            start=_lowers(span.start),
            end=_lowers(span.end),
            directories=breakdown.directories,
            depth=breakdown.depth,
        )
        counts = (await self._ask_for_outcome(request)).changes
        if counts is None:
            raise Failed(f"The worker of session {self._request.session} did not count changes.")
        return ChangeSummary(
            counts.added,
            counts.changed,
            counts.deleted,
            counts.bytes,
            counts.renamed,
            tuple(LargeFile(file.path, file.change, file.size) for file in counts.largest),
            tuple(DirectoryChanges(**dict(one)) for one in counts.directories),
        )

    async def diff(self, target: int, span: Span = WHOLE, reader: Uid | None = None) -> None:
        """See `Mount.diff`."""
        request = control.Diff(
            start=_lowers(span.start),
            end=_lowers(span.end),
            patience=READER_PATIENCE,
            reader=reader,
        )
        await self._ask_for_outcome(request, (target,))

    async def merge(self, top: Path, bottom: Path) -> MergeState:
        """See `Mount.merge`."""
        reply = await self._ask(control.MergeLayers(top=top, bottom=bottom))
        if reply.obstacle:
            log.info(
                "Session %s: layer %s is not merged with the one below it: %s.",
                self._request.session,
                top,
                reply.obstacle,
            )
        return MergeState(reply.merging or MergeState.NEVER)

    async def keep(self, rules: tuple[str, ...]) -> None:
        """See `Mount.keep`."""
        self._rules = rules
        with self._unless_it_dies():  # the worker that goes on for it begins with them
            await self._ask(control.Keep(rules=rules))

    async def discard(self, paths: tuple[str, ...]) -> None:
        """See `Mount.discard`."""
        await self._ask(control.Discard(paths=paths))

    @asynccontextmanager
    async def committing(
        self, paths: tuple[str, ...], report: Callable[[int, int], None]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """See `Mount.committing`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with trio.socket.from_stdlib_socket(ours) as channel:

            async def step() -> None:
                with suppress(OSError):  # it has ended, and has said why before
                    await control.send(channel, control.Step())
                await self._until_step(channel, report)

            with theirs:
                await self._ask(control.Commit(paths=paths), (theirs.fileno(),))
            await self._until_step(channel, report)
            yield step

    async def _until_step(
        self, channel: trio.socket.SocketType, report: Callable[[int, int], None]
    ) -> None:
        while (told := (await self._outcome(channel)).copied) is not None:
            report(told.done, told.total)

    async def retain(self, paths: tuple[str, ...], upper: UpperDirectories) -> None:
        """See `Mount.retain`."""
        await self._ask_for_outcome(control.Retain(paths=paths, upper=upper.fs))

    async def sync(self) -> None:
        """See `Mount.sync`."""
        await self._ask_for_outcome(control.Sync())

    async def pending(self) -> PendingWrites:
        """See `Mount.pending`."""
        told = (await self._ask(control.Pending())).pending
        if told is None:
            raise Failed(f"The worker of session {self._request.session} did not say what it has.")
        files = {file.inode: file.path for file in told.files}
        return PendingWrites(files, told.count, told.in_use)

    async def unmount(self) -> None:
        """See `Mount.unmount`."""
        detach(self._request.mount_point)
        with trio.CancelScope(shield=True):
            async with self._turn:
                if self.device < 0:
                    return
                with suppress(OSError, trio.ClosedResourceError):  # it is gone already
                    await control.send(self._open_channel, control.Stop())
                    packet = b"?"
                    while packet:
                        packet, descriptors = await control.receive(self._open_channel)
                        for fd in descriptors:  # of a report that nobody has read yet
                            os.close(fd)
                self._died.set()
                self._close()
                await self._unmounted(self._request.session)

    async def abandon(self) -> None:
        """Leave the mount to itself, without a worker; whoever uses it gets errors."""
        self._close()
        await self._unmounted(self._request.session)

    def _close(self) -> None:
        self._hang_up()
        if self._listener is not None:
            self._listener.close()
        for descriptor in (self.device, self.journal):
            os.close(descriptor)
        self.device = self.journal = -1

    async def wait_died(self) -> None:
        """See `Mount.wait_died`."""
        if not self._died.is_set():
            with suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._process)
            self._died.set()


def _is_connected(device: int) -> bool:
    """Say whether the kernel still has the FUSE connection; it ends with the mount."""
    poll = select.poll()
    poll.register(device, select.POLLIN)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def _checked(reply: Reply) -> Reply:
    if reply.error is None:
        return reply
    if reply.errno in {errno.ENOSPC, errno.EDQUOT}:
        raise NoSpace(f"The storage is full ({reply.error}); delete files, or reset the session.")
    raise Failed(reply.error)
