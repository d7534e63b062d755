"""Every system call that the overlay makes, and no other module's.

One place for safety: an object is addressed as a name in an open directory, or by a descriptor of
itself, and never reached through a symlink. One place for faults: tests replace a function here to
make it fail.

All functions raise `OSError`. None keeps state, so all may be called from any thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat as modes
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.fchmodat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_int)
_libc.renameat2.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
)

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_SYS_OPEN_TREE = 428
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
_MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_NOATIME = 0x10
_MOUNT_ATTR__ATIME = 0x70
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_FICLONE = 0x40049409
_FS_IOC_GETFSUUID = 0x80111500
_HANDLE_LIMIT = 128  # MAX_HANDLE_SZ
_HANDLE_REQUEST = struct.pack("Ii", _HANDLE_LIMIT, 0) + bytes(_HANDLE_LIMIT)

_NO_XATTR = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
_COPY_CHUNK = 1 << 26
_SMALL_FILE = 1 << 16
"""Up to this size, in bytes, reading and writing is quicker than having the kernel copy."""


class At(NamedTuple):
    """An object of a layer: `name` in the directory open as `directory`; without name, that
    descriptor.
    """

    directory: int
    name: bytes


Object = At | int
"""An object by its name, or by a descriptor that is open for reading or writing."""


def failure(code: int) -> OSError:
    """Return what a system call raises that fails with an errno."""
    return OSError(code, os.strerror(code))


class FileHandle(NamedTuple):
    """What name_to_handle_at(2) tells of an inode."""

    kind: int
    data: bytes


def _path(at: At) -> bytes:
    """Return a path to `at` for calls that take no directory descriptor. A walk through /proc costs
    more than most calls do.

    The descriptor's link in /proc leads to the open file itself, whatever it is: that last step is
    no symlink, so a symlink that is open with O_PATH is not followed either.
    """
    if at.name:
        return b"/proc/self/fd/%d/%b" % at
    return b"/proc/self/fd/%d" % at.directory


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise failure(code)
    return result


def open_root(path: bytes) -> int:
    """Open the directory `path`, as the root of a layer. The one call that follows symlinks."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def clone_read_only(directory: int) -> int | None:
    """Return a private, read-only, non-recursive mount of `directory`, as a descriptor
    (open_tree(2)).

    Like the private mounts that the kernel's overlayfs makes of its lowers: what is mounted below
    is not seen, and nothing is written, not even access times. Nor can a device node be opened
    there. None where the caller may not do that.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
    clone = _libc.syscall(_SYS_OPEN_TREE, directory, b"", flags)
    if clone < 0:
        return None
    wanted = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOATIME
    attributes = struct.pack("QQQQ", wanted, _MOUNT_ATTR__ATIME, 0, 0)
    if (
        _libc.syscall(_SYS_MOUNT_SETATTR, clone, b"", _AT_EMPTY_PATH, attributes, len(attributes))
        < 0
    ):
        os.close(clone)
        return None
    return int(clone)


def open_beneath(root: int, path: bytes) -> int:
    """Open the directory `path` below `root` with O_PATH; symlinks and mounts on the way are
    refused.
    """
    how = struct.pack(
        "QQQ",
        os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC,
        0,
        _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_XDEV,
    )
    while True:
        fd = int(_libc.syscall(_SYS_OPENAT2, root, path, how, len(how)))
        if fd >= 0 or ctypes.get_errno() != errno.EAGAIN:  # EAGAIN: raced with a rename
            return _checked(fd)


def open_readable(directory: int) -> int:
    """Reopen a directory that is open with O_PATH, for calls that need it open for reading."""
    return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)


def open_path(at: At) -> int:
    """Pin the object, of whatever type, with O_PATH."""
    return os.open(at.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at.directory)


def open_file(at: At, flags: int) -> int:
    """Open a regular file. `flags`: access mode, O_TRUNC.

    Raises ESTALE if it is anything else by now, as in the image, if that is a directory in use.
    """
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if at.name:
        fd = os.open(at.name, flags | os.O_NOFOLLOW, dir_fd=at.directory)
    else:
        fd = os.open(_path(at), flags)
    if not modes.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise failure(errno.ESTALE)
    return fd


def create_file(at: At, mode: int) -> int:
    """Create a regular file, which must not exist, and open it for reading and writing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(at.name, flags, mode, dir_fd=at.directory)


def create_anonymous(directory: int, mode: int) -> int:
    """Create a regular file without a name, which `link_descriptor` can give it (O_TMPFILE)."""
    return os.open(b".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=directory)


def with_umask(umask: int, create: Callable[[], int]) -> int:
    """Call `create` under another umask, and return its result. Not for two threads at once."""
    before = os.umask(umask)
    try:
        return create()
    finally:
        os.umask(before)


def duplicate(fd: int) -> int:
    return os.dup(fd)


def close(fd: int) -> None:
    os.close(fd)


def stat(at: Object) -> os.stat_result:
    if isinstance(at, int):
        return os.fstat(at)
    if at.name:
        return os.stat(at.name, dir_fd=at.directory, follow_symlinks=False)
    return os.fstat(at.directory)


def stat_or_none(at: At) -> os.stat_result | None:
    """Like `stat`; None for a name that is not there."""
    try:
        return stat(at)
    except FileNotFoundError:
        return None


def statvfs(fd: int) -> os.statvfs_result:
    return os.fstatvfs(fd)


def scan(directory: int) -> list[tuple[bytes, bool]]:
    """List a directory: names, and whether the entry can be a whiteout or stands for one (is
    special).
    """
    with os.scandir(_path(At(directory, b""))) as entries:
        return [
            (
                entry.name,
                not (
                    entry.is_file(follow_symlinks=False)
                    or entry.is_dir(follow_symlinks=False)
                    or entry.is_symlink()
                ),
            )
            for entry in entries
        ]


def scan_lazily(directory: int) -> Iterator[os.DirEntry[bytes]]:
    """List a directory entry by entry, however many there are."""
    with os.scandir(_path(At(directory, b""))) as entries:
        yield from entries


def readlink(at: At) -> bytes:
    if at.name:
        return os.readlink(at.name, dir_fd=at.directory)
    target = ctypes.create_string_buffer(4096)
    size = _checked(_libc.readlinkat(at.directory, b"", target, len(target)))
    return target.raw[:size]


def mkdir(at: At, mode: int) -> None:
    os.mkdir(at.name, mode, dir_fd=at.directory)


def mknod(at: At, mode: int, device: int) -> None:
    os.mknod(at.name, mode, device, dir_fd=at.directory)


def symlink(at: At, target: bytes) -> None:
    os.symlink(target, at.name, dir_fd=at.directory)


def link(source: At, target: At) -> None:
    os.link(
        source.name,
        target.name,
        src_dir_fd=source.directory,
        dst_dir_fd=target.directory,
        follow_symlinks=False,
    )


def link_descriptor(fd: int, target: At) -> None:
    """Give the file that is open as `fd` a name."""
    source = _path(At(fd, b""))
    os.link(source, target.name, dst_dir_fd=target.directory, follow_symlinks=True)


def unlink(at: At) -> None:
    os.unlink(at.name, dir_fd=at.directory)


def rmdir(at: At) -> None:
    os.rmdir(at.name, dir_fd=at.directory)


def rename(source: At, target: At, flags: int = 0) -> None:
    """renameat2(2); `flags`: RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT."""
    if not flags:
        os.rename(
            source.name, target.name, src_dir_fd=source.directory, dst_dir_fd=target.directory
        )
        return
    _checked(_libc.renameat2(source.directory, source.name, target.directory, target.name, flags))


def chmod(at: Object, mode: int) -> None:
    """Set the mode of anything but a symlink (EOPNOTSUPP)."""
    if isinstance(at, int):
        os.fchmod(at, mode)
    elif at.name:
        _checked(_libc.fchmodat(at.directory, at.name, mode, _AT_SYMLINK_NOFOLLOW))
    else:
        os.chmod(_path(at), mode)


def chown(at: Object, uid: int, gid: int) -> None:
    """Set the owner; -1 leaves a part as it is. Clears setuid and setgid bits, as chown(2) does."""
    if isinstance(at, int):
        os.fchown(at, uid, gid)
    elif at.name:
        os.chown(at.name, uid, gid, dir_fd=at.directory, follow_symlinks=False)
    else:
        os.chown(_path(at), uid, gid)


def utime(at: Object, atime: int, mtime: int) -> None:
    """Set both times, in nanoseconds."""
    times = (atime, mtime)
    if isinstance(at, int):
        os.utime(at, ns=times)
    elif at.name:
        os.utime(at.name, ns=times, dir_fd=at.directory, follow_symlinks=False)
    else:
        os.utime(_path(at), ns=times)


def truncate(fd: int, size: int, *, by_name: bool = False) -> None:
    """Set the size of an open file as ftruncate(2) does, or `by_name`, as truncate(2), which
    leaves it to the file system whether the times change where the size does not.
    """
    if by_name:
        os.truncate(_path(At(fd, b"")), size)
    else:
        os.ftruncate(fd, size)


def getxattr(at: Object, name: bytes) -> bytes | None:
    """Return the value; None where there is none, or no support for it."""
    try:
        if isinstance(at, int):
            return os.getxattr(at, name)
        return os.getxattr(_path(at), name, follow_symlinks=not at.name)
    except OSError as error:
        if error.errno in _NO_XATTR:
            return None
        raise


def listxattr(at: Object) -> list[bytes]:
    """Return all names; none where the file system has no support."""
    try:
        if isinstance(at, int):
            names = os.listxattr(at)
        else:
            names = os.listxattr(_path(at), follow_symlinks=not at.name)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
    return [os.fsencode(name) for name in names]


def setxattr(at: Object, name: bytes, value: bytes) -> None:
    if isinstance(at, int):
        os.setxattr(at, name, value)
    else:
        os.setxattr(_path(at), name, value, follow_symlinks=not at.name)


def removexattr(at: At, name: bytes) -> None:
    os.removexattr(_path(at), name, follow_symlinks=not at.name)


def read(fd: int, size: int, offset: int) -> bytes:
    return os.pread(fd, size, offset)


def write(fd: int, data: bytes, offset: int) -> int:
    """Write `data`, and return how much of it: as with write(2), not all where the disk is full."""
    written = os.pwrite(fd, data, offset)
    try:
        while written < len(data):
            written += os.pwrite(fd, data[written:], offset + written)
    except OSError:
        return written  # what is written counts; the next call will say why there is no more
    return written


def fsync(fd: int, *, data_only: bool = False) -> None:
    if data_only:
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def fsync_directory(directory: int) -> None:
    fd = open_readable(directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def syncfs(directory: int) -> None:
    """Write back the whole file system that `directory` is on."""
    fd = open_readable(directory)
    try:
        _checked(_libc.syncfs(fd))
    finally:
        os.close(fd)


def lock(directory: int) -> int:
    """Take an exclusive flock(2) on a directory; return the descriptor that holds it.

    Raises BlockingIOError if someone else holds it.
    """
    fd = open_readable(directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def copy_data(source: int, target: int, size: int, cancelled: Callable[[], bool]) -> None:
    """Copy `size` bytes into the empty file `target`: as a reflink where possible; holes stay
    holes. Nothing is synchronised.

    Raises ECANCELED soon after `cancelled` has begun to return True.
    """
    if size == 0:
        return
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        _copy_extents(source, target, size, cancelled)


def _copy_extents(source: int, target: int, size: int, cancelled: Callable[[], bool]) -> None:
    copy: Callable[[int, int, int, int], int] = _copy_small if size <= _SMALL_FILE else _copy_range
    position = 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
            end = os.lseek(source, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # a hole up to the end
        end = min(end, size)
        position = start
        while position < end:
            if cancelled():
                raise failure(errno.ECANCELED)
            try:
                copied = copy(source, target, position, min(end - position, _COPY_CHUNK))
            except OSError as error:
                unsupported = error.errno in {
                    errno.EXDEV,
                    errno.EOPNOTSUPP,
                    errno.EINVAL,
                    errno.ENOSYS,
                }
                if copy is not _copy_range or not unsupported:
                    raise
                copy = _send_range
                continue
            if not copied:
                break  # the file has become shorter
            position += copied
    if position < size:
        os.ftruncate(target, size)


def _copy_small(source: int, target: int, position: int, count: int) -> int:
    return write(target, read(source, count, position), position)


def _copy_range(source: int, target: int, position: int, count: int) -> int:
    return os.copy_file_range(source, target, count, position, position)


def _send_range(source: int, target: int, position: int, count: int) -> int:
    """Between file systems that know no copy_file_range(2)."""
    os.lseek(target, position, os.SEEK_SET)
    return os.sendfile(target, source, position, count)


def file_handle(at: At) -> FileHandle | None:
    """Return the object's file handle; None where the file system has none."""
    buffer = ctypes.create_string_buffer(_HANDLE_REQUEST, len(_HANDLE_REQUEST))
    mount = ctypes.c_int()
    flags = 0 if at.name else _AT_EMPTY_PATH
    if _libc.name_to_handle_at(at.directory, at.name, buffer, ctypes.byref(mount), flags) < 0:
        if ctypes.get_errno() in {errno.EOPNOTSUPP, errno.EOVERFLOW, errno.EPERM}:
            return None
        _checked(-1)
    size, kind = struct.unpack_from("Ii", buffer.raw)
    return FileHandle(kind, buffer.raw[8 : 8 + size])


def stat_handle(mount: int, handle: FileHandle) -> os.stat_result | None:
    """Return the stat(2) of the inode that `handle` names on the file system of `mount`; None if it
    is gone.
    """
    buffer = ctypes.create_string_buffer(
        struct.pack("Ii", len(handle.data), handle.kind) + handle.data, 8 + len(handle.data)
    )
    fd = _libc.open_by_handle_at(mount, buffer, os.O_PATH | os.O_CLOEXEC)
    if fd < 0:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def file_system_uuid(directory: int) -> bytes:
    """Return the superblock's 16-byte UUID; zeros where the kernel (before 6.9) or file system
    tells none.
    """
    fd = open_readable(directory)
    try:
        answer = fcntl.ioctl(fd, _FS_IOC_GETFSUUID, bytes(17))
    except OSError:
        return bytes(16)
    finally:
        os.close(fd)
    return answer[1:17] if answer[0] == 16 else bytes(16)
