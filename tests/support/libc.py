"""System calls that the standard library lacks, for tests."""

from __future__ import annotations

import ctypes
import os

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

MS_RDONLY = 0x1
MS_NOATIME = 0x400
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2

_AT_FDCWD = -100
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: str | None = None, other: str | None = None) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path, None, other)


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2); raises `OSError` naming `target`."""
    names = (os.fsencode(source), os.fsencode(target), kind.encode())
    _check(_libc.mount(*names, ctypes.c_ulong(flags), os.fsencode(data)), target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2); raises `OSError` naming `target`."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def renameat2(source: str, target: str, flags: int) -> None:
    """renameat2(2) on paths; raises `OSError` naming both."""
    _check(
        _libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags),
        source,
        target,
    )


def utimensat(path: str, access: tuple[int, int], modification: tuple[int, int]) -> None:
    """utimensat(2). Times are seconds and nanoseconds; or UTIME_* in place of the latter."""
    times = (ctypes.c_long * 4)(*access, *modification)
    _check(_libc.utimensat(_AT_FDCWD, os.fsencode(path), times, 0), path)


def syncfs(descriptor: int) -> None:
    """syncfs(2)."""
    _check(_libc.syncfs(descriptor))


def die_with_parent(signal: int) -> None:
    """Have the kernel send `signal` to this process when its parent's thread ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0))


def adopt_orphans(adopt: bool) -> None:
    """Become, or cease to be, the parent of descendants whose own parent has ended."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0))


class Directory:
    """An open directory stream, for telldir(3), seekdir(3) and rewinddir(3)."""

    class _Dirent(ctypes.Structure):
        _fields_ = (
            ("d_ino", ctypes.c_uint64),
            ("d_off", ctypes.c_int64),
            ("d_reclen", ctypes.c_ushort),
            ("d_type", ctypes.c_ubyte),
            ("d_name", ctypes.c_char * 256),
        )

    def __init__(self, path: str) -> None:
        """Open `path`; raises `OSError`."""
        self._stream = ctypes.c_void_p(_opendir(os.fsencode(path)))
        if not self._stream:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)

    def read(self) -> tuple[bytes, int, int] | None:
        """Return the next entry's name, inode number and type (DT_*), or None at the end."""
        ctypes.set_errno(0)
        entry = _readdir(self._stream)
        if not entry:
            _check(-ctypes.get_errno())
            return None
        return entry.contents.d_name, entry.contents.d_ino, entry.contents.d_type

    def rest(self) -> list[bytes]:
        """Return the names from here to the end, without ``.`` and ``..``."""
        names = []
        while (entry := self.read()) is not None:
            if entry[0] not in (b".", b".."):
                names.append(entry[0])
        return names

    def tell(self) -> int:
        """Return the position, to be given to `seek`."""
        return int(_telldir(self._stream))

    def seek(self, position: int) -> None:
        """Go back to a position returned by `tell`."""
        _libc.seekdir(self._stream, ctypes.c_long(position))

    def rewind(self) -> None:
        """Start over, seeing changes made since."""
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        """Close the stream."""
        _check(_libc.closedir(self._stream))


_opendir = _libc.opendir
_opendir.restype = ctypes.c_void_p
_readdir = _libc.readdir
_readdir.restype = ctypes.POINTER(Directory._Dirent)
_telldir = _libc.telldir
_telldir.restype = ctypes.c_long
