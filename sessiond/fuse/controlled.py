"""The manager's side of a worker: it answers one request after another.

What takes long goes on beside that, and tells its outcome through a socket of its own.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import trio
from pydantic import ValidationError

from sessiond import control
from sessiond.cgroups import Freezer, Halt
from sessiond.control import ChangeCounts, LayerStack, PendingFile, PendingFiles, Reply
from sessiond.fuse import comparison, device
from sessiond.fuse.commits import Commits
from sessiond.fuse.counting import Counting
from sessiond.fuse.layers import (
    close_unused_orphans,
    note_rules,
    note_stack,
    open_lowers,
    open_stack,
    storages_open,
)
from sessiond.fuse.merging import Merging
from sessiond.fuse.operations import OverlayOperations
from sessiond.fuse.sandbox import Sandbox
from sessiond.fuse.vanished import Vanished
from sessiond.keep_rules import KeepRules
from sessiond.overlay.by_directory import ByDirectory
from sessiond.overlay.exchange import HalfDoneError, Outdated, no_way_back
from sessiond.overlay.layer import Layer
from sessiond.overlay.retain import Retain
from sessiond.overlay.stack import Stack
from sessiond.session.model import DataPath

log = logging.getLogger(__name__)

_COMPARISONS_AT_ONCE = 16
_MOST_TOLD = 50
"""Paths in one reply: of 4096 bytes, they fit."""
_SETTLE_SECONDS = 10.0
"""How often files that are written to storage that the session has left are copied to disk."""
_LOOK_SECONDS = 1.0
"""And how often it is looked whether nobody has them open any more: that the last close has come is
told before the kernel has closed the file.
"""
_PENDING_OVERHEAD = 64
"""Bytes that a file takes in a message, besides its path; about."""


class Controlled:
    """The manager's side of a worker: one request after another."""

    def __init__(
        self,
        operations: OverlayOperations,
        layers: LayerStack,
        connection: int,
        journal: int,
        nursery: trio.Nursery,
        confined: Sandbox,
    ) -> None:
        """`layers`: what is served."""
        self._operations = operations
        self._layers = layers
        self._connection = connection
        self._journal = journal
        self._nursery = nursery
        self._sandbox = confined
        self._merging = Merging(operations)
        self._vanished = Vanished(operations.view, nursery)
        self._comparisons = trio.CapacityLimiter(_COMPARISONS_AT_ONCE)
        self.counting = Counting(operations.view, self._comparisons)
        self._commits = Commits(
            operations.view, operations.exchange, trio.CapacityLimiter(1), lambda: self._is_frozen
        )
        self._retained: tuple[Path, Retain] | None = None
        """What the upper at that path was filled with, which is expected to be served next."""
        self._settling: Retain | None = None
        """The same, once it is served, until the manager knows that."""
        self._frozen = AsyncExitStack()
        self._is_frozen = False
        self._halt = Halt()
        self._unannounced: list[Callable[[], Awaitable[None]]] = []
        """What the kernel is to be told once changes pass again: telling it waits for them."""

    async def run(self, channel: trio.socket.SocketType, listener: trio.socket.SocketType) -> None:
        """Report, and answer requests until the manager says `Stop`.

        If it goes without a word, another may come, and is given the descriptors that it needs.
        What was held back until then stays so: the manager may be about to exchange the layers.
        """
        async with self._frozen:
            while True:
                with suppress(OSError):  # it is gone already
                    await control.send(channel, self._report(), (self._connection, self._journal))
                    if await self._attend(channel):
                        return
                self._halt.end()
                channel.close()
                channel, _ = await listener.accept()

    def _report(self) -> Reply:
        return Reply(
            worker=os.getpid(),
            data_path=self._operations.data_path,
            stack=self._layers,
            frozen=self._is_frozen,
        )

    async def _attend(self, channel: trio.socket.SocketType) -> bool:
        """Answer requests; return whether the last was `Stop`."""
        while True:
            packet, descriptors = await control.receive(channel)
            try:
                if not packet:
                    return False
                self._operations.exchange.settle()  # its answer to the last request has arrived
                self._settle_retained()
                if storages_open() > 1:
                    close_unused_orphans(self._operations.view)
                request = control.parse_request(packet)
                if isinstance(request, control.Stop):
                    return True
                reply = await self._answer(request, descriptors)
            except ValidationError:
                reply = Reply(error="The worker does not know what it was asked for.")
            finally:
                for fd in descriptors:
                    os.close(fd)
            await control.send(channel, reply)

    async def _answer(self, request: control.Request, descriptors: list[int]) -> Reply:
        try:
            match request:
                case control.Swap():
                    return await self._answer_swap(request)
                case control.Halt() | control.Freeze() | control.Thaw():
                    return await self._answer_hold(request, descriptors)
                case (
                    control.Changes()
                    | control.Diff()
                    | control.Sync()
                    | control.Commit()
                    | control.Retain()
                ):
                    return self._begin(request, descriptors)
                case control.Pending():
                    return Reply(pending=self._pending())
                case control.MergeLayers():
                    return self._merge(request)
                case control.Keep() | control.Discard():
                    await self._answer_keep(request)
        except OSError as error:
            return control.failure(error)
        except Exception:
            log.exception("request %s failed", request)
            return Reply(error="the worker failed; its log has the reason")
        return Reply()

    async def _answer_swap(self, request: control.Swap) -> Reply:
        if request.held and not self._is_frozen:
            # It was a predecessor of this process that held them back; they have passed since.
            return Reply(error="A worker died while changes were held; try again.")
        retained = self._retained
        if request.retained and (retained is None or retained[0] != request.stack.upper):
            return Reply(error="A worker died while changes were held; try again.")
        try:
            inexact = await self.swap(request.stack, moved=request.moved)
        finally:
            self._halt.end()
        if request.retained and retained is not None:
            self._retained, self._settling = None, retained[1]
        return Reply(inexact=inexact)

    def _settle_retained(self) -> None:
        """End what a swap has begun with what it has retained."""
        settled, self._settling = self._settling, None
        if settled is not None:
            settled.settle()
            settled.close()

    async def _answer_hold(
        self, request: control.Halt | control.Freeze | control.Thaw, descriptors: list[int]
    ) -> Reply:
        match request:
            case control.Halt():
                if len(descriptors) != 2 or self._is_frozen:
                    return Reply(error="Programs cannot be stopped now.")
                # With other data paths, to hold requests is to hold all that is written.
                if self._operations.data_path is DataPath.PASSTHROUGH:
                    self._halt.prepare(Freezer(*map(os.dup, descriptors)))
            case control.Freeze():
                await self.freeze()
            case control.Thaw():
                await self.thaw()
        return Reply()

    async def _answer_keep(self, request: control.Keep | control.Discard) -> None:
        keep = self._operations.view.keep
        if isinstance(request, control.Keep):
            await self.keep(KeepRules(request.rules))
        elif keep is not None:
            for path in request.paths:
                aside = keep.discard(os.fsencode(path)[1:])
                self._nursery.start_soon(self._commits.remove, aside)

    def _merge(self, request: control.MergeLayers) -> Reply:
        if self._comparisons.borrowed_tokens:  # they rely on where things are
            return Reply(merging="more")
        return self._merging.advance(request, self._layers)

    def _copy(self) -> Stack:
        return self._operations.view.stack.copy()

    def _copies(self) -> list[Stack]:
        return [stack.copy() for stack in self._operations.view.stacks]

    async def keep(self, rules: KeepRules) -> None:
        """Keep what `rules` say from now on."""
        await self._commits.undo_unless(rules)
        before = self._operations.view.keep
        if before is None or before.rules.rules == rules.rules:
            return
        if self._is_frozen:
            outdated = self._operations.keep_paths(rules)
        else:
            async with self._operations.frozen():
                outdated = self._operations.keep_paths(rules)
        announce = functools.partial(self._announce_rules, rules, outdated)
        if self._is_frozen:
            self._unannounced.append(announce)
        else:
            await announce()

    async def _announce_rules(self, rules: KeepRules, outdated: Outdated) -> None:
        await trio.to_thread.run_sync(self._tell_kernel, outdated, [])
        if self._operations.data_path is not DataPath.PLAIN:
            note_rules(rules)
        self._nursery.start_soon(self._commits.finish)

    def _tell_kernel(self, outdated: Outdated, lost: list[tuple[int, bytes]]) -> None:
        """Tell the kernel what it must not take for granted any more. In a thread."""
        device.expire(self._connection, outdated.names)
        device.invalidate(lost, outdated.directories)

    def _start_commit(self, request: control.Commit, descriptor: int) -> Reply:
        paths = [os.fsencode(path)[1:] for path in request.paths]
        self._commits.require_ways(paths)
        self._nursery.start_soon(self._commits.carry_out, paths, _socket(descriptor))
        return Reply()

    def _start_retaining(self, request: control.Retain, descriptor: int) -> Reply:
        if not self._is_frozen:
            return Reply(error="Nothing can be retained now.")
        view, pending = self._operations.view, self._operations.overlay.pending
        self._forget_retained()
        for number in pending.numbers:  # one that fails would be retained as it was once
            pending.renew(view.node(number))
        outcome = _socket(descriptor)
        work = Retain(
            self._copy(),
            Layer.open(os.fsencode(request.upper), writable=True),
            KeepRules() if view.keep is None else view.keep.rules,
            [os.fsencode(path)[1:] for path in request.paths],
            lambda: control.hung_up(outcome),
        )
        self._nursery.start_soon(self._retain, request.upper, work, outcome)
        return Reply()

    def _forget_retained(self) -> None:
        retained, self._retained = self._retained, None
        if retained is not None:
            retained[1].close()

    async def _retain(self, upper: Path, work: Retain, outcome: trio.socket.SocketType) -> None:
        with outcome:
            try:
                await trio.to_thread.run_sync(work.run)
                self._forget_retained()
                self._retained = upper, work
                reply = Reply()
            except OSError as error:
                work.close()
                reply = control.failure(error)
            except Exception:
                log.exception("paths cannot be retained")
                work.close()
                reply = Reply(error="the worker failed; its log has the reason")
            with suppress(OSError):
                await control.send(outcome, reply)

    def _begin(
        self,
        request: control.Changes | control.Diff | control.Sync | control.Commit | control.Retain,
        descriptors: list[int],
    ) -> Reply:
        if len(descriptors) != (2 if isinstance(request, control.Diff) else 1):
            return Reply(error="The request came without its descriptors.")
        if isinstance(request, control.Commit):
            return self._start_commit(request, descriptors[0])
        if isinstance(request, control.Retain):
            return self._start_retaining(request, descriptors[0])
        outcome = _socket(descriptors[0])
        if isinstance(request, control.Sync):
            self._nursery.start_soon(self._sync, outcome)
            return Reply()
        compare: Callable[[], Awaitable[ChangeCounts | None]]
        if isinstance(request, control.Changes) and request.start is request.end is None:
            compare = functools.partial(self.counting.count, _by_directory(request))
        else:
            stack, base = self._states(request)
            if isinstance(request, control.Diff):
                compare = self._in_thread(
                    comparison.write_list,
                    stack,
                    base,
                    os.dup(descriptors[1]),
                    request.patience,
                    lambda: control.hung_up(outcome),
                    request.reader,
                )
            else:
                compare = self._in_thread(comparison.count, stack, base, _by_directory(request))
        self._nursery.start_soon(self._compare, compare, outcome)
        return Reply()

    def _in_thread(
        self, compare: Callable[..., ChangeCounts | None], *arguments: object
    ) -> Callable[[], Awaitable[ChangeCounts | None]]:
        """Its threads are not those that requests of the mount need."""
        return functools.partial(
            trio.to_thread.run_sync,
            compare,
            *arguments,
            abandon_on_cancel=True,
            limiter=self._comparisons,
        )

    def _states(self, request: control.Changes | control.Diff) -> tuple[Stack, Stack]:
        """Return what is compared, and what with."""
        stack = self._copy() if request.end is None else open_lowers(request.end)
        try:
            return stack, stack.bottom() if request.start is None else open_lowers(request.start)
        except BaseException:
            stack.close()
            raise

    async def _compare(
        self, compare: Callable[[], Awaitable[ChangeCounts | None]], outcome: trio.socket.SocketType
    ) -> None:
        """Do it in the background, since others must not wait; send the outcome to a socket."""
        with outcome:
            try:
                reply = Reply(changes=await compare())
            except OSError as error:
                reply = control.failure(error)
            except Exception:
                log.exception("a comparison failed")
                reply = Reply(error="the worker failed; its log has the reason")
            with suppress(OSError):  # it does not want to know any more
                await control.send(outcome, reply)

    async def _sync(self, outcome: trio.socket.SocketType) -> None:
        """Do it in the background, as `_compare`."""
        with outcome:
            try:
                await self._operations.settle_all()
                await trio.to_thread.run_sync(_sync, self._copies())
                reply = Reply()
            except OSError as error:
                reply = control.failure(error)
            with suppress(OSError):  # it does not want to know any more
                await control.send(outcome, reply)

    async def settle(self) -> None:
        """Now and then, bring to the disk what is still written to storage that was left.

        It takes a tenth of the time at most, however much that is.
        """
        pending = self._operations.overlay.pending
        next_time, said = 0.0, ""
        while True:
            await trio.sleep(_LOOK_SECONDS if pending.numbers else _SETTLE_SECONDS)
            begun = trio.current_time()
            only_closed = begun < next_time
            try:
                await self._operations.settle_all(only_closed=only_closed)
                problem = said if only_closed else ""
            except OSError as error:
                problem = control.failure(error).error or ""
            if problem not in {said, ""}:
                log.error("What is written to an open file stays in RAM: %s", problem)
            said = problem
            if not only_closed:
                now = trio.current_time()
                next_time = now + max(_SETTLE_SECONDS, 9 * (now - begun))

    def leave_former(self) -> None:
        """Let storage that the session has left be unmounted, once nothing there is in use.

        Descriptors are all that is needed of it.
        """
        if self._layers.former is not None:
            self._sandbox.leave((self._layers.upper, *self._layers.lowers))

    def _pending(self) -> PendingFiles:
        view = self._operations.view
        nodes = [view.node(number) for number in self._operations.overlay.pending.numbers]
        linked = [node for node in nodes if node.linked]
        files: list[PendingFile] = []
        size = 0
        for node in linked:
            path = (b"/" + node.path).decode(errors="backslashreplace")
            size += len(path) + _PENDING_OVERHEAD
            if size > control.MESSAGE_LIMIT // 8:  # a character may become six in JSON
                break
            files.append(PendingFile(path=path, inode=node.kept_number))
        in_use = storages_open() > len(view.stacks)
        return PendingFiles(files=tuple(files), count=len(linked), in_use=in_use)

    async def freeze(self) -> None:
        """Hold changes back."""
        if not self._is_frozen:
            await self._vanished.leave()
            await self._halt.begin()
            await self._frozen.enter_async_context(self._operations.frozen())
            self._is_frozen = True

    async def thaw(self) -> None:
        """Let them pass again, and tell the kernel what has been exchanged meanwhile."""
        self._halt.end()
        self._forget_retained()
        await self._frozen.aclose()
        self._is_frozen = False
        announcements, self._unannounced = self._unannounced, []
        for announce in announcements:
            await announce()

    async def swap(self, layers: LayerStack, *, moved: bool) -> tuple[str, ...]:
        """Serve `layers` from now on; return as `Reply.inexact`.

        Raises OSError, with those before still served.
        What the kernel has cached of those before may be seen until changes pass again.
        """
        self._merging.close()
        if layers.upper == self._layers.upper:
            self._exchange_lowers(layers)
            return ()
        stack = open_stack(layers, self._operations.view.stack.options)
        # As for a snapshot. Then all that the kernel knows goes on.
        same_view = layers.lowers == (self._layers.upper, *self._layers.lowers)
        # By the path: a manager that comes after one that died does not know of it.
        retained = self._retained is not None and self._retained[0] == layers.upper
        exchange = functools.partial(
            self._exchange, stack, moved=moved, retained=retained, same_view=same_view
        )
        try:
            if self._is_frozen:
                outdated, lost = exchange()
            else:
                await self._vanished.leave()
                await self._halt.begin()
                async with self._operations.frozen():
                    outdated, lost = exchange()
        except BaseException:
            stack.close()  # it would hold on to the space of what is deleted
            raise
        self._layers = layers
        self.leave_former()
        announce = functools.partial(self._announce, layers, outdated, lost)
        if self._is_frozen and not same_view:
            self._unannounced.append(announce)
        else:
            await announce()
        inexact = outdated.inexact[:_MOST_TOLD]
        return tuple(path.decode(errors="backslashreplace") for path in inexact)

    async def _announce(
        self, layers: LayerStack, outdated: Outdated, lost: list[tuple[int, bytes]]
    ) -> None:
        try:
            await trio.to_thread.run_sync(self._tell_kernel, outdated, lost)
        except OSError:
            log.exception("the kernel may show what was before the layers were exchanged")
        self._vanished.drop(outdated.vanished)
        close_unused_orphans(self._operations.view)
        # Last: a successor that finds the layers before these exchanges them once more.
        if self._operations.data_path is not DataPath.PLAIN:
            note_stack(layers)

    def _exchange_lowers(self, layers: LayerStack) -> None:
        """Serve the same upper, and lowers that show the same: some are empty, here or there."""
        self._operations.exchange.exchange_lowers(
            [os.fsencode(path) for path in layers.lowers],
            [os.fsencode(path) for path in layers.indexes if path.is_dir()],
        )
        self._layers = layers
        if self._operations.data_path is not DataPath.PLAIN:
            note_stack(layers)

    def _exchange(
        self, stack: Stack, *, moved: bool, retained: bool, same_view: bool
    ) -> tuple[Outdated, list[tuple[int, bytes]]]:
        """Swap; return what the kernel is to be told.

        If that fails half-way, this process dies: the manager goes back to the layers before, and a
        successor finds in the journal how to.
        """
        exchange = self._operations.exchange
        # Open or not, what the kernel remembers is held, and its space with it, until it is told
        # that the name is gone.
        keeps_space = self._operations.data_path is DataPath.CACHED and not same_view
        held = exchange.upper_names() if keeps_space else []
        try:
            outdated = self._operations.swap(stack, moved=moved, retained=retained, halt=self._halt)
            with no_way_back():
                return outdated, exchange.lost_names(held, outdated)
        except HalfDoneError:
            log.critical("the layers were exchanged in part; this worker ends", exc_info=True)
            os.kill(os.getpid(), signal.SIGKILL)
            raise


def _by_directory(request: control.Changes) -> ByDirectory | None:
    return ByDirectory(request.directories, request.depth) if request.directories else None


def _socket(descriptor: int) -> trio.socket.SocketType:
    """Return the socket that `descriptor` is, with a descriptor of its own. Raises OSError."""
    duplicate = os.dup(descriptor)
    try:
        return trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _sync(stacks: list[Stack]) -> None:
    try:
        for stack in stacks:
            stack.sync()
    finally:
        for stack in stacks:
            stack.close()
