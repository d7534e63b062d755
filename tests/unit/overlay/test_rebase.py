"""A layer is rebased: written over one image by the kernel's overlayfs, it goes on over another."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sessiond.overlay.rebase import Conflicts, Outcome, Shadowed, Target, rebase, tidy
from tests.support import trees
from tests.support.checker import findings
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.trees import Tree

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root"),
]

SOAKED = [pytest.param(seed, marks=pytest.mark.soak) for seed in range(20, 400)]

SINCE_NS = trees.MTIME_NS
"""All of the old image is that old."""


def unchecked() -> None:
    """Nobody stops it."""


@dataclass
class Bench:
    """An old image, a new one, and layers."""

    directory: Path

    def build(self, name: str, tree: Tree) -> Path:
        path = self.directory / name
        path.mkdir()
        trees.build(tree, str(path))
        return path

    @contextmanager
    def writing(self, layer: str, *lowers: str) -> Iterator[Path]:
        """Write to a layer through the kernel's overlayfs."""
        upper, work = self.directory / layer, self.directory / f"{layer}-work"
        merged = self.directory / "merged"
        for path in (upper, work, merged):
            path.mkdir(exist_ok=True)
        paths = tuple(str(self.directory / lower) for lower in lowers)
        with KernelOverlay().mounted(Layers(paths, str(upper), str(work)), str(merged)):
            yield merged

    def target(self, layer: str, *lowers: str, base: str | None = "old") -> Target:
        paths = [os.fsencode(self.directory / lower) for lower in lowers]
        old = None if base is None else os.fsencode(self.directory / base)
        upper = os.fsencode(self.directory / layer)
        return Target(upper, upper + b"-work", paths, old, SINCE_NS)

    def rebase(
        self,
        conflicts: Conflicts = Conflicts.KEEP,
        *,
        base: str | None = "old",
        check: Callable[[], None] = unchecked,
    ) -> list[Shadowed]:
        """Rebase ``upper``; what is announced has to be what is done."""
        target = self.target("upper", "new", base=base)
        planned = list(rebase(target, conflicts, apply=False, check=unchecked))
        done = list(rebase(target, conflicts, apply=True, check=check))
        assert planned == done
        tidy(target, check=check)
        return done

    def assert_in_order(self, *lowers: str) -> None:
        names = lowers or ("new",)
        found = findings(
            self.directory / "upper",
            self.directory / "upper-work",
            [self.directory / lower for lower in names],
        )
        assert found == []
        for path in (self.directory / "upper").rglob("*"):
            own = {name: os.getxattr(path, name, follow_symlinks=False) for name in _own(path)}
            assert "trusted.overlay.nlink" not in own
            if not path.is_dir() or path.is_symlink():
                # Where it came from is unknown: nothing of the old image may be believed.
                assert own.get("trusted.overlay.origin", b"") == b""

    def shown(self, *lowers: str) -> dict[str, bytes | str | None]:
        """What the kernel shows: contents of files, targets of links, None for directories."""
        shown: dict[str, bytes | str | None] = {}
        with self.writing("upper", *(lowers or ("new",))) as merged:
            for path in sorted(merged.rglob("*")):
                name = str(path.relative_to(merged))
                if path.is_symlink():
                    shown[name] = os.readlink(path)
                else:
                    shown[name] = None if path.is_dir() else path.read_bytes()
        return shown


def _own(path: Path) -> list[str]:
    names = os.listxattr(path, follow_symlinks=False)
    return [name for name in names if name.startswith("trusted.overlay.")]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path)
    subprocess.run(["rm", "-rf", tmp_path], check=True)


CHANGED_TWICE = {
    Conflicts.KEEP: ({"etc": None, "etc/a": b"mine", "etc/b": b"image 2"}, Outcome.KEPT, b""),
    Conflicts.DROP: ({"etc": None, "etc/a": b"image 2", "etc/b": b"image 2"}, Outcome.DROPPED, b""),
    Conflicts.SAVE: (
        {
            "etc": None,
            "etc/a": b"image 2",
            "etc/a.sessiond-old": b"mine",
            "etc/b": b"image 2",
        },
        Outcome.SAVED,
        b"etc/a.sessiond-old",
    ),
}


@pytest.mark.parametrize("conflicts", Conflicts)
@pytest.mark.parametrize("base", ["old", None])
def test_a_file_that_both_have_changed(
    bench: Bench, conflicts: Conflicts, base: str | None
) -> None:
    bench.build("old", {"etc": {"a": b"image", "b": b"image"}})
    newer = trees.File(content=b"image 2", mtime_ns=SINCE_NS + 1)
    bench.build("new", {"etc": {"a": newer, "b": newer}})
    with bench.writing("upper", "old") as merged:
        (merged / "etc/a").write_bytes(b"mine")
    (found,) = bench.rebase(conflicts, base=base)
    shown, outcome, saved_as = CHANGED_TWICE[conflicts]
    assert (found.path, found.outcome, found.saved_as) == (b"etc/a", outcome, saved_as)
    bench.assert_in_order()
    assert bench.shown() == shown
    assert bench.rebase(conflicts) == ([] if outcome is not Outcome.KEPT else [found])


@pytest.mark.parametrize("conflicts", Conflicts)
@pytest.mark.parametrize("base", ["old", None])
def test_what_only_one_has_changed(bench: Bench, conflicts: Conflicts, base: str | None) -> None:
    newer = trees.File(content=b"image 2", mtime_ns=SINCE_NS + 1)
    bench.build("old", {"etc": {"a": b"image", "b": b"image", "c": b"image"}, "srv": {"d": b"x"}})
    bench.build("new", {"etc": {"a": b"image", "b": newer}, "srv": {"d": newer, "e": newer}})
    with bench.writing("upper", "old") as merged:
        (merged / "etc/a").write_bytes(b"mine")
        (merged / "srv/own").write_bytes(b"mine")
    assert bench.rebase(conflicts, base=base) == []
    bench.assert_in_order()
    assert bench.shown() == {
        "etc": None,
        "etc/a": b"mine",
        "etc/b": b"image 2",
        "srv": None,
        "srv/d": b"image 2",
        "srv/e": b"image 2",
        "srv/own": b"mine",
    }


def test_copies_that_were_never_changed_give_way(bench: Bench) -> None:
    bench.build("old", {"etc": trees.Dir(entries={"a": b"image", "b": b"image"}, mode=0o755)})
    bench.build("new", {"etc": trees.Dir(entries={"a": b"image 2"}, mode=0o750, uid=7)})
    with bench.writing("upper", "old") as merged:
        for name in ("a", "b"):
            # Opened for writing, which copies it up, and then given back its time.
            os.close(os.open(merged / "etc" / name, os.O_WRONLY))
            os.utime(merged / "etc" / name, ns=(SINCE_NS, SINCE_NS))
        (merged / "etc/own").write_bytes(b"mine")
    before = (bench.directory / "upper/etc").stat().st_mtime_ns
    assert bench.rebase() == []
    bench.assert_in_order()
    assert bench.shown() == {"etc": None, "etc/a": b"image 2", "etc/own": b"mine"}
    etc = (bench.directory / "upper/etc").stat()
    assert (etc.st_mode & 0o7777, etc.st_uid) == (0o750, 7)
    assert etc.st_mtime_ns == before


def test_a_file_that_was_only_touched_was_changed(bench: Bench) -> None:
    bench.build("old", {"a": b"image"})
    bench.build("new", {"a": b"image 2"})
    with bench.writing("upper", "old") as merged:
        os.utime(merged / "a")
    (found,) = bench.rebase()
    assert (found.path, found.outcome) == (b"a", Outcome.KEPT)
    assert bench.shown() == {"a": b"image"}


def test_metadata_of_a_directory_that_the_layer_has_changed_are_kept(bench: Bench) -> None:
    bench.build("old", {"etc": trees.Dir(mode=0o755, xattrs={"user.a": b"1", "user.b": b"1"})})
    bench.build("new", {"etc": trees.Dir(mode=0o700, uid=7, xattrs={"user.a": b"2"})})
    with bench.writing("upper", "old") as merged:
        (merged / "etc").chmod(0o711)
        os.setxattr(merged / "etc", "user.c", b"3")
    assert bench.rebase() == []
    etc = bench.directory / "upper/etc"
    assert (etc.stat().st_mode & 0o7777, etc.stat().st_uid) == (0o711, 7)
    own = {name: os.getxattr(etc, name) for name in os.listxattr(etc) if name.startswith("user.")}
    assert own == {"user.a": b"2", "user.c": b"3"}


def test_whiteouts(bench: Bench) -> None:
    image: Tree = {"a": b"image", "b": b"image", "c": b"image", "d": {"x": b"1", "y": b"1"}}
    bench.build("old", image)
    bench.build("new", {"a": b"image", "b": b"image 2", "d": {"x": b"1", "y": b"2"}})
    with bench.writing("upper", "old") as merged:
        for name in ("a", "b", "c"):
            (merged / name).unlink()
        subprocess.run(["rm", "-r", merged / "d"], check=True)
    kept = [(one.path, one.mode, one.outcome) for one in bench.rebase()]
    assert sorted(kept) == [(b"b", 0, Outcome.KEPT), (b"d", 0, Outcome.KEPT)]
    bench.assert_in_order()
    assert bench.shown() == {}
    dropped = [(one.path, one.outcome) for one in bench.rebase(Conflicts.DROP)]
    assert sorted(dropped) == [(b"b", Outcome.DROPPED), (b"d", Outcome.DROPPED)]
    bench.assert_in_order()
    assert bench.shown() == {"b": b"image 2", "d": None, "d/x": b"1", "d/y": b"2"}


def test_a_directory_that_was_replaced_as_a_whole(bench: Bench) -> None:
    bench.build("old", {"d": {"x": b"1", "y": b"1"}, "same": {"z": b"1"}})
    bench.build("new", {"d": {"x": b"2", "y": b"1"}, "same": {"z": b"1"}})
    with bench.writing("upper", "old") as merged:
        for name in ("d", "same"):
            subprocess.run(["rm", "-r", merged / name], check=True)
            (merged / name).mkdir()
            (merged / name / "own").write_bytes(b"mine")
        (merged / "d/x").write_bytes(b"mine")
    (found,) = bench.rebase()
    assert (found.path, found.outcome) == (b"d", Outcome.KEPT)
    bench.assert_in_order()
    assert list(bench.shown()) == ["d", "d/own", "d/x", "same", "same/own"]
    found = bench.rebase(Conflicts.SAVE)
    assert [(one.path, one.outcome) for one in found] == [
        (b"d", Outcome.DROPPED),
        (b"d/x", Outcome.SAVED),
    ]
    bench.assert_in_order()
    assert bench.shown() == {
        "d": None,
        "d/own": b"mine",
        "d/x": b"2",
        "d/x.sessiond-old": b"mine",
        "d/y": b"1",
        "same": None,
        "same/own": b"mine",
    }


@pytest.mark.parametrize("conflicts", Conflicts)
def test_another_type(bench: Bench, conflicts: Conflicts) -> None:
    bench.build("old", {"file": b"image", "directory": {"x": b"image"}})
    bench.build("new", {"file": {"x": b"image 2"}, "directory": b"image 2"})
    with bench.writing("upper", "old") as merged:
        (merged / "file").write_bytes(b"mine")
        (merged / "directory/own").write_bytes(b"mine")
    outcomes = {one.path: one.outcome for one in bench.rebase(conflicts)}
    # A directory is not dropped, nor moved away.
    assert outcomes[b"directory"] is Outcome.KEPT
    bench.assert_in_order()
    shown = bench.shown()
    assert (shown["directory"], shown["directory/own"]) == (None, b"mine")
    assert shown["file"] == (b"mine" if conflicts is Conflicts.KEEP else None)
    assert ("file.sessiond-old" in shown) is (conflicts is Conflicts.SAVE)


def test_renamed_directories(bench: Bench) -> None:
    bench.build("old", {"a": {"x": b"1"}, "gone": {"y": b"1"}, "d": {"sub": {"z": b"1"}}})
    bench.build(
        "new", {"a": {"x": b"2", "new": b"2"}, "d": {"sub": {"z": b"2"}}, "left": {"other": b"2"}}
    )
    with bench.writing("upper", "old") as merged:
        (merged / "a").rename(merged / "b")
        (merged / "b/own").write_bytes(b"mine")
        (merged / "gone").rename(merged / "left")
        (merged / "left/own").write_bytes(b"mine")
        (merged / "d/sub").rename(merged / "sub")
        (merged / "d").rmdir()
    # Nothing of what was renamed shows twice, whatever is said of conflicts.
    (found,) = bench.rebase(Conflicts.KEEP)
    assert (found.path, found.outcome) == (b"left", Outcome.KEPT)
    assert "trusted.overlay.redirect" not in _own(bench.directory / "upper/left")
    bench.rebase(Conflicts.DROP, base="new")
    bench.assert_in_order()
    assert bench.shown() == {
        "b": None,
        "b/new": b"2",
        "b/own": b"mine",
        "b/x": b"2",
        "left": None,
        "left/own": b"mine",
        "sub": None,
        "sub/z": b"2",
    }


def test_hard_links(bench: Bench) -> None:
    image: Tree = {"a": b"image", "b": trees.Link("a"), "c": trees.Link("a")}
    lonely: Tree = {"p": b"image", "q": trees.Link("p")}
    bench.build("old", {**image, **lonely})
    # Other inodes, so that stale names of the index would lead anywhere.
    bench.build("new", {"0": b"", "1": b"", **lonely, **image})
    with bench.writing("upper", "old") as merged:
        (merged / "a").write_bytes(b"mine")
        os.link(merged / "a", merged / "own")
        assert (merged / "b").read_bytes() == b"mine"
        (merged / "p").write_bytes(b"mine, too")
        (merged / "p").unlink()
        assert (merged / "q").read_bytes() == b"mine, too"
    (found,) = bench.rebase()
    assert (found.outcome, found.saved_as) == (Outcome.SAVED, b"hard-link.sessiond-old")
    assert list((bench.directory / "upper-work/index").iterdir()) == []
    bench.assert_in_order()
    shown = bench.shown()
    assert shown["a"] == shown["own"] == b"mine"
    assert shown["hard-link.sessiond-old"] == b"mine, too"
    assert shown["b"] == shown["c"] == shown["q"] == b"image"
    upper = bench.directory / "upper"
    assert (upper / "a").stat().st_ino == (upper / "own").stat().st_ino


def test_names_that_leave_no_room_for_more(bench: Bench) -> None:
    names = ["n" * 254 + str(number) for number in range(3)]
    bench.build("old", dict.fromkeys(names, b"image"))
    bench.build("new", dict.fromkeys(names, b"image 2"))
    with bench.writing("upper", "old") as merged:
        for name in names:
            (merged / name).write_bytes(name[-1].encode())
    found = bench.rebase(Conflicts.SAVE)
    saved = [(bench.directory / "upper" / os.fsdecode(one.saved_as)) for one in found]
    assert sorted(path.read_bytes() for path in saved) == [b"0", b"1", b"2"]
    bench.assert_in_order()


def test_committed_layers(bench: Bench) -> None:
    bench.build("old", {"etc": {"a": b"image", "b": b"image"}, "d": {"x": b"1"}})
    bench.build("new", {"etc": {"a": b"image 2", "b": b"image 2"}, "d": {"x": b"2"}})
    with bench.writing("one", "old") as merged:
        (merged / "etc/a").write_bytes(b"mine")
        (merged / "d/own").write_bytes(b"mine")
    with bench.writing("upper", "one", "old") as merged:
        (merged / "etc/a").write_bytes(b"mine 2")
        (merged / "etc/b").unlink()
        subprocess.run(["rm", "-r", merged / "d"], check=True)
    targets = [bench.target("upper", "one", "new"), bench.target("one", "new")]
    found = [
        list(rebase(target, Conflicts.SAVE, apply=True, check=unchecked)) for target in targets
    ]
    for target in reversed(targets):
        tidy(target, check=unchecked)
    assert {one.path: one.outcome for one in found[0]} == {
        b"etc/a": Outcome.SAVED,
        b"etc/b": Outcome.DROPPED,
        # It hides what another layer has as well, and that was removed.
        b"d": Outcome.KEPT,
    }
    assert {one.path: one.outcome for one in found[1]} == {b"etc/a": Outcome.SAVED}
    bench.assert_in_order("one", "new")
    assert bench.shown("one", "new") == {
        "etc": None,
        "etc/a": b"image 2",
        "etc/a.sessiond-old": b"mine 2",
        "etc/b": b"image 2",
    }


def test_a_layer_with_metadata_only_is_refused_before_anything_is_changed(bench: Bench) -> None:
    bench.build("old", {"a": b"image", "b": b"image"})
    bench.build("new", {"a": b"image 2", "b": b"image 2"})
    with bench.writing("upper", "old") as merged:
        (merged / "a").write_bytes(b"mine")
        (merged / "b").write_bytes(b"mine")
    os.setxattr(bench.directory / "upper/b", "trusted.overlay.metacopy", b"")
    target = bench.target("upper", "new")
    with pytest.raises(OSError, match="only the metadata"):
        list(rebase(target, Conflicts.DROP, apply=True, check=unchecked))
    assert (bench.directory / "upper/a").read_bytes() == b"mine"


def test_a_layer_in_use_is_refused(bench: Bench) -> None:
    bench.build("old", {"a": b"image"})
    bench.build("new", {"a": b"image 2"})
    with bench.writing("upper", "old") as merged:
        (merged / "a").write_bytes(b"mine")
    target = bench.target("upper", "new")
    planning = rebase(target, Conflicts.DROP, apply=True, check=unchecked)
    next(planning)
    with pytest.raises(OSError, match="in use"):
        next(rebase(target, Conflicts.DROP, apply=True, check=unchecked))
    planning.close()


class StoppedError(Exception):
    """The process has died there."""


@pytest.mark.parametrize("conflicts", Conflicts)
def test_interrupted_anywhere_it_ends_the_same(bench: Bench, conflicts: Conflicts) -> None:
    names = [f"{letter}{number}" for letter in "abcdef" for number in range(6)]
    bench.build("old", {"etc": dict.fromkeys(names, b"image")})
    new: Tree = {name: b"image 2" for name in names if name[0] in "abc"}
    bench.build("new", {"etc": new})
    with bench.writing("upper", "old") as merged:
        for name in names:
            if int(name[1]) % 3 == 0:
                (merged / "etc" / name).write_bytes(b"mine")
            elif int(name[1]) % 3 == 1:
                (merged / "etc" / name).unlink()
    calls = 0
    limit = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise StoppedError

    target = bench.target("upper", "new")
    random_source = random.Random(1)
    for _ in range(12):
        calls, limit = 0, random_source.randrange(1, 150)
        try:
            list(rebase(target, conflicts, apply=True, check=check))
        except StoppedError:
            continue
    list(rebase(target, conflicts, apply=True, check=unchecked))
    tidy(target, check=unchecked)
    bench.assert_in_order()
    shown = bench.shown()
    for name in names:
        mine = int(name[1]) % 3 == 0
        in_image, deleted = name[0] in "abc", int(name[1]) % 3 == 1
        wanted: bytes | None
        if conflicts is Conflicts.KEEP or not in_image:
            wanted = b"mine" if mine else (None if deleted or not in_image else b"image 2")
        else:
            wanted = b"image 2"
        assert shown.get(f"etc/{name}") == wanted, name
        saved = mine and in_image and conflicts is Conflicts.SAVE
        assert (shown.get(f"etc/{name}.sessiond-old") == b"mine") is saved


Files = dict[str, bytes]


def merged_three_ways(
    base: Files, theirs: Files, ours: Files, removed: set[str], conflicts: Conflicts
) -> Files:
    """What has to show in the end; `removed`: what hides a file of another layer, not the image's
    alone.
    """
    merged: Files = {}
    for path in base.keys() | theirs.keys() | ours.keys():
        old, new, own = base.get(path), theirs.get(path), ours.get(path)
        shown = own
        unchanged = own == old and path not in removed
        if unchanged or (new is not None and new != old and conflicts is not Conflicts.KEEP):
            shown = new
            if conflicts is Conflicts.SAVE and own is not None and own not in (old, new):
                merged[f"{path}.sessiond-old"] = own
        if shown is not None:
            merged[path] = shown
    return merged


def an_image(source: random.Random, before: Files) -> Files:
    """Change some of what there was."""
    files = dict(before)
    for path in source.sample(PATHS, 9):
        files.pop(path, None)
        if source.random() < 0.7:
            files[path] = source.randbytes(4)
    return files


def work(source: random.Random, merged: Path, ours: Files) -> set[str]:
    """Do what a session may do; return what was removed."""
    removed = set()
    for path in source.sample(PATHS, 7):
        if path in ours and source.random() < 0.3:
            (merged / path).unlink()
            del ours[path]
            removed.add(path)
        elif path in ours and source.random() < 0.3:
            os.close(os.open(merged / path, os.O_WRONLY))  # only copied up
        else:
            ours[path] = source.randbytes(4)
            (merged / path).write_bytes(ours[path])
    return removed


PATHS = [f"{directory}/{name}" for directory in "xyz" for name in "abcdef"]


@pytest.mark.parametrize("seed", [*range(20), *SOAKED])
def test_a_merge_of_three(bench: Bench, seed: int) -> None:
    source = random.Random(seed)
    base = an_image(source, {})
    theirs = an_image(source, base)
    for name, files in (("old", base), ("new", theirs)):
        tree: dict[str, dict[str, bytes]] = {directory: {} for directory in "xyz"}
        for path, content in files.items():
            tree[path[0]][path[2:]] = content
        bench.build(name, tree)
    ours = dict(base)
    with bench.writing("one", "old") as merged:
        work(source, merged, ours)
    middle = set(ours)
    with bench.writing("upper", "one", "old") as merged:
        removed = work(source, merged, ours) & middle
    conflicts = source.choice(list(Conflicts))
    targets = [bench.target("upper", "one", "new"), bench.target("one", "new")]
    for target in targets:
        list(rebase(target, conflicts, apply=True, check=unchecked))
    for target in reversed(targets):
        tidy(target, check=unchecked)
    bench.assert_in_order("one", "new")
    wanted = merged_three_ways(base, theirs, ours, removed, conflicts)
    shown = {path: what for path, what in bench.shown("one", "new").items() if what is not None}
    for path in removed:  # what an older layer has saved shows here as well
        shown.pop(f"{path}.sessiond-old", None)
    assert shown == wanted, conflicts
