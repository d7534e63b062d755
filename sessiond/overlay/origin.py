"""File handles as the kernel's overlayfs stores them: the origin of a copy-up, and names in the
index.

Format: struct ovl_fb of fs/overlayfs/overlayfs.h.
"""

from __future__ import annotations

import os
import struct
import sys

from sessiond.overlay import syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.syscalls import At, FileHandle

_HEADER = struct.Struct("BBBBB16s")
_VERSION = 0
_MAGIC = 0xFB
_CPU_ENDIAN = 0 if sys.byteorder == "little" else 1
_ANY_ENDIAN = 2
_LIMIT = 127
"""Bytes of a handle whose name in the index is no longer than a name may be."""


def encode(layer: Layer, at: At) -> bytes | None:
    """Return the handle of an object of a lower; None where the file system has no handles."""
    handle = syscalls.file_handle(at)
    if handle is None:
        return None
    size = _HEADER.size + len(handle.data)
    if size > _LIMIT:
        return None
    return _HEADER.pack(_VERSION, _MAGIC, size, _CPU_ENDIAN, handle.kind, layer.uuid) + handle.data


def is_well_formed(value: bytes) -> bool:
    """Say whether `value` is a file handle in the kernel's form, of whatever version and machine
    (ovl_check_fh_len).
    """
    return len(value) > _HEADER.size and value[1] == _MAGIC and value[2] == len(value)


def is_handle(value: bytes) -> bool:
    """Say whether an attribute's value is one that `encode` may have returned on this machine."""
    if not is_well_formed(value) or len(value) > _LIMIT:
        return False
    version, _, _, flags, _, _ = _HEADER.unpack_from(value)
    return version == _VERSION and (flags & 1 == _CPU_ENDIAN or bool(flags & _ANY_ENDIAN))


def decode(value: bytes, lowers: tuple[Layer, ...]) -> os.stat_result | None:
    """Return the stat(2) of the lower inode that `value` names; None if it is none, or gone."""
    if not is_handle(value):
        return None
    *_, kind, uuid = _HEADER.unpack_from(value)
    handle = FileHandle(kind, value[_HEADER.size :])
    tried = set()
    for layer in lowers:
        if layer.uuid != uuid or layer.device in tried:
            continue
        tried.add(layer.device)
        if (found := layer.stat_handle(handle)) is not None:
            return found
    return None


def index_name(value: bytes) -> bytes:
    """Return the name in the index directory of the lower inode with handle `value`.

    Precondition: `is_handle`.
    """
    return value.hex().encode()
