"""How full a session's storage is, and when to warn of it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from pathlib import Path

from sessiond.session import quota
from sessiond.session.model import SpaceThresholds, Usage

_HYSTERESIS = 0.05
"""A level is left only when the storage is this much emptier than where it began."""


class SpaceLevel(StrEnum):
    """How urgent it is; published as the property `SpaceLevel`, with the signal `SpaceLow`."""

    NORMAL = "normal"
    WARNING = "warning"
    CRITICAL = "critical"


class LimitedBy(Enum):
    """What keeps a session from taking more."""

    FILE_SYSTEM = auto()
    """Its storage is a file system of its own."""
    QUOTA = auto()
    NOTHING = auto()
    """It may fill the file system that it shares with others."""


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

    What is reserved for root counts neither as used nor as there to be used, as in df(1).
    """
    found = os.statvfs(directory)
    used = found.f_blocks - found.f_bfree
    return Space(
        bytes_used=used * found.f_frsize,
        bytes_total=(used + found.f_bavail) * found.f_frsize,
        inodes_used=found.f_files - found.f_ffree,
        inodes_total=found.f_files,
    )


class SpaceWatch:
    """Remembers what was found last, so that changes are told once."""

    def __init__(self, thresholds: SpaceThresholds) -> None:
        self.level = SpaceLevel.NORMAL
        """As `new_level` found it last."""
        self._thresholds = thresholds
        self._usage = Usage(0, 0, 0, 0)

    def usage(self, directory: Path, limited_by: LimitedBy) -> Usage:
        """What is used of the storage `directory`; when that is gone, what was used at last."""
        with suppress(OSError):
            self._usage = _usage(directory, limited_by)
        return self._usage

    def new_level(self, space: Space) -> SpaceLevel | None:
        """Return the level that `space` is at, if that is another one than the last time."""
        level = next_level(self.level, space.used_part, self._thresholds)
        if level is self.level:
            return None
        self.level = level
        return level


def _usage(directory: Path, limited_by: LimitedBy) -> Usage:
    if limited_by is LimitedBy.QUOTA:
        # statvfs(2) shows the limit as well, but as used what others have taken of the rest.
        return Usage(*quota.counted(directory))
    space = measure(directory)
    limited = limited_by is LimitedBy.FILE_SYSTEM
    return Usage(
        bytes_used=space.bytes_used,
        bytes_limit=space.bytes_total if limited else 0,
        inodes_used=space.inodes_used,
        inodes_limit=space.inodes_total if limited else 0,
    )


def next_level(level: SpaceLevel, used_part: float, thresholds: SpaceThresholds) -> SpaceLevel:
    """The level after `level`, now that `used_part` is used."""
    begins = {
        SpaceLevel.CRITICAL: thresholds.critical / 100,
        SpaceLevel.WARNING: thresholds.warning / 100,
    }
    for candidate, begin in begins.items():
        # A storage that hovers around a threshold must not warn again and again.
        held = level is SpaceLevel.CRITICAL or level is candidate
        if used_part >= (begin - _HYSTERESIS if held else begin):
            return candidate
    return SpaceLevel.NORMAL
