"""Stacks that have grown deep are made flatter in the background, and nobody notices.

Each layer costs every lookup a little, and from some depth on the extension leaves directories to
Python. So when the merged view has more than `SessionRecord.flatten_above`, those that no snapshot
needs by themselves are merged, from the bottom up, each into the one below it. The worker does
that, a little at a time, with pauses, and never while there is an operation on the session. Nothing
is recorded before a layer is empty: its end is the one thing that is done to the record.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from sessiond.errors import SessiondError
from sessiond.session.faults import explained
from sessiond.session.layer_size import forget_bytes
from sessiond.session.model import LayerNumber, SessionRecord, SessionState
from sessiond.session.mounter import MergeState

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.05
"""Between two moments of work, of a tenth of that."""
_LONG_PAUSE_SECONDS = 30.0
"""After a failure, as by a full disk, or a worker that died."""

FLATTENING = "its layers are being merged, which takes but a moment"
"""The operation by which a layer is given up, as who is refused for it is told."""

Pair = tuple[LayerNumber, LayerNumber]
"""A layer of the merged view, and the one right below it."""


def mergeable(record: SessionRecord) -> list[Pair]:
    """Return the pairs that can be one layer to every snapshot, and to the merged view; bottom
    first.

    In no stack is the lower one the topmost, or has another one than the upper one on it.
    """
    stacks = [(record.upper, *record.layers), *(snapshot.layers for snapshot in record.snapshots)]
    above: dict[LayerNumber, set[LayerNumber | None]] = {}
    for stack in stacks:
        for number, over in zip(stack, (None, *stack[:-1]), strict=True):
            above.setdefault(number, set()).add(over)
    pairs = zip(record.layers, record.layers[1:], strict=False)
    return [(top, bottom) for top, bottom in pairs if above[bottom] == {top}][::-1]


class Flattening:
    """What keeps the stack of one session flat."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._changed = trio.Event()
        self._at_work = trio.Lock()
        self._impossible: set[Pair] = set()
        self.merging: frozenset[LayerNumber] = frozenset()
        """The two that are being merged."""

    def consider(self) -> None:
        """The session's stack is another one."""
        self._changed.set()

    async def rest(self) -> None:
        """Return when nothing is moved; that begins again when no operation is going on."""
        async with self._at_work:
            pass

    async def run(self) -> None:
        """Flatten the stack whenever it is deep."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while (pair := self._next()) is not None:
                if not await self._merge(pair):
                    break

    def _next(self) -> Pair | None:
        record = self._session.record
        if len(record.layers) <= record.flatten_above:
            return None
        pairs = (pair for pair in mergeable(record) if pair not in self._impossible)
        return next(pairs, None)

    async def _merge(self, pair: Pair) -> bool:
        """Merge two layers; return whether it makes sense to look for others at once."""
        self.merging = frozenset(pair)
        try:
            await self._forget_sizes(pair)
            state = MergeState.MORE
            while state is MergeState.MORE:
                await trio.sleep(_PAUSE_SECONDS)
                await self._session.turn.become_idle()
                if pair not in mergeable(self._session.record):
                    return True
                if self._session.view.mount is None:
                    return False  # it is considered again when there is one
                state = await self._advance(pair)
            if state is MergeState.NEVER:
                if pair in mergeable(self._session.record):
                    self._impossible.add(pair)
                return True
            # Before the record says so: what has moved has to be found there.
            await self._session.view.require().sync()
            await self._session.turn.become_idle()
            await self._publish(pair)
        except SessiondError as error:
            log.info("Session %s is not flattened for now: %s", self._session.id, error)
            await trio.sleep(_LONG_PAUSE_SECONDS)
        finally:
            self.merging = frozenset()
            self._session.upkeep.recount(pair)
        return True

    async def _forget_sizes(self, pair: Pair) -> None:
        session, store = self._session, self._session.services.store
        for number in pair:
            with explained(f"merge layers of session {session.id}"):
                layer = store.layer(session.record, number)
                await trio.to_thread.run_sync(forget_bytes, layer)

    async def _advance(self, pair: Pair) -> MergeState:
        session, store = self._session, self._session.services.store
        top, bottom = (store.layer(session.record, number) / "fs" for number in pair)
        async with self._at_work:
            if not session.turn.is_idle or session.transfers.read_layers:
                return MergeState.MORE
            return await session.view.require().merge(top, bottom)

    async def _publish(self, pair: Pair) -> None:
        """Let go of the upper one, which is empty; no checkpoint since the session was idle."""
        session = self._session
        if pair in mergeable(session.record) and not session.transfers.read_layers:
            with session.turn.operating(FLATTENING, SessionState.ACTIVE):
                await session.replace_layers(session.record.without_layer(pair[0]))
                log.info("Session %s: layer %d is merged with layer %d.", session.id, *pair)
