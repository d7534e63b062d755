"""Copy-up: a file or directory of a lower gets into the upper, before it is changed for the first
time.

As in the kernel (fs/overlayfs/copy_up.c): the copy is made in the workdir with everything that the
original has, and one rename publishes it, so the merged view never shows a part. The parents go
first. A lower file with several names goes into the index, and its names become hard links to that
one copy.
"""

from __future__ import annotations

import errno
import os
import re
import stat as modes

from sessiond.overlay import origin, orphans, syscalls
from sessiond.overlay.keep import is_way
from sessiond.overlay.lookup import origin_of
from sessiond.overlay.nodes import Node
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At, Object
from sessiond.overlay.workdir import remove_tree
from sessiond.overlay.xattrs import CAPABILITY, copy_attributes

_NLINK = re.compile(rb"([UL])([+-][0-9]{1,9})")
"""As ovl_set_nlink_common writes it."""


def copy_up(stack: Stack, node: Node, size: int | None = None) -> None:
    """Get `node` into the upper of `stack` if it is not there: of its own layers, or, for a
    directory, of those of what is kept in it. Precondition: of the current generation.

    `size`: copy only that many bytes of contents, since the rest is about to be cut off.
    Raises OSError: EROFS without an upper, ESTALE for a node that is gone, and what copying raises
    (ENOSPC).
    """
    if stack.ways is not None and not node.lasting:
        stack.ways.make(node)
        return
    if node.upper:
        if node.metacopy:
            _fill(stack, node)
        return
    with CopyUp(stack, node, size) as copy:
        copy.copy_data()
        copy.publish()


def _copy_up_parents(stack: Stack, node: Node) -> None:
    """Get the directories above `node` into the upper, from the top down."""
    missing: list[Node] = []
    while node.links:
        node = node.parent
        if is_way(stack, node):
            copy_up(stack, node)
            break
        if node.upper:
            break
        missing.append(node)
    while missing:
        with CopyUp(stack, missing.pop()) as copy:
            copy.publish()


def copy_up_name(stack: Stack, node: Node, parent: Node, name: bytes) -> None:
    """Get `node`, and that name of it, into the upper: for a name that is about to be removed or
    moved.
    """
    copy_up(stack, node)
    if not node.links[parent, name]:
        _link_alias(stack, node, parent, name)


class CopyUp:
    """One copy-up in three steps, of which the long one, `copy_data`, may run in another thread."""

    def __init__(self, stack: Stack, node: Node, size: int | None = None) -> None:
        """Open the source and make the empty copy."""
        self._work = stack.workdir
        self.stack = stack
        self.node = node
        self.cancelled = False
        """Set from another thread to make `copy_data` raise ECANCELED."""
        self._source_fd = self._target_fd = -1
        self._published = False
        if node.linked:
            _copy_up_parents(stack, node)
        source = locate(stack, node)
        self._stat = syscalls.stat(source)
        self._size = self._stat.st_size if size is None else min(size, self._stat.st_size)
        self._target = self._work.temporary()
        if modes.S_ISREG(node.kind):
            self._open(source)

    def _open(self, source: At) -> None:
        """Open the contents, and the file that they are to be copied to."""
        node = self.node
        data = node.data_lower().at() if node.metacopy and node.linked else source
        self._source_fd = syscalls.open_file(data, os.O_RDONLY)
        try:
            self._target_fd = syscalls.create_file(self._target, 0o600)
        except BaseException:
            syscalls.close(self._source_fd)
            raise

    def __enter__(self) -> CopyUp:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self._source_fd, self._target_fd):
            if fd >= 0:
                syscalls.close(fd)
        if not self._published:
            remove_tree(self._target)

    def copy_data(self) -> None:
        """Copy the contents. May run in any thread."""
        source, target = self._source_fd, self._target_fd
        if source < 0:
            return
        syscalls.copy_data(source, target, self._size, lambda: self.cancelled)
        if self._size:
            # Before the rename that publishes it; a reflink, too, or btrfs may publish no contents.
            syscalls.fsync(target)

    def publish(self) -> None:
        """Make the copy the node's. Raises ESTALE if that is gone by now."""
        node, stack = self.node, self.stack
        # Found anew: while data was copied, its name may have gone, and directories been closed.
        source = locate(stack, node)
        target = self._complete(source)
        if not node.linked:
            self._replace_anchor()
            return
        handle = origin_of(stack, node.lowers[0])
        syscalls.setxattr(target, stack.xattrs.origin, handle or b"")
        real = syscalls.stat(target)
        indexed = may_have_names(stack, node, self._stat) and handle is not None
        if indexed:
            assert handle is not None
            count = link_count(stack, node, self._stat)
            self._publish_index(origin.index_name(handle), count)
        else:
            _publish(stack, node, self._target)
        self._published = True
        node.upper = True
        node.real = (real.st_dev, real.st_ino)
        if not node.is_directory:
            node.lowers, node.metacopy = (), False
        if indexed:
            parent, name = next(iter(node.links))
            _link_alias(stack, node, parent, name)
        else:
            node.links[next(iter(node.links))] = True

    def _complete(self, source: At) -> Object:
        """Give the copy all that the original has besides contents; return it."""
        xattrs = self.stack.xattrs
        if self._target_fd < 0:
            self._make_special(source)
            copy_attributes(source, self._target, self._stat, xattrs)
            return self._target
        # Of a metadata-only file, what is open has the contents and not the attributes.
        whole = source if self.node.metacopy else self._source_fd
        copy_attributes(whole, self._target_fd, self._stat, xattrs)
        if self._size < self._stat.st_size:
            # What is published is the file cut off, with all that ftruncate(2) does to it.
            syscalls.truncate(self._target_fd, self._size)
        return self._target_fd

    def _make_special(self, source: At) -> None:
        mode = self._stat.st_mode
        if modes.S_ISDIR(mode):
            syscalls.mkdir(self._target, 0o700)
        elif modes.S_ISLNK(mode):
            syscalls.symlink(self._target, syscalls.readlink(source))
        else:
            syscalls.mknod(self._target, modes.S_IFMT(mode) | 0o600, self._stat.st_rdev)

    def _replace_anchor(self) -> None:
        """The node has no name: its copy gets none either."""
        anchor = syscalls.open_path(self._target)
        syscalls.close(self.node.anchor)
        self.node.anchor = anchor
        self.node.upper = True
        orphans.record(self.stack, self.node, self._target)

    def _publish_index(self, name: bytes, count: int) -> None:
        syscalls.setxattr(self._target, self.stack.xattrs.nlink, b"U%+d" % (count - 1))
        syscalls.rename(self._target, At(self._work.index, name))
        self.node.index = name


def _publish(stack: Stack, node: Node, prepared: At) -> None:
    """Move the prepared copy to where the node's name is, unnoticed by the parent's times."""
    ((parent, name),) = node.links
    _copy_up_parents(stack, node)
    directory = stack.writable.directory(parent.path)
    times = syscalls.stat(At(directory, b""))
    mark_impure(stack, parent)
    syscalls.rename(prepared, At(directory, name))
    syscalls.utime(At(directory, b"."), times.st_atime_ns, times.st_mtime_ns)


def _link_alias(stack: Stack, node: Node, parent: Node, name: bytes) -> None:
    """Give a file that is in the index one of its names in the upper (ovl_link_up)."""
    assert node.index is not None
    copy_up(stack, parent)
    indexed = At(stack.workdir.index, node.index)
    count = link_count(stack, node, syscalls.stat(indexed))
    source = origin.decode(syscalls.getxattr(indexed, stack.xattrs.origin) or b"", stack.lowers)
    if source is not None:  # relative to the lower: stays right while the upper's count changes
        syscalls.setxattr(indexed, stack.xattrs.nlink, b"L%+d" % (count - source.st_nlink))
    directory = At(stack.writable.directory(parent.path), b".")
    times = syscalls.stat(directory)
    mark_impure(stack, parent)
    syscalls.link(indexed, At(directory.directory, name))
    syscalls.utime(directory, times.st_atime_ns, times.st_mtime_ns)
    node.links[parent, name] = True


def _fill(stack: Stack, node: Node) -> None:
    """Give a metadata-only copy its contents (ovl_copy_up_meta_inode_data).

    All of them, whatever is about to be cut off: the merged view shows those of the lower until the
    attribute goes, and then these. In place, since the copy may have several names.
    """
    at = locate(stack, node)
    stat = syscalls.stat(at)
    capability = syscalls.getxattr(at, CAPABILITY)  # write(2) clears it
    source = syscalls.open_file(node.data_lower().at(), os.O_RDONLY)
    target = syscalls.open_file(at, os.O_WRONLY)
    try:
        syscalls.copy_data(source, target, stat.st_size, lambda: False)
        syscalls.truncate(target, stat.st_size)
        if capability is not None:
            syscalls.setxattr(target, CAPABILITY, capability)
        syscalls.utime(At(target, b""), stat.st_atime_ns, stat.st_mtime_ns)
        syscalls.fsync(target)
    finally:
        syscalls.close(source)
        syscalls.close(target)
    syscalls.removexattr(at, stack.xattrs.metacopy)
    node.lowers, node.metacopy = (), False
    node.upper = True  # wholly


def locate(stack: Stack, node: Node) -> At:
    """Return where the node's topmost object is. Raises OSError: ESTALE."""
    if node.index is not None:
        return At(stack.workdir.index, node.index)
    if not node.linked:
        if node.anchor < 0:
            raise syscalls.failure(errno.ESTALE)
        return At(node.anchor, b"")
    if node.upper:
        return stack.writable.at(node.path)
    return node.lowers[0].at()


def mark_impure(stack: Stack, directory: Node) -> None:
    """Say on an upper directory that it has entries with an origin (ovl_set_impure)."""
    if directory.impure or is_way(stack, directory):
        return
    syscalls.setxattr(locate(stack, directory), stack.xattrs.impure, b"y")
    directory.impure = True


def link_count(stack: Stack, node: Node, stat: os.stat_result) -> int:
    """Return ``st_nlink``: 1 of a merged directory, counted over all layers for the index."""
    if node.gone or (node.remains is not None and not node.linked):
        return 0
    if node.is_directory:
        if not node.linked:
            return 0
        return 1 if len(node.lowers) + node.upper > 1 else stat.st_nlink
    names = _names(node, stat)
    if node.index is not None:
        return _union_links(stack, At(stack.workdir.index, node.index), names)
    if node.upper or not may_have_names(stack, node, stat):
        return names - (not node.linked and not node.upper)
    was_upper = node.linked and node.lowers[0].layer is not stack.lowers[-1]
    count = _union_links(stack, node.lowers[0].at(), names) if was_upper else names
    return count - (not node.linked)  # a whiteout hides one name; the lower keeps it


def _names(node: Node, stat: os.stat_result) -> int:
    """Return the link count of the node's file without its name among the orphans."""
    return stat.st_nlink - (node.orphan is not None)


def _union_links(stack: Stack, indexed: At, names: int) -> int:
    """Evaluate ``overlay.nlink``, a difference to upper's or lower's link count (ovl_get_nlink)."""
    base, difference = _difference(syscalls.getxattr(indexed, stack.xattrs.nlink) or b"")
    if not base:
        return names
    if base == b"U":
        return max(names + difference, 1)
    source = origin.decode(syscalls.getxattr(indexed, stack.xattrs.origin) or b"", stack.lowers)
    return max(source.st_nlink + difference, 1) if source is not None else names


def _difference(value: bytes) -> tuple[bytes, int]:
    """Parse ``overlay.nlink``: whose link count it refers to, ``U`` or ``L``, and what to add.

    Both are empty if the value makes no sense.
    """
    found = _NLINK.fullmatch(value)
    return (found[1], int(found[2])) if found else (b"", 0)


def may_have_names(stack: Stack, node: Node, stat: os.stat_result) -> bool:
    """Say whether a file may have several names. `stat`: its stat(2).

    Of one that is found in the index of a lower, the others may be the image's: no links of it.
    """
    if node.is_directory:
        return False
    return stat.st_nlink > 1 or any(lower.layer in stack.indexes for lower in node.lowers)


def must_index(stack: Stack, node: Node, stat: os.stat_result) -> bool:
    """Say whether a node of a lower has several names and so gets into the index when it is copied
    up.
    """
    return (
        not node.upper
        and may_have_names(stack, node, stat)
        and origin_of(stack, node.lowers[0]) is not None
    )


def count_from_upper(stack: Stack, node: Node) -> None:
    """Store an indexed file's link count relative to the upper's, which is about to change
    (ovl_nlink_start).
    """
    if node.index is None:
        return
    indexed = At(stack.workdir.index, node.index)
    stat = syscalls.stat(indexed)
    count = link_count(stack, node, stat)
    syscalls.setxattr(indexed, stack.xattrs.nlink, b"U%+d" % (count - _names(node, stat)))


def drop_index(stack: Stack, node: Node) -> None:
    """Remove an indexed file's entry in the index if its last name, known or not, is gone
    (ovl_nlink_end).
    """
    if node.index is None:
        return
    indexed = At(stack.workdir.index, node.index)
    stat = syscalls.stat(indexed)
    base, difference = _difference(syscalls.getxattr(indexed, stack.xattrs.nlink) or b"")
    if base != b"U" or _names(node, stat) + difference > 0:
        return
    orphans.anchor(stack, node, indexed)
    syscalls.unlink(indexed)
    node.index = None
