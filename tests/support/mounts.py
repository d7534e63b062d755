"""What is common to the file systems under test: layers, and waiting for mounts to come and go."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tests.support import libc


@dataclass(frozen=True, slots=True)
class Layers:
    """Directories to be merged: `lowers` topmost first; without an upper, for reading only."""

    lowers: Sequence[str]
    upper: str | None = None
    work: str | None = None

    def options(self) -> str:
        """Return them as the mount options of overlayfs."""
        options = "lowerdir=" + ":".join(self.lowers)
        if self.upper is not None:
            options += f",upperdir={self.upper},workdir={self.work}"
        return options


class FileSystem(Protocol):
    """A way to mount a merged view of layers."""

    name: str
    descriptors_follow_changes: bool
    """Whether a read-only descriptor of a lower file tells what was done to the file since: what
    was written, and how many links are left. overlayfs documents that its descriptors do not."""
    copy_up_makes_another_inode: bool
    """Whether what opens a file that was copied up while open gets another inode: with locks of its
    own, and not through the descriptor that is open."""

    def mounted(
        self, layers: Layers, mount_point: str, *options: str
    ) -> AbstractContextManager[None]:
        """Mount the merged view while the context is open; raises `OSError` or `MountError`."""


class MountError(Exception):
    """The mount helper ended without a mount; the message is what it printed."""


def is_mounted(mount_point: str) -> bool:
    """Whether something is mounted at `mount_point`, in this mount namespace."""
    with open("/proc/self/mountinfo", "rb") as table:
        return any(line.split(b" ")[4] == os.fsencode(mount_point) for line in table)


def wait_mounted(mount_point: str, process: int, seconds: float = 30) -> bool:
    """Wait until something is mounted at `mount_point`; return False if `process` ends before.

    The kernel wakes whoever polls the mount table, so that there is no interval to choose.
    """
    ended = os.pidfd_open(process)
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            changed = select.poll()
            changed.register(table, select.POLLPRI)
            changed.register(ended, select.POLLIN)
            while not is_mounted(mount_point):
                events = changed.poll(seconds * 1000)
                assert events, f"Nothing was mounted at {mount_point} within {seconds} seconds."
                if any(descriptor == ended for descriptor, _ in events):
                    return is_mounted(mount_point)
    finally:
        os.close(ended)
    return True


def detach(mount_point: str) -> None:
    """Unmount whatever is mounted at `mount_point`, used or not; nothing there is no error."""
    while is_mounted(mount_point):
        libc.umount(mount_point, libc.MNT_DETACH)
