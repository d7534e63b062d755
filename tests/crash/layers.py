"""Layers that an operation acts on and dies in, and what is found of them afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sessiond.overlay import syscalls
from sessiond.overlay.lookup import covered
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import At
from sessiond.overlay.whiteout import is_whiteout_device
from tests.crash.operations import LOWERS, UPPER, prepare
from tests.support import core_views, trees
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.trees import Snapshot


@dataclass
class Bench:
    """Makes uppers over the same lowers, `lowers`, which nothing ever changes."""

    directory: str
    lowers: Sequence[str]

    def __post_init__(self) -> None:
        # The clock of file systems ticks more coarsely than the one asked here.
        self.start_ns = time.time_ns() - 10**9

    @contextmanager
    def layers(self) -> Iterator[Layers]:
        """Provide a fresh upper, prepared, and remove it."""
        layers = self.make_layers()
        yield layers
        shutil.rmtree(top_of(layers))

    @classmethod
    def make(cls, directory: str) -> Bench:
        """Make the layers that `operations` acts on."""
        top = tempfile.mkdtemp(dir=directory)
        lowers = []
        for number, tree in enumerate(LOWERS):
            lowers.append(f"{top}/lower{number}")
            os.mkdir(lowers[-1], 0o755)
            trees.build(tree, lowers[-1])
        return cls(top, lowers)

    def make_layers(self, *, empty: bool = False) -> Layers:
        """Make a fresh upper, prepared, unless it is to be `empty`."""
        top = tempfile.mkdtemp(dir=self.directory)
        layers = Layers(self.lowers, f"{top}/fs", f"{top}/work")
        for path in (f"{top}/fs", f"{top}/work"):
            os.mkdir(path, 0o755)
        if not empty:
            trees.build(UPPER, f"{top}/fs")
            with self.overlay(layers) as overlay:
                prepare(overlay)
        return layers

    def copy(self, layers: Layers, directory: str) -> Layers:
        """Copy an upper into `directory`, as when a session moves to disk."""
        top = tempfile.mkdtemp(dir=directory)
        subprocess.run(["cp", "-a", f"{top_of(layers)}/.", top], check=True)
        return Layers(self.lowers, f"{top}/fs", f"{top}/work")

    @contextmanager
    def overlay(self, layers: Layers) -> Iterator[Overlay]:
        """Open an overlay of `layers`: what a mount does."""
        overlay = self.open(layers)
        try:
            yield overlay
        finally:
            overlay.close()

    def open(self, layers: Layers) -> Overlay:
        """The same for a process that is going to die."""
        assert layers.upper is not None
        assert layers.work is not None
        lowers = [os.fsencode(path) for path in layers.lowers]
        upper, work = os.fsencode(layers.upper), os.fsencode(layers.work)
        return Overlay(Stack.open(lowers, upper, work))

    def found(self, layers: Layers, spare_whiteout: str = "") -> Snapshot:
        """Mount what a dead process has left; return the view of it.

        Fails unless that is clean, and the kernel's overlayfs shows the same. `spare_whiteout`: a
        path where there may be a whiteout over nothing.
        """
        shown = self.found_here(layers, spare_whiteout)
        self._assert_kernel_agrees(layers, shown)
        return shown

    def found_here(self, layers: Layers, spare_whiteout: str = "") -> Snapshot:
        """The same without asking the kernel."""
        with self.overlay(layers) as overlay:
            assert set(leftovers(overlay)) <= {os.fsencode(spare_whiteout)}
            return core_views.snapshot(overlay, recent_ns=self.start_ns)

    def _assert_kernel_agrees(self, layers: Layers, shown: Snapshot) -> None:
        mount_point = f"{top_of(layers)}/view"
        os.mkdir(mount_point)
        with KernelOverlay().mounted(layers, mount_point):
            by_kernel = trees.snapshot(mount_point, recent_ns=self.start_ns)
        os.rmdir(mount_point)
        trees.assert_same(by_kernel, shown, "the kernel's overlayfs shows another tree")


def top_of(layers: Layers) -> str:
    """Return the directory that an upper and its workdir are in."""
    assert layers.upper is not None
    return os.path.dirname(layers.upper)


def leftovers(overlay: Overlay) -> list[bytes]:
    """Return what no finished operation leaves: in the workdir, and whiteouts over nothing."""
    stack = overlay.view.stack
    found = [name for name, _ in syscalls.scan(stack.workdir.work)]
    for name, _ in syscalls.scan(stack.workdir.index):
        at = At(stack.workdir.index, name)
        if syscalls.getxattr(at, stack.xattrs.nlink) == b"U-1" and syscalls.stat(at).st_nlink == 1:
            found.append(name)
    pending = [overlay.view.root]
    while pending:
        node = pending.pop()
        children = [overlay.view.lookup(node, name)[0] for name in overlay.names(node)]
        pending += [child for child in children if child.is_directory]
        if node.upper:
            found += _idle_whiteouts(stack, node)
    return found


def _idle_whiteouts(stack: Stack, node: Node) -> Iterator[bytes]:
    directory = stack.writable.directory(node.path)
    for name, special in syscalls.scan(directory):
        if (
            special
            and is_whiteout_device(syscalls.stat(At(directory, name)))
            and not covered(stack, node.directory, name)
        ):
            yield node.child_path(name)


def settled(view: Snapshot) -> Snapshot:
    """Return a view without what an interrupted operation may leave different.

    A copy-up changes the time of the directory that it puts the copy into, and then sets it back.
    """
    return {
        path: entry._replace(mtime_ns=trees.RECENT) if entry.kind == "directory" else entry
        for path, entry in view.items()
    }


def assert_name_by_name(before: Snapshot, after: Snapshot, found: Snapshot, what: str) -> None:
    """Fail unless each name is as it was before or is after, and no contents have gone.

    What btrfs promises of a change of two directories of which one has been synchronised.
    """
    states = [without_links(settled(view)) for view in (before, after, found)]
    for path in before.keys() | after.keys() | found.keys():
        was, is_, now = (view.get(path) for view in states)
        assert now in (was, is_), f"{what}: {path!r} was {was}, should be {is_}, and is {now}"
    kept = {entry.digest for entry in before.values()} & {entry.digest for entry in after.values()}
    assert kept <= {entry.digest for entry in found.values()}, f"{what}: contents are lost"


def without_links(view: Snapshot) -> Snapshot:
    """Leave out which names are of one file."""
    return {path: entry._replace(links=(), nlink=0) for path, entry in view.items()}


def assert_one_of(before: Snapshot, after: Snapshot, found: Snapshot, what: str) -> None:
    """Fail unless `found` is one of the two states."""
    from_before = trees.diff(settled(before), settled(found))
    from_after = trees.diff(settled(after), settled(found))
    assert not from_before or not from_after, (
        f"{what}: neither the state before nor the state after.\n"
        f"Different from the state before:\n{from_before}\n"
        f"Different from the state after:\n{from_after}"
    )
