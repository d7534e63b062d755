"""The merged view: which nodes are held, in which layers each is, and how it is found there.

`Overlay` changes what is in the layers, `Exchange` which layers these are, and `Succession` goes on
with the nodes of a process that has died; all three do it through this.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sessiond.overlay import lookup, orphans, syscalls
from sessiond.overlay.copy_up import link_count, locate
from sessiond.overlay.directory import Place
from sessiond.overlay.fastpath import FastPath, Inherited
from sessiond.overlay.keep import Keep, seen_by
from sessiond.overlay.lookup import Entry, Presence
from sessiond.overlay.nodes import KEPT_DEVICE, ROOT_NUMBER, Node, NodeTable
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.tally import Touched
from sessiond.overlay.writers import with_contents_of

_STALE = -1
"""Generation of a node that has to be found anew, though the layers are the same. No directory has
it for longer than a call.
"""


class View:
    """The nodes of a merged view that someone holds, and the layers that they are found in.

    Every method that takes a node raises ESTALE if the node is gone: its layers were swapped away
    and no descriptor of it was open.
    """

    def __init__(
        self,
        stack: Stack,
        fast_path: FastPath,
        inherited: Sequence[Inherited],
        keep: Keep | None,
    ) -> None:
        """Take over `stack` and `keep`."""
        self.stack = stack
        """The session's own layers."""
        self.keep = keep
        """What outlives resets, if anything does: it has layers of its own."""
        self.fast_path = fast_path
        self.nodes = NodeTable(fast_path, inherited)
        for layer in reversed(stack.layers):
            self.nodes.numbering(layer.device)  # so that numbers are the same at each mount
        for layer in reversed(keep.stack.layers if keep is not None else ()):
            self.nodes.numbering(layer.device | KEPT_DEVICE)
        self.generation = 0
        """Counts the exchanges of layers. Nodes of an earlier one have to be found anew."""
        self.touched = Touched()
        self.open_here: set[Node] = set()
        """Files that are open through a descriptor of their own, `Node.fd`."""
        self._goes_by_names = False
        self.root = self.nodes.add(self._root_entry(), 0, number=ROOT_NUMBER)
        self.root.references = 1

    def close(self) -> None:
        """Close every descriptor."""
        for node in self.nodes.all():
            self.nodes.remove(node)
        for stack in self.stacks:
            stack.close()

    # Layers

    @property
    def stacks(self) -> list[Stack]:
        """All layers, in sets that are independent of each other; the session's first."""
        return [self.stack] if self.keep is None else [self.stack, self.keep.stack]

    def stack_of(self, node: Node) -> Stack:
        """Return the layers that a node belongs to."""
        if node.lasting:
            assert self.keep is not None
            return self.keep.stack
        return self.stack

    def stack_at(self, parent: Node, name: bytes) -> Stack:
        """Return the layers that a name belongs to. Raises ENOENT if `parent` has been removed."""
        if not parent.linked:
            raise syscalls.failure(errno.ENOENT)
        keep = self.keep
        if keep is not None and (
            parent.lasting or (keep.rules.rules and keep.rules.keep(parent.child_path(name)))
        ):
            return keep.stack
        return self.stack

    def leads(self, path: bytes) -> bool:
        """Say whether something below a directory, which is not kept, may be."""
        return self.keep is not None and self.keep.rules.lead(path)

    def own(self, stack: Stack, entry: Entry) -> Entry:
        """Return `entry`, found in `stack`, as that of a node that belongs to it."""
        if stack is self.stack:
            return entry
        device, inode = entry.identity
        return entry._replace(identity=(device | KEPT_DEVICE, inode))

    def made(self, stack: Stack, stat: os.stat_result) -> Entry:
        """Return the entry of an object that has just been made in the upper of `stack`."""
        return self.own(stack, Entry(Presence.UPPER, stat, (stat.st_dev, stat.st_ino)))

    def numbering(self, node: Node, device: int) -> int | None:
        """Return `NodeTable.numbering` of what is in a directory, on `device`."""
        return self.nodes.numbering(device | (KEPT_DEVICE if node.lasting else 0))

    # Where a node is

    def locate(self, node: Node) -> At:
        """Return where the node's topmost object is. Raises ESTALE.

        Then the kernel looks the name up again, but only once (path_openat). So what has the name
        now is kept within reach: programs never see that others replace a file all the time.
        """
        if node.remains is not None and not node.linked:
            parent, name = node.remains.link
            if (successor := parent.children.get(name)) is not None:
                successor.wanted += 1
        return locate(self.stack_of(node), node)

    def stat(self, node: Node) -> os.stat_result:
        """Return the stat(2) of the topmost object; see also `link_count`."""
        if node.remains is not None and not node.linked:
            return node.remains.stat
        stat = syscalls.stat(self.locate(node))
        if node.kept >= 0:
            return with_contents_of(stat, syscalls.stat(At(node.kept, b"")))
        return stat

    def link_count(self, node: Node, stat: os.stat_result) -> int:
        """Return the node's ``st_nlink``, given its stat(2)."""
        return link_count(self.stack_of(node), node, stat)

    def open_contents(self, node: Node, *, write: bool) -> int:
        """Return a new descriptor of where the contents are now. Precondition: copied up to write.

        Raises ESTALE for a removed file whose contents nobody holds.
        """
        if node.kept >= 0:
            at = At(node.kept, b"")
        elif node.metacopy:
            at = node.data_lower().at()
        else:
            at = self.locate(node)
        fd = syscalls.open_file(at, os.O_RDWR if write else os.O_RDONLY)
        node.wanted = max(node.wanted - 1, 0)
        return fd

    def reopen(self, node: Node, *, write: bool) -> None:
        """Open the contents where they are now, in place of the descriptor `Node.fd`."""
        fd = self.open_contents(node, write=write)
        if node.fd >= 0:
            syscalls.close(node.fd)
        node.fd, node.fd_writable = fd, write
        node.fd_upper = node.upper and not node.metacopy

    # Nodes by their numbers

    def node(self, number: int) -> Node:
        """Return a held node by its number."""
        node = self.nodes.get(number)
        if node is None:
            return self._claim(number)
        if node.generation != self.generation:
            self.refresh(node)
        return node

    def _claim(self, number: int) -> Node:
        """Make a node of what the fast path alone has known so far."""
        place = self.fast_path.place(number)
        node = self.claim(number, *place) if place is not None else None
        if node is None:
            raise syscalls.failure(errno.ESTALE)
        return node

    def claim(
        self,
        number: int,
        kind: int,
        parent_number: int,
        name: bytes,
        is_it: Callable[[Entry], bool] | None = None,
    ) -> Node | None:
        """Make a node, with that number, of what has that name. None if it is another object: the
        layers were swapped, or a process that moved it has died.

        `kind`: its type. `is_it`: how to know it, where the number does not tell.
        """
        try:
            parent = self.node(parent_number)
            entry = self.find(parent, name)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ESTALE}:
                raise
            return None
        if not entry.positive or modes.S_IFMT(entry.stat.st_mode) != kind:
            return None
        if not (self.may_be(number, entry) if is_it is None else is_it(entry)):
            return None
        node = self._same(parent, name, entry)
        if node is not None and not node.is_directory:
            self.nodes.alias(node, number)
            return node
        if node is not None:
            if self.nodes.may_be(node.number, entry) or not self.nodes.may_be(number, entry):
                return None
            # By other rules it belongs to other layers, by whose number the fast path has told it:
            # the kernel goes by that one.
            self._abandon(node)
        node = self.nodes.add(entry, self.generation, number=number)
        node.add_link(parent, name, in_upper=entry.presence is Presence.UPPER)
        return node

    def may_be(self, number: int, entry: Entry) -> bool:
        """Say whether `entry` can be what had this number."""
        return entry.is_directory or self._goes_by_names or self.nodes.may_be(number, entry)

    def forget(self, number: int, count: int) -> None:
        """Give back `count` references that `refer` has taken. An unknown number is ignored."""
        node = self.nodes.get(number)
        if node is not None:
            self.nodes.forget(node, number, count)
            self.collect(node)

    def name_of(self, number: int) -> bytes | None:
        """Return the path of a node in the merged view, for people, if it has one."""
        node = self.nodes.get(number)
        return b"/" + node.path if node is not None and node.linked else None

    def refer(self, node: Node) -> None:
        """Hold `node` until `forget`."""
        node.references += 1

    def collect(self, node: Node) -> None:
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
                self.collect(parent)
            node = parents[0][0]

    def remove_orphans(self) -> None:
        """Give up files without a name that nobody holds."""
        nodes = self.nodes.all()
        named = [name for node in nodes for name in (node.orphan, node.kept_name)]
        held = [name for name in named if name is not None]
        for stack in self.stacks:
            for orphans_there in (stack.orphans, stack.former):
                if orphans_there is not None:
                    orphans_there.remove_others(held)

    # Nodes by their names

    def find(self, parent: Node, name: bytes) -> Entry:
        """Return what has that name in the layers. Raises ENOENT for a removed directory,
        ENAMETOOLONG.
        """
        stack = self.stack_at(parent, name)
        return self.own(stack, lookup.lookup(stack, seen_by(stack, parent), name))

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Return the node of that name and its stat(2). Raises ENOENT, ENAMETOOLONG."""
        known = self._known(parent, name)
        if known is not None:
            return known, self.stat(known)
        entry = self._existing(parent, name)
        return self.adopt(parent, name, entry), entry.stat

    def peek(self, parent: Node, name: bytes) -> tuple[int, os.stat_result]:
        """Return what `lookup` would, the number in place of the node, which is not made."""
        known = self._known(parent, name)
        if known is not None:
            return known.number, self.stat(known)
        entry = self._existing(parent, name)
        return self.nodes.number_of(entry), entry.stat

    def _known(self, parent: Node, name: bytes) -> Node | None:
        """Return the node of that name if it is held, and of the present layers.

        Where it is need not be looked up: only this process changes the layers, and notes it.
        """
        node = parent.children.get(name)
        return node if node is not None and node.generation == self.generation else None

    def _existing(self, parent: Node, name: bytes) -> Entry:
        entry = self.find(parent, name)
        if not entry.positive:
            raise syscalls.failure(errno.ENOENT)
        return entry

    def place(self, parent: Node, name: bytes) -> Place:
        """Look a name up for a change to it."""
        known = self._known(parent, name)
        if known is not None:
            in_upper = known.links[parent, name]
            presence = Presence.UPPER if in_upper else Presence.LOWER
            return Place(parent, name, known, presence)
        entry = self.find(parent, name)
        node = self.adopt(parent, name, entry) if entry.positive else None
        return Place(parent, name, node, entry.presence)

    def find_parent(self, path: bytes) -> Node:
        """Return the directory above `path`, symlinks not followed. Raises ENOENT, ENOTDIR."""
        node = self.root
        for component in path.split(b"/")[:-1]:
            node, _ = self.lookup(node, component)
            if not node.is_directory:
                raise syscalls.failure(errno.ENOTDIR)
        return node

    def adopt(self, parent: Node, name: bytes, entry: Entry) -> Node:
        """Return the node for what was found by a name, which it is known by from then on."""
        node = self._same(parent, name, entry) or self.nodes.add(entry, self.generation)
        if (parent, name) not in node.links:
            node.add_link(parent, name, in_upper=entry.presence is Presence.UPPER)
        return node

    def _same(self, parent: Node, name: bytes, entry: Entry) -> Node | None:
        """Return the node of which `entry` is a name, if it is held."""
        node = self.nodes.by_identity(entry.identity)
        if node is not None and node.generation != self.generation:
            self.refresh(node)
            node = self.nodes.by_identity(entry.identity)
        if node is not None and self._is_same(node, entry, parent, name):
            return node
        known = parent.children.get(name)
        if known is not None and known.generation != self.generation:
            self.refresh(known)  # a directory goes on by its name
            known = parent.children.get(name)
        return known if known is not None and self._is_same(known, entry, parent, name) else None

    def _is_same(self, node: Node, entry: Entry, parent: Node, name: bytes) -> bool:
        """Say whether `entry` is a name of `node`, and not of another file of the same origin."""
        if (
            node.generation != self.generation
            or (entry.stat.st_dev, entry.stat.st_ino) != node.real
        ):
            return False
        if (parent, name) in node.links:
            return True
        if node.is_directory:
            return False
        # Names of one lower file are names of one node only if copy-up will keep them together.
        stack = self.stack_of(node)
        return node.upper or lookup.origin_of(stack, entry.lowers[0]) is not None

    # Nodes of earlier layers

    @contextmanager
    def going_by_names(self) -> Iterator[None]:
        """Take what has a node's name for the node, file or not: these layers are copies of those
        before.
        """
        self._goes_by_names = True
        try:
            yield
        finally:
            self._goes_by_names = False

    def begin_generation(self) -> list[int]:
        """Find all nodes anew from now on; return as `FastPath.begin_generation`."""
        self.generation += 1
        return self.fast_path.begin_generation()

    def mark_stale(self, node: Node) -> None:
        """Find a node anew when it is used next, though the layers are the same."""
        node.generation = _STALE

    def refresh_root(self) -> None:
        """Find the root in the present layers."""
        self.root.bind(self._root_entry(), self.generation)

    def refresh(self, node: Node) -> None:
        """Find out where a node of earlier layers, and so its parents, are in the present ones."""
        stale = [node]
        while stale[-1].links and stale[-1].parent.generation != self.generation:
            stale.append(stale[-1].parent)
        while stale:
            self._find_again(stale.pop())

    def _root_entry(self) -> Entry:
        directory, upper = lookup.root_of(self.stack), self.stack.upper
        top = upper if upper is not None else self.stack.lowers[0]
        stat = syscalls.stat(At(top.root, b"."))
        presence = Presence.UPPER if upper is not None else Presence.LOWER
        return Entry(presence, stat, (0, 0), directory.lowers, marked=directory.marked)

    def _find_again(self, node: Node) -> None:
        if node.is_root:
            self.refresh_root()
            return
        for parent, name in list(node.links):
            if parent.generation != self.generation:
                self.refresh(parent)
            if parent.linked:
                entry = self.find(parent, name)
                if entry.positive and self._continues(node, entry):
                    self._rebind(node, entry, parent, name)
                    return
        self._abandon(node)

    def _continues(self, node: Node, entry: Entry) -> bool:
        """Say whether `entry`, found in new layers, is what the node was in the old ones."""
        if modes.S_IFMT(entry.stat.st_mode) != node.kind:  # its inode number was used again
            return False
        if node.is_directory or self._goes_by_names:
            return True
        return (entry.stat.st_dev, entry.stat.st_ino) == node.real

    def _rebind(self, node: Node, entry: Entry, parent: Node, name: bytes) -> None:
        for link in list(node.links):
            node.drop_link(*link)
        moved = (entry.stat.st_dev, entry.stat.st_ino) != node.real
        self.nodes.rebind(node, entry, self.generation)
        node.add_link(parent, name, in_upper=entry.presence is Presence.UPPER)
        node.drop_anchor()
        if not node.upper:
            # A snapshot holds the file now: the next write has to copy it up.
            node.fd_upper = node.fd_writable = False
        if moved and node.fd >= 0:
            self.reopen(node, write=False)

    def _abandon(self, node: Node) -> None:
        """The new layers do not have this node: who has it open goes on as after rm(1)."""
        if node.anchor < 0:
            if node.fd >= 0:
                node.anchor = syscalls.duplicate(node.fd)
            elif (fd := self.fast_path.duplicate(node.number)) >= 0:
                node.anchor = fd
            elif node.is_directory and self.stack.work is not None:
                node.anchor = self.stack.work.removed_directory()
        if node.anchor >= 0:
            orphans.record(self.stack_of(node), node, At(node.anchor, b""), gone=True)
        for link in list(node.links):
            node.drop_link(*link)
        node.index = None
        node.gone = True
        node.generation = self.generation
        self.nodes.detach(node)

    # What is left to the fast path

    def serve(self, node: Node) -> bool:
        """Let the fast path answer for names in a directory; return whether it has begun to."""
        if not node.linked or self.stack.data or self.fast_path.is_served(node.number):
            return False
        if not node.lasting and self.leads(node.path):
            return False  # some names in it, or below, belong to other layers
        stack = self.stack_of(node)
        parts = [lower.layer.directory(lower.path) for lower in node.lowers]
        if node.upper:
            parts.insert(0, stack.writable.directory(node.path))
        bottom = stack.lowers[-1]
        has_bottom = bool(node.lowers) and node.lowers[-1].layer is bottom
        numbering = self.numbering(node, syscalls.stat(At(parts[-1], b"")).st_dev)
        if has_bottom and (bottom.may_hold_marks or numbering is None):
            return False
        return self.fast_path.serve(node.number, tuple(parts), has_bottom, numbering or 0)

    def open_bottom(self, node: Node) -> tuple[int, int]:
        """Open the bottom layer's part of a directory, to list it; return the descriptor, and what
        is added to inode numbers there to make the numbers of nodes. Raises ENOENT.
        """
        bottom = self.stack_of(node).lowers[-1]
        if not node.lowers or node.lowers[-1].layer is not bottom:
            raise syscalls.failure(errno.ENOENT)
        return (
            syscalls.open_readable(bottom.directory(node.lowers[-1].path)),
            self.numbering(node, bottom.device) or 0,
        )
