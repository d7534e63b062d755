"""Files that are written past the overlay in storage that the session has left.

When a session moves to another disk, the kernel goes on writing into those files that programs had
open for writing, until the last close or, if they are mapped, until the last mapping goes. Until
then their contents are those of that file, `Node.kept`, and what is in the upper is a copy of it,
which is renewed from time to time, when it has to be on disk, and in the end.

A successor of this process finds the file by a name that it is given among the orphans of that
storage. A fact tells which file in the present layers is the copy: there is another one after each
renewal, and the program may have put something else in its place.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from functools import partial

from sessiond.overlay import syscalls
from sessiond.overlay.copy_up import locate
from sessiond.overlay.lookup import Entry, Identity
from sessiond.overlay.nodes import PENDING_FACT, Node
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.writers import Names, copy_own, replace_name, walk, with_contents_of
from sessiond.overlay.xattrs import copy_attributes

_IDENTITY = struct.Struct("=QQ")
_CHUNK = 1 << 20


class Copies:
    """What a predecessor has noted of a file."""

    def __init__(self, fact: bytes) -> None:
        self._copies = list(_IDENTITY.iter_unpack(fact))

    def has(self, entry: Entry) -> bool:
        """Say whether `entry` is the copy of the file in the present layers, or was copied up from
        it.
        """
        real = (entry.stat.st_dev, entry.stat.st_ino)
        return real in self._copies or entry.identity in self._copies

    def unite(self, stack: Stack) -> None:
        """End a renewal that a predecessor has begun: some of the names may be those of the former
        copy.
        """
        if len(self._copies) < 2:
            return
        names = {copy: _names(stack, copy) for copy in self._copies}
        former, latest = self._copies
        for at in names[former] if names[latest] else ():
            replace_name(at(), names[latest][0](), stack.workdir)


def _names(stack: Stack, file: Identity) -> Sequence[Callable[[], At]]:
    """Return where the names of a file in the upper and its index are, to be asked in time."""
    index = stack.workdir.index
    return [
        partial(stack.writable.at, path)
        for path, stat in walk(stack.writable, b"")
        if (stat.st_dev, stat.st_ino) == file
    ] + [
        partial(At, index, name)
        for name, _ in syscalls.scan(index)
        if (stat := syscalls.stat(At(index, name))).st_ino == file[1] and stat.st_dev == file[0]
    ]


def note(node: Node, *copies: Identity) -> None:
    """Let a successor know of the file, if it can find it: `copies` are what it may have in the
    upper.
    """
    if node.kept_name is not None:
        fact = b"".join(_IDENTITY.pack(*copy) for copy in copies)
        node.fast_path.note(node.kept_number, PENDING_FACT, fact)


def keep(stack: Stack, node: Node, contents: int) -> None:
    """Let the file `contents`, a descriptor, hold what `node` contains; the layers are left."""
    node.kept = syscalls.open_file(At(contents, b""), os.O_RDONLY)
    node.kept_number = node.number
    if node.fast_path.recorded and stack.orphans is not None:
        node.kept_name = stack.orphans.keep(node.number, At(node.kept, b""))


def find(stack: Stack, node: Node, number: int) -> bool:
    """Find the file that a predecessor has kept for `node`; say whether it is there."""
    for orphans in (stack.former, stack.orphans):  # left by Persist, or, for what is kept, a commit
        if orphans is not None and syscalls.stat_or_none(name := orphans.at(number)) is not None:
            node.kept = syscalls.open_file(name, os.O_RDONLY)
            node.kept_name, node.kept_number = name, number
            return True
    return False


def finish(node: Node) -> None:
    """Let the contents be those of the file in the present layers again."""
    node.fast_path.note(node.kept_number, PENDING_FACT, b"")
    syscalls.close(node.kept)
    node.kept = -1
    if node.kept_name is not None:
        syscalls.unlink(node.kept_name)
        node.kept_name = None


class Renewal:
    """Brings the copy in the upper up to date; its long step, `copy_data`, may run in a thread."""

    def __init__(self, stack: Stack, node: Node) -> None:
        """Precondition: `node` is in the upper, and has a name. Raises OSError: ENOSPC."""
        self._stack = stack
        self._node = node
        self.cancelled = False
        """Set from another thread to make `copy_data` raise ECANCELED."""
        self._source = syscalls.duplicate(node.kept)
        self._stat = syscalls.stat(At(node.kept, b""))
        self._former = self._fd = -1
        self._copy = stack.workdir.temporary()
        try:
            self._former = syscalls.open_file(locate(stack, node), os.O_RDONLY)
            self._fd = syscalls.create_file(self._copy, 0o600)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Renewal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0 and syscalls.stat_or_none(self._copy) is not None:
            syscalls.unlink(self._copy)
        for fd in (self._source, self._former, self._fd):
            if fd >= 0:
                syscalls.close(fd)

    def copy_data(self) -> None:
        """Copy the contents, unless they are there. May run in any thread."""
        if self._is_there():
            return
        syscalls.copy_data(self._source, self._fd, self._stat.st_size, lambda: self.cancelled)
        syscalls.fsync(self._fd)

    def _is_there(self) -> bool:
        """Say whether the copy has these contents. Times do not tell: mappings change none."""
        former = syscalls.stat(At(self._former, b""))
        if (former.st_size, former.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            return False
        offset = 0
        while not self.cancelled:
            chunk = syscalls.read(self._source, _CHUNK, offset)
            if chunk != syscalls.read(self._former, _CHUNK, offset):
                return False
            if not chunk:
                syscalls.close(self._fd)
                syscalls.unlink(self._copy)
                self._fd = -1
                return True
            offset += len(chunk)
        return False

    def publish(self) -> bool:
        """Give the copy the file's names; it is on disk then. Return whether there is a new one.

        Each name is one or the other, so none is ever without contents that were there.
        """
        if self._fd < 0:
            syscalls.fsync(self._former)
            return False
        node, stack = self._node, self._stack
        at = locate(stack, node)
        attributes = with_contents_of(syscalls.stat(at), self._stat)
        copy_attributes(at, self._fd, attributes, stack.xattrs)
        copy_own(at, self._fd, stack.xattrs)
        syscalls.fsync(self._fd)
        stat = syscalls.stat(self._fd)
        note(node, node.real, (stat.st_dev, stat.st_ino))
        Names(stack, node, self._former).give(self._copy, stack.workdir)
        syscalls.fsync(self._fd)
        node.real = (stat.st_dev, stat.st_ino)
        return True
