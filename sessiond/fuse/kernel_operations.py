"""What Python does of the data paths `cached` and `passthrough`; the extension does the rest.

Files are read and written by the kernel or the extension, through descriptors that are opened here.
With passthrough, all who have an inode open must have the same file open. So when the contents of a
node move, by a copy-up, while someone has it open, its next opener is answered ESTALE once, and the
kernel, which looks the name up again, finds the node under another number: for it, another inode.
Descriptors from before go on reading what they have open, as with the kernel's overlayfs.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as modes
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

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
    XAttrNameT,
)

from sessiond.fuse import _kernel_io, device
from sessiond.fuse.operations import Listing, OverlayOperations, translated
from sessiond.overlay import syscalls
from sessiond.overlay.directory import NewObject
from sessiond.overlay.fastpath import FastPath, Inherited
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.succession import Succession
from sessiond.session.model import DataPath

log = logging.getLogger(__name__)


class KernelFastPath(FastPath):
    """The extension, as the overlay sees it."""

    def __init__(self, path: DataPath, *, recorded: bool = False) -> None:
        """`recorded`: the extension keeps a journal (`_kernel_io.record`)."""
        self._path = path
        self.recorded = recorded

    placed = staticmethod(_kernel_io.placed)
    removed = staticmethod(_kernel_io.removed)
    note = staticmethod(_kernel_io.note)

    claim = staticmethod(_kernel_io.claim)
    place = staticmethod(_kernel_io.place)
    shows_image = staticmethod(_kernel_io.shows_image)
    is_served = staticmethod(_kernel_io.is_served)
    names = staticmethod(_kernel_io.names)
    serve = staticmethod(_kernel_io.serve)
    withdraw = staticmethod(_kernel_io.withdraw)
    begin_generation = staticmethod(_kernel_io.begin_generation)
    keep = staticmethod(_kernel_io.keep)
    give_up = staticmethod(_kernel_io.give_up)
    closes = staticmethod(_kernel_io.closes)
    finish = staticmethod(_kernel_io.finish)
    duplicate = staticmethod(_kernel_io.duplicate)

    def opened(self) -> list[int] | None:
        """See `FastPath.opened`."""
        return None if self._path is DataPath.CACHED else _kernel_io.opened()

    def is_open(self, number: int, /) -> bool:
        """See `FastPath.is_open`."""
        if self._path is DataPath.CACHED:
            return True  # the kernel does not tell
        opens, _ = _kernel_io.opens(number)
        return opens > 0

    def holds(self, number: int, /) -> bool:
        """See `FastPath.holds`."""
        return self._path is not DataPath.CACHED

    def writers(self, number: int, /) -> int:
        """See `FastPath.writers`."""
        _, writers = _kernel_io.opens(number)
        return writers if _kernel_io.has_passthrough() else 0


@contextmanager
def _closed_by_failure(fd: int) -> Iterator[None]:
    """Close a descriptor that nobody takes over after a failure."""
    try:
        yield
    except BaseException:
        syscalls.close(fd)
        raise


@contextmanager
def _dispensable(what: str) -> Iterator[None]:
    """Go on without something that a predecessor had, if it cannot be had any more."""
    try:
        yield
    except OSError as error:
        log.warning("%s is lost: %s", what, error.strerror)


class Repeated:
    """Context in which the error `code` is suppressed if a predecessor of this process may have
    done, before it died, what is asked again: the name is there, or gone, already.

    Nobody else can have done it, since the kernel keeps the directories locked until the reply.
    Enter it before the first checkpoint of a handler.
    """

    def __init__(self, code: int) -> None:
        self._code = code
        self._resent = bool(_kernel_io.resent())

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        return self._resent and isinstance(error, FUSEError) and error.errno == self._code


class KernelOperations(OverlayOperations):
    """The overlay with the extension under pyfuse3.

    File handles of requests are node numbers, which the extension puts there.
    """

    def __init__(self, overlay: Overlay, path: DataPath) -> None:
        """`path`: not plain."""
        super().__init__(overlay)
        self._succession = Succession(overlay)
        self._path = path
        self._position_key = _kernel_io.key()
        self._renewals: dict[int, trio.Lock] = {}
        _kernel_io.configure(path)

    def take_over(self, inherited: list[Inherited], *, moved: bool) -> None:
        """Go on with the nodes, open files and listings of a predecessor that has died.

        See `Succession.take_over`.
        """
        self._last_listing = _kernel_io.last_listing()
        self._succession.take_over(inherited, moved=moved)
        for number in _kernel_io.opened():
            with _dispensable(f"an open file, node {number:x}"):
                node = self.view.node(number)
                self.view.touched.written(node)
                fd = self.view.open_contents(node, write=False)
                _kernel_io.set_contents(number, fd, node.upper and not node.metacopy)
                if node.kept >= 0:
                    _kernel_io.keep(number)
        for handle, number in _kernel_io.inherited_listings():
            with _dispensable(f"a listing, of node {number:x}"):
                fd, numbering = self.view.open_bottom(self.view.node(number))
                _kernel_io.reopen_listing(handle, fd, numbering)

    @property
    def data_path(self) -> DataPath:
        """See `OverlayOperations.data_path`."""
        if not _kernel_io.is_active() or (
            self._path is DataPath.PASSTHROUGH and not _kernel_io.has_passthrough()
        ):
            return DataPath.PLAIN
        return self._path

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """See `OverlayOperations.frozen`."""
        async with super().frozen():
            _kernel_io.hold(True)
            try:
                yield
            finally:
                _kernel_io.hold(False)

    @translated
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        if self.view.serve(self.view.node(parent_inode)):
            raise FUSEError(_kernel_io.TRY_AGAIN)
        try:
            return await super().lookup(parent_inode, name, ctx)
        except FUSEError as error:
            if error.errno != errno.ENOENT:
                raise
        missing = EntryAttributes()
        missing.st_ino = 0
        missing.entry_timeout = _kernel_io.remember_missing(parent_inode, name)
        return missing

    # Changes that a predecessor may have made

    def _existing(self, parent: int, name: bytes) -> EntryAttributes:
        return self._given(*self.view.lookup(self.view.node(parent), name))

    @translated
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        with Repeated(errno.EEXIST):
            return await super().mknod(parent_inode, name, mode, rdev, ctx)
        return self._existing(parent_inode, name)

    @translated
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        with Repeated(errno.EEXIST):
            return await super().mkdir(parent_inode, name, mode, ctx)
        return self._existing(parent_inode, name)

    @translated
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        with Repeated(errno.EEXIST):
            return await super().symlink(parent_inode, name, target, ctx)
        return self._existing(parent_inode, name)

    @translated
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        with Repeated(errno.EEXIST):
            return await super().link(inode, new_parent_inode, new_name, ctx)
        return self._existing(new_parent_inode, new_name)

    @translated
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        with Repeated(errno.ENOENT):
            await super().unlink(parent_inode, name, ctx)

    @translated
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        with Repeated(errno.ENOENT):
            await super().rmdir(parent_inode, name, ctx)

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
        if flags & syscalls.RENAME_EXCHANGE and _kernel_io.resent():
            await self._open.wait()
            if self._succession.has_exchanged(self.view.node(parent_inode_new), name_new):
                return
        with Repeated(errno.ENOENT):
            await super().rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx)

    @translated
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """pyfuse3 asks this first, too, when an attribute is to be set that must not exist."""
        if _kernel_io.resent() == _kernel_io.SETXATTR and self._succession.was_setting(inode, name):
            raise FUSEError(errno.ENODATA)
        return await super().getxattr(inode, name, ctx)

    @translated
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        with Repeated(errno.ENODATA):
            await super().removexattr(inode, name, ctx)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """See `pyfuse3.Operations.forget`."""
        await super().forget(inode_list)
        for number, count in inode_list:
            _kernel_io.forget(number, count)

    # Contents

    def _set_contents(self, node: Node, number: int, fd: int, *, write: bool) -> bool:
        """Have the extension read the node through `fd`, which it takes over; also `write` it.

        Return False if it cannot, for the kernel asks by a number that the node had once, or, which
        gives the node a new number, has another file of it open.
        """
        writable = write or self.view.touched.may_be_written(node)
        if write:
            self.view.touched.written(node)
        if number != node.number:
            syscalls.close(fd)
            return False
        if _kernel_io.set_contents(number, fd, writable):
            return True
        self.view.nodes.renumber(node)
        device.invalidate_attributes(number)
        return False

    @translated
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        write = flags & os.O_ACCMODE != os.O_RDONLY
        truncate = bool(flags & os.O_TRUNC)
        node = await self._openable(inode, write=write, truncate=truncate)
        if write or truncate:
            self.overlay.make_writable(node, 0 if truncate else None)
            if ctx.uid != 0:
                # Passthrough does it at no write (fuse_setattr leaves it to the server).
                self.overlay.drop_privileges(node)
        fd = self.view.open_contents(node, write=False)
        if not self._set_contents(node, inode, fd, write=write or truncate):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # it is looked up again
        if truncate:
            self.overlay.resize(node, 0)
        return FileInfo(fh=inode, keep_cache=not truncate)

    @translated
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        resent = _kernel_io.resent()
        await self._open.wait()
        new = self._new(ctx, modes.S_IFREG | modes.S_IMODE(mode))
        parent = self.view.node(parent_inode)
        try:
            node, stat, fd = self._make_file(parent, name, new)
        except FileExistsError:
            if not resent:
                raise
            node, stat = self.view.lookup(parent, name)
            fd = self.view.open_contents(node, write=True)
        if not self._set_contents(node, node.number, fd, write=True):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return FileInfo(fh=node.number), self._given(node, stat)

    def _make_file(
        self, parent: Node, name: bytes, new: NewObject
    ) -> tuple[Node, os.stat_result, int]:
        if name == b"/":  # the extension's way to say O_TMPFILE
            return self.overlay.create_anonymous(parent, new)
        return self.overlay.create_contents(parent, name, new)

    @translated
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        node = self.view.node(fh)
        fd = self.view.open_contents(node, write=False)
        with _closed_by_failure(fd):
            data = syscalls.read(fd, size, off)
        self._set_contents(node, fh, fd, write=False)
        return data

    @translated
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        node = await self._changeable(fh)
        self.overlay.make_writable(node)
        fd = self.view.open_contents(node, write=True)
        with _closed_by_failure(fd):
            written = syscalls.write(fd, buf, off) if buf else 0
        self._set_contents(node, fh, fd, write=True)
        return written

    @translated
    async def release(self, fh: FileHandleT) -> None:
        """After the last close of a file that was kept; the extension counts the others."""
        await self._settle(fh)

    @translated
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        async with self._renewing(fh):
            await self._renew(fh)
        node = self.view.node(fh)
        if not node.upper:
            return
        fd = self.overlay.open_storage(node)
        try:
            await trio.to_thread.run_sync(lambda: syscalls.fsync(fd, data_only=datasync))
        finally:
            syscalls.close(fd)

    # Contents in storage that the session has left

    @asynccontextmanager
    async def _renewing(self, number: int) -> AsyncIterator[None]:
        """Be the only task that renews the copy of a file."""
        lock = self._renewals.setdefault(number, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.statistics().tasks_waiting:
                self._renewals.pop(number, None)

    async def _renew(self, number: int) -> None:
        """Bring a file that is pending to where it belongs, without holding up other requests."""
        while (node := await self._changeable(number)).kept >= 0 and node.linked:
            with self.overlay.pending.begin_renewal(node) as renewal:
                if await self._run(renewal):
                    if node.linked:
                        self.overlay.pending.end_renewal(renewal, node)
                    return

    async def _settle(self, number: int) -> None:
        """The same, and end that it is pending, if that can be."""
        if number not in self.view.nodes:
            return
        async with self._renewing(number):
            closes = _kernel_io.closes(number)
            await self._renew(number)
            node = self.view.nodes.get(number)
            if node is not None and node.kept >= 0:
                self.overlay.pending.finish(node, closes)

    async def settle_all(self, *, only_closed: bool = False) -> None:
        """See `OverlayOperations.settle_all`."""
        first: OSError | None = None
        in_use = set(_kernel_io.opened()) if only_closed else set()
        for number in set(self.overlay.pending.numbers) - in_use:
            try:
                await self._settle(number)
            except OSError as error:
                if first is None:
                    first = OSError(error.errno, error.strerror, self.view.name_of(number))
        if first is not None:
            raise first

    # Directories

    def _listing(self, handle: int) -> tuple[Node, Listing]:
        if handle not in self._listings:  # made by the extension, before the directory changed
            self._listings[handle] = self.view.node(_kernel_io.listed(handle)), []
        return super()._listing(handle)

    @translated
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        if self.view.serve(self.view.node(inode)):
            raise FUSEError(_kernel_io.TRY_AGAIN)
        return await super().opendir(inode, ctx)

    @translated
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        names_only = bool(fh & _kernel_io.NAMES_ONLY)
        self._read_listing(fh & ~_kernel_io.NAMES_ONLY, start_id, token, names_only=names_only)

    @translated
    async def releasedir(self, fh: FileHandleT) -> None:
        self._listings.pop(fh, None)
