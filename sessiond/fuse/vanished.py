"""Directories that a swap has taken away, and what the kernel still caches of them.

Nobody finds what is below them any more, so the kernel need not be told of it by name, and nobody
waits. But it would keep that, and the worker its nodes, until memory is short.
"""

from __future__ import annotations

import trio

from sessiond.fuse import device
from sessiond.overlay.view import View


class Vanished:
    """Those of one mount."""

    def __init__(self, view: View, nursery: trio.Nursery) -> None:
        self._view = view
        self._nursery = nursery
        self._directories: list[tuple[int, bytes, int]] = []
        self._at_work = trio.Lock()

    def drop(self, directories: list[tuple[int, bytes, int]]) -> None:
        """Have the kernel let go of them, in the background: see `device.drop_directory`."""
        if not self._directories:
            self._nursery.start_soon(self._run)
        self._directories += directories

    async def leave(self) -> None:
        """Return when no more is dropped: other layers may have these directories again.

        To be called while changes pass: one may hold the lock that a drop waits for.
        """
        self._directories.clear()
        async with self._at_work:
            pass

    async def _run(self) -> None:
        while self._directories:
            async with self._at_work:
                if self._directories:
                    await self._drop(*self._directories.pop())

    async def _drop(self, parent: int, name: bytes, number: int) -> None:
        view = self._view
        if view.nodes.get(number) is None or view.node(number).linked:
            return  # the kernel has forgotten it, or the layers have been exchanged back
        # The worker may end meanwhile, and then nobody lets the kernel go on.
        await trio.to_thread.run_sync(
            device.drop_directory, parent, name, number, abandon_on_cancel=True
        )
