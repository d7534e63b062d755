"""How a merged view differs from another one: from its image, or as it was at a snapshot.

Only what is in layers that the two do not share is looked at, so the cost follows the changes and
not the image. Content that is equal is no change, whatever was copied up.

What is renamed is known by what copy-up and rename leave in the layers: a directory by what it
merges with (``overlay.redirect``), anything else by its origin (``overlay.origin``), and only if
its old name is gone.
"""

from __future__ import annotations

import itertools
import os
import stat as modes
from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from sessiond.overlay import lookup, sameness, syscalls
from sessiond.overlay.lookup import ABSENT, Directory, Entry, Identity, Presence
from sessiond.overlay.sameness import Object
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.xattrs import OverlayXattrs


class ChangeKind(StrEnum):
    """What happened to a name."""

    ADDED = "added"
    CONTENTS = "contents"
    METADATA = "metadata"
    DELETED = "deleted"
    TYPE = "type"
    RENAMED = "renamed"


class Change(NamedTuple):
    """One difference: one for a deleted directory, one for each object in an added one.

    One for a renamed directory, besides those of what differs in it, which have their paths in it.
    """

    path: bytes
    kind: ChangeKind
    mode: int
    """st_mode of the object; of the one before, where it is deleted."""
    size: int = 0
    """Bytes in a regular file, else 0; also 0 where it is deleted."""
    old_size: int = 0
    """The same before; 0 where it is added."""
    source: bytes | None = None
    """Where it was, if it is renamed."""
    also: ChangeKind | None = None
    """CONTENTS or METADATA, if it is renamed and differs."""
    base_path: bytes = b""
    """The path before of what is there under no other."""

    @property
    def is_deleted_file(self) -> bool:
        """Whether it may be there under another name, being no directory."""
        return self.kind is ChangeKind.DELETED and not modes.S_ISDIR(self.mode)


class Pair(NamedTuple):
    """A directory of the merged view, and what it was before."""

    path: bytes
    merged: Directory
    identity: Identity
    base_path: bytes = b""
    base: Directory | None = None
    base_identity: Identity | None = None


class Found(NamedTuple):
    """What a comparison finds of one name."""

    changes: tuple[Change, ...] = ()
    """None if nothing differs; two if a renamed directory has taken the place of another one."""
    below: Pair | None = None
    """A directory in which something may differ."""
    gone: Identity | None = None
    """Of what had the name before and is deleted, if that was no directory."""
    displaced: Identity | None = None
    """Of a directory that had the name before, if that is not there; deleted, or elsewhere."""
    origin: Identity | None = None
    """Of an added object that is no directory, if it was copied up from somewhere."""
    moved: Identity | None = None
    """Of a directory that was elsewhere before."""
    shared: Identity | None = None
    """Of a file that has several names, which change together."""


class Postponed(Exception):  # no error
    """More would have to be read than was allowed."""


_ROOT = (0, 0)
"""Stands for the identity of the merged root, whatever layers it consists of."""

_Shared = frozenset[tuple[int, int]]
"""Identities of the layers at the bottom that both stacks have."""


def changes(stack: Stack, base: Stack) -> Iterator[Change]:
    """Compare `stack` with `base`, which has lowers only.

    Parents come before what is in them; removed files, and what may be one of these under another
    name, come last. Precondition: neither is used elsewhere. Safe while the layers change: what
    vanishes in the course is left out.
    """
    comparison = Comparison(stack, base)
    comparison.find_moved()
    added: list[tuple[Change, Identity]] = []
    deleted: list[tuple[Change, Identity]] = []
    pending = [comparison.root()]
    while pending:
        pair = pending.pop()
        for name in comparison.names(pair):
            found = comparison.compare(pair, name)
            if found.below is not None:
                pending.append(found.below)
            for change in found.changes:
                if found.origin is not None:
                    added.append((change, found.origin))
                elif change.is_deleted_file and found.gone is not None:
                    deleted.append((change, found.gone))
                else:
                    yield change
    yield from comparison.pair_up(added, deleted)


class Comparison:
    """Two merged views, compared name by name. Not thread-safe."""

    def __init__(self, stack: Stack, base: Stack, most_bytes: int | None = None) -> None:
        """`most_bytes`: raise `Postponed` where larger contents would have to be compared."""
        self._most_bytes = most_bytes
        self._stack = stack
        self._base = base
        self._shared = _shared(stack, base)
        self._base_layers = {layer.identity for layer in base.lowers}
        self.moved: set[Identity] = set()
        """Directories that are at another place than before, as far as `find_moved`, or whoever
        calls `compare`, has found them.
        """
        self._base_places: _Places | None = None

    def root(self) -> Pair:
        roots = lookup.root_of(self._stack), lookup.root_of(self._base)
        return Pair(b"", roots[0], _ROOT, b"", roots[1], _ROOT)

    def names(self, pair: Pair) -> list[bytes]:
        """Return the names in a directory that may differ."""
        names: set[bytes] = set()
        if pair.base is None or not self._same_below(pair.merged, pair.base):
            # Renamed, opaque or new: anything may.
            names.update(lookup.names(self._stack, pair.merged))
            if pair.base is not None:
                names.update(lookup.names(self._base, pair.base))
            return sorted(names)
        unshared = itertools.chain(self._unshared(pair.merged), self._unshared(pair.base))
        for part in unshared:
            names.update(name for name, _ in syscalls.scan(part))
        return sorted(names)

    def _parts(self, directory: Directory, but: _Shared = frozenset()) -> Iterator[int]:
        """Open the real directories, except in some layers, each until the next is asked for."""
        if directory.upper is not None:
            assert self._stack.upper is not None
            yield self._stack.upper.directory(directory.upper)
        for lower in directory.lowers:
            if lower.layer.identity not in but:
                yield lower.layer.directory(lower.path)

    def _unshared(self, directory: Directory) -> Iterator[int]:
        return self._parts(directory, self._shared)

    def _same_below(self, merged: Directory, base: Directory) -> bool:
        """Say whether the two merge the same directories of the layers that both stacks have."""
        return self._of(merged) == self._of(base)

    def _of(self, directory: Directory) -> list[tuple[tuple[int, int], bytes]]:
        places = ((lower.layer.identity, lower.path) for lower in directory.lowers)
        return [place for place in places if place[0] in self._shared]

    # Renamed directories

    def find_moved(self) -> None:
        """Find all directories that are elsewhere, which is where `moved` has them."""
        pending = [self.root()]
        while pending:
            pending += self.directories(pending.pop())

    def directories(self, pair: Pair) -> Iterator[Pair]:
        """Find the directories in one in which something may differ; note which have moved."""
        for name in self._directories(pair):
            found = self.compare(pair, name, directories_only=True)
            if found.moved is not None:
                self.moved.add(found.moved)
            if found.below is not None:
                yield found.below

    def _directories(self, pair: Pair) -> list[bytes]:
        """Return names of directories that may differ, and perhaps of other things."""
        names: set[bytes] = set()
        if pair.base is not None and self._same_below(pair.merged, pair.base):
            for lower in self._unshared(pair.base):  # what it hides there may be a directory
                names.update(name for name, _ in syscalls.scan(lower))
            parts = self._unshared(pair.merged)
        else:
            parts = self._parts(pair.merged)
        for part in parts:
            entries = syscalls.scan_lazily(part)
            names.update(one.name for one in entries if one.is_dir(follow_symlinks=False))
        return sorted(names)

    def _source(self, now: Entry) -> tuple[bytes, Entry] | None:
        """Return where a directory was, and as what, if it was anywhere."""
        if not now.lowers or now.lowers[-1].layer.identity not in self._base_layers:
            return None
        path = self._base_path(now)
        before = lookup.lookup_path(self._base, path)
        return (path, before) if before.identity == now.identity else None

    def _base_path(self, now: Entry) -> bytes:
        """Return where the base shows a directory, if it does."""
        path = now.lowers[-1].path
        if len(self._base.lowers) == 1:
            return path
        if self._base_places is None:
            self._base_places = _Places(self._base)
        return self._base_places.of(now.identity, path)

    # Names

    def compare(self, pair: Pair, name: bytes, *, directories_only: bool = False) -> Found:
        """Compare what a name stands for. Raises OSError, but not for what vanishes meanwhile.

        `directories_only`: tell of nothing but directories.
        """
        try:
            now = lookup.lookup(self._stack, pair.merged, name)
            if directories_only and not now.is_directory:
                return Found()
            before = lookup.lookup(self._base, pair.base, name) if pair.base else ABSENT
            path = lookup.join(pair.path, name), lookup.join(pair.base_path, name)
            if now.is_directory:
                return self._compare_directory(*path, now, before)
            return self._compare_other(pair, *path, now, before)
        except FileNotFoundError:
            return Found()

    def _compare_other(
        self, pair: Pair, path: bytes, base_path: bytes, now: Entry, before: Entry
    ) -> Found:
        """Compare what is no directory, or is not there."""
        displaced = before.identity if before.is_directory else None
        if displaced in self.moved:
            before = ABSENT
        indexed = self._is_indexed(now)
        several = indexed or (now.positive and now.stat.st_nlink > 1)
        shared = now.identity if several else None
        if indexed and now.identity == before.identity and not self._is_named(pair, path):
            # Changed under another name, of which it is told.
            return Found(shared=shared)
        change = self._compare(path, base_path, now, before)
        if change is None:
            return Found(displaced=displaced, shared=shared)
        gone = before.identity if change.is_deleted_file else None
        copied = change.kind is ChangeKind.ADDED and now.identity != _real(now)
        origin = now.identity if copied else None
        return Found((change,), None, gone, displaced, origin, shared=shared)

    def _is_indexed(self, now: Entry) -> bool:
        """Say whether a hard link of a lower is shown as what it is under other names, too."""
        return now.presence is Presence.LOWER and (
            now.indexed is not None or now.lowers[0].layer in self._stack.indexes
        )

    def _is_named(self, pair: Pair, path: bytes) -> bool:
        """Say whether layers that are not shared have something in a directory of that name."""
        name = path.rpartition(b"/")[2]
        parts = (At(part, name) for part in self._unshared(pair.merged))
        return any(syscalls.stat_or_none(at) is not None for at in parts)

    def _compare_directory(self, path: bytes, base_path: bytes, now: Entry, before: Entry) -> Found:
        if before.is_directory and before.identity == now.identity:
            change = self._compare(path, base_path, now, before)
            below = self._descend(path, base_path, now, before)
            return Found((change,) if change else (), below)
        displaced = before.identity if before.is_directory else None
        if displaced in self.moved:
            before = ABSENT
        source = self._source(now)
        if source is None:
            change = self._compare(path, base_path, now, before)
            below = self._descend(path, base_path, now, before)
            return Found((change,) if change else (), below, displaced=displaced)
        found = [self._renamed(path, now, *source)]
        gone = None
        if replaced := self._compare(path, base_path, ABSENT, before):
            found.insert(0, replaced)
            gone = before.identity if replaced.is_deleted_file else None
        below = self._descend(path, source[0], now, source[1])
        return Found(tuple(found), below, gone, displaced, moved=now.identity)

    def _renamed(self, path: bytes, now: Entry, source: bytes, before: Entry) -> Change:
        also = self._compare(path, source, now, before)
        sizes = _size(now.stat), _size(before.stat)
        kind = also.kind if also else None
        return Change(path, ChangeKind.RENAMED, now.stat.st_mode, *sizes, source, kind)

    def _descend(self, path: bytes, base_path: bytes, now: Entry, before: Entry) -> Pair | None:
        merged = now.directory(path)
        if not before.is_directory:
            return Pair(path, merged, now.identity)
        base = before.directory(base_path)
        untouched = merged.upper is None and all(
            lower.layer.identity in self._shared for lower in (*now.lowers, *before.lowers)
        )
        if untouched and self._same_below(merged, base):
            return None
        return Pair(path, merged, now.identity, base_path, base, before.identity)

    def _compare(self, path: bytes, base_path: bytes, now: Entry, before: Entry) -> Change | None:
        if not now.positive:
            if not before.positive:
                return None
            gone = before.stat.st_mode, 0, _size(before.stat)
            return Change(path, ChangeKind.DELETED, *gone, base_path=base_path)
        mode, size = now.stat.st_mode, _size(now.stat)
        if not before.positive:
            return Change(path, ChangeKind.ADDED, mode, size)
        facts = mode, size, _size(before.stat)
        if modes.S_IFMT(mode) != modes.S_IFMT(before.stat.st_mode):
            return Change(path, ChangeKind.TYPE, *facts, base_path=base_path)
        if _real(now) == _real(before):
            return None
        one, data = self._objects(path, now)
        other, other_data = self._objects(path, before)
        if not self._same_contents(data, other_data):
            return Change(path, ChangeKind.CONTENTS, *facts, base_path=base_path)
        if not _same_metadata(one, other, self._stack.xattrs):
            return Change(path, ChangeKind.METADATA, *facts, base_path=base_path)
        return None

    def _objects(self, path: bytes, entry: Entry) -> tuple[Object, Object]:
        """Return the object, and the one that has its contents; both with the stat(2) of it."""
        if entry.presence is Presence.UPPER:
            assert self._stack.upper is not None
            at = self._stack.upper.at(path)
        else:
            at = entry.lowers[0].at()
        data = entry.lowers[-1].at() if entry.metacopy else at
        return Object(at, entry.stat), Object(data, entry.stat)

    def _same_contents(self, one: Object, other: Object) -> bool:
        """Raises `Postponed`."""
        size = _size(one.stat)
        if self._most_bytes is not None and size == _size(other.stat) > self._most_bytes:
            raise Postponed
        return sameness.same_contents(one, other)

    def pair_up(
        self, added: list[tuple[Change, Identity]], deleted: list[tuple[Change, Identity]]
    ) -> Iterator[Change]:
        """Find out which of those that are added are deleted ones under another name.

        Each with its identity.
        """
        names: defaultdict[Identity, list[Change]] = defaultdict(list)
        for change, identity in deleted:
            names[identity].append(change)
        for change, identity in added:
            found = names.get(identity)
            renamed = self._paired(change.path, found[-1].base_path) if found else None
            if found and renamed is not None:
                found.pop()
            yield renamed or change
        for left in names.values():
            yield from left

    def _paired(self, path: bytes, source: bytes) -> Change | None:
        """Return the change that the two are; None if something vanishes meanwhile."""
        try:
            now = lookup.lookup_path(self._stack, path)
            before = lookup.lookup_path(self._base, source)
            if now.positive and before.positive:
                return self._renamed(path, now, source, before)
        except FileNotFoundError:
            pass
        return None


class _Places:
    """Where a stack shows directories that its layers have under other paths."""

    def __init__(self, stack: Stack) -> None:
        bottom = Stack(stack.lowers[-1:], None, None, stack.options)
        comparison = Comparison(stack, bottom)
        self._known: dict[Identity, bytes] = {}
        self._moved: dict[bytes, bytes] = {}
        """By the path in the bottom-most layer."""
        pending = [comparison.root()]
        while pending:
            pair = pending.pop()
            self._known[pair.identity] = pair.path
            if pair.base is not None:
                self._moved[pair.base_path] = pair.path
            pending += comparison.directories(pair)

    def of(self, identity: Identity, path: bytes) -> bytes:
        """`path`: in the bottom-most layer that has the directory."""
        if identity in self._known:
            return self._known[identity]
        rest = b""
        prefix = path
        while prefix and prefix not in self._moved:
            prefix, _, name = prefix.rpartition(b"/")
            rest = lookup.join(name, rest) if rest else name
        return lookup.join(self._moved.get(prefix, b""), rest)


def _shared(stack: Stack, base: Stack) -> _Shared:
    pairs = zip(reversed(stack.lowers), reversed(base.lowers), strict=False)
    same = itertools.takewhile(lambda pair: pair[0].is_same(pair[1]), pairs)
    return frozenset(layer.identity for layer, _ in same)


def _real(entry: Entry) -> Identity:
    return entry.stat.st_dev, entry.stat.st_ino


def _size(stat: os.stat_result) -> int:
    return stat.st_size if modes.S_ISREG(stat.st_mode) else 0


def _same_metadata(one: Object, other: Object, xattrs: OverlayXattrs) -> bool:
    # A directory's time changes with its entries, which are told of themselves.
    if not one.is_directory and one.stat.st_mtime_ns != other.stat.st_mtime_ns:
        return False
    return sameness.same_metadata(one, other, xattrs)
