"""Nodes: the inodes of the merged view that someone holds, and their numbers.

A node keeps its number, which is also its ``st_ino``, while it is held, whatever layer it moves to.
The number is made from the device and inode number of its origin, so it is the same after a copy-up
and, with the same layers, at the next mount::

    bit 63  56 55       48 47                              0
    0 version  file system  inode number of origin or self

The file system is numbered from 1 in order of appearance, so 1, the root's number, is free. The
version tells an unlinked file that is still held from a new one that got its inode number. Inode
numbers that do not fit are replaced by a counter, as file system 0 (the kernel's xino does the
like).
"""

from __future__ import annotations

import os
import stat as modes
import struct
from collections.abc import Sequence
from typing import NamedTuple

from sessiond.overlay import syscalls
from sessiond.overlay.fastpath import FastPath, Inherited
from sessiond.overlay.lookup import Directory, Entry, Identity, Lower, Presence, join
from sessiond.overlay.syscalls import At

ROOT_NUMBER = 1
KEPT_DEVICE = 1 << 63
"""Set in the device of an identity: of an object among what is kept. So an inode of the image that
is seen there is never taken for itself elsewhere; the two are changed apart from each other.
"""
_INODE_BITS = 48
_FILE_SYSTEM_BITS = 8
_VERSIONS = 1 << 7
_VERSIONLESS = (1 << _INODE_BITS + _FILE_SYSTEM_BITS) - 1
_COUNTER_START = 1 << 32

# What a successor is told; see `FastPath.note`.
ORPHAN_FACT = 1
"""Where an object without a name is; see `orphans`."""
IDENTITY_FACT = 2
"""Identity of a node whose number does not tell it."""
EXCHANGE_FACT = 3
"""Of the mount: which two objects are about to change places."""
SETTING_FACT = 4
"""The extended attribute that is about to be set."""
STACK_FACT = 5
"""Of the mount: the layers that are served, as who serves them writes it."""
MOVING_FACT = 6
"""Where a file was that moves from one upper to the next; see `writers`."""
PENDING_FACT = 7
"""Where a file is that is written in storage that was left; see `pending`."""
KEEP_FACT = 16
"""Of the mount: by which rules it is kept, as who serves it writes it."""
_FILE_SYSTEM_FACTS = 0x100  # of the mount: the device of each file system, by its number
_IDENTITY = struct.Struct("=QQ")
_DEVICE = struct.Struct("=Q")


class Remains(NamedTuple):
    """What is left of a file that is out of reach."""

    stat: os.stat_result
    """What is told of it."""
    link: tuple[Node, bytes]
    """Its last name."""


class Node:
    """One inode of the merged view.

    `links` are its known names, each with whether that name is in the upper; a directory has one,
    the root and an unlinked node have none. Each is among the `children` of its directory, and no
    other node has it: `add_link` takes it from who has it still, which was of earlier layers. An
    unlinked open file is reached by `anchor`, a descriptor that was opened before the last name
    went away; one without is stale. All but `number` and `kind` is valid only while `generation` is
    the overlay's. `lasting`: it is among what is kept; see `keep`. "Upper" means that of its own
    layers.
    """

    __slots__ = (
        "_upper",
        "anchor",
        "children",
        "fast_path",
        "fd",
        "fd_upper",
        "fd_writable",
        "former",
        "generation",
        "gone",
        "identity",
        "impure",
        "index",
        "kept",
        "kept_name",
        "kept_number",
        "kind",
        "lasting",
        "links",
        "lowers",
        "marked",
        "metacopy",
        "number",
        "opens",
        "orphan",
        "real",
        "references",
        "remains",
        "wanted",
    )

    def __init__(self, number: int, kind: int, fast_path: FastPath) -> None:
        self.number = number
        self.kind = kind
        self.fast_path = fast_path
        self.former: dict[int, int] = {}
        """Earlier numbers that the kernel still knows, each with the references it holds."""
        self.links: dict[tuple[Node, bytes], bool] = {}
        self.children: dict[bytes, Node] = {}
        self.references = 0
        self.anchor = -1
        self.orphan: At | None = None
        """A name that the anchored file has for a successor; see `orphans`."""
        self.fd = -1
        """Open while `opens` is not 0: the file's contents."""
        self.fd_upper = False
        """Whether `fd` is the file in the upper; after a copy-up, not before it is used next."""
        self.fd_writable = False
        self.opens = 0
        self.kept = -1
        """A file in earlier layers that has the contents until its last close; see `pending`."""
        self.kept_name: At | None = None
        """A name that this file has for a successor."""
        self.kept_number = 0
        """The number by which the kernel has it open."""
        self.impure = False
        self.index: bytes | None = None
        self.remains: Remains | None = None
        """Of a removed regular file that nobody had open."""
        self.wanted = 0
        """How many are about to open it: until they have, it stays within reach when removed, also
        if nobody has it open; see `View.locate`."""
        self.gone = False
        """The layers were swapped, and the new ones do not have it."""

    def bind(self, entry: Entry, generation: int) -> None:
        """Take over where the node is now."""
        self._upper = entry.presence is Presence.UPPER or entry.indexed is not None
        self.lowers: tuple[Lower, ...] = entry.lowers
        self.index = entry.indexed
        self.metacopy = entry.metacopy
        self.marked = entry.marked
        self.identity = entry.identity
        self.lasting = bool(entry.identity[0] & KEPT_DEVICE)
        self.real = (entry.stat.st_dev, entry.stat.st_ino)
        self.impure = False
        self.generation = generation

    @property
    def upper(self) -> bool:
        """Whether it is in the upper; set when it gets there."""
        return self._upper

    @upper.setter
    def upper(self, upper: bool) -> None:
        self._upper = upper
        self.fast_path.withdraw(self.number)

    @property
    def is_open(self) -> bool:
        """Whether someone has, or may have, the file open."""
        return bool(self.opens) or any(map(self.fast_path.is_open, (self.number, *self.former)))

    @property
    def writers(self) -> int:
        """How many have the file open for writing past the overlay."""
        return self.fast_path.writers(self.number)

    @property
    def is_directory(self) -> bool:
        return modes.S_ISDIR(self.kind)

    @property
    def is_root(self) -> bool:
        return self.number == ROOT_NUMBER

    @property
    def linked(self) -> bool:
        return bool(self.links) or self.is_root

    @property
    def path(self) -> bytes:
        """Path in the merged view, and so in the upper. Precondition: linked."""
        components = []
        node = self
        while node.links:
            node, name = node.best_link()
            components.append(name)
        components.reverse()
        return b"/".join(components)

    def best_link(self) -> tuple[Node, bytes]:
        """Return the name by which it is found. Precondition: it has one, and is not the root."""
        for link, in_upper in self.links.items():
            if in_upper:
                return link
        return next(iter(self.links))

    @property
    def parent(self) -> Node:
        """The directory of the best known name. Precondition: linked, and not the root."""
        return self.best_link()[0]

    @property
    def directory(self) -> Directory:
        """The real directories that the node consists of. Precondition: a linked directory."""
        return Directory(self.path if self.upper else None, self.lowers, self.marked)

    def add_link(self, parent: Node, name: bytes, *, in_upper: bool) -> None:
        former = parent.children.get(name)
        if former is not None and former is not self:
            former.drop_link(parent, name)
        self.links[parent, name] = in_upper
        parent.children[name] = self
        for number in (self.number, *self.former):
            self.fast_path.placed(number, self.kind, parent.number, name)

    def drop_link(self, parent: Node, name: bytes) -> None:
        """Precondition: it is among its `links`."""
        del self.links[parent, name], parent.children[name]
        for number in (self.number, *self.former):
            self.fast_path.removed(number, parent.number, name)

    def withdraw(self) -> None:
        """Have the overlay asked before the fast path uses anything of the node again."""
        for number in (self.number, *self.former):
            self.fast_path.withdraw(number)

    def data_lower(self) -> Lower:
        """Return the lower file that holds the contents. Precondition: not in the upper, or
        metacopy.
        """
        return self.lowers[-1] if self.metacopy else self.lowers[0]

    def child_path(self, name: bytes) -> bytes:
        return join(self.path, name)

    def close(self) -> None:
        for fd in (self.anchor, self.fd, self.kept):
            if fd >= 0:
                syscalls.close(fd)
        self.anchor = self.fd = self.kept = -1
        self._drop_orphan()
        if self.kept_name is not None:
            syscalls.unlink(self.kept_name)
            self.kept_name = None

    def _drop_orphan(self) -> None:
        if self.orphan is not None:
            syscalls.unlink(self.orphan)
            self.orphan = None

    def drop_anchor(self) -> None:
        """The object has a name again."""
        if self.anchor >= 0:
            syscalls.close(self.anchor)
            self.anchor = -1
            self._drop_orphan()

    def anchor_to(self, at: At) -> None:
        """Keep the object `at` within reach, because its name goes away."""
        if self.anchor < 0:
            self.anchor = syscalls.open_path(at)


class NodeTable:
    """All nodes that are held, by number; those that have a name, by identity, too."""

    def __init__(self, fast_path: FastPath, inherited: Sequence[Inherited]) -> None:
        self._fast_path = fast_path
        self._by_number: dict[int, Node] = {}
        self._by_identity: dict[Identity, Node] = {}
        self._file_systems: dict[int, int] = {}
        for left in inherited:
            if left.number == 0:
                self._file_systems = _file_systems(left.facts)
        self.directories: set[int] = set()
        """Numbers of those that are directories."""
        self._counter = _COUNTER_START

    def all(self) -> list[Node]:
        return [node for number, node in self._by_number.items() if number == node.number]

    def __contains__(self, number: int) -> bool:
        return number in self._by_number

    def get(self, number: int) -> Node | None:
        return self._by_number.get(number)

    def by_identity(self, identity: Identity) -> Node | None:
        return self._by_identity.get(identity)

    def add(self, entry: Entry, generation: int, *, number: int = 0) -> Node:
        """Make a node; with a number of its own if `entry` has the identity of another node."""
        unique = entry.identity not in self._by_identity
        if not number:
            real = (entry.stat.st_dev, entry.stat.st_ino)
            number = self._free_number(*(entry.identity if unique else real))
            if real != entry.identity and modes.S_ISREG(entry.stat.st_mode):
                # A copy, found in layers that others were exchanged for.
                while self._fast_path.shows_image(number):
                    number = self._free_version(number, above=number)
        node = Node(number, modes.S_IFMT(entry.stat.st_mode), self._fast_path)
        node.bind(entry, generation)
        node.references = self._fast_path.claim(number)
        self._by_number[number] = node
        if node.is_directory:
            self.directories.add(number)
        if unique:
            self._by_identity[entry.identity] = node
        return node

    def rebind(self, node: Node, entry: Entry, generation: int) -> None:
        """Bind `node` to another entry, keeping its number."""
        self.detach(node)
        node.bind(entry, generation)
        self._by_identity.setdefault(entry.identity, node)
        if not self.may_be(node.number, entry):
            self._fast_path.note(node.number, IDENTITY_FACT, pack_identity(entry.identity))

    def may_be(self, number: int, entry: Entry) -> bool:
        """Say whether the node of `entry` could have got this number."""
        number &= _VERSIONLESS
        real = (entry.stat.st_dev, entry.stat.st_ino)
        return number >> _INODE_BITS == 0 or number in {
            self._first_number(*entry.identity),
            self._first_number(*real),
        }

    def by_orphan(self, orphan: At | None) -> Node | None:
        """Return the node that has that name among the orphans."""
        if orphan is None:
            return None
        return next((node for node in self._by_number.values() if node.orphan == orphan), None)

    def alias(self, node: Node, number: int) -> None:
        """Know `node` by another number, too, by which the kernel has come to hold it."""
        node.former[number] = self._fast_path.claim(number)
        self._by_number[number] = node

    def detach(self, node: Node) -> None:
        """Let a new node take the identity of `node`, which has lost its last name."""
        if self._by_identity.get(node.identity) is node:
            del self._by_identity[node.identity]

    def remove(self, node: Node) -> None:
        self.detach(node)
        for number in (node.number, *node.former):
            del self._by_number[number]
        self.directories.discard(node.number)
        node.close()

    def renumber(self, node: Node) -> None:
        """Give a node another number, with the same ``st_ino``, and know it by the old one, too.

        The kernel then takes it for another inode, which can have other contents open.
        """
        node.former[node.number] = node.references
        node.references = 0
        node.number = self._free_version(node.number & _VERSIONLESS)
        self._by_number[node.number] = node
        for parent, name in node.links:
            self._fast_path.placed(node.number, node.kind, parent.number, name)

    def forget(self, node: Node, number: int, count: int) -> None:
        """Give back references that the kernel held to a node by one of its numbers."""
        if number == node.number:
            node.references -= count
            return
        node.former[number] -= count
        if not node.former[number]:
            del node.former[number], self._by_number[number]

    def numbering(self, device: int) -> int | None:
        """Return what is added to inode numbers of `device`; None if they are not used as such."""
        file_system = self._file_systems.get(device)
        if file_system is None:
            file_system = self._file_systems[device] = len(self._file_systems) + 1
            self._fast_path.note(0, _FILE_SYSTEM_FACTS + file_system, _DEVICE.pack(device))
        return file_system << _INODE_BITS if file_system < 1 << _FILE_SYSTEM_BITS else None

    def number_of(self, entry: Entry) -> int:
        """Return the number of the node for `entry`, or that it would get."""
        node = self._by_identity.get(entry.identity)
        return node.number if node is not None else self._first_number(*entry.identity)

    def _free_number(self, device: int, inode: int) -> int:
        return self._free_version(self._first_number(device, inode))

    def _first_number(self, device: int, inode: int) -> int:
        numbering = self.numbering(device)
        if inode >= 1 << _INODE_BITS or numbering is None:
            self._counter += 1
            return self._counter
        return numbering | inode

    def _free_version(self, number: int, *, above: int = -1) -> int:
        for version in range(_VERSIONS):
            candidate = version << _INODE_BITS + _FILE_SYSTEM_BITS | number & _VERSIONLESS
            if candidate > above and candidate not in self._by_number:
                return candidate
        self._counter += 1
        return self._counter


def pack_identity(identity: Identity) -> bytes:
    return _IDENTITY.pack(*identity)


def unpack_identity(fact: bytes) -> Identity:
    device, inode = _IDENTITY.unpack(fact)
    return device, inode


def _file_systems(facts: dict[int, bytes]) -> dict[int, int]:
    """Return the numbers that a predecessor gave to devices."""
    numbers: dict[int, int] = {}
    for which, data in sorted(facts.items()):
        if which > _FILE_SYSTEM_FACTS:
            (device,) = _DEVICE.unpack(data)
            numbers[device] = which - _FILE_SYSTEM_FACTS
    return numbers
