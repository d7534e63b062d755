"""Small files that are replaced atomically, and durably, even on a disk that is full.

Beside ``NAME`` lies ``NAME.spare``, a file whose blocks are there already. It is overwritten and
exchanged for the other, which then is the spare one. So nothing has to be allocated, and nobody who
fills the disk at the same moment can get in between. Both are filled up with newlines.

On a file system that never writes in place, such as btrfs, that takes free space after all.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sessiond.overlay import syscalls
from sessiond.overlay.syscalls import At

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What writing fails with where there is no space left."""

_BLOCK = 4096
_ROOM = 1024
_OPEN = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def replace(file: Path, text: bytes) -> None:
    """Make `text`, followed by newlines, the contents of `file`; on disk when this returns.

    The next time takes no space if that text is not twice as long. Raises `OSError`; the contents
    before still count then.
    """
    directory = syscalls.open_root(os.fsencode(file.parent))
    try:
        name, spare = (At(directory, os.fsencode(path.name)) for path in (file, spare_of(file)))
        size = _write(spare, text)
        exchange = 0 if syscalls.stat_or_none(name) is None else syscalls.RENAME_EXCHANGE
        syscalls.rename(spare, name, exchange)
        try:
            _extend(spare, size, at_least=len(text))
            syscalls.fsync_directory(directory)
        except OSError:
            syscalls.rename(name, spare, exchange)
            raise
    finally:
        os.close(directory)


def spare_of(file: Path) -> Path:
    """Return the file that lies beside `file`."""
    return file.with_name(file.name + ".spare")


def _write(at: At, text: bytes) -> int:
    """Overwrite or make a file, with room for more if there is any; return its size."""
    fd = os.open(at.name, _OPEN, 0o600, dir_fd=at.directory)
    try:
        size = os.fstat(fd).st_size
        wanted = max(size, -(-(2 * len(text) + _ROOM) // _BLOCK) * _BLOCK)
        try:
            _put(fd, text.ljust(wanted, b"\n"), 0)
        except OSError as error:
            if error.errno not in FULL or len(text) > size:
                raise
            _put(fd, text.ljust(size, b"\n"), 0)
            return size
        return wanted
    finally:
        os.close(fd)


def _extend(at: At, size: int, *, at_least: int) -> None:
    """Make a file as large as `size`, if there is space; raise `OSError` if not `at_least` so."""
    fd = os.open(at.name, _OPEN, 0o600, dir_fd=at.directory)
    try:
        present = os.fstat(fd).st_size
        if present < size:
            _put(fd, b"\n" * (size - present), present)
    except OSError as error:
        if error.errno not in FULL or present < at_least:
            raise
    finally:
        os.close(fd)


def _put(fd: int, data: bytes, offset: int) -> None:
    if syscalls.write(fd, data, offset) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    syscalls.fsync(fd)
