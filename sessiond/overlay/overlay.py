"""Overlay: the face of the core. Nodes in, nodes out; what is where is decided below.

Not thread-safe: one thread calls it. The exception is `CopyUp.copy_data` of a `begin_copy_up`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as modes
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from sessiond.keep_rules import KeepRules
from sessiond.overlay import directory, lookup, orphans, pending, syscalls
from sessiond.overlay.copy_up import CopyUp, copy_up, link_count, locate
from sessiond.overlay.directory import NewObject, Place
from sessiond.overlay.fastpath import FastPath, Inherited
from sessiond.overlay.keep import Keep, seen_by
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import Entry, Identity, Lower, Presence, join
from sessiond.overlay.nodes import (
    EXCHANGE_FACT,
    IDENTITY_FACT,
    KEPT_DEVICE,
    MOVING_FACT,
    ORPHAN_FACT,
    PENDING_FACT,
    ROOT_NUMBER,
    SETTING_FACT,
    Node,
    NodeTable,
    unpack_identity,
)
from sessiond.overlay.pending import Copies, Renewal
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.tally import Touched
from sessiond.overlay.writers import Halt, MovingFile, put_back, settle, with_contents_of
from sessiond.overlay.xattrs import copy_attributes

log = logging.getLogger(__name__)

_SPARE_DESCRIPTORS = 256
_STALE = -1
"""Generation of a node that has to be found anew, though the layers are the same. No directory has
it for longer than a call.
"""
_VANISHED_LIMIT = 1000
"""How many directories are looked for in new layers while all wait."""
_CARRY_LIMIT = 16 << 20
"""Bytes of a file that a rename may copy from one set of layers to another, while all wait."""


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _directories(top: Node) -> Iterator[Node]:
    """Yield a directory and all that are held below it."""
    left = [top]
    while left:
        node = left.pop()
        yield node
        left += [child for child in node.children.values() if child.is_directory]


class Outdated(NamedTuple):
    """What the kernel may know that is of earlier layers."""

    names: list[tuple[int, bytes]]
    """Found or missing: number of the directory, and name in it. Not those below `vanished`."""
    directories: list[int]
    """Numbers; their attributes and listings."""
    vanished: list[tuple[int, bytes, int]]
    """Directories that are gone with all that was in them: names, which are among `names`, and
    their own numbers.
    """
    below: set[int]
    """Numbers of these directories, and of those that were in them."""
    inexact: tuple[bytes, ...] = ()
    """Paths of files in the layer that was frozen that are of another moment than the rest of it:
    they were written to while they were copied.
    """


class Overlay:
    """A merged view and the nodes in it that someone holds.

    Every method that takes a node raises ESTALE if the node is gone: its layers were swapped away
    and no descriptor of it was open.
    """

    def __init__(
        self,
        stack: Stack,
        fast_path: FastPath | None = None,
        inherited: Sequence[Inherited] = (),
        keep: Keep | None = None,
    ) -> None:
        """Take over `stack` and `keep`. `inherited`: see `take_over`, which has to be called next
        then. Last of all, `find_ways` has to be.
        """
        self.stack = stack
        self.keep = keep
        self._fast_path = fast_path or FastPath()
        self.nodes = NodeTable(self._fast_path, inherited)
        for layer in reversed(stack.layers):
            self.nodes.numbering(layer.device)  # so that numbers are the same at each mount
        for layer in reversed(keep.stack.layers if keep is not None else ()):
            self.nodes.numbering(layer.device | KEPT_DEVICE)
        self._generation = 0
        self.touched = Touched()
        self._open_here: set[Node] = set()
        """Those open by `open_file`."""
        self._kept: set[Node] = set()
        """Those whose contents are kept in earlier layers."""
        self._exchanging: Identity | None = None
        """What a predecessor was about to exchange with something else when it died."""
        self._setting: dict[int, bytes] = {}
        """Extended attributes that a predecessor was about to set, by the node's number."""
        self._moved: list[Node] = []
        """Files that the last exchange of layers has moved from one upper to the next."""
        self._moving = False
        """The layers are being replaced by copies of them."""
        self.root = self.nodes.add(self._root_entry(), 0, number=ROOT_NUMBER)
        self.root.references = 1

    def close(self) -> None:
        """Close every descriptor."""
        for node in self.nodes.all():
            self.nodes.remove(node)
        self.stack.close()
        if self.keep is not None:
            self.keep.close()

    # What belongs to which layers

    def _stack(self, node: Node) -> Stack:
        """Return the layers that a node belongs to."""
        if node.lasting:
            assert self.keep is not None
            return self.keep.stack
        return self.stack

    def _locate(self, node: Node) -> At:
        """Return where the node's topmost object is. Raises ESTALE."""
        return locate(self._stack(node), node)

    def _stack_of(self, parent: Node, name: bytes) -> Stack:
        """Return the layers that a name belongs to. Raises ENOENT if `parent` has been removed."""
        self._live(parent)
        keep = self.keep
        if keep is not None and (
            parent.lasting or (keep.rules.rules and keep.rules.keep(parent.child_path(name)))
        ):
            return keep.stack
        return self.stack

    def _leads(self, path: bytes) -> bool:
        """Say whether something below a directory, which is not kept, may be."""
        return self.keep is not None and self.keep.rules.lead(path)

    def _own(self, stack: Stack, entry: Entry) -> Entry:
        """Return `entry`, found in `stack`, as that of a node that belongs to it."""
        if stack is self.stack:
            return entry
        device, inode = entry.identity
        return entry._replace(identity=(device | KEPT_DEVICE, inode))

    def _made(self, stack: Stack, stat: os.stat_result) -> Entry:
        """Return the entry of an object that has just been made in the upper of `stack`."""
        return self._own(stack, Entry(Presence.UPPER, stat, (stat.st_dev, stat.st_ino)))

    def _touch(self, stack: Stack, parent: Node) -> None:
        """After a change to what `stack` has in a directory: that is its own change, too."""
        if stack is not self.stack and not parent.lasting:
            self.touched.node(parent)
            with suppress(OSError):  # its own layers may be full
                copy_up(self.stack, parent)
                now = time.time_ns()
                at = locate(self.stack, parent)
                syscalls.utime(at, syscalls.stat(at).st_atime_ns, now)

    def find_ways(self) -> None:
        """Make the directories above what is kept, where the session's layers lack them."""
        for path in self.keep.lost_ways() if self.keep is not None else ():
            try:
                self._find_way(path)
            except OSError as error:
                log.warning(
                    "what is kept below /%s cannot be reached: %s", os.fsdecode(path), error
                )

    def _find_way(self, path: bytes) -> None:
        assert self.keep is not None
        parent, name = self.find_parent(path), path.rpartition(b"/")[2]
        if not self._lookup(parent, name).positive:
            way = self.keep.stack.writable.at(path)
            stat = syscalls.stat(way)
            made, _ = self.create(parent, name, NewObject(stat.st_mode, stat.st_uid, stat.st_gid))
            copy_attributes(way, locate(self.stack, made), stat, self.stack.xattrs)
            parent = made
        self._collect(parent)

    # Nodes

    def _root_entry(self) -> Entry:
        lowers = tuple(Lower(layer, b"", layer.may_hold_marks) for layer in self.stack.lowers)
        upper = self.stack.upper
        top = upper if upper is not None else self.stack.lowers[0]
        stat = syscalls.stat(At(top.root, b"."))
        presence = Presence.UPPER if upper is not None else Presence.LOWER
        marked = upper is not None and upper.may_hold_marks
        return Entry(presence, stat, (0, 0), lowers, marked=marked)

    def node(self, number: int) -> Node:
        """Return a held node by its number."""
        node = self.nodes.get(number)
        if node is None:
            return self._claim(number)
        if node.generation != self._generation:
            self._refresh(node)
        return node

    def _claim(self, number: int) -> Node:
        """Make a node of what the fast path alone has known so far."""
        place = self._fast_path.place(number)
        node = self._claim_at(number, *place) if place is not None else None
        if node is None:
            raise _error(errno.ESTALE)
        return node

    def _claim_at(
        self,
        number: int,
        kind: int,
        parent_number: int,
        name: bytes,
        identity: Identity | None = None,
        copies: Copies | None = None,
    ) -> Node | None:
        """Make a node, with that number, of what has that name. None if it is another object: the
        layers were swapped, or a process that moved it has died.

        `kind`: its type. `identity`: the object's, where the number does not tell it, nor
        `copies`.
        """
        try:
            parent = self.node(parent_number)
            entry = self._lookup(parent, name)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ESTALE}:
                raise
            return None
        if not entry.positive or modes.S_IFMT(entry.stat.st_mode) != kind:
            return None
        if copies is not None:
            if not copies.has(entry):
                return None
        elif not (
            entry.is_directory
            or self._moving
            or entry.identity == identity
            or self.nodes.may_be(number, entry)
        ):
            return None
        node = self._same(parent, name, entry)
        if node is None:
            node = self.nodes.add(entry, self._generation, number=number)
            node.add_link(parent, name, in_upper=entry.presence is Presence.UPPER)
        elif node.is_directory:
            return None
        else:
            self.nodes.alias(node, number)
        return node

    def take_over(self, inherited: list[Inherited], *, moved: bool = False) -> None:
        """Go on with the nodes of a predecessor that has died.

        Most are found as they are needed. Here those whose number or name alone does not lead to
        them are: `node` finds them from then on. `moved`: these layers are copies of those that
        the predecessor served.
        """
        self._moving = moved
        for left in inherited:
            if MOVING_FACT in left.facts:
                self._put_back(left)
        for left in inherited:
            if left.number == 0 and EXCHANGE_FACT in left.facts:
                self._exchanging = unpack_identity(left.facts[EXCHANGE_FACT])
            if SETTING_FACT in left.facts:
                self._setting[left.number] = left.facts[SETTING_FACT]
            if left.number > ROOT_NUMBER and self.nodes.get(left.number) is None:
                self._inherit(left)
        self.remove_orphans()
        self._moving = False

    def remove_orphans(self) -> None:
        """Give up files without a name that nobody holds."""
        nodes = self.nodes.all()
        named = [name for node in nodes for name in (node.orphan, node.kept_name)]
        held = [name for name in named if name is not None]
        for stack in self.stacks:
            for orphans_there in (stack.orphans, stack.former):
                if orphans_there is not None:
                    orphans_there.remove_others(held)

    @property
    def stacks(self) -> list[Stack]:
        """All layers, in sets that are independent of each other; the session's first."""
        return [self.stack] if self.keep is None else [self.stack, self.keep.stack]

    def _put_back(self, left: Inherited) -> None:
        try:
            put_back(self.stack, left.number, left.facts[MOVING_FACT])
        except OSError as error:
            log.warning("a file that was being moved, node %x, is lost: %s", left.number, error)
        self._fast_path.note(left.number, MOVING_FACT, b"")

    def settle(self) -> None:
        """Make a `swap` final: no successor will have to go back on it."""
        moved, self._moved = self._moved, []
        for node in moved:
            settle(node)

    def was_setting(self, number: int, name: bytes) -> bool:
        """Say whether a predecessor died about when it set that extended attribute of a node."""
        return self._setting.get(number) == name

    def has_exchanged(self, parent: Node, name: bytes) -> bool:
        """Say whether the exchange with which a predecessor died has got the object to `name`."""
        entry = self._lookup(parent, name)
        return (entry.stat.st_dev, entry.stat.st_ino) == self._exchanging

    def _inherit(self, left: Inherited) -> None:
        fact = left.facts.get(PENDING_FACT)
        may_be_left = self.stack.former is not None or self.keep is not None
        copies = Copies(fact) if fact and may_be_left else None
        if copies is not None:
            for stack in self.stacks:
                copies.unite(stack)
        self._inherit_place(left, copies)
        node = self.nodes.get(left.number)
        if (
            node is not None
            and not node.gone
            and copies is not None
            and (node.lasting or self.stack.former is not None)
        ):
            if pending.find(self.stack, node, left.number):
                self._kept.add(node)
                if node.linked:
                    self._renewed(node)
            else:
                path = os.fsdecode(b"/" + node.path) if node.linked else "a removed file"
                log.error("what is written to %s by who has it open is lost", path)
        elif fact:  # it was not to be left yet, or is an orphan
            self._fast_path.note(left.number, PENDING_FACT, b"")

    def _inherit_place(self, left: Inherited, copies: Copies | None) -> None:
        fact = left.facts.get(IDENTITY_FACT)
        identity = unpack_identity(fact) if fact else None
        for parent, name in left.names:
            place = (left.number, left.kind, parent, name)
            if self._claim_at(*place, identity, copies) is not None:
                return
        fact = left.facts.get(ORPHAN_FACT)
        found = self._find_orphan(fact) if fact else None
        if found is not None and (node := self.nodes.by_orphan(found.orphan)) is not None:
            syscalls.close(found.anchor)
            self.nodes.alias(node, left.number)
            return
        entry = found.entry if found is not None else lookup.nothing(left.kind)
        node = self.nodes.add(entry, self._generation, number=left.number)
        self.nodes.detach(node)
        node.gone = True
        if found is not None:
            node.anchor, node.orphan, node.gone = found.anchor, found.orphan, found.gone
        self._collect(node)  # the kernel may have it open and have forgotten it

    def _find_orphan(self, fact: bytes) -> orphans.Found | None:
        for stack in self.stacks:
            if (found := orphans.find(stack, fact)) is not None:
                return found._replace(entry=self._own(stack, found.entry))
        return None

    def serve(self, node: Node) -> bool:
        """Let the fast path answer for names in a directory; return whether it has begun to."""
        if not node.linked or self.stack.data or self._fast_path.is_served(node.number):
            return False
        if not node.lasting and self._leads(node.path):
            return False  # some names in it, or below, belong to other layers
        stack = self._stack(node)
        parts = [lower.layer.directory(lower.path) for lower in node.lowers]
        if node.upper:
            parts.insert(0, stack.writable.directory(node.path))
        bottom = stack.lowers[-1]
        has_bottom = bool(node.lowers) and node.lowers[-1].layer is bottom
        numbering = self._numbering(node, syscalls.stat(At(parts[-1], b"")).st_dev)
        if has_bottom and (bottom.may_hold_marks or numbering is None):
            return False
        return self._fast_path.serve(node.number, tuple(parts), has_bottom, numbering or 0)

    def _numbering(self, node: Node, device: int) -> int | None:
        return self.nodes.numbering(device | (KEPT_DEVICE if node.lasting else 0))

    def forget(self, number: int, count: int) -> None:
        """Give back `count` references that `refer` has taken. An unknown number is ignored."""
        node = self.nodes.get(number)
        if node is not None:
            self.nodes.forget(node, number, count)
            self._collect(node)

    def refer(self, node: Node) -> None:
        """Hold `node` until `forget`."""
        node.references += 1

    def _collect(self, node: Node) -> None:
        """Drop nodes that nobody holds, and then their parents that were kept for their sake."""
        while not (
            node.references
            or node.former
            or node.opens
            or node.children
            or node.is_root
            or node.kept >= 0
        ):
            if self.nodes.get(node.number) is not node:
                return  # dropped already: one of its parents was above another
            self.touched.leave(node)
            parents = list(node.links)
            for parent, name in parents:
                node.drop_link(parent, name)
            self.nodes.remove(node)
            if not parents:
                return
            for parent, _ in parents[1:]:
                self._collect(parent)
            node = parents[0][0]

    def _refresh(self, node: Node) -> None:
        """Find out where a node of earlier layers, and so its parents, are in the present ones."""
        stale = [node]
        while stale[-1].links and stale[-1].parent.generation != self._generation:
            stale.append(stale[-1].parent)
        while stale:
            self._find_again(stale.pop())

    def _find_again(self, node: Node) -> None:
        if node.is_root:
            node.bind(self._root_entry(), self._generation)
            return
        for parent, name in list(node.links):
            if parent.generation != self._generation:
                self._refresh(parent)
            if parent.linked:
                entry = self._lookup(parent, name)
                if entry.positive and self._continues(node, entry):
                    self._rebind(node, entry, parent, name)
                    return
        self._abandon(node)

    def _continues(self, node: Node, entry: Entry) -> bool:
        """Say whether `entry`, found in new layers, is what the node was in the old ones."""
        if modes.S_IFMT(entry.stat.st_mode) != node.kind:  # its inode number was used again
            return False
        if node.is_directory or self._moving:
            return True
        return (entry.stat.st_dev, entry.stat.st_ino) == node.real

    def _rebind(self, node: Node, entry: Entry, parent: Node, name: bytes) -> None:
        for link in list(node.links):
            node.drop_link(*link)
        moved = (entry.stat.st_dev, entry.stat.st_ino) != node.real
        self.nodes.rebind(node, entry, self._generation)
        node.add_link(parent, name, in_upper=entry.presence is Presence.UPPER)
        node.drop_anchor()
        if not node.upper:
            # A snapshot holds the file now: the next write has to copy it up.
            node.fd_upper = node.fd_writable = False
        if moved and node.fd >= 0:
            self._open_data(node, write=False)

    def _abandon(self, node: Node) -> None:
        """The new layers do not have this node: who has it open goes on as after rm(1)."""
        if node.anchor < 0:
            if node.fd >= 0:
                node.anchor = syscalls.duplicate(node.fd)
            elif (fd := self._fast_path.duplicate(node.number)) >= 0:
                node.anchor = fd
            elif node.is_directory and self.stack.work is not None:
                node.anchor = self.stack.work.removed_directory()
        if node.anchor >= 0:
            orphans.record(self._stack(node), node, At(node.anchor, b""), gone=True)
        for link in list(node.links):
            node.drop_link(*link)
        node.index = None
        node.gone = True
        node.generation = self._generation
        self.nodes.detach(node)

    def _live(self, directory_node: Node) -> Node:
        if not directory_node.linked:
            raise _error(errno.ENOENT)
        return directory_node

    def _lookup(self, parent: Node, name: bytes) -> Entry:
        stack = self._stack_of(parent, name)
        return self._own(stack, lookup.lookup(stack, seen_by(stack, parent), name))

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Return the node of that name and its stat(2). Raises ENOENT, ENAMETOOLONG."""
        known = self._known(parent, name)
        if known is not None:
            return known, self.stat(known)
        entry = self._lookup(parent, name)
        if not entry.positive:
            raise _error(errno.ENOENT)
        return self._adopt(parent, name, entry), entry.stat

    def peek(self, parent: Node, name: bytes) -> tuple[int, os.stat_result]:
        """Return what `lookup` would, the number in place of the node, which is not made."""
        known = self._known(parent, name)
        if known is not None:
            return known.number, self.stat(known)
        entry = self._lookup(parent, name)
        if not entry.positive:
            raise _error(errno.ENOENT)
        return self.nodes.number_of(entry), entry.stat

    def _known(self, parent: Node, name: bytes) -> Node | None:
        """Return the node of that name if it is held, and of the present layers.

        Where it is need not be looked up: only this object changes the layers, and notes it.
        """
        node = parent.children.get(name)
        return node if node is not None and node.generation == self._generation else None

    def _adopt(self, parent: Node, name: bytes, entry: Entry) -> Node:
        node = self._same(parent, name, entry) or self.nodes.add(entry, self._generation)
        if (parent, name) not in node.links:
            node.add_link(parent, name, in_upper=entry.presence is Presence.UPPER)
        return node

    def _same(self, parent: Node, name: bytes, entry: Entry) -> Node | None:
        """Return the node of which `entry` is a name, if it is held."""
        node = self.nodes.by_identity(entry.identity)
        if node is not None and node.generation != self._generation:
            self._refresh(node)
            node = self.nodes.by_identity(entry.identity)
        if node is not None and self._is_same(node, entry, parent, name):
            return node
        known = parent.children.get(name)
        if known is not None and known.generation != self._generation:
            self._refresh(known)  # a directory goes on by its name
            known = parent.children.get(name)
        return known if known is not None and self._is_same(known, entry, parent, name) else None

    def _is_same(self, node: Node, entry: Entry, parent: Node, name: bytes) -> bool:
        """Say whether `entry` is a name of `node`, and not of another file of the same origin."""
        if (
            node.generation != self._generation
            or (entry.stat.st_dev, entry.stat.st_ino) != node.real
        ):
            return False
        if (parent, name) in node.links:
            return True
        if node.is_directory:
            return False
        # Names of one lower file are names of one node only if copy-up will keep them together.
        stack = self._stack(node)
        return node.upper or lookup.origin_of(stack, entry.lowers[0]) is not None

    def _place(self, parent: Node, name: bytes) -> Place:
        """Look a name up for a change to it."""
        known = self._known(parent, name)
        if known is not None:
            in_upper = known.links[parent, name]
            presence = Presence.UPPER if in_upper else Presence.LOWER
            return Place(parent, name, known, presence)
        entry = self._lookup(parent, name)
        node = self._adopt(parent, name, entry) if entry.positive else None
        return Place(parent, name, node, entry.presence)

    def _existing(self, parent: Node, name: bytes) -> tuple[Place, Node]:
        place = self._place(parent, name)
        if place.node is None:
            raise _error(errno.ENOENT)
        return place, place.node

    # Attributes

    def stat(self, node: Node) -> os.stat_result:
        """Return the stat(2) of the topmost object; see also `link_count`."""
        if node.remains is not None and not node.linked:
            return node.remains
        stat = syscalls.stat(self._locate(node))
        if node.kept >= 0:
            return with_contents_of(stat, syscalls.stat(At(node.kept, b"")))
        return stat

    def link_count(self, node: Node, stat: os.stat_result) -> int:
        """Return the node's ``st_nlink``, given its stat(2)."""
        return link_count(self._stack(node), node, stat)

    def readlink(self, node: Node) -> bytes:
        return syscalls.readlink(self._locate(node))

    def open_bottom(self, node: Node) -> tuple[int, int]:
        """Open the bottom layer's part of a directory, to list it; return the descriptor, and what
        is added to inode numbers there to make the numbers of nodes. Raises ENOENT.
        """
        bottom = self._stack(node).lowers[-1]
        if not node.lowers or node.lowers[-1].layer is not bottom:
            raise _error(errno.ENOENT)
        return (
            syscalls.open_readable(bottom.directory(node.lowers[-1].path)),
            self._numbering(node, bottom.device) or 0,
        )

    def statvfs(self) -> os.statvfs_result:
        """Return the statvfs(3) of the file system that takes new files."""
        return syscalls.statvfs(self.stack.layers[0].root)

    def resize(self, node: Node, size: int, *, by_name: bool = False) -> None:
        """Set the size of a regular file, in bytes; see `syscalls.truncate`."""
        self.touched.node(node)
        copy_up(self._stack(node), node, size)
        if node.kept >= 0:
            fd = syscalls.open_file(At(node.kept, b""), os.O_WRONLY)
            syscalls.truncate(fd, size)
            syscalls.close(fd)
        if node.fd_writable:
            syscalls.truncate(node.fd, size, by_name=by_name)
            return
        fd = syscalls.open_file(self._locate(node), os.O_WRONLY)
        try:
            syscalls.truncate(fd, size, by_name=by_name)
        finally:
            syscalls.close(fd)

    def chmod(self, node: Node, mode: int) -> None:
        self.touched.node(node)
        copy_up(self._stack(node), node)
        syscalls.chmod(self._locate(node), modes.S_IMODE(mode))
        self._refresh_way(node)

    def chown(self, node: Node, uid: int, gid: int) -> None:
        """Set the owner; -1 leaves a part as it is."""
        self.touched.node(node)
        copy_up(self._stack(node), node)
        syscalls.chown(self._locate(node), uid, gid)
        self._refresh_way(node)

    def utime(self, node: Node, atime: int | None, mtime: int | None) -> None:
        """Set times, in nanoseconds; None leaves one as it is."""
        self.touched.node(node)
        copy_up(self._stack(node), node)
        at = self._locate(node)
        if atime is None or mtime is None:
            stat = self.stat(node)
            atime = stat.st_atime_ns if atime is None else atime
            mtime = stat.st_mtime_ns if mtime is None else mtime
        syscalls.utime(at, atime, mtime)
        if node.kept >= 0:
            syscalls.utime(At(node.kept, b""), atime, mtime)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Raises ENODATA, also where the layer's file system has no xattrs."""
        value = syscalls.getxattr(self._locate(node), self.stack.xattrs.stored(name))
        if value is None:
            raise _error(errno.ENODATA)
        return value

    def listxattr(self, node: Node) -> list[bytes]:
        return self.stack.xattrs.shown(syscalls.listxattr(self._locate(node)))

    def setxattr(self, node: Node, name: bytes, value: bytes) -> None:
        self.touched.node(node)
        copy_up(self._stack(node), node)
        self._fast_path.note(node.number, SETTING_FACT, name)
        try:
            syscalls.setxattr(self._locate(node), self.stack.xattrs.stored(name), value)
        finally:
            self._fast_path.note(node.number, SETTING_FACT, b"")
        self._refresh_way(node)

    def _refresh_way(self, node: Node) -> None:
        if node.is_directory and node.links and not node.lasting and self._leads(node.path):
            assert self.keep is not None
            self.keep.ways.refresh(node)

    def removexattr(self, node: Node, name: bytes) -> None:
        """Raises ENODATA."""
        stored = self.stack.xattrs.stored(name)
        if not node.upper and syscalls.getxattr(self._locate(node), stored) is None:
            raise _error(errno.ENODATA)
        self.touched.node(node)
        copy_up(self._stack(node), node)
        syscalls.removexattr(self._locate(node), stored)

    # Directories

    def names(self, node: Node) -> list[bytes]:
        """List a directory, without ``.`` and ``..``. A removed one is empty."""
        if not node.linked:
            return []
        listed = lookup.names(self._stack(node), node.directory)
        if self.keep is None or node.lasting or not self._leads(node.path):
            return listed
        path, rules = node.path, self.keep.rules
        others = [name for name in listed if not rules.keep(join(path, name))]
        return others + self.keep.names(path)

    def create(self, parent: Node, name: bytes, new: NewObject) -> tuple[Node, os.stat_result]:
        """Create any object. Raises EEXIST, EPERM for a whiteout (ovl_create_object)."""
        if modes.S_ISCHR(new.mode) and new.device == 0:
            raise _error(errno.EPERM)
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
        self._open_here.add(node)
        return node, stat

    def _create(
        self, parent: Node, name: bytes, new: NewObject
    ) -> tuple[Node, os.stat_result, int]:
        entry = self._lookup(parent, name)
        if entry.positive:
            raise _error(errno.EEXIST)
        stack = self._stack_of(parent, name)
        self.touched.name(parent, name)
        fd = directory.create(stack, parent, name, entry.presence, new)
        self._touch(stack, parent)
        made = fd if fd >= 0 else At(stack.writable.directory(parent.path), name)
        stat = syscalls.stat(made)
        node = self._adopt(parent, name, self._made(stack, stat))
        if fd >= 0:
            self.touched.written(node)
        return node, stat, fd

    def create_anonymous(self, parent: Node, new: NewObject) -> tuple[Node, os.stat_result, int]:
        """Create a regular file without a name (O_TMPFILE); return a descriptor of it, too."""
        stack = self._stack(parent)
        fd = directory.create_anonymous(stack, self._live(parent), new)
        stat = syscalls.stat(At(fd, b""))
        node = self.nodes.add(self._made(stack, stat), self._generation)
        node.anchor = syscalls.duplicate(fd)
        orphans.record(stack, node, At(fd, b""))
        self.touched.written(node)
        return node, self.stat(node), fd

    def link(self, node: Node, parent: Node, name: bytes) -> os.stat_result:
        """Give `node` another name. Raises EEXIST, EPERM for a directory, EXDEV if only one of both
        is kept.
        """
        if node.is_directory:
            raise _error(errno.EPERM)
        entry = self._lookup(parent, name)
        if entry.positive:
            raise _error(errno.EEXIST)
        stack = self._stack_of(parent, name)
        if stack is not self._stack(node):
            raise _error(errno.EXDEV)
        self.touched.node(node)
        self.touched.name(parent, name)
        self.touched.written(node)
        directory.link(stack, node, parent, name, entry.presence)
        self._touch(stack, parent)
        return self.stat(node)

    def unlink(self, parent: Node, name: bytes) -> None:
        _, node = self._existing(parent, name)
        if node.is_directory:
            raise _error(errno.EISDIR)
        self.touched.node(node)
        stack = self._stack(node)
        directory.unlink(stack, node, parent, name)
        self._touch(stack, parent)
        self._after_removal(node)

    def rmdir(self, parent: Node, name: bytes) -> None:
        _, node = self._existing(parent, name)
        if not node.is_directory:
            raise _error(errno.ENOTDIR)
        self._require_empty(node)
        self.touched.name(parent, name, whole=True)
        stack, path = self._stack(node), node.path
        directory.rmdir(stack, node, parent, name)
        if not node.lasting and self._leads(path):
            assert self.keep is not None
            self.keep.ways.remove(path)
        self._touch(stack, parent)
        self._after_removal(node)

    def _require_empty(self, node: Node) -> None:
        if self.names(node):
            raise _error(errno.ENOTEMPTY)

    def rename(self, old: tuple[Node, bytes], new: tuple[Node, bytes], flags: int = 0) -> None:
        """Rename; `flags` as for renameat2(2): RENAME_NOREPLACE or RENAME_EXCHANGE, else EINVAL.

        Raises EXDEV, upon which mv(1) copies, where a directory would come to belong to other
        layers, or something below it might; see also `directory.carry`.
        """
        if flags not in {0, syscalls.RENAME_NOREPLACE, syscalls.RENAME_EXCHANGE}:
            raise _error(errno.EINVAL)
        source, node = self._existing(*old)
        target = self._place(*new)
        if flags == syscalls.RENAME_EXCHANGE and target.node is None:
            raise _error(errno.ENOENT)
        if flags == syscalls.RENAME_NOREPLACE and target.node is not None:
            raise _error(errno.EEXIST)
        stacks = self._stack_of(*old), self._stack_of(*new)
        self._require_movable(source, target, stacks, flags)
        for place in (source, target):
            if place.node is not None:
                self.touched.node(place.node)
            self.touched.name(place.parent, place.name, whole=True)
        if flags == syscalls.RENAME_EXCHANGE:
            directory.exchange(stacks[0], source, target)
        else:
            self._rename(source, node, target, stacks)
        for stack, (parent, _) in zip(stacks, (old, new), strict=True):
            self._touch(stack, parent)

    def _require_movable(
        self, source: Place, target: Place, stacks: tuple[Stack, Stack], flags: int
    ) -> None:
        if self.keep is None:
            return
        nodes = [node for node in (source.node, target.node) if node is not None]
        directories = any(node.is_directory for node in nodes)
        if stacks[0] is not stacks[1]:
            if directories or flags == syscalls.RENAME_EXCHANGE:
                raise _error(errno.EXDEV)
        elif directories and stacks[0] is self.stack:
            places = (source, target)
            if any(self._leads(place.parent.child_path(place.name)) for place in places):
                raise _error(errno.EXDEV)

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
        self._fast_path.withdraw(node.number)
        self.nodes.rebind(node, self._made(stacks[1], stat), self._generation)
        node.add_link(target.parent, target.name, in_upper=True)
        if node.fd >= 0:
            self._open_data(node, write=False)

    def _after_removal(self, node: Node) -> None:
        if not node.linked:
            self._fast_path.withdraw(node.number)  # or its space would not be free at once
        if not node.linked and (node.is_directory or not self.link_count(node, self.stat(node))):
            self.nodes.detach(node)
        self._collect(node)

    # Contents

    def needs_copy_up(self, node: Node) -> int:
        """Return how many bytes a copy-up of the node would copy; 0 if it is in the upper."""
        if (node.upper and not node.metacopy) or not modes.S_ISREG(node.kind):
            return 0
        return self.stat(node).st_size

    def begin_copy_up(self, node: Node) -> CopyUp:
        """Prepare a copy-up whose data is copied by the caller, in a thread; see `CopyUp`.

        Precondition: `needs_copy_up`.
        """
        self.touched.node(node)
        return CopyUp(self._stack(node), node)

    def make_writable(self, node: Node, size: int | None = None) -> None:
        """Copy a regular file up; only the first `size` bytes of it, if the rest is to be cut off.

        Raises EROFS, ENOSPC.
        """
        self.touched.node(node)
        copy_up(self._stack(node), node, size)

    def drop_privileges(self, node: Node) -> None:
        """Clear set-user-ID and set-group-ID, as before a write (setattr_should_drop_suidgid)."""
        mode = self.stat(node).st_mode
        dropped = modes.S_ISUID | (modes.S_ISGID if mode & modes.S_IXGRP else 0)
        if mode & dropped:
            self.chmod(node, mode & ~dropped)

    def open_contents(self, node: Node, *, write: bool) -> int:
        """Return a new descriptor of where the contents are now. Precondition: copied up to write.

        Raises ESTALE for a removed file whose contents nobody holds.
        """
        if node.kept >= 0:
            at = At(node.kept, b"")
        elif node.metacopy:
            at = node.data_lower().at()
        else:
            at = self._locate(node)
        return syscalls.open_file(at, os.O_RDWR if write else os.O_RDONLY)

    def open_storage(self, node: Node) -> int:
        """Return a new descriptor of where the contents are, or will be, in the upper."""
        return syscalls.open_file(self._locate(node), os.O_RDONLY)

    def open_file(self, node: Node, *, write: bool, truncate: bool = False) -> None:
        """Open the contents of a regular file, until `release_file`; opens are counted."""
        if write or truncate:
            self.touched.node(node)
            copy_up(self._stack(node), node, 0 if truncate else None)
        if node.fd < 0:
            self._open_data(node, write=write)
        node.opens += 1
        self._open_here.add(node)
        if truncate:
            self.resize(node, 0)

    def release_file(self, node: Node) -> None:
        """Undo one `open_file`."""
        node.opens -= 1
        if not node.opens:
            self._open_here.discard(node)
            syscalls.close(node.fd)
            node.fd = -1
            self._collect(node)

    def _open_data(self, node: Node, *, write: bool) -> None:
        """Open the contents where they are now, in place of an earlier descriptor."""
        fd = self.open_contents(node, write=write)
        if node.fd >= 0:
            syscalls.close(node.fd)
        node.fd, node.fd_writable = fd, write
        node.fd_upper = node.upper and not node.metacopy

    def read(self, node: Node, size: int, offset: int) -> bytes:
        """Read from an open file. All who have it open read what was written after a copy-up."""
        if node.upper and not (node.fd_upper or node.metacopy or node.gone):
            self._open_data(node, write=False)
        return syscalls.read(node.fd, size, offset)

    def write(self, node: Node, data: bytes, offset: int) -> int:
        """Write to an open file; return how much, which is all unless the disk gets full.

        Raises ENOSPC, EROFS.
        """
        self.touched.written(node)
        if not node.fd_writable:
            copy_up(self._stack(node), node)
            self._open_data(node, write=True)
        return syscalls.write(node.fd, data, offset)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        """Write an open file, or a directory, back to disk."""
        if node.is_directory:
            if node.upper and node.linked:
                syscalls.fsync_directory(self._stack(node).writable.directory(node.path))
            if self.keep is not None and node.linked and not node.lasting:
                self.keep.ways.sync(node.path)
        elif node.fd_upper:
            syscalls.fsync(node.fd, data_only=data_only)

    # Contents in storage that was left

    @property
    def pending(self) -> list[int]:
        """Numbers of files whose contents are still written elsewhere; see `pending`."""
        return [node.kept_number for node in self._kept]

    def renew_pending(self) -> None:
        """Bring all their contents to where they belong. That one cannot be is logged."""
        for node in list(self._kept):
            try:
                self.renew(node)
            except OSError as error:
                path = os.fsdecode(b"/" + node.path)
                log.error("%s is not on disk as it is: %s", path, error.strerror)  # noqa: TRY400

    def name_of(self, number: int) -> bytes | None:
        """Return the path of a node in the merged view, for people, if it has one."""
        node = self.nodes.get(number)
        return b"/" + node.path if node is not None and node.linked else None

    def begin_renewal(self, node: Node) -> Renewal:
        """Prepare to bring one there, in steps; `end_renewal` is the last.

        Precondition: it is `pending`, and nothing large is left to copy up.
        """
        self.touched.node(node)
        copy_up(self._stack(node), node)
        return Renewal(self._stack(node), node)

    def end_renewal(self, renewal: Renewal, node: Node) -> None:
        """Let what was copied be the file. Precondition: it has a name, and the layers are those
        that they were.
        """
        if renewal.publish():
            self._renewed(node)

    def renew(self, node: Node) -> None:
        """All these steps at once, if it has a name."""
        if self.node(node.number).linked:
            with self.begin_renewal(node) as renewal:
                renewal.copy_data()
                self.end_renewal(renewal, node)

    def _renewed(self, node: Node) -> None:
        """Know a file again that is another one in the upper."""
        self.touched.node(node)
        parent, name = node.best_link()
        self.nodes.rebind(node, self._lookup(parent, name), self._generation)
        pending.note(node, node.real)

    def finish_pending(self, node: Node, closes: int) -> bool:
        """Let the contents be where they belong from now on, if nobody can write elsewhere any
        more, nor can have done so since the last renewal, when `FastPath.closes` was `closes`.
        """
        if not self._fast_path.finish(node.kept_number, closes):
            return False
        pending.finish(node)
        self._kept.discard(node)
        self._collect(node)
        return True

    # The stack

    def upper_names(self) -> list[tuple[Node, Node, bytes]]:
        """Return all names of regular files in the upper, of those, that is, that take space: node,
        parent, name.
        """
        files = (node for node in self.nodes.all() if node.upper and modes.S_ISREG(node.kind))
        return [(node, *link) for node in files for link in node.links]

    def lost_names(
        self, held: list[tuple[Node, Node, bytes]], outdated: Outdated
    ) -> list[tuple[int, bytes]]:
        """Return which of the names that were `held` before a swap are no longer what they were,
        and which directory they were in, unless that has vanished.
        """
        lost = []
        for node, parent, name in held:
            if parent.number not in outdated.below and self.nodes.get(node.number) is node:
                self.node(node.number)
                if (parent, name) not in node.links:
                    lost.append((parent.number, name))
        return lost

    def swap(self, stack: Stack, *, moved: bool = False, halt: Halt | None = None) -> Outdated:
        """Serve `stack` instead of the present layers, which are closed.

        Nodes find their new place when they are used next. Files that are open and not in the new
        layers go on as unlinked ones. `moved`: the new layers are copies of the present ones, so
        files that are open go on in them. `halt`: programs that stand still, until files that they
        write have been copied. The caller tells the kernel what it knows that is out of date.
        """
        self.settle()
        self.renew_pending()
        opened = self._opened()
        moving, inexact = ([], ()) if moved else self._move_writers(opened, stack, halt)
        if moved:
            self._keep_writers(opened)
        image = self.stack.lowers[-1]
        same_view = self._exchange(stack)
        outdated = self._begin_generation(
            opened if moved else [file.node for file in moving],
            image=None if moved else image,
            same_view=same_view,
        )
        if moved:
            self._note_pending()
        for file in moving:
            file.arrive()
        self._moved = [file.node for file in moving]
        if self._fast_path.recorded:  # a successor could not find what only the old layers have
            for node in opened:
                self.node(node.number)
        return outdated._replace(inexact=inexact)

    def _begin_generation(
        self, moved: list[Node], *, image: Layer | None = None, same_view: bool = False
    ) -> Outdated:
        """Find all nodes anew from now on; those that have `moved`, by their names.

        `image`: what was the bottom layer, if directories may have vanished.
        """
        self._generation += 1
        directories = self._fast_path.begin_generation()
        # Now: what was answered until then is among them, and nothing has found its new place.
        names = [] if same_view else self._names()
        self._refresh(self.root)
        vanished = self._vanished(image) if image is not None and not same_view else []
        self.find_ways()
        self._moving = True
        try:
            for node in moved:
                self.node(node.number)
        finally:
            self._moving = False
        if same_view:
            return Outdated([], [], [], set())
        # However many names are below them: the kernel comes by the directory, or has no way there.
        below = {node.number for _, _, top in vanished for node in _directories(top)}
        return Outdated(
            [one for one in names if one[0] not in below],
            [*directories, *self.nodes.directories],
            [(parent.number, name, top.number) for parent, name, top in vanished],
            below,
        )

    def _names(self) -> list[tuple[int, bytes]]:
        """Return all names that the kernel may know, or know to be missing."""
        names = self._fast_path.names()
        for node in self.nodes.all():
            names += [(parent.number, name) for parent, name in node.links]
        return names

    def _vanished(self, image: Layer) -> list[tuple[Node, bytes, Node]]:
        """Return directories that have had nothing of the image, and that the view does not have
        any more, each with the directory above it and its name in it; not what is in them.

        Those that are left out are found to be gone when they are used.
        """
        vanished: list[tuple[Node, bytes, Node]] = []
        left, parents = _VANISHED_LIMIT, [self.root]
        while parents:
            parent = parents.pop()
            for name, node in list(parent.children.items()):
                if not node.is_directory:
                    continue
                of_image = node.lowers and node.lowers[-1].layer is image
                if of_image or node.lasting or not left:
                    parents.append(node)
                    continue
                left -= 1
                if self._has_directory(parent, name):
                    parents.append(node)
                else:
                    vanished.append((parent, name, node))
        return vanished

    def _has_directory(self, parent: Node, name: bytes) -> bool:
        if parent.generation != self._generation:
            self._refresh(parent)
        return parent.linked and self._lookup(parent, name).is_directory

    def lowers_changed(self, changed: Collection[Identity]) -> None:
        """Find anew what is in those layers: it is in another of them by now.

        The view is what it was, so the kernel need not be told of anything.
        """
        layers = [
            layer
            for layer in (*self.stack.lowers, *self.stack.indexes)
            if layer.identity in changed
        ]
        for layer in layers:
            layer.forget_all()
        self._find_all_again(layers)
        self._opened()  # a successor has to know those whose origin has gone

    def exchange_lowers(self, lowers: Sequence[bytes], indexes: Sequence[bytes]) -> None:
        """Serve other lowers, which show the same: those that are more, or less, are empty.

        Raises `OSError` as `Stack.open` does; nothing has changed then.
        """
        dropped = self.stack.exchange_lowers(lowers, indexes)
        self._find_all_again(dropped)
        for layer in dropped:
            layer.close()

    def _find_all_again(self, layers: list[Layer]) -> None:
        """Find all that is in those layers: files when they are used next, directories at once,
        since what is in them goes by their place.
        """
        self.root.bind(self._root_entry(), self._generation)
        self._fast_path.withdraw(ROOT_NUMBER)
        directories = []
        for node in self.nodes.all():
            if not node.linked or node.is_root:
                continue
            for lower in node.lowers:
                if lower.layer in layers:
                    node.generation = _STALE
                    if node.is_directory:
                        directories.append(node)
                    break
        for node in directories:
            self._fast_path.withdraw(node.number)
            self.node(node.number)

    def keep_paths(self, rules: KeepRules) -> Outdated:
        """Keep what `rules` name from now on, and nothing else.

        Files that are open where it is kept from now on go on in what is kept there, if they were
        committed, and as unlinked ones if not.
        """
        assert self.keep is not None
        self.settle()
        opened = self._opened()
        moved = [node for node in opened if node.linked and node.lasting != rules.keep(node.path)]
        entering = [node for node in moved if not node.lasting]
        self._keep_writers(entering)
        self._hold_contents([node for node in moved if node.upper])
        self.keep.change(rules)
        outdated = self._begin_generation(entering)
        self._note_pending()
        return outdated

    def take_hidden(self, path: bytes) -> At | None:
        """Take what the session's upper has at `path`, which is kept now, out of the way: nobody
        sees it. Return where it is, for the caller to remove; None if there is nothing.
        """
        upper = self.stack.writable
        if self._kept:
            return None  # the contents of files that are still open may be there
        try:
            at = upper.at(path)
            if syscalls.stat_or_none(at) is None:
                return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        self.touched.path(path, whole=True)
        aside = self.stack.workdir.temporary()
        syscalls.rename(at, aside)
        upper.forget_tree(path)
        return aside

    def find_parent(self, path: bytes) -> Node:
        """Return the directory above `path`, symlinks not followed. Raises ENOENT, ENOTDIR."""
        node = self.root
        for component in path.split(b"/")[:-1]:
            node, _ = self.lookup(node, component)
            if not node.is_directory:
                raise _error(errno.ENOTDIR)
        return node

    def make_way(self, path: bytes) -> None:
        """Prepare for `path`, which is not kept, to be copied to what is.

        Raises as above, with words for people.
        """
        assert self.keep is not None
        try:
            parent = self.find_parent(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = "there is no directory of that name to find it in (symlinks do not count)"
            raise OSError(error.errno, reason, b"/" + path) from error
        try:
            if not parent.lasting:
                self.keep.ways.make(parent)
        finally:
            self._collect(parent)

    def _opened(self) -> list[Node]:
        """Return files that are, or may be, open, each found in the present layers."""
        numbers = self._fast_path.opened()
        if numbers is None:
            opened = [node for node in self.nodes.all() if modes.S_ISREG(node.kind)]
        else:
            held = (self.nodes.get(number) for number in numbers)
            opened = [node for node in held if node is not None]
            opened += self._open_here
        return [self.node(node.number) for node in opened]

    def _exchange(self, stack: Stack) -> bool:
        """Return whether the view is the same, as at a snapshot."""
        layers = [one.identity for one in self.stack.layers]
        same_view = layers == [one.identity for one in stack.lowers]
        if not same_view:
            self.touched.everything()
        old, self.stack = self.stack, stack
        if self.keep is not None:
            self.keep.ways.session = stack
        old.close()
        return same_view

    def _move_writers(
        self, opened: list[Node], new: Stack, halt: Halt | None
    ) -> tuple[list[MovingFile], tuple[bytes, ...]]:
        """If the upper becomes a lower, get files out of it that are written past the overlay.

        Returns them, and as `Outdated.inexact`.
        """
        old = self.stack.upper
        if old is None or not any(old.is_same(layer) for layer in new.lowers):
            stay = [layer.identity for layer in new.lowers]
            self._hold_contents(
                [node for node in opened if not node.lasting and _is_left(node, stay)]
            )
            return [], ()
        moving: list[MovingFile] = []
        try:
            for node in opened:
                if self._is_written(node):
                    contents = self._fast_path.duplicate(node.number)
                    file = MovingFile(self.stack, new, node, contents)
                    moving.append(file)
                    if halt is not None and not halt.holds():
                        file.doubt()
            inexact = tuple(b"/" + file.node.path for file in moving if not file.is_exact())
            if halt is not None:
                halt.end()
            for file in moving:
                file.sync()
        except BaseException:
            for file in moving:
                file.abandon()
            raise
        for file in moving:
            file.leave()
        return moving, inexact

    def _is_written(self, node: Node) -> bool:
        """Say whether someone may write to a file of the session's upper past the overlay."""
        return bool(
            node.upper and node.linked and not node.lasting and node.writers and node.kept < 0
        )

    def _keep_writers(self, opened: list[Node]) -> None:
        for node in opened:
            if self._is_written(node):
                contents = self._fast_path.duplicate(node.number)
                if contents < 0:
                    continue  # lost when a predecessor died
                try:
                    pending.keep(self.stack, node, contents)
                finally:
                    syscalls.close(contents)
                self._kept.add(node)
                self._fast_path.keep(node.number)

    def _note_pending(self) -> None:
        """Let a successor know of files that are written where the layers were."""
        for node in list(self._kept):
            self.node(node.number)
            kept = syscalls.stat(At(node.kept, b""))
            if node.linked and (kept.st_dev, kept.st_ino) != node.real:
                pending.note(node, node.real)
            else:  # the session has come back, since another did not know that it had gone
                pending.finish(node)
                self._kept.discard(node)
                self._fast_path.give_up(node.kept_number)

    def _hold_contents(self, opened: list[Node]) -> None:
        """Keep files of layers that go away within reach of who may have them open."""
        held: list[Node] = []
        for node in opened:
            if node.linked and not self._fast_path.holds(node.number):
                try:
                    node.anchor_to(self._locate(node))
                except OSError as error:
                    if error.errno != errno.EMFILE:
                        raise
                    log.warning("too many files may be open; some will be lost to who has them")
                    for other in held[:_SPARE_DESCRIPTORS]:
                        other.drop_anchor()
                    return
                held.append(node)


def _is_left(node: Node, stay: Sequence[Identity]) -> bool:
    """Say whether what a node stands for is in an upper that goes away, or in such a lower."""
    return node.upper or (bool(node.lowers) and node.lowers[0].layer.identity not in stay)
