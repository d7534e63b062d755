"""Two adjacent lowers made one, while they are served: what is in the upper one goes down.

Each change is one system call, after which the merged view is what it was, and so is that of every
stack in which the two lie on each other: an object goes down by a rename onto what it hides, with
its inode, and whatever below would come to light by that is hidden first. So nothing has to be
undone or recorded: who dies leaves two layers that are as good as before, and the next one goes on.
No contents are copied, and no space is taken but that of a few directories.

The order is what makes it so. A directory that was renamed goes first, since the whiteout in its
old place would hide from it what it stands for. A directory that is in both is emptied, then takes
the other's attributes, and last the upper one is removed.

Not every two can be merged: see `Merge.obstacle`. What changes is the ctime of what is moved; and a
file that was made in the lower one, and changed in the upper one, loses its origin, so it has
another inode number once the kernel has forgotten the one that it has.
"""

from __future__ import annotations

import os
import re
import stat as modes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from sessiond.overlay import lookup, origin, syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import Directory, Lower, is_redirect, join
from sessiond.overlay.stack import Stack, StackOptions
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout_device

_HANDLE = re.compile(rb"([0-9a-f]{2})+")


class MergedLayer(NamedTuple):
    """A layer that was an upper once, with what was its workdir, both open for writing."""

    fs: Layer
    work: Layer


def open_merged(fs: Path) -> MergedLayer:
    """Open the layer with the tree `fs`, by paths on one mount. Raises `OSError`."""
    with ExitStack() as undo:
        opened = []
        for path in (fs, fs.parent / "work"):
            opened.append(Layer.open(os.fsencode(path), writable=True))
            undo.callback(opened[-1].close)
        undo.pop_all()
        return MergedLayer(*opened)


class _Level(NamedTuple):
    """A directory that both layers have, at the same path."""

    path: bytes
    names: Iterator[bytes]
    below: tuple[Lower, ...]
    """What it merges with in the lower one of the two, and further down."""


class _Place(NamedTuple):
    """A directory of the upper one."""

    path: bytes
    moved_with: bytes
    """The one, at or above it, that is opaque or was renamed, and so is moved as a whole."""
    in_renamed: bool


class Merge:
    """One merge of `top` into `bottom`, the next layer below it; `close` comes last.

    Nobody else may change the two, and no other object may rely on where something is in them.
    """

    def __init__(self, top: MergedLayer, bottom: MergedLayer, below: tuple[Layer, ...]) -> None:
        """Take all these over. `below`: what the stack has below `bottom`, topmost first."""
        self._top = top
        self._bottom = bottom
        self._stack = Stack((bottom.fs, *below), None, None, StackOptions())
        self._xattrs = self._stack.xattrs
        self._first: list[bytes] = []
        """Directories that go first: those that were renamed, or what they are in."""

    def close(self) -> None:
        self._stack.close()
        for layer in (self._top.fs, self._top.work, self._bottom.work):
            layer.close()

    # Whether it can be

    def obstacle(self) -> str:
        """Say why the two cannot be merged; empty if they can. Changes nothing.

        Raises `OSError`.
        """
        return next(filter(None, self.survey()), "")

    def survey(self) -> Iterator[str]:
        """Look for an obstacle, piece by piece; yield what there is after each, as a rule nothing.

        Raises `OSError`.
        """
        if self._top.fs.may_hold_marks or self._bottom.fs.may_hold_marks:
            yield "whiteouts are marked files"
        yield self._obstacle_in_index()
        self._first.clear()
        pending = [_Place(b"", b"", in_renamed=False)]
        while pending:
            yield self._obstacle_in_directory(pending.pop(), pending)

    def _obstacle_in_index(self) -> str:
        """Hard links are found by their origin as long as their names keep their inodes."""
        for name in self._index():
            if syscalls.stat_or_none(self._bottom.work.at(b"index")) is None:
                return "it lacks an index"
            if syscalls.stat_or_none(At(self._bottom.work.directory(b"index"), name)) is not None:
                return "a hard link was copied up in both"
            if origin.decode(bytes.fromhex(name.decode()), (self._bottom.fs,)) is not None:
                return "a hard link was copied up from one layer to the other"
        return ""

    def _index(self) -> list[bytes]:
        """Return the names in the upper one's index; the kernel keeps others there for itself."""
        names = (name for name, _ in _listed(self._top.work, b"index"))
        return [name for name in names if _HANDLE.fullmatch(name)]

    def _obstacle_in_directory(self, place: _Place, pending: list[_Place]) -> str:
        """Look at the directories in one; they are added to those to be looked into."""
        directory = self._top.fs.directory(place.path)
        for entry in syscalls.scan_lazily(directory):
            if not entry.is_dir(follow_symlinks=False):
                continue
            at, path = At(directory, entry.name), join(place.path, entry.name)
            own = self._xattrs.own(at)
            opaque = syscalls.getxattr(at, self._xattrs.opaque) if own else None
            redirect = syscalls.getxattr(at, self._xattrs.redirect) if own else None
            if opaque not in (None, b"y"):
                return "whiteouts are marked files"
            moved_with = place.moved_with or (path if opaque or redirect else b"")
            if redirect and opaque is None:
                obstacle = self._obstacle_to_redirect(place, redirect)
                if obstacle := obstacle or self._obstacle_on_the_way(moved_with):
                    return obstacle
                if moved_with not in self._first:
                    self._first.append(moved_with)
            pending.append(_Place(path, moved_with, place.in_renamed or bool(redirect)))
        return ""

    def _obstacle_to_redirect(self, place: _Place, target: bytes) -> str:
        """A redirect counts for the layers below: the next one must have nothing to say to it."""
        if not is_redirect(target):
            return "a redirect makes no sense"
        if target.startswith(b"/"):
            path = target[1:]
        elif place.in_renamed:
            return "a renamed directory is in a renamed directory"
        elif place.moved_with:
            return ""  # in an opaque directory, where it leads nowhere
        else:
            path = join(place.path, target)
        # The upper one has something else by the old name, as a rule a whiteout.
        if _stat_or_none(self._bottom.fs, path) is not None:
            return "a directory was renamed that both layers have"
        for parent in _parents(path):
            for layer in (self._bottom.fs, self._top.fs):
                found = _stat_or_none(layer, parent)
                if found is None:
                    continue
                own = self._xattrs.own(layer.at(parent))
                if (
                    not modes.S_ISDIR(found.st_mode)
                    or self._xattrs.opaque in own
                    or self._xattrs.redirect in own
                ):
                    return "a directory was renamed that was in one which was renamed or replaced"
        return ""

    def _obstacle_on_the_way(self, path: bytes) -> str:
        for parent in _parents(path):
            found = _stat_or_none(self._bottom.fs, parent)
            if found is not None and not modes.S_ISDIR(found.st_mode):
                return "a directory was renamed into one that is new in the upper layer"
        return ""

    # Doing it

    def steps(self) -> Iterator[None]:
        """Move everything, one change after another. Precondition: there is no `obstacle`.

        In the end, the upper one of the two is empty. Raises `OSError`; what was done is done.
        """
        for path in self._first:
            yield from self._move_first(path)
        levels = [self._level(b"", tuple(Lower(layer, b"") for layer in self._stack.lowers))]
        while levels:
            level = levels[-1]
            name = next(level.names, None)
            if name is None:
                levels.pop()
                yield from self._finish(level.path)
            elif self._merges(level, name):
                levels.append(self._enter(level, name))
            else:
                yield from self._move(level, name)
        yield from self._move_index()

    def _level(self, path: bytes, below: tuple[Lower, ...]) -> _Level:
        return _Level(path, self._names(path), below)

    def _names(self, path: bytes) -> Iterator[bytes]:
        """Yield the names of a directory, each of which is gone when the next is asked for.

        One by one, however many there are. What readdir misses then, the next pass finds.
        """
        found = True
        while found:
            found = False
            for entry in syscalls.scan_lazily(self._top.fs.directory(path)):
                found = True
                yield entry.name

    def _merges(self, level: _Level, name: bytes) -> bool:
        """Say whether there are two directories of that name, which are seen as one."""
        path = join(level.path, name)
        at = self._top.fs.at(path)
        both = (syscalls.stat(at), syscalls.stat_or_none(self._bottom.fs.at(path)))
        if not all(found is not None and modes.S_ISDIR(found.st_mode) for found in both):
            return False
        return self._xattrs.opaque not in self._xattrs.own(at)

    def _enter(self, level: _Level, name: bytes) -> _Level:
        path = join(level.path, name)
        if self._xattrs.impure in self._xattrs.own(self._top.fs.at(path)):
            syscalls.setxattr(self._bottom.fs.at(path), self._xattrs.impure, b"y")
        entry = lookup.lookup(self._stack, Directory(None, level.below), name)
        return self._level(path, entry.lowers)

    def _finish(self, path: bytes) -> Iterator[None]:
        """Let the lower one show what the upper one did of a directory that it has emptied."""
        self._describe(path)
        yield
        if path:
            with self._time_kept(path.rpartition(b"/")[0]):
                syscalls.rmdir(self._top.fs.at(path))
            self._top.fs.forget(path)
            yield

    def _is_hidden_below(self, level: _Level, name: bytes) -> bool:
        """Say whether there is something of that name below both layers that could be seen."""
        further = tuple(lower for lower in level.below if lower.layer is not self._bottom.fs)
        return lookup.lookup(self._stack, Directory(None, further), name).positive

    def _move_first(self, path: bytes) -> Iterator[None]:
        """Move a directory, with all that is in it; what leads there is made below."""
        for parent in _parents(path):
            if _stat_or_none(self._bottom.fs, parent) is None:
                syscalls.mkdir(self._bottom.fs.at(parent), 0o700)
                yield
        yield from self._remove(path)
        self._rename(path)
        yield

    def _move(self, level: _Level, name: bytes) -> Iterator[None]:
        path = join(level.path, name)
        at, target = self._top.fs.at(path), self._bottom.fs.at(path)
        stat, other = syscalls.stat(at), syscalls.stat_or_none(target)
        is_directory = modes.S_ISDIR(stat.st_mode)
        if is_whiteout_device(stat) and not self._is_hidden_below(level, name):
            yield from self._remove(path)
            with self._time_kept(level.path):
                syscalls.unlink(at)
            yield
            return
        if (
            is_directory
            and other is not None
            and self._xattrs.opaque not in self._xattrs.own(at)
            and self._is_hidden_below(level, name)
        ):
            # What is there is no directory, or else the two would merge; it has hidden the rest.
            syscalls.setxattr(at, self._xattrs.opaque, b"y")
            yield
        if is_directory or (other is not None and modes.S_ISDIR(other.st_mode)):
            yield from self._remove(path)
        self._rename(path)
        yield

    def _remove(self, path: bytes) -> Iterator[None]:
        """Remove from the lower one, if it is there, what the upper one hides."""
        at = self._bottom.fs.at(path)
        stat = syscalls.stat_or_none(at)
        if stat is None:
            return
        if modes.S_ISDIR(stat.st_mode):
            syscalls.rename(at, self._aside())
            self._bottom.fs.forget_tree(path)
        else:
            syscalls.unlink(at)
        yield

    def _aside(self) -> At:
        """Return an unused name in the workdir of the upper one, which goes away with it."""
        work = self._top.work.at(b"work")
        if syscalls.stat_or_none(work) is None:
            syscalls.mkdir(work, 0o700)
        directory = self._top.work.directory(b"work")
        names = (At(directory, b"hidden-%d" % number) for number in count())
        return next(at for at in names if syscalls.stat_or_none(at) is None)

    def _rename(self, path: bytes) -> None:
        at, target = self._top.fs.at(path), self._bottom.fs.at(path)
        with self._time_kept(path.rpartition(b"/")[0]):
            syscalls.rename(at, target)
            if syscalls.stat_or_none(at) is not None:  # both were names of one file
                syscalls.unlink(at)
        self._top.fs.forget_tree(path)
        self._bottom.fs.forget_tree(path)

    @contextmanager
    def _time_kept(self, path: bytes) -> Iterator[None]:
        """Keep the times of a directory of the upper one, which are those that the view shows."""
        directory = At(self._top.fs.directory(path), b"")
        before = syscalls.stat(directory)
        yield
        syscalls.utime(directory, before.st_atime_ns, before.st_mtime_ns)

    def _describe(self, path: bytes) -> None:
        """Give a directory of the lower one the attributes that the upper one has."""
        source, target = self._top.fs.at(path), self._bottom.fs.at(path)
        stat = syscalls.stat(source)
        syscalls.chown(target, stat.st_uid, stat.st_gid)
        wanted = set(self._shown(source))
        for name in self._shown(target):
            if name not in wanted:
                syscalls.removexattr(target, name)
        self._xattrs.copy(source, target)
        syscalls.chmod(target, modes.S_IMODE(stat.st_mode))
        syscalls.utime(target, stat.st_atime_ns, stat.st_mtime_ns)

    def _shown(self, at: At) -> list[bytes]:
        return [name for name in syscalls.listxattr(at) if not self._xattrs.is_own(name)]

    def _move_index(self) -> Iterator[None]:
        for name in self._index():
            source = At(self._top.work.directory(b"index"), name)
            syscalls.rename(source, At(self._bottom.work.directory(b"index"), name))
            yield


def _parents(path: bytes) -> list[bytes]:
    """Return the paths of the directories on the way to `path`, the root left out."""
    names = path.split(b"/")
    return [b"/".join(names[:depth]) for depth in range(1, len(names))]


def _listed(layer: Layer, path: bytes) -> list[tuple[bytes, bool]]:
    try:
        return syscalls.scan(layer.directory(path))
    except FileNotFoundError:
        return []


def _stat_or_none(layer: Layer, path: bytes) -> os.stat_result | None:
    try:
        return syscalls.stat_or_none(layer.at(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
