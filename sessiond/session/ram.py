"""How much RAM the volatile sessions of a machine may take, one and all.

A tmpfs takes what is written to it, up to its limit, from everyone. So a new one is made only if
the limits of all together can be honoured. What the others may take is asked of the kernel, and
nowhere else written down: so it is right whatever ended, moved to disk or crashed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sessiond.errors import NoSpace
from sessiond.session.model import SessionId
from sessiond.session.mounts import Mounts

INODE_BYTES = 1536
"""What a file of a tmpfs takes of the kernel's memory, which its size does not count: 1050 bytes,
and 450 more for a long name (x86-64, Linux 6.18).
"""
BYTES_PER_INODE = 16384
"""Unless another number is asked for, there may be a file for each so many bytes, as mke2fs has it.

The kernel's own default would be one for two pages of the machine's RAM, whatever the size.
"""
_LEAST_INODES = 1024
_SUFFIXES = {"K": 10, "M": 20, "G": 30, "T": 40}


class Limits(NamedTuple):
    """Of a tmpfs."""

    bytes: int
    inodes: int

    @property
    def ram(self) -> int:
        """What it can take of the machine's RAM at most, in bytes."""
        return self.bytes + self.inodes * INODE_BYTES


def size_in_bytes(text: str, whole: int = 0) -> int:
    """Return what ``512M``, ``2G`` or, as a part of `whole`, ``50%`` stands for."""
    if text.endswith("%"):
        return whole * int(text[:-1]) // 100
    shift = _SUFFIXES.get(text[-1].upper())
    return int(text) if shift is None else int(text[:-1]) << shift


def machine_ram() -> int:
    """Return the machine's RAM in bytes, as the kernel counts it for a tmpfs."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limits(size: str, inodes: int | None) -> Limits:
    """Return the limits for a profile's `size` and `inodes`; there always are both."""
    total = size_in_bytes(size, machine_ram())
    return Limits(total, default_inodes(total) if inodes is None else inodes)


def default_inodes(size: int) -> int:
    """Return how many files there may be on `size` bytes."""
    return max(size // BYTES_PER_INODE, _LEAST_INODES)


class RamBudget:
    """What volatile sessions may take together: `limit`, like ``85%``, or ``none``."""

    def __init__(self, sessions: Path, limit: str, mounts: Mounts) -> None:
        """`sessions` is the directory above the sessions' runtime directories."""
        self._sessions = sessions
        self._limit = limit
        self._mounts = mounts
        self._claiming = threading.Lock()

    @contextmanager
    def claim(self, session: SessionId, wanted: Limits) -> Iterator[None]:
        """Mount a tmpfs with the limits `wanted` inside, for it is known here only then.

        Raises `NoSpace` if it would be too much.
        """
        with self._claiming:
            if self._limit != "none":
                self._require(session, wanted)
            yield

    def _require(self, session: SessionId, wanted: Limits) -> None:
        allowed = size_in_bytes(self._limit, machine_ram())
        taken = [self._mounts.tmpfs_limits(storage) for storage in self._storages()]
        free = allowed - sum(Limits(*limits).ram for limits in taken)
        if wanted.ram > free:
            raise NoSpace(
                f"Session {session} may take up to {shown_size(wanted.ram)} of RAM, and of the "
                f"{shown_size(allowed)} for all volatile sessions the limits of the {len(taken)} "
                f"that there are leave {shown_size(max(free, 0))}. Close some, give the profile a "
                "smaller 'size', or raise 'volatile_limit' in [daemon]."
            )

    def _storages(self) -> list[Path]:
        return [
            target
            for target in self._mounts.mounted_below(self._sessions)
            if target == self._sessions / target.parent.name / "storage"
        ]


def shown_size(size: int) -> str:
    """Return a number of bytes as people read it."""
    number = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
