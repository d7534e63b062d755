"""The text of files that differ, as far as a user may read it.

A worker reads everything, so what the kernel would decide is decided here, and more strictly: which
groups the user is in is not known here. So someone else's file is readable if all may read it, and
nothing is that has an ACL. Both states are looked at: what may be read in only one is not told.

Where the session can change things meanwhile, the upper, each step is a descriptor that is checked
and then gone on from: what is checked is what is read, whatever is renamed in between.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from contextlib import ExitStack

from sessiond.overlay import lookup, syscalls
from sessiond.overlay.diff import Change, ChangeKind
from sessiond.overlay.lookup import Entry, Presence
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At, Object

LIMIT = 1 << 16
"""Bytes; larger files are not told."""

_ACL = b"system.posix_acl_access"


class Contents:
    """What two views have of their files for one user."""

    def __init__(self, stack: Stack, base: Stack, uid: int) -> None:
        self._stack = stack
        self._base = base
        self._uid = uid

    def of(self, change: Change) -> dict[str, str] | str | None:
        """Return the text of a file, ``old`` and ``new``, or why it is not told: ``large``,
        ``binary`` or ``forbidden``. None for what has none that has changed.
        """
        kind = change.also if change.kind is ChangeKind.RENAMED else change.kind
        told = {ChangeKind.ADDED, ChangeKind.CONTENTS, ChangeKind.DELETED}
        if kind not in told or not modes.S_ISREG(change.mode):
            return None
        if max(change.size, change.old_size) > LIMIT:
            return "large"
        try:
            with ExitStack() as undo:
                old = new = -1
                if kind is not ChangeKind.ADDED:
                    old = self._open(self._base, change.source or change.base_path, undo)
                if kind is not ChangeKind.DELETED:
                    new = self._open(self._stack, change.path, undo)
                texts = [_read(fd) if fd >= 0 else b"" for fd in (old, new)]
        except PermissionError:
            return "forbidden"
        except (FileNotFoundError, NotADirectoryError):
            return None
        if max(map(len, texts)) > LIMIT:
            return "large"
        try:
            before, now = (text.decode() for text in texts)
        except UnicodeDecodeError:
            return "binary"
        return "binary" if "\0" in before + now else {"old": before, "new": now}

    def _open(self, stack: Stack, path: bytes, undo: ExitStack) -> int:
        """Open a file of a view. Raises PermissionError; FileNotFoundError for what vanishes."""
        directory = lookup.root_of(stack)
        upper = stack.upper.root if stack.upper is not None else -1
        self._check(upper if upper >= 0 else stack.lowers[0].root, modes.S_IXUSR)
        *parents, last = path.split(b"/")
        walked = b""
        for name in parents:
            entry = lookup.lookup(stack, directory, name)
            walked = lookup.join(walked, name)
            if not entry.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), walked)
            if entry.presence is Presence.UPPER:
                upper = _pinned(upper, name, entry, undo)
                self._check(upper, modes.S_IXUSR)
            else:
                self._check(entry.lowers[0].at(), modes.S_IXUSR)
            directory = entry.directory(walked)
        entry = lookup.lookup(stack, directory, last)
        if not entry.positive:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if entry.presence is Presence.UPPER:
            at = At(_pinned(upper, last, entry, undo), b"")
        else:
            at = entry.lowers[0].at()
        fd = syscalls.open_file(at, os.O_RDONLY)
        undo.callback(syscalls.close, fd)
        self._check(fd, modes.S_IRUSR)
        if not entry.metacopy:
            return fd
        data = syscalls.open_file(entry.lowers[-1].at(), os.O_RDONLY)
        undo.callback(syscalls.close, data)
        return data

    def _check(self, what: Object, permission: int) -> None:
        """Raise PermissionError unless the user has a permission, given as that of an owner."""
        if self._uid == 0:
            return
        stat = syscalls.stat(what)
        needed = permission if stat.st_uid == self._uid else permission >> 3 | permission >> 6
        at = At(what, b"") if isinstance(what, int) else what
        if stat.st_mode & needed != needed or _ACL in syscalls.listxattr(at):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _pinned(directory: int, name: bytes, entry: Entry, undo: ExitStack) -> int:
    """Return a descriptor of what was looked up. Raises FileNotFoundError if it is another now."""
    fd = syscalls.open_path(At(directory, name))
    undo.callback(syscalls.close, fd)
    stat = syscalls.stat(At(fd, b""))
    if (stat.st_dev, stat.st_ino) != (entry.stat.st_dev, entry.stat.st_ino):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return fd


def _read(fd: int) -> bytes:
    return syscalls.read(fd, LIMIT + 1, 0)
