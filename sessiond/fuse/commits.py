"""The worker's side of a commit: it copies in the background, step by step as the manager says.

What takes long is done while programs go on. The manager holds them back for the rest, and says by
the next rules whether the commit counts.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import trio

from sessiond import control
from sessiond.control import Copied, Reply
from sessiond.keep_rules import KeepRules
from sessiond.overlay import syscalls
from sessiond.overlay.commit import Commit
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.syscalls import At
from sessiond.overlay.tally import Watch
from sessiond.overlay.view import View
from sessiond.overlay.workdir import remove_tree

log = logging.getLogger(__name__)

_MOST_ROUNDS = 4
"""How often what has changed is copied again, for programs that write as fast as it is copied."""
_LITTLE = 16 << 20
"""Bytes that may be copied while programs wait, as of Persist."""
_MANY = 1 << 40
_REPORT_SECONDS = 0.2

_T = TypeVar("_T")


class Commits:
    """Those of one overlay: one at a time. Runs in the thread that serves the mount."""

    def __init__(
        self,
        view: View,
        exchange: Exchange,
        limiter: trio.CapacityLimiter,
        is_frozen: Callable[[], bool],
    ) -> None:
        """`limiter`: of threads; those that requests of the mount need are not used."""
        self._view = view
        self._exchange = exchange
        self._limiter = limiter
        self._is_frozen = is_frozen
        self._turn = trio.Lock()
        self._published: Commit | None = None
        """What the next rules are expected to name."""
        self._counts: Commit | None = None
        """What they have named."""

    def require_ways(self, paths: Sequence[bytes]) -> None:
        """Prepare for `paths` to be put to what is kept. Raises OSError with words for people."""
        for path in paths if self._view.keep is not None else ():
            self._exchange.make_way(path)

    async def carry_out(self, paths: Sequence[bytes], channel: trio.socket.SocketType) -> None:
        """Do what `control.Commit` says; `channel` is taken over."""
        with channel:
            try:
                async with self._turn:
                    await self._carry_out(paths, channel)
            except OSError as error:
                reply = control.failure(error)
            except Exception:
                log.exception("a commit failed")
                reply = Reply(error="the worker failed; its log has the reason")
            else:
                return
            with suppress(OSError):  # it does not want to know any more
                await control.send(channel, reply)

    async def _carry_out(self, paths: Sequence[bytes], channel: trio.socket.SocketType) -> None:
        view = self._view
        if view.keep is None:
            raise OSError(errno.EOPNOTSUPP, "nothing can be kept")
        watch = view.touched.watch()
        work: Commit | None = None
        try:
            work = Commit(
                view.stack.copy(),
                view.keep,
                paths,
                partial(control.hung_up, channel),
                _Told(channel),
            )
            await self._copy(work, watch)
            if not await _next_step(channel):
                return
            await self._copy_rest(work, watch, paths)
            if not await _next_step(channel):
                return
            self._require_frozen()
            await self._in_thread(work.publish)
            self._published, work = work, None
            await control.send(channel, Reply())
        finally:
            view.touched.unwatch(watch)
            if work is not None:
                with trio.CancelScope(shield=True):
                    await self._in_thread(partial(_close, work))

    async def _copy(self, work: Commit, watch: Watch) -> None:
        """Copy all but what has changed in the end."""
        await self._in_thread(work.copy)
        for _ in range(_MOST_ROUNDS):
            touched, identities = watch.take(most=_MANY), watch.take_identities()
            session = self._view.stack.copy()
            renew = partial(work.renew, session, touched, identities)
            if await self._in_thread(renew) <= _LITTLE:
                break
        await self._in_thread(work.sync)

    async def _copy_rest(self, work: Commit, watch: Watch, paths: Sequence[bytes]) -> None:
        """Copy what has changed since, files that are open for writing included."""
        self._require_frozen()
        self.require_ways(paths)
        touched, identities = watch.take(), watch.take_identities()
        session = self._view.stack.copy()
        await self._in_thread(partial(work.renew, session, touched, identities, last=True))

    def _require_frozen(self) -> None:
        if not self._is_frozen():
            raise OSError(errno.EBUSY, "nothing can be committed now, while changes pass")

    async def undo_unless(self, rules: KeepRules) -> None:
        """Know whether what was put in its place counts: `rules` are about to be in force."""
        work, self._published = self._published, None
        if work is None:
            return
        if all(map(rules.keep, work.paths)):
            self._counts = work
            return
        try:
            await self._in_thread(work.undo)
        except OSError as error:
            log.error("what a commit has left takes space: %s", error)  # noqa: TRY400
        await self._in_thread(partial(_close, work))

    async def finish(self) -> None:
        """Remove what nobody sees any more: the rules are in force, and the kernel knows."""
        work, self._counts = self._counts, None
        if work is None:
            return
        hidden = [self._exchange.take_hidden(path) for path in work.paths]
        await self.remove([at for at in hidden if at is not None])
        await self._in_thread(partial(_close, work))

    async def remove(self, aside: Sequence[At]) -> None:
        """Remove what was put into a workdir, in the background; the layers may be exchanged."""
        held = [At(syscalls.duplicate(at.directory), at.name) for at in aside]
        try:
            for at in held:
                await self._in_thread(partial(_remove, at))
        finally:
            for at in held:
                syscalls.close(at.directory)

    async def _in_thread(self, function: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(function, limiter=self._limiter)


def _remove(at: At) -> None:
    # The layer may be being deleted. What is left is removed when its workdir is opened.
    with suppress(OSError):
        remove_tree(at)


def _close(work: Commit) -> None:
    with suppress(OSError):  # in the same way
        work.close()


class _Told:
    """Tells the manager now and then how much is copied, from a thread."""

    def __init__(self, channel: trio.socket.SocketType) -> None:
        self._channel = channel
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _REPORT_SECONDS
            with suppress(OSError):  # that nobody is there is found out otherwise
                reply = Reply(copied=Copied(done=done, total=total))
                trio.from_thread.run(control.send, self._channel, reply)


async def _next_step(channel: trio.socket.SocketType) -> bool:
    """Say that one is done, and wait; return whether there is to be another."""
    try:
        await control.send(channel, Reply())
        packet, descriptors = await control.receive(channel)
    except OSError:
        return False
    for descriptor in descriptors:
        os.close(descriptor)
    return bool(packet)
