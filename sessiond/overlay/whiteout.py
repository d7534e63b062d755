"""Whiteouts: the marks in a layer that say that a name of a lower is gone.

Written as a character device 0:0. Read also as an empty regular file with the attribute
``overlay.whiteout``, in a directory whose ``overlay.opaque`` is ``x`` (Linux 6.7).
"""

from __future__ import annotations

import os
import stat as modes

from sessiond.overlay import syscalls
from sessiond.overlay.syscalls import At
from sessiond.overlay.xattrs import OverlayXattrs


def is_whiteout_device(stat: os.stat_result) -> bool:
    return modes.S_ISCHR(stat.st_mode) and stat.st_rdev == 0


def is_whiteout(stat: os.stat_result, at: At, xattrs: OverlayXattrs, *, marked: bool) -> bool:
    """Say whether the object `at` is a whiteout; `marked`: its directory may hold whiteouts of
    files.
    """
    if is_whiteout_device(stat):
        return True
    return (
        marked
        and modes.S_ISREG(stat.st_mode)
        and stat.st_size == 0
        and syscalls.getxattr(at, xattrs.whiteout) is not None
    )
