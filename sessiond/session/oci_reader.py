"""A tar in the format of `oci`, made a layer.

The archive is not to be trusted: names lead nowhere but beneath the layer, no symbolic link is
followed, no note of an overlay is taken from it, and what it says of sizes is not believed but
found out. All that it has to say is read piece by piece, of limited size. Blocks, and is called in
a thread.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat as modes
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from enum import Enum, auto

from sessiond.errors import Failed, NoSpace
from sessiond.overlay import syscalls
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import join
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout_device
from sessiond.overlay.xattrs import OverlayXattrs, copy_attributes
from sessiond.session.oci import OPAQUE, OVERLAY_XATTRS, RESERVED, WHITEOUT, XATTR

_HEADER_LIMIT = 1 << 20
"""Bytes that the headers of one member may have: more than a name and all xattrs can take."""
_GLOBAL_LIMIT = 64
"""Records that count for all members."""
_CHUNK = 1 << 18
_ZEROS = bytes(4096)
_GZIP = b"\x1f\x8b"
_MUST_HAVE = (b"security.", b"system.posix_acl_")
"""Attributes without which a file would be less protected."""
_NOTES = (b".origin", b".impure", b".nlink", b".uuid", b".protattr")
"""What overlayfs notes for itself, and a layer means the same without."""
_SECOND = 1_000_000_000
_TIME_LIMIT = 1 << 33
"""Seconds before and after 1970."""
_MALFORMED = (
    ArithmeticError,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    LookupError,
    RecursionError,
    ValueError,
)
"""What reading an archive raises that is none, or is cut off."""

Read = Callable[[int], bytes]


class Marks(Enum):
    """How an archive says what it does to the image."""

    OCI = auto()
    """By names; see `oci`."""
    OVERLAYFS = auto()
    """As overlayfs does in a layer: the device 0:0, and the attribute of opaque directories."""


def read_layer(
    read: Read,
    target: Layer,
    image: Layer,
    progress: Callable[[int], None] = lambda _: None,
    marks: Marks = Marks.OCI,
) -> None:
    """Unpack an archive, which `read` gives, into the empty layer `target` over `image`.

    ``read(size)`` returns at most so many bytes, and nothing at the end. Compressed with gzip or
    not is found out. `progress` is told of bytes of the archive. Raises `Failed` for what is no
    such archive, or not all of it; `NoSpace`, `OSError`, and what `read` raises.
    """
    source = _Source(read, progress)
    try:
        stream = source if source.peek(2) != _GZIP else _Inflated(source)
        _unpack(_Window(stream), target, image, marks)
    except _MALFORMED as error:
        reason = str(error) or type(error).__name__
        raise Failed(f"The archive is damaged, cut off, or no tar: {reason}.") from error


def _unpack(window: _Window, target: Layer, image: Layer, marks: Marks) -> None:
    kinds = {Marks.OCI: _Unpacker, Marks.OVERLAYFS: _OverlayfsUnpacker}
    unpacker = kinds[marks](window, target, image)
    window.allow(_HEADER_LIMIT)
    # Its own extraction is not used: that follows symlinks, and knows no layers.
    with tarfile.TarFile(fileobj=window, mode="r", errors="surrogateescape") as archive:  # type: ignore[arg-type]
        while True:
            window.allow(_HEADER_LIMIT)
            member = archive.next()
            if member is None:
                break
            if len(archive.pax_headers) > _GLOBAL_LIMIT:
                raise tarfile.ReadError("it has too many global headers")
            window.allow(None)
            unpacker.add(archive, member)
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
    if window.ended:
        raise tarfile.ReadError("its end is missing")
    window.allow(None)
    while window.read(_CHUNK):  # the checksum of what is compressed comes last
        pass


class _Source:
    """The archive as it comes; `read` gives all that is asked for, but at the end."""

    def __init__(self, read: Read, progress: Callable[[int], None]) -> None:
        self._read = read
        self._progress = progress
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        self._ahead = self.read(size)
        return self._ahead

    def read(self, size: int) -> bytes:
        parts = [self._ahead[:size]]
        self._ahead = self._ahead[size:]
        missing = size - len(parts[0])
        while missing > 0 and (part := self._read(missing)):
            parts.append(part)
            missing -= len(part)
            self._progress(len(part))
        return b"".join(parts)


class _Inflated:
    """What a source contains that is compressed."""

    def __init__(self, source: _Source) -> None:
        self._file = gzip.GzipFile(fileobj=source, mode="rb")  # type: ignore[call-overload]

    def read(self, size: int) -> bytes:
        return bytes(self._file.read(size))


class _Window:
    """The archive as `tarfile` wants it: a file, which only goes forward.

    It is asked for whole headers, of whatever size they claim to be: more than was allowed is
    refused.
    """

    def __init__(self, stream: _Source | _Inflated) -> None:
        self._stream = stream
        self._position = 0
        self._allowed: int | None = None
        self.ended = False
        """The last time that something was asked for there was nothing."""

    def allow(self, size: int | None) -> None:
        """Let so many bytes be read before this is called again; None: any number."""
        self._allowed = size

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        if size < 0 or (self._allowed is not None and size > self._allowed):
            raise tarfile.ReadError("a header is too large")
        if self._allowed is not None:
            self._allowed -= size
        data = self._stream.read(size)
        self.ended = size > 0 and not data
        self._position += len(data)
        return data

    def seek(self, position: int, _whence: int = 0) -> int:
        if position < self._position:
            raise tarfile.ReadError("a header makes no sense")
        while self._position < position:
            skipped = self._stream.read(min(position - self._position, _CHUNK))
            if not skipped:
                raise tarfile.ReadError("unexpected end of data")
            self._position += len(skipped)
        return self._position


class _Unpacker:
    """Puts members into the layer `target`, which nobody else uses."""

    def __init__(self, window: _Window, target: Layer, image: Layer) -> None:
        self._window = window
        self._target = target
        self._image = image
        self._xattrs = OverlayXattrs()

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Put one member where it belongs."""
        path = _checked_path(member.name)
        try:
            self._add(archive, member, path)
        except OSError as error:
            reason = {
                errno.ENOTDIR: "something on the way to it is no directory",
                errno.ELOOP: "something on the way to it is a symbolic link",
                errno.EXDEV: "something on the way to it is a symbolic link",
            }.get(error.errno or 0)
            if reason is None or isinstance(error, gzip.BadGzipFile):
                raise
            raise Failed(f"The archive cannot be imported: {_shown(path)}: {reason}.") from error

    def _add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: bytes) -> None:
        if not path:
            if not member.isdir():
                raise Failed("The archive cannot be imported: its root is no directory.")
            self._describe(self._target.at(b""), member)
            return
        parent, _, name = path.rpartition(b"/")
        directory = self._parent(parent)
        with self._time_kept(directory):
            if not self._take_mark(member, directory, name):
                self._put(archive, member, path, At(directory, name))

    def _take_mark(self, member: tarfile.TarInfo, directory: int, name: bytes) -> bool:
        """Do what a member stands for, if that is no object; return whether it is none."""
        if name == OPAQUE:
            syscalls.setxattr(At(directory, b"."), self._xattrs.opaque, b"y")
        elif name.startswith(WHITEOUT) and not name.startswith(RESERVED):
            self._white_out(At(directory, _name(name[len(WHITEOUT) :])))
        return name.startswith(WHITEOUT)

    @contextmanager
    def _time_kept(self, directory: int) -> Iterator[None]:
        before = os.fstat(directory)
        yield
        syscalls.utime(At(directory, b""), before.st_atime_ns, before.st_mtime_ns)

    def _parent(self, path: bytes) -> int:
        """Return the directory `path`; what the archive lacks of it is made as the image has it."""
        try:
            return self._target.directory(path)
        except FileNotFoundError:
            pass
        made = b""
        for name in path.split(b"/"):
            directory = self._target.directory(made)
            at, made = At(directory, name), join(made, name)
            if syscalls.stat_or_none(at) is None:
                with self._time_kept(directory):
                    self._make_like_image(made, at)
        return self._target.directory(path)

    def _make_like_image(self, path: bytes, at: At) -> None:
        syscalls.mkdir(at, 0o755)
        syscalls.chmod(at, 0o755)
        like = self._in_image(path)
        if like is not None:
            copy_attributes(like, at, syscalls.stat(like), self._xattrs)

    def _in_image(self, path: bytes) -> At | None:
        """Return the directory of that name in the image."""
        try:
            at = self._image.at(path)
            return at if modes.S_ISDIR(syscalls.stat(at).st_mode) else None
        except OSError:
            return None

    def _white_out(self, at: At) -> None:
        found = syscalls.stat_or_none(at)
        if found is None:
            syscalls.mknod(at, modes.S_IFCHR, 0)
        elif modes.S_ISDIR(found.st_mode):
            # What the archive itself has counts: only what is below is hidden.
            syscalls.setxattr(at, self._xattrs.opaque, b"y")

    def _put(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: bytes, at: At) -> None:
        hidden = self._make_room(member, path, at)
        if member.isdir():
            with suppress(FileExistsError):
                syscalls.mkdir(at, 0o700)
        elif member.islnk():
            self._link(member, path, at)
            return
        elif member.issym():
            syscalls.symlink(at, os.fsencode(member.linkname))
        elif member.isreg():
            self._create(archive, member, at)
        elif member.isfifo():
            syscalls.mknod(at, modes.S_IFIFO | 0o600, 0)
        elif member.ischr() or member.isblk():
            self._make_node(member, path, at)
        else:
            raise Failed(f"The archive cannot be imported: {_shown(path)} is of no known type.")
        self._describe(at, member)
        if hidden and member.isdir():
            syscalls.setxattr(at, self._xattrs.opaque, b"y")

    def _make_room(self, member: tarfile.TarInfo, path: bytes, at: At) -> bool:
        """Remove what has the name, of an earlier member; return whether it was a whiteout."""
        found = syscalls.stat_or_none(at)
        if found is None:
            return False
        if modes.S_ISDIR(found.st_mode):
            if not member.isdir():
                raise Failed(
                    f"The archive cannot be imported: {_shown(path)} is a directory and something "
                    "else in it."
                )
            return False
        syscalls.unlink(at)
        return is_whiteout_device(found)

    def _link(self, member: tarfile.TarInfo, path: bytes, at: At) -> None:
        other = _checked_path(member.linkname)
        parent, _, name = other.rpartition(b"/")
        try:
            source = At(self._target.directory(parent), name)
            found = syscalls.stat(source)
        except FileNotFoundError:
            found = None
        if found is None or modes.S_ISDIR(found.st_mode) or is_whiteout_device(found):
            raise Failed(
                f"The archive cannot be imported: {_shown(path)} is a hard link to "
                f"{_shown(other)}, which is not there."
            )
        syscalls.link(source, at)

    def _make_node(self, member: tarfile.TarInfo, path: bytes, at: At) -> None:
        device = os.makedev(member.devmajor, member.devminor)
        if device == 0:
            raise Failed(f"The archive cannot be imported: {_shown(path)} is the device 0:0.")
        kind = modes.S_IFCHR if member.ischr() else modes.S_IFBLK
        syscalls.mknod(at, kind | 0o600, device)

    def _create(self, archive: tarfile.TarFile, member: tarfile.TarInfo, at: At) -> None:
        stored = archive.extractfile(member)
        assert stored is not None  # it is a regular file
        parts = _parts(member)
        free = syscalls.statvfs(at.directory)
        if sum(size for _, size in parts) > free.f_bavail * free.f_frsize:
            raise NoSpace("The archive takes more space than there is; delete files or snapshots.")
        fd = syscalls.create_file(at, 0o600)
        try:
            for offset, size in parts:
                stored.seek(offset)
                _copy(stored.read, fd, offset, size)
            syscalls.truncate(fd, member.size)
        finally:
            syscalls.close(fd)

    def _describe(self, at: At, member: tarfile.TarInfo) -> None:
        """Give an object the attributes that its member has; a directory may have others."""
        syscalls.chown(at, member.uid, member.gid)
        wanted = dict(self._xattrs_of(member))
        if member.isdir():
            for name in syscalls.listxattr(at):
                if name not in wanted and not self._xattrs.is_own(name):
                    syscalls.removexattr(at, name)
        for name, value in wanted.items():
            try:
                syscalls.setxattr(at, name, value)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP or name.startswith(_MUST_HAVE):
                    raise
        if not member.issym():
            syscalls.chmod(at, member.mode & 0o7777)
        time = _time_of(member)
        syscalls.utime(at, time, time)

    def _xattrs_of(self, member: tarfile.TarInfo) -> Iterator[tuple[bytes, bytes]]:
        for key, value in member.pax_headers.items():
            name = os.fsencode(key)
            if name.startswith(XATTR):
                name = self._attribute(name[len(XATTR) :])
                if not name.startswith(OVERLAY_XATTRS):
                    yield name, os.fsencode(value)

    def _attribute(self, name: bytes) -> bytes:
        """Return the name of an attribute; see `Archive`."""
        return name.replace(b"%3D", b"=").replace(b"%25", b"%")


class _OverlayfsUnpacker(_Unpacker):
    """The same of an archive with the marks of overlayfs."""

    def _take_mark(self, member: tarfile.TarInfo, directory: int, name: bytes) -> bool:
        if not (member.ischr() and member.devmajor == member.devminor == 0):
            return False
        self._white_out(At(directory, name))
        return True

    def _attribute(self, name: bytes) -> bytes:
        return name

    def _describe(self, at: At, member: tarfile.TarInfo) -> None:
        super()._describe(at, member)
        own = {
            os.fsencode(key)[len(XATTR) :]: os.fsencode(value)
            for key, value in member.pax_headers.items()
            if os.fsencode(key).startswith(XATTR + OVERLAY_XATTRS)
        }
        for name, value in own.items():
            if name == self._xattrs.opaque and value == b"y":
                syscalls.setxattr(at, name, value)
            elif self._xattrs.is_own(name) and not name.endswith(_NOTES):
                # A redirect, a copy of metadata alone, a whiteout that is a file.
                raise Failed(
                    f"The archive cannot be imported: {_shown(_checked_path(member.name))} has the "
                    f"attribute {os.fsdecode(name)}, so it means nothing without the layers that "
                    "it was made on."
                )


def _parts(member: tarfile.TarInfo) -> list[tuple[int, int]]:
    """Return where a file has contents, by offsets and sizes; the rest are holes."""
    sparse: list[tuple[int, int]] | None = member.sparse  # type: ignore[assignment]
    parts = [(0, member.size)] if sparse is None else [part for part in sparse if part[1]]
    end = 0
    for offset, size in parts:
        if offset < end or size < 0:
            raise tarfile.ReadError("the map of a sparse file makes no sense")
        end = offset + size
    if end > member.size:
        raise tarfile.ReadError("the map of a sparse file makes no sense")
    return parts


def _copy(read: Callable[[int], bytes], fd: int, offset: int, size: int) -> None:
    """Copy `size` bytes; blocks of zeros become holes."""
    while size:
        data = read(min(_CHUNK, size))
        if not data:
            raise tarfile.ReadError("unexpected end of data")
        for start in range(0, len(data), len(_ZEROS)):
            part = data[start : start + len(_ZEROS)]
            if part != _ZEROS[: len(part)] and syscalls.write(fd, part, offset + start) < len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += len(data)
        size -= len(data)


def _checked_path(name: str) -> bytes:
    """Return a member's name as a path in the layer. Raises `Failed`."""
    encoded = os.fsencode(name)
    if encoded.startswith(b"/"):
        raise Failed(f"The archive cannot be imported: {_shown(encoded)} is no relative path.")
    return b"/".join(_name(part) for part in encoded.split(b"/") if part not in (b"", b"."))


def _name(part: bytes) -> bytes:
    if part in (b"", b".", b"..") or b"\0" in part:
        raise Failed(f"The archive cannot be imported: it has a name {_shown(part)}.")
    return part


def _shown(path: bytes) -> str:
    text = os.fsdecode(path)
    return repr(text) if len(text) < 200 else f"{text[:200]!r}..."


def _time_of(member: tarfile.TarInfo) -> int:
    """Return the time of modification, in nanoseconds: tarfile has it as a float."""
    text = member.pax_headers.get("mtime")
    time = Decimal(member.mtime if text is None else text)
    if not abs(time) < _TIME_LIMIT:
        raise tarfile.ReadError("a time makes no sense")
    return int(time * _SECOND)
