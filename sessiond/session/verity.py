"""dm-verity: an image file as a device, each block of which is checked when it is read.

veritysetup(8) sets it up. What does not match the root hash cannot be read (EIO). All functions
block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sessiond.session import loop
from sessiond.session.model import ImageSource
from sessiond.session.mounts import run

_BLOCK = 4096
"""A hash tree in the image file begins at the next multiple of that after the file system."""


def path(name: str) -> Path:
    """Return where the device `name` is."""
    return Path("/dev/mapper") / name


def open_device(name: str, image: ImageSource, size: int) -> Path:
    """Set up the device `name` for an image whose file system takes `size` bytes; return its path.

    One of that name that goes on, since somebody has files of it open still, is used again. The
    root hash is compared with the image as it is read, so that a wrong one may be noticed by
    who mounts it only. Raises `OSError`; its `strerror` says what was wrong.
    """
    if path(name).exists():
        return path(name)
    tree = image.verity_hash_device or image.path
    options = []
    if image.verity_hash_device is None:
        options.append(f"--hash-offset={-(-size // _BLOCK) * _BLOCK}")
    assert image.verity_root_hash is not None
    with _device(image.path) as data, _device(tree, data if tree == image.path else None) as hashes:
        command = ["veritysetup", "open", *options, "--", str(data), name, str(hashes)]
        try:
            run([*command, image.verity_root_hash])
        except OSError as error:
            files = {str(hashes): str(tree), str(data): str(image.path)}  # which people know
            said = str(error.strerror)
            reason = re.sub("/dev/[a-z0-9]+", lambda at: files.get(at[0], at[0]), said)
            raise OSError(error.errno, reason) from error
    return path(name)


@contextmanager
def _device(file: Path, known: Path | None = None) -> Iterator[Path]:
    """Have a block device with what is in `file`: the one that is `known`, if there is one."""
    if known is not None or file.is_block_device():
        yield known or file
        return
    with loop.attached(file) as device:
        yield device


def close_device(name: str) -> None:
    """Remove the device `name`, if it is there, as soon as nobody uses it. Raises `OSError`."""
    if path(name).exists():
        run(["veritysetup", "close", "--deferred", "--", name])


def is_damaged(name: str) -> bool:
    """Say whether a block of the device `name` was read that does not match. Raises `OSError`."""
    return "corrupted" in run(["veritysetup", "status", "--", name])
