"""Two layers merged into one: after each change that is made, the kernel shows the same tree."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sessiond.overlay.flatten import Merge, MergedLayer
from sessiond.overlay.layer import Layer
from sessiond.overlay.whiteout import is_whiteout_device
from tests.support import trees
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.soak import factor
from tests.support.trees import Dir, Link, Snapshot, Symlink, Tree, Whiteout

pytestmark = pytest.mark.root

IMAGE: Tree = {
    "etc": Dir(entries={"motd": b"hello\n", "old": {"a": b"a", "b": {"c": b"c"}}}, uid=3),
    "usr": {"lib": {"deep": {"file": b"from the image"}, "x": b"x"}, "share": {"doc": b"d"}},
    "gone": {"x": b"x"},
    "file": b"file",
    "link": Symlink(target="file"),
    "one": b"one inode",
    "two": Link("one"),
}

Life = Callable[[Path], None]
"""What programs do in the merged view."""


class Bench:
    """An image and two layers, which the kernel's overlayfs writes."""

    def __init__(self, directory: Path, image: Tree = IMAGE) -> None:
        self._directory = directory
        for name in ("image", "view"):
            (directory / name).mkdir()
        trees.build(image, str(directory / "image"))
        self._merge: Merge | None = None

    def write(self, name: str, life: Life, *below: str) -> None:
        """Make the layer `name` over `below`."""
        for part in ("fs", "work"):
            (self._directory / name / part).mkdir(parents=True)
        layer = str(self._directory / name)
        layers = Layers(self._lowers(*below), f"{layer}/fs", f"{layer}/work")
        view = self._directory / "view"
        with KernelOverlay().mounted(layers, str(view)):
            life(view)
        # Where sessiond has its index; the kernel has it in the same place.
        (self._directory / name / "work/index").mkdir(exist_ok=True)

    def build(self, name: str, tree: Tree) -> None:
        """Make the layer `name` of what is to be in it."""
        for part in ("fs", "work/index"):
            (self._directory / name / part).mkdir(parents=True)
        trees.build(tree, str(self._directory / name / "fs"))

    def _lowers(self, *names: str) -> list[str]:
        layers = [str(self._directory / name / "fs") for name in names]
        return [*layers, str(self._directory / "image")]

    def shown(self, *names: str) -> Snapshot:
        view = str(self._directory / "view")
        with KernelOverlay().mounted(Layers(self._lowers(*names)), view):
            return trees.snapshot(view)

    @contextmanager
    def merge(self, top: str = "top", bottom: str = "bottom") -> Iterator[Merge]:
        image = Layer.open(os.fsencode(self._directory / "image"), writable=False)
        merge = Merge(self._layer(top), self._layer(bottom), (image,))
        try:
            yield merge
        finally:
            merge.close()

    def _layer(self, name: str) -> MergedLayer:
        parts = [self._directory / name / part for part in ("fs", "work")]
        return MergedLayer(*(Layer.open(os.fsencode(part), writable=True) for part in parts))

    def files(self, name: str) -> list[Path]:
        return list((self._directory / name / "fs").rglob("*"))

    def assert_merges(self) -> int:
        """Merge both layers; return how many steps that took."""
        expected, idle = self.shown("top", "bottom"), self.idle_whiteouts("bottom")
        renamed = self.has_renamed("bottom") or self.has_renamed("top")
        steps = 0
        with self.merge() as merge:
            assert merge.obstacle() == ""
            for _ in merge.steps():
                steps += 1
                trees.assert_same(expected, self.shown("top", "bottom"), f"after step {steps}")
        assert self.files("top") == []
        trees.assert_same(expected, self.shown("bottom"))
        assert renamed or self.idle_whiteouts("bottom") <= idle
        return steps

    def has_renamed(self, name: str) -> bool:
        return any("trusted.overlay.redirect" in _xattrs(path) for path in self.files(name))

    def idle_whiteouts(self, name: str) -> set[Path]:
        """Return the whiteouts of a layer that hide nothing of the image, by the same path."""
        image, layer = self._directory / "image", self._directory / name / "fs"
        return {
            path
            for path in self.files(name)
            if is_whiteout_device(path.lstat())
            and not os.path.lexists(image / path.relative_to(layer))
        }


def _xattrs(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def nothing(view: Path) -> None:
    pass


def below(view: Path) -> None:
    (view / "etc/motd").write_text("changed")
    (view / "etc/made").write_text("made")
    (view / "etc/made2").write_text("made")
    shutil.rmtree(view / "gone")
    (view / "usr/lib/x").unlink()
    (view / "new/dir/deep").mkdir(parents=True)
    (view / "new/dir/deep/file").write_text("1")
    (view / "new/dir/other").write_text("2")
    (view / "empty").mkdir()
    os.setxattr(view / "new", "user.mark", b"below")


def removing(view: Path) -> None:
    (view / "etc/motd").unlink()
    (view / "etc/made").unlink()
    shutil.rmtree(view / "new/dir")
    shutil.rmtree(view / "usr")
    (view / "file").unlink()


def replacing(view: Path) -> None:
    (view / "etc/motd").unlink()
    (view / "etc/motd").mkdir()
    (view / "etc/motd/inner").write_text("x")
    (view / "usr/lib/x").mkdir()
    (view / "usr/lib/x/y").write_text("y")
    (view / "gone").mkdir()
    (view / "gone/other").write_text("z")
    shutil.rmtree(view / "new/dir")
    (view / "new/dir").write_text("a file now")
    shutil.rmtree(view / "etc/old")
    (view / "etc/old").symlink_to("motd")
    (view / "empty").rmdir()


def changing(view: Path) -> None:
    (view / "etc/motd").write_text("again")
    (view / "etc/made").write_text("again")
    os.chmod(view / "new", 0o711)
    os.chown(view / "etc", 5, 6)
    os.removexattr(view / "new", "user.mark")
    os.setxattr(view / "new", "user.other", b"above")
    os.utime(view / "usr/lib", ns=(7, 8_000_000_009))
    (view / "usr/lib/deep/added").write_text("more")
    (view / "new/dir/deep/file").rename(view / "etc/moved")


def renaming(view: Path) -> None:
    """Directories of the image, which the lower one has not touched, or only what is near."""
    (view / "etc/old").rename(view / "usr/lib/old")
    (view / "usr/share").rename(view / "usr/shared")
    (view / "fresh").mkdir()
    (view / "usr/lib/deep").rename(view / "fresh/deeper")
    (view / "fresh/deeper/more").write_text("more")


LIVES = (nothing, removing, replacing, changing, renaming)


@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_the_view_is_the_same_after_each_step(bench: Bench, life: Life) -> None:
    bench.write("bottom", below)
    bench.write("top", life, "bottom")
    steps = bench.assert_merges()
    assert steps > 3 or life is nothing


@pytest.mark.parametrize("life", [removing, replacing, changing], ids=lambda life: life.__name__)
def test_nothing_below_but_the_image(bench: Bench, life: Life) -> None:
    """The lower one is empty: all goes down, directories whole."""

    def alone(view: Path) -> None:
        below(view)
        life(view)

    bench.write("bottom", nothing)
    bench.write("top", alone, "bottom")
    bench.assert_merges()


@pytest.mark.parametrize(
    ("bottom", "top"),
    [
        ({"usr": Whiteout()}, {"usr": {"new": b"1"}}),
        ({"usr": b"a file"}, {"usr": {"new": b"1"}}),
        ({"usr": Dir(opaque=True, entries={"a": b"a"})}, {"usr": {"new": b"1"}}),
        ({"usr": {"lib": Whiteout()}}, {"usr": Dir(opaque=True, entries={"lib": {"x": b"1"}})}),
        ({"usr": {"lib": {"n": b"n"}}}, {"usr": {"lib": {"n": Whiteout(), "x": Whiteout()}}}),
        ({"usr": Symlink(target="etc")}, {"usr": Whiteout()}),
        ({"nowhere": {"a": b"a"}}, {"nowhere": Whiteout()}),
    ],
)
def test_layers_as_sessiond_and_others_write_them(bench: Bench, bottom: Tree, top: Tree) -> None:
    """The kernel makes every new directory opaque, sessiond only those that hide something."""
    bench.build("bottom", bottom)
    bench.build("top", top)
    bench.assert_merges()


def test_a_hard_link_of_the_image_stays_one_file(tmp_path: Path) -> None:
    """On a file system of its own, as images are."""
    bench = Bench(tmp_path)
    bench.write("bottom", nothing)
    bench.write("top", lambda view: (view / "one").write_text("changed") and None, "bottom")
    with bench.merge() as merge:
        # Here, image and layers are on one disk, so the link might be one of the lower layer's.
        assert "hard link" in merge.obstacle()


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (lambda view: (view / "d").mkdir(), lambda view: (view / "d").rename(view / "e"), ""),
        (
            lambda view: (view / "usr/lib/n").write_text("n"),
            lambda view: (view / "usr/lib").rename(view / "lib"),
            "both layers have",
        ),
        (
            lambda view: (view / "usr").rename(view / "rsu"),
            lambda view: (view / "rsu/lib").rename(view / "rsu/bil"),
            "",
        ),
        (
            lambda view: (view / "one").write_text("1"),
            lambda view: (view / "two").write_text("2"),
            "hard link",
        ),
    ],
)
def test_what_cannot_be_merged_is_left_alone(
    bench: Bench, first: Life, second: Life, reason: str
) -> None:
    bench.write("bottom", first)
    bench.write("top", second, "bottom")
    before = bench.shown("top", "bottom")
    with bench.merge() as merge:
        obstacle = merge.obstacle()
    trees.assert_same(before, bench.shown("top", "bottom"))
    if obstacle:
        assert reason in obstacle
    else:
        assert not reason
        bench.assert_merges()


def test_who_dies_leaves_what_the_next_one_goes_on_with(bench: Bench) -> None:
    def second(view: Path) -> None:
        replacing(view)
        (view / "usr/share").rename(view / "usr/shared")

    bench.write("bottom", below)
    bench.write("top", second, "bottom")
    expected = bench.shown("top", "bottom")
    done = False
    while not done:
        with bench.merge() as merge:
            assert merge.obstacle() == ""
            steps = merge.steps()
            done = next(steps, "end") == "end" or next(steps, "end") == "end"
        trees.assert_same(expected, bench.shown("top", "bottom"))
    trees.assert_same(expected, bench.shown("bottom"))


class RandomLife:
    """Operations of all kinds, on whatever there is."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, view: Path) -> None:
        for _ in range(self._random.randrange(1, 14)):
            try:
                self._do(view)
            except OSError:
                continue

    def _do(self, view: Path) -> None:
        there = [view, *view.rglob("*")]
        directories = [path for path in there if path.is_dir() and not path.is_symlink()]
        one = self._random.choice(there)
        name = self._random.choice(directories) / self._random.choice("abcdefgh")
        match self._random.randrange(8):
            case 0:
                name.write_text(str(self._random.random()))
            case 1:
                name.mkdir()
            case 2:
                one.unlink()
            case 3:
                shutil.rmtree(one) if one != view else None
            case 4 | 5:
                one.rename(name)
            case 6:
                os.chmod(one, self._random.choice([0o700, 0o751, 0o644]))
            case 7:
                name.symlink_to("somewhere")


@pytest.mark.parametrize(
    "seeds",
    [
        range(12),
        *(
            pytest.param(range(first, first + int(50 * factor())), marks=pytest.mark.soak)
            for first in range(1_000_000, 9_000_000, 1_000_000)
        ),
    ],
    ids=lambda seeds: str(seeds.start),
)
def test_random_layers(tmp_path: Path, seeds: range) -> None:
    merged = 0
    for number in seeds:
        directory = tmp_path / str(number)
        directory.mkdir()
        bench = Bench(directory, {name: node for name, node in IMAGE.items() if name != "two"})
        bench.write("bottom", RandomLife(number))
        bench.write("top", RandomLife(-number - 1), "bottom")
        before = bench.shown("top", "bottom")
        with bench.merge() as merge:
            obstacle = merge.obstacle()
        trees.assert_same(before, bench.shown("top", "bottom"))
        if not obstacle:
            bench.assert_merges()
            merged += 1
    assert merged > len(seeds) // 2
