"""Packing: an image file is made of what a session shows, by the tools that make such images."""

from __future__ import annotations

import math
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from sessiond.errors import Failed, NoSpace, NotSupported

_LOOK_SECONDS = 0.5
"""How often it is looked how large the image has become."""

_COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
"""Of squashfs, by the number in its superblock."""
_EROFS_COMPRESSED = 1
"""EROFS_FEATURE_INCOMPAT_LZ4_0PADDING"""
_EXT4_JOURNAL = 4
"""EXT4_FEATURE_COMPAT_HAS_JOURNAL"""

Report = Callable[[int], None]
"""Is told how many bytes the new image has, as it grows."""


class Packer(Protocol):
    """How an image like another one is made."""

    @property
    def program(self) -> str:
        """What has to be installed for it."""

    async def pack(self, source: Path, target: Path, report: Report) -> None:
        """Pack the directory `source` into the new file `target`.

        Raises `Failed`, `NoSpace`; the file may be there in part then. Can be cancelled.
        """


@dataclass(frozen=True, slots=True)
class ReadOnlyPacker:
    """For file systems that are made as large as what is in them."""

    program: str
    options: tuple[str, ...]
    target_first: bool
    """Whether the program takes the image before the directory."""

    async def pack(self, source: Path, target: Path, report: Report) -> None:
        """See `Packer`."""
        paths = (target, source) if self.target_first else (source, target)
        command = [self.program, *map(str, paths), *self.options]
        if self.target_first:
            command = [self.program, *self.options, *map(str, paths)]
        code, said = await _watched(command, target, report)
        _require_success(self.program, target, code, said)


@dataclass(frozen=True, slots=True)
class Ext4Packer:
    """For ext4, which has a size: that of the old image, or more, as far as it has to be."""

    block: int
    """Bytes of a block."""
    blocks: int
    inode: int
    """Bytes of an inode."""
    inodes: int
    journal: bool
    program: str = "mke2fs"

    async def pack(self, source: Path, target: Path, report: Report) -> None:
        """See `Packer`."""
        blocks, inodes = self.blocks, self.inodes
        while True:
            code, said = await _watched(
                self._command(source, target, blocks, inodes), target, report
            )
            if "Could not allocate block" in said:
                blocks += blocks // 2
            elif "Could not allocate inode" in said:
                inodes += inodes // 2
            else:
                break
            await trio.Path(target).unlink()
        _require_success(self.program, target, code, said)
        await _copy_root(source, target)

    def _command(self, source: Path, target: Path, blocks: int, inodes: int) -> list[str]:
        options = ["-b", str(self.block), "-I", str(self.inode), "-N", str(inodes), "-m", "0"]
        if not self.journal:
            options += ["-O", "^has_journal"]
        what = ["-d", str(source), str(target), str(blocks)]
        return [self.program, "-q", "-t", "ext4", *options, *what]


async def _copy_root(source: Path, target: Path) -> None:
    """Give the root directory of an ext4 its mode and owner, which mke2fs(8) does not copy."""
    code, said = await _run(["stat", "--format=%f %u %g", str(source)])
    _require_success("stat", target, code, said)
    mode, user, group = said.split()
    for name, value in (("mode", f"0x{mode}"), ("uid", user), ("gid", group)):
        change = f"set_inode_field / {name} {value}"
        code, said = await _run(["debugfs", "-w", "-R", change, str(target)])
        _require_success("debugfs", target, code, said)


async def _watched(command: list[str], target: Path, report: Report) -> tuple[int, str]:
    """Run a program that makes `target`; return its exit status and all that it said."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, target, report)
        done = await _run(command)
        nursery.cancel_scope.cancel()
    return done


def _require_success(program: str, target: Path, code: int, said: str) -> None:
    if "No space left" in said:
        raise NoSpace(
            f"There is no space for the new image in {target.parent}; make room on that disk."
        )
    if code != 0:
        lines = [line.strip().rstrip(".") for line in said.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"it ended with status {code}"
        raise Failed(f"{program} could not make the image: {reason}.")


async def _run(command: list[str]) -> tuple[int, str]:
    """Run a program; return its exit status and all that it said."""
    try:
        done = await trio.run_process(
            command,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except OSError as error:
        return 127, f"it cannot be run: {error.strerror}"
    return done.returncode, done.stdout.decode(errors="replace")


async def _watch(target: Path, report: Report) -> None:
    while True:
        await trio.sleep(_LOOK_SECONDS)
        try:
            report((await trio.Path(target).stat()).st_blocks * 512)
        except FileNotFoundError:
            continue


def packer_like(image: Path, kind: str) -> Packer:
    """Return how an image of the same kind, compressed in the same way, is made.

    Raises `NotSupported` where the program is missing; `OSError`.
    """
    with image.open("rb") as file:
        head = file.read(2048)
    packer: Packer
    match kind:
        case "squashfs":
            size, compressor = struct.unpack_from("<I4xH", head, 12)
            # All that could not be read would be left out without a word otherwise.
            options = ["-noappend", "-no-progress", "-quiet", "-exit-on-error", "-one-file-system"]
            options += ["-comp", _COMPRESSORS.get(compressor, "gzip")]
            options += ["-b", str(2 ** round(math.log2(max(size, 4096))))]
            packer = ReadOnlyPacker("mksquashfs", tuple(options), target_first=False)
        case "erofs":
            (features,) = struct.unpack_from("<I", head, 1024 + 80)
            compressed = ("-zlz4hc",) if features & _EROFS_COMPRESSED else ()
            packer = ReadOnlyPacker("mkfs.erofs", ("--quiet", *compressed), target_first=True)
        case _:  # ext4, or there would be no such image
            inodes, blocks = struct.unpack_from("<2I", head, 1024)
            (shift,) = struct.unpack_from("<I", head, 1024 + 24)
            (inode,) = struct.unpack_from("<H", head, 1024 + 88)
            (features,) = struct.unpack_from("<I", head, 1024 + 92)
            journal = bool(features & _EXT4_JOURNAL)
            packer = Ext4Packer(1024 << min(shift, 6), blocks, max(inode, 128), inodes, journal)
    if shutil.which(packer.program) is None:
        raise NotSupported(f"The program {packer.program}, which makes {kind}, is not installed.")
    return packer
