"""Told when anything is written to the file systems of sessions, rather than looking ever again.

By fanotify(7), for one event only: after that the file systems are left alone until they are
watched again, so that a session that writes is not slowed down. Writing through a mapping causes no
event.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

import trio

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = (
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_char_p,
)

# linux/fanotify.h
_FAN_CLOEXEC = 0x1
_FAN_NONBLOCK = 0x2
_FAN_REPORT_FID = 0x200  # the event names the file, rather than opening it for us
_FAN_MARK_ADD = 0x1
_FAN_MARK_FLUSH = 0x80
_FAN_MARK_FILESYSTEM = 0x100
_FAN_MODIFY = 0x2
_FAN_CREATE = 0x100
_FAN_DELETE = 0x200
_FAN_DELETE_SELF = 0x400
_FAN_ONDIR = 0x40000000
_CHANGES = _FAN_MODIFY | _FAN_CREATE | _FAN_DELETE | _FAN_DELETE_SELF | _FAN_ONDIR

_AT_FDCWD = -100
_BUFFER = 1 << 16


class ActivityWatch:
    """One watcher of any number of file systems; for one task."""

    def __init__(self) -> None:
        flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_REPORT_FID
        self._fd: int = _libc.fanotify_init(ctypes.c_uint(flags), ctypes.c_uint(os.O_RDONLY))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def watch(self, directories: Iterable[Path]) -> bool:
        """Begin to watch the file systems of `directories`.

        False if the kernel cannot, for one at least: before Linux 5.1, or without CAP_SYS_ADMIN;
        or a tmpfs before 5.13. Those that are gone need not be watched.
        """
        if self._fd < 0:
            return False
        refused = [directory for directory in directories if not self._mark(directory)]
        return not refused

    def _mark(self, directory: Path) -> bool:
        flags = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
        path = os.fsencode(directory)
        marked = _libc.fanotify_mark(self._fd, flags, _CHANGES, _AT_FDCWD, path) == 0
        return marked or not directory.exists()

    async def wait(self) -> None:
        """Return after the first change to what is watched, which is not watched any more then."""
        try:
            await trio.lowlevel.wait_readable(self._fd)
        finally:
            flags = _FAN_MARK_FLUSH | _FAN_MARK_FILESYSTEM
            _libc.fanotify_mark(self._fd, flags, 0, _AT_FDCWD, None)
            self._drain()

    def _drain(self) -> None:
        try:
            while os.read(self._fd, _BUFFER):
                pass
        except BlockingIOError:
            pass
