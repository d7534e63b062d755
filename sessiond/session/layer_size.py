"""What a committed layer takes on its disk: counted once, and noted at the layer.

A committed layer never changes, unless it is rebased or merged with another, and no number is used
twice in a session. The note is an extended attribute of the layer's directory, beside its tree: it
goes where the directory goes, and not where only its contents are copied to. It names the layer,
for an emptied directory may become another.

Functions block, and are called in threads.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from sessiond.session.model import LayerNumber
from sessiond.session.tree import Check, tree_bytes

_NOTE = "trusted.sessiond.bytes"
_FORMAT = re.compile(rb"([1-9][0-9]*) ([0-9]{1,16})")


def layer_bytes(layer: Path, number: LayerNumber, check: Check) -> int:
    """Return the bytes that the directory of a committed layer takes, with all in it.

    Raises `OSError`.
    """
    noted = _noted(layer, number)
    if noted is not None:
        return noted
    size = tree_bytes(layer, check)
    with suppress(OSError):  # the disk is full, or this is not root: it is counted again then
        os.setxattr(layer, _NOTE, b"%d %d" % (number, size), follow_symlinks=False)
    return size


def forget_bytes(layer: Path) -> None:
    """Have the layer counted anew. Raises `OSError`."""
    try:
        os.removexattr(layer, _NOTE, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM}:
            raise


def _noted(layer: Path, number: LayerNumber) -> int | None:
    try:
        found = _FORMAT.fullmatch(os.getxattr(layer, _NOTE, follow_symlinks=False))
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM}:
            return None
        raise
    return int(found[2]) if found and int(found[1]) == number else None
