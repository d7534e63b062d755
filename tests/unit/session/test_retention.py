"""Which snapshots go by which rule."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from sessiond.session.model import (
    ImageSource,
    LayerNumber,
    SessionId,
    SessionRecord,
    SnapshotName,
    SnapshotRecord,
    SnapshotRules,
    StorageKind,
    Uid,
)
from sessiond.session.retention import (
    AUTOMATIC_LIMIT,
    Removal,
    outdated,
    to_make_room,
    too_large,
)

NOON = datetime(2026, 1, 2, 12).astimezone()


def layers(*numbers: int) -> tuple[LayerNumber, ...]:
    return tuple(map(LayerNumber, numbers))


def snapshot(name: str, *numbers: int, days: float = 0.0, **marks: bool) -> SnapshotRecord:
    """Made `days` after noon of some day; the marks are ``automatic`` and ``pinned``."""
    return SnapshotRecord(
        name=SnapshotName(name),
        created_at=NOON + timedelta(days=days),
        layers=layers(*numbers),
        **marks,
    )


def session(
    rule: SnapshotRules, snapshots: Collection[SnapshotRecord], *mounted: int
) -> SessionRecord:
    """A session whose view is built on the layers `mounted`."""
    return SessionRecord(
        id=SessionId("s"),
        user="root",
        uid=Uid(0),
        profile="p",
        source=ImageSource(path=Path("/image")),
        image="directory-0",
        mount_point=Path("/mnt"),
        nosuid=False,
        nodev=False,
        storage=StorageKind.TMPFS,
        snapshot_rules=rule,
        created_at=NOON,
        upper=LayerNumber(99),
        next_layer=LayerNumber(100),
        layers=layers(*mounted),
        snapshots=tuple(snapshots),
    )


def names(removals: list[Removal]) -> list[str]:
    return [one.snapshot.name for one in removals]


def test_without_a_rule_all_that_people_have_made_is_kept() -> None:
    made = [snapshot(f"s{number}", number) for number in range(1, 90)]
    assert outdated(session(SnapshotRules(), made)) == []
    assert too_large(session(SnapshotRules(), made), dict.fromkeys(layers(1, 2), 1 << 40)) == []


def test_without_a_rule_automatic_ones_are_kept_to_a_number() -> None:
    made = [snapshot("mine", 1)]
    made += [
        snapshot(f"a{number}", number, automatic=True) for number in range(2, AUTOMATIC_LIMIT + 4)
    ]
    assert names(outdated(session(SnapshotRules(), made))) == ["a2", "a3"]


@pytest.mark.parametrize(
    ("rule", "gone"),
    [
        (SnapshotRules(count=2), ["a", "b", "c", "d"]),
        (SnapshotRules(count=100), []),
        (SnapshotRules(daily=2), ["a", "b", "c", "e"]),
        (SnapshotRules(daily=100), ["a", "c", "e"]),
        (SnapshotRules(count=1, daily=3), ["a", "c", "e"]),
        (SnapshotRules(count=2, daily=3), ["a", "c"]),
    ],
)
def test_the_newest_and_the_last_of_days_are_kept(rule: SnapshotRules, gone: list[str]) -> None:
    made = [
        snapshot("a", 1),
        snapshot("b", 2, days=0.1),
        snapshot("c", 3, days=5),
        snapshot("pinned", 4, days=5, pinned=True),
        snapshot("d", 5, days=5.1),
        snapshot("e", 6, days=6),
        snapshot("f", 7, days=6.1, automatic=True),
    ]
    removals = outdated(session(rule, made))
    assert names(removals) == gone
    if gone and rule.count and not rule.daily:
        assert removals[0].reason == "it is not among those that count = 2 keeps"


def test_max_bytes_counts_what_snapshots_alone_keep() -> None:
    sizes = dict.fromkeys(layers(1, 2, 3, 4, 99), 100)
    made = [snapshot("a", 1), snapshot("b", 2, 1), snapshot("c", 3), snapshot("d", 4)]
    rule = SnapshotRules(max_bytes=200)
    assert names(too_large(session(rule, made, 1), sizes)) == ["b"]
    assert names(too_large(session(rule, made), sizes)) == ["b", "a"]
    assert names(too_large(session(rule, made, 2, 1), sizes)) == []
    pinned = [one.model_copy(update={"pinned": True}) for one in made[:3]]
    automatic = snapshot("e", 5, automatic=True)
    assert names(
        too_large(session(rule, [*pinned, made[3], automatic]), {**sizes, LayerNumber(5): 1})
    ) == ["e", "d"]


def test_none_goes_in_vain() -> None:
    """The older ones of a chain give nothing back, and are no reason to lose them."""
    chain = [snapshot("a", 1), snapshot("b", 2, 1), snapshot("c", 3, 2, 1)]
    rule = SnapshotRules(max_bytes=250)
    assert names(too_large(session(rule, chain), dict.fromkeys(layers(1, 2, 3), 100))) == ["c"]


def test_short_space_takes_the_oldest_automatic_one_that_gives_something_back() -> None:
    made = [
        snapshot("mine", 1),
        snapshot("pinned", 2, automatic=True, pinned=True),
        snapshot("mounted", 3, automatic=True),
        snapshot("old", 4, automatic=True),
        snapshot("new", 5, automatic=True),
    ]
    assert names(to_make_room(session(SnapshotRules(), made, 3))) == ["old"]
    assert to_make_room(session(SnapshotRules(count=1), made[:3], 3)) == []
