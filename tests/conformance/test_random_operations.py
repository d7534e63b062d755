"""The same random operations on `sessiond-overlay`, the kernel's overlayfs and a plain directory.

After each operation its outcome (value or errno) and the whole tree have to be the same on all
three; in the end also after a remount, and with the upper that `sessiond-overlay` wrote under the
kernel's overlayfs; the checker finds nothing in the uppers. SESSIOND_EXAMPLES sets how many
sequences are tried, other ones each time then.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tests.support import libc, trees
from tests.support.checker import assert_clean
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import FileSystem, Layers
from tests.support.sessiond_overlay import SessiondOverlay
from tests.support.trees import Device, Dir, Fifo, File, Link, Symlink, Tree, Whiteout
from tests.support.views import assert_kernel_shows

EXAMPLES = int(os.environ.get("SESSIOND_EXAMPLES", "25"))
SHRINKING_SECONDS = 400
"""Hypothesis takes up to five minutes to find the shortest sequence that fails."""

UPPER: Tree = {
    "b": b"of upper",
    "d": Dir({"b": Whiteout(), "e": {"c": b"of upper"}}, mode=0o751, uid=2),
    "f": Dir({"a": b"hides"}, opaque=True),
    "g": Whiteout(),
}
MIDDLE: Tree = {"d": {"a": b"of middle", "e": {"b": b"of middle"}}, "c": Symlink("a")}
LOWEST: Tree = {
    "a": File(b"of lowest", mode=0o640, uid=1, xattrs={"user.x": b"1"}),
    "d": {"b": b"hidden", "c": Link("a"), "e": {"a": b"deep", "d": {"a": b"deeper"}}},
    "e": {"a": Fifo(), "b": Device(stat.S_IFCHR, 1, 3), "c": {}, "d": {"a": b""}},
    "f": {"b": b"hidden"},
    "g": {"a": b"hidden"},
}

# Few, so that operations meet: all that is in the layers, and room for what moves.
PATHS = (
    *("a", "b", "c", "d", "e", "f", "g"),
    *("d/a", "d/b", "d/c", "d/e", "d/e/a", "e/a", "e/c", "e/d", "e/d/a", "f/b", "g/a"),
)

Outcome: TypeAlias = "int | bytes | tuple[object, ...] | None"


@dataclass
class Contestant:
    """One of the three trees, with the files that the operations hold open in it."""

    name: str
    root: str
    held: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close what is held."""
        while self.held:
            os.close(self.held.pop())


def is_regular(file: int) -> bool:
    """Whether a descriptor is of a file with contents.

    What goes through a FIFO or a device changes its times on a plain directory, but on no overlay.
    """
    return stat.S_ISREG(os.fstat(file).st_mode)


@dataclass(frozen=True)
class Operation:
    """A system call on one path. `run` returns what is to be compared, or raises `OSError`."""

    path: str

    def run(self, tree: Contestant) -> Outcome:
        """Do it in `tree`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Create(Operation):
    """open(2) with O_CREAT, with or without O_EXCL and O_TRUNC, and a write."""

    flags: int
    mode: int
    content: bytes

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        flags = os.O_CREAT | os.O_RDWR | os.O_NONBLOCK | self.flags
        file = os.open(f"{tree.root}/{self.path}", flags, self.mode)
        try:
            return os.write(file, self.content) if is_regular(file) else None
        finally:
            os.close(file)


@dataclass(frozen=True)
class Write(Operation):
    """Write into an existing file."""

    flags: int
    offset: int
    content: bytes

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        # Without O_NONBLOCK a FIFO would wait for its other end.
        flags = os.O_WRONLY | os.O_NONBLOCK | self.flags
        file = os.open(f"{tree.root}/{self.path}", flags)
        try:
            return os.pwrite(file, self.content, self.offset) if is_regular(file) else None
        finally:
            os.close(file)


@dataclass(frozen=True)
class Truncate(Operation):
    """truncate(2)."""

    size: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.truncate(f"{tree.root}/{self.path}", self.size)
        return None


@dataclass(frozen=True)
class MakeDirectory(Operation):
    """mkdir(2)."""

    mode: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.mkdir(f"{tree.root}/{self.path}", self.mode)
        return None


@dataclass(frozen=True)
class RemoveDirectory(Operation):
    """rmdir(2)."""

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.rmdir(f"{tree.root}/{self.path}")
        return None


@dataclass(frozen=True)
class RemoveTree(Operation):
    """What rm -r does."""

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        path = f"{tree.root}/{self.path}"
        if not stat.S_ISDIR(os.lstat(path).st_mode):  # rmtree would open it, and wait at a FIFO
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        shutil.rmtree(path)
        return None


@dataclass(frozen=True)
class Unlink(Operation):
    """unlink(2)."""

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.unlink(f"{tree.root}/{self.path}")
        return None


@dataclass(frozen=True)
class Rename(Operation):
    """renameat2(2)."""

    target: str
    flags: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        libc.renameat2(f"{tree.root}/{self.path}", f"{tree.root}/{self.target}", self.flags)
        return None


@dataclass(frozen=True)
class MakeLink(Operation):
    """link(2), which does not follow a symbolic link."""

    target: str

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        source, target = f"{tree.root}/{self.path}", f"{tree.root}/{self.target}"
        os.link(source, target, follow_symlinks=False)
        return None


@dataclass(frozen=True)
class MakeSymlink(Operation):
    """symlink(2)."""

    target: str

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.symlink(self.target, f"{tree.root}/{self.path}")
        return None


@dataclass(frozen=True)
class MakeNode(Operation):
    """mknod(2)."""

    kind: int
    mode: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.mknod(f"{tree.root}/{self.path}", self.kind | self.mode, os.makedev(1, 3))
        return None


@dataclass(frozen=True)
class ChangeMode(Operation):
    """chmod(2)."""

    mode: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.chmod(f"{tree.root}/{self.path}", self.mode)
        return None


@dataclass(frozen=True)
class ChangeOwner(Operation):
    """lchown(2)."""

    uid: int
    gid: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.lchown(f"{tree.root}/{self.path}", self.uid, self.gid)
        return None


@dataclass(frozen=True)
class ChangeTimes(Operation):
    """utimensat(2), on the link itself."""

    mtime_ns: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        times = (self.mtime_ns, self.mtime_ns)
        os.utime(f"{tree.root}/{self.path}", ns=times, follow_symlinks=False)
        return None


@dataclass(frozen=True)
class SetAttribute(Operation):
    """lsetxattr(2)."""

    name: str
    value: bytes
    flags: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        path = f"{tree.root}/{self.path}"
        os.setxattr(path, self.name, self.value, self.flags, follow_symlinks=False)
        return None


@dataclass(frozen=True)
class RemoveAttribute(Operation):
    """lremovexattr(2)."""

    name: str

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        os.removexattr(f"{tree.root}/{self.path}", self.name, follow_symlinks=False)
        return None


@dataclass(frozen=True)
class Hold(Operation):
    """Open a file and keep it open.

    For writing, always: one that was opened for reading only does not follow a copy-up on the
    kernel's overlayfs, as it documents.
    """

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW
        tree.held.append(os.open(f"{tree.root}/{self.path}", flags))
        return None


@dataclass(frozen=True)
class UseHeld(Operation):
    """Read, write, cut and look at a file that is held, whether or not it still has a name."""

    index: int
    content: bytes
    size: int

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        if not tree.held:
            return None
        file = tree.held[self.index % len(tree.held)]
        if not is_regular(file):
            return None
        written = os.pwrite(file, self.content, 3)
        os.ftruncate(file, self.size)
        os.fchmod(file, 0o600 | self.size)
        status = os.fstat(file)
        return (written, os.pread(file, 100, 0), status.st_mode, status.st_nlink, status.st_size)


@dataclass(frozen=True)
class List(Operation):
    """Read a directory."""

    def run(self, tree: Contestant) -> Outcome:
        """See `Operation`."""
        return tuple(sorted(os.listdir(f"{tree.root}/{self.path}")))


paths = st.sampled_from(PATHS)
modes = st.sampled_from([0o600, 0o644, 0o755, 0o1777, 0o2755, 0o4711])
contents = st.binary(max_size=12)
sizes = st.sampled_from([0, 1, 8, 9, 10, 20])
attributes = st.sampled_from(["user.x", "user.y", "trusted.z", "trusted.overlay.opaque"])
rename_flags = st.sampled_from([0, 0, 0, libc.RENAME_NOREPLACE, libc.RENAME_EXCHANGE])
open_flags = st.sampled_from([0, os.O_EXCL, os.O_TRUNC, os.O_APPEND])
kinds = st.sampled_from([stat.S_IFCHR, stat.S_IFIFO, stat.S_IFREG])
ids = st.integers(-1, 3)

rename = st.builds(Rename, paths, paths, rename_flags)
make_directory = st.builds(MakeDirectory, paths, modes)
remove_tree = st.builds(RemoveTree, paths)
unlink = st.builds(Unlink, paths)
make_link = st.builds(MakeLink, paths, paths)
use_held = st.builds(UseHeld, paths, st.integers(0, 5), contents, sizes)

# What changes the shape of the tree comes more often: that is where layers matter.
operations = st.one_of(
    *(rename, rename, rename, rename, make_directory, make_directory, remove_tree, remove_tree),
    *(unlink, unlink, make_link, make_link, use_held, use_held),
    st.builds(RemoveDirectory, paths),
    st.builds(Create, paths, open_flags, modes, contents),
    st.builds(Write, paths, st.sampled_from([0, os.O_TRUNC, os.O_APPEND]), sizes, contents),
    st.builds(Truncate, paths, sizes),
    st.builds(MakeSymlink, paths, st.sampled_from(["a", "d/e", "../a", "nowhere"])),
    st.builds(MakeNode, paths, kinds, modes),
    st.builds(ChangeMode, paths, modes),
    st.builds(ChangeOwner, paths, ids, ids),
    st.builds(ChangeTimes, paths, st.integers(0, 10**18)),
    st.builds(SetAttribute, paths, attributes, contents, st.sampled_from([0, 0, 1, 2])),
    st.builds(RemoveAttribute, paths, attributes),
    st.builds(Hold, paths),
    st.builds(List, paths),
)

# Hypothesis draws lists of half a dozen on average: lists of lists are longer, and shrink as well.
scripts = st.lists(st.lists(operations, min_size=1, max_size=12), min_size=1, max_size=12).map(
    lambda parts: [operation for part in parts for operation in part]
)


def outcome(operation: Operation, tree: Contestant) -> Outcome | str:
    """Return the value of an operation, or its error by name."""
    try:
        return operation.run(tree)
    except OSError as error:
        return os.strerror(error.errno or 0)


class Contest:
    """Three trees that begin the same, and have to stay the same."""

    def __init__(self, overlays: Sequence[Contestant], plain: Contestant, begun_ns: int) -> None:
        self.overlays = overlays
        self.plain = plain
        self._begun_ns = begun_ns

    def play(self, operation: Operation) -> None:
        """Do `operation` everywhere and compare."""
        expected = outcome(operation, self.plain)
        for tree in self.overlays:
            found = outcome(operation, tree)
            assert found == expected, (
                f"{tree.name}: {operation} gave {found!r}, expected {expected!r}"
            )
        self.compare(f"after {operation}")

    def compare(self, when: str) -> None:
        """Compare all trees with the plain one."""
        expected = self.snapshot(self.plain)
        for tree in self.overlays:
            trees.assert_same(expected, self.snapshot(tree), f"{tree.name} {when}")

    def snapshot(self, tree: Contestant) -> trees.Snapshot:
        """Return the tree; of changes made in the contest only that they were made, not when."""
        return trees.snapshot(tree.root, recent_ns=self._begun_ns)


@contextmanager
def upper_of_its_own(lowers: Sequence[str], top: str) -> Iterator[Layers]:
    """Make an upper and a workdir that last as long as the context."""
    with tempfile.TemporaryDirectory(dir=top) as parent:
        os.mkdir(f"{parent}/fs", 0o755)
        os.mkdir(f"{parent}/work", 0o755)
        trees.build(UPPER, f"{parent}/fs")
        yield Layers(lowers, f"{parent}/fs", f"{parent}/work")


def play(script: Sequence[Operation], lowers: Sequence[str], top: str) -> None:
    """Run one sequence from the mounts to the last remount."""
    systems: tuple[FileSystem, ...] = (KernelOverlay(), SessiondOverlay())
    with ExitStack() as stack:
        roots = [stack.enter_context(tempfile.TemporaryDirectory(dir=top)) for _ in range(3)]
        os.chmod(roots[2], 0o755)
        trees.build_flat(trees.merge(UPPER, MIDDLE, LOWEST), roots[2])
        uppers = [stack.enter_context(upper_of_its_own(lowers, top)) for _ in systems]
        overlays = [Contestant(fs.name, root) for fs, root in zip(systems, roots, strict=False)]
        # The clock of file systems ticks more coarsely than the one asked here.
        contest = Contest(overlays, Contestant("plain", roots[2]), time.time_ns() - 10**9)
        with ExitStack() as mounts:
            for system, layers, tree in zip(systems, uppers, overlays, strict=True):
                mounts.enter_context(system.mounted(layers, tree.root))
            for tree in (*overlays, contest.plain):
                mounts.callback(tree.close)
            contest.compare("at the beginning")
            for operation in script:
                contest.play(operation)
            exact = [trees.snapshot(tree.root) for tree in overlays]
        for system, layers, tree, shown in zip(systems, uppers, overlays, exact, strict=True):
            assert layers.upper is not None
            assert layers.work is not None
            assert_clean(layers.upper, layers.work, layers.lowers)
            with system.mounted(layers, tree.root):
                trees.assert_same(shown, trees.snapshot(tree.root), f"{tree.name}, remounted")
            assert_kernel_shows(shown, layers, tree.root)


@pytest.mark.timeout(5 * EXAMPLES + SHRINKING_SECONDS)
@settings(
    max_examples=EXAMPLES,
    derandomize="SESSIOND_EXAMPLES" not in os.environ,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=scripts)
@example(script=[RemoveTree("d"), MakeDirectory("d", 0o755), MakeDirectory("d/e", 0o755)])
@example(script=[MakeDirectory("g", 0o700), Rename("d", "g", 0), MakeDirectory("d", 0o700)])
@example(script=[RemoveTree("e"), Rename("d/e", "e", 0), Rename("e", "d/e", 0), Unlink("d/e/a")])
@example(script=[MakeLink("a", "b"), Hold("d/c"), Unlink("a"), UseHeld("", 0, b"x", 8)])
@example(script=[ChangeMode("a", 0o2755), ChangeOwner("a", -1, -1)])
@example(script=[Rename("d", "e", libc.RENAME_EXCHANGE), RemoveTree("d"), Rename("e", "d", 0)])
def test_random_operations(script: list[Operation], scratch: str) -> None:
    with umask_of_zero(), ExitStack() as stack:
        lowers = []
        for tree in (MIDDLE, LOWEST):
            lowers.append(stack.enter_context(tempfile.TemporaryDirectory(dir=f"{scratch}/disk")))
            os.chmod(lowers[-1], 0o755)
            trees.build(tree, lowers[-1])
        before = [trees.snapshot(lower) for lower in lowers]
        play(script, lowers, scratch)
        for lower, was in zip(lowers, before, strict=True):
            trees.assert_same(was, trees.snapshot(lower), "a lower layer was changed")


@contextmanager
def umask_of_zero() -> Iterator[None]:
    """Let modes be what the operations say."""
    old = os.umask(0)
    try:
        yield
    finally:
        os.umask(old)
