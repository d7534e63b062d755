"""What the checks of upper and workdir have in common: the layers, and how a finding is made."""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from sessiond.overlay import origin, syscalls
from sessiond.overlay.check.findings import Finding, Kind, Place
from sessiond.overlay.lookup import Lower
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At, Object

Findings = Iterator[Finding]
Fix = Callable[[], None]

_KNOWN = frozenset(
    {
        *(b"opaque", b"redirect", b"origin", b"impure", b"nlink", b"upper"),
        *(b"uuid", b"metacopy", b"protattr", b"whiteout"),
    }
)
"""Attributes of overlayfs up to Linux 6.18 (enum ovl_xattr)."""

_OVERLAYS = (b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs.")


@dataclass
class _Tally:
    """Findings of a kind that are told as one, because there may be as many as files."""

    first: bytes
    count: int = 1


@dataclass
class Inspection:
    """One run of the checker.

    `stack` is for looking only; `complete` says whether it has all lowers, without which nothing
    can be said of what upper objects hide or continue.
    """

    stack: Stack
    repair: bool
    complete: bool
    trusted: bool = True
    """Nothing speaks against it that these are the lowers that the upper was written over."""
    repaired: bool = False
    _tallies: dict[tuple[Kind, str], _Tally] = field(default_factory=dict)

    def found(
        self, kind: Kind, place: Place, path: bytes, detail: str = "", *, fix: Fix | None = None
    ) -> Finding:
        """Make a finding, and mend it if that is asked for."""
        repaired = False
        if fix is not None and self.repair:
            try:
                fix()
            except OSError as error:
                detail = f"could not be repaired: {error.strerror}"
            else:
                repaired = self.repaired = True
        return Finding(kind, place, path or b".", detail, repaired=repaired)

    def unreadable(self, place: Place, path: bytes, error: OSError) -> Finding:
        """Make a finding of what keeps an object from being looked at; raise it if that is us."""
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise error
        return self.found(Kind.UNREADABLE, place, path, error.strerror or str(error))

    def count(self, kind: Kind, path: bytes, what: str = "") -> None:
        """Count a finding in the upper that `tallies` tells."""
        tally = self._tallies.get((kind, what))
        if tally is None:
            self._tallies[kind, what] = _Tally(path)
        else:
            tally.count += 1

    def tallies(self) -> Findings:
        """Tell what was counted."""
        for (kind, what), tally in self._tallies.items():
            yield Finding(kind, Place.UPPER, tally.first, what, tally.count)

    def is_marked(self, at: Object) -> bool:
        """Say whether an object has attributes of any overlay. Raises OSError."""
        return any(name.startswith(_OVERLAYS) for name in syscalls.listxattr(at))

    def attributes(
        self, at: Object, place: Place, path: bytes
    ) -> tuple[dict[bytes, bytes], Findings]:
        """Return the overlay's own attributes of an object, by their names without prefix, and what
        is wrong with their names. Raises OSError.
        """
        own: dict[bytes, bytes] = {}
        findings = []
        xattrs = self.stack.xattrs
        for name in syscalls.listxattr(at):
            if xattrs.is_own(name):
                short = name[len(xattrs.prefix) :]
                if short in _KNOWN:
                    own[short] = syscalls.getxattr(at, name) or b""
                else:
                    told = os.fsdecode(name)
                    findings.append(self.found(Kind.ATTRIBUTE_UNKNOWN, place, path, told))
            elif not name.startswith(xattrs.prefix):
                for prefix in filter(name.startswith, _OVERLAYS):
                    told = f"attributes that begin with {prefix.decode()}"
                    self.count(Kind.FOREIGN_MARKS, path, told)
        return own, iter(findings)

    def origin(
        self, value: bytes, at: At, place: Place, path: bytes, merged: Collection[Lower] | None
    ) -> Findings:
        """Check where an object was copied up from, by its ``overlay.origin``. Of a directory that
        is one of those that it merges with.
        """
        if not value:  # unknown, which is no fault
            return
        if not origin.is_well_formed(value):
            name = self.stack.xattrs.origin
            yield self.found(
                Kind.ORIGIN_MALFORMED, place, path, fix=lambda: syscalls.setxattr(at, name, b"")
            )
            return
        source = origin.decode(value, self.stack.lowers)
        if source is None:
            if self.complete:
                self.count(Kind.ORIGIN_GONE, path)
            return
        if modes.S_IFMT(source.st_mode) != modes.S_IFMT(syscalls.stat(at).st_mode):
            yield self.found(Kind.ORIGIN_WRONG_TYPE, place, path)
        elif (
            merged is not None
            and self.complete
            and not any(os.path.samestat(source, syscalls.stat(one.at())) for one in merged)
        ):
            self.count(Kind.ORIGIN_GONE, path)
