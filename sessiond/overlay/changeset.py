"""What layers do to the image below them: objects that they put there, and names that they remove.

That is what an archive of a snapshot holds. Unlike in a layer there are no redirects, opaque
directories or metadata-only copies: a directory that was renamed is there with all that is in it,
and what a directory hides is removed name by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from sessiond.overlay import lookup, syscalls
from sessiond.overlay.lookup import ABSENT, Directory
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At


class Put(NamedTuple):
    """An object that the layers have, in place of what the image may have there."""

    path: bytes
    """From the root, without a leading slash; the root itself is ``b""``."""
    stat: os.stat_result
    at: At
    """The object."""
    data: At
    """Where its contents are, of a regular file."""
    opaque: bool = False
    """It is a directory that has nothing of the directory which the image has there."""


class Removed(NamedTuple):
    """A name that the image has, and the layers do not let through."""

    path: bytes


class _Pair(NamedTuple):
    """A directory of the merged view, and what the image has in its place."""

    path: bytes
    merged: Directory
    image: Directory | None


def changeset(stack: Stack) -> Iterator[Put | Removed]:
    """Compare the lowers of `stack` with the bottom-most of them, the image.

    The root comes first, and what is in a directory right after it. What is yielded is good until
    the next step. Nobody may change the layers meanwhile. Precondition: there is no upper, and at
    least one lower above the image.
    """
    bottom = stack.lowers[-1]
    image = Stack((bottom,), None, None, stack.options)
    root = lookup.root_of(stack)
    top = root.lowers[0].at()
    yield Put(b"", syscalls.stat(top), top, top)
    levels = [_enter(stack, image, _Pair(b"", root, Directory(None, root.lowers[-1:])))]
    while levels:
        pair, names = levels[-1]
        name = next(names, None)
        if name is None:
            levels.pop()
            continue
        path = lookup.join(pair.path, name)
        now = lookup.lookup(stack, pair.merged, name)
        before = lookup.lookup(image, pair.image, name) if pair.image else ABSENT
        if not now.positive:
            if before.positive:
                yield Removed(path)
        elif now.lowers != before.lowers:
            data = now.lowers[-1 if now.metacopy else 0]
            hides = now.is_directory and before.is_directory and now.lowers[-1:] != before.lowers
            yield Put(path, now.stat, now.lowers[0].at(), data.at(), hides)
            if now.is_directory:
                counterpart = before.directory(path) if before.is_directory else None
                levels.append(_enter(stack, image, _Pair(path, now.directory(path), counterpart)))


def _enter(stack: Stack, image: Stack, pair: _Pair) -> tuple[_Pair, Iterator[bytes]]:
    return pair, iter(_candidates(stack, image, pair))


def _candidates(stack: Stack, image: Stack, pair: _Pair) -> list[bytes]:
    """Return the names that may differ."""
    bottom = image.lowers[0]
    if pair.image is None or pair.merged.lowers[-1:] != pair.image.lowers:
        # Renamed, opaque or new: whatever is there differs, and whatever the image has there.
        names = set(lookup.names(stack, pair.merged))
        if pair.image is not None:
            names.update(lookup.names(image, pair.image))
        return sorted(names)
    above = [lower for lower in pair.merged.lowers if lower.layer is not bottom]
    return sorted(
        {name for lower in above for name, _ in syscalls.scan(lower.layer.directory(lower.path))}
    )
