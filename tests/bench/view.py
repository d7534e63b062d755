"""Merged views to run rows on, each with an upper of its own; and dropping caches."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.materials import Lower, Materials
from tests.bench.peers import LONGEST_SECONDS, Peer
from tests.bench.rows import SkippedError, Unit
from tests.support.mounts import Layers

Work = Callable[["View"], int]
"""Prepares what it needs, does the work, and returns the nanoseconds that the work took."""


class WorkError(Exception):
    """A program of a row failed; the message is how it began to complain."""


class View:
    """The merged view of a lower under a fresh upper, at `root`; `scratch` is outside of it."""

    def __init__(self, peer: Peer, lower: Path, directory: Path, materials: Materials) -> None:
        self.lower = lower
        self.materials = materials
        self._peer = peer
        self.root = directory / "merged"
        self.scratch = directory / "scratch"
        upper, work = directory / "upper", directory / "work"
        for new in (self.root, self.scratch, upper, work):
            new.mkdir()
        self._layers = Layers([str(lower)], str(upper), str(work))
        self._mount = ExitStack()

    def mount(self) -> None:
        """Mount it; raises `OSError` or `MountError`."""
        self._mount.enter_context(self._peer.mounted(self._layers, str(self.root)))

    def unmount(self) -> None:
        """Undo `mount`; whoever served the view has ended when this returns."""
        self._mount.close()

    def remount(self) -> None:
        """Unmount, and mount the same layers again: nothing of them is cached then."""
        self.unmount()
        self.mount()

    def client(self, mode: str, *arguments: str, names: Sequence[str] = ()) -> int:
        """Have the client work in the merged view; return nanoseconds. Raises `ClientError`."""
        return self.materials.client(self.root, mode, *arguments, names=names)

    def on_lower(self, mode: str, *arguments: str, names: Sequence[str] = ()) -> None:
        """Have the client work in the lower itself, which brings it into the machine's caches."""
        self.materials.client(self.lower, mode, *arguments, names=names)

    def run(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        silent: bool = False,
    ) -> int:
        """Run a program in the merged view, and return nanoseconds.

        Raises `WorkError` if it fails, or prints something in spite of `silent`.
        """
        began = time.monotonic_ns()
        done = subprocess.run(
            command,
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LONGEST_SECONDS,
        )
        took = time.monotonic_ns() - began
        if done.returncode != 0 or (silent and done.stdout):
            words = (done.stderr.strip() or done.stdout.strip()).splitlines()[:1]
            name = Path(command[0]).name
            raise WorkError(f"{name} ended with {done.returncode}: {''.join(words)}")
        return took


@contextmanager
def fresh_view(peer: Peer, lower: Lower, materials: Materials) -> Iterator[View]:
    """Yield a mounted view with an empty upper; remove it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="view-", dir=lower.uppers))
    directory.chmod(0o755)
    view = View(peer, lower.path, directory, materials)
    try:
        # Writeback that an earlier row owes must not be in the way of this one.
        os.sync()
        view.mount()
        yield view
    finally:
        view.unmount()
        shutil.rmtree(directory)


def drop_inodes() -> None:
    """Drop names and inodes that the kernel has cached; not what is in the page cache."""
    _drop_caches(2)


def drop_everything() -> None:
    """Drop all that the kernel has cached: what is read next comes from the disk."""
    _drop_caches(3)


def _drop_caches(what: int) -> None:
    os.sync()  # what is dirty cannot be dropped
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as control:
        control.write(str(what))


@dataclass(frozen=True, slots=True)
class ViewRow:
    """Work that is done in a merged view of each peer."""

    name: str
    lower: str
    """Which of the `Materials`."""
    work: Work
    changes_lower: bool = False
    """Whether it changes or removes what is in the lower."""
    unit: Unit = Unit.NANOSECONDS

    def prepare(self, materials: Materials) -> None:
        """Make what it works on; raises `SkippedError` where that cannot be."""
        self._lower(materials)

    def measure(self, peer: Peer, materials: Materials) -> float:
        """Do the work once, and return how long it took.

        Raises `SkippedError` if the peer cannot do it by its nature, and whatever goes wrong.
        """
        if self.changes_lower and not peer.copies_up:
            raise SkippedError(f"{peer.name} has neither copy-up nor whiteouts")
        with fresh_view(peer, self._lower(materials), materials) as view:
            return self.work(view)

    def _lower(self, materials: Materials) -> Lower:
        lower = getattr(materials, self.lower)
        assert isinstance(lower, Lower)
        return lower
