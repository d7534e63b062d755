"""How a merged view differs from another one: from its image, or as it was at a snapshot.

Only what is in layers that the two do not share is looked at, so the cost follows the changes and
not the image. Content that is equal is no change, whatever was copied up. A renamed directory
counts as deleted and added.
"""

from __future__ import annotations

import itertools
import os
import stat as modes
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from sessiond.overlay import lookup, syscalls
from sessiond.overlay.lookup import ABSENT, Directory, Entry, Lower, Presence
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At

_CHUNK = 1 << 18


class ChangeKind(StrEnum):
    """What happened to a name."""

    ADDED = "added"
    CONTENTS = "contents"
    METADATA = "metadata"
    DELETED = "deleted"
    TYPE = "type"


class Change(NamedTuple):
    """One difference: one for a deleted directory, one for each object in an added one."""

    path: bytes
    kind: ChangeKind
    mode: int
    """st_mode of the object; of the one before, where it is deleted."""
    size: int
    """Bytes in a regular file, else 0."""


class _Pair(NamedTuple):
    """A directory of the merged view, and what was in its place before."""

    path: bytes
    merged: Directory
    base: Directory | None


_Shared = frozenset[tuple[int, int]]
"""Identities of the layers at the bottom that both stacks have."""


def changes(stack: Stack, base: Stack) -> Iterator[Change]:
    """Compare `stack` with `base`, which has lowers only; parents come before what is in them.

    Precondition: neither is used elsewhere. Safe while the layers change: what vanishes in the
    course is left out.
    """
    shared = _shared(stack, base)
    pending = [_Pair(b"", _root(stack), _root(base))]
    while pending:
        pair = pending.pop()
        for name in _candidates(stack, base, shared, pair):
            path = lookup.join(pair.path, name)
            try:
                now = lookup.lookup(stack, pair.merged, name)
                before = lookup.lookup(base, pair.base, name) if pair.base else ABSENT
                change = _compare(stack, path, now, before)
            except FileNotFoundError:
                continue
            if change is not None:
                yield change
            if now.is_directory and (descent := _descend(path, now, before, shared)):
                pending.append(descent)


def _shared(stack: Stack, base: Stack) -> _Shared:
    pairs = zip(reversed(stack.lowers), reversed(base.lowers), strict=False)
    same = itertools.takewhile(lambda pair: pair[0].is_same(pair[1]), pairs)
    return frozenset(layer.identity for layer, _ in same)


def _root(stack: Stack) -> Directory:
    upper = b"" if stack.upper is not None else None
    return Directory(upper, tuple(Lower(one, b"", one.may_hold_marks) for one in stack.lowers))


def _candidates(stack: Stack, base: Stack, shared: _Shared, pair: _Pair) -> list[bytes]:
    """Return the names that may differ."""
    names: set[bytes] = set()
    if pair.base is None or not _same_below(pair.merged, pair.base, shared):
        # Renamed, opaque or new: anything may.
        names.update(lookup.names(stack, pair.merged))
        if pair.base is not None:
            names.update(lookup.names(base, pair.base))
        return sorted(names)
    if pair.merged.upper is not None:
        assert stack.upper is not None
        names.update(name for name, _ in syscalls.scan(stack.upper.directory(pair.merged.upper)))
    for lower in (*pair.merged.lowers, *pair.base.lowers):
        if lower.layer.identity not in shared:
            names.update(name for name, _ in syscalls.scan(lower.layer.directory(lower.path)))
    return sorted(names)


def _same_below(merged: Directory, base: Directory, shared: _Shared) -> bool:
    """Say whether the two merge the same directories of the layers that both stacks have."""
    return _of(merged, shared) == _of(base, shared)


def _of(directory: Directory, shared: _Shared) -> list[tuple[tuple[int, int], bytes]]:
    places = ((lower.layer.identity, lower.path) for lower in directory.lowers)
    return [place for place in places if place[0] in shared]


def _descend(path: bytes, now: Entry, before: Entry, shared: _Shared) -> _Pair | None:
    in_upper = now.presence is Presence.UPPER
    merged = Directory(path if in_upper else None, now.lowers, now.marked)
    if not before.is_directory:
        return _Pair(path, merged, None)
    base = Directory(None, before.lowers)
    untouched = not in_upper and all(
        lower.layer.identity in shared for lower in (*now.lowers, *before.lowers)
    )
    if untouched and _same_below(merged, base, shared):
        return None
    return _Pair(path, merged, base)


def _compare(stack: Stack, path: bytes, now: Entry, before: Entry) -> Change | None:
    if not now.positive:
        if not before.positive:
            return None
        return Change(path, ChangeKind.DELETED, before.stat.st_mode, _size(before.stat))
    mode, size = now.stat.st_mode, _size(now.stat)
    if not before.positive:
        return Change(path, ChangeKind.ADDED, mode, size)
    if modes.S_IFMT(mode) != modes.S_IFMT(before.stat.st_mode):
        return Change(path, ChangeKind.TYPE, mode, size)
    if (now.stat.st_dev, now.stat.st_ino) == (before.stat.st_dev, before.stat.st_ino):
        return None
    at, data = _places(stack, path, now)
    other, other_data = _places(stack, path, before)
    if not _same_contents(data, now.stat, other_data, before.stat):
        return Change(path, ChangeKind.CONTENTS, mode, size)
    if not _same_metadata(stack, at, now.stat, other, before.stat):
        return Change(path, ChangeKind.METADATA, mode, size)
    return None


def _places(stack: Stack, path: bytes, entry: Entry) -> tuple[At, At]:
    """Return where the object is, and where its contents are."""
    if entry.presence is not Presence.UPPER:
        return entry.lowers[0].at(), entry.lowers[-1 if entry.metacopy else 0].at()
    assert stack.upper is not None
    at = stack.upper.at(path)
    return at, entry.lowers[-1].at() if entry.metacopy else at


def _size(stat: os.stat_result) -> int:
    return stat.st_size if modes.S_ISREG(stat.st_mode) else 0


def _same_metadata(
    stack: Stack, at: At, stat: os.stat_result, other: At, other_stat: os.stat_result
) -> bool:
    if stat.st_mode != other_stat.st_mode:
        return False
    if (stat.st_uid, stat.st_gid) != (other_stat.st_uid, other_stat.st_gid):
        return False
    # A directory's time changes with its entries, which are told of themselves.
    if not modes.S_ISDIR(stat.st_mode) and stat.st_mtime_ns != other_stat.st_mtime_ns:
        return False
    return _xattrs(stack, at) == _xattrs(stack, other)


def _xattrs(stack: Stack, at: At) -> dict[bytes, bytes | None]:
    names = [name for name in syscalls.listxattr(at) if not stack.xattrs.is_own(name)]
    return {name: syscalls.getxattr(at, name) for name in names}


def _same_contents(at: At, stat: os.stat_result, other: At, other_stat: os.stat_result) -> bool:
    kind = modes.S_IFMT(stat.st_mode)
    if kind == modes.S_IFLNK:
        return syscalls.readlink(at) == syscalls.readlink(other)
    if kind in {modes.S_IFCHR, modes.S_IFBLK}:
        return stat.st_rdev == other_stat.st_rdev
    if kind != modes.S_IFREG:
        return True
    if stat.st_size != other_stat.st_size:
        return False
    return _same_bytes(at, other)


def _same_bytes(at: At, other: At) -> bool:
    fd = syscalls.open_file(at, os.O_RDONLY)
    try:
        other_fd = syscalls.open_file(other, os.O_RDONLY)
        try:
            offset = 0
            while True:
                chunk = syscalls.read(fd, _CHUNK, offset)
                if chunk != syscalls.read(other_fd, _CHUNK, offset):
                    return False
                if not chunk:
                    return True
                offset += len(chunk)
        finally:
            syscalls.close(other_fd)
    finally:
        syscalls.close(fd)
