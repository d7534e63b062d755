"""The check of a workdir: what a crash has left, what forbids a mount, and the index."""

from __future__ import annotations

import binascii
import errno
import os
import stat as modes
from collections.abc import Callable
from functools import partial

from sessiond.overlay import origin, syscalls
from sessiond.overlay.check.findings import Finding, Kind, Place
from sessiond.overlay.check.inspection import Findings, Fix, Inspection
from sessiond.overlay.layer import Layer
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout_device
from sessiond.overlay.workdir import remove_tree

_Check = Callable[[At, bytes, os.stat_result], Findings]
"""A check of one entry: its address, its path in the workdir and its stat(2)."""


def check_workdir(inspection: Inspection, work: Layer) -> Findings:
    """Yield what is wrong in the workdir."""
    check = _Workdir(inspection, work)
    yield from check.top()
    yield from check.entries(b"work", check.leftover)
    yield from check.entries(b"work/incompat", check.incompatible)
    yield from check.entries(b"index", check.index)


class _Workdir:
    def __init__(self, inspection: Inspection, work: Layer) -> None:
        self._inspection = inspection
        self._work = work

    def entries(self, path: bytes, each: _Check) -> Findings:
        """Check each entry of a directory, if it is there and is one."""
        try:
            directory = self._work.directory(path)
            for entry in syscalls.scan_lazily(directory):
                at, name = At(directory, entry.name), path + b"/" + entry.name
                try:
                    yield from each(at, name, syscalls.stat(at))
                except OSError as error:
                    yield self._inspection.unreadable(Place.WORKDIR, name, error)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                yield self._inspection.unreadable(Place.WORKDIR, path, error)

    def top(self) -> Findings:
        for entry in syscalls.scan_lazily(self._work.root):
            if entry.name not in {b"work", b"index"}:
                yield self._found(Kind.WORKDIR_FOREIGN, entry.name)
            elif not entry.is_dir(follow_symlinks=False):
                yield self._found(Kind.WORKDIR_BLOCKED, entry.name)

    def leftover(self, at: At, path: bytes, stat: os.stat_result) -> Findings:
        if at.name != b"incompat" or not modes.S_ISDIR(stat.st_mode):
            yield self._found(Kind.WORKDIR_LEFTOVER, path, fix=partial(remove_tree, at))

    def incompatible(self, at: At, path: bytes, _: os.stat_result) -> Findings:
        yield self._found(Kind.VOLATILE if at.name == b"volatile" else Kind.INCOMPATIBLE, path)

    def index(self, at: At, path: bytes, stat: os.stat_result) -> Findings:
        """Check an entry of the index as ovl_verify_index does."""
        if at.name.startswith(b"#"):
            yield self._found(Kind.WORKDIR_LEFTOVER, path, fix=partial(remove_tree, at))
            return
        handle = _handle(at.name)
        if handle is None:
            yield self._found(Kind.INDEX_NAME_MALFORMED, path)
        elif is_whiteout_device(stat) or modes.S_ISDIR(stat.st_mode):
            yield self._found(Kind.INDEX_FOR_NFS, path)
        elif syscalls.getxattr(at, self._inspection.stack.xattrs.origin) != handle:
            yield self._found(Kind.INDEX_MISMATCH, path)
        else:
            yield from self._link_count(handle, at, path, stat)

    def _link_count(self, handle: bytes, at: At, path: bytes, stat: os.stat_result) -> Findings:
        """Check ``overlay.nlink``, by which the merged view has a number of names of the file.

        How many of them are names in lowers that nothing hides is not known here, only how many are
        in the upper, and how many there are in the lowers.
        """
        source = origin.decode(handle, self._inspection.stack.lowers)
        in_upper = stat.st_nlink - 1  # one is the index's
        value = syscalls.getxattr(at, self._inspection.stack.xattrs.nlink) or b""
        base = stat.st_nlink if value[:1] == b"U" else source and source.st_nlink
        try:
            difference = int(value[1:])
        except ValueError:
            yield self._found(Kind.INDEX_LINK_COUNT, path, "none is noted")
            return
        if base is None:
            return
        count = base + difference
        if count <= 0 and in_upper == 0:
            yield self._found(Kind.INDEX_ORPHAN, path, fix=partial(syscalls.unlink, at))
        elif count < in_upper or (source is not None and count > in_upper + source.st_nlink):
            told = f"{count}, with {in_upper} names in the upper"
            yield self._found(Kind.INDEX_LINK_COUNT, path, told)

    def _found(
        self, kind: Kind, path: bytes, detail: str = "", *, fix: Fix | None = None
    ) -> Finding:
        return self._inspection.found(kind, Place.WORKDIR, path, detail, fix=fix)


def _handle(name: bytes) -> bytes | None:
    """Return the file handle that an entry of the index is named for."""
    try:
        handle = binascii.unhexlify(name)
    except ValueError:
        return None
    return handle if origin.is_well_formed(handle) else None
