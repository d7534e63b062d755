"""The workdir: where every change to the upper is prepared before one rename publishes it."""

from __future__ import annotations

import errno
import stat as modes
from collections.abc import Iterator
from contextlib import contextmanager

from sessiond.overlay import syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.syscalls import At

_WHITEOUT_MODE = modes.S_IFCHR
_VOLATILE = b"incompat/volatile"


class Workdir:
    """``work/`` for what is in preparation, ``index/`` for hard links that were copied up.

    What is left in ``work/`` by a crash is removed when the workdir is opened.
    """

    def __init__(self, directory: Layer) -> None:
        """Prepare the workdir. Raises OSError: EUCLEAN for the upper of a volatile mount that has
        crashed.
        """
        self._directory = directory
        self._serial = 0
        self._whiteout: At | None = None
        work = directory.at(b"work")
        if syscalls.stat_or_none(work) is not None:
            incompat = Layer(syscalls.open_beneath(directory.root, b"work"))
            try:
                self._refuse_volatile(incompat)
            finally:
                incompat.close()
            clear(work)  # not removed: on a full file system it could not be made again
        for name in (b"work", b"index"):
            at = directory.at(name)
            if syscalls.stat_or_none(at) is None:
                syscalls.mkdir(at, 0o700)
        self.work = syscalls.open_beneath(directory.root, b"work")
        self.index = syscalls.open_beneath(directory.root, b"index")

    @staticmethod
    def _refuse_volatile(work: Layer) -> None:
        try:
            marker = syscalls.stat_or_none(work.at(_VOLATILE))
        except FileNotFoundError:
            return
        if marker is not None:
            raise OSError(
                errno.EUCLEAN,
                "the upper was mounted as volatile and not unmounted, so it may be damaged; "
                "remove work/incompat/volatile in the workdir to use it nevertheless",
            )

    def close(self) -> None:
        if self._whiteout is not None:
            remove_tree(self._whiteout)
        syscalls.close(self.work)
        syscalls.close(self.index)
        self._directory.close()

    def drop_unnamed(self, nlink: bytes) -> None:
        """Remove files from the index whose last name was removed by a process that died then.

        `nlink`: the attribute that tells how many names there are (ovl_verify_index).
        """
        for name, _ in syscalls.scan(self.index):
            at = At(self.index, name)
            stat = syscalls.stat(at)
            if stat.st_nlink == 1 and syscalls.getxattr(at, nlink) == b"U-1":
                syscalls.unlink(at)

    def temporary(self) -> At:
        """Return an unused name."""
        self._serial += 1
        return At(self.work, b"#%x" % self._serial)

    @contextmanager
    def preparing(self) -> Iterator[At]:
        """Hand out an unused name; whatever is still there on the way out is removed.

        So a name that was exchanged holds what it replaced, and one that failed holds a half-made
        object.
        """
        at = self.temporary()
        try:
            yield at
        finally:
            remove_tree(at)

    @contextmanager
    def publishing(self) -> Iterator[At]:
        """Hand out an unused name, which a rename takes to the upper: on failure only, something is
        left to remove.
        """
        at = self.temporary()
        try:
            yield at
        except BaseException:
            remove_tree(at)
            raise

    def make_whiteout(self, at: At) -> None:
        """Put a whiteout at `at`, which must be free: a link to a shared one (ovl_whiteout)."""
        if self._whiteout is not None:
            try:
                syscalls.link(self._whiteout, at)
            except OSError as error:
                if error.errno not in {errno.EMLINK, errno.ENOENT}:
                    raise
                self._whiteout = None
            else:
                return
        shared = self.temporary()
        syscalls.mknod(shared, _WHITEOUT_MODE, 0)
        self._whiteout = shared
        syscalls.link(shared, at)

    def removed_directory(self) -> int:
        """Return a descriptor of a directory that has been removed, for who is in one that
        vanished; -1 where there is no space for one: what they are in is stale then.
        """
        with self.preparing() as at:
            try:
                syscalls.mkdir(at, 0o755)
            except OSError as error:
                if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                    return -1
                raise
            return syscalls.open_path(at)


def remove_tree(at: At) -> None:
    """Remove whatever is at `at`, if anything is."""
    stat = syscalls.stat_or_none(at)
    if stat is None:
        return
    if not modes.S_ISDIR(stat.st_mode):
        syscalls.unlink(at)
        return
    clear(at)
    syscalls.rmdir(at)


def clear(at: At) -> None:
    """Remove whatever is in the directory `at`."""
    # Depth without recursion: a session can nest directories deeper than Python's stack.
    tree = Layer(syscalls.open_path(at))
    try:
        pending = [b""]
        while pending:
            path = pending[-1]
            directory = tree.directory(path)
            subdirectories = []
            for name, _ in syscalls.scan(directory):
                entry = At(directory, name)
                if modes.S_ISDIR(syscalls.stat(entry).st_mode):
                    subdirectories.append(path + b"/" + name if path else name)
                else:
                    syscalls.unlink(entry)
            if subdirectories:
                pending += subdirectories
                continue
            pending.pop()
            if path:
                tree.forget(path)
                syscalls.rmdir(tree.at(path))
    finally:
        tree.close()
