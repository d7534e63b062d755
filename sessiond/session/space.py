"""How full a session's storage is, and when to warn of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sessiond.session.model import Usage

_HYSTERESIS = 0.05
"""A level is left only when the storage is this much emptier than where it began."""


class SpaceLevel(StrEnum):
    """How urgent it is; published with the signal `SpaceLow`."""

    NORMAL = "normal"
    WARNING = "warning"
    CRITICAL = "critical"


_BEGINS = {SpaceLevel.CRITICAL: 0.95, SpaceLevel.WARNING: 0.80}


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes and inodes of a file system; a total of 0 means that it does not limit them."""

    bytes_used: int
    bytes_total: int
    inodes_used: int
    inodes_total: int

    @property
    def used_part(self) -> float:
        """Between 0 and 1: of bytes or of inodes, whichever is nearer to its end."""
        return max(
            self.bytes_used / self.bytes_total if self.bytes_total else 0.0,
            self.inodes_used / self.inodes_total if self.inodes_total else 0.0,
        )


def measure(directory: Path) -> Space:
    """Ask the file system that holds `directory`. Raises `OSError`.

    What is reserved for root counts as used: it is no help to a session.
    """
    found = os.statvfs(directory)
    return Space(
        bytes_used=(found.f_blocks - found.f_bavail) * found.f_frsize,
        bytes_total=found.f_blocks * found.f_frsize,
        inodes_used=found.f_files - found.f_ffree,
        inodes_total=found.f_files,
    )


class SpaceWatch:
    """Remembers what was found last, so that changes are told once."""

    def __init__(self) -> None:
        self._level = SpaceLevel.NORMAL
        self._usage = Usage(0, 0, 0, 0)

    def usage(self, directory: Path, *, limited: bool) -> Usage:
        """What is used of the storage `directory`; when that is gone, what was used at last.

        Where the session's storage is not `limited`, it shares a file system with others.
        """
        try:
            space = measure(directory)
        except OSError:
            return self._usage
        self._usage = Usage(
            bytes_used=space.bytes_used,
            bytes_limit=space.bytes_total if limited else 0,
            inodes_used=space.inodes_used,
            inodes_limit=space.inodes_total if limited else 0,
        )
        return self._usage

    def new_level(self, space: Space) -> SpaceLevel | None:
        """Return the level that `space` is at, if that is another one than the last time."""
        level = next_level(self._level, space.used_part)
        if level is self._level:
            return None
        self._level = level
        return level


def next_level(level: SpaceLevel, used_part: float) -> SpaceLevel:
    """The level after `level`, now that `used_part` is used."""
    for candidate, begin in _BEGINS.items():
        # A storage that hovers around a threshold must not warn again and again.
        held = level is SpaceLevel.CRITICAL or level is candidate
        if used_part >= (begin - _HYSTERESIS if held else begin):
            return candidate
    return SpaceLevel.NORMAL
