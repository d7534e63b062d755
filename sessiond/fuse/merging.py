"""What a worker does to make two of its lowers one, a little at a time, between two requests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from sessiond import control
from sessiond.control import LayerStack, Reply
from sessiond.fuse.operations import OverlayOperations
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.flatten import Merge, open_merged

_STEP_SECONDS = 0.005
"""For which requests wait at most, but for the last change."""


class Merging:
    """The merge that is under way, if any.

    It is about layers that are served and that nobody else changes, and is forgotten when others
    are.
    """

    def __init__(self, operations: OverlayOperations) -> None:
        self._operations = operations
        self._of: tuple[Path, Path] | None = None
        self._merge: Merge | None = None
        self._survey: Iterator[str] = iter(())
        self._steps: Iterator[None] = iter(())

    def close(self) -> None:
        """Leave it as it is; another one can go on with it."""
        if self._merge is not None:
            self._merge.close()
        self._merge = self._of = None

    def advance(self, request: control.MergeLayers, layers: LayerStack) -> Reply:
        """Go on for a moment. Raises OSError; what was done until then is done."""
        if self._of != (request.top, request.bottom):
            self.close()
            self._begin(request, layers)
        if self._operations.is_copying_up:  # from a place that might move
            return Reply(merging="more")
        end = time.monotonic() + _STEP_SECONDS
        try:
            for obstacle in self._survey:
                if obstacle:
                    self.close()
                    return Reply(merging="never", obstacle=obstacle)
                if time.monotonic() >= end:
                    return Reply(merging="more")
            return Reply(merging="done" if self._step(end) else "more")
        except BaseException:
            self.close()
            raise

    def _begin(self, request: control.MergeLayers, layers: LayerStack) -> None:
        self._of = request.top, request.bottom
        position = layers.lowers.index(request.top) if request.top in layers.lowers else -1
        # The last one is the image.
        if position < 0 or layers.lowers[position + 1 : -1][:1] != (request.bottom,):
            self._survey = iter(["they do not lie on each other"])
            return
        below = self._operations.view.stack.lowers[position + 2 :]
        top, bottom = open_merged(request.top), open_merged(request.bottom)
        self._merge = merge = Merge(top, bottom, tuple(layer.copy() for layer in below))
        self._survey, self._steps = merge.survey(), merge.steps()

    def _step(self, end: float) -> bool:
        """Make changes until `end`; return whether that was all."""
        try:
            return all(time.monotonic() < end for _ in self._steps)
        finally:
            assert self._of is not None
            _tell(self._operations.exchange, self._of)


def _tell(exchange: Exchange, layers: tuple[Path, Path]) -> None:
    """Let it be known where to look anew."""
    paths = [path for fs in layers for path in (fs, fs.parent / "work/index") if path.is_dir()]
    exchange.lowers_changed({(stat.st_dev, stat.st_ino) for stat in map(os.stat, paths)})
