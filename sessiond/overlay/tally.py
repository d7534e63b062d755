"""The differences from the image, counted as they come about.

`Touched` notes which names may differ from what was counted, and costs next to nothing;
`Tally.update` compares just these once more, by the rules of `diff`, and remembers of each name
that differs what it adds to the sums. So the sums never drift: each is computed from what the last
comparison has found, and every name that was touched since is compared before they are given.

`Touched` belongs to the overlay's thread; one `Tally.update` may run in another at a time.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from sessiond.overlay.by_directory import PATH_LIMIT, ByDirectory, DirectorySums
from sessiond.overlay.diff import Change, ChangeKind, Comparison, Found, Pair, Postponed
from sessiond.overlay.lookup import Identity, join
from sessiond.overlay.nodes import Node
from sessiond.overlay.stack import Stack

LARGEST = 10
"""How many of the largest files are told, of those that have a path that programs can use."""

_NAMES_LIMIT = 1_000_000
"""Names that are remembered, at 100 to 250 bytes each. Where more differ, all are compared."""

_KINDS = tuple(ChangeKind)
_ADDED, _DELETED, _RENAMED = (
    _KINDS.index(kind) for kind in (ChangeKind.ADDED, ChangeKind.DELETED, ChangeKind.RENAMED)
)
_KIND_BITS = 0x7
_REPLACED = 0x8
"""Something else that had the name before is deleted, too."""
_SHIFT = 4
"""Above: the size; where something that is no directory is deleted, its inode number in the image;
so where it is replaced by a renamed directory, which has no size.
"""
_ROUNDS = 8
"""What directories that were renamed leave to be compared again may have that effect in turn; after
so many times, which takes several renamed into each other's old places, all is compared at once.
"""
_SUMS_FROM = 64
"""From so many names, the sums of a directory are kept until one of them changes."""


class Watch:
    """What was touched since one of those who follow it has asked last."""

    def __init__(self, touched: Touched, names: dict[bytes, bool]) -> None:
        self._touched = touched
        self._names = names
        self._identities: set[Identity] = set()

    def path(self, path: bytes, *, whole: bool) -> None:
        """Note a name; see `Touched.path`."""
        if len(self._names) > _NAMES_LIMIT:
            self._names = {b"": True}
        self._names[path] = self._names.get(path, False) or whole

    def everything(self) -> None:
        """Note that all is."""
        self._names = {b"": True}

    def identity(self, identity: Identity) -> None:
        """Note that all names of an object may be."""
        if len(self._identities) > _NAMES_LIMIT:
            self._identities.clear()
            self.everything()
        self._identities.add(identity)

    def take_identities(self) -> set[Identity]:
        """Return whose names may have changed, if they have others than those that were touched."""
        taken, self._identities = self._identities, set()
        return taken

    def take(self, *, most: int | None = None) -> dict[bytes, bool]:
        """Return what was touched, and forget it; of files that may still be written, all but that.

        `most`: leave out files that are open for writing, and go no further than so many others.
        """
        self._touched.find_written(self, most)
        taken, self._names = self._names, {}
        return taken

    def __len__(self) -> int:
        return len(self._names)


class Touched:
    """What may have changed, told to those who `watch`; the first of them is who counts."""

    def __init__(self) -> None:
        self._counted = Watch(self, {b"": True})
        """Since it was counted last. At first, that is everything."""
        self._watches = [self._counted]
        self._written: dict[Node, None] = {}
        self.notify: Callable[[], None] = lambda: None
        """Called when something is touched."""

    def watch(self) -> Watch:
        """Return what will tell what is touched from now on, until `unwatch`."""
        watch = Watch(self, {})
        self._watches.append(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Forget who follows."""
        self._watches.remove(watch)

    def everything(self) -> None:
        """The layers are others."""
        for watch in self._watches:
            watch.everything()
        self._written.clear()
        self.notify()

    def name(self, parent: Node, name: bytes, *, whole: bool = False) -> None:
        """A name has changed; `whole`: with all that is below, if it is a directory."""
        self.path(parent.child_path(name), whole=whole)

    def path(self, path: bytes, *, whole: bool = False) -> None:
        """See `name`."""
        for watch in self._watches:
            watch.path(path, whole=whole)
        self.notify()

    def node(self, node: Node) -> None:
        """All names of a node may have changed."""
        if not node.is_directory:
            for watch in self._watches:
                watch.identity(node.identity)
        for parent, name in node.links:
            self.name(parent, name)

    def written(self, node: Node) -> None:
        """A file may be written from now on without anyone being asked."""
        self._written[node] = None
        self.notify()

    def may_be_written(self, node: Node) -> bool:
        """Say whether `written` was called since the node was compared last."""
        return node in self._written

    def leave(self, node: Node) -> None:
        """Nobody holds the node any more."""
        if node in self._written:
            del self._written[node]
            self.node(node)

    def take_identities(self) -> set[Identity]:
        """See `Watch.take_identities`; what was counted."""
        return self._counted.take_identities()

    def take(self, *, most: int | None = None) -> dict[bytes, bool]:
        """See `Watch.take`; what was counted."""
        return self._counted.take(most=most)

    def find_written(self, watch: Watch, most: int | None) -> None:
        """Touch the files that may have been written, for `watch`; see `Watch.take`."""
        for node in list(self._written):
            if most is not None and len(watch) >= most:
                break
            if not node.linked:
                continue  # until it has a name, or is gone
            if not _writers(node):
                # Whoever writes next has to ask.
                node.withdraw()
                del self._written[node]
            elif most is not None:
                continue
            self.node(node)


def _writers(node: Node) -> int:
    return sum(map(node.fast_path.writers, (node.number, *node.former)))


class LargeFile(NamedTuple):
    """One of the largest files that differ."""

    path: bytes
    kind: ChangeKind
    size: int


class Sums(NamedTuple):
    """How much differs."""

    kinds: tuple[int, ...]
    """How many names, by kind."""
    bytes: int
    """In the regular files that differ and are there."""
    largest: tuple[LargeFile, ...]
    """Largest first."""
    directories: tuple[DirectorySums, ...] = ()
    """Those that were asked for."""

    def of(self, *kinds: ChangeKind) -> int:
        """Return how many names are of these kinds."""
        return sum(self.kinds[_KINDS.index(kind)] for kind in kinds)


_NOTHING = Sums((0,) * len(_KINDS), 0, ())


class TooManyError(Exception):
    """More names differ than can be remembered."""


class _Directory:
    """A directory in which something may differ, with what was found there."""

    __slots__ = ("below", "found", "key", "moved", "origins", "sums")

    def __init__(self, pair: Pair, moved: Identity | None) -> None:
        self.key = _key(pair)
        self.moved = moved
        """Its identity, if it was elsewhere before."""
        self.found: dict[bytes, int] = {}
        """What each name that differs adds to the sums, packed."""
        self.origins: dict[bytes, int] = {}
        """Inode number in the image of what names that are added were copied up from."""
        self.below: dict[bytes, _Directory] = {}
        self.sums: Sums | None = None
        """Without what is below; the paths are names."""


def _key(pair: Pair) -> tuple[Identity, Identity | None]:
    return pair.identity, pair.base_identity


class Tally:
    """What differs from the image, as far as `update` was told of it."""

    def __init__(self) -> None:
        self.root: _Directory | None = None
        self.moved: set[Identity] = set()
        """Directories that are elsewhere than in the image."""
        self.displaced: dict[Identity, bytes] = {}
        """Where directories of the image were that are not there now; some are elsewhere."""
        self.names = 0
        """How many differ."""
        self.linked: dict[Identity, set[bytes]] = {}
        """Names of files that have several: they change together."""

    def update(
        self, stack: Stack, base: Stack, touched: dict[bytes, bool], *, most_bytes: int | None
    ) -> list[bytes]:
        """Compare what was touched. If that raises, everything has to be touched the next time.

        `most_bytes`: postpone files of which more would have to be read. Returns these. Raises
        `TooManyError`, OSError.
        """
        return _Update(self, Comparison(stack, base, most_bytes)).run(touched)

    def names_of(self, identities: Iterable[Identity]) -> dict[bytes, bool]:
        """Return the known names of files that have several, as `update` takes them."""
        return {path: False for one in identities for path in self.linked.get(one, ())}

    def sums(self, by_directory: ByDirectory | None = None) -> Sums:
        """Return how much differs in all; and below directories, if there is what counts that."""
        kinds, size = [0] * len(_KINDS), 0
        largest: list[LargeFile] = []
        arrived: list[int] = []
        for path, directory in self._directories():
            own = directory.sums or _own_sums(directory)
            kinds = [total + count for total, count in zip(kinds, own.kinds, strict=True)]
            size += own.bytes
            if by_directory is not None:
                by_directory.add(path, own.kinds, own.bytes)
            largest += (one._replace(path=join(path, one.path)) for one in own.largest)
            if len(largest) > 100 * LARGEST:
                largest = _largest(largest)
            arrived += directory.origins.values()
        largest = _largest(largest)
        if arrived:
            deleted = Counter(self._deleted())
            moved = Counter(arrived) & deleted
            renamed = moved.total()
            if by_directory is not None:
                self._pair(moved, by_directory)
            largest = [
                one._replace(kind=ChangeKind.RENAMED) if self._origin(one.path) in deleted else one
                for one in largest
            ]
            kinds[_ADDED] -= renamed
            kinds[_DELETED] -= renamed
            kinds[_RENAMED] += renamed
        directories = () if by_directory is None else by_directory.largest()
        return Sums(tuple(kinds), size, tuple(largest), directories)

    def _pair(self, moved: Counter[int], by_directory: ByDirectory) -> None:
        """Count what was added here and is deleted there as renamed, here."""
        arrived, left = moved.copy(), moved.copy()
        for path, directory in self._directories():
            kinds = [0] * len(_KINDS)
            for inode in directory.origins.values():
                if arrived[inode] > 0:
                    arrived[inode] -= 1
                    kinds[_ADDED] -= 1
                    kinds[_RENAMED] += 1
            for inode in _deleted_in(directory):
                if left[inode] > 0:
                    left[inode] -= 1
                    kinds[_DELETED] -= 1
            if any(kinds):
                by_directory.add(path, tuple(kinds), 0)

    def _origin(self, path: bytes) -> int | None:
        """Return the inode number in the image of what was copied up to be added there."""
        *parents, name = path.split(b"/")
        directory = self.root
        for parent in parents:
            assert directory is not None
            directory = directory.below.get(parent)
        return directory.origins.get(name) if directory is not None else None

    def _directories(self) -> Iterator[tuple[bytes, _Directory]]:
        pending = [(b"", self.root)] if self.root is not None else []
        while pending:
            path, directory = pending.pop()
            yield path, directory
            pending += [(join(path, name), below) for name, below in directory.below.items()]

    def _deleted(self) -> Iterator[int]:
        """Return the inode numbers of all that is deleted and no directory."""
        for _, directory in self._directories():
            yield from _deleted_in(directory)


def _deleted_in(directory: _Directory) -> Iterator[int]:
    """Return the inode numbers of what is deleted in a directory itself."""
    for packed in directory.found.values():
        kind = packed & _KIND_BITS
        if kind == _DELETED or (kind == _RENAMED and packed & _REPLACED):
            inode = packed >> _SHIFT
            if inode:
                yield inode


def sums_of(changes: Iterable[Change], by_directory: ByDirectory | None = None) -> Sums:
    """Return how much all `changes` are; and below directories, if there is what counts that."""
    kinds, size = [0] * len(_KINDS), 0
    largest: list[LargeFile] = []
    for change in changes:
        kinds[_KINDS.index(change.kind)] += 1
        if by_directory is not None:
            one = tuple(int(kind is change.kind) for kind in _KINDS)
            by_directory.add(change.path.rpartition(b"/")[0], one, change.size)
        if change.size:
            size += change.size
            largest.append(LargeFile(change.path, change.kind, change.size))
            if len(largest) > 100 * LARGEST:
                largest = _largest(largest)
    directories = () if by_directory is None else by_directory.largest()
    return Sums(tuple(kinds), size, tuple(_largest(largest)), directories)


def _largest(files: Iterable[LargeFile]) -> list[LargeFile]:
    named = (one for one in files if len(one.path) < PATH_LIMIT)
    return heapq.nsmallest(LARGEST, named, key=lambda one: (-one.size, one.path))


def _own_sums(directory: _Directory) -> Sums:
    """Return, and keep, the sums of a directory without what is below."""
    kinds, size = [0] * len(_KINDS), 0
    files: list[tuple[int, bytes]] = []
    for name, packed in directory.found.items():
        kind = packed & _KIND_BITS
        kinds[kind] += 1
        if packed & _REPLACED:
            kinds[_DELETED] += 1
        if packed >> _SHIFT and kind not in {_DELETED, _RENAMED}:
            size += packed >> _SHIFT
            files.append((-(packed >> _SHIFT), name))
    files = heapq.nsmallest(LARGEST, files)
    largest = tuple(
        LargeFile(name, _KINDS[directory.found[name] & _KIND_BITS], -size) for size, name in files
    )
    sums = Sums(tuple(kinds), size, largest)
    if len(directory.found) >= _SUMS_FROM:
        directory.sums = sums
    return sums


class _Update:
    """One comparison of what was touched."""

    def __init__(self, tally: Tally, comparison: Comparison) -> None:
        self._tally = tally
        self._comparison = comparison
        comparison.moved = tally.moved
        self._entered: dict[bytes, tuple[_Directory, Pair] | None] = {}
        """Directories on the way to what is compared, in this round."""
        self._whole: set[bytes] = set()
        """Those that were compared with all that is below, in this round."""
        self._left: set[Identity] = set()
        self._arrived: set[Identity] = set()
        """Directories that have moved, as far as this round has found."""
        self._siblings: set[bytes] = set()
        self._seen: set[bytes] = set()
        """Names of files that have several."""
        self._postponed: list[bytes] = []

    def run(self, touched: dict[bytes, bool]) -> list[bytes]:
        """See `Tally.update`."""
        tally, moved = self._tally, self._comparison.moved
        for _ in range(_ROUNDS):
            if not touched:
                return self._postponed
            before = set(moved)
            self._round(touched)
            moved -= self._left - self._arrived
            moved |= self._arrived
            # That a directory is elsewhere, or no more so, is told where it was.
            touched = {
                tally.displaced[identity]: True
                for identity in before ^ moved
                if identity in tally.displaced
            }
            touched |= {path: False for path in self._siblings - self._seen if path not in touched}
        moved.clear()
        self._comparison.find_moved()
        found = set(moved)
        self._everything()
        moved.clear()
        moved |= found
        return self._postponed

    def _round(self, touched: dict[bytes, bool]) -> None:
        self._entered = {}
        self._whole.clear()
        self._left, self._arrived, self._siblings = set(), set(), set()
        for path in sorted(touched, key=lambda path: path.split(b"/")):
            if not path:
                if touched[path]:
                    self._everything()
                    return
                continue
            parent, _, name = path.rpartition(b"/")
            if (place := self._place(parent)) is not None:
                # Done or not: a hard link that was changed under another name is in no upper.
                self._enter(*place, name, whole=touched[path] and not self._is_done(path))

    def _everything(self) -> None:
        self._tally.names = 0
        self._tally.displaced.clear()
        self._tally.linked.clear()
        self._left |= self._comparison.moved
        pair = self._comparison.root()
        self._tally.root = _Directory(pair, None)
        self._walk(self._tally.root, pair)

    def _is_done(self, path: bytes) -> bool:
        while path:
            if path in self._whole:
                return True
            path = path.rpartition(b"/")[0]
        return False

    def _place(self, path: bytes) -> tuple[_Directory, Pair] | None:
        """Return a directory by its path; None if nothing can differ there."""
        assert self._tally.root is not None
        place: tuple[_Directory, Pair] | None = self._tally.root, self._comparison.root()
        walked = b""
        for name in path.split(b"/") if path else ():
            walked = join(walked, name)
            if walked not in self._entered:
                assert place is not None
                self._entered[walked] = self._enter(*place, name)
            place = self._entered[walked]
            if place is None:
                return None
        return place

    def _enter(
        self, directory: _Directory, pair: Pair, name: bytes, *, whole: bool = False
    ) -> tuple[_Directory, Pair] | None:
        """Compare a name; return the directory that it is of, if anything may differ there.

        `whole`: or if that was not known yet, with all that is below.
        """
        below = self._compare(directory, pair, name)
        known = directory.below.get(name)
        if known is not None and (below is None or whole or known.key != _key(below[0])):
            self._drop(directory.below.pop(name))
            known = None
        if below is None:
            return None
        place, moved = below
        if known is None:
            known = directory.below[name] = _Directory(place, moved)
            self._whole.add(place.path)
            self._walk(known, place)
        self._entered[place.path] = known, place
        return known, place

    def _walk(self, directory: _Directory, pair: Pair) -> None:
        """Compare all that is in a directory that was not known."""
        pending = [(directory, pair)]
        while pending:
            directory, pair = pending.pop()
            for name in self._comparison.names(pair):
                below = self._compare(directory, pair, name)
                if below is not None:
                    known = directory.below[name] = _Directory(*below)
                    pending.append((known, below[0]))

    def _drop(self, directory: _Directory) -> None:
        pending = [directory]
        while pending:
            directory = pending.pop()
            self._tally.names -= len(directory.found)
            if directory.moved is not None:
                self._left.add(directory.moved)
            pending += directory.below.values()

    def _compare(
        self, directory: _Directory, pair: Pair, name: bytes
    ) -> tuple[Pair, Identity | None] | None:
        path = join(pair.path, name)
        try:
            found = self._comparison.compare(pair, name)
        except Postponed:
            self._postponed.append(path)
            return None
        if found.displaced is not None:
            self._tally.displaced[found.displaced] = path
        if found.moved is not None:
            self._arrived.add(found.moved)
            self._comparison.moved.add(found.moved)
        if found.shared is not None:
            self._note_names(found.shared, path)
        self._set(directory, name, found)
        return None if found.below is None else (found.below, found.moved)

    def _note_names(self, identity: Identity, path: bytes) -> None:
        names = self._tally.linked.setdefault(identity, set())
        names.add(path)
        self._seen.add(path)
        self._siblings |= names

    def _set(self, directory: _Directory, name: bytes, found: Found) -> None:
        directory.sums = None
        directory.origins.pop(name, None)
        if directory.found.pop(name, None) is not None:
            self._tally.names -= 1
        if not found.changes:
            return
        self._tally.names += 1
        if self._tally.names > _NAMES_LIMIT:
            raise TooManyError
        change = found.changes[-1]
        number = change.size
        packed = _KINDS.index(change.kind)
        if found.gone is not None:
            number = found.gone[1]
        if len(found.changes) > 1:
            packed |= _REPLACED
        if found.origin is not None:
            directory.origins[name] = found.origin[1]
        directory.found[name] = packed | number << _SHIFT
