"""Fixtures of the conformance suite: one body, many file systems.

Lower layers are on ext4 and the upper on tmpfs, as on a live CD.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support import libc
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import FileSystem
from tests.support.sessiond_overlay import SessiondOverlay
from tests.support.views import Merge

DISK_BYTES = 1 << 30
"""Size of the ext4 file system; it is a sparse file."""


@pytest.fixture(scope="package")
def scratch() -> Iterator[str]:
    """A tmpfs with an ext4 on `disk`."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with ExitStack() as undo:
        top = tempfile.mkdtemp(prefix="sessiond-conformance-")
        undo.callback(os.rmdir, top)
        os.chmod(top, 0o755)
        libc.mount("scratch", top, "tmpfs", libc.MS_NOATIME, "mode=755")
        undo.callback(libc.umount, top, libc.MNT_DETACH)
        undo.callback(libc.umount, _make_disk(top), libc.MNT_DETACH)
        yield top


def _make_disk(top: str) -> str:
    image = f"{top}/disk.img"
    with open(image, "xb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-m0", image], check=True)
    disk = f"{top}/disk"
    os.mkdir(disk)
    subprocess.run(["mount", "-o", "loop,noatime", image, disk], check=True)
    return disk


@pytest.fixture
def fast(scratch: str) -> str:
    """An empty directory on tmpfs."""
    return _new_directory(scratch)


@pytest.fixture
def disk(scratch: str) -> str:
    """An empty directory on ext4."""
    return _new_directory(f"{scratch}/disk")


def _new_directory(parent: str) -> str:
    """Return a directory that other users may pass through."""
    directory = tempfile.mkdtemp(dir=parent)
    os.chmod(directory, 0o755)
    return directory


FILE_SYSTEMS: dict[str, FileSystem | None] = {
    "plain": None,
    "kernel": KernelOverlay(),
    "sessiond": SessiondOverlay(),
    "sessiond-cached": SessiondOverlay("cached"),
    "sessiond-plain": SessiondOverlay("plain"),
}


@pytest.fixture(params=FILE_SYSTEMS)
def merge(request: pytest.FixtureRequest, disk: str, fast: str) -> Iterator[Merge]:
    """Make merged views on each file system in turn; a plain directory says what is right."""
    merge = Merge(FILE_SYSTEMS[request.param], disk, fast)
    yield merge
    merge.close()


@pytest.fixture(params=[name for name in FILE_SYSTEMS if name != "plain"])
def merge_layers(request: pytest.FixtureRequest, disk: str, fast: str) -> Iterator[Merge]:
    """The same for what only an overlay has: layers."""
    merge = Merge(FILE_SYSTEMS[request.param], disk, fast)
    yield merge
    merge.close()
