"""The kernel's overlayfs as a file system under test: its format on disk is the contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.support import libc
from tests.support.mounts import Layers, detach


class KernelOverlay:
    """overlayfs with every option that brings it nearer to a plain directory."""

    name = "kernel"
    descriptors_follow_changes = False
    copy_up_makes_another_inode = False

    # Without these, rename(2) of a lower directory gives EXDEV, a copy-up breaks hard links, and
    # st_dev differs from layer to layer.
    _OPTIONS = ("redirect_dir=on", "index=on", "metacopy=off", "xino=on")

    @contextmanager
    def mounted(self, layers: Layers, mount_point: str, *options: str) -> Iterator[None]:
        """Mount `layers`; raises `OSError`."""
        wanted = (layers.options(), *(options or self._OPTIONS))
        # Looking at a tree must not change it.
        flags = libc.MS_NOATIME | (libc.MS_RDONLY if layers.upper is None else 0)
        libc.mount("overlay", mount_point, "overlay", flags, ",".join(wanted))
        try:
            yield
        finally:
            detach(mount_point)
