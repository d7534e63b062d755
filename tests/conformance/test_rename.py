"""rename(2) and renameat2(2), of and onto everything, in any layer."""

from __future__ import annotations

import os
from errno import EBUSY, EEXIST, EINVAL, EISDIR, ENOENT, ENOTDIR, ENOTEMPTY

import pytest

from tests.support import trees
from tests.support.libc import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.support.posix import append, fails, names, opened, read, write
from tests.support.trees import Device, Dir, Fifo, File, Snapshot, Symlink, Tree, Whiteout
from tests.support.views import Merge, View

FILE = File(b"contents", mode=0o640, uid=1, xattrs={"user.x": b"1"})
TREE: Tree = {"x": FILE, "sub": {"y": b"y"}, "link": Symlink("x")}

# Where the thing that is renamed or replaced lives.
LOWER, UPPER, MERGED = "lower", "upper", "merged"


def layers_with(**things: tuple[str, Tree]) -> tuple[Tree, Tree]:
    """Return a lower and an upper that hold each thing in the layer named, merged ones in both."""
    lower = {name: tree for name, (where, tree) in things.items() if where != UPPER}
    upper = {
        name: {**tree, "only-upper": b"u"} if where == MERGED else tree
        for name, (where, tree) in things.items()
        if where != LOWER
    }
    return lower, upper


def subtree(root: str, path: str) -> Snapshot:
    """Return what is below `path`, with the directory itself."""
    return trees.snapshot(f"{root}/{path}")


def expect_moved(view: View, source: str, target: str, flags: int = 0) -> None:
    """Rename, and demand that the target is what the source was, also after a remount."""
    before = subtree(view.root, source)
    renameat2(view / source, view / target, flags)
    trees.assert_same(before, subtree(view.root, target), "not what was renamed")
    with fails(ENOENT):
        os.lstat(view / source)
    assert os.path.basename(source) not in names(os.path.dirname(view / source))
    view.remount()
    trees.assert_same(before, subtree(view.root, target), "after a remount: not what was renamed")
    with fails(ENOENT):
        os.lstat(view / source)


@pytest.mark.parametrize("where", [LOWER, UPPER, MERGED])
@pytest.mark.parametrize("target", ["new", "other/new"])
def test_directory_onto_nothing(merge: Merge, where: str, target: str) -> None:
    lower, upper = layers_with(d=(where, TREE), other=(LOWER, {}))
    view = merge(lower, upper=upper)
    expect_moved(view, "d", target)
    os.mkdir(view / "d")
    assert names(view / "d") == set()
    append(view / target + "/sub/y", b"more")
    assert read(view / target + "/sub/y") == b"ymore"


@pytest.mark.parametrize("where", [LOWER, UPPER, MERGED])
@pytest.mark.parametrize("onto", [LOWER, UPPER, "emptied"])
def test_directory_onto_empty_directory(merge: Merge, where: str, onto: str) -> None:
    """An emptied directory has whiteouts in the upper; they must not hide what moves there."""
    emptied: tuple[str, Tree] = (LOWER, {"x": b"to be removed", "only-lower": b""})
    lower, upper = layers_with(d=(where, TREE), empty=emptied if onto == "emptied" else (onto, {}))
    view = merge(lower, upper=upper)
    if onto == "emptied":
        os.unlink(view / "empty/x")
        os.unlink(view / "empty/only-lower")
    expect_moved(view, "d", "empty")


@pytest.mark.parametrize("where", [LOWER, MERGED])
def test_directory_onto_a_whiteout(merge: Merge, where: str) -> None:
    """What the whiteout hides must not merge with what moves there."""
    lower, upper = layers_with(d=(where, TREE), gone=(LOWER, {"old": b"", "sub": {"old": b""}}))
    view = merge(lower, upper={**upper, "gone": Whiteout()})
    expect_moved(view, "d", "gone")


def test_what_rename_refuses(merge: Merge) -> None:
    view = merge(
        {"full": {"x": b""}, "file": b"", "d": {"sub": {}}},
        upper={"full2": {"x": b""}, "file2": b"", "d2": {}},
    )
    for source in ("d", "d2"):
        for target in ("full", "full2"):
            with fails(ENOTEMPTY):
                os.rename(view / source, view / target)
        for target in ("file", "file2"):
            with fails(ENOTDIR):
                os.rename(view / source, view / target)
            with fails(EISDIR):
                os.rename(view / target, view / source)
    with fails(EINVAL):
        os.rename(view / "d", view / "d/sub/below-itself")
    with fails(ENOTEMPTY):
        os.rename(view / "d/sub", view / "d")
    with fails(ENOENT):
        os.rename(view / "nothing", view / "new")
    assert names(view.root) == {"full", "file", "d", "full2", "file2", "d2"}


@pytest.mark.parametrize("where", [LOWER, UPPER])
@pytest.mark.parametrize("onto", [LOWER, UPPER, "nothing", "whiteout"])
def test_files_of_each_kind(merge: Merge, where: str, onto: str) -> None:
    kinds: dict[str, trees.Node] = {
        "file": FILE,
        "symlink": Symlink("file", uid=3),
        "device": Device(0o020000, 1, 3),
        "fifo": Fifo(mode=0o600),
    }
    target: Tree = {"there": dict.fromkeys(kinds, FILE)}
    lower: dict[str, trees.Node | bytes | Tree] = {"there": {}}
    upper: dict[str, trees.Node | bytes | Tree] = {}
    (lower if where == LOWER else upper)["here"] = kinds
    if onto == LOWER:
        lower |= target
    elif onto == UPPER:
        upper |= target
    elif onto == "whiteout":
        lower |= target
        upper["there"] = dict.fromkeys(kinds, Whiteout())
    view = merge(lower, upper=upper)
    for kind in kinds:
        before = trees.snapshot(view / "here")[kind.encode()]
        os.rename(view / f"here/{kind}", view / f"there/{kind}")
        assert trees.snapshot(view / "there")[kind.encode()] == before
    assert names(view / "here") == set()
    view.remount()
    assert names(view / "here") == set()
    assert names(view / "there") == kinds.keys()
    os.rmdir(view / "here")


def test_parents_get_a_new_time(merge: Merge) -> None:
    view = merge({"a": {"x": b""}, "b": {}})
    os.rename(view / "a/x", view / "b/x")
    assert os.stat(view / "a").st_mtime_ns > trees.MTIME_NS
    assert os.stat(view / "b").st_mtime_ns > trees.MTIME_NS
    assert os.stat(view / "b/x").st_mtime_ns == trees.MTIME_NS


def test_noreplace(merge: Merge) -> None:
    view = merge({"a": b"a", "low": b"low", "gone": b""}, upper={"up": b"up", "gone": Whiteout()})
    for target in ("low", "up"):
        with fails(EEXIST):
            renameat2(view / "a", view / target, RENAME_NOREPLACE)
    assert (read(view / "low"), read(view / "up")) == (b"low", b"up")
    expect_moved(view, "a", "gone", RENAME_NOREPLACE)
    expect_moved(view, "gone", "new", RENAME_NOREPLACE)


@pytest.mark.parametrize("one", [LOWER, UPPER, MERGED])
@pytest.mark.parametrize("other", [LOWER, UPPER, MERGED, "file"])
def test_exchange(merge: Merge, one: str, other: str) -> None:
    lower, upper = layers_with(
        p=(LOWER, {"one": TREE} if one != UPPER else {}),
        q=(LOWER, {"other": {"z": b"z", "sub": {"zz": b""}}} if other in (LOWER, MERGED) else {}),
    )
    if one != LOWER:
        upper = {**upper, "p": {"one": {"only-upper": b""}}}
    if other in (UPPER, MERGED):
        upper = {**upper, "q": {"other": {"only-upper": b"2"}}}
    if other == "file":
        lower = {**lower, "q": {"other": FILE}}
    view = merge(lower, upper=upper)
    before = {name: subtree(view.root, name) for name in ("p", "q")}
    renameat2(view / "p/one", view / "q/other", RENAME_EXCHANGE)
    for _ in range(2):
        after = {name: subtree(view.root, name) for name in ("p", "q")}
        expected = swapped(before["p"], before["q"])
        for name, want in zip(("p", "q"), expected, strict=True):
            # Only the directories in which the names are have changed, by their times.
            want[b"."] = after[name][b"."]
            trees.assert_same(want, after[name])
        view.remount()
    with fails(ENOENT):
        renameat2(view / "p/one", view / "q/nothing", RENAME_EXCHANGE)


def swapped(p: Snapshot, q: Snapshot) -> tuple[Snapshot, Snapshot]:
    """Return the snapshots with what is below ``one`` and ``other`` exchanged."""

    def moved(source: Snapshot, name: bytes, target: bytes) -> Snapshot:
        return {
            target + path[len(name) :]: entry
            for path, entry in source.items()
            if path == name or path.startswith(name + b"/")
        }

    return moved(q, b"other", b"one") | {b".": p[b"."]}, moved(p, b"one", b"other") | {
        b".": q[b"."]
    }


def test_exchange_keeps_hidden_things_hidden(merge: Merge) -> None:
    view = merge({"a": {"x": b"", "y": b""}, "b": {"x": b"", "z": b""}})
    os.unlink(view / "a/x")
    os.unlink(view / "b/x")
    renameat2(view / "a", view / "b", RENAME_EXCHANGE)
    assert (names(view / "a"), names(view / "b")) == ({"z"}, {"y"})
    view.remount()
    assert (names(view / "a"), names(view / "b")) == ({"z"}, {"y"})


def test_a_directory_renamed_again_and_again(merge: Merge) -> None:
    view = merge({"a": {"b": {"c": {"file": b"deep"}}}, "t": {}})
    os.rename(view / "a/b", view / "t/b2")
    os.rename(view / "t", view / "t2")
    os.rename(view / "t2/b2/c", view / "t2/b2/c2")
    os.rename(view / "t2/b2", view / "up")
    os.rename(view / "up/c2", view / "a/c3")
    assert read(view / "a/c3/file") == b"deep"
    view.remount()
    assert read(view / "a/c3/file") == b"deep"
    os.rename(view / "a", view / "up/a")
    assert read(view / "up/a/c3/file") == b"deep"
    view.remount()
    assert read(view / "up/a/c3/file") == b"deep"
    assert names(view.root) == {"t2", "up"}


def test_names_swapped_by_way_of_a_third(merge: Merge) -> None:
    """Redirects must name where things are in the lower, not where they went last."""
    view = merge({"a": {"in-a": b""}, "b": {"in-b": b""}})
    os.rename(view / "a", view / "c")
    os.rename(view / "b", view / "a")
    os.rename(view / "c", view / "b")
    assert (names(view / "a"), names(view / "b")) == ({"in-b"}, {"in-a"})
    view.remount()
    assert (names(view / "a"), names(view / "b")) == ({"in-b"}, {"in-a"})
    os.rename(view / "a", view / "back")
    os.rename(view / "b", view / "a")
    os.rename(view / "back", view / "b")
    view.remount()
    assert (names(view / "a"), names(view / "b")) == ({"in-a"}, {"in-b"})


def test_redirects_of_several_lowers(merge: Merge) -> None:
    view = merge({"d": {"top": b"t"}}, {"d": {"bottom": b"b"}}, {"d": {"lowest": b"l"}})
    os.rename(view / "d", view / "e")
    assert names(view / "e") == {"top", "bottom", "lowest"}
    view.remount()
    assert names(view / "e") == {"top", "bottom", "lowest"}


def test_onto_a_hard_link_of_itself(merge: Merge) -> None:
    view = merge({"a": b"a", "b": trees.Link("a")})
    os.rename(view / "a", view / "b")
    assert names(view.root) == {"a", "b"}
    assert os.stat(view / "a").st_nlink == 2


def test_open_files_go_with_the_name(merge: Merge) -> None:
    view = merge({"d": {"file": b"1"}, "victim": b"old"})
    with (
        opened(view / "d/file", os.O_RDWR) as file,
        opened(view / "victim") as victim,
        opened(view / "d") as directory,
    ):
        os.rename(view / "d", view / "e")
        os.pwrite(file, b"2", 0)
        assert read(view / "e/file") == b"2"
        assert os.listdir(directory) == ["file"]
        os.rename(view / "e/file", view / "victim")
        if view.descriptors_follow_changes:
            assert os.fstat(victim).st_nlink == 0
        assert os.pread(victim, 3, 0) == b"old"
        os.pwrite(file, b"3", 0)
        assert read(view / "victim") == b"3"


def test_editors_way_of_saving(merge: Merge) -> None:
    view = merge({"etc": {"conf": File(b"old", mode=0o600)}})
    for version in (b"new", b"newer"):
        write(view / "etc/.conf.tmp", version)
        os.rename(view / "etc/conf", view / "etc/conf~")
        os.rename(view / "etc/.conf.tmp", view / "etc/conf")
        assert read(view / "etc/conf") == version
    assert read(view / "etc/conf~") == b"new"
    assert names(view / "etc") == {"conf", "conf~"}


def test_the_root_cannot_be_moved(merge_layers: Merge) -> None:
    view = merge_layers({"a": {}})
    with fails(EBUSY):
        os.rename(view.root, view.root + "-moved")


def test_opaque_directory_stays_so(merge: Merge) -> None:
    view = merge({"d": {"hidden": b""}}, upper={"d": Dir({"seen": b""}, opaque=True)})
    expect_moved(view, "d", "e")
    os.mkdir(view / "d")
    expect_moved(view, "e", "d")
