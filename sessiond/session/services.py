"""What all sessions of one manager share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sessiond.session.halting import Halting
from sessiond.session.images import Images
from sessiond.session.jobs import JobNumbers
from sessiond.session.mounter import Mounter
from sessiond.session.mounts import Mounts
from sessiond.session.observer import Observers
from sessiond.session.store import Store
from sessiond.session.surroundings import Surroundings
from sessiond.session.tree import Check, remove_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """The manager's parts, and its nursery for what outlives a session."""

    store: Store
    images: Images
    mounts: Mounts
    mounter: Mounter
    nursery: trio.Nursery
    halting: Halting
    surroundings: Surroundings = field(default_factory=Surroundings)
    observers: Observers = field(default_factory=Observers)
    job_numbers: JobNumbers = field(default_factory=JobNumbers)
    transfers: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))
    """Threads for exports and imports, which may wait for long; others wait for one of these."""
    _one_at_a_time: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))

    async def delete_trees(
        self, trees: Iterable[Path], remove: Callable[[Path, Check], None] = remove_tree
    ) -> None:
        """Delete directories in a thread; one after another, for others use the disk as well.

        What cannot be deleted is logged, and is garbage to the next start. So is all that is left
        when this is cancelled.
        """
        for tree in trees:
            try:
                await trio.to_thread.run_sync(
                    remove, tree, trio.from_thread.check_cancelled, limiter=self._one_at_a_time
                )
            except OSError as error:
                log.error("Directory %s could not be deleted: %s", tree, error)  # noqa: TRY400

    def delete_soon(self, trees: Iterable[Path]) -> None:
        """The same in the background."""
        self.nursery.start_soon(self.delete_trees, tuple(trees))
