"""What outlives a reset: the names that rules name, and all below them, have layers of their own.

These are just two, an upper on disk and the image, so what is kept depends on nothing that a reset,
a snapshot or a move to disk exchanges. A name belongs to one set of layers or the other; in the
merged view, nothing is ever looked for in both. `View` decides, by the rules, for which
directory and name it calls the functions of this package with which stack.

The directories above what is kept belong to the session's layers. Where something is made in one,
the kept upper gets a directory of that name, too: a *way*, of no significance but that it leads
there, and that it is what the directory was like, should the session's layers lack it one day.
"""

from __future__ import annotations

import errno
import stat as modes
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

from sessiond.keep_rules import KeepRules
from sessiond.overlay import syscalls
from sessiond.overlay.lookup import Directory, join, lookup, names, root_of
from sessiond.overlay.nodes import Node
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout_device
from sessiond.overlay.xattrs import copy_attributes

_KNOWN_LIMIT = 1024
_ASIDE_BYTES = 230
"""That are left of a name when some are added, for 255 is the most."""
_NOTHING = Directory(None, ())


class Keep:
    """The layers of what is kept, and the rules. Takes over `stack`: an upper over the image."""

    def __init__(self, stack: Stack, session: Stack, rules: KeepRules) -> None:
        self.stack = stack
        self.rules = rules
        self.ways = stack.ways = Ways(stack, session)

    def close(self) -> None:
        self.stack.close()

    def change(self, rules: KeepRules) -> None:
        """Go by other rules. What was a directory of one kind may be one of the other now."""
        self.rules = rules
        self.stack.writable.forget_all()  # a commit may have replaced directories
        self.ways.forget(b"")

    def names(self, path: bytes) -> list[bytes]:
        """List what is kept of the directory `path`, which is not kept itself."""
        listed = names(self.stack, self.ways.directory(path))
        return [name for name in listed if self.rules.keep(join(path, name))]

    def discard(self, path: bytes) -> list[At]:
        """Take what there is at `path`, but for what is kept, out of the layer.

        Return where it is, for the caller to remove. Recursion ends where no rule leads further.
        """
        upper, rules = self.stack.writable, self.rules
        if rules.keep(path):
            return []
        if (stat := upper.stat_or_none(path)) is None:
            return []
        if modes.S_ISDIR(stat.st_mode) and rules.lead(path):
            below = [join(path, name) for name, _ in syscalls.scan(upper.directory(path))]
            return [at for inside in below for at in self.discard(inside)]
        aside = self.stack.workdir.temporary()
        syscalls.rename(upper.at(path), aside)
        self.ways.forget(path)
        return [aside]

    def lost_ways(self, path: bytes = b"") -> Iterator[bytes]:
        """Return paths of ways, from the top down, below which something is kept."""
        for name, _ in syscalls.scan(self.stack.writable.directory(path)):
            below = join(path, name)
            if self.rules.lead(below) and self.ways.directory(below).upper is not None:
                deeper = list(self.lost_ways(below))
                if deeper or self.names(below):
                    yield below
                    yield from deeper


class Ways:
    """The directories above what is kept."""

    def __init__(self, kept: Stack, session: Stack) -> None:
        self._kept = kept
        self.session = session
        """The layers that they belong to at present."""
        self._known: dict[bytes, Directory] = {}

    def directory(self, path: bytes) -> Directory:
        """Return what the kept layers have of a directory that is not kept: by its path alone."""
        known = self._known.get(path)
        if known is None:
            if len(self._known) >= _KNOWN_LIMIT:
                self._known.clear()
            known = self._known[path] = self._find(path)
        return known

    def _find(self, path: bytes) -> Directory:
        kept = self._kept
        if not path:
            return root_of(kept)
        parent, _, name = path.rpartition(b"/")
        above = self.directory(parent)
        if above == _NOTHING:
            return _NOTHING
        entry = lookup(kept, above, name)
        return entry.directory(path) if entry.is_directory else _NOTHING

    def make(self, directory: Node) -> None:
        """Have a way where `directory`, of the session's layers, is; on disk when this returns."""
        missing = []
        while not directory.is_root and self.directory(directory.path).upper is None:
            missing.append(directory)
            directory = directory.parent
        while missing:
            self._make(missing.pop())

    def _make(self, directory: Node) -> None:
        path = directory.path
        parent, _, name = path.rpartition(b"/")
        target = At(self._kept.writable.directory(parent), name)
        with self._kept.workdir.preparing() as prepared:
            syscalls.mkdir(prepared, 0o700)
            self._copy_attributes(directory, prepared)
            syscalls.setxattr(prepared, self._kept.xattrs.impure, b"y")
            there = syscalls.stat_or_none(target)  # of other rules, once
            if there is not None and not is_whiteout_device(there):
                _set_aside(target)
                there = None
            syscalls.rename(prepared, target, 0 if there is None else syscalls.RENAME_EXCHANGE)
        syscalls.fsync_directory(target.directory)
        self.forget(path)

    def refresh(self, directory: Node) -> None:
        """Note that the attributes of a directory have changed, if there is a way."""
        if self.directory(directory.path).upper is not None:
            self._copy_attributes(directory, self._kept.writable.at(directory.path))

    def _copy_attributes(self, directory: Node, target: At) -> None:
        source = topmost(self.session, directory)
        copy_attributes(source, target, syscalls.stat(source), self._kept.xattrs)

    def remove(self, path: bytes) -> None:
        """Remove a way whose directory has been removed, unless it tells what is gone below it."""
        if self.directory(path).upper is None:
            return
        try:
            syscalls.rmdir(self._kept.writable.at(path))
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            return
        self.forget(path)

    def forget(self, path: bytes) -> None:
        """Find directories anew from now on: there is another at `path`."""
        self._known.clear()
        self._kept.writable.forget_tree(path)

    def sync(self, path: bytes) -> None:
        """Write what was done in a way back to disk, if there is one."""
        if self.directory(path).upper is not None:
            syscalls.fsync_directory(self._kept.writable.directory(path))


def _set_aside(target: At) -> None:
    """Give what was kept once another name in its directory: nobody has said to delete it."""
    for number in count(1):
        aside = target.name[:_ASIDE_BYTES] + b".sessiond-old-%d" % number
        with suppress(FileExistsError):
            syscalls.rename(target, At(target.directory, aside), syscalls.RENAME_NOREPLACE)
            return


def topmost(stack: Stack, directory: Node) -> At:
    """Return the topmost real directory of a linked node."""
    return stack.writable.at(directory.path) if directory.upper else directory.lowers[0].at()


def is_way(stack: Stack, directory: Node) -> bool:
    """Say whether a directory is above what `stack` holds, and not in it."""
    return stack.ways is not None and not directory.lasting


def seen_by(stack: Stack, directory: Node) -> Directory:
    """Return the real directories, in `stack`, of a node. Precondition: linked."""
    if stack.ways is not None and not directory.lasting:
        return stack.ways.directory(directory.path)
    return directory.directory
