"""What is kept, in the core: two sets of layers, one merged view."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeAlias

import pytest

from sessiond.keep_rules import KeepRules, checked_rule, rule_for
from sessiond.overlay import syscalls
from sessiond.overlay.commit import Commit
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.keep import Keep
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.syscalls import RENAME_EXCHANGE
from sessiond.overlay.workdir import remove_tree
from tests.support.checker import assert_clean
from tests.support.soak import factor
from tests.unit.overlay.conftest import Bench, contents, find, names, new_directory, new_file

pytestmark = pytest.mark.root


class KeptBench(Bench):
    """Overlays with kept layers."""

    def kept(
        self, *rules: str, upper: str = "upper", lowers: tuple[str, ...] = ("low",)
    ) -> Overlay:
        session = self.stack(*lowers, upper=upper)
        keep = Keep(self.stack(lowers[-1], upper="kept"), session, KeepRules(rules))
        overlay = Overlay(session, keep=keep)
        Exchange(overlay).find_ways()
        self._opened.append(overlay)
        return overlay

    def reset(self, overlay: Overlay, upper: str) -> None:
        Exchange(overlay).swap(self.stack("low", upper=upper))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[KeptBench]:
    bench = KeptBench(tmp_path)
    yield bench
    bench.close()


def parent_of(overlay: Overlay, path: str) -> tuple[Node, bytes]:
    directory, _, name = path.rpartition("/")
    parent = find(overlay, directory) if directory else overlay.view.root
    if not parent.is_directory:
        raise NotADirectoryError(directory)
    return parent, os.fsencode(name)


def write(overlay: Overlay, path: str, text: bytes) -> None:
    parent, name = parent_of(overlay, path)
    try:
        node, _ = overlay.view.lookup(parent, name)
        overlay.open_file(node, write=True, truncate=True)
    except FileNotFoundError:
        node, _ = overlay.create_file(parent, name, new_file())
    overlay.write(node, text, 0)
    overlay.release_file(node)


def mkdir(overlay: Overlay, path: str) -> None:
    parent, name = parent_of(overlay, path)
    overlay.create(parent, name, new_directory())


def rename(overlay: Overlay, old: str, new: str, flags: int = 0) -> None:
    overlay.rename(parent_of(overlay, old), parent_of(overlay, new), flags)


def unlink(overlay: Overlay, path: str) -> None:
    overlay.unlink(*parent_of(overlay, path))


def image(bench: KeptBench) -> Path:
    low = bench.layer("low")
    (low / "home/u/docs").mkdir(parents=True)
    (low / "home/u/docs/letter").write_text("of the image")
    (low / "home/u/.rc").write_text("of the image")
    (low / "home/u/other").write_text("of the image")
    return low


RULES = ("/home/*/docs", "/home/*/.rc", "/var/lib/thing")


def test_a_reset_spares_what_is_kept(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept(*RULES)
    write(overlay, "home/u/docs/letter", b"mine")
    write(overlay, "home/u/docs/new", b"new")
    write(overlay, "home/u/.rc", b"rc")
    write(overlay, "home/u/other", b"lost")
    assert sorted(os.listdir(bench.layer("upper") / "home/u")) == ["other"]
    bench.reset(overlay, "second")
    assert contents(overlay, "home/u/docs/letter") == b"mine"
    assert names(overlay, "home/u/docs") == ["letter", "new"]
    assert contents(overlay, "home/u/.rc") == b"rc"
    assert contents(overlay, "home/u/other") == b"of the image"
    unlink(overlay, "home/u/docs/letter")
    unlink(overlay, "home/u/.rc")
    assert names(overlay, "home/u") == ["docs", "other"]
    bench.reset(overlay, "third")
    assert names(overlay, "home/u") == ["docs", "other"]
    assert names(overlay, "home/u/docs") == ["new"]


def test_where_the_image_lacks_the_way_it_is_made_again(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept(*RULES)
    for path in ("var", "var/lib", "var/lib/thing"):
        mkdir(overlay, path)
    overlay.chmod(find(overlay, "var/lib"), 0o700)
    overlay.chown(find(overlay, "var"), 7, 8)
    write(overlay, "var/lib/thing/data", b"kept")
    write(overlay, "var/lib/other", b"lost")
    bench.reset(overlay, "second")
    assert names(overlay, "var/lib") == ["thing"]
    assert contents(overlay, "var/lib/thing/data") == b"kept"
    assert stat.S_IMODE(overlay.view.stat(find(overlay, "var/lib")).st_mode) == 0o700
    assert overlay.view.stat(find(overlay, "var")).st_uid == 7
    unlink(overlay, "var/lib/thing/data")
    overlay.rmdir(*parent_of(overlay, "var/lib/thing"))
    overlay.rmdir(*parent_of(overlay, "var/lib"))
    assert names(overlay, "var") == []
    bench.reset(overlay, "third")
    assert names(overlay) == ["home"]


def test_a_directory_that_leads_to_what_is_kept_is_moved_by_copying(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept(*RULES)
    mkdir(overlay, "home/v")
    mkdir(overlay, "elsewhere")
    for old, new in (
        ("home/u", "elsewhere/u"),
        ("elsewhere", "home/w"),
        ("home/u/docs", "home/u/letters"),
        ("elsewhere", "home/v/docs"),
    ):
        with pytest.raises(OSError, match="cross-device"):
            rename(overlay, old, new)
    with pytest.raises(OSError, match="cross-device"):
        rename(overlay, "home/u", "home/v", RENAME_EXCHANGE)
    with pytest.raises(OSError, match="not empty"):
        overlay.rmdir(*parent_of(overlay, "home/u"))
    write(overlay, "plain", b"")
    with pytest.raises(OSError, match="cross-device"):
        overlay.link(find(overlay, "plain"), *parent_of(overlay, "home/v/.rc"))
    with pytest.raises(OSError, match="cross-device"):
        rename(overlay, "plain", "home/u/.rc", RENAME_EXCHANGE)


@pytest.mark.parametrize("was", ["of the image", "written"])
def test_a_file_crosses_the_border(bench: KeptBench, was: str) -> None:
    """As an editor does that writes beside a file, and renames it over that."""
    image(bench)
    overlay = bench.kept(*RULES)
    if was == "written":
        write(overlay, "home/u/other", b"written")
    node = find(overlay, "home/u/other")
    overlay.setxattr(node, b"user.x", b"1")
    overlay.chmod(node, 0o600)
    number = node.number
    overlay.open_file(node, write=False)
    rename(overlay, "home/u/other", "home/u/.rc")
    assert names(overlay, "home/u") == [".rc", "docs"]
    moved = find(overlay, "home/u/.rc")
    assert (moved, moved.number) == (node, number)
    assert overlay.read(moved, 99, 0) == was.encode()
    assert overlay.getxattr(moved, b"user.x") == b"1"
    overlay.chmod(moved, 0o640)
    overlay.release_file(node)
    bench.reset(overlay, "second")
    assert names(overlay, "home/u") == [".rc", "docs", "other"]
    assert contents(overlay, "home/u/.rc") == was.encode()
    assert stat.S_IMODE(overlay.view.stat(find(overlay, "home/u/.rc")).st_mode) == 0o640
    # And back.
    rename(overlay, "home/u/.rc", "home/u/rc")
    assert names(overlay, "home/u") == ["docs", "other", "rc"]
    bench.reset(overlay, "third")
    assert names(overlay, "home/u") == ["docs", "other"]
    bench.close()
    assert os.listdir(bench.layer("kept-work") / "work") == []


def test_what_is_large_or_has_names_does_not_cross(bench: KeptBench) -> None:
    low = image(bench)
    os.link(low / "home/u/other", low / "home/u/second")
    with open(low / "home/u/large", "wb") as file:
        file.truncate((16 << 20) + 1)
    overlay = bench.kept(*RULES)
    for name in ("other", "large"):
        with pytest.raises(OSError, match="cross-device"):
            rename(overlay, f"home/u/{name}", "home/u/.rc")
    assert contents(overlay, "home/u/.rc") == b"of the image"


def test_what_has_names_in_the_image_alone_does_not_cross(bench: KeptBench) -> None:
    low = image(bench)
    os.link(low / "home/u/other", low / "home/u/second")
    os.link(low / "home/u/other", low / "home/u/third")
    overlay = bench.kept(*RULES, upper="first")
    write(overlay, "home/u/third", b"changed")
    unlink(overlay, "home/u/third")
    bench.close()
    overlay = bench.kept(*RULES, lowers=("first", "low"))
    with pytest.raises(OSError, match="cross-device"):
        rename(overlay, "home/u/other", "home/u/.rc")
    assert contents(overlay, "home/u/second") == b"changed"


def test_one_inode_of_the_image_on_both_sides(bench: KeptBench) -> None:
    low = image(bench)
    os.link(low / "home/u/other", low / "home/u/docs/linked")
    overlay = bench.kept(*RULES)
    kept, other = find(overlay, "home/u/docs/linked"), find(overlay, "home/u/other")
    overlay.view.refer(kept)
    overlay.view.refer(other)
    assert kept is not other
    assert kept.number != other.number
    write(overlay, "home/u/docs/linked", b"kept")
    assert contents(overlay, "home/u/other") == b"of the image"
    write(overlay, "home/u/other", b"other")
    assert contents(overlay, "home/u/docs/linked") == b"kept"


def test_an_open_file_that_is_kept_goes_on_over_a_reset(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept(*RULES)
    node = find(overlay, "home/u/docs/letter")
    overlay.open_file(node, write=True, truncate=True)
    overlay.write(node, b"before", 0)
    bench.reset(overlay, "second")
    overlay.write(overlay.view.node(node.number), b"after", 6)
    assert contents(overlay, "home/u/docs/letter") == b"beforeafter"


def test_names_of_a_directory_change_its_time(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept(*RULES)
    before = overlay.view.stat(find(overlay, "home/u")).st_mtime_ns
    unlink(overlay, "home/u/.rc")
    assert overlay.view.stat(find(overlay, "home/u")).st_mtime_ns > before


def test_a_snapshot_does_not_hold_what_is_kept(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept(*RULES)
    write(overlay, "home/u/docs/letter", b"kept")
    write(overlay, "home/u/other", b"first")
    Exchange(overlay).swap(bench.stack("upper", "low", upper="second"))
    write(overlay, "home/u/docs/letter", b"later")
    write(overlay, "home/u/other", b"second")
    Exchange(overlay).swap(bench.stack("upper", "low", upper="third"))
    assert contents(overlay, "home/u/docs/letter") == b"later"
    assert contents(overlay, "home/u/other") == b"first"


@pytest.mark.parametrize(
    "rule", ["relative", "/", "/a/../b", "/a//b", "/a/", "/a/**", "/a\0", "/" + "a/" * 64 + "a"]
)
def test_what_is_no_rule(rule: str) -> None:
    with pytest.raises(ValueError, match=r"is needed|not known|at most"):
        checked_rule(rule)


def test_rules_match_as_a_shell_does() -> None:
    rules = KeepRules(["/home/*/*.txt", "/etc/[ab]", rule_for(b"x/[*]\xff")])
    assert rules.keep(b"home/u/a.txt")
    assert rules.keep(b"home/u/a.txt/below")
    assert not rules.keep(b"home/u/.txt")
    assert not rules.keep(b"home/.u/a.txt")
    assert rules.keep(b"etc/a")
    assert not rules.keep(b"etc/c")
    assert rules.keep(b"x/[*]\xff")
    assert not rules.keep(b"x/*\xff")
    assert [rules.lead(path) for path in (b"", b"home", b"home/u", b"etc", b"etc/a", b"y")] == [
        *(True, True, True, True, False, False)
    ]


def commit(overlay: Overlay, *paths: str) -> None:
    """Do what the manager has a worker do."""
    keep = overlay.view.keep
    assert keep is not None
    for path in paths:
        Exchange(overlay).make_way(os.fsencode(path))
    wanted = [os.fsencode(path) for path in paths]
    with closing(Commit(overlay.view.stack.copy(), keep, wanted, lambda: False)) as work:
        work.copy()
        work.publish()
        Exchange(overlay).keep_paths(KeepRules((*keep.rules.rules, *map(rule_for, wanted))))


def test_a_commit_saves_changes_and_deletions(bench: KeptBench) -> None:
    low = image(bench)
    (low / "home/u/gone").write_text("of the image")
    overlay = bench.kept("/home/*/docs/sub")
    mkdir(overlay, "home/u/docs/sub")
    write(overlay, "home/u/docs/sub/kept", b"kept before")
    write(overlay, "home/u/docs/new", b"new")
    unlink(overlay, "home/u/docs/letter")
    unlink(overlay, "home/u/gone")
    write(overlay, "home/u/other", b"lost")
    commit(overlay, "home/u/docs", "home/u/gone", "home/u/later")
    write(overlay, "home/u/later", b"later")
    for upper in ("second", "third"):
        bench.reset(overlay, upper)
        assert names(overlay, "home/u") == [".rc", "docs", "later", "other"]
        assert names(overlay, "home/u/docs") == ["new", "sub"]
        assert contents(overlay, "home/u/docs/sub/kept") == b"kept before"
        assert contents(overlay, "home/u/other") == b"of the image"


def test_a_file_that_is_open_goes_on_after_a_commit(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept()
    node = find(overlay, "home/u/other")
    overlay.open_file(node, write=True)
    overlay.write(node, b"BEFORE", 0)
    commit(overlay, "home/u/other")
    overlay.write(overlay.view.node(node.number), b"AFTER", 6)
    overlay.release_file(overlay.view.node(node.number))
    bench.reset(overlay, "second")
    assert contents(overlay, "home/u/other") == b"BEFOREAFTERe"


def test_a_commit_that_is_cancelled_leaves_nothing(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept()
    for number in range(10):
        write(overlay, f"home/u/docs/{number}", b"x")
    Exchange(overlay).make_way(b"home/u/docs")
    asked: list[None] = []
    assert overlay.view.keep is not None
    work = Commit(
        overlay.view.stack.copy(),
        overlay.view.keep,
        [b"home/u/docs"],
        lambda: asked.append(None) is None and len(asked) > 24,
    )
    with closing(work), pytest.raises(OSError, match="ancel"):
        work.copy()
    assert os.listdir(bench.layer("kept") / "home/u") == []
    assert os.listdir(bench.layer("kept-work") / "work") == []
    assert len(names(overlay, "home/u/docs")) == 11


def test_a_commit_with_a_file_that_was_changed_under_another_name(bench: KeptBench) -> None:
    """Nobody has looked for the name that is committed since."""
    (image(bench) / "home/u/docs/a").write_text("a")
    overlay = bench.kept()
    overlay.link(find(overlay, "home/u/docs/a"), *parent_of(overlay, "home/u/docs/b"))
    bench.close()
    overlay = bench.kept()
    watch = overlay.view.touched.watch()
    Exchange(overlay).make_way(b"home/u/docs")
    assert overlay.view.keep is not None
    with closing(
        Commit(overlay.view.stack.copy(), overlay.view.keep, [b"home/u/docs"], lambda: False)
    ) as work:
        work.copy()
        write(overlay, "home/u/docs/a", b"changed")
        work.renew(overlay.view.stack.copy(), watch.take(), watch.take_identities(), last=True)
        work.publish()
    docs = bench.layer("kept") / "home/u/docs"
    assert (docs / "b").read_bytes() == b"changed"
    assert (docs / "a").samefile(docs / "b")


def test_a_file_that_cannot_be_read_is_not_left_out(
    bench: KeptBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While programs go on, it may be because it has just changed; in the end it counts."""
    image(bench)
    overlay = bench.kept()
    write(overlay, "home/u/docs/bad", b"bad")
    Exchange(overlay).make_way(b"home/u/docs")
    copy = syscalls.copy_data

    def broken(source: int, target: int, size: int, cancelled: Callable[[], bool]) -> None:
        if size == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        copy(source, target, size, cancelled)

    monkeypatch.setattr(syscalls, "copy_data", broken)
    assert overlay.view.keep is not None
    with closing(
        Commit(overlay.view.stack.copy(), overlay.view.keep, [b"home/u/docs"], lambda: False)
    ) as work:
        work.copy()
        work.renew(overlay.view.stack.copy(), {}, ())
        with pytest.raises(OSError, match="Input/output error"):
            work.renew(overlay.view.stack.copy(), {}, (), last=True)


def test_what_is_nested_too_deep_is_refused(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept()
    parent = find(overlay, "home/u/docs")
    for _ in range(20):
        parent, _ = overlay.create(parent, b"d" * 250, new_directory())
        overlay.view.refer(parent)
    Exchange(overlay).make_way(b"home/u/docs")
    assert overlay.view.keep is not None
    work = Commit(overlay.view.stack.copy(), overlay.view.keep, [b"home/u/docs"], lambda: False)
    with closing(work), pytest.raises(OSError, match="nested so deep"):
        work.copy()


def test_what_is_in_the_way_is_put_back(bench: KeptBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that fails at its last step leaves what was there of rules of before."""
    image(bench)
    overlay = bench.kept("/home/u/docs", "/home/u/other", "/home/u/new/in")
    write(overlay, "home/u/docs/kept", b"kept once")
    write(overlay, "home/u/other", b"kept once")
    mkdir(overlay, "home/u/new")
    write(overlay, "home/u/new/in", b"kept")
    Exchange(overlay).keep_paths(KeepRules(["/home/u/new/in"]))
    write(overlay, "home/u/docs/now", b"now")
    unlink(overlay, "home/u/other")
    write(overlay, "home/u/new/now", b"now")

    def listed() -> set[str]:
        fs = bench.layer("kept")
        return {str(path.relative_to(fs)) for path in fs.rglob("*")}

    before = listed()
    monkeypatch.setattr(syscalls, "syncfs", fail)
    Exchange(overlay).make_way(b"home/u/docs")
    paths = [b"home/u/docs", b"home/u/other", b"home/u/new"]
    assert overlay.view.keep is not None
    work = Commit(overlay.view.stack.copy(), overlay.view.keep, paths, lambda: False)
    with closing(work):
        work.copy()
        with pytest.raises(OSError, match="No space"):
            work.publish()
    assert listed() == before
    monkeypatch.undo()
    Exchange(overlay).keep_paths(KeepRules(["/home/u/docs", "/home/u/other", "/home/u/new/in"]))
    assert names(overlay, "home/u/docs") == ["kept", "letter"]
    assert contents(overlay, "home/u/other") == b"kept once"


def test_a_way_does_not_replace_what_was_kept(bench: KeptBench) -> None:
    """No rule names it any more; but nobody has said that it is to be deleted."""
    image(bench)
    overlay = bench.kept()
    fs = bench.layer("kept") / "home/u"
    for number in (1, 2):
        Exchange(overlay).keep_paths(KeepRules(["/home/u/conf"]))
        write(overlay, "home/u/conf", b"kept %d" % number)
        Exchange(overlay).keep_paths(KeepRules())
        bench.reset(overlay, f"after {number}")
        mkdir(overlay, "home/u/conf")
        Exchange(overlay).keep_paths(KeepRules(["/home/u/conf/in"]))
        mkdir(overlay, "home/u/conf/in")
        assert (fs / "conf").is_dir()
        assert (fs / f"conf.sessiond-old-{number}").read_bytes() == b"kept %d" % number
        assert names(overlay, "home/u") == [".rc", "conf", "docs", "other"]
        overlay.rmdir(*parent_of(overlay, "home/u/conf/in"))
        overlay.rmdir(*parent_of(overlay, "home/u/conf"))
    bench.close()
    assert_clean(bench.layer("kept"), bench.layer("kept-work"), [bench.layer("low")])
    overlay = bench.kept("/home/u/conf*", upper="last")
    assert contents(overlay, "home/u/conf.sessiond-old-1") == b"kept 1"


def test_a_way_does_not_replace_what_has_a_long_name(bench: KeptBench) -> None:
    image(bench)
    name = "n" * 255
    overlay = bench.kept(f"/home/u/{name}")
    write(overlay, f"home/u/{name}", b"kept")
    Exchange(overlay).keep_paths(KeepRules())
    bench.reset(overlay, "next")
    mkdir(overlay, f"home/u/{name}")
    Exchange(overlay).make_way(os.fsencode(f"home/u/{name}/in"))
    (aside,) = bench.layer("kept").glob("home/u/n*.sessiond-old-1")
    assert aside.read_bytes() == b"kept"


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_kept_files_over_another_image(bench: KeptBench) -> None:
    """What is kept hides what the new image has there, of whatever type."""
    low = image(bench)
    overlay = bench.kept("/home/*/docs", "/home/u/file", "/home/u/other", "/home/u/untouched")
    write(overlay, "home/u/docs/mine", b"mine")
    write(overlay, "home/u/file", b"mine")
    unlink(overlay, "home/u/other")
    bench.close()
    shutil.rmtree(low / "home/u")
    (low / "home/u/file/in").mkdir(parents=True)
    (low / "home/u/docs").write_text("a file by now")
    (low / "home/u/other").mkdir()
    (low / "home/u/untouched").write_text("of the new image")
    overlay = bench.kept(
        *("/home/*/docs", "/home/u/file", "/home/u/other", "/home/u/untouched"), upper="second"
    )
    assert names(overlay, "home/u") == ["docs", "file", "untouched"]
    assert names(overlay, "home/u/docs") == ["mine"]
    assert contents(overlay, "home/u/file") == b"mine"
    assert contents(overlay, "home/u/untouched") == b"of the new image"
    bench.close()
    shutil.rmtree(low / "home")
    (low / "home").write_text("no directory any more")
    overlay = bench.kept("/home/*/docs", "/home/u/file", upper="third")
    assert names(overlay, "") == ["home"]  # out of reach; the log says so
    assert contents(overlay, "home") == b"no directory any more"
    bench.close()
    (low / "home").unlink()
    overlay = bench.kept("/home/*/docs", "/home/u/file", upper="fourth")
    assert contents(overlay, "home/u/docs/mine") == b"mine"  # a way has been made again


def test_what_is_discarded_is_what_nothing_names(bench: KeptBench) -> None:
    image(bench)
    overlay = bench.kept("/home/u/docs", "/home/u/other")
    mkdir(overlay, "home/u/docs/sub")
    for path in ("home/u/docs/sub/kept", "home/u/docs/gone", "home/u/other"):
        write(overlay, path, b"kept")
    Exchange(overlay).keep_paths(KeepRules(["/home/u/docs/sub/kept"]))
    assert overlay.view.keep is not None
    for path in (b"home/u/docs", b"home/u/other", b"home/u/nothing", b"home/u/other/in"):
        for aside in overlay.view.keep.discard(path):
            remove_tree(aside)
    assert overlay.view.keep.discard(b"home/u/docs/sub/kept") == []
    fs = bench.layer("kept") / "home/u"
    assert sorted(os.listdir(fs)) == ["docs"]
    assert os.listdir(fs / "docs") == ["sub"]
    assert (fs / "docs/sub/kept").read_text() == "kept"
    Exchange(overlay).keep_paths(KeepRules(["/home/u/docs/sub/kept", "/home/u/other"]))
    assert contents(overlay, "home/u/other") == b"of the image"


NAMES = ("a", "b", "c")
SEEDS = max(1, round(6 * factor()))
Shown: TypeAlias = "dict[str, tuple[int, int, bytes]]"
Change: TypeAlias = "Callable[[Overlay], object]"
RANDOM_RULES = ("/a/b", "/b", "/*/c")


class Walker:
    """Random changes, of which many fail, to one overlay or more: the same to all.

    What the first refuses because of a border, which others do not have, they are not asked for.
    """

    def __init__(self, seed: int, *overlays: Overlay) -> None:
        self.overlays = list(overlays)
        self.random = random.Random(seed)
        self.written = 0

    def path(self) -> str:
        return "/".join(self.random.choices(NAMES, k=self.random.randint(1, 3)))

    def step(self) -> None:
        self.written += 1
        make = self.random.choice(
            (self.write, self.write, self.mkdir, self.rename, self.remove, self.link, self.chmod)
        )
        change = make()
        outcomes = []
        for overlay in self.overlays:
            try:
                change(overlay)
            except OSError as error:
                outcomes.append(error.errno)
                if error.errno == errno.EXDEV:
                    return
            else:
                outcomes.append(0)
        assert len(set(outcomes)) == 1, outcomes

    def write(self) -> Change:
        path, text = self.path(), b"%d" % self.written
        return lambda overlay: write(overlay, path, text)

    def mkdir(self) -> Change:
        path = self.path()
        return lambda overlay: mkdir(overlay, path)

    def rename(self) -> Change:
        paths, flags = (self.path(), self.path()), self.random.choice((0, 0, RENAME_EXCHANGE))
        return lambda overlay: rename(overlay, *paths, flags)

    def link(self) -> Change:
        old, new = self.path(), self.path()
        return lambda overlay: overlay.link(find(overlay, old), *parent_of(overlay, new))

    def chmod(self) -> Change:
        path, mode = self.path(), self.random.randrange(0o1000)
        return lambda overlay: overlay.chmod(find(overlay, path), mode)

    def remove(self) -> Change:
        path = self.path()

        def remove(overlay: Overlay) -> None:
            if find(overlay, path).is_directory:
                overlay.rmdir(*parent_of(overlay, path))
            else:
                unlink(overlay, path)

        return remove


def shown(overlay: Overlay) -> Shown:
    """Return the merged view: mode, link count of files, and contents, by path."""
    found = {}
    pending = [""]
    while pending:
        path = pending.pop()
        node = find(overlay, path) if path else overlay.view.root
        stat_ = overlay.view.stat(node)
        links = 0 if node.is_directory else overlay.view.link_count(node, stat_)
        found[path] = (stat_.st_mode, links, b"" if node.is_directory else contents(overlay, path))
        if node.is_directory:
            pending += [f"{path}/{name}".lstrip("/") for name in names(overlay, path)]
    return found


def kept_part(overlay: Overlay) -> Shown:
    assert overlay.view.keep is not None
    rules = overlay.view.keep.rules
    return {path: what for path, what in shown(overlay).items() if rules.keep(os.fsencode(path))}


def random_image(bench: KeptBench) -> None:
    low = bench.layer("low")
    for path in ("a/b/a", "a/c", "b/a", "c/a/b", "c/c"):
        (low / path).mkdir(parents=True)
        (low / path / "c").write_text(f"of the image: {path}")


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("rules", [RANDOM_RULES, ("/*",), ("/*/*",), ()])
def test_what_is_kept_is_seen_as_if_it_were_not(
    bench: KeptBench, rules: tuple[str, ...], seed: int
) -> None:
    """But for EXDEV, programs see the same; what is kept is the same after a reset."""
    random_image(bench)
    overlay, other = bench.kept(*rules), bench.overlay("low", upper="other")
    walker = Walker(seed, overlay, other)
    untouched = shown(other)
    for _ in range(3):
        for _ in range(60):
            walker.step()
        assert shown(overlay) == shown(other)
    kept = kept_part(overlay)
    bench.close()
    overlay = bench.kept(*rules)
    assert kept_part(overlay) == kept
    bench.reset(overlay, "second")
    assert kept_part(overlay) == kept
    for path, what in shown(overlay).items():
        if path not in kept and path not in untouched:
            assert stat.S_ISDIR(what[0])
            assert any(one.startswith(f"{path}/") for one in kept)


@pytest.mark.parametrize("seed", range(2 * SEEDS))
def test_random_commits(bench: KeptBench, seed: int) -> None:
    """A commit changes nothing in the view; what was committed is the same after a reset."""
    random_image(bench)
    overlay = bench.kept()
    walker = Walker(seed, overlay)
    for times in range(4):
        for _ in range(40):
            walker.step()
        before = shown(overlay)
        with suppress(FileNotFoundError, NotADirectoryError):
            commit(overlay, walker.path())
        after = shown(overlay)
        assert without_links(after) == without_links(before)
        kept = kept_part(overlay)
        bench.reset(overlay, f"upper-{times}")
        assert kept_part(overlay) == kept


def commit_meanwhile(overlay: Overlay, walker: Walker, path: str) -> Shown:
    """Commit a path, and have programs change things between all that is copied.

    Return what the view was when the last had been changed.
    """
    keep, watch = overlay.view.keep, overlay.view.touched.watch()
    assert keep is not None
    going_on = True

    def cancelled() -> bool:
        if going_on and walker.random.random() < 0.5:
            walker.step()
        return False

    name = os.fsencode(path)
    try:
        Exchange(overlay).make_way(name)
        with closing(Commit(overlay.view.stack.copy(), keep, [name], cancelled)) as work:
            work.copy()
            for _ in range(walker.random.randrange(3)):
                walker.step()
                work.renew(overlay.view.stack.copy(), watch.take(), watch.take_identities())
            going_on = False
            before = shown(overlay)
            Exchange(overlay).make_way(name)
            work.renew(overlay.view.stack.copy(), watch.take(), watch.take_identities(), last=True)
            work.publish()
            Exchange(overlay).keep_paths(KeepRules((*keep.rules.rules, rule_for(name))))
            return before
    finally:
        overlay.view.touched.unwatch(watch)


@pytest.mark.parametrize("seed", range(2 * SEEDS))
@pytest.mark.parametrize("rules", [(), ("/b/a",), ("/*/b", "/a/c/c")])
def test_random_commits_while_programs_go_on(
    bench: KeptBench, rules: tuple[str, ...], seed: int
) -> None:
    """What is committed is what there is in the end, however that came about."""
    random_image(bench)
    overlay = bench.kept(*rules)
    walker = Walker(seed, overlay)
    for times in range(4):
        for _ in range(20):
            walker.step()
        with suppress(FileNotFoundError, NotADirectoryError):
            before = commit_meanwhile(overlay, walker, walker.path())
            assert without_links(shown(overlay)) == without_links(before)
        kept = kept_part(overlay)
        bench.reset(overlay, f"upper-{times}")
        assert kept_part(overlay) == kept


def without_links(view: Shown) -> dict[str, tuple[int, bytes]]:
    """Leave out the counts of links: over the border, a file is two."""
    return {path: (mode, text) for path, (mode, _, text) in view.items()}
