"""Mounts and mounters that mount nothing, for tests of everything above them, without root.

They keep the promises of `Mounter` and `Mounts` as far as the session layer can see, and fail when
told to.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from sessiond.cgroups import Freezer
from sessiond.errors import Failed, SessiondError
from sessiond.overlay.flatten import Merge, open_merged
from sessiond.overlay.layer import Layer
from sessiond.session.model import (
    NO_BREAKDOWN,
    NOTHING_PENDING,
    WHOLE,
    Breakdown,
    ChangeSummary,
    Lowers,
    PendingWrites,
    SessionId,
    Span,
    Stack,
    Uid,
    UpperDirectories,
)
from sessiond.session.mounter import MergeState, MountRequest

DEVICE = "0:1048575"
"""That of each file system: none that there is, since /proc may be searched for it."""


class MemoryMount:
    """A mount that remembers what it was asked for."""

    def __init__(self, request: MountRequest, mounter: MemoryMounter) -> None:
        self.request = request
        self.stack = request.stack
        """What is served now."""
        self.inexact: tuple[str, ...] = ()
        """What the next swaps are to say."""
        self.rules = request.keep.rules if request.keep is not None else ()
        """What is kept now."""
        self.committed: tuple[str, ...] = ()
        self.worker = 0
        self.halt_next: Freezer | None = None
        """Whose programs are to stand still at the next `swap` or `frozen`."""
        self.halted_times = 0
        self.discarded: tuple[str, ...] = ()
        self.frozen_times = 0
        self.recovered_times = 0
        self.mounted = True
        self.summary = ChangeSummary(added=0, changed=0, deleted=0, bytes=0)
        self.pending_writes = NOTHING_PENDING
        self.differences: list[dict[str, str | int]] = []
        self.compared = WHOLE
        """What was compared last."""
        self._mounter = mounter
        self._held = trio.Lock()
        self._broken = False
        """Changes are no longer held, since a worker that held them has died."""
        self._dead = trio.Event()

    async def swap(
        self, stack: Stack, *, moved: bool = False, retained: bool = False
    ) -> tuple[str, ...]:
        await trio.lowlevel.checkpoint()
        self._halt()
        self._mounter.raise_injected("swap")
        self._require_alive()
        if self._broken:
            raise Failed("A worker died while changes were held; try again.")
        _require_directories(stack)
        self.stack = stack
        return self.inexact

    async def halt(self, freezer: Freezer) -> None:
        await trio.lowlevel.checkpoint()
        self._mounter.raise_injected("halt")
        self.halt_next = freezer

    def _halt(self) -> None:
        if self.halt_next is not None:
            self.halt_next.freeze()
            self.halted_times += 1
            self.halt_next = None

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        self._halt()
        self._mounter.raise_injected("frozen")
        self._require_alive()
        async with self._held:
            self.frozen_times += 1
            try:
                yield
            finally:
                self._broken = False

    async def write(self, name: str, contents: bytes) -> None:
        """What a program does in the merged view: put a file into the upper; waits while frozen."""
        async with self._held:
            (self.stack.upper.fs / name).write_bytes(contents)

    async def changes(
        self, span: Span = WHOLE, breakdown: Breakdown = NO_BREAKDOWN
    ) -> ChangeSummary:
        await trio.lowlevel.checkpoint()
        self._compare(span)
        return replace(self.summary, directories=self.summary.directories[: breakdown.directories])

    async def diff(self, target: int, span: Span = WHOLE, reader: Uid | None = None) -> None:
        self._compare(span)
        for difference in (*self.differences, {"complete": True}):
            line = json.dumps(difference).encode() + b"\n"
            try:
                while line:
                    await trio.lowlevel.wait_writable(target)
                    line = line[os.write(target, line) :]
            except BrokenPipeError:
                return

    async def merge(self, top: Path, bottom: Path) -> MergeState:
        await trio.lowlevel.checkpoint()
        self._mounter.raise_injected("merge")
        self._require_alive()
        below = self.stack.lowers[self.stack.lowers.index(bottom) + 1 :]
        layers = tuple(Layer.open(os.fsencode(path), writable=False) for path in below)
        with closing(Merge(open_merged(top), open_merged(bottom), layers)) as merge:
            if merge.obstacle():
                return MergeState.NEVER
            for _ in merge.steps():
                pass
            return MergeState.DONE

    def _compare(self, span: Span) -> None:
        self._require_alive()
        for point in (span.start, span.end):
            if point is not None:
                _require_lowers(point)
        self.compared = span

    async def keep(self, rules: tuple[str, ...]) -> None:
        await trio.lowlevel.checkpoint()
        self._mounter.raise_injected("keep")
        self._require_alive()
        self.rules = rules

    @asynccontextmanager
    async def committing(
        self, paths: tuple[str, ...], report: Callable[[int, int], None]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        steps = iter(("commit rest", "commit publish"))

        async def step() -> None:
            await trio.lowlevel.checkpoint()
            assert self._held.locked(), "programs can write"
            self._mounter.raise_injected(name := next(steps))
            self._require_alive()
            if name == "commit publish":
                self.committed += paths

        await trio.lowlevel.checkpoint()
        report(0, 1000)
        self._mounter.raise_injected("commit")
        self._require_alive()
        report(1000, 1000)
        yield step

    async def retain(self, paths: tuple[str, ...], upper: UpperDirectories) -> None:
        await trio.lowlevel.checkpoint()
        self._mounter.raise_injected("retain")
        self._require_alive()
        for path in paths:
            with suppress(FileNotFoundError):
                os.link(self.stack.upper.fs / path[1:], upper.fs / path[1:])

    async def discard(self, paths: tuple[str, ...]) -> None:
        await trio.lowlevel.checkpoint()
        self._mounter.raise_injected("discard")
        self._require_alive()
        self.discarded += paths

    async def sync(self) -> None:
        await trio.lowlevel.checkpoint()
        self._mounter.raise_injected("sync")
        self._require_alive()

    async def pending(self) -> PendingWrites:
        await trio.lowlevel.checkpoint()
        self._mounter.raise_injected("pending")
        self._require_alive()
        return self.pending_writes

    async def unmount(self) -> None:
        await trio.lowlevel.checkpoint()
        self.mounted = False
        self._dead.set()

    async def wait_died(self) -> None:
        await self._dead.wait()

    async def recover(self) -> None:
        await trio.lowlevel.checkpoint()
        self._mounter.raise_injected("recover")
        self.recovered_times += 1
        self._dead = trio.Event()
        self._broken, self._held = self._held.locked(), trio.Lock()

    def die(self) -> None:
        """Let the worker die, as by SIGKILL."""
        self._dead.set()

    def _require_alive(self) -> None:
        if self._dead.is_set():
            raise Failed(f"The worker of session {self.request.session} is gone.")


@dataclass
class MemoryMounter:
    """Makes `MemoryMount`s; `mounts` holds the latest of each session."""

    kind: type[MemoryMount] = MemoryMount
    mounts: dict[SessionId, MemoryMount] = field(default_factory=dict)
    injected: dict[str, list[SessiondError]] = field(default_factory=dict)
    """What the next calls of ``mount``, or of a mount's method, are to raise, in order."""

    async def mount(self, request: MountRequest) -> MemoryMount:
        await trio.lowlevel.checkpoint()
        self.raise_injected("mount")
        if not request.mount_point.is_dir():
            raise Failed(f"The mount point {request.mount_point} is not a directory.")
        _require_directories(request.stack)
        mount = self.mounts[request.session] = self.kind(request, self)
        return mount

    def left(self) -> set[SessionId]:
        return set()

    async def adopt(self, request: MountRequest) -> MemoryMount | None:
        await trio.lowlevel.checkpoint()
        return None

    async def forget_left(self) -> None:
        await trio.lowlevel.checkpoint()

    def raise_injected(self, call: str) -> None:
        """Fail `call` if that was asked for."""
        if self.injected.get(call):
            raise self.injected[call].pop(0)


def _require_directories(stack: Stack) -> None:
    _require_lowers(Lowers((stack.upper.fs, stack.upper.work, *stack.lowers)))


def _require_lowers(lowers: Lowers) -> None:
    for directory in lowers.paths:
        if not directory.is_dir():
            raise Failed(f"The layer {directory} cannot be opened.")


@dataclass
class MemoryMounts:
    """A kernel that only remembers what is mounted; a tmpfs is the directory below it."""

    mounted: dict[Path, str] = field(default_factory=dict)
    """Mount point to kind of file system."""
    limits: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """Bytes and inodes of each tmpfs."""
    unsupported: set[str] = field(default_factory=set)
    in_ram: bool = False
    """There is no disk: all directories are in RAM."""
    injected: list[OSError] = field(default_factory=list)
    """What the next mounts are to raise, in order."""

    def mount_tmpfs(self, target: Path, *, size: str, inodes: int | None) -> None:
        self._mount(target, "tmpfs")
        self.limits[target] = (int(size), inodes or 0)

    def tmpfs_limits(self, target: Path) -> tuple[int, int]:
        return self.limits.get(target, (0, 0))

    def mount_clone(self, source: Path, target: Path) -> None:
        self._mount(target, "directory")

    def mount_image(self, device: Path, target: Path, kind: str) -> None:
        if kind in self.unsupported:
            raise OSError(errno.ENODEV, f"unknown filesystem type '{kind}'")
        self._mount(target, kind)

    def file_system(self, target: Path) -> str | None:
        return self.mounted.get(target)

    def is_in_ram(self, directory: Path) -> bool:
        return self.in_ram

    def device(self, target: Path) -> str | None:
        return DEVICE

    def mounted_below(self, directory: Path) -> list[Path]:
        below = [target for target in self.mounted if directory in target.parents]
        return sorted(below, key=lambda path: len(path.parts), reverse=True)

    def detach(self, target: Path, *, only: str | None = None) -> None:
        if only in {None, self.mounted.get(target)}:
            self.mounted.pop(target, None)

    def supports(self, kind: str) -> bool:
        return kind not in self.unsupported

    def _mount(self, target: Path, kind: str) -> None:
        if self.injected:
            raise self.injected.pop(0)
        assert target.is_dir(), f"{target} is no directory to mount on"
        self.mounted[target] = kind
