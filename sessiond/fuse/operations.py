"""FUSE requests, translated: bytes, errno and attributes in, one call of the core, and back.

Handlers run whole between their checkpoints, so the core is never entered twice at once. The
checkpoints are two: a large copy-up, whose data is copied in a thread, and the gate that holds
changes back while the session is frozen.

Names and attributes are valid for ever in the kernel's caches: only this process changes the
layers, and what it changes behind the kernel's back, the worker announces. That a name is missing
the kernel may remember only if it can be told otherwise, which `KernelOperations` sees to.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat as modes
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from operator import itemgetter
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from sessiond.keep_rules import KeepRules
from sessiond.overlay import syscalls
from sessiond.overlay.copy_up import CopyUp
from sessiond.overlay.directory import NewObject
from sessiond.overlay.exchange import Exchange, Outdated
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.pending import Renewal
from sessiond.overlay.stack import Stack
from sessiond.overlay.writers import Halt
from sessiond.session.model import DataPath

log = logging.getLogger(__name__)

_FOREVER = 1e9  # seconds
_COPY_IN_THREAD = 1 << 20
"""Files from this size, in bytes, are copied up in a thread: below, waking one costs more."""

_POSITIONS = (1 << 62) - 1
_POSITION_KEY_SIZE = 16

Listing = list[tuple[int, bytes]]
"""Names of a directory with their positions, in the order of these.

The kernel caches a listing for all who have the directory open, so a position has to mean the same
to all of them, also when names come and go, and to a successor of this process: it is made from the
name. The hash is keyed, so that nobody can make two names that collide.
"""

P = ParamSpec("P")
S = TypeVar("S", bound="OverlayOperations")
R = TypeVar("R")


def translated(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Turn what the core raises into errno. Anything unforeseen is logged and answered with EIO.

    pyfuse3 ends its main loop, and with it the mount, on any exception but FUSEError.
    """

    @functools.wraps(handler)
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s of %s failed", handler.__name__, self.describe(args))
            raise FUSEError(errno.EIO) from None

    return call


class OverlayOperations(pyfuse3.Operations):
    """The overlay as pyfuse3 wants it.

    File handles are node numbers: contents belong to the node, so that all who have a file open see
    one file, also after a copy-up. Directory handles are numbers of listings.
    """

    enable_acl = True
    supports_dot_lookup = False
    """Names are names: to open a file handle, the kernel would look up ``.`` and ``..``."""

    def __init__(self, overlay: Overlay) -> None:
        super().__init__()
        self.overlay = overlay
        self.view = overlay.view
        self.exchange = Exchange(overlay)
        self._position_key = os.urandom(_POSITION_KEY_SIZE)
        self._listings: dict[int, tuple[Node, Listing]] = {}
        self._last_listing = 0
        self._copies: dict[int, trio.Lock] = {}
        self._running: set[CopyUp | Renewal] = set()
        self._idle = trio.Event()
        self._idle.set()
        self._open = trio.Event()
        self._open.set()
        self.initialised = trio.Event()
        """Set when the kernel's first request has been answered."""

    @property
    def data_path(self) -> DataPath:
        """What is in use; known when `initialised`."""
        return DataPath.PLAIN

    def init(self) -> None:
        """See `pyfuse3.Operations.init`."""
        self.initialised.set()

    # For the worker

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Hold back every change while the context is open."""
        self._open = trio.Event()
        try:
            for copy in self._running:
                copy.cancelled = True
            await self._idle.wait()
            yield
        finally:
            self._open.set()

    @property
    def is_copying_up(self) -> bool:
        """Whether a copy-up is going on in a thread."""
        return bool(self._running)

    def swap(
        self, stack: Stack, *, moved: bool, retained: bool = False, halt: Halt | None = None
    ) -> Outdated:
        """Serve `stack` from now on; see `Exchange.swap`. Precondition: frozen."""
        self._listings = {number: (node, []) for number, (node, _) in self._listings.items()}
        return self.exchange.swap(stack, moved=moved, retained=retained, halt=halt)

    def keep_paths(self, rules: KeepRules) -> Outdated:
        """Keep what `rules` say from now on; see `Exchange.keep_paths`. Precondition: frozen."""
        self._listings = {number: (node, []) for number, (node, _) in self._listings.items()}
        return self.exchange.keep_paths(rules)

    async def settle_all(self, *, only_closed: bool = False) -> None:
        """Bring what is written to storage that the session has left to where it belongs.

        `only_closed`: of files that nobody has open or mapped any more.

        Raises OSError, with the file's name, for the first that cannot be brought there, after the
        others were.
        """

    def describe(self, args: Sequence[object]) -> str:
        """Return the path, or as much as is known, of what a handler was called for."""
        number = args[0] if args else None
        node = self.view.nodes.get(number) if isinstance(number, int) else None
        path = (
            os.fsdecode(b"/" + node.path) if node is not None and node.linked else f"node {number}"
        )
        if len(args) > 1 and isinstance(args[1], bytes):
            path += "/" + os.fsdecode(args[1])
        return repr(path)

    # Translation

    def _attributes(self, node: Node, stat: os.stat_result) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.number
        entry.st_mode = stat.st_mode
        entry.st_nlink = self.view.link_count(node, stat)
        entry.st_uid = stat.st_uid
        entry.st_gid = stat.st_gid
        entry.st_rdev = stat.st_rdev
        entry.st_size = stat.st_size
        entry.st_blksize = stat.st_blksize
        entry.st_blocks = stat.st_blocks
        entry.st_atime_ns = stat.st_atime_ns
        entry.st_mtime_ns = stat.st_mtime_ns
        entry.st_ctime_ns = stat.st_ctime_ns
        entry.entry_timeout = _FOREVER
        # Known to the kernel as two inodes, it must not be changed as one and cached as the other.
        entry.attr_timeout = 0 if node.former else _FOREVER
        return entry

    def _given(self, node: Node, stat: os.stat_result) -> EntryAttributes:
        """Return attributes in a reply that gives the kernel one more reference to the node."""
        entry = self._attributes(node, stat)
        self.view.refer(node)
        return entry

    async def _changeable(self, number: int) -> Node:
        """Return a node that is about to change, with nothing large left to copy up."""
        await self._open.wait()
        node = self.view.node(number)
        while self.overlay.needs_copy_up(node) >= _COPY_IN_THREAD:
            await self._copy_up(number)
            await self._open.wait()
            node = self.view.node(number)
        return node

    async def _copy_up(self, number: int) -> None:
        """Copy a large file up without holding up other requests; one task for each file."""
        lock = self._copies.setdefault(number, trio.Lock())
        try:
            async with lock:
                await self._open.wait()
                node = self.view.node(number)
                if self.overlay.needs_copy_up(node) < _COPY_IN_THREAD:
                    return  # another request has done it
                with self.overlay.begin_copy_up(node) as copy:
                    if await self._run(copy) and not node.upper:
                        copy.publish()
        finally:
            if not lock.statistics().tasks_waiting:
                self._copies.pop(number, None)

    async def _run(self, copy: CopyUp | Renewal) -> bool:
        """Copy the data in a thread; False if a swap of the stack called it off."""
        self._running.add(copy)
        if self._idle.is_set():
            self._idle = trio.Event()
        try:
            await trio.to_thread.run_sync(copy.copy_data)
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
            return False
        finally:
            self._running.discard(copy)
            if not self._running:
                self._idle.set()
        return True

    # Names

    @translated
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._given(*self.view.lookup(self.view.node(parent_inode), name))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for number, count in inode_list:
            self.view.forget(number, count)

    def _new(
        self, ctx: RequestContext, mode: int, device: int = 0, target: bytes = b""
    ) -> NewObject:
        return NewObject(mode, ctx.uid, ctx.gid, ctx.umask, device, target)

    async def _create(self, parent: int, name: bytes, new: NewObject) -> EntryAttributes:
        await self._open.wait()
        return self._given(*self.overlay.create(self.view.node(parent), name, new))

    @translated
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return await self._create(parent_inode, name, self._new(ctx, mode, rdev))

    @translated
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        new = self._new(ctx, modes.S_IFDIR | modes.S_IMODE(mode))
        return await self._create(parent_inode, name, new)

    @translated
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return await self._create(
            parent_inode, name, self._new(ctx, modes.S_IFLNK | 0o777, target=target)
        )

    @translated
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        await self._open.wait()
        new = self._new(ctx, modes.S_IFREG | modes.S_IMODE(mode))
        node, stat = self.overlay.create_file(self.view.node(parent_inode), name, new)
        return FileInfo(fh=node.number), self._given(node, stat)

    @translated
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        node = self.view.node(inode)
        here = self.view.stack_at(self.view.node(new_parent_inode), new_name)
        if self.view.stack_of(node) is here:  # else it is refused, and a copy would be in vain
            node = await self._changeable(inode)
        stat = self.overlay.link(node, self.view.node(new_parent_inode), new_name)
        return self._given(node, stat)

    @translated
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._open.wait()
        self.overlay.unlink(self.view.node(parent_inode), name)

    @translated
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._open.wait()
        self.overlay.rmdir(self.view.node(parent_inode), name)

    @translated
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        view = self.view
        ends = ((parent_inode_old, name_old), (parent_inode_new, name_new))
        source, target = (view.stack_at(view.node(parent), name) for parent, name in ends)
        for end in ends if source is target else ():  # else it is copied over there, or refused
            child = view.node(end[0]).children.get(end[1])
            if child is None:
                continue
            stays = end is ends[0] or flags & syscalls.RENAME_EXCHANGE
            # What is replaced is not copied up in vain: there may be no room for it.
            if stays or self.overlay.must_outlive_name(view.node(child.number)):
                await self._changeable(child.number)
        await self._open.wait()
        old = self.view.node(parent_inode_old), name_old
        new = self.view.node(parent_inode_new), name_new
        self.overlay.rename(old, new, flags)

    # Attributes

    @translated
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        node = self.view.node(inode)
        return self._attributes(node, self.view.stat(node))

    @translated
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        if fields.update_size and attr.st_size < _COPY_IN_THREAD:
            await self._open.wait()  # what is cut off need not be copied up first
            node = self.view.node(inode)
        else:
            node = await self._changeable(inode)
        if fields.update_size:
            self.overlay.resize(node, attr.st_size, by_name=fh is None)
            if ctx.uid != 0:
                self.overlay.drop_privileges(node)
        others = (
            fields.update_size or fields.update_mode or fields.update_atime or fields.update_mtime
        )
        # Nothing at all is chown(2) with -1 twice, which clears set-user-ID and set-group-ID bits.
        if fields.update_uid or fields.update_gid or not others:
            uid = attr.st_uid if fields.update_uid else -1
            gid = attr.st_gid if fields.update_gid else -1
            self.overlay.chown(node, uid, gid)
        if fields.update_mode:
            self.overlay.chmod(node, attr.st_mode)
        if fields.update_atime or fields.update_mtime:
            atime = attr.st_atime_ns if fields.update_atime else None
            mtime = attr.st_mtime_ns if fields.update_mtime else None
            self.overlay.utime(node, atime, mtime)
        return self._attributes(node, self.view.stat(node))

    @translated
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return self.overlay.readlink(self.view.node(inode))

    @translated
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        return self.overlay.getxattr(self.view.node(inode), name)

    @translated
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        names = self.overlay.listxattr(self.view.node(inode))
        if ctx.uid == 0:
            return names
        return [name for name in names if not name.startswith(b"trusted.")]  # xattr(7)

    @translated
    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        self.overlay.setxattr(await self._changeable(inode), name, value)

    @translated
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        self.overlay.removexattr(await self._changeable(inode), name)

    @translated
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        real = self.overlay.statvfs()
        answer = StatvfsData()
        for field in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
            "f_namemax",
        ):
            setattr(answer, field, getattr(real, field))
        return answer

    # Contents

    async def _openable(self, number: int, *, write: bool, truncate: bool) -> Node:
        """Return a node that is about to be opened, with nothing large left to copy up."""
        if write and not truncate:
            return await self._changeable(number)
        if truncate:
            await self._open.wait()
        return self.view.node(number)

    @translated
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        write = flags & os.O_ACCMODE != os.O_RDONLY
        truncate = bool(flags & os.O_TRUNC)
        node = await self._openable(inode, write=write, truncate=truncate)
        self.overlay.open_file(node, write=write, truncate=truncate)
        # The cache stays valid from one open to the next: all writes pass through the kernel.
        return FileInfo(fh=node.number, keep_cache=not truncate)

    @translated
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return self.overlay.read(self.view.node(fh), size, off)

    @translated
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return self.overlay.write(await self._changeable(fh), buf, off)

    @translated
    async def flush(self, fh: FileHandleT) -> None:
        raise FUSEError(errno.ENOSYS)  # nothing is buffered here: the kernel need not ask again

    @translated
    async def release(self, fh: FileHandleT) -> None:
        self.overlay.release_file(self.view.node(fh))

    @translated
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        self.overlay.fsync(self.view.node(fh), data_only=datasync)

    # Directories

    @translated
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        node = self.view.node(inode)
        self._last_listing += 1
        self._listings[self._last_listing] = (node, [])
        return self._last_listing

    def _listing(self, handle: int) -> tuple[Node, Listing]:
        node, listing = self._listings[handle]
        return self.view.node(node.number), listing

    @translated
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        self._read_listing(fh, start_id, token, names_only=False)

    def _position(self, name: bytes) -> int:
        digest = blake2b(name, digest_size=8, key=self._position_key).digest()
        return (int.from_bytes(digest, "little") & _POSITIONS) + 3

    def _read_listing(
        self, fh: int, start_id: int, token: ReaddirToken, *, names_only: bool
    ) -> None:
        node, listing = self._listing(fh)
        if start_id == 0 or not listing:  # also after rewinddir(3), which wants a new listing
            listing = [(1, b"."), (2, b"..")]
            listing += sorted((self._position(name), name) for name in self.overlay.names(node))
            self._listings[fh] = (node, listing)
        for position, name in listing[bisect_right(listing, start_id, key=itemgetter(0)) :]:
            if not self._list(node, name, token, position, names_only=names_only):
                return

    def _list(
        self,
        directory: Node,
        name: bytes,
        token: ReaddirToken,
        position: int,
        *,
        names_only: bool,
    ) -> bool:
        """Add an entry to a listing; False when there is no more room.

        `names_only`: the kernel is given no reference, so no node is needed.
        """
        if name in {b".", b".."}:
            node = directory if name == b"." or not directory.links else directory.parent
            entry = self._attributes(node, self.view.stat(node))
            return pyfuse3.readdir_reply(token, name, entry, position)
        try:
            if names_only:
                entry = EntryAttributes()
                entry.st_ino, stat = self.view.peek(directory, name)
                entry.st_mode = stat.st_mode
                return pyfuse3.readdir_reply(token, name, entry, position)
            node, stat = self.view.lookup(directory, name)
        except FileNotFoundError:
            return True  # removed since it was listed
        if not pyfuse3.readdir_reply(token, name, self._attributes(node, stat), position):
            self.view.forget(node.number, 0)
            return False
        self.view.refer(node)
        return True

    @translated
    async def releasedir(self, fh: FileHandleT) -> None:
        del self._listings[fh]

    @translated
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        node, _ = self._listing(fh)
        self.overlay.fsync(node, data_only=datasync)
