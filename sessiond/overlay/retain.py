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

from collections.abc import Callable, Sequence
from contextlib import suppress

from sessiond.keep_rules import KeepRules
from sessiond.overlay import syscalls
from sessiond.overlay.as_shown import AsShown, Task
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import Entry, Presence, join, lookup_path
from sessiond.overlay.stack import Stack
from sessiond.overlay.xattrs import copy_attributes


class Retain(AsShown):
    """Fills the upper of a stack that is to be served next."""

    def __init__(
        self,
        session: Stack,
        target: Layer,
        rules: KeepRules,
        paths: Sequence[bytes],
        cancelled: Callable[[], bool],
    ) -> None:
        """`session`, a copy of the session's layers, and `target`, that upper, are taken over.

        `rules`: what is kept anyhow. `cancelled` is asked often.
        """
        super().__init__(session, target, rules, cancelled)
        self._paths = _outermost([path for path in paths if not rules.keep(path)])
        self._linked: list[bytes] = []
        """Paths of files that have a name in both uppers."""
        self._ways: list[tuple[bytes, Entry]] = []
        """Directories above what is retained, and what they are to be like."""

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

    def _retain(self, path: bytes) -> None:
        task = Task(path, lookup_path(self._session, path), lookup_path(self._image, path))
        if task.is_of(self._session.lowers[-1]):
            return
        self._make_ways(path.rpartition(b"/")[0])
        self._copy(path)

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

    def _begin_directory(self, task: Task) -> list[Task]:
        tasks = super()._begin_directory(task)
        syscalls.setxattr(self._target.at(task.path), self._session.xattrs.impure, b"y")
        return tasks

    def _copy_file(self, task: Task) -> None:
        if task.entry.presence is Presence.UPPER and not task.entry.metacopy:
            source = self._at(task)
            if syscalls.stat(source).st_nlink == 1:
                syscalls.link(source, self._target.at(task.path))
                self._linked.append(task.path)
                return
        super()._copy_file(task)


def _outermost(paths: Sequence[bytes]) -> list[bytes]:
    """Return paths without those that are below others."""
    found: list[bytes] = []
    for path in sorted(set(paths), key=lambda path: path.split(b"/")):
        if not found or not (path + b"/").startswith(found[-1] + b"/"):
            found.append(path)
    return found
