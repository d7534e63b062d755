"""A disk that remembers every write and every flush, and what it would hold after a power cut.

A loop device lies on a file that the FUSE server at the end of this module serves. The loop device
hands each write to it at once, in order, and each flush as fsync(2); the server puts both into a
log. So the disk's contents can be made as they were at any moment, with or without the writes that
no flush had followed yet.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from tests.support import libc
from tests.support.mounts import wait_mounted

_HEAD = struct.Struct("=cQI")
_WRITE, _FLUSH = b"w", b"f"
_SECTOR = 4096
"""Bytes that a disk writes wholly or not at all. With less, no superblock would survive."""


class Record(NamedTuple):
    """One write; with no data, a flush. `end` is the position in the log after it."""

    end: int
    offset: int
    data: bytes

    @property
    def is_flush(self) -> bool:
        """Whether it is a flush."""
        return not self.data


class RecordingDisk:
    """A disk that begins as the file `image`, whose contents stay as they are."""

    def __init__(self, image: str, directory: str) -> None:
        """Use `directory`, which is empty, for what is needed besides."""
        self.image = image
        self._current = f"{directory}/current"
        self._log = f"{directory}/log"
        self._served = f"{directory}/served"
        self._replayed = f"{directory}/replayed"

    @contextmanager
    def mounted(self, mount_point: str, *options: str) -> Iterator[None]:
        """Mount the disk, and record what is done to it until it is unmounted."""
        _copy(self.image, self._current)
        os.mkdir(self._served)
        command = [sys.executable, "-m", "tests.support.mortal", "tests.support.recording_disk"]
        with ExitStack() as undo:
            server = undo.enter_context(
                subprocess.Popen([*command, self._current, self._log, self._served])
            )
            assert wait_mounted(self._served, server.pid), "the disk's server has ended"
            undo.callback(libc.umount, self._served, libc.MNT_DETACH)
            with mounted_image(f"{self._served}/disk", mount_point, *options):
                yield

    @property
    def position(self) -> int:
        """How much has been recorded by now."""
        return os.stat(self._log).st_size

    def records(self) -> list[Record]:
        """Return all that was recorded."""
        records = []
        with open(self._log, "rb") as log:
            while head := log.read(_HEAD.size):
                kind, offset, size = _HEAD.unpack(head)
                data = log.read(size) if kind == _WRITE else b""
                records.append(Record(log.tell(), offset, data))
        return records

    @contextmanager
    def after_power_loss(
        self, writes: Sequence[Record], mount_point: str, *options: str
    ) -> Iterator[None]:
        """Mount the disk as if only `writes` had got to it, with what its journal restores."""
        _copy(self.image, self._replayed)
        with open(self._replayed, "r+b", buffering=0) as disk:
            for record in writes:
                os.pwrite(disk.fileno(), record.data, record.offset)
        with mounted_image(self._replayed, mount_point, *options):
            yield


def torn(writes: Sequence[Record], chance: random.Random) -> list[Record]:
    """Return what may have got to the disk of writes that no flush has followed: any sectors."""
    share = chance.random()
    return [
        Record(write.end, write.offset + start, write.data[start : start + _SECTOR])
        for write in writes
        for start in range(0, len(write.data), _SECTOR)
        if chance.random() < share
    ]


@contextmanager
def mounted_image(image: str, mount_point: str, *options: str) -> Iterator[None]:
    """Mount the file system in a file."""
    wanted = ",".join(("loop", "noatime", *options))
    subprocess.run(["mount", "-o", wanted, image, mount_point], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", mount_point], check=True)


def _copy(source: str, target: str) -> None:
    """Copy a sparse file."""
    with suppress(FileNotFoundError):
        os.unlink(target)  # a loop device may still have it, and mount(8) would use that again
    with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        position = 0
        while True:
            try:
                position = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: no more data
                return
            end = os.lseek(reader.fileno(), position, os.SEEK_HOLE)
            while position < end:
                position += os.copy_file_range(
                    reader.fileno(), writer.fileno(), end - position, position, position
                )


def _serve(image: str, log: str, mount_point: str) -> None:
    """Serve the file `image` as ``disk`` in `mount_point`, until that is unmounted."""
    import pyfuse3
    import trio

    disk = os.open(image, os.O_RDWR)
    records = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
    number = pyfuse3.ROOT_INODE + 1

    class Server(pyfuse3.Operations):
        async def getattr(self, inode, ctx):  # type: ignore[no-untyped-def]
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = 0o100600 if inode == number else 0o040700
            entry.st_size = os.fstat(disk).st_size
            entry.entry_timeout = entry.attr_timeout = 1e9
            return entry

        async def lookup(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
            if name != b"disk":
                raise pyfuse3.FUSEError(2)
            return await self.getattr(number, ctx)

        async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
            return pyfuse3.FileInfo(fh=inode, keep_cache=True)

        async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
            return os.pread(disk, size, off)

        async def write(self, fh, off, buf):  # type: ignore[no-untyped-def]
            os.write(records, _HEAD.pack(_WRITE, off, len(buf)) + buf)
            return os.pwrite(disk, buf, off)

        async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def]
            os.write(records, _HEAD.pack(_FLUSH, 0, 0))

    pyfuse3.init(Server(), mount_point, {*pyfuse3.default_options, "fsname=recording-disk"})
    trio.run(pyfuse3.main)
    pyfuse3.close()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
