"""Disks with each of the file systems that an upper on disk may be on."""

from __future__ import annotations

import subprocess

_MIB = 1 << 20
FILE_SYSTEMS = {
    "ext4": (32 * _MIB, ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0")),
    "xfs": (300 * _MIB, ("mkfs.xfs", "-q")),
    "btrfs": (160 * _MIB, ("mkfs.btrfs", "--quiet")),
}
"""The smallest size of each, in bytes, and how to make it."""


def make_image(kind: str, directory: str) -> str:
    """Make an empty file system in a sparse file in `directory`; return its path."""
    size, command = FILE_SYSTEMS[kind]
    image = f"{directory}/disk.img"
    with open(image, "xb") as file:
        file.truncate(size)
    subprocess.run([*command, image], check=True, stdout=subprocess.DEVNULL)
    return image
