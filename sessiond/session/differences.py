"""What differs between two states of a session: counted, or listed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class _Comparison:
    """One that goes on: of these layers of snapshots, and maybe of the merged view."""

    layers: frozenset[LayerNumber]
    live: bool

    def may_read(self, number: LayerNumber) -> bool:
        # Which layers the view had when the worker began is known to the worker alone.
        return self.live or number in self.layers


class Differences:
    """Those of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._comparisons: set[_Comparison] = set()
        self._readers: dict[LayerNumber, set[_Comparison]] = {}
        """Of layers that are to be deleted: after these comparisons."""

    def postpone(self, number: LayerNumber) -> bool:
        """Say whether a comparison may read that layer, which is not served any more; it is deleted
        after that.
        """
        readers = {one for one in self._comparisons if one.may_read(number)}
        if readers:
            self._readers[number] = readers
        return bool(readers)

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
    def _comparing(self, start: str, end: str) -> Iterator[None]:
        """Keep the layers of both states, which somebody may delete meanwhile."""
        comparison = _Comparison(
            frozenset(
                layer
                for name in (start, end)
                if name
                for layer in self._session.record.snapshot(name).layers
            ),
            live=not end,
        )
        self._comparisons.add(comparison)
        try:
            yield
        finally:
            self._comparisons.remove(comparison)
            self._delete_unread(comparison)

    def _delete_unread(self, ended: _Comparison) -> None:
        for readers in self._readers.values():
            readers.discard(ended)
        unread = {number for number, readers in self._readers.items() if not readers}
        for number in unread:
            del self._readers[number]
        if not self._session.turn.closing:
            self._session.delete_unread(unread - self._session.record.all_layers)

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
