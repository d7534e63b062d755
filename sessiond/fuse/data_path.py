"""The data path: how contents and hot metadata get from the layers to the kernel.

`passthrough` and `cached` take the extension; passthrough also Linux 6.9 and CAP_SYS_ADMIN, and
layers that are not themselves on a stacked file system. Where it cannot be had, files are read and
written in the extension.
"""

from __future__ import annotations

import os
import sys

from sessiond.session.model import DataPath

try:
    _flags = sys.getdlopenflags()
    # So that pyfuse3, when it is loaded, finds this module's fuse_session_mount before libfuse's.
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        from sessiond.fuse import _kernel_io  # noqa: F401
    finally:
        sys.setdlopenflags(_flags)
except ModuleNotFoundError:  # it was not built: everything works, only slower
    HAS_EXTENSION = False
else:
    HAS_EXTENSION = True

_VARIABLE = "SESSIOND_DATAPATH"


_PASSTHROUGH_KERNEL = (6, 9)


def available() -> list[DataPath]:
    """Return the data paths that this machine is likely to have, best first."""
    if not HAS_EXTENSION:
        return [DataPath.PLAIN]
    if kernel_version() < _PASSTHROUGH_KERNEL or os.geteuid() != 0:
        return [DataPath.CACHED, DataPath.PLAIN]
    return [DataPath.PASSTHROUGH, DataPath.CACHED, DataPath.PLAIN]


def kernel_version() -> tuple[int, int]:
    """Return the first two numbers of the kernel's release."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)))


def choose(wanted: str) -> DataPath:
    """Return the data path to use for one that is wanted; SESSIOND_DATAPATH overrides it.

    Raises ValueError for one that is none.
    """
    wanted = os.environ.get(_VARIABLE, wanted)
    if wanted not in list(DataPath):
        raise ValueError(f"data path '{wanted}' is none; there are {', '.join(DataPath)}")
    return DataPath(wanted) if HAS_EXTENSION else DataPath.PLAIN
