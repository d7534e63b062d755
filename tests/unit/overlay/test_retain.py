"""What one reset leaves as it is, in the core."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.keep_rules import KeepRules
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.layer import Layer
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.retain import Retain
from sessiond.overlay.tally import Tally
from tests.support import core_views, trees
from tests.support.fuzzing import fuzz
from tests.support.trees import Entry, Snapshot
from tests.unit.overlay.conftest import Bench, contents, find, names, new_directory, new_file
from tests.unit.overlay.test_tally import ACTIONS, IMAGE, PATHS, Session, Step

pytestmark = pytest.mark.root


def reset(bench: Bench, overlay: Overlay, upper: str, *paths: str) -> None:
    """Do what the manager has a worker do."""
    work = retaining(bench, overlay, upper, *paths)
    work.run()
    Exchange(overlay).swap(bench.stack("image", upper=upper))
    work.settle()
    work.close()


def retaining(bench: Bench, overlay: Overlay, upper: str, *paths: str) -> Retain:
    target = Layer.open(os.fsencode(bench.layer(upper)), writable=True)
    wanted = [os.fsencode(path) for path in paths]
    return Retain(overlay.view.stack.copy(), target, KeepRules(), wanted, lambda: False)


def write(overlay: Overlay, path: str, text: bytes) -> None:
    parent, _, name = path.rpartition("/")
    node, _ = overlay.create_file(core_views.find(overlay, parent), os.fsencode(name), new_file())
    overlay.write(node, text, 0)
    overlay.release_file(node)


def mkdir(overlay: Overlay, path: str) -> None:
    parent, _, name = path.rpartition("/")
    overlay.create(core_views.find(overlay, parent), os.fsencode(name), new_directory(0o040750))


def test_paths_stay_and_all_else_is_reset(bench: Bench) -> None:
    trees.build(
        {"etc": {"passwd": b"image", "gone": b"image"}, "home": {"guest": {"old": b"image"}}},
        str(bench.layer("image")),
    )
    overlay = bench.overlay("image", upper="first")
    for path in ("home/guest/docs", "home/alice", "home/alice/mail"):
        mkdir(overlay, path)
    write(overlay, "home/guest/docs/letter", b"mine")
    write(overlay, "home/guest/draft", b"lost")
    write(overlay, "home/alice/mail/inbox", b"hers")
    write(overlay, "home/alice/mail/other", b"lost")
    overlay.unlink(find(overlay, "etc"), b"gone")
    kept = ("home/guest/docs", "home/alice/mail/inbox", "etc/gone", "etc/passwd", "not/there")
    for upper in ("second", "third"):
        reset(bench, overlay, upper, *kept)
        assert names(overlay) == ["etc", "home"]
        assert names(overlay, "etc") == ["passwd"]
        assert names(overlay, "home/guest") == ["docs", "old"]
        assert contents(overlay, "home/guest/docs/letter") == b"mine"
        assert names(overlay, "home/alice") == ["mail"]
        assert names(overlay, "home/alice/mail") == ["inbox"]
        assert overlay.view.stat(find(overlay, "home/alice")).st_mode & 0o7777 == 0o750
    assert os.listdir(bench.layer("first") / "home/guest/docs") == []
    reset(bench, overlay, "fourth")
    assert names(overlay, "etc") == ["gone", "passwd"]
    assert names(overlay, "home") == ["guest"]


def test_a_file_goes_on_as_the_same_file(bench: Bench) -> None:
    trees.build({"file": b"image"}, str(bench.layer("image")))
    overlay = bench.overlay("image", upper="first")
    write(overlay, "new", b"new")
    opened = find(overlay, "file")
    overlay.open_file(opened, write=True)
    overlay.write(opened, b"IMAGE", 0)
    inode = (bench.layer("first") / "file").stat().st_ino
    reset(bench, overlay, "second", "file", "new")
    overlay.write(overlay.view.node(opened.number), b"!", 5)
    overlay.release_file(overlay.view.node(opened.number))
    assert contents(overlay, "file") == b"IMAGE!"
    stat = (bench.layer("second") / "file").stat()
    assert (stat.st_ino, stat.st_nlink) == (inode, 1)


def test_what_a_snapshot_has_is_copied(bench: Bench) -> None:
    trees.build({"file": b"image"}, str(bench.layer("image")))
    overlay = bench.overlay("image", upper="first")
    write(overlay, "new", b"of the snapshot")
    Exchange(overlay).swap(bench.stack("first", "image", upper="second"))
    reset(bench, overlay, "third", "new")
    node = find(overlay, "new")
    overlay.open_file(node, write=True)
    overlay.write(node, b"changed", 0)
    overlay.release_file(node)
    assert (bench.layer("first") / "new").read_bytes() == b"of the snapshot"
    assert contents(overlay, "new") == b"changedsnapshot"


def test_a_name_too_many_harms_nothing(bench: Bench) -> None:
    """Who dies between the two leaves it, and may serve the former upper on."""
    trees.build({}, str(bench.layer("image")))
    overlay = bench.overlay("image", upper="first")
    write(overlay, "new", b"new")
    with_two = retaining(bench, overlay, "second", "new")
    with_two.run()
    with_two.close()
    assert contents(overlay, "new") == b"new"
    reset(bench, overlay, "third", "new")  # copied: it has several names
    assert contents(overlay, "new") == b"new"


def test_a_full_upper_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.build({}, str(bench.layer("image")))
    overlay = bench.overlay("image", upper="first")
    write(overlay, "new", b"new")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sessiond.overlay.syscalls.link", full)
    work = retaining(bench, overlay, "second", "new")
    with pytest.raises(OSError, match="No space"):
        work.run()
    work.close()
    assert contents(overlay, "new") == b"new"


WITHOUT_LINKS = {**IMAGE, "c": {"a": b"3", "b": b"22", "c": {}}}
"""A hard link of the image that was changed under one name is not known under another."""
paths = st.lists(st.sampled_from(PATHS), min_size=1, max_size=3, unique=True)
CHANGES = [action for action in ACTIONS if action not in {"reset", "count"}]
steps = st.builds(Step, st.sampled_from(CHANGES), st.sampled_from(PATHS), st.sampled_from(PATHS))


@fuzz(25)
@given(st.lists(steps, min_size=5, max_size=25), paths)
def test_after_any_changes_paths_stay_as_they_are(sequence: list[Step], kept: list[str]) -> None:
    directory = Path(tempfile.mkdtemp())
    bench = Bench(directory)
    try:
        trees.build(WITHOUT_LINKS, str(bench.layer("image")))
        pristine = shown(bench.overlay("image", upper="pristine"))
        overlay = bench.overlay("image", upper="upper1")
        session = Session(bench, overlay, Tally())
        for step in sequence:
            session.do(step)
        before = shown(overlay)
        session.forget("", "")
        reset(bench, overlay, "last", *kept)
        check(pristine, before, shown(overlay), [os.fsencode(path) for path in kept])
    finally:
        bench.close()
        shutil.rmtree(directory)


def shown(overlay: Overlay) -> Snapshot:
    return core_views.snapshot(overlay, recent_ns=1 << 62)


def check(pristine: Snapshot, before: Snapshot, after: Snapshot, kept: list[bytes]) -> None:
    ways = {b"."} | {path.rpartition(b"/")[0] for path in kept}
    ways |= {path.rpartition(b"/")[0] for path in ways}
    for path in pristine.keys() | before.keys() | after.keys():
        inside = any((path + b"/").startswith(one + b"/") for one in kept)
        if path in ways and not inside:
            continue
        source = before if inside else pristine
        assert by_itself(after.get(path)) == by_itself(source.get(path)), path


def by_itself(entry: Entry | None) -> Entry | None:
    """Without its other names, which may be gone."""
    return entry and entry._replace(links=(), nlink=0)
