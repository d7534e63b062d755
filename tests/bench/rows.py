"""What rows have in common: units, how much work there is, and why a row may be left out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Unit(Enum):
    """What a figure counts. Less is better, always."""

    NANOSECONDS = "ns"
    BYTES = "B"


class SkippedError(Exception):
    """A row means nothing for a peer, or cannot be run on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work there is."""

    tree: int = 20_000
    """Files of the tree of small files, and of the repository."""
    entries: int = 50_000
    """Files of the one large directory."""
    opened: int = 5_000
    missing: int = 10_000
    created: int = 3_000
    changed: int = 2_000
    read_mib: int = 512
    copied_mib: int = 1024
    written_mib: int = 256
    random_writes: int = 16_384
    packages: int = 3
    changes: tuple[int, ...] = (1, 1_000, 100_000)
    """Files that are changed in a session before it is reset."""
    sessions: tuple[int, ...] = (1, 10, 20)
    readers: int = 10
    """Sessions that read one file."""


QUICK = Scale(
    tree=2_000,
    entries=5_000,
    opened=500,
    missing=1_000,
    created=300,
    changed=200,
    read_mib=64,
    copied_mib=64,
    written_mib=16,
    random_writes=2_048,
    packages=1,
    changes=(1, 100, 1_000),
    sessions=(1, 4),
    readers=3,
)
