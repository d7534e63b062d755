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

import errno
import logging
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial

from sessiond.overlay import sameness, syscalls
from sessiond.overlay.copy_up import copy_up, locate
from sessiond.overlay.lookup import Entry, Identity
from sessiond.overlay.nodes import PENDING_FACT, Node
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.view import View
from sessiond.overlay.writers import (
    Names,
    copy_own,
    is_written,
    replace_name,
    walk,
    with_contents_of,
)
from sessiond.overlay.xattrs import copy_attributes

log = logging.getLogger(__name__)

_IDENTITY = struct.Struct("=QQ")


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


def _note(node: Node, *copies: Identity) -> None:
    """Let a successor know of the file, if it can find it: `copies` are what it may have in the
    upper.
    """
    if node.kept_name is not None:
        fact = b"".join(_IDENTITY.pack(*copy) for copy in copies)
        node.fast_path.note(node.kept_number, PENDING_FACT, fact)


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
        if not sameness.same_bytes(self._source, self._former, self._check):
            return False
        syscalls.close(self._fd)
        syscalls.unlink(self._copy)
        self._fd = -1
        return True

    def _check(self) -> None:
        if self.cancelled:
            raise syscalls.failure(errno.ECANCELED)

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
        _note(node, node.real, (stat.st_dev, stat.st_ino))
        Names(stack, node, self._former).give(self._copy, stack.workdir)
        syscalls.fsync(self._fd)
        node.real = (stat.st_dev, stat.st_ino)
        return True


class PendingFiles:
    """Those of one view."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._nodes: set[Node] = set()

    @property
    def numbers(self) -> list[int]:
        """The numbers by which the kernel has them open."""
        return [node.kept_number for node in self._nodes]

    def keep(self, opened: list[Node]) -> None:
        """Let those of the open files that are written past the overlay go on where they are; the
        layers are left. Call `note_all` when others are served.
        """
        stack, fast_path = self._view.stack, self._view.fast_path
        for node in filter(is_written, opened):
            contents = fast_path.duplicate(node.number)
            if contents < 0:
                continue  # lost when a predecessor died
            try:
                node.kept = syscalls.open_file(At(contents, b""), os.O_RDONLY)
            finally:
                syscalls.close(contents)
            node.kept_number = node.number
            if fast_path.recorded and stack.orphans is not None:
                node.kept_name = stack.orphans.keep(node.number, At(node.kept, b""))
            self._nodes.add(node)
            fast_path.keep(node.number)

    def note_all(self) -> None:
        """Let a successor know of files that are written where the layers were."""
        for node in list(self._nodes):
            self._view.node(node.number)
            kept = syscalls.stat(At(node.kept, b""))
            if node.linked and (kept.st_dev, kept.st_ino) != node.real:
                _note(node, node.real)
            else:  # the session has come back, since another did not know that it had gone
                self._finish(node)
                self._view.fast_path.give_up(node.kept_number)

    def inherit(self, node: Node, number: int) -> bool:
        """Find the file that a predecessor has kept for `node`; say whether it is there."""
        stack = self._view.stack
        # Left by Persist, or, for what is kept, by a commit.
        for orphans in (stack.former, stack.orphans):
            if orphans is None or syscalls.stat_or_none(name := orphans.at(number)) is None:
                continue
            node.kept = syscalls.open_file(name, os.O_RDONLY)
            node.kept_name, node.kept_number = name, number
            self._nodes.add(node)
            if node.linked:
                self._renewed(node)
            return True
        return False

    def renew_all(self) -> None:
        """Bring all contents to where they belong. That some cannot be is logged."""
        for node in list(self._nodes):
            try:
                self.renew(node)
            except OSError as error:
                path = os.fsdecode(b"/" + node.path)
                log.error("%s is not on disk as it is: %s", path, error.strerror)  # noqa: TRY400

    def renew(self, node: Node) -> None:
        """Bring those of one file there, if it has a name."""
        if self._view.node(node.number).linked:
            with self.begin_renewal(node) as renewal:
                renewal.copy_data()
                self.end_renewal(renewal, node)

    def begin_renewal(self, node: Node) -> Renewal:
        """Prepare to do so in steps; `end_renewal` is the last.

        Precondition: it is pending, and nothing large is left to copy up.
        """
        stack = self._view.stack_of(node)
        self._view.touched.node(node)
        copy_up(stack, node)
        return Renewal(stack, node)

    def end_renewal(self, renewal: Renewal, node: Node) -> None:
        """Let what was copied be the file. Precondition: it has a name, and the layers are those
        that they were.
        """
        if renewal.publish():
            self._renewed(node)

    def _renewed(self, node: Node) -> None:
        """Know a file again that is another one in the upper."""
        view = self._view
        view.touched.node(node)
        view.nodes.rebind(node, view.find(*node.best_link()), view.generation)
        _note(node, node.real)

    def finish(self, node: Node, closes: int) -> bool:
        """Let the contents be where they belong from now on, if nobody can write elsewhere any
        more, nor can have done so since the last renewal, when `FastPath.closes` was `closes`.
        """
        if not self._view.fast_path.finish(node.kept_number, closes):
            return False
        self._finish(node)
        self._view.collect(node)
        return True

    def _finish(self, node: Node) -> None:
        """Let the contents be those of the file in the present layers again."""
        node.fast_path.note(node.kept_number, PENDING_FACT, b"")
        syscalls.close(node.kept)
        node.kept = -1
        if node.kept_name is not None:
            syscalls.unlink(node.kept_name)
            node.kept_name = None
        self._nodes.discard(node)
