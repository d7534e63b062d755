"""What answers requests for the overlay, without the overlay's being asked."""

from __future__ import annotations

from typing import NamedTuple


class Inherited(NamedTuple):
    """What a predecessor of this process has left of a node that the kernel holds.

    There is one for each node that has not just one name, and no facts; the others are found as if
    they had not been claimed.
    """

    number: int
    kind: int
    """``S_IFMT``, or 0 if that is not known."""
    names: list[tuple[int, bytes]]
    """Number of the directory, and name in it. Some may have gone when the predecessor died."""
    facts: dict[int, bytes]


class FastPath:
    """Knows nodes that the overlay has none for, and holds files open. This one does neither.

    It answers for what only the bottom layer has a say in, until the overlay needs a node for it.
    """

    def claim(self, number: int, /) -> int:
        """Leave a node to the overlay; return how many references the kernel holds to it."""
        return 0

    def place(self, number: int, /) -> tuple[int, int, bytes] | None:
        """Return the type, the directory, and the name in it, of a node that is not claimed."""
        return None

    def shows_image(self, number: int, /) -> bool:
        """Say whether the kernel may have contents of the image cached under that number."""
        return False

    def serve(
        self, number: int, descriptors: tuple[int, ...], bottom: bool, numbering: int, /
    ) -> bool:
        """Answer for names in a directory, of which these are the real parts, topmost first.

        With `bottom`, the last is the bottom layer's, and `numbering` is what is added to an inode
        number there to make a node's number. Returns whether it will answer.
        """
        return False

    def is_served(self, number: int, /) -> bool:
        """Say whether it does so; it may stop at any time."""
        return True

    def withdraw(self, number: int, /) -> None:
        """Forget which real directories or contents a node has: they are changing."""

    def names(self) -> list[tuple[int, bytes]]:
        """Return the names that the kernel may know of nodes that have not been claimed, and those
        that it may know to be missing: number of the directory, and name in it.
        """
        return []

    def begin_generation(self) -> list[int]:
        """Forget all layers; return the numbers of directories that have not been claimed."""
        return []

    def is_open(self, number: int, /) -> bool:
        """Say whether someone has, or may have, the file open."""
        return False

    def opened(self) -> list[int] | None:
        """Return the numbers of files that are open past the overlay; None if that is not known."""
        return []

    def holds(self, number: int, /) -> bool:
        """Say whether the contents stay within reach of who has them open, wherever the file is."""
        return True

    def writers(self, number: int, /) -> int:
        """Return how many have the file open for writing past the overlay (by passthrough)."""
        return 0

    def keep(self, number: int, /) -> None:
        """Go on with the contents as they are open now, until the last close, which is told."""

    def closes(self, number: int, /) -> int:
        """Return how often contents that are kept have been closed."""
        return 0

    def finish(self, number: int, closes: int, /) -> bool:
        """Close contents that were kept. False if someone has them open or mapped, or they were
        closed once more than `closes`.
        """
        return True

    def give_up(self, number: int, /) -> None:
        """Keep contents no longer: they are where they belong."""

    def duplicate(self, number: int, /) -> int:
        """Return a new descriptor of the contents, or -1."""
        return -1

    # For a successor: another process that goes on with the nodes if this one dies

    recorded = False
    """Whether there can be one. If not, the following do nothing."""

    def placed(self, number: int, kind: int, parent: int, name: bytes, /) -> None:
        """Record that a node has, or is about to have, a name."""

    def removed(self, number: int, parent: int, name: bytes, /) -> None:
        """Record that it has it no more."""

    def note(self, number: int, which: int, data: bytes, /) -> bool:
        """Record a fact of a node, or, for number 0, of the mount; without `data`, no more so.

        Return whether it could be.
        """
        return False
