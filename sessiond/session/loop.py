"""Loop devices: an image file as a block device, with direct I/O.

With direct I/O the blocks of an image are cached once, by the file system in it, and not a second
time as pages of the file. Where that cannot be, because the file's file system has no direct I/O,
or only in blocks larger than those of the image, the device reads through the page cache.

No death leaves a device behind: it clears itself when nobody has it open or mounted any more, and
it is open here from the system call that sets it up. All functions block. See loop(4).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONTROL = "/dev/loop-control"
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_READ_ONLY = 1
_AUTOCLEAR = 4
_DIRECT_IO = 16
_NAME_SIZE = 64
_BLOCK = 512
"""Bytes: no file system is refused for it, unlike for the larger one that direct I/O may want."""
_CONFIG = struct.Struct("=II 52x I 64s 112x 64x")
"""struct loop_config: the file, its block size, of struct loop_info64 the flags and the name, and
room for later use.
"""
_ATTEMPTS = 100


@contextmanager
def attached(image: Path) -> Iterator[Path]:
    """Attach `image` to a device, read-only, and hand that out.

    What is mounted or opened from it in the context keeps the device from then on. Raises
    `OSError`.
    """
    file = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device, path = _set_up(file, os.fsencode(image))
    finally:
        os.close(file)
    try:
        yield path
    finally:
        os.close(device)


def _set_up(file: int, name: bytes) -> tuple[int, Path]:
    flags = _READ_ONLY | _AUTOCLEAR | _DIRECT_IO
    configuration = _CONFIG.pack(file, _BLOCK, flags, name[: _NAME_SIZE - 1])
    for _ in range(_ATTEMPTS):
        path = _free()
        device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, configuration)
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:  # or else another process was quicker
                raise
        else:
            return device, path
    raise OSError(errno.EBUSY, "all loop devices are taken by others", _CONTROL)


def _free() -> Path:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
    finally:
        os.close(control)
