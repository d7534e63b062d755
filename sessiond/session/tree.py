"""Whole directory trees of layers: copied with everything kept, and deleted.

Both work on trees that a user has filled: of any depth (names are only ever resolved in an open
directory, there is no recursion, and few descriptors are open at a time), with any names, and with
overlayfs's whiteouts and xattrs in them. Nobody else may change a tree meanwhile. All functions
block, raise `OSError`, and are called in threads; they call `check` again and again, which stops
them by raising.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from sessiond.session.durable import FULL

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SECTOR = 512
"""Bytes of what st_blocks counts."""
_BLOCK = 1 << 20
"""Bytes copied between two calls of `check`; also what digests are made of."""
_ZEROS = bytes(_BLOCK)

Check = Callable[[], None]

Digests = dict[int, bytes]
"""Of what was copied of each regular file, by its inode number in the source."""


def unchecked() -> None:
    """A `check` that never stops anything."""


def remove_tree(path: Path, check: Check = unchecked) -> None:
    """Delete the directory `path` and all in it; it is no error if it is not there.

    Nothing is deleted through a mount point: that raises EBUSY, before what is mounted is touched.
    """
    with suppress(FileNotFoundError):
        empty_tree(path, check)
        os.rmdir(path)


def empty_tree(path: Path, check: Check = unchecked) -> None:
    """Delete all that is in the directory `path`, as `remove_tree` does."""
    top = os.open(path, _DIRECTORY)
    try:
        _Remover(top, check).remove_all()
    finally:
        os.close(top)


class _Remover:
    """Moves each subdirectory up into `top` before it is opened, so that no tree is deep.

    The rename is also what keeps mount points safe: renaming one fails without looking inside. On a
    full disk there may be no space for another name in `top`: then those that are there go first.
    """

    def __init__(self, top: int, check: Check) -> None:
        self._top = top
        self._check = check
        self._prefix = f"{secrets.token_hex(16)}."  # no name of a user's can be the same
        self._serial = count()

    def remove_all(self) -> None:
        while self._unlink_and_move_up(self._top):
            progress, full = False, None
            for name in self._moved():
                try:
                    self._remove(name)
                    progress = True
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    full = error
            if full is not None and not progress:
                raise full

    def _moved(self) -> list[str]:
        with _entries(self._top) as entries:
            return [entry.name for entry in entries if entry.name.startswith(self._prefix)]

    def _remove(self, name: str) -> None:
        directory = os.open(name, _DIRECTORY, dir_fd=self._top)
        try:
            while self._unlink_and_move_up(directory):
                pass
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=self._top)

    def _unlink_and_move_up(self, directory: int) -> bool:
        """Empty `directory`; false if it was empty already.

        What readdir misses, since entries go while it reads, the next call finds.
        """
        found, progress, full = False, False, None
        with _entries(directory) as entries:
            for entry in entries:
                found = True
                self._check()
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=directory)
                    progress = True
                elif not entry.name.startswith(self._prefix):
                    name = f"{self._prefix}{next(self._serial)}"
                    try:
                        os.rename(entry.name, name, src_dir_fd=directory, dst_dir_fd=self._top)
                        progress = True
                    except OSError as error:
                        if error.errno not in FULL:
                            raise
                        full = error
                else:
                    progress = True
        if full is not None and not progress:
            raise full
        return found


@contextmanager
def _entries(directory: int) -> Iterator[Iterator[os.DirEntry[str]]]:
    """List an open directory as it is now.

    Through a descriptor that was read before, btrfs lists nothing that has come since.
    """
    fd = os.open(".", _DIRECTORY, dir_fd=directory)
    try:
        with os.scandir(fd) as entries:
            yield entries
    finally:
        os.close(fd)


def tree_bytes(path: Path, check: Check = unchecked) -> int:
    """Return the bytes that the directory `path` and all in it take.

    Holes are not counted, and a file with several names once.
    """
    total = 0
    linked: set[int] = set()

    def scan(directory: int) -> list[str]:
        nonlocal total
        subdirectories = []
        total += os.fstat(directory).st_blocks * _SECTOR
        with os.scandir(directory) as entries:
            for entry in entries:
                check()
                if entry.is_dir(follow_symlinks=False):
                    subdirectories.append(entry.name)
                    continue
                inode = entry.stat(follow_symlinks=False)
                if inode.st_nlink > 1:
                    if inode.st_ino in linked:
                        continue
                    linked.add(inode.st_ino)
                total += inode.st_blocks * _SECTOR
        return subdirectories

    directory = os.open(path, _DIRECTORY)
    try:
        levels = [scan(directory)]
        while levels:
            if levels[-1]:
                directory = _step(directory, levels[-1].pop())
                levels.append(scan(directory))
            else:
                levels.pop()
                if levels:
                    directory = _step(directory, "..")
    finally:
        os.close(directory)
    return total


def copy_root(source: Path, target: Path) -> None:
    """Give the directory `target` owner, mode, times and xattrs of the directory `source`.

    Except what overlayfs has noted about `source` itself, such as that it is opaque. What is equal
    already is not set again, for that may take space.
    """
    source_fd = os.open(source, _DIRECTORY)
    try:
        target_fd = os.open(target, _DIRECTORY)
        try:
            wanted = {
                name: os.getxattr(source_fd, name)
                for name in _xattrs(source_fd)
                if _is_not_overlayfs_own(name)
            }
            present = {name: os.getxattr(target_fd, name) for name in _xattrs(target_fd)}
            for name in present.keys() - wanted.keys():
                os.removexattr(target_fd, name)
            _copy_directory_metadata(
                source_fd,
                target_fd,
                keep=lambda name: name in wanted and wanted[name] != present.get(name),
            )
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def is_unchanged(upper: Path, like: Path) -> bool:
    """Say whether the directory `upper` is empty, and has what `copy_root` gave it from `like`.

    But for times, which change with what came and went.
    """
    with os.scandir(upper) as entries:
        if next(entries, None) is not None:
            return False
    return _root_facts(upper) == _root_facts(like)


def _root_facts(path: Path) -> tuple[object, ...]:
    stat_result = path.stat()
    xattrs = {
        name: os.getxattr(path, name) for name in _xattrs(str(path)) if _is_not_overlayfs_own(name)
    }
    return stat_result.st_mode, stat_result.st_uid, stat_result.st_gid, xattrs


def copy_trees(
    source: Path,
    target: Path,
    names: tuple[str, ...],
    *,
    progress: Callable[[int], None],
    check: Check,
    digests: Digests | None = None,
) -> None:
    """Copy the directories `names` from `source` to `target`, an empty directory, as root can.

    Kept are owners, modes, times in ns, all xattrs (so ACLs, capabilities and overlayfs's own),
    device nodes and whiteouts, holes, and hard links, also those from one of `names` to another.
    `progress` is told of bytes as they are written. Nothing is synced. `digests` is filled, for
    `verify.verify_trees`.
    """
    copier = _Copier(progress, check, digests)
    links = target / "links"
    os.mkdir(links, 0o700)
    copier.links = os.open(links, _DIRECTORY)
    try:
        for name in names:
            os.mkdir(target / name, 0o700)
            copier.go(source / name, target / name)
    finally:
        os.close(copier.links)
    remove_tree(links, check)


@dataclass
class _Level:
    """A directory that is being copied."""

    name: str
    inode: os.stat_result
    subdirectories: list[str] = field(default_factory=list)


class SideBySide:
    """Goes through two trees of the same directories, a source and a target, at once.

    Descriptors of the two, as they are open, are what the methods for subclasses are given.
    """

    def __init__(self, check: Check) -> None:
        self._check = check
        self._entry = ""  # what is being looked at, for the error message

    def enter(self, name: str, source: int, target: int) -> None:
        """The subdirectory `name` is about to be opened in both."""

    def visit(self, entries: Iterator[os.DirEntry[str]], source: int, target: int) -> list[str]:
        """Deal with what there is in a directory; return its subdirectories."""
        subdirectories = []
        for entry in entries:
            self._check()
            if entry.is_dir(follow_symlinks=False):
                subdirectories.append(entry.name)
            else:
                self._entry = entry.name
                self.visit_entry(entry.name, source, target)
        self._entry = ""
        return subdirectories

    def visit_entry(self, name: str, source: int, target: int) -> None:
        """Deal with what is no directory."""
        raise NotImplementedError

    def leave(self, source: int, target: int) -> None:
        """All that is in a directory has been dealt with."""
        raise NotImplementedError

    def go(self, source_path: Path, target_path: Path) -> None:
        """Raises OSError, with the full name in the target."""
        levels: list[_Level] = []
        source = os.open(source_path, _DIRECTORY)
        target = os.open(target_path, _DIRECTORY)
        try:
            levels.append(_Level("", os.fstat(source)))
            self._visit(levels[-1], source, target)
            while True:
                if levels[-1].subdirectories:
                    name = levels[-1].subdirectories.pop()
                    self._entry = name
                    self.enter(name, source, target)
                    source = _step(source, name)
                    target = _step(target, name)
                    levels.append(_Level(name, os.fstat(source)))
                    self._entry = ""
                    self._visit(levels[-1], source, target)
                    continue
                self._entry = ""
                self.leave(source, target)
                levels.pop()
                if not levels:
                    return
                source = _step(source, "..")
                target = _step(target, "..")
                _require_same(os.fstat(source), levels[-1].inode)
        except OSError as error:
            names = [level.name for level in levels if level.name] + [self._entry]
            path = target_path.joinpath(*names)
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(source)
            os.close(target)

    def _visit(self, level: _Level, source: int, target: int) -> None:
        with os.scandir(source) as entries:
            level.subdirectories = self.visit(entries, source, target)


class _Copier(SideBySide):
    """Copies trees among which hard links are kept.

    The first copy of each file with several links is also linked into the directory `links`, under
    its inode number: a link can be made from there however deep the first one lies.
    """

    links: int

    def __init__(
        self, progress: Callable[[int], None], check: Check, digests: Digests | None
    ) -> None:
        super().__init__(check)
        self._progress = progress
        self._digests = digests

    def enter(self, name: str, source: int, target: int) -> None:
        os.mkdir(name, 0o700, dir_fd=target)

    def leave(self, source: int, target: int) -> None:
        _copy_directory_metadata(source, target)

    def visit_entry(self, name: str, source: int, target: int) -> None:
        inode = os.stat(name, dir_fd=source, follow_symlinks=False)
        if inode.st_nlink > 1 and self._link(inode, name, target):
            return
        if stat.S_ISREG(inode.st_mode):
            self._copy_file(name, inode, source, target)
        elif stat.S_ISLNK(inode.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        else:
            os.mknod(name, inode.st_mode, inode.st_rdev, dir_fd=target)
        _copy_metadata(inode, name, source, target)
        if inode.st_nlink > 1:
            os.link(
                name,
                str(inode.st_ino),
                src_dir_fd=target,
                dst_dir_fd=self.links,
                follow_symlinks=False,
            )

    def _link(self, inode: os.stat_result, name: str, target: int) -> bool:
        """Link to an earlier copy of the same inode; false if there is none to link to."""
        first = str(inode.st_ino)
        try:
            os.link(first, name, src_dir_fd=self.links, dst_dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            # A whiteout may be one of a million links to one node, on a tmpfs, and need not be.
            if error.errno != errno.EMLINK or not _is_whiteout(inode):
                raise
            os.unlink(first, dir_fd=self.links)
            return False
        return True

    def _copy_file(self, name: str, inode: os.stat_result, source: int, target: int) -> None:
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        reader = os.open(name, os.O_RDONLY | flags, dir_fd=source)
        try:
            writer = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=target
            )
            try:
                digest = None if self._digests is None else Digest(inode)
                self._copy_contents(reader, writer, inode.st_size, digest)
                if self._digests is not None and digest is not None:
                    self._digests[inode.st_ino] = digest.value()
            finally:
                os.close(writer)
        finally:
            os.close(reader)

    def _copy_contents(self, reader: int, writer: int, size: int, digest: Digest | None) -> None:
        os.truncate(writer, size)
        for position, block in blocks_of(reader, size):
            self._check()
            if digest is not None:
                digest.add(position, block)
            for begin, end in _data(reader, position, position + len(block)):
                _write(writer, block[begin - position : end - position], begin)
                self._progress(end - begin)


def blocks_of(fd: int, size: int) -> Iterator[tuple[int, memoryview]]:
    """Read the file of that size, without blocks that are holes: yield positions and contents.

    What is yielded is valid until the next. Raises OSError: ESTALE if the file is shorter.
    """
    buffer = memoryview(bytearray(_BLOCK))
    position = 0
    while position < size:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        position -= position % _BLOCK
        block = buffer[: max(0, min(_BLOCK, size - position))]
        have = 0
        while have < len(block):
            count = os.preadv(fd, [block[have:]], position + have)
            if not count:
                raise OSError(errno.ESTALE, "the file shrank while it was read")
            have += count
        if have:
            yield position, block
        position += _BLOCK


def _data(fd: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where there is data between two positions, that is, no hole."""
    while begin < end:
        try:
            begin = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if begin < end:
            hole = min(end, os.lseek(fd, begin, os.SEEK_HOLE))
            yield begin, hole
            begin = hole


def _write(fd: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(fd, data, position)
        data, position = data[count:], position + count


class Digest:
    """What stands for the contents of a file, its size and its time: holes count as zeros."""

    def __init__(self, inode: os.stat_result) -> None:
        self._hash = hashlib.sha256(b"%d %d" % (inode.st_size, inode.st_mtime_ns))

    def add(self, position: int, block: memoryview) -> None:
        """Blocks come in the order of their positions, each a multiple of their full size."""
        if block.tobytes() != _ZEROS[: len(block)]:
            self._hash.update(b"%d" % position)
            self._hash.update(block)

    def value(self) -> bytes:
        """Half of it: there may be a million."""
        return self._hash.digest()[:16]


def _step(directory: int, name: str) -> int:
    """Open `name` in a directory and close that; on failure it stays open."""
    fd = os.open(name, _DIRECTORY, dir_fd=directory)
    os.close(directory)
    return fd


def _require_same(inode: os.stat_result, expected: os.stat_result) -> None:
    if not os.path.samestat(inode, expected):
        raise OSError(errno.ESTALE, "the directory was moved while it was copied")


def _is_whiteout(inode: os.stat_result) -> bool:
    return stat.S_ISCHR(inode.st_mode) and inode.st_rdev == 0


def _is_not_overlayfs_own(xattr: str) -> bool:
    # What is escaped belongs to an overlay that a user has stacked upon the merged view.
    own = xattr.startswith("trusted.overlay.")
    return not own or xattr.startswith("trusted.overlay.overlay.")


def _xattrs(source: str | int, *, follow_symlinks: bool = True) -> list[str]:
    """Return the names; none where the file system, such as an image's, has no support."""
    try:
        return os.listxattr(source, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise


def _copy_xattrs(source: str, target: str, keep: Callable[[str], bool]) -> None:
    for name in _xattrs(source, follow_symlinks=False):
        if keep(name):
            value = os.getxattr(source, name, follow_symlinks=False)
            os.setxattr(target, name, value, follow_symlinks=False)


def _copy_metadata(inode: os.stat_result, name: str, source: int, target: int) -> None:
    # Owner first, since chown clears setuid bits and capabilities; times last.
    os.chown(name, inode.st_uid, inode.st_gid, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(inode.st_mode):
        os.chmod(name, stat.S_IMODE(inode.st_mode), dir_fd=target)
    # There are no xattr calls with a directory descriptor; its link in /proc does the same.
    _copy_xattrs(
        f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}", keep=lambda _: True
    )
    times = (inode.st_atime_ns, inode.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)


def _copy_directory_metadata(
    source: int, target: int, keep: Callable[[str], bool] = lambda _: True
) -> None:
    inode = os.fstat(source)
    os.chown(target, inode.st_uid, inode.st_gid)
    os.chmod(target, stat.S_IMODE(inode.st_mode))
    for name in _xattrs(source):
        if keep(name):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(inode.st_atime_ns, inode.st_mtime_ns))
