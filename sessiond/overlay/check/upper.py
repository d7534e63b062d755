"""The check of an upper: its tree is walked, and each object compared with what it hides, continues
or stands for in the lowers.
"""

from __future__ import annotations

import errno
import os
import re
import stat as modes
from collections.abc import Collection
from dataclasses import dataclass, field

from sessiond.overlay import lookup, syscalls
from sessiond.overlay.check.findings import Finding, Kind, Place
from sessiond.overlay.check.inspection import Findings, Fix, Inspection
from sessiond.overlay.lookup import Directory, Identity, Lower, join
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout_device

_DESCRIPTORS = 200
"""Directories that are open at a time."""

_VALUE_LIMIT = 300
"""Bytes of a value of an attribute that are told."""

_LINK_COUNT = re.compile(rb"[UL][+-][0-9]{1,10}")

_AUFS = (b".wh..wh.aufs", b".wh..wh.orph", b".wh..wh.plnk", b".wh..wh..opq")
"""What aufs, or a container image, has in the root of a branch."""


def check_upper(inspection: Inspection) -> Findings:
    """Yield what is wrong in the upper."""
    return _Walk(inspection).findings()


@dataclass(slots=True)
class _Level:
    """A directory of the upper on the way to the one that is looked at."""

    name: bytes
    fd: int
    """-1 while it is closed for others."""
    lowers: tuple[Lower, ...] = ()
    """What it merges with."""
    below: bytes = b""
    """Where the lowers have it; of a directory that merges."""
    known: bool = True
    """Whether `lowers` are all that it would merge with if every lower were there."""
    opaque: bool = False
    """Whether it would merge with none, whatever there is."""
    marked: bool = False
    """Whether whiteouts may be files."""
    impure: bool = False
    copied: bool = False
    """Whether an entry has an origin."""
    subdirectories: list[bytes] = field(default_factory=list)


class _Walk:
    def __init__(self, inspection: Inspection) -> None:
        assert inspection.stack.upper is not None
        self._inspection = inspection
        self._stack = inspection.stack
        self._upper = inspection.stack.upper
        self._levels: list[_Level] = []
        self._redirected: dict[Identity, bytes] = {}
        """Paths of directories that were renamed, by what they were."""

    def findings(self) -> Findings:
        try:
            yield from self._enter_root()
            while self._levels:
                level = self._levels[-1]
                if level.subdirectories:
                    yield from self._enter(level, level.subdirectories.pop())
                else:
                    yield from self._leave()
        finally:
            for level in self._levels:
                _close(level)

    def _path(self, name: bytes = b"") -> bytes:
        """Return the path of an entry of the directory that is looked at, or its own."""
        names = [level.name for level in self._levels[1:]]
        return b"/".join([*names, name] if name else names)

    def _found(
        self, kind: Kind, path: bytes, detail: str = "", *, fix: Fix | None = None
    ) -> Finding:
        return self._inspection.found(kind, Place.UPPER, path, detail, fix=fix)

    # Directories

    def _enter_root(self) -> Findings:
        lowers = lookup.roots_of(self._stack)
        root = _Level(b"", syscalls.duplicate(self._upper.root), lowers)
        root.known, root.marked = self._inspection.complete, self._upper.may_hold_marks
        self._levels.append(root)
        try:
            own, findings = self._inspection.attributes(At(root.fd, b""), Place.UPPER, b"")
            yield from findings
        except OSError as error:
            yield self._unreadable(b"", error)
        else:
            root.impure = b"impure" in own
        yield from self._scan(root)

    def _enter(self, parent: _Level, name: bytes) -> Findings:
        try:
            fd = syscalls.open_beneath(self._descriptor(), name)
        except OSError as error:
            if error.errno == errno.EXDEV:
                yield self._found(Kind.MOUNT_POINT, self._path(name))
            else:
                yield self._unreadable(self._path(name), error)
            return
        level = _Level(name, fd, known=parent.known, opaque=parent.opaque)
        self._levels.append(level)
        if len(self._levels) > _DESCRIPTORS:
            _close(self._levels[-_DESCRIPTORS])
        try:
            # The path of each directory of a deep tree would take too long.
            if parent.lowers or self._inspection.is_marked(At(fd, b"")):
                yield from self._check_directory(parent, level)
        except OSError as error:
            yield self._unreadable(self._path(), error)
            level.known = False
        yield from self._scan(level)

    def _check_directory(self, parent: _Level, level: _Level) -> Findings:
        at, path = At(level.fd, b""), self._path()
        own, findings = self._inspection.attributes(at, Place.UPPER, path)
        yield from findings
        level.marked = own.get(b"opaque") == b"x"
        level.impure = b"impure" in own
        parent.copied |= bool(own.get(b"origin"))
        if own.get(b"opaque") == b"y":
            level.known = level.opaque = True
        else:
            yield from self._merge(parent, level, own.get(b"redirect"), path)
        merged = None if level.opaque else level.lowers
        yield from self._check_attributes(own, at, path, merged)

    def _descriptor(self) -> int:
        """Return a descriptor of the directory that is looked at."""
        level = self._levels[-1]
        if level.fd < 0:
            level.fd = syscalls.duplicate(self._upper.directory(self._path()))
        return level.fd

    def _leave(self) -> Findings:
        level = self._levels[-1]
        if level.copied and not level.impure:
            at, name = At(self._descriptor(), b""), self._stack.xattrs.impure
            yield self._found(
                Kind.IMPURE_MISSING, self._path(), fix=lambda: syscalls.setxattr(at, name, b"y")
            )
        _close(level)
        self._levels.pop()

    def _merge(
        self, parent: _Level, level: _Level, redirect: bytes | None, path: bytes
    ) -> Findings:
        """Find out what a directory merges with, and check how it comes to that."""
        if redirect is not None and not lookup.is_redirect(redirect):
            level.known = False
            yield self._found(Kind.REDIRECT_MALFORMED, path, f"redirect {_shown(redirect)}")
            return
        level.below = join(parent.below, redirect or level.name)
        if redirect is not None and redirect.startswith(b"/"):
            level.below = redirect[1:]
            level.known, level.opaque = self._inspection.complete, False
        directory = Directory(path.rpartition(b"/")[0], parent.lowers, parent.marked)
        level.lowers = lookup.lookup(self._stack, directory, level.name).lowers
        if redirect is None:
            return
        if level.lowers:
            yield from self._check_renamed(level, path)
        elif level.known:
            level.known = False
            yield self._found(Kind.REDIRECT_DANGLING, path, f"redirect {_shown(redirect)}")

    def _check_renamed(self, level: _Level, path: bytes) -> Findings:
        """Check that a directory of the lowers shows under its new name only."""
        stat = syscalls.stat(level.lowers[0].at())
        identity = (stat.st_dev, stat.st_ino)
        other = self._redirected.setdefault(identity, path)
        if other != path:
            yield self._found(Kind.REDIRECT_DUPLICATE, path, f"as {_shown(other)}")
            return
        shown = self._shown_at(level.below)
        if shown is None or not shown.lowers or shown.upper == path:
            return
        stat = syscalls.stat(shown.lowers[0].at())
        if (stat.st_dev, stat.st_ino) == identity:
            twice = shown.upper is not None
            kind = Kind.REDIRECT_DUPLICATE if twice else Kind.REDIRECT_ORIGIN_SHOWN
            yield self._found(kind, path, f"as {_shown(level.below)}")

    def _shown_at(self, path: bytes) -> Directory | None:
        """Return the directory of the merged view at `path`; None if there is none."""
        entry = lookup.lookup_path(self._stack, path)
        return entry.directory(path) if entry.is_directory else None

    # What is in them

    def _scan(self, level: _Level) -> Findings:
        try:
            for entry in syscalls.scan_lazily(level.fd):
                if entry.name.startswith(b".wh."):
                    yield from self._check_foreign(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    level.subdirectories.append(entry.name)
                else:
                    yield from self._check_entry(level, entry.name)
        except OSError as error:
            yield self._unreadable(self._path(), error)

    def _check_foreign(self, name: bytes) -> Findings:
        if len(self._levels) == 1 and name in _AUFS:
            yield self._found(Kind.FOREIGN_BRANCH, name)
        else:
            told = "names that begin with .wh."
            self._inspection.count(Kind.FOREIGN_MARKS, self._path(name), told)

    def _check_entry(self, level: _Level, name: bytes) -> Findings:
        at = At(level.fd, name)
        try:
            stat = syscalls.stat(at)
            if is_whiteout_device(stat):
                yield from self._check_whiteout(level, name)
                return
            if not self._inspection.is_marked(at):
                return
            path = self._path(name)
            own, findings = self._inspection.attributes(at, Place.UPPER, path)
            yield from findings
            level.copied |= bool(own.get(b"origin"))
            if b"whiteout" in own and modes.S_ISREG(stat.st_mode) and not stat.st_size:
                if level.marked:
                    yield from self._check_whiteout(level, name)
                    return
                yield self._found(Kind.WHITEOUT_IGNORED, path)
            yield from self._check_attributes(own, at, path)
            yield from self._check_file(level, own, at, stat)
        except OSError as error:
            yield self._unreadable(self._path(name), error)

    def _check_whiteout(self, level: _Level, name: bytes) -> Findings:
        if not level.known:
            return
        path = self._path(name)
        at = At(level.fd, name)
        if level.opaque:
            yield self._found(Kind.WHITEOUT_IN_OPAQUE, path, fix=lambda: _unlink_unnoticed(at))
        elif lookup.covered(self._stack, self._directory(level), name):
            return
        elif self._inspection.trusted:
            yield self._found(Kind.WHITEOUT_OVER_NOTHING, path, fix=lambda: _unlink_unnoticed(at))
        else:
            told = "not removed: it may have been written over other lowers"
            yield self._found(Kind.WHITEOUT_OVER_NOTHING, path, told)

    def _directory(self, level: _Level) -> Directory:
        return Directory(self._path(), level.lowers, level.marked)

    def _check_attributes(
        self,
        own: dict[bytes, bytes],
        at: At,
        path: bytes,
        merged: Collection[Lower] | None = None,
    ) -> Findings:
        """Check values that mean the same whatever has them."""
        malformed = [
            name
            for name, allowed in ((b"opaque", {b"y", b"x"}), (b"impure", {b"y"}))
            if own.get(name, b"y") not in allowed
        ]
        if not _LINK_COUNT.fullmatch(own.get(b"nlink", b"U+0")):
            malformed.append(b"nlink")
        for name in malformed:
            told = f"{name.decode()} {_shown(own[name])}"
            yield self._found(Kind.ATTRIBUTE_MALFORMED, path, told)
        if b"origin" in own:
            yield from self._inspection.origin(own[b"origin"], at, Place.UPPER, path, merged)

    def _check_file(
        self, level: _Level, own: dict[bytes, bytes], at: At, stat: os.stat_result
    ) -> Findings:
        path = self._path(at.name)
        if b"opaque" in own:
            attribute = self._stack.xattrs.opaque
            yield self._found(
                Kind.OPAQUE_ON_FILE, path, fix=lambda: syscalls.removexattr(at, attribute)
            )
        if b"metacopy" not in own or not modes.S_ISREG(stat.st_mode):
            return
        if not _is_metacopy(own[b"metacopy"]):
            yield self._found(Kind.METACOPY_MALFORMED, path)
        elif (redirect := own.get(b"redirect")) is not None and not lookup.is_redirect(redirect):
            yield self._found(Kind.REDIRECT_MALFORMED, path, f"redirect {_shown(redirect)}")
        elif self._inspection.complete:
            try:
                lookup.lookup(self._stack, self._directory(level), at.name)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                yield self._found(Kind.METACOPY_WITHOUT_DATA, path)

    def _unreadable(self, path: bytes, error: OSError) -> Finding:
        return self._inspection.unreadable(Place.UPPER, path, error)


def _close(level: _Level) -> None:
    if level.fd >= 0:
        syscalls.close(level.fd)
        level.fd = -1


def _shown(value: bytes) -> str:
    """Return a value as it can be told, whatever its length."""
    return os.fsdecode(value[:_VALUE_LIMIT]) + ("..." if len(value) > _VALUE_LIMIT else "")


def _is_metacopy(value: bytes) -> bool:
    """Say whether `value` is a ``struct ovl_metacopy``, or empty, as before Linux 6.6."""
    return not value or (len(value) >= 4 and value[0] == 0 and value[1] == len(value))


def _unlink_unnoticed(at: At) -> None:
    """Remove an object, unnoticed by the times of its directory, which the merged view shows."""
    directory = At(at.directory, b".")
    times = syscalls.stat(directory)
    syscalls.unlink(at)
    syscalls.utime(directory, times.st_atime_ns, times.st_mtime_ns)
