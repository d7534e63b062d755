"""What a merged view shows at a path is copied to a layer over the image.

That is what differs from the image: copies of what was made or changed, and whiteouts for what is
gone.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Callable
from typing import NamedTuple

from sessiond.keep_rules import KeepRules
from sessiond.overlay import syscalls
from sessiond.overlay.directory import copy_object
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import ABSENT, Entry, Presence, join, lookup, lookup_path, names
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout_device
from sessiond.overlay.workdir import remove_tree
from sessiond.overlay.xattrs import copy_attributes


class Task(NamedTuple):
    """An object to be brought into the layer, or a directory in which that is done."""

    path: bytes
    entry: Entry
    """What the merged view shows."""
    below: Entry
    """What the image shows there."""
    finish: bool = False
    """All that is in the directory has come before."""

    def merges(self, image: Layer) -> bool:
        """Say whether what `image` has at the path is part of what the merged view shows."""
        lowers = self.entry.lowers
        return bool(lowers) and lowers[-1].layer is image and lowers[-1].path == self.path

    def is_of(self, image: Layer) -> bool:
        """Say whether the object, and all in it, is that of `image` at the same path."""
        if not self.entry.positive:
            return not self.below.positive
        alone = self.entry.presence is Presence.LOWER and len(self.entry.lowers) == 1
        return alone and self.merges(image)


class AsShown:
    """Copies what a merged view shows at paths to a layer over the image, in any thread, while
    nothing changes.
    """

    def __init__(
        self, session: Stack, target: Layer, rules: KeepRules, cancelled: Callable[[], bool]
    ) -> None:
        """`session` and `target` are taken over. What `rules` keep is left out. `cancelled` is
        asked often.
        """
        self._session = session
        self._target = target
        self._image = Stack((session.lowers[-1].copy(),), None, None, session.options)
        self._rules = rules
        self._cancelled = cancelled
        self._links: dict[tuple[int, int], bytes] = {}
        """Paths of copies of files that have several names, by the inode that was copied."""

    def close(self) -> None:
        self._session.close()
        self._image.close()
        self._target.close()

    def _check(self) -> None:
        if self._cancelled():
            raise syscalls.failure(errno.ECANCELED)

    def _remove_way(self, path: bytes) -> None:
        """Remove what leads to what was kept below `path`, where there is no directory any more.

        Raises ENOTEMPTY if there is something still, though out of reach.
        """
        if syscalls.stat_or_none(self._target.at(path)) is None:
            return
        top, pending = path, [path]
        while pending:
            path = pending.pop()
            directory = self._target.directory(path)
            for name, _ in syscalls.scan(directory):
                stat = syscalls.stat(At(directory, name))
                if modes.S_ISDIR(stat.st_mode):
                    pending.append(join(path, name))
                elif not is_whiteout_device(stat):
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self._target.forget_all()
        remove_tree(self._target.at(top))

    def _copy(self, path: bytes) -> None:
        entry, below = lookup_path(self._session, path), lookup_path(self._image, path)
        pending = [Task(path, entry, below)]
        while pending:
            self._check()
            task = pending.pop()
            if not task.entry.is_directory:
                self._remove_way(task.path)
            if task.finish:
                self._finish(task)
            elif not task.entry.positive:
                if task.below.positive:
                    syscalls.mknod(self._target.at(task.path), modes.S_IFCHR, 0)
            elif (
                task.is_of(self._session.lowers[-1])
                and syscalls.stat_or_none(self._target.at(task.path)) is None
            ):
                continue
            elif task.entry.is_directory:
                pending.append(task._replace(finish=True))
                pending += self._begin_directory(task)
            else:
                self._copy_file(task)

    def _begin_directory(self, task: Task) -> list[Task]:
        """Make a directory; return what is to be done in it."""
        at = self._target.at(task.path)
        opaque = self._session.xattrs.opaque
        found: set[bytes] = set()
        if syscalls.stat_or_none(at) is None:
            syscalls.mkdir(at, 0o700)
        else:  # a way, in which others may be left that lead to nothing
            found.update(name for name, _ in syscalls.scan(self._target.directory(task.path)))
        if syscalls.getxattr(at, opaque) is not None:
            syscalls.removexattr(at, opaque)
        shown = task.entry.directory(task.path)
        found.update(names(self._session, shown))
        image = None
        if task.below.is_directory:
            if task.merges(self._session.lowers[-1]):
                image = task.below.directory(task.path)
                found.update(names(self._image, image))
            else:
                syscalls.setxattr(at, opaque, b"y")
        return [
            Task(
                path,
                lookup(self._session, shown, name),
                ABSENT if image is None else lookup(self._image, image, name),
            )
            for name in found
            if not self._rules.keep(path := join(task.path, name))
        ]

    def _finish(self, task: Task) -> None:
        """Give a directory, which is complete, its attributes."""
        source, target = self._at(task), self._target.at(task.path)
        copy_attributes(source, target, syscalls.stat(source), self._session.xattrs)

    def _copy_file(self, task: Task) -> None:
        source, target = self._at(task), self._target.at(task.path)
        stat = syscalls.stat(source)
        inode = (stat.st_dev, stat.st_ino)
        if stat.st_nlink > 1 and inode in self._links:
            syscalls.link(self._target.at(self._links[inode]), target)
            return
        contents = task.entry.lowers[-1].at() if task.entry.metacopy else source
        copy_object(contents, source, target, self._session.xattrs, self._cancelled)
        if stat.st_nlink > 1:
            self._links[inode] = task.path

    def _at(self, task: Task) -> At:
        """Return the topmost object of what the merged view shows."""
        return self._source(task.path, task.entry)

    def _source(self, path: bytes, entry: Entry) -> At:
        """Return the topmost object that `entry` stands for, of the session or the image."""
        if entry.presence is Presence.UPPER:
            assert self._session.upper is not None
            return self._session.upper.at(path)
        return entry.lowers[0].at()
