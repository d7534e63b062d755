"""Programs that write past the overlay, while the layers under them are exchanged."""

from __future__ import annotations

import os

from sessiond.overlay.fastpath import FastPath
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack
from tests.crash.layers import Bench, leftovers
from tests.support import core_views
from tests.support.core_views import find
from tests.support.mounts import Layers
from tests.support.trees import Snapshot

WRITTEN = b"what programs have written"


class Writers(FastPath):
    """Programs that have files open for writing, past the overlay."""

    def __init__(self, *, recorded: bool = False) -> None:
        """`recorded`: see `FastPath`."""
        self.recorded = recorded
        self._files: dict[int, int] = {}

    def open(self, overlay: Overlay, path: str) -> int:
        """Open a file as a program would; return its descriptor."""
        node = find(overlay, path)
        overlay.view.refer(node)
        overlay.make_writable(node)
        self._files[node.number] = overlay.view.open_contents(node, write=True)
        return self._files[node.number]

    def note(self, number: int, which: int, data: bytes, /) -> bool:
        """See `FastPath`."""
        return self.recorded

    def opened(self) -> list[int]:
        """See `FastPath`."""
        return list(self._files)

    def is_open(self, number: int, /) -> bool:
        """See `FastPath`."""
        return number in self._files

    def writers(self, number: int, /) -> int:
        """See `FastPath`."""
        return int(number in self._files)

    def duplicate(self, number: int, /) -> int:
        """See `FastPath`."""
        return os.dup(self._files[number])


def stack_of(layers: Layers, bench: Bench, *frozen: Layers) -> Stack:
    """Return the upper of `layers` over `frozen` ones, topmost first, over the lowers."""
    below = [layer.upper or "" for layer in frozen]
    indexes = [f"{layer.work}/index" for layer in frozen]
    return Stack.open(
        [os.fsencode(path) for path in (*below, *bench.lowers)],
        os.fsencode(layers.upper or ""),
        os.fsencode(layers.work or ""),
        indexes=[os.fsencode(path) for path in indexes],
    )


def view_of(stack: Stack, bench: Bench) -> Snapshot:
    """Return the merged view of `stack`, which is closed."""
    overlay = Overlay(stack)
    try:
        assert leftovers(overlay) == []
        return core_views.snapshot(overlay, recent_ns=bench.start_ns)
    finally:
        overlay.close()
