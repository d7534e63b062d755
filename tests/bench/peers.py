"""The overlays that are compared: how each is mounted, and what it cannot do.

Options are those that the documentation of each recommends for this use; docs/benchmark.md gives
the reasons. Servers in user space run in the foreground, so that their end can be waited for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import sessiond
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers, MountError, detach, wait_mounted

LONGEST_SECONDS = 300
"""How long a mount, or a program in it, may live. Whoever waits for a server that hangs can only be
freed by the death of the server."""

_LONGEST_END_SECONDS = 30

_DAY = 24 * 60 * 60
"""Seconds for which names and attributes may be cached: nobody changes the layers meanwhile."""


class Peer(Protocol):
    """An overlay under comparison: one column."""

    name: str
    copies_up: bool
    """Whether what is in a lower can be changed and removed in the merged view."""

    def mounted(self, layers: Layers, mount_point: str) -> AbstractContextManager[None]:
        """Mount the merged view while the context is open; raises `OSError` or `MountError`."""

    def version(self) -> str:
        """Return which version is compared."""


class Kernel:
    """overlayfs, with the options that give it the semantics of a plain directory."""

    name = "kernel"
    copies_up = True

    def __init__(self) -> None:
        self._overlay = KernelOverlay()

    def mounted(self, layers: Layers, mount_point: str) -> AbstractContextManager[None]:
        return self._overlay.mounted(layers, mount_point)

    def version(self) -> str:
        return f"Linux {os.uname().release}"


class _Server:
    """An overlay that a program in user space serves."""

    name: str
    copies_up = True
    _program: str
    _environment: Mapping[str, str] = {}

    def _arguments(self, layers: Layers) -> list[str]:
        raise NotImplementedError

    @contextmanager
    def mounted(self, layers: Layers, mount_point: str) -> Iterator[None]:
        with tempfile.TemporaryFile() as said:
            server = subprocess.Popen(
                [
                    *("timeout", "--signal=KILL", str(LONGEST_SECONDS)),
                    *(self._program, "-f", *self._arguments(layers), mount_point),
                ],
                env=os.environ | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            try:
                if not wait_mounted(mount_point, server.pid):
                    raise MountError(f"{self.name} does not mount: {_text(said.fileno())}")
                yield
            finally:
                detach(mount_point)
                _end(server)
            self._check(_text(said.fileno()))

    def _check(self, words: str) -> None:
        """Take notice of what the server has said."""

    def version(self) -> str:
        """As Debian numbers the package, which is called as the peer is."""
        done = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${Version}", self.name],
            capture_output=True,
            text=True,
        )
        return done.stdout or "not installed"


def _end(server: subprocess.Popen[bytes]) -> None:
    """Wait for a server whose mount is gone; it stays if a program still uses the mount."""
    try:
        server.wait(_LONGEST_END_SECONDS)
    except subprocess.TimeoutExpired:
        server.terminate()
        server.wait()


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 12, 0).decode(errors="replace").strip()


class FuseOverlayfs(_Server):
    """fuse-overlayfs, with its defaults: it caches without limit of time by itself."""

    name = "fuse-overlayfs"
    _program = "fuse-overlayfs"

    def _arguments(self, layers: Layers) -> list[str]:
        return ["-o", f"{layers.options()},allow_other"]


class UnionfsFuse(_Server):
    """unionfs-fuse, with copy-on-write, its manual's options, and every cache of libfuse on."""

    name = "unionfs-fuse"
    _program = "unionfs"

    def _arguments(self, layers: Layers) -> list[str]:
        caches = ",".join(f"{kind}_timeout={_DAY}" for kind in ("attr", "entry", "negative"))
        options = f"cow,allow_other,use_ino,suid,dev,kernel_cache,{caches}"
        return ["-o", options, _branches(layers)]


class Mergerfs(_Server):
    """mergerfs, with every cache on: it joins branches, and never copies up nor hides anything."""

    name = "mergerfs"
    copies_up = False
    _program = "mergerfs"

    def _arguments(self, layers: Layers) -> list[str]:
        caches = ",".join(f"cache.{kind}={_DAY}" for kind in ("attr", "entry", "negative_entry"))
        options = (
            "allow_other,use_ino,suid,dev,category.create=ff,minfreespace=0,"
            f"cache.files=auto-full,cache.readdir=true,cache.symlinks=true,{caches}"
        )
        return ["-o", options, _branches(layers)]


def _branches(layers: Layers) -> str:
    return ":".join([f"{layers.upper}=RW", *(f"{lower}=RO" for lower in layers.lowers)])


class Sessiond(_Server):
    """sessiond-overlay, with one of its data paths."""

    def __init__(self, data_path: str) -> None:
        self.name = f"sessiond-{data_path}"
        self.data_path = data_path
        self._program = str(Path(sys.executable).with_name("sessiond-overlay"))
        self._environment = {"SESSIOND_DATAPATH": data_path}

    def _arguments(self, layers: Layers) -> list[str]:
        return ["-o", f"{layers.options()},allow_other"]

    def version(self) -> str:
        return sessiond.__version__

    def _check(self, words: str) -> None:
        """It warns when another data path is in use than the one that was asked for."""
        if words:
            raise MountError(words)


OTHERS = (Kernel, FuseOverlayfs, UnionfsFuse, Mergerfs)
DATA_PATHS = ("passthrough", "cached", "plain")

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (*(other() for other in OTHERS), *(Sessiond(path) for path in DATA_PATHS))
}
