"""How much differs below each directory: where the space went."""

from __future__ import annotations

import heapq
from typing import NamedTuple

PATH_LIMIT = 4095
"""Bytes of a path that programs can use (PATH_MAX)."""


class DirectorySums(NamedTuple):
    """How much differs below one directory."""

    path: bytes
    kinds: tuple[int, ...]
    """How many names, by kind, in the order of `ChangeKind`."""
    bytes: int
    """In the regular files that differ and are there."""


class ByDirectory:
    """Adds up what differs below each directory, down to a depth."""

    def __init__(self, most: int, depth: int) -> None:
        """`most`: directories to be told. `depth`: levels below the root; 0 is the root alone."""
        self._most = most
        self._depth = depth
        self._kinds: dict[bytes, list[int]] = {}
        self._bytes: dict[bytes, int] = {}

    def add(self, directory: bytes, kinds: tuple[int, ...], size: int) -> None:
        """Count what differs in `directory`, by its path, for it and those above it.

        Numbers below zero take back what was counted before.
        """
        names = directory.split(b"/", self._depth)[: self._depth] if directory else []
        for depth in range(len(names) + 1):
            path = b"/".join(names[:depth])
            if path not in self._kinds:
                self._kinds[path], self._bytes[path] = [0] * len(kinds), 0
            sums = self._kinds[path]
            for kind, count in enumerate(kinds):
                sums[kind] += count
            self._bytes[path] += size

    def largest(self) -> tuple[DirectorySums, ...]:
        """Return those with most bytes, largest first; so each comes after those above it."""
        named = [
            path for path, kinds in self._kinds.items() if any(kinds) and len(path) < PATH_LIMIT
        ]
        largest = heapq.nsmallest(
            self._most,
            named,
            key=lambda path: (-self._bytes[path], -sum(self._kinds[path]), path),
        )
        return tuple(
            DirectorySums(path, tuple(self._kinds[path]), self._bytes[path]) for path in largest
        )
