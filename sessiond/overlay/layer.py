"""A layer: a directory tree, known by the descriptor of its root."""

from __future__ import annotations

import errno
import os
from functools import cached_property

from sessiond.overlay import syscalls
from sessiond.overlay.syscalls import At, FileHandle

_DIRECTORIES_LIMIT = 512
"""Open directories kept per layer. Larger saves path walks, at one descriptor each."""

_PATH_LIMIT = 4000  # below PATH_MAX


class Layer:
    """One directory tree of the stack; nothing outside it is ever reached through this object.

    Paths are relative to the layer's root, without a leading slash; the root itself is ``b""``.
    Their components, except the last, are never followed when they are symlinks.
    """

    def __init__(self, root: int) -> None:
        """Take over the descriptor `root`."""
        self.root = root
        stat = syscalls.stat(At(root, b""))
        self.device = stat.st_dev
        self.identity = (stat.st_dev, stat.st_ino)
        """Of the root; known also when this object is closed."""
        self.may_hold_marks = False
        """Whether whiteouts may be files with an attribute (see `whiteout`); set from the layer's
        root.
        """
        self._directories: dict[bytes, int] = {}

    @classmethod
    def open(cls, path: bytes, *, writable: bool) -> Layer:
        """Open the directory `path`. A lower is served from a read-only mount of its own where
        possible.
        """
        root = syscalls.open_root(path)
        if not writable and (clone := syscalls.clone_read_only(root)) is not None:
            syscalls.close(root)
            root = clone
        return cls(root)

    def copy(self) -> Layer:
        """Return the same layer with descriptors of its own, for use in another thread."""
        layer = Layer(syscalls.duplicate(self.root))
        layer.may_hold_marks = self.may_hold_marks
        return layer

    def is_same(self, other: Layer) -> bool:
        """Say whether both are the same directory."""
        return self.identity == other.identity

    def close(self) -> None:
        self.forget_all()
        syscalls.close(self.root)

    @cached_property
    def uuid(self) -> bytes:
        return syscalls.file_system_uuid(self.root)

    def directory(self, path: bytes) -> int:
        """Return an O_PATH descriptor of the directory `path`, owned by this object.

        It is good until some hundred other directories were asked for.
        """
        if not path:
            return self.root
        known = self._directories
        fd = known.pop(path, -1)
        if fd < 0:
            fd = self._open(path)
            if len(known) >= _DIRECTORIES_LIMIT:
                syscalls.close(known.pop(next(iter(known))))
        known[path] = fd  # last: most recently used
        return fd

    def _open(self, path: bytes) -> int:
        if len(path) < _PATH_LIMIT:
            return syscalls.open_beneath(self.root, path)
        # Programs nest directories deeper than PATH_MAX by walking down; so this walks, too.
        cut = path.rindex(b"/", 0, _PATH_LIMIT)
        start = syscalls.open_beneath(self.root, path[:cut])
        while len(path) - cut > _PATH_LIMIT:
            end = path.rindex(b"/", cut + 1, cut + _PATH_LIMIT)
            start, done = syscalls.open_beneath(start, path[cut + 1 : end]), start
            syscalls.close(done)
            cut = end
        try:
            return syscalls.open_beneath(start, path[cut + 1 :])
        finally:
            syscalls.close(start)

    def at(self, path: bytes) -> At:
        """Return the address of the object at `path`."""
        if not path:
            return At(self.root, b".")
        parent, _, name = path.rpartition(b"/")
        return At(self.directory(parent), name)

    def stat_or_none(self, path: bytes) -> os.stat_result | None:
        """Return the stat(2) of the object at `path`; None if there is none, also because something
        on the way is no directory.
        """
        try:
            return syscalls.stat_or_none(self.at(path))
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                return None
            raise

    def forget(self, path: bytes) -> None:
        """Drop what is known of the directory `path`, which has been removed."""
        if (fd := self._directories.pop(path, -1)) >= 0:
            syscalls.close(fd)

    def forget_tree(self, path: bytes) -> None:
        """Drop what is known of the directory `path` and all below it, because it has moved."""
        below = path + b"/"
        for known in [known for known in self._directories if known.startswith(below)]:
            self.forget(known)
        self.forget(path)

    def forget_all(self) -> None:
        """Drop what is known of all paths."""
        for fd in self._directories.values():
            syscalls.close(fd)
        self._directories.clear()

    def stat_handle(self, handle: FileHandle) -> os.stat_result | None:
        """Return the stat(2) of an inode of this layer's file system by its handle."""
        fd = syscalls.open_readable(self.root)
        try:
            return syscalls.stat_handle(fd, handle)
        finally:
            syscalls.close(fd)
