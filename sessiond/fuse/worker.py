"""The worker: one process that serves one mount, and takes requests from the manager about it.

One trio task reads the control socket, pyfuse3's tasks serve the mount; all in one thread, so
requests of either side never overlap but at checkpoints.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import pyfuse3
import trio

from sessiond import control
from sessiond.control import (
    LayerStack,
    Reply,
    Start,
)
from sessiond.fuse import data_path, sandbox
from sessiond.fuse.controlled import Controlled
from sessiond.fuse.layers import (
    note_rules,
    note_stack,
    open_either,
    open_keep,
    open_stack,
    rules_of,
    stack_of,
)
from sessiond.fuse.operations import OverlayOperations
from sessiond.fuse.sandbox import Sandbox
from sessiond.keep_rules import KeepRules
from sessiond.overlay.fastpath import Inherited
from sessiond.overlay.keep import Keep
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack, StackOptions
from sessiond.session.model import DataPath

if data_path.HAS_EXTENSION:
    from sessiond.fuse import _kernel_io
    from sessiond.fuse.kernel_operations import KernelFastPath, KernelOperations

log = logging.getLogger(__name__)


def prepare_process() -> None:
    """Set what a worker process needs: many descriptors, and modes of new files taken as given."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/proc/sys/fs/nr_open", encoding="ascii") as file:
        most = int(file.read())
    for limit in (most, hard):  # the first takes CAP_SYS_RESOURCE
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            break
    os.umask(0)
    # A lease, by which mappings are found (kernel_io/files.c), may be broken while it is held.
    signal.signal(signal.SIGIO, signal.SIG_IGN)


class _AbortedReplies(logging.Filter):
    """Leaves out replies that nobody waits for any more: the kernel aborts requests at unmount."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        message = record.getMessage()
        return "fuse_reply_* failed" not in message or os.strerror(errno.ENOENT) not in message


def start_fuse(stack: Stack, mount_point: str, path: DataPath) -> OverlayOperations:
    """Begin to serve; `mount_point` may be ``/dev/fd/N``, a connection that is mounted already.

    Takes over `stack`.
    """
    operations = _operations(stack, path)
    _connect(operations, mount_point)
    return operations


def _operations(stack: Stack, path: DataPath) -> OverlayOperations:
    if path is DataPath.PLAIN:
        return OverlayOperations(Overlay(stack))
    return KernelOperations(Overlay(stack, KernelFastPath(path)), path)


def _connect(operations: OverlayOperations, mount_point: str) -> None:
    logging.getLogger("pyfuse3").addFilter(_AbortedReplies())
    pyfuse3.init(operations, mount_point, {"default_permissions"})


async def serve_fuse() -> None:
    """Serve requests until the mount is gone."""
    try:
        await pyfuse3.main()
    except* OSError as errors:
        _, others = errors.split(_is_abort)
        if others is not None:
            raise others from None
    finally:
        pyfuse3.close(unmount=False)


def _is_abort(error: BaseException) -> bool:
    """The kernel says so, to pyfuse3 alone, when the mount went away with requests under way."""
    return isinstance(error, OSError) and error.errno == errno.ECONNABORTED


def run(
    start: Start,
    connection: int,
    journal: int,
    manager: socket.socket,
    listener: socket.socket,
) -> None:
    """Serve layers on a FUSE connection until a manager says so, or the mount is gone.

    `journal`: a descriptor of a file in memory, where a successor will find what it has to know.
    `listener`: where another manager will find this process, should `manager` be gone.
    """
    prepare_process()
    trio.run(_run, start, connection, journal, manager, listener)


def rehearse() -> None:
    """Do once what every worker does first.

    What Python computes and keeps when code runs for the first time, workers forked later share.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, tempfile.TemporaryDirectory() as directory:
        lower = Path(directory)
        layers = LayerStack(
            upper=lower / "upper",
            work=lower / "work",
            lowers=(lower,),
        )
        start = Start(stack=layers, data_path="plain", reachable=(lower,))
        Start.model_validate_json(start.model_dump_json())
        for path in (layers.upper, layers.work):
            path.mkdir()
        trio.run(_rehearse, layers, ours, theirs)


async def _rehearse(layers: LayerStack, ours: socket.socket, theirs: socket.socket) -> None:
    channel = trio.socket.from_stdlib_socket(ours)
    manager = trio.socket.from_stdlib_socket(theirs)
    overlay = Overlay(open_stack(layers, StackOptions()))
    operations = OverlayOperations(overlay)
    async with trio.open_nursery() as nursery:
        controlled = Controlled(
            operations, layers, ours.fileno(), ours.fileno(), nursery, Sandbox(())
        )
        nursery.start_soon(controlled.run, channel, channel)
        _, descriptors = await control.receive(manager)
        for descriptor in descriptors:
            os.close(descriptor)
        for request in (control.Freeze(), control.Thaw()):
            await control.send(manager, request)
            await control.receive(manager)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            await control.send(manager, control.Changes(), (theirs.fileno(),))
            await control.receive(manager)
            await control.receive(trio.socket.from_stdlib_socket(ours))
        await control.send(manager, control.Stop())
    overlay.close()


async def _run(
    start: Start,
    connection: int,
    journal: int,
    manager: socket.socket,
    listener: socket.socket,
) -> None:
    channel = trio.socket.from_stdlib_socket(manager)
    try:
        confined = sandbox.enter(start.reachable)
        path = data_path.choose(start.data_path)
        operations, served, is_known = _prepare(start, path, connection, journal)
    except OSError as error:
        await control.send(channel, control.failure(error))
        return
    except ValueError as error:
        await control.send(channel, Reply(error=str(error)))
        return
    _connect(operations, f"/dev/fd/{connection}")
    try:
        async with trio.open_nursery() as nursery:
            controlled = Controlled(operations, served, connection, journal, nursery, confined)
            is_current = served == start.stack and is_known
            if not is_current:  # nothing must change any more in layers that have been copied
                await controlled.freeze()
            nursery.start_soon(_serve_and_cancel, nursery.cancel_scope)
            nursery.start_soon(controlled.settle)
            await operations.initialised.wait()
            if not is_current:
                await controlled.swap(start.stack, moved=served.orphans != start.stack.orphans)
            if start.keep is not None:
                await controlled.keep(KeepRules(start.keep.rules))
            if not is_current:
                await controlled.thaw()
            controlled.leave_former()
            nursery.start_soon(controlled.counting.run)
            await controlled.run(channel, trio.socket.from_stdlib_socket(listener))
            operations.overlay.pending.renew_all()
            nursery.cancel_scope.cancel()
    finally:
        operations.overlay.close()


def _prepare(
    start: Start, path: DataPath, connection: int, journal: int
) -> tuple[OverlayOperations, LayerStack, bool]:
    """Open the layers, and take over what a predecessor has left.

    Returns also what layers these are, and whether what the kernel knows is of them. Raises
    OSError, ValueError, with words for people.
    """
    if path is DataPath.PLAIN:
        stack = open_stack(start.stack, StackOptions())
        plain = OverlayOperations(Overlay(stack, keep=_open_keep(start, stack)))
        plain.exchange.find_ways()
        return plain, start.stack, True
    if not _kernel_io.record(connection, journal, start.inherits):
        raise ValueError("What the worker before this one has left cannot be read.")
    inherited = [Inherited(*left) for left in _kernel_io.inherited()]
    before = stack_of(inherited)
    layers, stack = open_either(before or start.stack, start.stack)
    fast_path = KernelFastPath(path, recorded=True)
    keep = _open_keep(start, stack, rules_of(inherited))
    operations = KernelOperations(Overlay(stack, fast_path, inherited, keep), path)
    if start.inherits:
        moved = before is not None and before.orphans != layers.orphans
        operations.take_over(inherited, moved=moved)
    else:
        operations.view.remove_orphans()
    operations.exchange.find_ways()
    if before is None:
        note_stack(layers)
    if keep is not None:
        note_rules(keep.rules)
    return operations, layers, before in {None, layers}


def _open_keep(start: Start, stack: Stack, rules: tuple[str, ...] | None = None) -> Keep | None:
    """Open what outlives resets of `stack`, which is closed where that fails. `rules`: those that
    are in force.
    """
    if start.keep is None:
        return None
    layers = start.keep if rules is None else start.keep.model_copy(update={"rules": rules})
    try:
        return open_keep(layers, stack)
    except BaseException:
        stack.close()
        raise


async def _serve_and_cancel(scope: trio.CancelScope) -> None:
    await serve_fuse()
    scope.cancel()
