"""Commit: what the merged view shows at a path is copied to what is kept, while programs go on.

Written is what differs from the image: copies of what was made or changed, and whiteouts for what
is gone. That is done aside, in the workdir of what is kept, under the same paths: first all, then
again what was touched meanwhile, and in the end, while nothing changes, the little that is left. A
copy that was made while its original changed may be of no moment at all; but then that was touched,
and it is copied again before anybody sees it. At last renames put all in its place. The rules do
not name the path yet, so nobody sees what is half done. What is kept below it already stays.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as modes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sessiond.overlay import syscalls
from sessiond.overlay.directory import copy_object
from sessiond.overlay.keep import Keep
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import (
    ABSENT,
    Identity,
    Presence,
    join,
    lookup,
    lookup_path,
    names,
)
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.task import Task
from sessiond.overlay.whiteout import is_whiteout_device
from sessiond.overlay.workdir import remove_tree
from sessiond.overlay.xattrs import copy_attributes

log = logging.getLogger(__name__)

_PATH_LIMIT = 4096
"""Bytes (PATH_MAX). Programs can nest directories without end; each takes memory and time here."""
_LINKS_LIMIT = 250_000
"""Names of files with several that are remembered: they change together."""
_OBJECT_BYTES = 4096
"""What an object counts for, besides its contents, when it is asked how much was copied."""
_ATTEMPTS = 3
"""As for a snapshot: how often a file that is written to all the while is copied."""
_FATAL = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ECANCELED),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG, errno.EMLINK),
    }
)
"""All else, while programs go on, may be because what is copied has just changed."""


class Commit:
    """Copies paths. One thread at a time calls it; in between, programs may change the session.

    `copy`, then `renew` as often as it is worth it, at last with `last`; `publish`, and perhaps
    `undo`. `close` in any case: only what was published is left.
    """

    def __init__(
        self,
        session: Stack,
        keep: Keep,
        paths: Sequence[bytes],
        cancelled: Callable[[], bool],
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """`session`, taken over: a copy of the session's layers. `cancelled` is asked often.

        `report` is told how many bytes of how many are copied. Raises OSError: ENOSPC.
        """
        self._session = session
        self._kept = keep.stack.writable.copy()
        self._image = Stack((session.lowers[-1].copy(),), None, None, session.options)
        self._rules = keep.rules
        self.paths = _topmost([path for path in paths if not keep.rules.keep(path)])
        self._roots = set(self.paths)
        self._cancelled = cancelled
        self._report = report
        self._done = self._total = 0
        self._objects = 0
        self._last = False
        """Nothing changes any more."""
        self._linked: dict[Identity, dict[bytes, Identity]] = {}
        """Of files that have several names, those copied: with the inode that the copy is of. Each
        is there, of that inode, until it is forgotten.
        """
        self._links = 0
        self._unsure: dict[bytes, bool] = {}
        """Paths of what could not be copied since it changed."""
        self._undo: list[Callable[[], None]] = []
        self._aside = keep.stack.workdir.temporary()
        try:
            syscalls.mkdir(self._aside, 0o700)
            self._copies = Layer(syscalls.open_path(self._aside))
        except BaseException:
            remove_tree(self._aside)
            self._close_layers()
            raise

    def close(self) -> None:
        """Remove what was not published, or what that has replaced."""
        self._copies.close()
        self._close_layers()
        remove_tree(self._aside)

    def _close_layers(self) -> None:
        self._session.close()
        self._image.close()
        self._kept.close()

    def copy(self) -> None:
        """Copy all. Raises OSError: ENOSPC, ECANCELED."""
        self._total = sum(_bytes(task) for path in self.paths for task in self._walk(path))
        self._require_space()
        self._report(0, self._total)
        self._unsure.clear()
        for path in self.paths:
            self._copy(path)

    def renew(
        self,
        session: Stack,
        touched: Mapping[bytes, bool],
        identities: Collection[Identity],
        *,
        last: bool = False,
    ) -> int:
        """Copy again what was `touched` (see `Touched`); return how many bytes that were, about.

        `session`, taken over, is a later copy of the session's layers. With `last`, nothing changes
        until `publish` has returned. Raises as `copy`.
        """
        self._session.close()
        self._session, self._last = session, last
        before = self._done + self._objects * _OBJECT_BYTES
        wanted = self._relevant({**touched, **dict.fromkeys(self._unsure, True)})
        for identity in identities:
            for path in self._linked.get(identity, ()):
                wanted.setdefault(path, False)
        self._unsure.clear()
        self._renew(sorted(wanted.items(), key=lambda item: item[0].split(b"/")))
        return self._done + self._objects * _OBJECT_BYTES - before

    def sync(self) -> None:
        """Write it to disk, which takes long; the little that comes later does not."""
        syscalls.syncfs(self._kept.root)

    def publish(self) -> None:
        """Put all in its place; it is on disk then. If that fails, nothing has changed.

        Precondition: `renew` was the `last`, and `keep` has ways to where the paths are. Raises
        OSError: ENOTEMPTY where something is kept below what is no directory any more.
        """
        self._kept.forget_all()  # there may be other ways by now
        try:
            for path in self.paths:
                self._put(path)
            self.sync()
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Take it away again, and put back what was there before."""
        while self._undo:
            self._undo.pop()()

    # What is copied

    def _check(self) -> None:
        if self._cancelled():
            raise syscalls.failure(errno.ECANCELED)

    def _require_space(self) -> None:
        upper = self._session.upper
        if upper is not None and upper.device == self._kept.device:
            return  # they may share blocks
        space = syscalls.statvfs(self._kept.root)
        if self._total > space.f_bfree * space.f_frsize:
            raise syscalls.failure(errno.ENOSPC)

    @contextmanager
    def _uncertain(self, path: bytes) -> Iterator[None]:
        """Put off what fails because it has just changed."""
        try:
            yield
        except OSError as error:
            if self._last or error.errno in _FATAL:
                raise
            self._unsure[path] = True

    def _walk(self, path: bytes) -> Iterator[Task]:
        """Yield what differs from the image; a directory before what is in it, and once after."""
        levels: list[Iterator[Task]] = []
        with self._uncertain(path):
            shown, below = lookup_path(self._session, path), lookup_path(self._image, path)
            levels.append(iter([Task(path, shown, below)]))
        while levels:
            self._check()
            following = next(levels[-1], None)
            if following is None:
                levels.pop()
                continue
            if following.is_of(self._session.lowers[-1]):
                continue
            if len(following.path) >= _PATH_LIMIT:
                reason = "what is nested so deep that its path is too long cannot be committed"
                raise OSError(errno.ENAMETOOLONG, reason, b"/" + following.path[:100] + b"...")
            yield following
            if following.entry.is_directory and not following.finish:
                levels.append(iter([following._replace(finish=True)]))
                levels.append(self._inside(following))

    def _inside(self, task: Task) -> Iterator[Task]:
        shown = task.entry.directory(task.path)
        image = None
        found: set[bytes] = set()
        with self._uncertain(task.path):
            found.update(names(self._session, shown))
            if task.below.is_directory and task.merges(self._session.lowers[-1]):
                image = task.below.directory(task.path)
                found.update(names(self._image, image))
        while found:
            path = join(task.path, name := found.pop())
            if self._rules.keep(path):
                continue
            following = None
            with self._uncertain(path):
                below = ABSENT if image is None else lookup(self._image, image, name)
                following = Task(path, lookup(self._session, shown, name), below)
            if following is not None:
                yield following

    # The copies

    def _copy(self, path: bytes) -> None:
        """Copy what is at `path`, of which there is no copy yet."""
        self._make_parents(path)
        for task in self._walk(path):
            with self._uncertain(task.path):
                if task.finish:
                    self._finish(task)
                elif not task.entry.positive:
                    syscalls.mknod(self._copies.at(task.path), modes.S_IFCHR, 0)
                elif task.entry.is_directory:
                    self._make_directory(task)
                else:
                    self._copy_file(task)
            self._objects += not task.finish

    def _make_parents(self, path: bytes) -> None:
        walked = b""
        for component in path.split(b"/")[:-1]:
            walked = join(walked, component)
            if self._copies.stat_or_none(walked) is None:
                syscalls.mkdir(self._copies.at(walked), 0o700)

    def _make_directory(self, task: Task) -> None:
        at = self._copies.at(task.path)
        syscalls.mkdir(at, 0o700)
        if task.below.is_directory and not task.merges(self._session.lowers[-1]):
            syscalls.setxattr(at, self._session.xattrs.opaque, b"y")

    def _finish(self, task: Task) -> None:
        """Give a directory, which is complete, its attributes."""
        with self._original(task) as source:
            target = self._copies.at(task.path)
            copy_attributes(source, target, syscalls.stat(source), self._session.xattrs)

    def _copy_file(self, task: Task) -> None:
        target = self._copies.at(task.path)
        with self._original(task) as source:
            stat = syscalls.stat(source)
            inode = (stat.st_dev, stat.st_ino)
            if stat.st_nlink > 1 and self._link(task, inode, target):
                self._note_link(task, inode)
                return
            contents = task.entry.lowers[-1].at() if task.entry.metacopy else source
            for _ in range(_ATTEMPTS):
                xattrs = self._session.xattrs
                copy_object(contents, source, target, xattrs, self._cancelled, on_disk=False)
                before, stat = stat, syscalls.stat(source)
                if not self._last or _version(before) == _version(stat):
                    break
                syscalls.unlink(target)
            else:
                copy_object(contents, source, target, xattrs, self._cancelled, on_disk=False)
                log.warning("/%s is written to all the while", os.fsdecode(task.path))
        if stat.st_nlink > 1:
            self._note_link(task, inode)
        self._done += _size(stat)
        self._total = max(self._done, self._total)
        self._report(self._done, self._total)

    def _link(self, task: Task, inode: Identity, target: At) -> bool:
        """Make the copy a name of one that there is of the same file; return whether there is."""
        for path, original in self._linked.get(task.entry.identity, {}).items():
            if original == inode:
                syscalls.link(self._copies.at(path), target)
                return True
        return False

    def _note_link(self, task: Task, inode: Identity) -> None:
        self._linked.setdefault(task.entry.identity, {})[task.path] = inode
        self._links += 1
        if self._links > _LINKS_LIMIT:
            reason = f"there are more than {_LINKS_LIMIT} names of files that have several"
            raise OSError(errno.EMLINK, reason, b"/" + self.paths[0])

    @contextmanager
    def _original(self, task: Task) -> Iterator[At]:
        """Hold on to the topmost object of what the merged view shows: one, whatever is renamed."""
        if task.entry.presence is Presence.UPPER:
            assert self._session.upper is not None
            at = self._session.upper.at(task.path)
        else:
            at = task.entry.lowers[0].at()
        fd = syscalls.open_path(at)
        try:
            if modes.S_IFMT(os.fstat(fd).st_mode) != modes.S_IFMT(task.entry.stat.st_mode):
                raise syscalls.failure(errno.ESTALE)
            yield At(fd, b"")
        finally:
            syscalls.close(fd)

    # Once more

    def _relevant(self, touched: Mapping[bytes, bool]) -> dict[bytes, bool]:
        """Return what of that is committed."""
        wanted = {
            path: whole
            for path, whole in touched.items()
            if self._is_committed(path) and not self._rules.keep(path)
        }
        for root in self.paths:
            if any(touched.get(above, False) for above in (b"", *_from_top(root))):
                wanted[root] = True
        return wanted

    def _is_committed(self, path: bytes) -> bool:
        return not self._roots.isdisjoint(_from_top(path))

    def _renew(self, wanted: list[tuple[bytes, bool]]) -> None:
        """Copy paths again, of which each comes after those above it; True: with all below."""
        removed: set[bytes] = set()
        for path, whole in wanted:  # first: what is to be copied again must not be linked to
            copied = self._copies.stat_or_none(path)
            if copied is not None and (whole or not self._is_directory(path, copied)):
                self._copies.forget_tree(path)
                remove_tree(self._copies.at(path))
                removed.add(path)
        self._forget_links(removed)
        anew: set[bytes] = set()
        changed: set[bytes] = set()
        for path, _ in wanted:
            self._check()
            if any(above in anew for above in _from_top(path)):
                continue
            top = self._topmost_missing(path)
            if top is not None:
                anew.add(top)
                self._copy(top)
                changed.add(top.rpartition(b"/")[0])
            elif _is_directory(self._copies.stat_or_none(path)):
                changed |= {path, path.rpartition(b"/")[0]}
        for path in changed:
            if self._is_committed(path) and _is_directory(self._copies.stat_or_none(path)):
                with self._uncertain(path):
                    task = Task(path, lookup_path(self._session, path), ABSENT)
                    if task.entry.is_directory:
                        self._finish(task)

    def _forget_links(self, removed: Collection[bytes]) -> None:
        """Forget that there were copies of files at or below these paths: others may come."""
        for known in self._linked.values():
            for path in [path for path in known if any(at in removed for at in _from_top(path))]:
                del known[path]
                self._links -= 1

    def _is_directory(self, path: bytes, copied: os.stat_result) -> bool:
        """Say whether `path`, of which there is a copy, is a directory, as that is."""
        shown = ABSENT
        with self._uncertain(path):
            shown = lookup_path(self._session, path)
        return shown.is_directory and _is_directory(copied)

    def _topmost_missing(self, path: bytes) -> bytes | None:
        """Return the topmost committed path, of `path` and those above, that has no copy, if there
        can be one.
        """
        for above in _from_top(path):
            if self._is_committed(above):
                copied = self._copies.stat_or_none(above)
                if copied is None:
                    return above
                if not _is_directory(copied):
                    return None
        return None

    # Into its place

    def _put(self, path: bytes) -> None:
        """Exchange what there is at a path of the kept layer, but for what is kept, for the copy.

        Recursion ends where no rule leads further.
        """
        there = self._kept.stat_or_none(path)
        if there is not None and _is_directory(there) and self._rules.lead(path):
            shown = Task(path, lookup_path(self._session, path), ABSENT)
            if shown.entry.is_directory:
                self._put_into(shown)
                return
            self._require_nothing(path)
        self._exchange(path)

    def _put_into(self, shown: Task) -> None:
        """The same for a directory that leads to what is kept, which the copy is to be merged with.

        There is no copy if it is the image's.
        """
        path = shown.path
        found = {name for name, _ in syscalls.scan(self._kept.directory(path))}
        copied = self._copies.stat_or_none(path) is not None
        if copied:
            found.update(name for name, _ in syscalls.scan(self._copies.directory(path)))
        for name in found:
            if not self._rules.keep(below := join(path, name)):
                self._put(below)
        opaque = self._session.xattrs.opaque
        mark = syscalls.getxattr(self._copies.at(path), opaque) if copied else None
        before = syscalls.getxattr(self._kept.at(path), opaque)
        self._undo.append(lambda: self._set_opaque(path, before))
        self._set_opaque(path, mark)
        with self._original(shown) as source:  # as a way, it may be from before a reset
            target = self._kept.at(path)
            copy_attributes(source, target, syscalls.stat(source), self._session.xattrs)

    def _set_opaque(self, path: bytes, mark: bytes | None) -> None:
        at, opaque = self._kept.at(path), self._session.xattrs.opaque
        if mark is not None:
            syscalls.setxattr(at, opaque, mark)
        elif syscalls.getxattr(at, opaque) is not None:
            syscalls.removexattr(at, opaque)

    def _exchange(self, path: bytes) -> None:
        copied, there = self._copies.stat_or_none(path), self._kept.stat_or_none(path)
        if there is not None:
            self._make_parents(path)
        if copied is not None and there is not None:
            self._move(self._copies, self._kept, path, syscalls.RENAME_EXCHANGE)
        elif copied is not None:
            self._move(self._copies, self._kept, path, syscalls.RENAME_NOREPLACE)
        elif there is not None:
            self._move(self._kept, self._copies, path, syscalls.RENAME_NOREPLACE)

    def _move(self, source: Layer, target: Layer, path: bytes, flags: int) -> None:
        self._rename(source, target, path, flags)
        self._undo.append(lambda: self._rename(target, source, path, flags))

    def _rename(self, source: Layer, target: Layer, path: bytes, flags: int) -> None:
        syscalls.rename(source.at(path), target.at(path), flags)
        source.forget_tree(path)
        target.forget_tree(path)

    def _require_nothing(self, path: bytes) -> None:
        """Raise ENOTEMPTY if what leads to what is kept below `path`, where there is no directory
        any more, leads to something still, though out of reach.
        """
        pending = [path]
        while pending:
            path = pending.pop()
            directory = self._kept.directory(path)
            for name, _ in syscalls.scan(directory):
                stat = syscalls.stat(At(directory, name))
                if modes.S_ISDIR(stat.st_mode):
                    pending.append(join(path, name))
                elif not is_whiteout_device(stat):
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), b"/" + path)


def _topmost(paths: Sequence[bytes]) -> list[bytes]:
    """Leave out those that are below another."""
    given = set(paths)
    return [path for path in dict.fromkeys(paths) if not given & set(_from_top(path)[:-1])]


def _from_top(path: bytes) -> list[bytes]:
    """Return the paths of what is above, and the path itself."""
    parts = path.split(b"/")
    return [b"/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _is_directory(stat: os.stat_result | None) -> bool:
    return stat is not None and modes.S_ISDIR(stat.st_mode)


def _bytes(task: Task) -> int:
    return 0 if task.finish or not task.entry.positive else _size(task.entry.stat)


def _size(stat: os.stat_result) -> int:
    """Return how much there is to be copied of an object: holes are not."""
    if not modes.S_ISREG(stat.st_mode):
        return 0
    return min(stat.st_size, stat.st_blocks * 512)


def _version(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_mtime_ns, stat.st_size
