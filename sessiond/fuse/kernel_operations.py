"""What Python does of the data paths `cached` and `passthrough`; the extension does the rest.

Files are read and written by the kernel or the extension, through descriptors that are opened here.
With passthrough, all who have an inode open must have the same file open. So when the contents of a
node move, by a copy-up, while someone has it open, its next opener is answered ESTALE once, and the
kernel, which looks the name up again, finds the node under another number: for it, another inode.
Descriptors from before go on reading what they have open, as with the kernel's overlayfs.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

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
)

from sessiond.fuse import _kernel_io, device
from sessiond.fuse.operations import Listing, OverlayOperations, translated
from sessiond.overlay import syscalls
from sessiond.overlay.directory import NewObject
from sessiond.overlay.fastpath import FastPath
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.session.model import DataPath


class KernelFastPath(FastPath):
    """The extension, as the overlay sees it."""

    def __init__(self, path: DataPath) -> None:
        self._path = path

    claim = staticmethod(_kernel_io.claim)
    place = staticmethod(_kernel_io.place)
    is_served = staticmethod(_kernel_io.is_served)
    unclaimed = staticmethod(_kernel_io.unclaimed)
    serve = staticmethod(_kernel_io.serve)
    withdraw = staticmethod(_kernel_io.withdraw)
    begin_generation = staticmethod(_kernel_io.begin_generation)
    keep = staticmethod(_kernel_io.keep)
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


class KernelOperations(OverlayOperations):
    """The overlay with the extension under pyfuse3.

    File handles of requests are node numbers, which the extension puts there.
    """

    def __init__(self, overlay: Overlay, path: DataPath, negative_timeout: float) -> None:
        """`path`: not plain. `negative_timeout` as for `OverlayOperations`."""
        super().__init__(overlay, negative_timeout=negative_timeout)
        self._path = path
        _kernel_io.configure(path, int(negative_timeout))

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
        if self.overlay.serve(self.overlay.node(parent_inode)):
            raise FUSEError(_kernel_io.TRY_AGAIN)
        return await super().lookup(parent_inode, name, ctx)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """See `pyfuse3.Operations.forget`."""
        await super().forget(inode_list)
        for number, count in inode_list:
            _kernel_io.forget(number, count)

    # Contents

    def _set_contents(self, node: Node, number: int, fd: int) -> None:
        """Have the extension read and write the node through `fd`, which it takes over.

        Raises ESTALE, and gives the node a new number, if the kernel has another file of it open.
        """
        writable = node.upper and not node.metacopy
        if number == node.number and _kernel_io.set_contents(number, fd, writable):
            return
        if number == node.number:
            self.overlay.nodes.renumber(node)
            device.invalidate_attributes(number)
        else:
            syscalls.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

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
        self._set_contents(node, inode, self.overlay.open_contents(node, write=False))
        if truncate:
            self.overlay.resize(node, 0)
        return FileInfo(fh=inode, keep_cache=not truncate)

    @translated
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        await self._open.wait()
        new = self._new(ctx, modes.S_IFREG | modes.S_IMODE(mode))
        parent = self.overlay.node(parent_inode)
        node, stat, fd = self._make_file(parent, name, new)
        self._set_contents(node, node.number, fd)
        return FileInfo(fh=node.number), self._given(node, stat)

    def _make_file(
        self, parent: Node, name: bytes, new: NewObject
    ) -> tuple[Node, os.stat_result, int]:
        if name == b"/":  # the extension's way to say O_TMPFILE
            return self.overlay.create_anonymous(parent, new)
        return self.overlay.create_contents(parent, name, new)

    @translated
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        node = self.overlay.node(fh)
        fd = self.overlay.open_contents(node, write=False)
        data = syscalls.read(fd, size, off)
        self._set_contents(node, fh, fd)
        return data

    @translated
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        node = await self._changeable(fh)
        self.overlay.make_writable(node)
        fd = self.overlay.open_contents(node, write=True)
        written = syscalls.write(fd, buf, off) if buf else 0
        self._set_contents(node, fh, fd)
        return written

    @translated
    async def release(self, fh: FileHandleT) -> None:
        """After the last close of a file that was kept; the extension counts the others."""
        await self._open.wait()
        node = self.overlay.nodes.get(fh)
        if node is not None:
            self.overlay.finish_kept(self.overlay.node(fh))

    @translated
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        node = self.overlay.node(fh)
        if node.kept >= 0:
            await self._open.wait()
            self.overlay.renew_kept(node)
        if not node.upper:
            return
        fd = self.overlay.open_storage(node)
        try:
            await trio.to_thread.run_sync(lambda: syscalls.fsync(fd, data_only=datasync))
        finally:
            syscalls.close(fd)

    # Directories

    def _listing(self, handle: int) -> tuple[Node, Listing]:
        if handle not in self._listings:  # made by the extension, before the directory changed
            self._listings[handle] = self.overlay.node(_kernel_io.listed(handle)), []
        return super()._listing(handle)

    @translated
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        if self.overlay.serve(self.overlay.node(inode)):
            raise FUSEError(_kernel_io.TRY_AGAIN)
        return await super().opendir(inode, ctx)

    @translated
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        names_only = bool(fh & _kernel_io.NAMES_ONLY)
        self._read_listing(fh & ~_kernel_io.NAMES_ONLY, start_id, token, names_only=names_only)

    @translated
    async def releasedir(self, fh: FileHandleT) -> None:
        self._listings.pop(fh, None)
