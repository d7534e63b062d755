"""The FUSE device: mounting a connection, and telling the kernel what changed behind its back."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
from pyfuse3 import InodeT

from sessiond.fuse.data_path import kernel_version

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_NOTIFY_INC_EPOCH = 8
_EPOCH_KERNEL = (6, 16)

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


def has_epochs() -> bool:
    """Say whether this kernel can invalidate all names at once (FUSE_NOTIFY_INC_EPOCH)."""
    return kernel_version() >= _EPOCH_KERNEL


def begin_epoch(connection: int) -> None:
    """Make the kernel ask again for every name. Precondition: `has_epochs`."""
    header = struct.pack("=IiQ", 16, _NOTIFY_INC_EPOCH, 0)  # struct fuse_out_header
    os.write(connection, header)


def invalidate(names: Iterable[tuple[int, bytes]], directories: Iterable[int]) -> None:
    """Make the kernel ask again for `names`, each in a node, and for attributes and
    listings of `directories`.

    Call from a thread: it waits for requests that are under way.
    """
    for parent, name in names:
        with _forgotten_meanwhile():
            pyfuse3.invalidate_entry(InodeT(parent), name)
    for number in directories:
        with _forgotten_meanwhile():
            pyfuse3.invalidate_inode(InodeT(number))  # its listing, too


def invalidate_attributes(number: int) -> None:
    """Make the kernel ask again for the attributes of a node. Waits for nothing."""
    with _forgotten_meanwhile():
        pyfuse3.invalidate_inode(InodeT(number), attr_only=True)


@contextmanager
def _forgotten_meanwhile() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
