"""A snapshot as a tar in the format of `oci`, for other tools to read.

Blocks, and is called in a thread.
"""

from __future__ import annotations

import os
import stat as modes
import tarfile
from collections.abc import Callable

from sessiond.errors import Failed
from sessiond.overlay import syscalls
from sessiond.overlay.changeset import Put, Removed, changeset
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.session.oci import BLOCK, OVERLAY_XATTRS, WHITEOUT, XATTR

_CHUNK = 1 << 18
_RECORD = 20 * BLOCK
"""A tar ends with zeros up to a multiple of this."""
_NAME_LIMIT = 99
"""Bytes of a name that fits into a header, with a slash behind it."""
_ID_LIMIT = 1 << 21
_SIZE_LIMIT = 1 << 33
_SECOND = 1_000_000_000

_TYPES = {
    modes.S_IFREG: tarfile.REGTYPE,
    modes.S_IFDIR: tarfile.DIRTYPE,
    modes.S_IFLNK: tarfile.SYMTYPE,
    modes.S_IFCHR: tarfile.CHRTYPE,
    modes.S_IFBLK: tarfile.BLKTYPE,
    modes.S_IFIFO: tarfile.FIFOTYPE,
}

Write = Callable[[bytes], None]


def write_layer(
    stack: Stack,
    write: Write,
    progress: Callable[[int], None],
    kind: Callable[[Write, Callable[[int], None]], Archive] | None = None,
) -> Archive:
    """Write what the lowers of `stack` do to the bottom-most of them, the image.

    `progress` is told of bytes of files as they are written. The archive is not complete, and no
    tool takes it for that, before `Archive.complete`. Raises `Failed` for what a layer cannot hold,
    `OSError`, and what `write` raises. `kind`: of archive, if not that of `oci`.
    """
    archive = (kind or Archive)(write, progress)
    for change in changeset(stack):
        if isinstance(change, Removed):
            archive.remove(change.path)
        else:
            archive.put(change)
    return archive


class Archive:
    """A tar that is being written."""

    def __init__(self, write: Write, progress: Callable[[int], None]) -> None:
        self._write_all = write
        self._progress = progress
        self._written = 0
        self._links: dict[tuple[int, int], bytes] = {}
        """The first name of each file that has several."""

    def complete(self) -> None:
        """Write the end, by which readers know that nothing is missing."""
        end = 2 * BLOCK
        self._write(bytes(end + -(self._written + end) % _RECORD))

    def remove(self, path: bytes) -> None:
        """Say that the image's object of that name is gone."""
        parent, slash, name = path.rpartition(b"/")
        self._header(tarfile.TarInfo(), {b"path": parent + slash + WHITEOUT + name})

    def put(self, change: Put) -> None:
        """Add an object."""
        path, stat = change.path, change.stat
        self._require_possible(change)
        if modes.S_ISSOCK(stat.st_mode):  # no tar has these, and nobody listens any more
            self.remove(path)
            return
        info = tarfile.TarInfo()
        info.mode = modes.S_IMODE(stat.st_mode)
        # A root without a name is what GNU tar, and others, call "./".
        pax = {b"path": path or b"./"}
        if modes.S_ISDIR(stat.st_mode):
            pax[b"path"] = path + b"/" if path else b"./"
        elif stat.st_nlink > 1:
            first = self._links.setdefault((stat.st_dev, stat.st_ino), path)
            if first != path:
                info.type = tarfile.LNKTYPE
                self._describe(info, pax | {b"linkpath": first}, stat)
                return
        info.type = _TYPES[modes.S_IFMT(stat.st_mode)]
        pax |= self._xattrs(change)
        if info.type == tarfile.SYMTYPE:
            pax[b"linkpath"] = syscalls.readlink(change.at)
        elif info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            info.devmajor, info.devminor = os.major(stat.st_rdev), os.minor(stat.st_rdev)
        elif info.type == tarfile.REGTYPE:
            info.size = stat.st_size
        self._describe(info, pax, stat)
        if info.type == tarfile.REGTYPE:
            self._contents(change.data, stat.st_size)

    def _require_possible(self, change: Put) -> None:
        """Raise `Failed` for what cannot be in such an archive."""
        if change.path.rpartition(b"/")[2].startswith(WHITEOUT):
            raise Failed(
                f"/{os.fsdecode(change.path)!r} cannot be in an OCI layer, where names that begin "
                "with .wh. say what was removed; rename it, and take another snapshot."
            )

    def _attribute(self, name: bytes) -> bytes:
        """Return the name of an attribute without what ends a key; so GNU tar has it."""
        return name.replace(b"%", b"%25").replace(b"=", b"%3D")

    def _xattrs(self, change: Put) -> dict[bytes, bytes]:
        return {
            XATTR + self._attribute(name): syscalls.getxattr(change.at, name) or b""
            for name in syscalls.listxattr(change.at)
            if not name.startswith(OVERLAY_XATTRS)
        }

    def _describe(
        self, info: tarfile.TarInfo, pax: dict[bytes, bytes], stat: os.stat_result
    ) -> None:
        info.uid, info.gid = stat.st_uid, stat.st_gid
        for key in ("uid", "gid"):
            if (value := getattr(info, key)) >= _ID_LIMIT:
                pax[key.encode()] = b"%d" % value
                setattr(info, key, 0)
        if info.size >= _SIZE_LIMIT:
            pax[b"size"] = b"%d" % info.size
            info.size = 0
        seconds, fraction = divmod(stat.st_mtime_ns, _SECOND)
        info.mtime = seconds
        if fraction or not 0 <= seconds < _SIZE_LIMIT:
            pax[b"mtime"] = _decimal(stat.st_mtime_ns)
            info.mtime = min(max(seconds, 0), _SIZE_LIMIT - 1)
        self._header(info, pax)

    def _header(self, info: tarfile.TarInfo, pax: dict[bytes, bytes]) -> None:
        """Write a header, and before it what does not fit into one."""
        for key, attribute in ((b"path", "name"), (b"linkpath", "linkname")):
            value = pax.get(key, b"")
            if value.isascii() and len(value) <= _NAME_LIMIT:
                pax.pop(key, None)
            setattr(info, attribute, value.decode("ascii", "replace")[:_NAME_LIMIT])
        if pax:
            records = b"".join(_record(key, value) for key, value in pax.items())
            extended = tarfile.TarInfo("././@PaxHeader")
            extended.type, extended.size = tarfile.XHDTYPE, len(records)
            self._write(_block(extended) + records + bytes(-len(records) % BLOCK))
        self._write(_block(info))

    def _contents(self, at: At, size: int) -> None:
        fd = syscalls.open_file(at, os.O_RDONLY)
        try:
            position = 0
            while position < size:
                data = syscalls.read(fd, min(_CHUNK, size - position), position)
                if not data:
                    raise Failed("A file of the snapshot became shorter while it was read.")
                self._write(data)
                self._progress(len(data))
                position += len(data)
        finally:
            syscalls.close(fd)
        self._write(bytes(-size % BLOCK))

    def _write(self, data: bytes) -> None:
        self._write_all(data)
        self._written += len(data)


def _block(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "replace")


def _record(key: bytes, value: bytes) -> bytes:
    """Return a record of a PAX header, which begins with its own length."""
    rest = b" %b=%b\n" % (key, value)
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d%b" % (length, rest)


def _decimal(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    return b"%b%d.%09d" % (sign, *divmod(abs(nanoseconds), _SECOND))
