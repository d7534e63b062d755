"""Open files that outlive the manager: kept for it by someone who does not die with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class DescriptorStore(Protocol):
    """Keeps duplicates of descriptors, by name, for the next manager.

    A name is 1 to 255 printable ASCII characters without ``:`` (FDNAME= in sd_notify(3)); session
    ids are. Calls may block for as long as systemd is busy, so make them in threads.
    """

    inherited: Mapping[str, int]
    """What the manager before this one had kept. These descriptors are the caller's to close."""

    def keep(self, name: str, descriptor: int) -> None:
        """Keep a duplicate of `descriptor`, in place of what was kept under `name`.

        It is safe when this returns, even if the manager is killed next. That it cannot be kept is
        logged, no error: what it belongs to works, but would not outlive the manager.
        """

    def drop(self, name: str) -> None:
        """Keep nothing under `name` any more; it is no error if nothing was."""


class NoDescriptorStore:
    """Where nobody keeps anything: the next manager starts with nothing."""

    def __init__(self) -> None:
        self.inherited: Mapping[str, int] = {}

    def keep(self, name: str, descriptor: int) -> None:
        """See `DescriptorStore.keep`."""

    def drop(self, name: str) -> None:
        """See `DescriptorStore.drop`."""
