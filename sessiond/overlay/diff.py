"""How a merged view differs from its image, the bottom-most lower.

Only what is in other layers is looked at, so the cost follows the changes and not the image.
Content that equals the image's is no change, whatever was copied up. A renamed directory counts as
deleted and added.
"""

from __future__ import annotations

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
    """st_mode of the object; of the image's, where it is deleted."""
    size: int
    """Bytes in a regular file, else 0."""


class _Pair(NamedTuple):
    """A directory of the merged view, and what the image has in its place."""

    path: bytes
    merged: Directory
    image: Directory | None


def changes(stack: Stack) -> Iterator[Change]:
    """Compare; parents come before what is in them. Precondition: `stack` is not used elsewhere.

    Safe while the layers change: what vanishes in the course is left out.
    """
    image_layer = stack.lowers[-1]
    image = Stack((image_layer,), None, None, stack.options)
    roots = tuple(Lower(layer, b"", layer.may_hold_marks) for layer in stack.lowers)
    upper = b"" if stack.upper is not None else None
    pending = [_Pair(b"", Directory(upper, roots), Directory(None, roots[-1:]))]
    while pending:
        pair = pending.pop()
        for name in _candidates(stack, image, pair):
            path = lookup.join(pair.path, name)
            try:
                now = lookup.lookup(stack, pair.merged, name)
                before = lookup.lookup(image, pair.image, name) if pair.image else ABSENT
                change = _compare(stack, pair.merged, path, now, before)
            except FileNotFoundError:
                continue
            if change is not None:
                yield change
            if now.is_directory and (descent := _descend(path, now, before, image_layer)):
                pending.append(descent)


def _candidates(stack: Stack, image: Stack, pair: _Pair) -> list[bytes]:
    """Return the names that may differ."""
    image_layer = image.lowers[0]
    same = pair.image is not None and pair.merged.lowers[-1:] == pair.image.lowers
    if not same:  # renamed, opaque or new: anything may
        names = set(lookup.names(stack, pair.merged))
        if pair.image is not None:
            names.update(lookup.names(image, pair.image))
        return sorted(names)
    names = set()
    if pair.merged.upper is not None:
        assert stack.upper is not None
        names.update(name for name, _ in syscalls.scan(stack.upper.directory(pair.merged.upper)))
    for lower in pair.merged.lowers:
        if lower.layer is not image_layer:
            names.update(name for name, _ in syscalls.scan(lower.layer.directory(lower.path)))
    return sorted(names)


def _descend(path: bytes, now: Entry, before: Entry, image: object) -> _Pair | None:
    in_upper = now.presence is Presence.UPPER
    merged = Directory(path if in_upper else None, now.lowers, now.marked)
    counterpart = Directory(None, before.lowers) if before.is_directory else None
    untouched = not in_upper and all(lower.layer is image for lower in now.lowers)
    if untouched and counterpart is not None and now.lowers == before.lowers:
        return None
    return _Pair(path, merged, counterpart)


def _compare(
    stack: Stack, directory: Directory, path: bytes, now: Entry, before: Entry
) -> Change | None:
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
    at, data = _places(stack, directory, path, now)
    other = before.lowers[0].at()
    if not _same_contents(data, now.stat, other, before.stat):
        return Change(path, ChangeKind.CONTENTS, mode, size)
    if not _same_metadata(stack, at, now.stat, other, before.stat):
        return Change(path, ChangeKind.METADATA, mode, size)
    return None


def _places(stack: Stack, directory: Directory, path: bytes, entry: Entry) -> tuple[At, At]:
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
