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

import trio

from sessiond.errors import Failed, NoSpace, NotSupported

_LOOK_SECONDS = 0.5
"""How often it is looked how large the image has become."""

_COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
"""Of squashfs, by the number in its superblock."""
_EROFS_COMPRESSED = 1
"""EROFS_FEATURE_INCOMPAT_LZ4_0PADDING"""


@dataclass(frozen=True, slots=True)
class Packer:
    """How an image like another one is made."""

    program: str
    options: tuple[str, ...]
    target_first: bool
    """Whether the program takes the image before the directory."""

    async def pack(self, source: Path, target: Path, report: Callable[[int], None]) -> None:
        """Pack the directory `source` into the new file `target`; `report` its size as it grows.

        Raises `Failed`, `NoSpace`; the file may be there in part then. Can be cancelled.
        """
        paths = (target, source) if self.target_first else (source, target)
        command = [self.program, *map(str, paths), *self.options]
        if self.target_first:
            command = [self.program, *self.options, *map(str, paths)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, target, report)
            code, said = await _run(command)
            nursery.cancel_scope.cancel()
        if "No space left" in said:
            raise NoSpace(
                f"There is no space for the new image in {target.parent}; make room on that disk."
            )
        if code != 0:
            lines = [line.strip().rstrip(".") for line in said.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"it ended with status {code}"
            raise Failed(f"{self.program} could not make the image: {reason}.")


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


async def _watch(target: Path, report: Callable[[int], None]) -> None:
    while True:
        await trio.sleep(_LOOK_SECONDS)
        try:
            report((await trio.Path(target).stat()).st_size)
        except FileNotFoundError:
            continue


def packer_like(image: Path, kind: str) -> Packer:
    """Return how an image of the same kind, compressed in the same way, is made.

    Raises `NotSupported` for kinds that are not made here, and where the program is missing;
    `OSError`.
    """
    with image.open("rb") as file:
        head = file.read(2048)
    match kind:
        case "squashfs":
            size, compressor = struct.unpack_from("<I4xH", head, 12)
            # All that could not be read would be left out without a word otherwise.
            options = ["-noappend", "-no-progress", "-quiet", "-exit-on-error", "-one-file-system"]
            options += ["-comp", _COMPRESSORS.get(compressor, "gzip")]
            options += ["-b", str(2 ** round(math.log2(max(size, 4096))))]
            packer = Packer("mksquashfs", tuple(options), target_first=False)
        case "erofs":
            (features,) = struct.unpack_from("<I", head, 1024 + 80)
            compressed = ("-zlz4hc",) if features & _EROFS_COMPRESSED else ()
            packer = Packer("mkfs.erofs", ("--quiet", *compressed), target_first=True)
        case _:
            raise NotSupported(
                f"{image} is {kind}, of which no new image can be made; squashfs and erofs can."
            )
    if shutil.which(packer.program) is None:
        raise NotSupported(f"The program {packer.program}, which makes {kind}, is not installed.")
    return packer
