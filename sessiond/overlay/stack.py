"""The layer stack of one overlay: an upper with its workdir, over any number of lowers."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from sessiond.overlay import syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.syscalls import At
from sessiond.overlay.workdir import Workdir
from sessiond.overlay.xattrs import OverlayXattrs


@dataclass(frozen=True, slots=True)
class StackOptions:
    """How layers are read and written; the mount options of overlayfs of the same meaning."""

    user_xattrs: bool = False
    """Own attributes under ``user.overlay.``, for an unprivileged mounter; as in the kernel, no
    redirects.
    """
    sync: bool = True
    """Data of a copy-up reaches the disk before the rename that publishes it."""


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
        locks: tuple[int, ...] = (),
    ) -> None:
        self.lowers = lowers
        self.upper = upper
        self.work = work
        self.options = options
        self.xattrs = OverlayXattrs(user=options.user_xattrs)
        self._locks = locks
        for layer in self.layers:
            root = At(layer.root, b".")
            layer.may_hold_marks = syscalls.getxattr(root, self.xattrs.opaque) == b"x"

    @classmethod
    def open(
        cls,
        lowers: list[bytes],
        upper: bytes | None = None,
        work: bytes | None = None,
        options: StackOptions = StackOptions(),
    ) -> Stack:
        """Open directories as layers.

        Raises OSError with a message for people, in `strerror`, and the directory in `filename`:
        when one is missing, when upper and workdir are not on one file system, or another mount
        uses them (EBUSY).
        """
        opened: list[Layer] = []
        locks: list[int] = []
        try:
            for path in lowers:  # not a comprehension: a failure has to close those opened so far
                opened.append(_open_layer(path, "lower directory", writable=False))  # noqa: PERF401
            if upper is None or work is None:
                return cls(tuple(opened), None, None, options)
            upper_layer = _open_layer(upper, "upper directory", writable=True)
            opened.append(upper_layer)
            work_layer = _open_layer(work, "workdir", writable=True)
            opened.append(work_layer)
            _check_pair(upper_layer, upper, work_layer, work)
            locks += [_lock(upper_layer, upper), _lock(work_layer, work)]
            try:
                workdir = Workdir(work_layer)
            except OSError as error:
                raise OSError(error.errno, error.strerror, work) from error
            _check_renames(workdir, upper)
            return cls(tuple(opened[:-2]), upper_layer, workdir, options, tuple(locks))
        except BaseException:
            for lock in locks:
                syscalls.close(lock)
            for layer in opened:
                layer.close()
            raise

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.lowers if self.upper is None else (self.upper, *self.lowers)

    def copy(self) -> Stack:
        """Return the same layers for reading in another thread."""
        lowers = tuple(layer.copy() for layer in self.lowers)
        return Stack(lowers, self.upper and self.upper.copy(), None, self.options)

    def close(self) -> None:
        for layer in self.layers:
            layer.close()
        if self.work is not None:
            self.work.close()
        for lock in self._locks:
            syscalls.close(lock)

    def sync(self) -> None:
        """Write the upper back to its disk."""
        if self.upper is not None:
            syscalls.syncfs(self.upper.root)


def _open_layer(path: bytes, what: str, *, writable: bool) -> Layer:
    try:
        return Layer.open(path, writable=writable)
    except OSError as error:
        reason = {
            errno.ENOENT: "does not exist",
            errno.ENOTDIR: "is not a directory",
        }.get(error.errno or 0, f"cannot be opened ({error.strerror})")
        raise OSError(error.errno, f"{what} {reason}", path) from error


def _check_pair(upper: Layer, upper_path: bytes, work: Layer, work_path: bytes) -> None:
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


def _lock(layer: Layer, path: bytes) -> int:
    try:
        return syscalls.lock(layer.root)
    except BlockingIOError as error:
        raise OSError(errno.EBUSY, "in use by another mount of sessiond", path) from error


def _check_renames(work: Workdir, upper: bytes) -> None:
    """Refuse an upper whose file system cannot publish a change in one step."""
    with work.preparing() as first, work.preparing() as second:
        syscalls.mkdir(first, 0o700)
        try:
            syscalls.rename(first, second, syscalls.RENAME_WHITEOUT)
            syscalls.rename(first, second, syscalls.RENAME_EXCHANGE)
        except OSError as error:
            raise OSError(
                error.errno,
                "its file system cannot be an upper: it lacks RENAME_WHITEOUT or RENAME_EXCHANGE "
                "(ext4, xfs, btrfs and tmpfs have them)",
                upper,
            ) from error
