"""The FUSE device: mounting a connection, and telling the kernel what changed behind its back."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pyfuse3
from pyfuse3 import InodeT

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_NOTIFY_INVAL_ENTRY = 3
_EXPIRE_ONLY = 1
_EXPIRED = struct.Struct("=IiQQII")  # fuse_out_header, fuse_notify_inval_entry_out

_FORGOTTEN = (FileNotFoundError, NotADirectoryError)
"""The kernel does not know the node any more, or has another by its number: a file, where there was
a directory.
"""

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
_MS_POSIXACL = 1 << 16
"""Makes the kernel leave the umask to the server, which alone knows of default ACLs."""


def mount_device(
    mount_point: Path, source: str, flags: int, *, fs_type: str, allow_other: bool
) -> int:
    """Mount a new FUSE connection; return its descriptor, which libfuse takes as ``/dev/fd/N``.

    `flags`: MS_ constants of mount(2). Raises OSError, with the missing file or the mount point.
    """
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        root_mode = os.stat(mount_point).st_mode
        options = (
            f"fd={fd},rootmode={root_mode & 0o170000:o},"
            f"user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
        )
        if allow_other:
            options += ",allow_other"
        arguments = (source.encode(), os.fsencode(mount_point), fs_type.encode())
        _check(
            _libc.mount(*arguments, ctypes.c_ulong(flags | _MS_POSIXACL), options.encode()),
            mount_point,
        )
    except BaseException:
        os.close(fd)
        raise
    return fd


def detach(mount_point: Path) -> None:
    """Take the mount out of the name space, now, whoever uses it. Nothing mounted there is no
    error.
    """
    try:
        _check(_libc.umount2(os.fsencode(mount_point), _MNT_DETACH | _UMOUNT_NOFOLLOW), mount_point)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOENT}:
            raise


def _check(result: int, mount_point: Path) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(mount_point))


def expire(connection: int, names: Iterable[tuple[int, bytes]]) -> None:
    """Make the kernel ask again, when they are used next, for `names`, each in a node.

    A directory that is still the same then keeps what is mounted on it, and whoever works in it;
    not so before Linux 6.2, which does not know FUSE_EXPIRE_ONLY. Call from a thread: it waits for
    requests that are under way.
    """
    for parent, name in names:  # maybe a hundred thousand, with a program that waits
        size = _EXPIRED.size + len(name) + 1
        head = _EXPIRED.pack(size, _NOTIFY_INVAL_ENTRY, 0, parent, len(name), _EXPIRE_ONLY)
        try:
            os.write(connection, head + name + b"\0")
        except _FORGOTTEN:
            continue


def invalidate(names: Iterable[tuple[int, bytes]], directories: Iterable[int]) -> None:
    """Make the kernel forget `names`, each in a node, and ask again for attributes and listings
    of `directories`.

    Call from a thread: it waits for requests that are under way.
    """
    for parent, name in names:
        with suppress(*_FORGOTTEN):
            pyfuse3.invalidate_entry(InodeT(parent), name)
    for number in directories:
        with suppress(*_FORGOTTEN):
            pyfuse3.invalidate_inode(InodeT(number))  # its listing, too


def drop_directory(parent: int, name: bytes, number: int) -> None:
    """Make the kernel forget a directory that is gone, and what it has cached below it.

    Another one that has the name by now is left alone (FUSE_NOTIFY_DELETE). Call from a thread, as
    `invalidate`.
    """
    with suppress(OSError):  # it is forgotten, or somebody uses what was in it
        pyfuse3.invalidate_entry(InodeT(parent), name, deleted=InodeT(number))


def invalidate_attributes(number: int) -> None:
    """Make the kernel ask again for the attributes of a node. Waits for nothing."""
    with suppress(*_FORGOTTEN):
        pyfuse3.invalidate_inode(InodeT(number), attr_only=True)
