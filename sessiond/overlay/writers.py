"""Files that are open for writing, past the overlay, while the layers under them are exchanged.

With passthrough the kernel writes into the file that was opened, whatever is decided here. So at a
snapshot that very file moves on into the new upper, and the frozen layer gets a copy of it as it is
at that moment. When a session moves to another disk, it cannot: see `pending`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as modes
from collections.abc import Iterator, Sequence
from typing import Protocol

from sessiond.overlay import syscalls
from sessiond.overlay.copy_up import CopyUp
from sessiond.overlay.layer import Layer
from sessiond.overlay.nodes import MOVING_FACT, Node, pack_identity, unpack_identity
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At, Object
from sessiond.overlay.workdir import Workdir
from sessiond.overlay.xattrs import OverlayXattrs, copy_attributes

log = logging.getLogger(__name__)

_COPY_ATTEMPTS = 3


def is_written(node: Node) -> bool:
    """Say whether someone may write to a file of the session's upper past the overlay."""
    return bool(node.upper and node.linked and not node.lasting and node.writers and node.kept < 0)


class Halt(Protocol):
    """Programs that stand still while the files that they write are copied."""

    def holds(self) -> bool:
        """Say whether all that did so still do."""

    def end(self) -> None:
        """Let them go on."""


class MovingFile:
    """A file that leaves the upper of `old`, which is frozen, for that of `new`.

    Both are on one file system. Until `leave`, nothing has changed; `abandon` undoes the rest. What
    comes then cannot be undone here, so that the file takes no more space in `leave`.
    """

    def __init__(self, old: Stack, new: Stack, node: Node, contents: int) -> None:
        """Copy the file, which `contents`, taken over, is a descriptor of. Raises ENOSPC."""
        self.node = node
        self._new = new
        self._contents = contents
        self._names = Names(old, node, contents)
        self._file = new.workdir.temporary()
        self._copy = new.workdir.temporary()
        self._orphan: At | None = None
        self._copied: tuple[int, int] | None = None
        """Time of modification and size of the file while it was copied; None if they changed."""
        try:
            self._make_copy()
            self._take_names()
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
                if self._version() == (stat.st_mtime_ns, stat.st_size):
                    self._copied = stat.st_mtime_ns, stat.st_size
                    break
            else:
                path = os.fsdecode(b"/" + self.node.path)
                log.warning("%s was written to throughout; its snapshot is not of one moment", path)
            copy_attributes(source, fd, stat, self._new.xattrs)
            copy_own(source, fd, self._new.xattrs)
        finally:
            syscalls.close(fd)

    def _take_names(self) -> None:
        """Give the file a name in the new layers, and one by which a successor can put it back, if
        the old layers are served on after all.
        """
        syscalls.link_descriptor(self._contents, self._file)
        orphans = self._new.orphans
        if self.node.fast_path.recorded and orphans is not None:
            self._orphan = orphans.keep(self.node.number, At(self._contents, b""))
            if self._orphan is None:
                raise syscalls.failure(errno.ENOSPC)

    def _version(self) -> tuple[int, int]:
        stat = syscalls.stat(At(self._contents, b""))
        return stat.st_mtime_ns, stat.st_size

    def is_exact(self) -> bool:
        """Say whether the copy still is what is in the file.

        If it was so for all files after the last was copied, the copies are of one moment. Writing
        through a mapping need not show.
        """
        return self._copied == self._version()

    def doubt(self) -> None:
        """Take the copy for one of a later moment: programs may have run before it was complete."""
        self._copied = None

    def sync(self) -> None:
        """Have the copy on disk. Precondition of `leave`; takes longer than to make it, so programs
        that stand still may go on before. Raises ENOSPC.
        """
        fd = syscalls.open_file(self._copy, os.O_RDONLY)
        try:
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)

    def abandon(self) -> None:
        """Remove the copy, and the names that were taken."""
        syscalls.close(self._contents)
        for at in (self._copy, self._file, self._orphan):
            if at is not None and syscalls.stat_or_none(at) is not None:
                syscalls.unlink(at)

    def leave(self) -> None:
        """Let the copy take the file's names in the old layer."""
        node = self.node
        if self._orphan is not None:
            new = self._new.writable.identity
            node.fast_path.note(node.number, MOVING_FACT, self._names.pack(pack_identity(new)))
        self._names.give(self._copy, self._new.workdir)
        syscalls.close(self._contents)

    def arrive(self) -> None:
        """Give the file its name in the new upper. Precondition: `new` is served, `node` in it."""
        with _Adoption(self._new, self.node, self._file, self._orphan) as adoption:
            adoption.publish()


def settle(node: Node) -> None:
    """Forget that a file was moved: the manager knows now that it was."""
    node.fast_path.note(node.number, MOVING_FACT, b"")
    if node.linked and node.orphan is not None:
        syscalls.unlink(node.orphan)
        node.orphan = None


def put_back(stack: Stack, number: int, fact: bytes) -> None:
    """Undo the move of a file by a predecessor, unless `stack` is that to which it moved.

    It may be the lack of space that the predecessor has died of. Raises OSError if the place where
    the file was is not there any more.
    """
    new, index, own, *paths = _unpack(fact)
    if stack.orphans is None or stack.writable.identity == unpack_identity(new):
        return
    file = stack.orphans.at(number)
    names = [stack.writable.at(path) for path in paths]
    if index:
        names.append(At(stack.workdir.index, index))
    if syscalls.stat_or_none(file) is None:  # another predecessor has put it back, or begun to
        file = names[0]
    for name in set(stack.xattrs.own(file)) - set(own.split(b" ")):
        syscalls.removexattr(file, name)  # of its arrival
    give_names(file, names, stack.workdir)


class _Adoption(CopyUp):
    """A copy-up whose copy is there already, complete."""

    def __init__(self, stack: Stack, node: Node, file: At, orphan: At | None) -> None:
        """`orphan`: another name of `file`, which does not count."""
        super().__init__(stack, node)
        self._target = file
        self._orphan = orphan

    def publish(self) -> None:
        super().publish()
        self.node.orphan = self._orphan

    def _publish_index(self, name: bytes, count: int) -> None:
        super()._publish_index(name, count)
        self.node.orphan = self._orphan

    def _open(self, source: At) -> None:
        """Nothing is copied."""

    def _complete(self, source: At) -> Object:
        return self._target


class Names:
    """All names, in the upper of `stack` and in its index, of the file `contents`, `node`."""

    def __init__(self, stack: Stack, node: Node, contents: int) -> None:
        self._stack = stack
        self._index = node.index
        stat = syscalls.stat(At(contents, b""))
        self._paths = [node.path]
        if stat.st_nlink > 1:
            inode = (stat.st_dev, stat.st_ino)
            self._paths = [
                path
                for path, found in walk(stack.writable, b"")
                if (found.st_dev, found.st_ino) == inode
            ]

    def pack(self, new: bytes) -> bytes:
        """Return what `put_back` has to know."""
        own = b" ".join(self._stack.xattrs.own(self._stack.writable.at(self._paths[0])))
        return new + b"\0".join([self._index or b"", own, *self._paths])

    def give(self, file: At, work: Workdir) -> None:
        """Make them names of `file`; `work` is on its file system.

        One after the other: whoever dies in between leaves two files in the place of one.
        """
        names = [self._stack.writable.at(path) for path in self._paths]
        if self._index is not None:
            names.append(At(self._stack.workdir.index, self._index))
        give_names(file, names, work)


def _unpack(fact: bytes) -> list[bytes]:
    size = len(pack_identity((0, 0)))
    return [fact[:size], *fact[size:].split(b"\0")]


def give_names(file: At, names: Sequence[At], work: Workdir) -> None:
    """Make `names` those of `file`, which loses its own; each in one step.

    That takes no space: the first takes the file's own name, and the one that it replaces leaves
    room to prepare the others, one at a time.
    """
    first, *others = names
    syscalls.rename(file, first)
    for name in others:
        replace_name(name, first, work)


def replace_name(name: At, file: At, work: Workdir) -> None:
    """Make `name` one of `file`, in one step."""
    with work.preparing() as prepared:
        syscalls.link(file, prepared)
        syscalls.rename(prepared, name)


def walk(layer: Layer, directory: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield the paths in a layer of all that is in a directory, with stat(2)."""
    for name, _ in syscalls.scan(layer.directory(directory)):
        path = directory + b"/" + name if directory else name
        stat = syscalls.stat(layer.at(path))
        yield path, stat
        if modes.S_ISDIR(stat.st_mode):
            yield from walk(layer, path)


def copy_own(source: At, target: Object, xattrs: OverlayXattrs) -> None:
    """Copy the overlay's own attributes, which `copy_attributes` leaves out."""
    for name in xattrs.own(source):
        syscalls.setxattr(target, name, syscalls.getxattr(source, name) or b"")


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
