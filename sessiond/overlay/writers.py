"""Files that are open for writing, past the overlay, while the layers under them are exchanged.

With passthrough the kernel writes into the file that was opened, whatever is decided here. So at a
snapshot that very file moves on into the new upper, and the frozen layer gets a copy of it as it is
at that moment. When a session moves to another disk, such a file stays where it is until its last
close; its copy on the disk is renewed when it is to be there: at fsync(2), and after that close.
"""

from __future__ import annotations

import logging
import os
import stat as modes
from collections.abc import Iterator

from sessiond.overlay import syscalls
from sessiond.overlay.copy_up import CopyUp
from sessiond.overlay.layer import Layer
from sessiond.overlay.nodes import Node
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.xattrs import copy_attributes

log = logging.getLogger(__name__)

_COPY_ATTEMPTS = 3


class MovingFile:
    """A file that leaves the layer `old`, which is frozen, for the upper of `new`.

    Both are on one file system. Until `leave`, nothing has changed; `abandon` undoes the rest.
    """

    def __init__(self, old: Layer, new: Stack, node: Node, contents: int) -> None:
        """Copy the file, which `contents`, taken over, is a descriptor of. Raises ENOSPC."""
        self.node = node
        self._old = old
        self._new = new
        self._contents = contents
        self._names = _names(old, node.path, contents)
        self._file = new.workdir.temporary()
        self._copy = new.workdir.temporary()
        try:
            self._make_copy()
        except BaseException:
            self.abandon()
            raise

    def _make_copy(self) -> None:
        source = At(self._contents, b"")
        fd = syscalls.create_file(self._copy, 0o600)
        try:
            for _ in range(_COPY_ATTEMPTS):
                stat = syscalls.stat(source)
                syscalls.truncate(fd, 0)
                syscalls.copy_data(self._contents, fd, stat.st_size, lambda: False)
                after = syscalls.stat(source)
                if (after.st_mtime_ns, after.st_size) == (stat.st_mtime_ns, stat.st_size):
                    break
            else:
                path = os.fsdecode(b"/" + self.node.path)
                log.warning("%s was written to throughout; its snapshot is not of one moment", path)
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)
        copy_attributes(source, self._copy, stat, self._new.xattrs)
        for name in syscalls.listxattr(source):
            if self._new.xattrs.is_own(name):
                syscalls.setxattr(self._copy, name, syscalls.getxattr(source, name) or b"")

    def abandon(self) -> None:
        """Remove the copy."""
        syscalls.close(self._contents)
        if syscalls.stat_or_none(self._copy) is not None:
            syscalls.unlink(self._copy)

    def leave(self) -> None:
        """Let the copy take the file's names in the old layer."""
        syscalls.link_descriptor(self._contents, self._file)
        for path in self._names:
            with self._new.workdir.preparing() as prepared:
                syscalls.link(self._copy, prepared)
                syscalls.rename(prepared, self._old.at(path))
        self.abandon()

    def arrive(self) -> None:
        """Give the file its name in the new upper. Precondition: `new` is served, `node` in it."""
        with _Adoption(self._new, self.node, self._file) as adoption:
            adoption.publish()


class _Adoption(CopyUp):
    """A copy-up whose copy is there already."""

    def __init__(self, stack: Stack, node: Node, file: At) -> None:
        super().__init__(stack, node, size=0)
        syscalls.unlink(self._target)
        self._target = file
        self._stat = syscalls.stat(file)


def _names(layer: Layer, path: bytes, contents: int) -> list[bytes]:
    """Return all names in `layer` of the file `contents`, one of which is `path`."""
    stat = syscalls.stat(At(contents, b""))
    if stat.st_nlink == 1:
        return [path]
    inode = (stat.st_dev, stat.st_ino)
    return [name for name, found in _walk(layer, b"") if (found.st_dev, found.st_ino) == inode]


def _walk(layer: Layer, directory: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    for name, _ in syscalls.scan(layer.directory(directory)):
        path = directory + b"/" + name if directory else name
        stat = syscalls.stat(layer.at(path))
        yield path, stat
        if modes.S_ISDIR(stat.st_mode):
            yield from _walk(layer, path)


def renew(copy: At, contents: int) -> os.stat_result:
    """Make `copy` what the file `contents` is now; return the stat(2) of that moment."""
    stat = syscalls.stat(At(contents, b""))
    fd = syscalls.open_file(copy, os.O_WRONLY)
    try:
        syscalls.truncate(fd, 0)
        syscalls.copy_data(contents, fd, stat.st_size, lambda: False)
    finally:
        syscalls.close(fd)
    syscalls.utime(copy, stat.st_atime_ns, stat.st_mtime_ns)
    return stat


def with_contents_of(stat: os.stat_result, other: os.stat_result) -> os.stat_result:
    """Return `stat` with what the contents decide taken from `other`: size, blocks and mtime."""
    fields = list(stat)
    fields[modes.ST_SIZE] = other.st_size
    extra = {
        name: getattr(stat, name)
        for name in ("st_atime_ns", "st_ctime_ns", "st_blksize", "st_rdev")
    }
    extra |= {"st_mtime_ns": other.st_mtime_ns, "st_blocks": other.st_blocks}
    return os.stat_result(fields, extra)
