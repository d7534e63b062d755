"""What the kernel's overlayfs has mounted, which holds no lock that another program could see."""

from __future__ import annotations

import errno
import os
import re

_OCTAL = re.compile(rb"\\([0-7]{3})")


def refuse_mounted(*directories: bytes) -> None:
    """Raise OSError, EBUSY, if one of `directories` is upper or workdir of an overlayfs mount: two
    writers would damage it.

    Only mounts of this mount namespace are seen, and those that were given absolute paths.
    """
    asked = {os.path.realpath(directory): directory for directory in directories}
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            _, _, super_fields = line.partition(b" - ")
            kind, _, super_options = super_fields.rstrip(b"\n").split(b" ", 2)
            if kind != b"overlay":
                continue
            for option in super_options.split(b","):
                name, _, value = option.partition(b"=")
                if name not in {b"upperdir", b"workdir"}:
                    continue
                if (used := asked.get(os.path.realpath(_unescaped(value)))) is not None:
                    raise OSError(errno.EBUSY, "in use by a mount of the kernel's overlayfs", used)


def _unescaped(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)
