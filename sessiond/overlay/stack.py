"""The layer stack of one overlay: an upper with its workdir, over any number of lowers."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sessiond.overlay import syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.syscalls import At
from sessiond.overlay.workdir import Workdir
from sessiond.overlay.xattrs import OverlayXattrs

if TYPE_CHECKING:
    from sessiond.overlay.keep import Ways
    from sessiond.overlay.orphans import Orphans


@dataclass(frozen=True, slots=True)
class StackOptions:
    """How layers are read and written; the mount options of overlayfs of the same meaning."""

    user_xattrs: bool = False
    """Own attributes under ``user.overlay.``, for an unprivileged mounter; as in the kernel, no
    redirects.
    """


class Stack:
    """Layers, topmost first. Everything opened here is closed by `close`.

    Invariant: `upper` and `work` are both there, or neither is.
    """

    def __init__(
        self,
        lowers: tuple[Layer, ...],
        upper: Layer | None,
        work: Workdir | None,
        options: StackOptions,
        *,
        data: tuple[Layer, ...] = (),
        indexes: tuple[Layer, ...] = (),
        locks: tuple[int, ...] = (),
    ) -> None:
        self.lowers = lowers
        self.data = data
        """Data-only lowers: looked into only for the contents of metadata-only files."""
        self.indexes = indexes
        """Hard links that were copied up when lowers were uppers, topmost first."""
        self.upper = upper
        self.work = work
        self.options = options
        self.xattrs = OverlayXattrs(user=options.user_xattrs)
        self.orphans: Orphans | None = None
        """Where removed files are kept for a successor of this process, if there can be one."""
        self.former: Orphans | None = None
        """The same, in storage that was left, as long as something is there; see `pending`."""
        self.ways: Ways | None = None
        """Of the layers of what is kept: the directories above that, which belong to others."""
        self._locks = locks
        for layer in self.layers:
            root = At(layer.root, b".")
            layer.may_hold_marks = syscalls.getxattr(root, self.xattrs.opaque) == b"x"

    @classmethod
    def open(
        cls,
        lowers: Sequence[bytes],
        upper: bytes | None = None,
        work: bytes | None = None,
        options: StackOptions = StackOptions(),
        *,
        data: Sequence[bytes] = (),
        indexes: Sequence[bytes] = (),
    ) -> Stack:
        """Open directories as layers.

        Raises OSError with a message for people, in `strerror`, and the directory in `filename`:
        when one is missing, when upper and workdir are not on one file system, or another mount
        uses them (EBUSY).
        """
        with ExitStack() as undo:
            below = tuple(_open_lower(path, undo) for path in lowers)
            data_only = tuple(_open_lower(path, undo) for path in data)
            kept = tuple(_open_lower(path, undo) for path in indexes)
            if upper is None or work is None:
                stack = cls(below, None, None, options, data=data_only, indexes=kept)
            else:
                stack = cls._over(below, upper, work, options, undo, data=data_only, indexes=kept)
            undo.pop_all()
        return stack

    @classmethod
    def open_over(cls, lower: Layer, upper: bytes, work: bytes, options: StackOptions) -> Stack:
        """Open an upper over a layer of another stack, which keeps its own. Raises as `open`."""
        with ExitStack() as undo:
            below = lower.copy()
            undo.callback(below.close)
            stack = cls._over((below,), upper, work, options, undo)
            undo.pop_all()
        return stack

    @classmethod
    def _over(
        cls,
        below: tuple[Layer, ...],
        upper: bytes,
        work: bytes,
        options: StackOptions,
        undo: ExitStack,
        *,
        data: tuple[Layer, ...] = (),
        indexes: tuple[Layer, ...] = (),
    ) -> Stack:
        upper_layer = open_layer(upper, "upper directory", undo, writable=True)
        work_layer = open_layer(work, "workdir", undo, writable=True)
        check_pair(upper_layer, upper, work_layer, work)
        locks = (lock_layer(upper_layer, upper, undo), lock_layer(work_layer, work, undo))
        workdir = _open_workdir(work_layer, work)
        _check_renames(workdir, upper)
        stack = cls(below, upper_layer, workdir, options, data=data, indexes=indexes, locks=locks)
        workdir.drop_unnamed(stack.xattrs.nlink)
        return stack

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.lowers if self.upper is None else (self.upper, *self.lowers)

    @property
    def writable(self) -> Layer:
        """The upper. Raises OSError: EROFS where there is none."""
        if self.upper is None:
            raise syscalls.failure(errno.EROFS)
        return self.upper

    @property
    def workdir(self) -> Workdir:
        """The upper's workdir. Raises OSError: EROFS where there is none."""
        if self.work is None:
            raise syscalls.failure(errno.EROFS)
        return self.work

    def copy(self) -> Stack:
        """Return the same layers for reading in another thread."""
        lowers = tuple(layer.copy() for layer in self.lowers)
        data = tuple(layer.copy() for layer in self.data)
        indexes = [layer.copy() for layer in self.indexes]
        if self.work is not None:
            indexes.insert(0, Layer(syscalls.duplicate(self.work.index)))
        upper = self.upper and self.upper.copy()
        return Stack(lowers, upper, None, self.options, data=data, indexes=tuple(indexes))

    def bottom(self) -> Stack:
        """Return the bottom-most lower alone, for reading in another thread."""
        return Stack((self.lowers[-1].copy(),), None, None, self.options)

    def exchange_lowers(self, lowers: Sequence[bytes], indexes: Sequence[bytes]) -> list[Layer]:
        """Have other lowers under the same upper; return those that it no longer has, still open.

        Those that it has already stay the same objects. Raises OSError as `open` does.
        """
        before = (*self.lowers, *self.indexes)
        known = {layer.identity: layer for layer in before}
        with ExitStack() as undo:
            opened = [_open_lower(path, undo) for path in (*lowers, *indexes)]
            undo.pop_all()
        layers = tuple(known.get(layer.identity, layer) for layer in opened)
        for layer in opened:
            if layer.identity in known:
                layer.close()
        self.lowers, self.indexes = layers[: len(lowers)], layers[len(lowers) :]
        return [layer for layer in before if layer not in layers]

    def close(self) -> None:
        for layer in (*self.layers, *self.data, *self.indexes):
            layer.close()
        if self.work is not None:
            self.work.close()
        for lock in self._locks:
            syscalls.close(lock)

    def sync(self) -> None:
        """Write the upper back to its disk."""
        if self.upper is not None:
            syscalls.syncfs(self.upper.root)


def _open_lower(path: bytes, undo: ExitStack) -> Layer:
    return open_layer(path, "lower directory", undo, writable=False)


def open_layer(path: bytes, what: str, undo: ExitStack, *, writable: bool) -> Layer:
    """Open a directory, which `undo` closes. Raises OSError as `Stack.open` does."""
    try:
        layer = Layer.open(path, writable=writable)
    except OSError as error:
        reason = {
            errno.ENOENT: "does not exist",
            errno.ENOTDIR: "is not a directory",
        }.get(error.errno or 0, f"cannot be opened ({error.strerror})")
        raise OSError(error.errno, f"{what} {reason}", path) from error
    undo.callback(layer.close)
    return layer


def _open_workdir(layer: Layer, path: bytes) -> Workdir:
    try:
        return Workdir(layer)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def check_pair(upper: Layer, upper_path: bytes, work: Layer, work_path: bytes) -> None:
    """Raise OSError unless the two can be upper and workdir of one overlay."""
    if upper.device != work.device:
        raise OSError(
            errno.EXDEV,
            "the workdir has to be on the same file system as the upper directory "
            + os.fsdecode(upper_path),
            work_path,
        )
    inner, outer = os.path.realpath(work_path), os.path.realpath(upper_path)
    if os.path.commonpath((inner, outer)) in {inner, outer}:
        raise OSError(
            errno.EINVAL,
            "the workdir has to be a separate tree from the upper directory "
            + os.fsdecode(upper_path),
            work_path,
        )


def lock_layer(layer: Layer, path: bytes, undo: ExitStack) -> int:
    """Keep other mounts from a layer until `undo` ends. Raises OSError: EBUSY."""
    try:
        lock = syscalls.lock(layer.root)
    except BlockingIOError as error:
        raise OSError(errno.EBUSY, "in use by another mount of sessiond", path) from error
    undo.callback(syscalls.close, lock)
    return lock


def _check_renames(work: Workdir, upper: bytes) -> None:
    """Refuse an upper whose file system cannot publish a change in one step.

    A full one cannot be tried, and is taken: whoever filled it has made changes.
    """
    with work.preparing() as first, work.preparing() as second:
        try:
            syscalls.mkdir(first, 0o700)
            syscalls.rename(first, second, syscalls.RENAME_WHITEOUT)
            syscalls.rename(first, second, syscalls.RENAME_EXCHANGE)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                return
            raise OSError(
                error.errno,
                "its file system cannot be an upper: it lacks RENAME_WHITEOUT or RENAME_EXCHANGE "
                "(ext4, xfs, btrfs and tmpfs have them)",
                upper,
            ) from error
