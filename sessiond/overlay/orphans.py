"""Objects without a name that someone still holds: an open file that was removed, or that is not in
the layers that a session was reset to.

This process reaches them through a descriptor, the node's anchor. If it dies, its successor could
not, so a file of the upper also gets a name in a directory beside the layers until it is given up.
As with the orphans of ext4, what is there when nothing is mounted is garbage.
"""

from __future__ import annotations

import errno
import stat as modes
import struct
from collections.abc import Collection
from typing import NamedTuple

from sessiond.overlay import syscalls
from sessiond.overlay.lookup import Entry, Lower, Presence
from sessiond.overlay.nodes import ORPHAN_FACT, Node
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At

_KEPT, _LOWER, _DIRECTORY = b"KLD"
_HEAD = struct.Struct("=B?")  # which of these, and whether the layers were swapped away under it
_NUMBER = struct.Struct("=Q")  # by which a file is kept
_LAYER = struct.Struct("=QQ")  # device and inode of a layer's root; its path in the layer follows

_NOT_LINKABLE = frozenset(
    {errno.EXDEV, errno.ENOENT, errno.EMLINK, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
)
"""It is on another file system, has no name at all any more, has too many, or is protected; or
there is no space for a name: to remove what is open has to work all the same.
"""


class Orphans:
    """A directory on the file system of the upper, with files named after the numbers of nodes."""

    def __init__(self, path: bytes) -> None:
        """Raises OSError: ENOENT."""
        self._directory = syscalls.open_root(path)

    def close(self) -> None:
        syscalls.close(self._directory)

    def has(self, node: Node) -> bool:
        """Say whether `node` has a name here."""
        names = (node.orphan, node.kept_name)
        return any(name is not None and name.directory == self._directory for name in names)

    def at(self, number: int) -> At:
        """Return where the file of node `number` is, if it is here."""
        return At(self._directory, b"%x" % number)

    def keep(self, number: int, at: At) -> At | None:
        """Give the file `at` a name here; return it, or None if that cannot be."""
        kept = self.at(number)
        try:
            if at.name:
                syscalls.link(at, kept)
            else:
                syscalls.link_descriptor(at.directory, kept)
        except FileExistsError:  # by a predecessor, which died before the name went away
            return kept
        except OSError as error:
            if error.errno not in _NOT_LINKABLE:
                raise
            return None
        return kept

    def remove_others(self, kept: Collection[At]) -> None:
        """Remove all files but those."""
        known = {at.name for at in kept}
        for name, _ in syscalls.scan(self._directory):
            if name not in known:
                syscalls.unlink(At(self._directory, name))


def anchor(stack: Stack, node: Node, at: At) -> None:
    """Keep a node, which is at `at`, within reach: its last known name is about to go away."""
    node.anchor_to(at)
    record(stack, node, at)


def record(stack: Stack, node: Node, at: At, *, gone: bool = False) -> None:
    """Let a successor know where the node is. `gone`: see `Node.gone`."""
    if not node.fast_path.recorded or stack.orphans is None:
        return
    if node.is_directory:
        fact = _HEAD.pack(_DIRECTORY, gone)
    elif node.upper:
        if node.orphan is None and gone:
            # What is in the layers is of no use any more, what is written elsewhere is.
            node.orphan, node.kept_name = node.kept_name, None
        if node.orphan is None:
            node.orphan = stack.orphans.keep(node.number, at)
        if node.orphan is None:
            return
        fact = _HEAD.pack(_KEPT, gone) + _NUMBER.pack(int(node.orphan.name, 16))
    else:
        layer, path, _ = node.lowers[0]
        fact = _HEAD.pack(_LOWER, gone) + _LAYER.pack(*layer.identity) + path
    for number in (node.number, *node.former):
        node.fast_path.note(number, ORPHAN_FACT, fact)


class Found(NamedTuple):
    """What a predecessor's orphan is now."""

    entry: Entry
    anchor: int
    """A descriptor, for the caller to keep."""
    orphan: At | None
    """Its name, if it has one here."""
    gone: bool


def find(stack: Stack, fact: bytes) -> Found | None:
    """Find what a predecessor has recorded of a node. None if it is not there any more."""
    which, gone = _HEAD.unpack_from(fact)
    orphan = None
    lowers: tuple[Lower, ...] = ()
    try:
        if which == _DIRECTORY:
            fd = stack.workdir.removed_directory()
            if fd < 0:
                return None
        elif which == _KEPT and stack.orphans is not None:
            orphan = _find_kept(stack, *_NUMBER.unpack_from(fact, _HEAD.size))
            fd = syscalls.open_path(orphan)
        else:
            lowers = _find_lower(stack, fact[_HEAD.size :])
            fd = syscalls.open_path(lowers[0].at())
    except FileNotFoundError:
        return None
    stat = syscalls.stat(At(fd, b""))
    presence = Presence.LOWER if lowers else Presence.UPPER
    entry = Entry(presence, stat, (stat.st_dev, stat.st_ino), lowers)
    return Found(entry, fd, orphan, gone or modes.S_ISDIR(stat.st_mode))


def _find_kept(stack: Stack, number: int) -> At:
    for directory in (stack.orphans, stack.former):
        if directory is not None:
            at = directory.at(number)
            if syscalls.stat_or_none(at) is not None:
                return at
    raise FileNotFoundError(errno.ENOENT, "it is not kept any more")


def _find_lower(stack: Stack, described: bytes) -> tuple[Lower, ...]:
    identity = _LAYER.unpack_from(described)
    for layer in stack.lowers:
        if layer.identity == identity:
            return (Lower(layer, described[_LAYER.size :]),)
    raise FileNotFoundError(errno.ENOENT, "the layer is not served any more")
