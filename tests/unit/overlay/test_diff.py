"""Differences between any two points of a session, compared with what the views themselves show."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from sessiond.overlay.diff import Change, ChangeKind, changes
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack
from tests.support import core_views
from tests.support.trees import Entry, Snapshot
from tests.unit.overlay.conftest import Bench, new_directory, new_file

pytestmark = pytest.mark.root

_NAMES = ("a", "b", "c")
_OPERATIONS = 40


@dataclass
class _Session:
    """What a session does with layers: an upper is committed, and its number is not used again."""

    bench: Bench
    layers: tuple[str, ...] = ("low",)
    last: int = 0
    points: list[tuple[str, ...]] = field(default_factory=list)

    def write(self, chance: random.Random) -> None:
        """Change the view at random, and keep the result as a point."""
        self.last += 1
        upper = f"upper{self.last}"
        overlay = self.bench.overlay(*self.layers, upper=upper)
        for _ in range(_OPERATIONS):
            with suppress(OSError):
                _change(overlay, chance)
        self.bench.close()
        self.layers = (upper, *self.layers)
        self.points.append(self.layers)

    def stack(self, point: tuple[str, ...]) -> Stack:
        indexes = [os.fsencode(self.bench.directory / f"{name}-work/index") for name in point[:-1]]
        return Stack.open([os.fsencode(self.bench.layer(name)) for name in point], indexes=indexes)


def _change(overlay: Overlay, chance: random.Random) -> None:
    def place() -> tuple[str, bytes]:
        directory = "/".join(chance.choices(_NAMES, k=chance.randrange(3)))
        return directory, os.fsencode(chance.choice(_NAMES))

    directory, name = place()
    parent = core_views.find(overlay, directory)
    match chance.randrange(8):
        case 0 | 1:
            overlay.create(parent, name, new_directory())
        case 2 | 3:
            node, _ = overlay.create_file(parent, name, new_file())
            overlay.write(node, chance.randbytes(3), 0)
            overlay.utime(node, 1, 1)
            overlay.release_file(node)
        case 4:
            node, _ = overlay.view.lookup(parent, name)
            overlay.open_file(node, write=True)
            overlay.write(node, chance.choice([b"x", b"y"]), 0)
            overlay.utime(node, 1, 1)
            overlay.release_file(node)
        case 5:
            overlay.chmod(overlay.view.lookup(parent, name)[0], chance.choice([0o600, 0o755]))
        case 6:
            node, _ = overlay.view.lookup(parent, name)
            (overlay.rmdir if node.is_directory else overlay.unlink)(parent, name)
        case _:
            other, new_name = place()
            overlay.rename((parent, name), (core_views.find(overlay, other), new_name))


def _assert_explained(before: Snapshot, now: Snapshot, found: list[Change]) -> None:
    """What was before, with the changes made to it, has to be what is now; none is in vain."""
    changed = {(change.path, change.kind is ChangeKind.DELETED): change for change in found}
    assert len(changed) == len(found)
    renames = {one.source: one for one in found if one.source is not None}
    assert len(renames) == sum(one.kind is ChangeKind.RENAMED for one in found)
    unexplained, vain = dict(now), set(changed)
    for source, entry in before.items():
        path = _followed(source, renames, changed)
        if path is None:
            continue
        one = renames.get(source) or changed.get((path, False))
        told = (one.also if one.kind is ChangeKind.RENAMED else one.kind) if one else None
        assert told == _difference(entry, unexplained.pop(path)), (source, path)
        vain.discard((path, False))
        if one is not None:
            assert (one.size, one.old_size) == (_size(now[path]), _size(entry))
    for path, entry in unexplained.items():
        one = changed[path, False]
        assert (one.kind, one.size, one.old_size) == (ChangeKind.ADDED, _size(entry), 0)
        vain.discard((path, False))
    assert all(is_deleted for _, is_deleted in vain)


def _followed(
    source: bytes, renames: dict[bytes, Change], changed: dict[tuple[bytes, bool], Change]
) -> bytes | None:
    """Return where something is now; None if it, or a directory that it was in, is gone."""
    path = walked = b""
    gone = False
    for name in source.split(b"/"):
        walked = walked + b"/" + name if walked else name
        path = path + b"/" + name if path else name
        if walked in renames:
            path, gone = renames[walked].path, False
            continue
        kept = changed.get((path, False))
        gone |= (path, True) in changed
        if walked != source:
            gone |= kept is not None and kept.kind in {ChangeKind.TYPE, ChangeKind.ADDED}
    return None if gone else path


def _difference(old: Entry, new: Entry) -> ChangeKind | None:
    if old.kind != new.kind:
        return ChangeKind.TYPE
    if (old.digest, old.target) != (new.digest, new.target):
        return ChangeKind.CONTENTS
    return ChangeKind.METADATA if _metadata(old) != _metadata(new) else None


def _size(entry: Entry) -> int:
    return entry.size if entry.kind == "file" else 0


def _metadata(entry: Entry) -> tuple[object, ...]:
    time = 0 if entry.kind == "directory" else entry.mtime_ns
    return entry.mode, entry.uid, entry.gid, time, entry.xattrs


@pytest.mark.parametrize("seed", range(8))
def test_any_two_points_are_compared_as_they_show_themselves(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    session = _Session(bench)
    low = bench.layer("low")
    for number in range(12):
        directory = low.joinpath(*chance.choices(_NAMES, k=chance.randrange(3)))
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / chance.choice(_NAMES)).write_bytes(b"%d" % number)
    session.points.append(session.layers)
    for _ in range(3):
        session.write(chance)
    session.layers = session.points[chance.randrange(3)]  # restored, or reset
    for _ in range(2):
        session.write(chance)
    views = {}
    for point in session.points:
        overlay = Overlay(session.stack(point))
        views[point] = core_views.snapshot(overlay, recent_ns=1 << 63)
        overlay.close()
    for base in session.points:
        for point in session.points:
            stack, other = session.stack(point), session.stack(base)
            found = list(changes(stack, other))
            stack.close()
            other.close()
            _assert_explained(views[base], views[point], found)
