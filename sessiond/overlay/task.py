"""What is to be copied from a merged view to a layer over its image: what differs from that."""

from __future__ import annotations

from typing import NamedTuple

from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import Entry, Presence


class Task(NamedTuple):
    """An object to be copied, or to be gone, and a directory once more when it is complete."""

    path: bytes
    entry: Entry
    """What the merged view shows."""
    below: Entry
    """What the image shows there."""
    finish: bool = False
    """All that is in the directory has come before."""

    def merges(self, image: Layer) -> bool:
        """Say whether what `image` has at the path is part of what the merged view shows."""
        lowers = self.entry.lowers
        return bool(lowers) and lowers[-1].layer is image and lowers[-1].path == self.path

    def is_of(self, image: Layer) -> bool:
        """Say whether the object, and all in it, is that of `image` at the same path."""
        if not self.entry.positive:
            return not self.below.positive
        alone = self.entry.presence is Presence.LOWER and len(self.entry.lowers) == 1
        return alone and self.merges(image)
