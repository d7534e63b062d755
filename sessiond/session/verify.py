"""Whether a copy of layers is on the disk as it was meant to be.

Contents are read back from the disk: what the kernel has of them in memory is dropped first, which
works once they are synced. They are held against digests made while they were copied, since a file
that is open for writing may have changed in the source by now. Names and attributes are compared
with the source's, as the file system of the copy has them in memory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from sessiond.session.tree import Check, Digest, Digests, SideBySide, blocks_of

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def verify_trees(
    source: Path,
    target: Path,
    names: tuple[str, ...],
    digests: Digests,
    *,
    progress: Callable[[int], None],
    check: Check,
) -> None:
    """Compare the directories `names` of `target`, which is synced, with those of `source`.

    `digests` is what `copy_trees` has made. `progress` is told of bytes as they are read. Raises
    OSError: EIO, with the file's name, at the first that is not as it should be.
    """
    verifier = _Verifier(digests, progress, check)
    for name in names:
        verifier.go(source / name, target / name)


class _Verifier(SideBySide):
    def __init__(self, digests: Digests, progress: Callable[[int], None], check: Check) -> None:
        super().__init__(check)
        self._digests = digests
        self._progress = progress
        self._copies: dict[int, int] = {}
        """Inode numbers, source to target, of files with several names."""

    def visit(self, entries: Iterator[os.DirEntry[str]], source: int, target: int) -> list[str]:
        superfluous = set(os.listdir(target))

        def known() -> Iterator[os.DirEntry[str]]:
            for entry in entries:
                superfluous.discard(entry.name)
                yield entry

        subdirectories = super().visit(known(), source, target)
        for self._entry in superfluous:
            raise _wrong("there is a file that was not copied")
        return subdirectories

    def visit_entry(self, name: str, source: int, target: int) -> None:
        wanted = os.stat(name, dir_fd=source, follow_symlinks=False)
        found = os.stat(name, dir_fd=target, follow_symlinks=False)
        if wanted.st_nlink > 1 and not self._is_first(wanted, found):
            return
        _require_same_attributes(wanted, found)
        # There are no xattr calls with a directory descriptor; its link in /proc does the same.
        _require_same_xattrs(f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}")
        if stat.S_ISREG(wanted.st_mode):
            self._read_back(name, target, self._digests.get(wanted.st_ino))
        else:
            _require(wanted.st_mtime_ns == found.st_mtime_ns, "its time is another")
        if stat.S_ISLNK(wanted.st_mode):
            same = os.readlink(name, dir_fd=source) == os.readlink(name, dir_fd=target)
            _require(same, "it leads elsewhere")

    def leave(self, source: int, target: int) -> None:
        wanted, found = os.fstat(source), os.fstat(target)
        _require_same_attributes(wanted, found)
        _require(wanted.st_mtime_ns == found.st_mtime_ns, "its time is another")
        _require_same_xattrs(source, target)

    def _is_first(self, wanted: os.stat_result, found: os.stat_result) -> bool:
        """Say whether this is the first name of that file. Whiteouts need not be links."""
        if stat.S_ISCHR(wanted.st_mode):
            return True
        copy = self._copies.get(wanted.st_ino)
        if copy is None:
            self._copies[wanted.st_ino] = found.st_ino
            return True
        _require(copy == found.st_ino, "it is no hard link any more")
        return False

    def _read_back(self, name: str, target: int, wanted: bytes | None) -> None:
        fd = os.open(name, _OPEN, dir_fd=target)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            inode = os.fstat(fd)
            digest = Digest(inode)
            for position, block in blocks_of(fd, inode.st_size):
                self._check()
                digest.add(position, block)
                self._progress(len(block))
        finally:
            os.close(fd)
        _require(digest.value() == wanted, "what is read back from the disk is not what was copied")


def _require_same_attributes(wanted: os.stat_result, found: os.stat_result) -> None:
    for what in ("st_mode", "st_uid", "st_gid", "st_rdev"):
        _require(getattr(wanted, what) == getattr(found, what), f"its {what} is another")


def _require_same_xattrs(source: str | int, target: str | int) -> None:
    follow = isinstance(source, int)

    def xattrs(file: str | int) -> dict[str, bytes]:
        return {
            name: os.getxattr(file, name, follow_symlinks=follow)
            for name in os.listxattr(file, follow_symlinks=follow)
        }

    wanted, found = xattrs(source), xattrs(target)
    for name, value in wanted.items():
        _require(found.pop(name, None) == value, f"its extended attribute {name} is another")
    for name in found:
        # A security module may label what others do not.
        _require(name.startswith("security."), f"it has the extended attribute {name}")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise _wrong(problem)


def _wrong(problem: str) -> OSError:
    return OSError(errno.EIO, problem)
