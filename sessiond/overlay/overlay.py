"""Overlay: what can be done to a merged view. Nodes in, nodes out.

Which node, and where it is, `View` knows. What is prepared and published in the layers is decided
below: `copy_up`, `directory`. Here the two are brought together.

Not thread-safe: one thread calls it. The exception is `CopyUp.copy_data` of a `begin_copy_up`.
"""

from __future__ import annotations

import errno
import os
import stat as modes
import time
from collections.abc import Sequence
from contextlib import suppress

from sessiond.overlay import directory, lookup, orphans, syscalls
from sessiond.overlay.copy_up import CopyUp, copy_up, locate, must_index
from sessiond.overlay.directory import NewObject, Place
from sessiond.overlay.fastpath import FastPath, Inherited
from sessiond.overlay.keep import Keep
from sessiond.overlay.lookup import join
from sessiond.overlay.nodes import SETTING_FACT, Node
from sessiond.overlay.pending import PendingFiles
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.view import View

_CARRY_LIMIT = 16 << 20
"""Bytes of a file that a rename may copy from one set of layers to another, while all wait."""


class Overlay:
    """The operations on a merged view, by those who work in it."""

    def __init__(
        self,
        stack: Stack,
        fast_path: FastPath | None = None,
        inherited: Sequence[Inherited] = (),
        keep: Keep | None = None,
    ) -> None:
        """Take over `stack` and `keep`. `inherited`: see `Succession.take_over`, which has to be
        called next then. Last of all, `Exchange.find_ways` has to be.
        """
        self.view = View(stack, fast_path or FastPath(), inherited, keep)
        self.pending = PendingFiles(self.view)

    def close(self) -> None:
        """Close every descriptor."""
        self.view.close()

    # Attributes

    def _change(self, node: Node, size: int | None = None) -> Stack:
        """Get `node` into the upper, to be changed there; return the layers that it belongs to.

        `size`: as of `copy_up`.
        """
        stack = self.view.stack_of(node)
        self.view.touched.node(node)
        copy_up(stack, node, size)
        return stack

    def readlink(self, node: Node) -> bytes:
        return syscalls.readlink(self.view.locate(node))

    def statvfs(self) -> os.statvfs_result:
        """Return the statvfs(3) of the file system that takes new files."""
        return syscalls.statvfs(self.view.stack.layers[0].root)

    def resize(self, node: Node, size: int, *, by_name: bool = False) -> None:
        """Set the size of a regular file, in bytes; see `syscalls.truncate`."""
        stack = self._change(node, size)
        if node.kept >= 0:
            _truncate(At(node.kept, b""), size, by_name=False)
        if node.fd_writable:
            syscalls.truncate(node.fd, size, by_name=by_name)
        else:
            _truncate(locate(stack, node), size, by_name=by_name)

    def chmod(self, node: Node, mode: int) -> None:
        stack = self._change(node)
        syscalls.chmod(locate(stack, node), modes.S_IMODE(mode))
        self._refresh_way(node)

    def chown(self, node: Node, uid: int, gid: int) -> None:
        """Set the owner; -1 leaves a part as it is."""
        stack = self._change(node)
        syscalls.chown(locate(stack, node), uid, gid)
        self._refresh_way(node)

    def utime(self, node: Node, atime: int | None, mtime: int | None) -> None:
        """Set times, in nanoseconds; None leaves one as it is."""
        at = locate(self._change(node), node)
        if atime is None or mtime is None:
            stat = self.view.stat(node)
            atime = stat.st_atime_ns if atime is None else atime
            mtime = stat.st_mtime_ns if mtime is None else mtime
        syscalls.utime(at, atime, mtime)
        if node.kept >= 0:
            syscalls.utime(At(node.kept, b""), atime, mtime)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Raises ENODATA, also where the layer's file system has no xattrs."""
        value = syscalls.getxattr(self.view.locate(node), self.view.stack.xattrs.stored(name))
        if value is None:
            raise syscalls.failure(errno.ENODATA)
        return value

    def listxattr(self, node: Node) -> list[bytes]:
        return self.view.stack.xattrs.shown(syscalls.listxattr(self.view.locate(node)))

    def setxattr(self, node: Node, name: bytes, value: bytes) -> None:
        stack = self._change(node)
        self.view.fast_path.note(node.number, SETTING_FACT, name)
        try:
            syscalls.setxattr(locate(stack, node), stack.xattrs.stored(name), value)
        finally:
            self.view.fast_path.note(node.number, SETTING_FACT, b"")
        self._refresh_way(node)

    def _refresh_way(self, node: Node) -> None:
        if node.is_directory and node.links and not node.lasting and self.view.leads(node.path):
            assert self.view.keep is not None
            self.view.keep.ways.refresh(node)

    def removexattr(self, node: Node, name: bytes) -> None:
        """Raises ENODATA."""
        stored = self.view.stack.xattrs.stored(name)
        if not node.upper and syscalls.getxattr(self.view.locate(node), stored) is None:
            raise syscalls.failure(errno.ENODATA)
        syscalls.removexattr(locate(self._change(node), node), stored)

    # Directories

    def names(self, node: Node) -> list[bytes]:
        """List a directory, without ``.`` and ``..``. A removed one is empty."""
        if not node.linked:
            return []
        listed = lookup.names(self.view.stack_of(node), node.directory)
        if self.view.keep is None or node.lasting or not self.view.leads(node.path):
            return listed
        path, rules = node.path, self.view.keep.rules
        others = [name for name in listed if not rules.keep(join(path, name))]
        return others + self.view.keep.names(path)

    def create(self, parent: Node, name: bytes, new: NewObject) -> tuple[Node, os.stat_result]:
        """Create any object. Raises EEXIST, EPERM for a whiteout (ovl_create_object)."""
        if modes.S_ISCHR(new.mode) and new.device == 0:
            raise syscalls.failure(errno.EPERM)
        node, stat, fd = self._create(parent, name, new)
        if fd >= 0:
            syscalls.close(fd)
        return node, stat

    def create_contents(
        self, parent: Node, name: bytes, new: NewObject
    ) -> tuple[Node, os.stat_result, int]:
        """Create a regular file; return a descriptor of it, too. Raises EEXIST."""
        return self._create(parent, name, new)

    def create_file(self, parent: Node, name: bytes, new: NewObject) -> tuple[Node, os.stat_result]:
        """Create a regular file and open it, as `open_file` does. Raises EEXIST."""
        node, stat, fd = self._create(parent, name, new)
        if node.fd >= 0:
            syscalls.close(node.fd)
        node.fd, node.fd_upper, node.fd_writable = fd, True, True
        node.opens += 1
        self.view.open_here.add(node)
        return node, stat

    def _create(
        self, parent: Node, name: bytes, new: NewObject
    ) -> tuple[Node, os.stat_result, int]:
        entry = self.view.find(parent, name)
        if entry.positive:
            raise syscalls.failure(errno.EEXIST)
        stack = self.view.stack_at(parent, name)
        self.view.touched.name(parent, name)
        fd = directory.create(stack, parent, name, entry.presence, new)
        self._touch(stack, parent)
        made = fd if fd >= 0 else At(stack.writable.directory(parent.path), name)
        stat = syscalls.stat(made)
        node = self.view.adopt(parent, name, self.view.made(stack, stat))
        if fd >= 0:
            self.view.touched.written(node)
        return node, stat, fd

    def _touch(self, stack: Stack, parent: Node) -> None:
        """After a change to what `stack` has in a directory: that is its own change, too."""
        own = self.view.stack
        if stack is not own and not parent.lasting:
            self.view.touched.node(parent)
            with suppress(OSError):  # its own layers may be full
                copy_up(own, parent)
                now = time.time_ns()
                at = locate(own, parent)
                syscalls.utime(at, syscalls.stat(at).st_atime_ns, now)

    def create_anonymous(self, parent: Node, new: NewObject) -> tuple[Node, os.stat_result, int]:
        """Create a regular file without a name (O_TMPFILE); return a descriptor of it, too."""
        if not parent.linked:
            raise syscalls.failure(errno.ENOENT)
        stack = self.view.stack_of(parent)
        fd = directory.create_anonymous(stack, parent, new)
        stat = syscalls.stat(At(fd, b""))
        node = self.view.nodes.add(self.view.made(stack, stat), self.view.generation)
        node.anchor = syscalls.duplicate(fd)
        orphans.record(stack, node, At(fd, b""))
        self.view.touched.written(node)
        return node, self.view.stat(node), fd

    def link(self, node: Node, parent: Node, name: bytes) -> os.stat_result:
        """Give `node` another name. Raises EEXIST, EPERM for a directory, EXDEV if only one of both
        is kept.
        """
        if node.is_directory:
            raise syscalls.failure(errno.EPERM)
        entry = self.view.find(parent, name)
        if entry.positive:
            raise syscalls.failure(errno.EEXIST)
        stack = self.view.stack_at(parent, name)
        if stack is not self.view.stack_of(node):
            raise syscalls.failure(errno.EXDEV)
        self.view.touched.node(node)
        self.view.touched.name(parent, name)
        self.view.touched.written(node)
        directory.link(stack, node, parent, name, entry.presence)
        self._touch(stack, parent)
        return self.view.stat(node)

    def _existing(self, parent: Node, name: bytes) -> tuple[Place, Node]:
        place = self.view.place(parent, name)
        if place.node is None:
            raise syscalls.failure(errno.ENOENT)
        return place, place.node

    def unlink(self, parent: Node, name: bytes) -> None:
        _, node = self._existing(parent, name)
        if node.is_directory:
            raise syscalls.failure(errno.EISDIR)
        self.view.touched.node(node)
        stack = self.view.stack_of(node)
        directory.unlink(stack, node, parent, name)
        self._touch(stack, parent)
        self._after_removal(node)

    def rmdir(self, parent: Node, name: bytes) -> None:
        _, node = self._existing(parent, name)
        if not node.is_directory:
            raise syscalls.failure(errno.ENOTDIR)
        self._require_empty(node)
        self.view.touched.name(parent, name, whole=True)
        stack, path = self.view.stack_of(node), node.path
        directory.rmdir(stack, node, parent, name)
        if not node.lasting and self.view.leads(path):
            assert self.view.keep is not None
            self.view.keep.ways.remove(path)
        self._touch(stack, parent)
        self._after_removal(node)

    def _require_empty(self, node: Node) -> None:
        if self.names(node):
            raise syscalls.failure(errno.ENOTEMPTY)

    def rename(self, old: tuple[Node, bytes], new: tuple[Node, bytes], flags: int = 0) -> None:
        """Rename; `flags` as for renameat2(2): RENAME_NOREPLACE or RENAME_EXCHANGE, else EINVAL.

        Raises EXDEV, upon which mv(1) copies, where a directory would come to belong to other
        layers, or something below it might; see also `directory.carry`.
        """
        if flags not in {0, syscalls.RENAME_NOREPLACE, syscalls.RENAME_EXCHANGE}:
            raise syscalls.failure(errno.EINVAL)
        source, node = self._existing(*old)
        target = self.view.place(*new)
        if flags == syscalls.RENAME_EXCHANGE and target.node is None:
            raise syscalls.failure(errno.ENOENT)
        if flags == syscalls.RENAME_NOREPLACE and target.node is not None:
            raise syscalls.failure(errno.EEXIST)
        stacks = self.view.stack_at(*old), self.view.stack_at(*new)
        self._require_movable(source, target, stacks, flags)
        for place in (source, target):
            if place.node is not None:
                self.view.touched.node(place.node)
            self.view.touched.name(place.parent, place.name, whole=True)
        if flags == syscalls.RENAME_EXCHANGE:
            directory.exchange(stacks[0], source, target)
        else:
            self._rename(source, node, target, stacks)
        for stack, (parent, _) in zip(stacks, (old, new), strict=True):
            self._touch(stack, parent)

    def _require_movable(
        self, source: Place, target: Place, stacks: tuple[Stack, Stack], flags: int
    ) -> None:
        if self.view.keep is None:
            return
        nodes = [node for node in (source.node, target.node) if node is not None]
        directories = any(node.is_directory for node in nodes)
        if stacks[0] is not stacks[1]:
            if directories or flags == syscalls.RENAME_EXCHANGE:
                raise syscalls.failure(errno.EXDEV)
        elif directories and stacks[0] is self.view.stack:
            places = (source, target)
            if any(self.view.leads(place.parent.child_path(place.name)) for place in places):
                raise syscalls.failure(errno.EXDEV)

    def _rename(
        self, source: Place, node: Node, target: Place, stacks: tuple[Stack, Stack]
    ) -> None:
        if target.node is not None and target.node is not node:
            directory.check_replaceable(node, target.node)
            if target.node.is_directory:
                self._require_empty(target.node)
        if stacks[0] is stacks[1]:
            directory.rename(stacks[0], source, target)
        else:
            self._carry(source, node, target, stacks)
        if target.node is not None and target.node is not node:
            self._after_removal(target.node)

    def _carry(self, source: Place, node: Node, target: Place, stacks: tuple[Stack, Stack]) -> None:
        stat = directory.carry(stacks[0], source, stacks[1], target, _CARRY_LIMIT)
        self.view.fast_path.withdraw(node.number)
        self.view.nodes.rebind(node, self.view.made(stacks[1], stat), self.view.generation)
        node.add_link(target.parent, target.name, in_upper=True)
        if node.fd >= 0:
            self.view.reopen(node, write=False)

    def _after_removal(self, node: Node) -> None:
        view = self.view
        if not node.linked:
            view.fast_path.withdraw(node.number)  # or its space would not be free at once
            if node.is_directory or not view.link_count(node, view.stat(node)):
                view.nodes.detach(node)
        view.collect(node)

    # Contents

    def needs_copy_up(self, node: Node) -> int:
        """Return how many bytes a copy-up of the node would copy; 0 if it is in the upper."""
        if (node.upper and not node.metacopy) or not modes.S_ISREG(node.kind):
            return 0
        return self.view.stat(node).st_size

    def must_outlive_name(self, node: Node) -> bool:
        """Say whether a file is copied up even if a name of it goes: for the sake of its others."""
        return must_index(self.view.stack_of(node), node, self.view.stat(node))

    def begin_copy_up(self, node: Node) -> CopyUp:
        """Prepare a copy-up whose data is copied by the caller, in a thread; see `CopyUp`.

        Precondition: `needs_copy_up`.
        """
        self.view.touched.node(node)
        return CopyUp(self.view.stack_of(node), node)

    def make_writable(self, node: Node, size: int | None = None) -> None:
        """Copy a regular file up; only the first `size` bytes of it, if the rest is to be cut off.

        Raises EROFS, ENOSPC.
        """
        self._change(node, size)

    def drop_privileges(self, node: Node) -> None:
        """Clear set-user-ID and set-group-ID, as before a write (setattr_should_drop_suidgid)."""
        mode = self.view.stat(node).st_mode
        dropped = modes.S_ISUID | (modes.S_ISGID if mode & modes.S_IXGRP else 0)
        if mode & dropped:
            self.chmod(node, mode & ~dropped)

    def open_storage(self, node: Node) -> int:
        """Return a new descriptor of where the contents are, or will be, in the upper."""
        return syscalls.open_file(self.view.locate(node), os.O_RDONLY)

    def open_file(self, node: Node, *, write: bool, truncate: bool = False) -> None:
        """Open the contents of a regular file, until `release_file`; opens are counted."""
        if write or truncate:
            self._change(node, 0 if truncate else None)
        if node.fd < 0:
            self.view.reopen(node, write=write)
        node.opens += 1
        self.view.open_here.add(node)
        if truncate:
            self.resize(node, 0)

    def release_file(self, node: Node) -> None:
        """Undo one `open_file`."""
        node.opens -= 1
        if not node.opens:
            self.view.open_here.discard(node)
            syscalls.close(node.fd)
            node.fd = -1
            self.view.collect(node)

    def read(self, node: Node, size: int, offset: int) -> bytes:
        """Read from an open file. All who have it open read what was written after a copy-up."""
        if node.upper and not (node.fd_upper or node.metacopy or node.gone):
            self.view.reopen(node, write=False)
        return syscalls.read(node.fd, size, offset)

    def write(self, node: Node, data: bytes, offset: int) -> int:
        """Write to an open file; return how much, which is all unless the disk gets full.

        Raises ENOSPC, EROFS.
        """
        self.view.touched.written(node)
        if not node.fd_writable:
            copy_up(self.view.stack_of(node), node)
            self.view.reopen(node, write=True)
        return syscalls.write(node.fd, data, offset)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        """Write an open file, or a directory, back to disk."""
        if node.is_directory:
            if node.upper and node.linked:
                syscalls.fsync_directory(self.view.stack_of(node).writable.directory(node.path))
            if self.view.keep is not None and node.linked and not node.lasting:
                self.view.keep.ways.sync(node.path)
        elif node.fd_upper:
            syscalls.fsync(node.fd, data_only=data_only)


def _truncate(at: At, size: int, *, by_name: bool) -> None:
    fd = syscalls.open_file(at, os.O_WRONLY)
    try:
        syscalls.truncate(fd, size, by_name=by_name)
    finally:
        syscalls.close(fd)
