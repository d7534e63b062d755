"""The checker: what is wrong with uppers made by hand, what a repair does, and hostile uppers."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sessiond.overlay import lookup, syscalls
from sessiond.overlay.check.checker import Target, check
from sessiond.overlay.check.findings import Finding, Kind, Place, Severity
from sessiond.overlay.layer import Layer
from sessiond.overlay.lookup import Directory, Lower
from sessiond.overlay.origin import encode
from sessiond.overlay.stack import Stack
from tests.support import trees
from tests.support.checker import assert_clean
from tests.support.trees import Device, Dir, File, Link, Symlink, Tree, Whiteout

pytestmark = pytest.mark.root

LOWER: Tree = {
    "file": b"of lower",
    "link": Link("file"),
    "symlink": Symlink("file"),
    "d": {"x": b"", "sub": {"y": b""}},
    "e": {"z": b""},
}


@dataclass
class Case:
    """An upper with its workdir over two lowers, the upper one of them with little in it."""

    directory: Path

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    @property
    def work(self) -> Path:
        return self.directory / "work"

    @property
    def lowers(self) -> list[Path]:
        return [self.directory / "middle", self.directory / "lower"]

    def target(self, *, complete: bool = True, user_xattrs: bool = False) -> Target:
        lowers = self.lowers if complete else self.lowers[:1]
        return Target(
            os.fsencode(self.upper),
            os.fsencode(self.work),
            [os.fsencode(lower) for lower in lowers],
            complete=complete,
            user_xattrs=user_xattrs,
        )

    def findings(self, *, repair: bool = False, complete: bool = True) -> list[Finding]:
        return list(check(self.target(complete=complete), repair=repair))

    def origin(self, path: str) -> bytes:
        """The handle of an object of the lowest lower, as a copy of it has it."""
        layer = Layer.open(os.fsencode(self.lowers[1]), writable=False)
        try:
            value = encode(layer, layer.at(os.fsencode(path)))
        finally:
            layer.close()
        assert value is not None
        return value

    def index(self, path: str, *, nlink: bytes | None) -> Path:
        """Put a copy of a lower hard link into the index, and return it."""
        origin = self.origin(path)
        entry = self.work / "index" / origin.hex()
        entry.write_bytes(b"copy")
        mark(entry, "origin", origin)
        if nlink is not None:
            mark(entry, "nlink", nlink)
        return entry


@pytest.fixture
def case(tmp_path: Path) -> Iterable[Case]:
    case = Case(tmp_path)
    for path in (case.upper, case.work / "work", case.work / "index", *case.lowers):
        path.mkdir(parents=True)
    trees.build({"m": b""}, str(case.lowers[0]))
    trees.build(LOWER, str(case.lowers[1]))
    yield case
    # Deeper than what Python's own tree removal, and so pytest's, can take.
    subprocess.run(["rm", "-rf", tmp_path], check=True)


def mark(path: Path, name: str, value: bytes) -> None:
    os.setxattr(path, f"trusted.overlay.{name}", value, follow_symlinks=False)


def told(findings: list[Finding]) -> list[tuple[Kind, str]]:
    return sorted(((one.kind, os.fsdecode(one.path)) for one in findings), key=repr)


def build(tree: Tree) -> Callable[[Case], None]:
    return lambda case: trees.build(tree, str(case.upper))


def marked(**values: bytes) -> dict[str, bytes]:
    return {f"trusted.overlay.{name}": value for name, value in values.items()}


def renamed(target: bytes) -> Dir:
    return Dir({}, xattrs=marked(redirect=target))


def with_origin(source: str, tree: Tree, path: str) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        trees.build(tree, str(case.upper))
        mark(case.upper / path, "origin", case.origin(source))

    return make


def in_workdir(path: str, *, directory: bool = False) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        entry = case.work / path
        if entry.is_dir():
            entry.rmdir()
        entry.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            (entry / "a/b").mkdir(parents=True)
        else:
            entry.touch()

    return make


def indexed(nlink: bytes | None, names: tuple[str, ...] = ()) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        entry = case.index("file", nlink=nlink)
        for name in names:
            os.link(entry, case.upper / name)
        mark(case.upper, "impure", b"y")

    return make


def other_file_in_index(case: Case) -> None:
    entry = case.index("file", nlink=b"U+1")
    mark(entry, "origin", case.origin("d/x"))


def deleted_origin(case: Case) -> None:
    trees.build({"a": b"", "b": b""}, str(case.upper))
    mark(case.upper, "impure", b"y")
    for name in "ab":
        mark(case.upper / name, "origin", case.origin("d/x"))
    (case.lowers[1] / "d/x").unlink()
    (case.upper / "a").rename(case.upper / "c")  # in whatever order they come


IN_ORDER: dict[str, Callable[[Case], None]] = {
    "nothing": lambda case: None,
    "whiteouts": build({"file": Whiteout(), "d": {"sub": Whiteout(), "x": Whiteout()}}),
    "new": build({"new": {"file": b"", "null": Device(stat.S_IFCHR, 1, 3)}, "d": b""}),
    "opaque": build({"d": Dir({"x": b""}, opaque=True)}),
    "renamed": build({"f": renamed(b"/d"), "d": Whiteout(), "g": renamed(b"e"), "e": Whiteout()}),
    "renamed-inside": build(
        {
            "f": Dir(
                {"x": Whiteout(), "s": renamed(b"sub"), "sub": Whiteout()},
                xattrs=marked(redirect=b"/d"),
            ),
            "d": Whiteout(),
        }
    ),
    "about-to-be-renamed": build({"d": renamed(b"/d"), "e": renamed(b"e")}),
    "whiteouts-of-files": build(
        {"d": Dir({"x": File(b"", xattrs=marked(whiteout=b""))}, xattrs=marked(opaque=b"x"))}
    ),
    "metadata": build({"file": File(b"", hole=8, xattrs=marked(metacopy=b""))}),
    "metadata-renamed": build(
        {"g": File(b"", hole=8, xattrs=marked(metacopy=b"\0\4\0\0", redirect=b"/file"))}
    ),
    "unknown-origin": build({"file": File(b"", xattrs=marked(origin=b""))}),
    "hard-links": indexed(b"U-1", ("file", "link")),
    "hard-links-one-copied": indexed(b"L+0", ("file",)),
    "hard-links-none-copied": indexed(b"U+1"),
    "escaped": build({"file": File(b"", xattrs={"trusted.overlay.overlay.opaque": b"y"})}),
}


@pytest.mark.parametrize("make", IN_ORDER.values(), ids=IN_ORDER)
def test_what_is_in_order(case: Case, make: Callable[[Case], None]) -> None:
    make(case)
    assert told(case.findings()) == []


K = Kind
WRONG: dict[str, tuple[Callable[[Case], None], list[tuple[Kind, str]]]] = {
    "whiteout-over-nothing": (
        build(
            {
                "nothing": Whiteout(),
                "d": {"nothing": Whiteout(), "x": Whiteout()},
                "new": {"sub": {"x": Whiteout()}},
            }
        ),
        [
            (K.WHITEOUT_OVER_NOTHING, "d/nothing"),
            (K.WHITEOUT_OVER_NOTHING, "new/sub/x"),
            (K.WHITEOUT_OVER_NOTHING, "nothing"),
        ],
    ),
    "whiteout-in-opaque": (
        build({"d": Dir({"x": Whiteout(), "sub": {"x": Whiteout()}}, opaque=True)}),
        [(K.WHITEOUT_IN_OPAQUE, "d/x"), (K.WHITEOUT_IN_OPAQUE, "d/sub/x")],
    ),
    "whiteout-file-over-nothing": (
        build(
            {"d": Dir({"q": File(b"", xattrs=marked(whiteout=b""))}, xattrs=marked(opaque=b"x"))}
        ),
        [(K.WHITEOUT_OVER_NOTHING, "d/q")],
    ),
    "whiteout-ignored": (
        build({"d": {"x": File(b"", xattrs=marked(whiteout=b""))}}),
        [(K.WHITEOUT_IGNORED, "d/x")],
    ),
    "redirect-malformed": (
        build({"a": renamed(b"/../etc"), "b": renamed(b"d/sub"), "c": renamed(b"")}),
        [(K.REDIRECT_MALFORMED, "a"), (K.REDIRECT_MALFORMED, "b"), (K.REDIRECT_MALFORMED, "c")],
    ),
    "redirect-dangling": (
        build(
            {
                "a": renamed(b"/d/nothing"),
                "b": renamed(b"file"),
                "new": {"c": renamed(b"x")},
                "f": renamed(b"f"),
            }
        ),
        [
            (K.REDIRECT_DANGLING, "a"),
            (K.REDIRECT_DANGLING, "b"),
            (K.REDIRECT_DANGLING, "f"),
            (K.REDIRECT_DANGLING, "new/c"),
        ],
    ),
    "redirect-to-a-merged-directory": (
        build({"a": renamed(b"/d"), "d": {}}),
        [(K.REDIRECT_DUPLICATE, "a")],
    ),
    "redirect-origin-shown": (
        build({"a": renamed(b"/d/sub"), "b": renamed(b"e")}),
        [(K.REDIRECT_ORIGIN_SHOWN, "a"), (K.REDIRECT_ORIGIN_SHOWN, "b")],
    ),
    "metacopy-without-data": (
        build({"new": File(b"", xattrs=marked(metacopy=b""))}),
        [(K.METACOPY_WITHOUT_DATA, "new")],
    ),
    "metacopy-malformed": (
        build({"file": File(b"", xattrs=marked(metacopy=b"\1\4\0\0"))}),
        [(K.METACOPY_MALFORMED, "file")],
    ),
    "opaque-on-file": (
        build({"file": File(b"", xattrs=marked(opaque=b"y")), "symlink": Symlink("e")}),
        [(K.OPAQUE_ON_FILE, "file")],
    ),
    "attributes": (
        build(
            {
                "d": Dir({}, xattrs=marked(opaque=b"n", impure=b"")),
                "e": Dir({}, xattrs=marked(new=b"")),
                "file": File(b"", xattrs=marked(nlink=b"many")),
            }
        ),
        [
            (K.ATTRIBUTE_MALFORMED, "d"),
            (K.ATTRIBUTE_MALFORMED, "d"),
            (K.ATTRIBUTE_MALFORMED, "file"),
            (K.ATTRIBUTE_UNKNOWN, "e"),
        ],
    ),
    "origin-malformed": (
        build(
            {
                "d": Dir(
                    {"x": File(b"", xattrs=marked(origin=b"x" * 40))}, xattrs=marked(impure=b"y")
                )
            }
        ),
        [(K.ORIGIN_MALFORMED, "d/x")],
    ),
    "origin-wrong-type": (
        with_origin("file", {"d": Dir({"x": {}}, xattrs=marked(impure=b"y"))}, "d/x"),
        [(K.ORIGIN_WRONG_TYPE, "d/x")],
    ),
    "origin-gone": (deleted_origin, [(K.ORIGIN_GONE, "?")]),
    "impure-missing": (with_origin("d/x", {"d": {"x": b""}}, "d/x"), [(K.IMPURE_MISSING, "d")]),
    "impure-missing-of-the-root": (with_origin("d", {"d": {}}, "d"), [(K.IMPURE_MISSING, ".")]),
    "foreign": (
        build(
            {
                "d": {".wh.x": b"", ".wh..wh..opq": b"", ".wh..wh.aufs": b""},
                "a": File(b"", xattrs={"user.overlay.opaque": b"y"}),
                "b": File(b"", xattrs={"user.fuseoverlayfs.opaque": b"y"}),
            }
        ),
        [(K.FOREIGN_MARKS, "?"), (K.FOREIGN_MARKS, "a"), (K.FOREIGN_MARKS, "b")],
    ),
    "foreign-branch": (build({".wh..wh.aufs": b""}), [(K.FOREIGN_BRANCH, ".wh..wh.aufs")]),
    "volatile": (in_workdir("work/incompat/volatile"), [(K.VOLATILE, "work/incompat/volatile")]),
    "incompatible": (
        in_workdir("work/incompat/time-travel", directory=True),
        [(K.INCOMPATIBLE, "work/incompat/time-travel")],
    ),
    "workdir-leftover": (
        lambda case: (in_workdir("work/#1", directory=True)(case), in_workdir("index/#2")(case)),
        [(K.WORKDIR_LEFTOVER, "index/#2"), (K.WORKDIR_LEFTOVER, "work/#1")],
    ),
    "workdir-foreign": (in_workdir("mine", directory=True), [(K.WORKDIR_FOREIGN, "mine")]),
    "workdir-blocked": (
        lambda case: (in_workdir("work")(case), in_workdir("index")(case)),
        [(K.WORKDIR_BLOCKED, "index"), (K.WORKDIR_BLOCKED, "work")],
    ),
    "index-name": (in_workdir("index/cafe"), [(K.INDEX_NAME_MALFORMED, "index/cafe")]),
    "index-mismatch": (other_file_in_index, [(K.INDEX_MISMATCH, "index/?")]),
    "index-orphan": (indexed(b"U-1"), [(K.INDEX_ORPHAN, "index/?")]),
    "index-count-too-low": (indexed(b"U-2", ("file", "link")), [(K.INDEX_LINK_COUNT, "index/?")]),
    "index-count-too-high": (indexed(b"L+9", ("file",)), [(K.INDEX_LINK_COUNT, "index/?")]),
    "index-count-missing": (indexed(None, ("file",)), [(K.INDEX_LINK_COUNT, "index/?")]),
}


def expected(case: Case, found: list[tuple[Kind, str]]) -> list[tuple[Kind, str]]:
    """Fill in what is only known when the case is made."""
    file = case.origin("file").hex()
    return [(kind, path.replace("index/?", f"index/{file}")) for kind, path in found]


@pytest.mark.parametrize(("make", "wrong"), WRONG.values(), ids=WRONG)
def test_what_is_wrong(
    case: Case, make: Callable[[Case], None], wrong: list[tuple[Kind, str]]
) -> None:
    make(case)
    wrong = expected(case, wrong)
    before = trees.snapshot(str(case.directory))
    findings = case.findings()
    trees.assert_same(before, trees.snapshot(str(case.directory)), "looking has changed something")
    first = {one.path for one in findings if one.number > 1}
    shown = [(kind, "?" if os.fsencode(path) in first else path) for kind, path in told(findings)]
    assert sorted(shown, key=repr) == sorted(wrong, key=repr)
    assert not any(one.repaired for one in findings)

    mended = case.findings(repair=True)
    assert told(mended) == told(findings)
    assert all(one.repaired == bool(one.kind.description.repair) for one in mended)
    left = [one for one in findings if not one.kind.description.repair]
    assert told(case.findings(repair=True)) == told(left), "the second time there is nothing to do"


def test_every_kind_that_can_be_made_is() -> None:
    made = {kind for _, wrong in WRONG.values() for kind, _ in wrong}
    others = {Kind.UNREADABLE, Kind.MOUNT_POINT, Kind.INDEX_FOR_NFS}
    assert made | others == set(Kind)


WRONG_LOWERS: dict[str, Callable[[Case], None]] = {
    "origin": with_origin("d", {"e": Dir({}, xattrs=marked(impure=b"y"))}, "e"),
    "redirect": build({"a": Dir({"gone": Whiteout()}, xattrs=marked(redirect=b"/other"))}),
    "metacopy": build({"other": File(b"", xattrs=marked(metacopy=b""))}),
}


@pytest.mark.parametrize("make", WRONG_LOWERS.values(), ids=WRONG_LOWERS)
def test_whiteouts_stay_where_the_lowers_may_be_others(
    case: Case, make: Callable[[Case], None]
) -> None:
    make(case)
    mark(case.upper, "impure", b"y")
    os.mknod(case.upper / "hides", stat.S_IFCHR)
    trees.build({"opaque": Dir({"gone": Whiteout()}, opaque=True)}, str(case.upper))
    repaired = [one.path for one in case.findings(repair=True) if one.repaired]
    assert repaired == [b"opaque/gone"]
    assert (case.upper / "hides").lstat()


def test_two_directories_that_were_renamed_from_one(case: Case) -> None:
    trees.build({"a": renamed(b"/d"), "b": renamed(b"d"), "d": Whiteout()}, str(case.upper))
    (finding,) = case.findings()
    assert finding.kind is Kind.REDIRECT_DUPLICATE
    assert {os.fsdecode(finding.path), finding.detail} in ({"a", "as b"}, {"b", "as a"})


def test_whiteouts_and_redirects_over_several_lowers(case: Case) -> None:
    """`d` is `a` in the middle; what is in it goes on below."""
    trees.build({"a": renamed(b"/d"), "d": Whiteout()}, str(case.lowers[0]))
    trees.build(
        {"a": {"x": Whiteout(), "q": Whiteout()}, "b": renamed(b"/a/sub"), "e": Whiteout()},
        str(case.upper),
    )
    (case.upper / "a/sub").mkdir()
    mark(case.upper / "a/sub", "opaque", b"y")
    assert told(case.findings()) == [(Kind.WHITEOUT_OVER_NOTHING, "a/q")]


def test_without_all_lowers_nothing_is_said_of_what_they_may_have(case: Case) -> None:
    trees.build(
        {
            "d": {"x": Whiteout()},
            "a": renamed(b"/d"),
            "file": File(b"", xattrs=marked(metacopy=b"", origin=b"x" * 40)),
            "opaque": Dir({"w": Whiteout()}, opaque=True),
        },
        str(case.upper),
    )
    mark(case.upper, "impure", b"y")
    assert told(case.findings(complete=False, repair=True)) == [
        (Kind.ORIGIN_MALFORMED, "file"),
        (Kind.WHITEOUT_IN_OPAQUE, "opaque/w"),
    ]


def test_an_upper_of_userxattr(case: Case) -> None:
    trees.build({"d": Dir({"x": Whiteout()}, opaque=True)}, str(case.upper), xattr_namespace="user")
    findings = list(check(case.target(user_xattrs=True)))
    assert told(findings) == [(Kind.WHITEOUT_IN_OPAQUE, "d/x")]
    assert told(case.findings()) == [(Kind.FOREIGN_MARKS, "d")]


def test_the_index_of_nfs_export_is_left_alone(case: Case) -> None:
    name = case.origin("d").hex()
    (case.work / "index" / name).mkdir()
    assert told(case.findings(repair=True)) == [(Kind.INDEX_FOR_NFS, f"index/{name}")]


# Repair


def test_a_repair_is_not_noticed_in_the_view(case: Case) -> None:
    trees.build({"d": Dir({"gone": Whiteout()}, mtime_ns=1_000_000_001)}, str(case.upper))
    case.findings(repair=True)
    assert os.listdir(case.upper / "d") == []
    assert (case.upper / "d").stat().st_mtime_ns == 1_000_000_001


def test_what_cannot_be_repaired_is_told(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.build({"a": Whiteout(), "file": File(b"", xattrs=marked(opaque=b"y"))}, str(case.upper))

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(syscalls, "unlink", fail)
    by_kind = {one.kind: one for one in case.findings(repair=True)}
    assert by_kind[Kind.OPAQUE_ON_FILE].repaired
    assert not by_kind[Kind.WHITEOUT_OVER_NOTHING].repaired
    assert "Read-only file system" in by_kind[Kind.WHITEOUT_OVER_NOTHING].detail


@pytest.mark.parametrize("repair", [False, True])
def test_what_is_mounted_is_refused(case: Case, *, repair: bool) -> None:
    layer = Layer.open(os.fsencode(case.work), writable=True)
    lock = syscalls.lock(layer.root)
    try:
        with pytest.raises(OSError, match="in use by another mount of sessiond") as caught:
            case.findings(repair=repair)
    finally:
        os.close(lock)
        layer.close()
    assert caught.value.errno == errno.EBUSY
    assert case.findings(repair=repair) == []


def test_a_mount_in_the_course_is_noticed(case: Case) -> None:
    findings = check(case.target())
    trees.build({"gone": Whiteout()}, str(case.upper))
    next(findings)
    layer = Layer.open(os.fsencode(case.upper), writable=True)
    lock = syscalls.lock(layer.root)  # who only looks does not keep others from it
    with pytest.raises(OSError, match="in use"):
        list(findings)
    os.close(lock)
    layer.close()


def test_while_it_repairs_nobody_mounts(case: Case) -> None:
    trees.build({"gone": Whiteout()}, str(case.upper))
    findings = check(case.target(), repair=True)
    next(findings)
    layer = Layer.open(os.fsencode(case.upper), writable=True)
    with pytest.raises(BlockingIOError):
        syscalls.lock(layer.root)
    findings.close()  # type: ignore[attr-defined]
    os.close(syscalls.lock(layer.root))
    layer.close()


# Hostile uppers


def test_names_and_values_of_all_kinds(case: Case) -> None:
    for name in (b"new\nline", b"\xff\xfe", b"x" * 255, b"\x1b[2J"):
        os.mknod(os.fsencode(case.upper) + b"/" + name, stat.S_IFCHR, 0)
    findings = case.findings()
    assert {one.path for one in findings} == {b"new\nline", b"\xff\xfe", b"x" * 255, b"\x1b[2J"}
    case.findings(repair=True)
    assert os.listdir(case.upper) == []


def test_large_attributes_are_told_in_short(case: Case) -> None:
    (case.upper / "a").mkdir()
    value = b"/" + b"/".join([b"d"] * 1500)
    mark(case.upper / "a", "redirect", value)
    (finding,) = case.findings()
    assert finding.kind is Kind.REDIRECT_DANGLING
    assert len(finding.detail) < 500


def test_redirects_in_a_circle(case: Case) -> None:
    trees.build({"a": renamed(b"/b"), "b": renamed(b"/a")}, str(case.upper))
    trees.build({"a": renamed(b"/b"), "b": renamed(b"/a")}, str(case.lowers[0]))
    assert {one.kind.severity for one in case.findings()} <= {Severity.WARNING}


def test_a_tree_deeper_than_path_max(case: Case) -> None:
    """Merged at its top, and with findings at its end."""
    directory = os.open(case.upper, os.O_PATH)
    depth = 1200
    for name in [b"d", *[b"deep"] * depth]:
        os.mkdir(name, dir_fd=directory)
        directory, parent = os.open(name, os.O_PATH, dir_fd=directory), directory
        os.mknod(b"gone", stat.S_IFCHR, dir_fd=parent)
        os.close(parent)
    os.mknod(b"gone", stat.S_IFCHR, dir_fd=directory)
    os.close(directory)
    findings = case.findings(repair=True)
    assert len(findings) == depth + 2
    assert all(one.repaired for one in findings)
    assert max(len(one.path) for one in findings) > os.pathconf("/", "PC_PATH_MAX")
    assert case.findings() == []


def test_what_is_mounted_in_an_upper_is_not_looked_into(case: Case) -> None:
    (case.upper / "p").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "p", case.upper / "p"], check=True)
    try:
        os.mknod(case.upper / "p/gone", stat.S_IFCHR, 0)
        target = case.target()
        findings = list(check(target, repair=True))
        assert told(findings) == [(Kind.MOUNT_POINT, "p")]
        assert os.listdir(case.upper / "p") == ["gone"]
    finally:
        subprocess.run(["umount", case.upper / "p"], check=True)


def test_symbolic_links_lead_nowhere(case: Case, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    os.mknod(tmp_path / "outside/gone", stat.S_IFCHR, 0)
    (case.upper / "a").symlink_to(tmp_path / "outside")
    (case.work / "work/b").symlink_to(tmp_path / "outside")
    assert told(case.findings(repair=True)) == [(Kind.WORKDIR_LEFTOVER, "work/b")]
    assert os.listdir(tmp_path / "outside") == ["gone"]


def test_what_cannot_be_read_is_a_finding(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.build({"a": b"", "d": {"x": Whiteout()}, "e": {"gone": Whiteout()}}, str(case.upper))
    real = syscalls.listxattr

    def broken(at: syscalls.Object) -> list[bytes]:
        if isinstance(at, syscalls.At) and at.name in {b"a", b"d"}:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(at)

    monkeypatch.setattr(syscalls, "listxattr", broken)
    assert told(case.findings()) == [
        (Kind.UNREADABLE, "a"),
        (Kind.UNREADABLE, "d"),
        (Kind.WHITEOUT_OVER_NOTHING, "e/gone"),
    ]


def test_assert_clean_lets_pass_what_a_crash_leaves(case: Case) -> None:
    trees.build({"gone": Whiteout()}, str(case.upper))
    assert_clean(case.upper, case.work, case.lowers)
    trees.build({"a": renamed(b"/nowhere")}, str(case.upper))
    with pytest.raises(AssertionError, match="redirect-dangling"):
        assert_clean(case.upper, case.work, case.lowers)


def test_places(case: Case) -> None:
    trees.build({"gone": Whiteout()}, str(case.upper))
    (case.work / "work/x").touch()
    assert {one.path: one.place for one in case.findings()} == {
        b"gone": Place.UPPER,
        b"work/x": Place.WORKDIR,
    }


# Anything at all

NAMES = ("a", "b", "d", "e", "file", "gone", ".wh.x", "#1")
VALUES = (b"y", b"x", b"", b"/d", b"d", b"/d/sub", b"/a", b"..", b"U+1", b"L-1", b"\0\4\0\0")
ATTRIBUTES = ("opaque", "redirect", "origin", "impure", "nlink", "metacopy", "whiteout", "new")
EXAMPLES = int(40 * float(os.environ.get("SOAK", "1")))


def litter(top: Path, chance: random.Random, origins: list[bytes], depth: int = 0) -> None:
    """Fill a directory with objects that have marks at random."""
    for name in chance.sample(NAMES, chance.randint(1, 5)):
        path = top / name
        kind = chance.choice(["directory", "directory", "whiteout", "file", "empty", "symlink"])
        if kind == "directory" and depth < 4:
            path.mkdir()
            litter(path, chance, origins, depth + 1)
        elif kind == "whiteout":
            os.mknod(path, stat.S_IFCHR)
        elif kind == "symlink":
            path.symlink_to("/etc")
        else:
            path.write_bytes(b"" if kind == "empty" else b"contents")
        for attribute in ATTRIBUTES:
            if chance.random() < 0.15:
                mark(path, attribute, chance.choice([*VALUES, *origins, chance.randbytes(40)]))


def view(case: Case) -> dict[bytes, object]:
    """Return what the merged view shows: all but inode numbers."""
    stack = Stack.open([os.fsencode(path) for path in (case.upper, *case.lowers)])
    shown: dict[bytes, object] = {}

    def walk(directory: Directory, path: bytes, depth: int) -> None:
        for name in lookup.names(stack, directory):
            below = lookup.join(path, name)
            try:
                entry = lookup.lookup(stack, directory, name)
            except OSError as error:
                shown[below] = error.errno
                continue
            status = entry.stat
            shown[below] = (entry.positive, status.st_mode, status.st_size, status.st_mtime_ns)
            if entry.is_directory and depth < 12:
                walk(Directory(None, entry.lowers), below, depth + 1)

    roots = tuple(Lower(layer, b"", layer.may_hold_marks) for layer in stack.lowers)
    try:
        walk(Directory(None, roots), b"", 0)
    finally:
        stack.close()
    return shown


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_a_repair_never_changes_the_view(case: Case, seed: int) -> None:
    chance = random.Random(seed)
    origins = [case.origin(path) for path in ("d", "file", "d/sub", "symlink")]
    litter(case.upper, chance, origins)
    litter(case.work / "index", chance, origins)
    litter(case.work / "work", chance, origins)
    before = view(case)
    looked = case.findings()
    repaired = case.findings(repair=True)
    assert view(case) == before
    assert len(looked) == len(repaired)
    again = case.findings(repair=True)
    assert not [one for one in again if one.repaired], "the second time there is nothing to do"
    assert {one.kind for one in again} <= {one.kind for one in repaired}
