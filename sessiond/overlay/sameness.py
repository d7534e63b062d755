"""Whether two objects of layers are the same: contents, and what else programs can see of them."""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Callable
from typing import NamedTuple

from sessiond.overlay import lookup, syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import Entry
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.xattrs import OverlayXattrs

_CHUNK = 1 << 20

_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""What there is instead of an object, or of a directory on the way to it."""

Check = Callable[[], None]
"""Called again and again by what takes long; stops it by raising."""


def _never() -> None:
    """Do not stop it."""


class Object(NamedTuple):
    """An object of a layer, and its stat(2)."""

    at: At
    stat: os.stat_result

    @property
    def is_directory(self) -> bool:
        return modes.S_ISDIR(self.stat.st_mode)


def find(layer: Layer, path: bytes) -> Object | None:
    """Return the object at `path` of a layer; None if there is none, or no directory above it."""
    try:
        at = layer.at(path)
        return Object(at, syscalls.stat(at))
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        return None


def attributes(at: At, xattrs: OverlayXattrs) -> dict[bytes, bytes | None]:
    """Return the extended attributes but the overlay's own."""
    return {
        name: syscalls.getxattr(at, name)
        for name in syscalls.listxattr(at)
        if not xattrs.is_own(name)
    }


def same_metadata(one: Object, other: Object, xattrs: OverlayXattrs) -> bool:
    """Compare mode, owner and extended attributes; no times."""
    return (
        one.stat.st_mode == other.stat.st_mode
        and (one.stat.st_uid, one.stat.st_gid) == (other.stat.st_uid, other.stat.st_gid)
        and attributes(one.at, xattrs) == attributes(other.at, xattrs)
    )


def same_contents(one: Object, other: Object, check: Check = _never) -> bool:
    """Compare what files hold, symbolic links name and device nodes stand for; of directories
    nothing. Raises OSError.
    """
    kind = modes.S_IFMT(one.stat.st_mode)
    if kind != modes.S_IFMT(other.stat.st_mode):
        return False
    if kind == modes.S_IFLNK:
        return syscalls.readlink(one.at) == syscalls.readlink(other.at)
    if kind in {modes.S_IFCHR, modes.S_IFBLK}:
        return one.stat.st_rdev == other.stat.st_rdev
    if kind != modes.S_IFREG:
        return True
    return one.stat.st_size == other.stat.st_size and _same_files(one.at, other.at, check)


def _same_files(one: At, other: At, check: Check) -> bool:
    first = syscalls.open_file(one, os.O_RDONLY)
    try:
        second = syscalls.open_file(other, os.O_RDONLY)
        try:
            return same_bytes(first, second, check)
        finally:
            syscalls.close(second)
    finally:
        syscalls.close(first)


def same_bytes(one: int, other: int, check: Check) -> bool:
    """Compare what two files hold, given as descriptors, to the end. Raises OSError."""
    offset = 0
    while True:
        check()
        chunk = syscalls.read(one, _CHUNK, offset)
        if chunk != syscalls.read(other, _CHUNK, offset):
            return False
        if not chunk:
            return True
        offset += len(chunk)


def same(one: Object, other: Object, xattrs: OverlayXattrs, check: Check) -> bool:
    """Compare contents and metadata; no times."""
    return same_metadata(one, other, xattrs) and same_contents(one, other, check)


def first_difference(stack: Stack, tree: Layer, check: Check) -> tuple[bytes, str] | None:
    """Compare the merged view of layers with a tree that was made of it.

    Return the path of the first object that differs, and how, as part of a sentence; None if none
    does. All is compared but times, and which names are links to one file. `stack` has lowers only;
    nobody may write to them. Raises OSError.
    """
    root = lookup.root_of(stack)
    how = _other_metadata(stack.xattrs, _object(root.lowers[0].at()), _object(tree.at(b"")))
    if how is not None:
        return b"", how
    pending = [(b"", root)]
    while pending:
        path, directory = pending.pop()
        wanted = set(lookup.names(stack, directory))
        present = {name for name, _ in syscalls.scan(tree.directory(path))}
        for name in wanted - present:
            return lookup.join(path, name), "is missing"
        for name in present - wanted:
            return lookup.join(path, name), "should not be there"
        for name in wanted:
            check()
            entry = lookup.lookup(stack, directory, name)
            below = lookup.join(path, name)
            how = _difference(stack, entry, _object(tree.at(below)), check)
            if how is not None:
                return below, how
            if entry.is_directory:
                pending.append((below, entry.directory(below)))
    return None


def _object(at: At) -> Object:
    return Object(at, syscalls.stat(at))


def _difference(stack: Stack, entry: Entry, other: Object, check: Check) -> str | None:
    one = Object(entry.lowers[0].at(), entry.stat)
    how = _other_metadata(stack.xattrs, one, other)
    if how is not None:
        return how
    contents = Object(entry.lowers[-1].at(), one.stat) if entry.metacopy else one
    return None if same_contents(contents, other, check) else "has other contents"


def _other_metadata(xattrs: OverlayXattrs, one: Object, other: Object) -> str | None:
    if one.stat.st_mode != other.stat.st_mode:
        return "has another type or mode"
    if (one.stat.st_uid, one.stat.st_gid) != (other.stat.st_uid, other.stat.st_gid):
        return "has another owner"
    if _shown(xattrs, one.at) != _raw(other.at):
        return "has other extended attributes or another ACL"
    return None


def _shown(xattrs: OverlayXattrs, at: At) -> dict[bytes, bytes | None]:
    """Return the extended attributes as the merged view shows them."""
    names = xattrs.shown(syscalls.listxattr(at))
    return {name: syscalls.getxattr(at, xattrs.stored(name)) for name in names}


def _raw(at: At) -> dict[bytes, bytes | None]:
    return {name: syscalls.getxattr(at, name) for name in syscalls.listxattr(at)}
