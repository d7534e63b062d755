"""A snapshot as a squashfs file, which overlayfs takes for a layer over the image.

What is gone is a whiteout in overlayfs's own format, a character device 0:0, and a directory that
hides the image's is opaque. No squashfs is written or read here, nor mounted: the programs of
squashfs-tools-ng make one of a tar and a tar of one, `confined`, and the tar differs from that of
`oci` in just these two things. A squashfs cannot be written to a pipe, nor read from one, so it is
kept in a file without a name meanwhile.
"""

from __future__ import annotations

import errno
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

from sessiond.errors import Failed, SessiondError
from sessiond.overlay import syscalls
from sessiond.overlay.changeset import Put
from sessiond.overlay.layer import Layer
from sessiond.overlay.stack import Stack
from sessiond.overlay.xattrs import OverlayXattrs
from sessiond.session.confined import Program, nameless_file, path_of
from sessiond.session.oci import XATTR
from sessiond.session.oci_reader import Marks, read_layer
from sessiond.session.oci_writer import Archive, write_layer
from sessiond.session.pipes import Pipe

MAGIC = b"hsqs"
"""How a squashfs begins."""
_HEAD = 96
"""Bytes of its superblock."""
_PADDING = 1 << 20
"""Most bytes that programs fill a file up with behind what it says to be its end."""
_CHUNK = 1 << 18
_PREFIXES = (b"user.", b"trusted.", b"security.")
"""Of the extended attributes that a squashfs can have."""
_PROCESSORS = 4
"""Most that pack at once: each takes memory."""


class OverlayfsArchive(Archive):
    """A tar with the marks that overlayfs has."""

    _opaque: bytes | None = None
    """The directory, of those that hide the image's, in which we are, or were."""

    def remove(self, path: bytes) -> None:
        """See `Archive.remove`. What an opaque directory hides need not be removed."""
        if self._opaque is None or not path.startswith(self._opaque + b"/"):
            whiteout = tarfile.TarInfo()
            whiteout.type, whiteout.mode = tarfile.CHRTYPE, 0
            self._header(whiteout, {b"path": path})

    def put(self, change: Put) -> None:
        """See `Archive.put`."""
        if change.opaque:
            self._opaque = change.path
        super().put(change)

    def _require_possible(self, change: Put) -> None:
        """Take any name."""

    def _attribute(self, name: bytes) -> bytes:
        """As the programs have it."""
        return name

    def _xattrs(self, change: Put) -> dict[bytes, bytes]:
        """Raises `Failed` for those that a squashfs cannot have, such as ACLs."""
        xattrs = super()._xattrs(change)
        for key in xattrs:
            name = key.removeprefix(XATTR)
            if not name.startswith(_PREFIXES) or b"=" in name:
                raise Failed(
                    f"{'/' + os.fsdecode(change.path)!r} has the attribute {os.fsdecode(name)}, "
                    "which cannot be in a squashfs; export the snapshot in the format oci."
                )
        if change.opaque:
            xattrs[XATTR + OverlayXattrs().opaque] = b"y"
        return xattrs


def write_image(
    stack: Stack,
    target: Pipe,
    directory: Path,
    progress: Callable[[int], None],
    check: Callable[[], None],
    require: Callable[[], None],
) -> None:
    """Write what the lowers of `stack` do to the bottom-most of them, the image, to a pipe.

    It takes as much space on the file system of `directory` meanwhile. `progress` is told of bytes
    of files as they are packed. `require` is called before anything is written, and raises if the
    layers were not there all the time. Raises `NotSupported`, `Failed`, `NoSpace`, `OSError`, and
    what `check` raises.
    """
    jobs = str(min(os.cpu_count() or 1, _PROCESSORS))
    options = ["--force", "--quiet", "--exportable", "--no-skip", "-c", "zstd", "-j", jobs]

    def still_wanted() -> None:
        check()
        target.require_reader()

    with nameless_file(directory) as file:
        command = ["tar2sqfs", *options, path_of(file)]
        with Program(command, file, still_wanted, reads=True) as packer:
            try:
                write_layer(stack, packer.pipe.write, progress, OverlayfsArchive).complete()
                packer.end()
            except SessiondError:
                if packer.has_ended:  # by itself: it does not always say why
                    _require_space(file)
                    packer.end()
                raise
        require()
        os.lseek(file, 0, os.SEEK_SET)
        while data := os.read(file, _CHUNK):
            target.write(data)


def _require_space(file: int) -> None:
    """Raise `OSError` if the file cannot become any larger."""
    _write(file, bytes(_CHUNK), os.fstat(file).st_size)


def _write(file: int, data: bytes, position: int) -> None:
    if syscalls.write(file, data, position) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_image(
    read: Callable[[int], bytes],
    target: Layer,
    image: Layer,
    directory: Path,
    progress: Callable[[int], None],
    check: Callable[[], None],
) -> None:
    """Unpack a squashfs, which `read` gives, into the empty layer `target` over `image`.

    See `read_layer` for what is checked, and `write_image` for space. Raises `NotSupported`,
    `Failed`, `NoSpace`, `OSError`, and what `read` and `check` raise.
    """
    with nameless_file(directory) as file:
        _store(read, file, progress)
        command = ["sqfs2tar", "--root-becomes", ".", path_of(file)]
        with Program(command, file, check, reads=False) as unpacker:
            try:
                read_layer(unpacker.pipe.read, target, image, marks=Marks.OVERLAYFS)
            except SessiondError:
                if unpacker.has_ended:
                    unpacker.end()
                raise
            unpacker.end()


def _store(read: Callable[[int], bytes], file: int, progress: Callable[[int], None]) -> None:
    """Write all that comes to a file. Raises `Failed` if it is more than it says to be."""
    head = b""
    while len(head) < _HEAD and (data := read(_HEAD - len(head))):
        head += data
    if len(head) < _HEAD:
        raise Failed("The archive is cut off.")
    (size,) = struct.unpack_from("<Q", head, 40)
    written, data = 0, head
    while data:
        if written + len(data) > size + _PADDING:
            raise Failed("The archive is longer than it says to be.")
        _write(file, data, written)
        written += len(data)
        progress(len(data))
        data = read(_CHUNK)
    if written < size:
        raise Failed("The archive is cut off.")
