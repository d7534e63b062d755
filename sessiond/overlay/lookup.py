"""What a name of the merged view stands for, and what a merged directory lists.

The rules are those of ovl_lookup (fs/overlayfs/namei.c): the topmost object wins; directories go on
merging downwards until one is opaque, a whiteout ends the search, and a redirect changes the path
that is looked for in the layers below.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from sessiond.overlay import origin, syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout

NAME_LIMIT = 255
Identity = tuple[int, int]
"""st_dev and st_ino of the object that gives a file its inode number: its origin, or itself."""


class Presence(Enum):
    """Where a name is, and so what a change to it has to do."""

    ABSENT = auto()
    """Nowhere. Creating puts it into the upper."""
    WHITEOUT = auto()
    """Gone, and the upper has a whiteout, which creating replaces."""
    LOWER = auto()
    """In lowers only. Changing copies it up; removing leaves a whiteout."""
    UPPER = auto()
    """In the upper, perhaps merged with lowers. Removing may have to leave a whiteout."""


class Lower(NamedTuple):
    """An object of a lower layer."""

    layer: Layer
    path: bytes
    marked: bool = False
    """A directory in which whiteouts may be files."""

    def at(self) -> At:
        return self.layer.at(self.path)


class Directory(NamedTuple):
    """The real directories that one directory of the merged view consists of."""

    upper: bytes | None
    """Path in the upper, where it has got there."""
    lowers: tuple[Lower, ...]
    marked: bool = False
    """The upper one may hold whiteouts that are files."""


class Entry(NamedTuple):
    """The answer to a lookup. `stat` and what follows are only meaningful for LOWER and UPPER."""

    presence: Presence
    stat: os.stat_result
    identity: Identity = (0, 0)
    lowers: tuple[Lower, ...] = ()
    """What the name stands for in the lowers, as far as it counts; for a directory: what merges."""
    indexed: bytes | None = None
    """Name in the index, of a lower hard link that was copied up under this or another name."""
    metacopy: bool = False
    """The topmost file has only metadata; its contents are those of the last of `lowers`."""
    marked: bool = False

    @property
    def positive(self) -> bool:
        return self.presence is Presence.LOWER or self.presence is Presence.UPPER

    @property
    def is_directory(self) -> bool:
        return self.positive and modes.S_ISDIR(self.stat.st_mode)

    def directory(self, path: bytes) -> Directory:
        """Return what a directory, found at `path`, consists of."""
        upper = path if self.presence is Presence.UPPER else None
        return Directory(upper, self.lowers, self.marked)


_NO_STAT = os.stat_result([0] * 10)
ABSENT = Entry(Presence.ABSENT, _NO_STAT)
WHITEOUT = Entry(Presence.WHITEOUT, _NO_STAT)


def nothing(kind: int) -> Entry:
    """Return an entry for an object of a type (``S_IFMT``) that is nowhere any more."""
    return Entry(Presence.UPPER, os.stat_result([kind, *[0] * 9]))


def join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def lookup(stack: Stack, directory: Directory, name: bytes) -> Entry:
    """Look `name` up. Raises OSError: ENAMETOOLONG; EIO for a metacopy without data."""
    if len(name) > NAME_LIMIT:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
    search = _Search(stack, name)
    upper, upper_marked, index = None, False, None
    if directory.upper is not None:
        assert stack.upper is not None
        at = At(stack.upper.directory(directory.upper), name)
        upper = syscalls.stat_or_none(at)
        if upper is not None:
            if is_whiteout(upper, at, stack.xattrs, marked=directory.marked):
                return WHITEOUT
            own = search.meet(stack.upper, at, upper, last=False)
            upper_marked = search.marked
            if not modes.S_ISDIR(upper.st_mode) and not search.metacopy:
                return _upper_file(stack, at, upper, copied=stack.xattrs.origin in own)
            if search.metacopy and upper.st_nlink > 1:
                index = _indexed(stack, syscalls.getxattr(at, stack.xattrs.origin), upper)
    search.walk(directory)
    if upper is not None:
        return _upper_entry(search, upper, index, marked=upper_marked)
    return _lower_entry(stack, search)


def roots_of(stack: Stack) -> tuple[Lower, ...]:
    """Return the roots of the lowers."""
    return tuple(Lower(layer, b"", layer.may_hold_marks) for layer in stack.lowers)


def root_of(stack: Stack) -> Directory:
    """Return the root of the merged view."""
    upper = stack.upper
    if upper is None:
        return Directory(None, roots_of(stack))
    return Directory(b"", roots_of(stack), upper.may_hold_marks)


def lookup_path(stack: Stack, path: bytes) -> Entry:
    """Look a whole path, not that of the root, up; symlinks are not followed. Raises as `lookup`.

    What is below no directory is absent.
    """
    directory, walked = root_of(stack), b""
    *parents, last = path.split(b"/")
    for name in parents:
        entry = lookup(stack, directory, name)
        if not entry.is_directory:
            return ABSENT
        walked = join(walked, name)
        directory = entry.directory(walked)
    return lookup(stack, directory, last)


def covered(stack: Stack, directory: Directory, name: bytes) -> bool:
    """Say whether a lower would show through if the upper had nothing of that name
    (ovl_lower_positive).
    """
    if not directory.lowers:
        return False
    search = _Search(stack, name)
    search.walk(directory)
    return bool(search.lowers)


class _Search:
    """One walk down the layers for one name."""

    def __init__(self, stack: Stack, name: bytes) -> None:
        self.stack = stack
        self.name = name
        self.absolute: bytes | None = None
        """Path from the root of the layers below, after an absolute redirect."""
        self.stopped = False
        """A directory on the way of the redirect is opaque: only an absolute redirect of what is
        below it leads further down.
        """
        self.lowers: list[Lower] = []
        self.stats: list[os.stat_result] = []
        self.is_directory = False
        self.metacopy = False
        """What was met last has only metadata: the search goes on for its data."""
        self.marked = False
        """Of the directory met last."""
        self.done = False

    def walk(self, directory: Directory) -> None:
        if not directory.lowers and self.absolute is None:
            return
        parents = {lower.layer: lower for lower in directory.lowers}
        for layer in self.stack.lowers:
            if self.done:
                return
            if self.absolute is not None:
                self._visit_path(layer, self.absolute)
            elif (parent := parents.get(layer)) is not None:
                at = At(layer.directory(parent.path), self.name)
                self._visit(layer, at, join(parent.path, self.name), marked=parent.marked)
        if self.metacopy and self.absolute is not None:
            self._find_data(self.absolute)

    def _find_data(self, path: bytes) -> None:
        """Look for the contents of a metadata-only file in the data-only lowers."""
        for layer in self.stack.data:
            try:
                stat = syscalls.stat_or_none(layer.at(path))
            except FileNotFoundError:
                continue
            if stat is not None and modes.S_ISREG(stat.st_mode):
                self.metacopy = False
                self.lowers.append(Lower(layer, path))
                self.stats.append(stat)
                return

    def _visit_path(self, layer: Layer, path: bytes) -> None:
        """Visit the end of a redirect, minding whiteouts, opaque directories and other redirects on
        the way (ovl_lookup_layer).
        """
        walked, marked = b"", layer.may_hold_marks
        below = b""  # where the layers below have what is at `walked` in this one
        self.stopped = False
        *parents, name = path.split(b"/")
        for depth, component in enumerate(parents, 1):
            at = At(layer.directory(walked), component)
            stat = syscalls.stat_or_none(at)
            if stat is None or not modes.S_ISDIR(stat.st_mode):
                self.done |= self.stopped or stat is not None
                return
            own = self.stack.xattrs.own(at)
            opaque = syscalls.getxattr(at, self.stack.xattrs.opaque) if own else None
            redirect = None
            if opaque != b"y" and self.stack.xattrs.redirect in own:
                redirect = _checked_redirect(syscalls.getxattr(at, self.stack.xattrs.redirect))
            self.stopped |= opaque == b"y"
            marked = opaque == b"x"
            walked = join(walked, component)
            if redirect is None:
                below = join(below, component)
                continue
            if redirect.startswith(b"/"):
                below, self.stopped = redirect[1:], False
            else:
                below = join(below.rpartition(b"/")[0], redirect)
            self.absolute = b"/".join((below, *parents[depth:], name))
        self._visit(layer, At(layer.directory(walked), name), path, marked=marked)
        self.done |= self.stopped

    def _visit(self, layer: Layer, at: At, path: bytes, *, marked: bool) -> None:
        stat = syscalls.stat_or_none(at)
        if stat is None:
            return
        is_directory = modes.S_ISDIR(stat.st_mode)
        if is_whiteout(stat, at, self.stack.xattrs, marked=marked) or (
            is_directory != self.is_directory and (self.is_directory or self.metacopy)
        ):
            self.done = True
            return
        last = layer is self.stack.lowers[-1] and not self.stack.data
        self.meet(layer, at, stat, last=last)
        self.lowers.append(Lower(layer, path, self.marked))
        self.stats.append(stat)

    def meet(self, layer: Layer, at: At, stat: os.stat_result, *, last: bool) -> list[bytes]:
        """Take in what an object says of the layers below it. Return its own attributes' names, as
        far as they matter.
        """
        xattrs = self.stack.xattrs
        self.marked = self.metacopy = False
        own = [] if last and not layer.may_hold_marks else xattrs.own(at)
        if modes.S_ISDIR(stat.st_mode):
            self.is_directory = True
            opaque = syscalls.getxattr(at, xattrs.opaque) if xattrs.opaque in own else None
            self.marked = opaque == b"x"
            self.done |= opaque == b"y"
        else:
            self.metacopy = not last and modes.S_ISREG(stat.st_mode) and xattrs.metacopy in own
            self.done |= not self.metacopy
        if not self.done and not last and xattrs.redirect in own:
            self._redirect(syscalls.getxattr(at, xattrs.redirect))
        return own

    def _redirect(self, target: bytes | None) -> None:
        """Follow ``overlay.redirect``: a path from the root, or another last component."""
        target = _checked_redirect(target)
        if target is None:
            return
        if target.startswith(b"/"):
            self.absolute, self.stopped = target[1:], False
            return
        self.name = target
        if self.absolute is not None:
            self.absolute = join(self.absolute.rpartition(b"/")[0], target)


def _checked_redirect(target: bytes | None) -> bytes | None:
    """Return the value of ``overlay.redirect``, None if it is empty. Raises OSError: EIO."""
    if not target:
        return None
    if not is_redirect(target):
        raise OSError(errno.EIO, "malformed redirect", target)
    return target


def is_redirect(value: bytes) -> bool:
    """Say whether `value` is what ``overlay.redirect`` may be: a name, or an absolute path."""
    components = value[1:].split(b"/") if value.startswith(b"/") else [value]
    return all(map(_is_name, components))


def _is_name(component: bytes) -> bool:
    """Say whether a layer may have an object of that name."""
    return (
        component not in {b"", b".", b".."}
        and len(component) <= NAME_LIMIT
        and b"/" not in component
        and b"\0" not in component
    )


def _upper_file(stack: Stack, at: At, stat: os.stat_result, *, copied: bool) -> Entry:
    """A file in the upper; `copied`: it has the attribute that tells its origin."""
    identity = (stat.st_dev, stat.st_ino)
    index = None
    value = (syscalls.getxattr(at, stack.xattrs.origin) or b"") if copied else b""
    if origin.is_handle(value):
        if (source := origin.decode(value, stack.lowers)) is not None:
            identity = (source.st_dev, source.st_ino)
        if stat.st_nlink > 1:
            index = _indexed(stack, value, stat)
    return Entry(Presence.UPPER, stat, identity, indexed=index)


def _indexed(stack: Stack, handle: bytes | None, upper: os.stat_result) -> bytes | None:
    """Return the name in the index of an upper file whose origin is `handle`, if it is there."""
    if stack.work is None or not handle:
        return None
    name = origin.index_name(handle)
    found = syscalls.stat_or_none(At(stack.work.index, name))
    return name if found is not None and found.st_ino == upper.st_ino else None


def _upper_entry(
    search: _Search, upper: os.stat_result, index: bytes | None, *, marked: bool
) -> Entry:
    """A directory, or a file that has only its metadata in the upper."""
    lowers = tuple(search.lowers)
    if not search.is_directory:
        if not lowers or search.metacopy:
            raise OSError(errno.EIO, "the data of a metadata-only copy is missing", search.name)
        identity = _identity(search.stats[0])
        return Entry(Presence.UPPER, upper, identity, lowers, index, metacopy=True)
    identity = _identity(search.stats[-1]) if lowers else _identity(upper)
    return Entry(Presence.UPPER, upper, identity, lowers, marked=marked)


def _lower_entry(stack: Stack, search: _Search) -> Entry:
    if not search.lowers:
        return ABSENT
    lowers, stat = tuple(search.lowers), search.stats[0]
    if search.is_directory:
        return Entry(Presence.LOWER, stat, _identity(search.stats[-1]), lowers)
    if search.metacopy:
        raise OSError(errno.EIO, "the data of a metadata-only copy is missing", search.name)
    metacopy = len(lowers) > 1
    identity = _identity(stat)
    top = lowers[0]
    if top.layer is not stack.lowers[-1]:  # a layer that was an upper once
        value = syscalls.getxattr(top.at(), stack.xattrs.origin)
        if value and (source := origin.decode(value, stack.lowers)) is not None:
            identity = _identity(source)
    if stat.st_nlink > 1 and (stack.work is not None or stack.indexes):
        found = _lookup_index(stack, top, identity)
        if found is not None:
            return found
    return Entry(Presence.LOWER, stat, identity, lowers, metacopy=metacopy)


def _lookup_index(stack: Stack, lower: Lower, identity: Identity) -> Entry | None:
    """Look for a copy of a lower hard link that was made under another of its names."""
    value = origin_of(stack, lower)
    if value is None:
        return None
    name = origin.index_name(value)
    if stack.work is not None:
        stat = syscalls.stat_or_none(At(stack.work.index, name))
        if stat is not None:
            return Entry(Presence.LOWER, stat, identity, (lower,), indexed=name)
    for layer in stack.indexes:
        stat = syscalls.stat_or_none(At(layer.root, name))
        if stat is not None:
            return Entry(Presence.LOWER, stat, identity, (Lower(layer, name),))
    return None


def origin_of(stack: Stack, lower: Lower) -> bytes | None:
    """Return the handle by which copies of a lower file are known, through all layers.

    Of a copy in a layer that was an upper once, that is the handle of what was copied. None where
    the file system has no handles.
    """
    if lower.layer is not stack.lowers[-1]:
        value = syscalls.getxattr(lower.at(), stack.xattrs.origin) or b""
        if origin.is_handle(value):
            return value
    return origin.encode(lower.layer, lower.at())


def _identity(stat: os.stat_result) -> Identity:
    return stat.st_dev, stat.st_ino


def names(stack: Stack, directory: Directory) -> list[bytes]:
    """List a merged directory, without ``.`` and ``..``; in no particular order."""
    parts = list(_parts(stack, directory))
    if len(parts) == 1:
        return [name for name, whiteout in parts[0] if not whiteout]
    seen: dict[bytes, bool] = {}
    for part in parts:
        for name, whiteout in part:
            seen.setdefault(name, whiteout)
    return [name for name, whiteout in seen.items() if not whiteout]


def _parts(stack: Stack, directory: Directory) -> Iterator[list[tuple[bytes, bool]]]:
    if directory.upper is not None:
        assert stack.upper is not None
        yield _scan(stack, stack.upper.directory(directory.upper), marked=directory.marked)
    for lower in directory.lowers:
        yield _scan(stack, lower.layer.directory(lower.path), marked=lower.marked)


def _scan(stack: Stack, directory: int, *, marked: bool) -> list[tuple[bytes, bool]]:
    """List one real directory: names, and whether they are whiteouts."""
    listed = []
    for name, special in syscalls.scan(directory):
        whiteout = False
        if special or marked:
            at = At(directory, name)
            whiteout = is_whiteout(syscalls.stat(at), at, stack.xattrs, marked=marked)
        listed.append((name, whiteout))
    return listed
