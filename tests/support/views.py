"""Merged views under test, and the checks that end each of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.support import trees
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import FileSystem, Layers
from tests.support.trees import Tree


class View:
    """A merged view under test. `view / "a"` is the path of ``a`` in it."""

    def __init__(self, root: str, layers: Layers | None, file_system: FileSystem | None) -> None:
        self.root = root
        self.layers = layers
        self.file_system = file_system
        self._mount = ExitStack()

    def __truediv__(self, path: str) -> str:
        return f"{self.root}/{path}"

    @property
    def descriptors_follow_changes(self) -> bool:
        """See `FileSystem`."""
        return self.file_system is None or self.file_system.descriptors_follow_changes

    @property
    def copy_up_makes_another_inode(self) -> bool:
        """See `FileSystem`."""
        return self.file_system is not None and self.file_system.copy_up_makes_another_inode

    def mount(self) -> None:
        """Mount the view, if there is anything to mount: a plain directory is simply there."""
        if self.file_system is not None and self.layers is not None:
            self._mount.enter_context(self.file_system.mounted(self.layers, self.root))

    def unmount(self) -> None:
        """Undo `mount`; whoever served the view has ended when this returns."""
        self._mount.close()

    def remount(self) -> None:
        """Unmount, and mount the same layers again."""
        self.unmount()
        self.mount()


class Merge:
    """Makes merged views of one kind of file system."""

    def __init__(self, file_system: FileSystem | None, lowers: str, uppers: str) -> None:
        self.file_system = file_system
        self._lowers = lowers
        self._uppers = uppers
        self._views = ExitStack()

    def __call__(self, *lowers: Tree, upper: Tree | None = None) -> View:
        """Return a mounted view of `lowers`, topmost first, under `upper`."""
        return self._views.enter_context(self._checked(lowers or ({},), upper or {}))

    def close(self) -> None:
        """Unmount all views and check what each has left on disk."""
        self._views.close()

    @contextmanager
    def _checked(self, lowers: tuple[Tree, ...], upper: Tree) -> Iterator[View]:
        root = tempfile.mkdtemp(dir=self._uppers)
        os.chmod(root, 0o755)
        if self.file_system is None:
            trees.build_flat(trees.merge(upper, *lowers), root)
            yield View(root, None, None)
            return
        layers = make_layers(lowers, upper, self._lowers, self._uppers)
        before = [trees.snapshot(lower) for lower in layers.lowers]
        view = View(root, layers, self.file_system)
        view.mount()
        try:
            yield view
            shown = trees.snapshot(root)
        finally:
            view.unmount()
        for lower, was in zip(layers.lowers, before, strict=True):
            trees.assert_same(was, trees.snapshot(lower), "a lower layer was changed")
        assert_kernel_shows(shown, layers, root)


def make_layers(
    lowers: tuple[Tree, ...], upper: Tree, lower_parent: str, upper_parent: str
) -> Layers:
    """Build each tree in a directory of its own, and an empty workdir next to the upper."""
    directories = []
    for tree in lowers:
        directories.append(tempfile.mkdtemp(dir=lower_parent, prefix="lower-"))
        os.chmod(directories[-1], 0o755)
        trees.build(tree, directories[-1])
    parent = tempfile.mkdtemp(dir=upper_parent, prefix="upper-")
    for name in ("fs", "work"):
        os.mkdir(f"{parent}/{name}", 0o755)
    trees.build(upper, f"{parent}/fs")
    return Layers(directories, f"{parent}/fs", f"{parent}/work")


def assert_kernel_shows(expected: trees.Snapshot, layers: Layers, mount_point: str) -> None:
    """Fail unless the kernel's overlayfs shows `expected` in `layers`."""
    with KernelOverlay().mounted(layers, mount_point):
        shown = trees.snapshot(mount_point)
    trees.assert_same(expected, shown, "the kernel's overlayfs shows another tree in these layers")
