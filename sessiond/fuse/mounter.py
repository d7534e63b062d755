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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio
from pydantic import ValidationError

from sessiond import control
from sessiond.control import LayerStack, Reply, Start
from sessiond.errors import Failed, NoSpace, SessiondError
from sessiond.fuse import data_path
from sessiond.fuse.device import MS_NODEV, MS_NOSUID, detach, has_epochs, mount_device
from sessiond.fuse.spawner import Spawner
from sessiond.session.model import ChangeSummary, DataPath, Stack
from sessiond.session.mounter import VIEW_TYPE, MountRequest

log = logging.getLogger(__name__)


class FuseMounter:
    """Implements `Mounter`."""

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self.features = (
            *(f"datapath-{path}" for path in data_path.available()),
            *(["epochs"] if has_epochs() else []),
        )
        """How data and metadata reach the kernel on this machine, for people who ask why."""

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
        journal = os.memfd_create(f"sessiond-{request.session}")
        mount = FuseMount(request, self._spawner, device, journal)
        try:
            await mount.start()
        except BaseException:
            with trio.CancelScope(shield=True):
                await mount.unmount()
            raise
        return mount


def _layers(stack: Stack) -> LayerStack:
    return LayerStack(
        upper=stack.upper.fs,
        work=stack.upper.work,
        lowers=stack.lowers,
        indexes=stack.indexes,
        orphans=stack.orphans,
    )


class FuseMount:
    """Implements `Mount`. One request at a time is under way on the control socket."""

    def __init__(self, request: MountRequest, spawner: Spawner, device: int, journal: int) -> None:
        """`device`: the FUSE connection; the kernel keeps it while this descriptor is open, worker
        or not. `journal`: what a worker leaves for the next one. Both are taken over.
        """
        self._request = request
        self._stack = request.stack
        self._spawner = spawner
        self._device = device
        self._journal = journal
        self._channel: trio.socket.SocketType | None = None
        self._process = -1
        """A pidfd of the worker."""
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
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = trio.socket.from_stdlib_socket(ours)
        start = Start(
            stack=_layers(self._stack), data_path=self._request.data_path, inherits=inherits
        )
        try:
            self._spawner.spawn(start, self._device, self._journal, theirs)
        except OSError as error:
            raise Failed("The fork server is gone: restart sessiond.") from error
        finally:
            theirs.close()
        ready = _checked(await self._reply())
        self.worker = ready.worker or 0
        self._data_path = ready.data_path or ""
        self._process = os.pidfd_open(self.worker)
        self._died = trio.Event()

    async def recover(self) -> None:
        """See `Mount.recover`."""
        async with self._turn:
            if self._data_path == DataPath.PLAIN:
                raise Failed("A worker with the data path 'plain' leaves nothing to go on with.")
            if not _is_connected(self._device):
                raise Failed(f"What was mounted at {self._request.mount_point} is gone.")
            self._hang_up()
            await self._start(inherits=True)

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

    @property
    def _open_channel(self) -> trio.socket.SocketType:
        assert self._channel is not None, "start() was not called"
        return self._channel

    async def _reply(self) -> Reply:
        try:
            packet, descriptors = await control.receive(self._open_channel)
        except trio.ClosedResourceError:
            raise self._gone() from None
        for fd in descriptors:
            os.close(fd)
        if not packet:
            raise self._gone()
        try:
            return Reply.model_validate_json(packet)
        except ValidationError as error:
            raise Failed(
                f"The worker of session {self._request.session} talks nonsense."
            ) from error

    def _gone(self) -> SessiondError:
        self._died.set()
        return Failed(f"The worker of session {self._request.session} is gone.")

    async def swap(self, stack: Stack, *, moved: bool = False) -> None:
        """See `Mount.swap`."""
        await self._ask(control.Swap(stack=_layers(stack), moved=moved))
        self._stack = stack

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """See `Mount.frozen`."""
        await self._ask(control.Freeze())
        try:
            yield
        finally:
            if not self._died.is_set():
                with trio.CancelScope(shield=True):  # cancelled or not, programs may write again
                    await self._ask(control.Thaw())

    async def changes(self) -> ChangeSummary:
        """See `Mount.changes`."""
        counts = (await self._ask(control.Changes())).changes
        if counts is None:
            raise Failed(f"The worker of session {self._request.session} did not count changes.")
        return ChangeSummary(counts.added, counts.changed, counts.deleted, counts.bytes)

    async def diff(self, target: int) -> None:
        """See `Mount.diff`."""
        await self._ask(control.Diff(), (target,))

    async def sync(self) -> None:
        """See `Mount.sync`."""
        await self._ask(control.Sync())

    async def unmount(self) -> None:
        """See `Mount.unmount`."""
        detach(self._request.mount_point)
        with trio.CancelScope(shield=True):
            async with self._turn:
                if self._device < 0:
                    return
                with suppress(OSError, trio.ClosedResourceError):  # it is gone already
                    await control.send(self._open_channel, control.Stop())
                    while (await control.receive(self._open_channel))[0]:
                        pass
                self._hang_up()
                self._died.set()
                for descriptor in (self._device, self._journal):
                    os.close(descriptor)
                self._device = self._journal = -1

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
