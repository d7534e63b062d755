"""Rebase: have a layer that was written over one image go on over another.

The kernel leaves the behaviour of an overlay undefined whose lowers were exchanged, for what a
layer has noted about them means nothing any more: file handles (origins of copies, the names in the
index), renamed directories that are gone, whiteouts of what is gone. All that is put in order here,
so that the layer is one that could have been written over the new image.

What was changed on both sides is told. `base` is the old image, so that can be found out as in a
merge of three: what only the image has changed is the image's, also where the layer has a copy that
does not differ from what it was copied from; what only the layer has changed is the layer's; and
what both have changed, differently, is *shadowed*, for the layer has it and hides what the image
has now. Without the old image, the new one is taken to have changed what is younger than the old
one was.

Every step is one system call, and makes sense by itself: after a crash, the next run goes on. The
layer may have been filled by anyone; it is walked as the checker does (`check.upper`). Nothing here
may be mounted meanwhile.
"""

from __future__ import annotations

import stat as modes
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import zip_longest
from typing import NamedTuple

from sessiond.overlay import lookup, origin, sameness, syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import NAME_LIMIT, Directory, Lower, join
from sessiond.overlay.sameness import Check, Object
from sessiond.overlay.stack import Stack, StackOptions, lock_layer, open_layer
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout
from sessiond.overlay.workdir import remove_tree

_DESCRIPTORS = 200
"""Directories that are open at a time."""

SAVED = b".sessiond-old"
"""What is put behind the name of a file that is saved."""


class Conflicts(StrEnum):
    """What becomes of a file that is shadowed."""

    KEEP = "keep"
    """The layer's stays, and hides the image's."""
    DROP = "drop"
    """The image's shows, and the layer's is gone."""
    SAVE = "save"
    """The image's shows, and the layer's gets another name beside it."""


class Outcome(StrEnum):
    """What became of it."""

    KEPT = "kept"
    DROPPED = "dropped"
    SAVED = "saved"


class Shadowed(NamedTuple):
    """Something that both the layer and the image have changed."""

    path: bytes
    """In the merged view."""
    mode: int
    """st_mode of what the layer has; 0 where it has removed what the image has."""
    outcome: Outcome
    saved_as: bytes = b""
    """Its new path."""


@dataclass(frozen=True, slots=True)
class Target:
    """A layer that is not mounted: its tree, what it has for index, and what is below it."""

    upper: bytes
    work: bytes
    lowers: Sequence[bytes]
    """Topmost first; the last is the new image."""
    base: bytes | None
    """The old image, if it is there still."""
    since_ns: int
    """When the old image was made: without it, what is younger in the new one counts as changed."""


def rebase(
    target: Target, conflicts: Conflicts, *, apply: bool, check: Check
) -> Iterator[Shadowed]:
    """Yield what is shadowed; with `apply`, make the layer one of the new image.

    `check` is called again and again, and stops it by raising. Raises OSError: EBUSY when the layer
    is mounted; what is wrong is in `strerror`. `tidy` has to follow for all layers. Nothing is
    synchronised.
    """
    with _opened(target, lock=apply) as walk:
        yield from walk.rebase(conflicts, apply=apply, check=check)


def tidy(target: Target, *, check: Check) -> None:
    """Remove whiteouts that hide nothing any more, since the layers below were rebased."""
    with _opened(target, lock=True) as walk:
        walk.tidy(check)


class _opened:  # noqa: N801 -- a context manager
    """The walk over a layer, as long as the context is open."""

    def __init__(self, target: Target, *, lock: bool) -> None:
        self._target = target
        self._lock = lock
        self._undo = ExitStack()

    def __enter__(self) -> _Walk:
        target, undo = self._target, self._undo
        try:
            upper = open_layer(target.upper, "upper directory", undo, writable=True)
            work = open_layer(target.work, "workdir", undo, writable=True)
            if self._lock:
                lock_layer(upper, target.upper, undo)
            below = [
                open_layer(path, "lower directory", undo, writable=False) for path in target.lowers
            ]
            base = None
            if target.base is not None:
                base = open_layer(target.base, "old image", undo, writable=False)
            stack = Stack(tuple(below), upper, None, StackOptions())
            return _Walk(stack, work, base, target.since_ns)
        except BaseException:
            undo.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._undo.close()


@dataclass(slots=True)
class _Level:
    """A directory of the layer on the way to the one that is looked at."""

    name: bytes
    fd: int
    """-1 while it is closed for others."""
    lowers: tuple[Lower, ...] = ()
    """What it merges with."""
    image: bytes | None = None
    """Path of the new image's directory that it merges with, if it does."""
    marked: bool = False
    """Whether whiteouts may be files."""
    subdirectories: list[bytes] = field(default_factory=list)


_Visit = Callable[[_Level, bytes], Iterator[Shadowed]]
_Enter = Callable[[_Level, _Level, dict[bytes, bytes]], Iterator[Shadowed]]


class _Walk:
    """All walks over one layer."""

    def __init__(self, stack: Stack, work: Layer, base: Layer | None, since_ns: int) -> None:
        assert stack.upper is not None
        self._stack = stack
        self._upper = stack.upper
        self._work = work
        self._image = stack.lowers[-1]
        self._base = base
        self._since_ns = since_ns
        self._xattrs = stack.xattrs
        self._levels: list[_Level] = []
        self._renamed: list[bytes] = []
        """Sorted paths in the image of directories that the layer shows under another name."""
        self._apply = False
        self._conflicts = Conflicts.KEEP
        self._check: Check = lambda: None
        self._actions: list[Callable[[], None]] = []
        """What is to be done in the directory that is listed."""
        self._taken: set[bytes] = set()
        """Names there that some of that takes."""

    def rebase(self, conflicts: Conflicts, *, apply: bool, check: Check) -> Iterator[Shadowed]:
        self._conflicts, self._apply, self._check = conflicts, apply, check
        for _ in self._walk(self._survey_directory, self._survey_entry):
            pass
        self._renamed.sort()
        yield from self._rebase_index()
        yield from self._walk(self._rebase_directory, self._rebase_entry)

    def tidy(self, check: Check) -> None:
        self._apply, self._check = True, check
        for _ in self._walk(lambda *_: iter(()), self._tidy_entry):
            pass

    # Walking

    def _walk(self, enter: _Enter, visit: _Visit) -> Iterator[Shadowed]:
        try:
            yield from self._enter_root(enter, visit)
            while self._levels:
                level = self._levels[-1]
                if level.subdirectories:
                    yield from self._enter(level, level.subdirectories.pop(), enter, visit)
                else:
                    _close(self._levels.pop())
        finally:
            while self._levels:
                _close(self._levels.pop())

    def _enter_root(self, enter: _Enter, visit: _Visit) -> Iterator[Shadowed]:
        lowers = lookup.roots_of(self._stack)
        root = _Level(b"", syscalls.duplicate(self._upper.root), lowers, b"")
        root.marked = self._upper.may_hold_marks
        self._levels.append(root)
        yield from enter(root, root, self._own(At(root.fd, b"")))
        yield from self._scan(root, visit)

    def _enter(
        self, parent: _Level, name: bytes, enter: _Enter, visit: _Visit
    ) -> Iterator[Shadowed]:
        level = _Level(name, syscalls.open_beneath(self._descriptor(), name))
        self._levels.append(level)
        if len(self._levels) > _DESCRIPTORS:
            _close(self._levels[-_DESCRIPTORS])
        own = self._own(At(level.fd, b""))
        # The path of each directory of a deep tree would take too long.
        if parent.lowers or own:
            level.marked = own.get(b"opaque") == b"x"
            if own.get(b"opaque") != b"y":
                self._merge(parent, level)
            yield from enter(parent, level, own)
        yield from self._scan(level, visit)

    def _merge(self, parent: _Level, level: _Level) -> None:
        directory = Directory(self._path(of=parent), parent.lowers, parent.marked)
        level.lowers = lookup.lookup(self._stack, directory, level.name).lowers
        if level.lowers and level.lowers[-1].layer is self._image:
            level.image = level.lowers[-1].path

    def _scan(self, level: _Level, visit: _Visit) -> Iterator[Shadowed]:
        for entry in syscalls.scan_lazily(level.fd):
            self._check()
            if entry.is_dir(follow_symlinks=False):
                level.subdirectories.append(entry.name)
            else:
                yield from visit(level, entry.name)
        # Only now, for entries must not come or go while they are listed.
        self._act(At(level.fd, b""))

    def _act(self, directory: At) -> None:
        actions, self._actions = self._actions, []
        self._taken.clear()
        if not actions or not self._apply:
            return
        times = syscalls.stat(directory)
        for action in actions:
            action()
        # Unnoticed by the times of the directory, which the merged view shows.
        syscalls.utime(At(directory.directory, b"."), times.st_atime_ns, times.st_mtime_ns)

    def _descriptor(self) -> int:
        """Return a descriptor of the directory that is looked at."""
        level = self._levels[-1]
        if level.fd < 0:
            level.fd = syscalls.duplicate(self._upper.directory(self._path()))
        return level.fd

    def _path(self, name: bytes = b"", *, of: _Level | None = None) -> bytes:
        """Return the path of the directory that is looked at, or `of` another above it, or of an
        entry.
        """
        names = []
        for level in self._levels[1:]:
            if of is self._levels[0]:
                break
            names.append(level.name)
            if level is of:
                break
        return b"/".join([*names, name] if name else names)

    def _own(self, at: At) -> dict[bytes, bytes]:
        """Return the overlay's own attributes of an object, by their names without prefix."""
        start = len(self._xattrs.prefix)
        return {name[start:]: syscalls.getxattr(at, name) or b"" for name in self._xattrs.own(at)}

    # What is to be known of the whole layer

    def _survey_directory(
        self, _: _Level, level: _Level, own: dict[bytes, bytes]
    ) -> Iterator[Shadowed]:
        if b"redirect" in own and level.image is not None:
            self._renamed.append(level.image)
        return iter(())

    def _survey_entry(self, level: _Level, name: bytes) -> Iterator[Shadowed]:
        at = At(level.fd, name)
        if self._xattrs.metacopy in self._xattrs.own(at):
            raise OSError(
                None,
                "only the metadata of the file are in the layer (it was written by another overlay "
                "with metacopy=on), and its contents in the image",
                self._path(name),
            )
        return iter(())

    def _is_renamed(self, path: bytes) -> bool:
        """Say whether the layer shows what the image has at `path`, or below, elsewhere."""
        below = path + b"/"
        for wanted in (path, below):
            place = bisect_left(self._renamed, wanted)
            if any(
                other == path or other.startswith(below)
                for other in self._renamed[place : place + 1]
            ):
                return True
        return False

    # The index

    def _rebase_index(self) -> Iterator[Shadowed]:
        """Empty the index: its names are handles of the old image.

        Names of the layer go on being links to one file. Names of the image that showed the same
        file, since they were links to one in the image, show the image's again. A file that had no
        other names is saved in the root.
        """
        try:
            index = syscalls.open_beneath(self._work.root, b"index")
        except FileNotFoundError:
            return
        try:
            for entry in list(syscalls.scan_lazily(index)):
                at = At(index, entry.name)
                stat = syscalls.stat(at)
                # U-1: its last name was removed by a process that died then.
                lost = (
                    modes.S_ISREG(stat.st_mode)
                    and stat.st_nlink == 1
                    and self._own(at).get(b"nlink", b"U-1") != b"U-1"
                )
                if lost:
                    name = self._free_name(self._upper.root, self._roots(), b"hard-link")
                    yield Shadowed(name, stat.st_mode, Outcome.SAVED, name)
                    if self._apply:
                        syscalls.rename(at, At(self._upper.root, name))
                elif self._apply:
                    remove_tree(at)
        finally:
            syscalls.close(index)

    def _roots(self) -> Directory:
        return Directory(None, lookup.roots_of(self._stack))

    # Directories

    def _rebase_directory(
        self, parent: _Level, level: _Level, own: dict[bytes, bytes]
    ) -> Iterator[Shadowed]:
        at, path = At(level.fd, b""), self._path()
        opaque = own.get(b"opaque") == b"y"
        if opaque and b"redirect" in own:  # of no effect, and it must have none later
            self._remove(at, self._xattrs.redirect)
        if level is not parent and parent.image is not None:
            yield from self._shadowing_directory(parent, level, at, path, own)
        if b"redirect" in own and not opaque and not level.lowers:
            # What it was is gone: it has no more than what the layer has of it.
            yield Shadowed(path, syscalls.stat(at).st_mode, Outcome.KEPT)
            self._set(at, self._xattrs.opaque, b"y")
            self._remove(at, self._xattrs.redirect)
        if b"origin" in own:
            self._rebase_directory_origin(level, at, own[b"origin"])
        if level.image is not None and self._base is not None:
            self._take_metadata(level.image, at)

    def _shadowing_directory(
        self, parent: _Level, level: _Level, at: At, path: bytes, own: dict[bytes, bytes]
    ) -> Iterator[Shadowed]:
        """Tell of a directory that hides what the image has under its name: it is opaque, or the
        image has something else there now.
        """
        assert parent.image is not None
        place = join(parent.image, level.name)
        theirs = sameness.find(self._image, place)
        opaque = own.get(b"opaque") == b"y"
        if theirs is None or (theirs.is_directory and not opaque):
            return
        if not self._changed(place, theirs) or self._is_renamed(place):
            return
        merge = (
            opaque
            and theirs.is_directory
            and self._conflicts is not Conflicts.KEEP
            and not self._hides_directory(parent, level.name)
        )
        outcome = Outcome.DROPPED if merge else Outcome.KEPT
        yield Shadowed(path, syscalls.stat(at).st_mode, outcome)
        if merge:
            # What it has goes on hiding what the image has; all else shows.
            level.lowers, level.image = (Lower(self._image, place),), place
            self._remove(at, self._xattrs.opaque)

    def _rebase_directory_origin(self, level: _Level, at: At, noted: bytes) -> None:
        """Note what a directory was copied up from: the lowest that it merges with."""
        if not level.lowers or level is self._levels[0]:
            self._remove(at, self._xattrs.origin)
            return
        lowest = level.lowers[-1]
        handle = origin.encode(lowest.layer, lowest.at()) or b""
        if handle != noted:
            self._set(at, self._xattrs.origin, handle)

    def _take_metadata(self, place: bytes, at: At) -> None:
        """Give a directory the mode, owner and attributes that the image has given to its own,
        unless the layer has changed them; each by itself.
        """
        assert self._base is not None
        base, theirs = sameness.find(self._base, place), sameness.find(self._image, place)
        if base is None or theirs is None or not base.is_directory or not self._apply:
            return
        ours = Object(at, syscalls.stat(at))
        if _owner(ours) == _owner(base) != _owner(theirs):
            syscalls.chown(at, *_owner(theirs))
        own, old, new = (sameness.attributes(one.at, self._xattrs) for one in (ours, base, theirs))
        for name in own.keys() | new.keys():
            value = new.get(name)
            if own.get(name) != old.get(name) or own.get(name) == value:
                continue
            if value is None:
                syscalls.removexattr(at, name)
            else:
                syscalls.setxattr(at, name, value)
        # Last: chown(2) and ACLs change it as well.
        mode = _mode(theirs) if _mode(ours) == _mode(base) else _mode(ours)
        if mode != modes.S_IMODE(syscalls.stat(at).st_mode):
            syscalls.chmod(at, mode)

    # Other entries

    def _rebase_entry(self, level: _Level, name: bytes) -> Iterator[Shadowed]:
        at = At(level.fd, name)
        ours = Object(at, syscalls.stat(at))
        if is_whiteout(ours.stat, at, self._xattrs, marked=level.marked):
            yield from self._rebase_whiteout(level, name)
            return
        shadowed = self._compare(level, name, ours)
        if shadowed is not None:
            yield shadowed
        own = self._own(at)
        if own.get(b"origin"):
            self._set(at, self._xattrs.origin, b"")  # unknown: the number is the copy's own
        if b"nlink" in own:
            self._remove(at, self._xattrs.nlink)

    def _rebase_whiteout(self, level: _Level, name: bytes) -> Iterator[Shadowed]:
        if level.image is None:
            return
        place = join(level.image, name)
        theirs = sameness.find(self._image, place)
        if theirs is None or self._is_renamed(place) or not self._changed(place, theirs):
            return
        drop = self._conflicts is not Conflicts.KEEP and not self._hides_directory(level, name)
        outcome = Outcome.DROPPED if drop else Outcome.KEPT
        yield Shadowed(self._path(name), 0, outcome)
        if drop:
            self._actions.append(lambda: syscalls.unlink(At(level.fd, name)))

    def _compare(self, level: _Level, name: bytes, ours: Object) -> Shadowed | None:
        """Compare three ways; plan what is to be done about it."""
        if level.image is None:
            return None
        place = join(level.image, name)
        theirs = sameness.find(self._image, place)
        base = None if self._base is None else sameness.find(self._base, place)
        unlink = lambda: syscalls.unlink(ours.at)  # noqa: E731
        if base is not None and self._is_unchanged_copy(ours, base):
            if self._gives_way(level, name, base):
                self._actions.append(unlink)
            return None
        if theirs is None or not self._changed(place, theirs):
            return None
        if not theirs.is_directory and sameness.same(ours, theirs, self._xattrs, self._check):
            return None
        path, mode = self._path(name), ours.stat.st_mode
        match self._conflicts:
            case Conflicts.KEEP:
                return Shadowed(path, mode, Outcome.KEPT)
            case Conflicts.DROP:
                self._actions.append(unlink)
                return Shadowed(path, mode, Outcome.DROPPED)
            case Conflicts.SAVE:
                directory = Directory(None, level.lowers, level.marked)
                new = self._free_name(level.fd, directory, name)
                target = At(level.fd, new)
                self._actions.append(
                    lambda: syscalls.rename(ours.at, target, syscalls.RENAME_NOREPLACE)
                )
                return Shadowed(path, mode, Outcome.SAVED, self._path(new))

    def _is_unchanged_copy(self, ours: Object, base: Object) -> bool:
        """Say whether the layer's is what it was copied from, also by its time."""
        return (
            not base.is_directory
            and ours.stat.st_mtime_ns == base.stat.st_mtime_ns
            and sameness.same(ours, base, self._xattrs, self._check)
        )

    def _changed(self, place: bytes, theirs: Object) -> bool:
        """Say whether the image has changed what it has at `place`; of a directory, anything."""
        if self._base is None:
            return any(
                one.stat.st_mtime_ns > self._since_ns
                for _, one in self._below(self._image, place, theirs)
            )
        base = sameness.find(self._base, place)
        if base is None or base.is_directory != theirs.is_directory:
            return True
        if not theirs.is_directory:
            return not sameness.same(base, theirs, self._xattrs, self._check)
        new = self._below(self._image, place, theirs)
        old = self._below(self._base, place, base)
        return any(
            one is None
            or other is None
            or one[0] != other[0]
            or not sameness.same(one[1], other[1], self._xattrs, self._check)
            for one, other in zip_longest(new, old)
        )

    def _below(self, layer: Layer, path: bytes, top: Object) -> Iterator[tuple[bytes, Object]]:
        """Yield an object of an image and, of a directory, all that is in it, in a fixed order."""
        pending = [(path, top)]
        while pending:
            path, found = pending.pop()
            self._check()
            yield path, found
            if found.is_directory:
                names = sorted(name for name, _ in syscalls.scan(layer.directory(path)))
                for name in reversed(names):
                    at = layer.at(below := join(path, name))
                    pending.append((below, Object(at, syscalls.stat(at))))

    def _hides_directory(self, level: _Level, name: bytes) -> bool:
        """Say whether what the layer has at a name hides a directory of another layer.

        That would show again. A file would not: what becomes of this becomes of that.
        """
        return any(
            lower.layer is not self._image and modes.S_ISDIR(syscalls.stat(lower.at()).st_mode)
            for lower in self._hidden(level, name)
        )

    def _gives_way(self, level: _Level, name: bytes, base: Object) -> bool:
        """Say whether the image's shows when the layer's copy, which is that of `base`, has gone,
        and so all other copies.
        """
        hidden = self._hidden(level, name)
        if not hidden:
            # If that is a whiteout, the file was brought back by hand.
            return not any(
                lower.layer is not self._image
                and syscalls.stat_or_none(At(lower.layer.directory(lower.path), name)) is not None
                for lower in level.lowers
            )
        at = hidden[0].at()
        return hidden[0].layer is self._image or self._is_unchanged_copy(
            Object(at, syscalls.stat(at)), base
        )

    def _hidden(self, level: _Level, name: bytes) -> tuple[Lower, ...]:
        """Return what the layers below have at a name."""
        directory = Directory(None, level.lowers, level.marked)
        return lookup.lookup(self._stack, directory, name).lowers

    def _free_name(self, directory: int, below: Directory, name: bytes) -> bytes:
        """Return a name for what was `name`, which neither the layer nor those below have."""
        number = 1
        while True:
            end = SAVED if number == 1 else SAVED + b".%d" % number
            free = name[: NAME_LIMIT - len(end)] + end
            if (
                free not in self._taken
                and syscalls.stat_or_none(At(directory, free)) is None
                and not lookup.covered(self._stack, below, free)
            ):
                self._taken.add(free)
                return free
            number += 1

    def _tidy_entry(self, level: _Level, name: bytes) -> Iterator[Shadowed]:
        at = At(level.fd, name)
        if is_whiteout(syscalls.stat(at), at, self._xattrs, marked=level.marked):
            directory = Directory(None, level.lowers, level.marked)
            if not lookup.covered(self._stack, directory, name):
                self._actions.append(lambda: syscalls.unlink(at))
        return iter(())

    # Attributes

    def _set(self, at: At, name: bytes, value: bytes) -> None:
        if self._apply:
            syscalls.setxattr(at, name, value)

    def _remove(self, at: At, name: bytes) -> None:
        if self._apply and syscalls.getxattr(at, name) is not None:
            syscalls.removexattr(at, name)


def _owner(one: Object) -> tuple[int, int]:
    return one.stat.st_uid, one.stat.st_gid


def _mode(one: Object) -> int:
    return modes.S_IMODE(one.stat.st_mode)


def _close(level: _Level) -> None:
    if level.fd >= 0:
        syscalls.close(level.fd)
        level.fd = -1
