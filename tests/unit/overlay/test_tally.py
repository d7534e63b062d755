"""The count that is kept while a view changes, against the full comparison."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.overlay import syscalls
from sessiond.overlay.by_directory import ByDirectory, DirectorySums
from sessiond.overlay.diff import ChangeKind, changes
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.tally import Sums, Tally, sums_of
from tests.support import core_views, trees
from tests.support.fuzzing import fuzz
from tests.support.trees import Link, Symlink, Tree
from tests.unit.overlay.conftest import Bench, new_directory, new_file

pytestmark = pytest.mark.root

IMAGE: Tree = {
    "a": b"of the image",
    "b": {"a": b"1", "b": {"a": b"deep", "c": {"a": b"deeper"}}, "c": Symlink("a")},
    "c": {"a": Link("b/a"), "b": b"22", "c": {}},
}
PATHS = tuple(
    "/".join(path)
    for path in (*"abc", *((x, y) for x in "abc" for y in "abc"), "bba", "bbc", "bbca", "cca")
)


DEPTH = 2
"""Of the directories for which sums are compared; there are deeper ones."""


class Step(NamedTuple):
    """One thing that is done; `path` and `other` are what it is done to."""

    action: str
    path: str = "a"
    other: str = "a"


@dataclass
class Session:
    """A view, and its count."""

    bench: Bench
    overlay: Overlay
    tally: Tally
    layers: tuple[str, ...] = ("image",)
    uppers: int = 1
    held: list[int] = field(default_factory=list)

    def do(self, step: Step) -> None:
        """Do it, if it can be done."""
        with suppress(OSError):
            getattr(self, step.action)(*step[1:])

    def _find(self, path: str) -> Node:
        """Return a node, which is held from then on."""
        node = core_views.find(self.overlay, path)
        self.overlay.view.refer(node)
        self.held.append(node.number)
        return node

    def _place(self, path: str) -> tuple[Node, bytes]:
        directory, _, name = path.rpartition("/")
        return self._find(directory), os.fsencode(name)

    def make(self, path: str, _: str) -> None:
        self.overlay.create(*self._place(path), new_directory())

    def create(self, path: str, other: str) -> None:
        node, _ = self.overlay.create_file(*self._place(path), new_file())
        self.overlay.write(node, other.encode(), 0)
        self.overlay.utime(node, 1, 1)
        self.overlay.release_file(node)

    def write(self, path: str, other: str) -> None:
        node = self._find(path)
        self.overlay.open_file(node, write=True)
        self.overlay.write(node, other.encode(), 0)
        self.overlay.release_file(node)

    def same(self, path: str, _: str) -> None:
        """Write what is there, which is no change."""
        node = self._find(path)
        before = self.overlay.view.stat(node)
        contents = core_views.contents(self.overlay, node)
        self.overlay.open_file(node, write=True, truncate=True)
        self.overlay.write(node, contents, 0)
        self.overlay.release_file(node)
        self.overlay.utime(node, 1, before.st_mtime_ns)

    def truncate(self, path: str, other: str) -> None:
        self.overlay.resize(self._find(path), len(other) * 100)

    def chmod(self, path: str, other: str) -> None:
        self.overlay.chmod(self._find(path), 0o700 if "a" in other else 0o644)

    def mark(self, path: str, other: str) -> None:
        self.overlay.setxattr(self._find(path), b"user.x", other.encode())

    def unmark(self, path: str, _: str) -> None:
        self.overlay.removexattr(self._find(path), b"user.x")

    def remove(self, path: str, _: str) -> None:
        node = self._find(path)
        (self.overlay.rmdir if node.is_directory else self.overlay.unlink)(*self._place(path))

    def clear(self, path: str, _: str) -> None:
        """Remove a directory with all that is in it."""
        node = self._find(path)
        for name in self.overlay.names(node) if node.is_directory else ():
            self.clear(f"{path}/{os.fsdecode(name)}", "")
        self.remove(path, "")

    def rename(self, path: str, other: str) -> None:
        self.overlay.rename(self._place(path), self._place(other))

    def exchange(self, path: str, other: str) -> None:
        self.overlay.rename(self._place(path), self._place(other), syscalls.RENAME_EXCHANGE)

    def link(self, path: str, other: str) -> None:
        self.overlay.link(self._find(path), *self._place(other))

    def forget(self, _: str, __: str) -> None:
        """As the kernel does with names that it has not been asked for of late."""
        while self.held:
            self.overlay.view.forget(self.held.pop(), 1)

    def snapshot(self, _: str, __: str) -> None:
        self._swap((f"upper{self.uppers}", *self.layers))

    def reset(self, _: str, __: str) -> None:
        self.forget("", "")
        self._swap(("image",))

    def _swap(self, layers: tuple[str, ...]) -> None:
        self.uppers += 1
        Exchange(self.overlay).swap(self.bench.stack(*layers, upper=f"upper{self.uppers}"))
        self.layers = layers

    def count(self, _: str = "", __: str = "") -> None:
        """Have the tally, and the comparison, tell how much differs: they agree."""
        stack, base = self.overlay.view.stack.copy(), self.overlay.view.stack.bottom()
        touched = self.overlay.view.touched.take()
        names = self.tally.names_of(self.overlay.view.touched.take_identities())
        self.tally.update(stack, base, names | touched, most_bytes=None)
        expected = list(changes(stack, base))
        counted = self.tally.sums(ByDirectory(1000, DEPTH))
        compared = sums_of(expected, ByDirectory(1000, DEPTH))
        assert without_kinds(counted) == without_kinds(compared), expected
        for sums in (counted, compared):
            assert below_root(sums) == (sums.kinds, sums.bytes), expected
        stack.close()
        base.close()


def without_kinds(sums: Sums) -> object:
    """Of two new names of a file with several, of which one is gone, it is open which was that."""
    largest = [(one.path, one.size) for one in sums.largest]
    return sums.kinds, sums.bytes, largest, {one.path: certain(one) for one in sums.directories}


def certain(below: DirectorySums) -> object:
    """What cannot be told in two ways: that a file was renamed is counted in one of these names."""
    kinds = dict(zip(ChangeKind, below.kinds, strict=True))
    there = kinds.pop(ChangeKind.ADDED) + kinds.pop(ChangeKind.RENAMED)
    del kinds[ChangeKind.DELETED]
    return there, kinds, below.bytes


def below_root(sums: Sums) -> object:
    """What is told to be below the root, which is all."""
    root = sums.directories[0] if sums.directories else DirectorySums(b"", (0,) * 6, 0)
    assert root.path == b""
    return root.kinds, root.bytes


ACTIONS = (
    *("make", "create", "create", "write", "same", "truncate", "chmod", "mark", "unmark"),
    *("remove", "clear", "rename", "rename", "rename", "exchange", "link", "link"),
    *("forget", "snapshot", "reset", "count", "count", "count"),
)
steps = st.builds(Step, st.sampled_from(ACTIONS), st.sampled_from(PATHS), st.sampled_from(PATHS))


def check(sequence: Sequence[Step]) -> None:
    directory = Path(tempfile.mkdtemp())
    bench = Bench(directory)
    try:
        trees.build(IMAGE, str(bench.layer("image")))
        session = Session(bench, bench.overlay("image", upper="upper1"), Tally())
        for step in sequence:
            if step.action == "count":
                session.count()
            else:
                session.do(step)
        session.count()
    finally:
        bench.close()
        shutil.rmtree(directory)


@fuzz(60)
@given(st.lists(steps, min_size=10, max_size=40))
def test_what_is_counted_on_the_way_is_what_a_comparison_finds(sequence: list[Step]) -> None:
    check(sequence)
