"""Retain: what the merged view shows at some paths is brought into the upper that comes next.

That upper is empty, and over the image alone; so after a reset these paths are as they were,
deletions included. A file of the present upper gets a second name in the next one: nothing is
copied, and who has it open goes on in it. What committed layers have, which belongs to snapshots,
is copied, as a reflink where that can be; so are files with several names, since of the others
nobody knows whether they are to be retained.

The names in the present upper go last, by `Retain.settle`, when nobody can want to go back to it
any more. Until then a file has a link too many.
"""

from __future__ import annotations

import errno
import stat as modes
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from sessiond.keep_rules import KeepRules
from sessiond.overlay import syscalls
from sessiond.overlay.directory import copy_object
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import ABSENT, Entry, Presence, join, lookup, lookup_path, names
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.task import Task
from sessiond.overlay.xattrs import copy_attributes


class Retain:
    """Fills the upper of a stack that is served next; in any thread, while nothing changes."""

    def __init__(
        self,
        session: Stack,
        target: Layer,
        rules: KeepRules,
        paths: Sequence[bytes],
        cancelled: Callable[[], bool],
    ) -> None:
        """`session`, a copy of the session's layers, and `target`, that upper, are taken over.

        `rules`: what is kept anyhow, and left out. `cancelled` is asked often.
        """
        self._session = session
        self._target = target
        self._image = Stack((session.lowers[-1].copy(),), None, None, session.options)
        self._rules = rules
        self._cancelled = cancelled
        self._paths = _outermost([path for path in paths if not rules.keep(path)])
        self._copies: dict[tuple[int, int], bytes] = {}
        """Paths of copies of files that have several names, by the inode that was copied."""
        self._linked: list[bytes] = []
        """Paths of files that have a name in both uppers."""
        self._ways: list[tuple[bytes, Entry]] = []
        """Directories above what is retained, and what they are to be like."""

    def close(self) -> None:
        self._session.close()
        self._image.close()
        self._target.close()

    def run(self) -> None:
        """Do it; then all is on disk. Raises OSError: ENOSPC, ECANCELED; the target is of no use
        then.
        """
        for path in self._paths:
            self._check()
            self._retain(path)
        for path, like in reversed(self._ways):
            source = self._source(path, like)
            copy_attributes(source, self._target.at(path), like.stat, self._session.xattrs)
        syscalls.syncfs(self._target.root)

    def settle(self) -> None:
        """Take the files' names from the former upper, which nobody will go back to."""
        assert self._session.upper is not None
        for path in self._linked:
            with suppress(FileNotFoundError, NotADirectoryError):  # it is being deleted already
                syscalls.unlink(self._session.upper.at(path))

    def _check(self) -> None:
        if self._cancelled():
            raise syscalls.failure(errno.ECANCELED)

    def _retain(self, path: bytes) -> None:
        top = Task(path, lookup_path(self._session, path), lookup_path(self._image, path))
        if top.is_of(self._session.lowers[-1]):
            return
        self._make_ways(path.rpartition(b"/")[0])
        pending = [top]
        while pending:
            self._check()
            task = pending.pop()
            if task.finish:
                self._finish(task)
            elif task.is_of(self._session.lowers[-1]):
                continue
            elif not task.entry.positive:
                syscalls.mknod(self._target.at(task.path), modes.S_IFCHR, 0)
            elif task.entry.is_directory:
                self._make_directory(task)
                pending.append(task._replace(finish=True))
                pending += self._inside(task)
            else:
                self._bring_file(task)

    def _make_ways(self, path: bytes) -> None:
        """Make the directories that lead to what is retained, like the image's or the session's."""
        made = b""
        for name in path.split(b"/") if path else ():
            made = join(made, name)
            at = self._target.at(made)
            if syscalls.stat_or_none(at) is not None:
                continue
            like = lookup_path(self._image, made)
            if not like.is_directory:
                like = lookup_path(self._session, made)
            syscalls.mkdir(at, 0o700)
            syscalls.setxattr(at, self._session.xattrs.impure, b"y")
            self._ways.append((made, like))

    def _make_directory(self, task: Task) -> None:
        at, xattrs = self._target.at(task.path), self._session.xattrs
        syscalls.mkdir(at, 0o700)
        syscalls.setxattr(at, xattrs.impure, b"y")
        if task.below.is_directory and not task.merges(self._session.lowers[-1]):
            syscalls.setxattr(at, xattrs.opaque, b"y")

    def _inside(self, task: Task) -> Iterator[Task]:
        shown = task.entry.directory(task.path)
        image = None
        found = set(names(self._session, shown))
        if task.below.is_directory and task.merges(self._session.lowers[-1]):
            image = task.below.directory(task.path)
            found.update(names(self._image, image))
        for name in found:
            if not self._rules.keep(path := join(task.path, name)):
                below = ABSENT if image is None else lookup(self._image, image, name)
                yield Task(path, lookup(self._session, shown, name), below)

    def _finish(self, task: Task) -> None:
        """Give a directory, which is complete, its attributes."""
        source, target = self._source(task.path, task.entry), self._target.at(task.path)
        copy_attributes(source, target, syscalls.stat(source), self._session.xattrs)

    def _bring_file(self, task: Task) -> None:
        """Give it another name, or copy it."""
        source, target = self._source(task.path, task.entry), self._target.at(task.path)
        stat = syscalls.stat(source)
        if stat.st_nlink == 1 and task.entry.presence is Presence.UPPER and not task.entry.metacopy:
            syscalls.link(source, target)
            self._linked.append(task.path)
            return
        inode = (stat.st_dev, stat.st_ino)
        if inode in self._copies:
            syscalls.link(self._target.at(self._copies[inode]), target)
            return
        contents = task.entry.lowers[-1].at() if task.entry.metacopy else source
        copy_object(contents, source, target, self._session.xattrs, self._cancelled)
        if stat.st_nlink > 1:
            self._copies[inode] = task.path

    def _source(self, path: bytes, entry: Entry) -> At:
        """Return the topmost object that `entry` stands for, of the session or the image."""
        if entry.presence is Presence.UPPER:
            assert self._session.upper is not None
            return self._session.upper.at(path)
        return entry.lowers[0].at()


def _outermost(paths: Sequence[bytes]) -> list[bytes]:
    """Return paths without those that are below others."""
    found: list[bytes] = []
    for path in sorted(set(paths), key=lambda path: path.split(b"/")):
        if not found or not (path + b"/").startswith(found[-1] + b"/"):
            found.append(path)
    return found
