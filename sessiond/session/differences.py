"""What differs between two states of a session: counted, or listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sessiond.session import rebase
from sessiond.session.model import (
    NO_BREAKDOWN,
    Breakdown,
    ChangeSummary,
    ImageSource,
    LayerNumber,
    Lowers,
    Span,
    Uid,
)

if TYPE_CHECKING:
    from sessiond.session.session import Session


class Differences:
    """Those of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._compared: Counter[LayerNumber] = Counter()
        """Layers that comparisons read: they are deleted after that, if they are to be."""

    def reads(self, number: LayerNumber) -> bool:
        """Say whether a comparison reads that layer."""
        return self._compared[number] > 0

    async def count(
        self, start: str = "", end: str = "", breakdown: Breakdown = NO_BREAKDOWN
    ) -> ChangeSummary:
        """Count what differs between two states: from a snapshot, or the image where `start` is
        empty, to another snapshot, or the merged view as it is now.

        Raises `NoSuchSession`, `NoSuchSnapshot`, `ImageUnavailable`, `Failed`.
        """
        with self._comparing(start, end):
            span = await self._span(start, end)
            return await self._session.view.require().changes(span, breakdown)

    async def write(
        self, target: int, start: str = "", end: str = "", *, reader: Uid | None = None
    ) -> None:
        """Write what differs to a descriptor; see `Mount.diff`.

        States and failures are those of `count`.
        """
        with self._comparing(start, end):
            await self._session.view.require().diff(target, await self._span(start, end), reader)

    @contextmanager
    def _comparing(self, *names: str) -> Iterator[None]:
        """Keep the layers of snapshots, which somebody may delete meanwhile."""
        layers = [
            layer for name in names if name for layer in self._session.record.snapshot(name).layers
        ]
        self._compared.update(layers)
        try:
            yield
        finally:
            self._compared.subtract(layers)
            if not self._session.turn.closing:
                self._session.delete_layers(set(layers) - self._session.record.all_layers)

    async def _span(self, start: str, end: str) -> Span:
        return Span(await self._lowers(start), await self._lowers(end))

    async def _lowers(self, name: str) -> Lowers | None:
        if not name:
            return None
        at = self._session.record.with_new_upper(self._session.record.snapshot(name).layers)
        stack = self._session.view.stack(at, await self._session.view.image())
        return Lowers(stack.lowers, stack.indexes)

    async def shadowed(self, source: ImageSource, target: int) -> None:
        """Write what is shadowed to a descriptor; see `sessiond.session.rebase`.

        Raises `ImageUnavailable`, `Failed`.
        """
        await rebase.write_shadowed(self._session, source, target)
