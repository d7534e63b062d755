"""Limits of sessions on disk: project quotas of ext4 and xfs.

A session's directory gets a project id of its own, which everything made in it inherits, so that
the file system itself counts what all its layers take, and refuses more. statvfs(2) in the
directory, and so df in the merged view, shows the limit (ext4_statfs_project, xfs_qm_statvfs).

Which ids are taken is asked of the file system, and nowhere else written down: an id with
files or with a limit is in use. The limit goes when the session is forgotten, and the id is free
again when the last of its files is deleted. btrfs has quotas for subvolumes only, between which
nothing can be renamed, so it is refused, as is everything else.

All functions block, and raise `NotSupported` or `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sessiond.errors import NotSupported
from sessiond.session.model import Quota

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# linux/quota.h, linux/dqblk_xfs.h: xfs understands the commands of the generic interface, and ext4
# that one of xfs's which tells whether limits are enforced.
_SYS_QUOTACTL_FD = 443
_PRJQUOTA = 2
_GETQUOTA = 0x800007
_SETQUOTA = 0x800008
_XGETQSTAT = ord("X") << 8 | 5
_XGETQSTAT_FLAGS = struct.Struct("=xxH")
_PROJECT_ENFORCED = 1 << 5
_DQBLK = struct.Struct("=QQQQQQQQI4x")
_BLOCK = 1024
"""QIF_DQBLKSIZE: what limits of bytes are counted in."""
_LIMITS_VALID = 1 | 4  # QIF_BLIMITS, QIF_ILIMITS

# linux/fs.h
_FSXATTR = struct.Struct("=IIIII8x")
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_PROJINHERIT = 0x200

_FIRST_PROJECT = 0x5E55_0000
"""Project ids are taken from here on: far from those that people and container engines choose."""

_choosing = threading.Lock()

_UNAVAILABLE = (
    "The file system of {} has no project quota switched on, so no session there can have a quota. "
    "ext4: 'tune2fs -O project,quota -Q prjquota DEVICE' while it is not mounted; then, and for "
    "xfs: mount it with the option prjquota. Or take 'quota' out of the profile."
)


class Counted(NamedTuple):
    """What the file system has counted for a project, and its limits; 0 is no limit."""

    bytes_used: int
    bytes_limit: int
    inodes_used: int
    inodes_limit: int

    @property
    def in_use(self) -> bool:
        """The id belongs to someone."""
        return any(self)


def require_available(directory: Path) -> None:
    """Raise `NotSupported`, with what to do, where project quotas are not enforced."""
    with _opened(directory) as fd:
        _require_enforced(fd, directory)


def assign(directory: Path, limit: Quota) -> None:
    """Limit what `directory`, an empty one, may hold from now on."""
    with _opened(directory) as fd, _choosing:
        _require_enforced(fd, directory)
        project = _unused_project(fd)
        _set_project(fd, project)
        _set_limit(fd, project, limit)


def ensure(directory: Path, limit: Quota) -> None:
    """Make sure that the limit of a `directory` that got one holds still, as after a reboot."""
    with _opened(directory) as fd:
        _require_enforced(fd, directory)
        project = _project(fd)
        if project == _inherited_project(directory):
            raise NotSupported(
                f"{directory} has lost its project id, as copies do, so its quota does not hold. "
                "Give it and all in it an unused one, with 'chattr -R +P -p NUMBER', and try again."
            )
        _set_limit(fd, project, limit)


def release(directory: Path) -> None:
    """Take the limit away, if `directory` has one of its own: its files are to be deleted."""
    with _opened(directory) as fd:
        project = _project(fd)
        if project != _inherited_project(directory):
            _set_limit(fd, project, None)


def counted(directory: Path) -> Counted:
    """Return what is used of the limit of `directory`. Raises `OSError` where there is no quota."""
    with _opened(directory) as fd:
        return _count(fd, _project(fd))


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _require_enforced(fd: int, directory: Path) -> None:
    state = ctypes.create_string_buffer(256)
    try:
        _quotactl(fd, _XGETQSTAT, 0, state)
    except OSError:
        # However it is said (ENOSYS, ENOTTY, EOPNOTSUPP, ESRCH), there is none.
        raise NotSupported(_UNAVAILABLE.format(directory)) from None
    (flags,) = _XGETQSTAT_FLAGS.unpack_from(state.raw)
    if not flags & _PROJECT_ENFORCED:
        raise NotSupported(_UNAVAILABLE.format(directory))


def _unused_project(fd: int) -> int:
    named = _named_projects()
    project = _FIRST_PROJECT
    while project in named or _count(fd, project).in_use:
        project += 1
    return project


def _named_projects() -> frozenset[int]:
    """Return the ids that an administrator has given names or directories: projid(5), projects(5).

    What cannot be understood is nothing that xfs_quota(8) would understand either.
    """
    numbers = set()
    for file, column in (("/etc/projid", 1), ("/etc/projects", 0)):
        try:
            with open(file, encoding="utf-8", errors="replace") as lines:
                fields = [line.partition("#")[0].strip().split(":") for line in lines]
        except FileNotFoundError:
            continue
        numbers |= {field[column] for field in fields if len(field) > column}
    return frozenset(int(number) for number in numbers if number.isdecimal())


def _count(fd: int, project: int) -> Counted:
    block = ctypes.create_string_buffer(_DQBLK.size)
    try:
        _quotactl(fd, _GETQUOTA, project, block)
    except OSError as error:
        if error.errno != errno.ENOENT:  # xfs: nobody has ever used that id
            raise
        return Counted(0, 0, 0, 0)
    most_blocks, _, space, most_inodes, _, inodes, _, _, _ = _DQBLK.unpack(block.raw)
    return Counted(space, most_blocks * _BLOCK, inodes, most_inodes)


def _set_limit(fd: int, project: int, limit: Quota | None) -> None:
    blocks, inodes = (0, 0) if limit is None else (-(-limit.bytes // _BLOCK), limit.inodes)
    block = _DQBLK.pack(blocks, 0, 0, inodes, 0, 0, 0, 0, _LIMITS_VALID)
    _quotactl(fd, _SETQUOTA, project, ctypes.create_string_buffer(block, len(block)))


def _project(fd: int) -> int:
    """Return the project id; 0, as for files of no project, where there are none."""
    try:
        attributes = fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
    except OSError as error:
        if error.errno in {errno.ENOTTY, errno.EOPNOTSUPP}:
            return 0
        raise
    return int(_FSXATTR.unpack(attributes)[3])


def _set_project(fd: int, project: int) -> None:
    attributes = fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
    flags, extent_size, extents, _, cow_extent_size = _FSXATTR.unpack(attributes)
    changed = _FSXATTR.pack(flags | _PROJINHERIT, extent_size, extents, project, cow_extent_size)
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, changed)


def _inherited_project(directory: Path) -> int:
    """Return the project of the directory above: an administrator may have given it a quota."""
    with _opened(directory.parent) as fd:
        return _project(fd)


def _quotactl(fd: int, command: int, project: int, address: ctypes.Array[ctypes.c_char]) -> None:
    whole = ctypes.c_uint(command << 8 | _PRJQUOTA)
    if _libc.syscall(_SYS_QUOTACTL_FD, fd, whole, ctypes.c_uint(project), address) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
