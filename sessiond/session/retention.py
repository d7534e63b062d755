"""Which snapshots are deleted by themselves, and why.

Never one that is pinned, and one that a person has made only by a rule of the profile. A deleted
snapshot is but a name less: what the merged view is built on stays in any case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from itertools import chain
from typing import NamedTuple

from sessiond.session.model import (
    LayerNumber,
    SessionRecord,
    SnapshotRecord,
)

AUTOMATIC_LIMIT = 8
"""Automatic snapshots that are kept where no rule says how many."""


class Removal(NamedTuple):
    """A snapshot that is deleted."""

    snapshot: SnapshotRecord
    reason: str
    """A clause for the log; empty if somebody has asked for it."""


def outdated(record: SessionRecord) -> list[Removal]:
    """Return what `count` and `daily` do not keep, oldest first."""
    rule = record.snapshot_rules
    free = [one for one in record.snapshots if not one.pinned]
    if rule.count is None and rule.daily is None:
        automatic = [one for one in free if one.automatic]
        reason = f"there are {AUTOMATIC_LIMIT} newer automatic ones, and no rule asks for more"
        return [Removal(one, reason) for one in automatic[:-AUTOMATIC_LIMIT]]
    kept = [one.name for one in free[-rule.count :]] if rule.count else []
    kept += [one.name for one in _last_of_days(free, rule.daily or 0)]
    rules = " and ".join(
        f"{key} = {value}" for key, value in (("count", rule.count), ("daily", rule.daily)) if value
    )
    return [
        Removal(one, f"it is not among those that {rules} keeps")
        for one in free
        if one.name not in kept
    ]


def _last_of_days(snapshots: Iterable[SnapshotRecord], days: int) -> list[SnapshotRecord]:
    last: dict[date, SnapshotRecord] = {}
    for snapshot in snapshots:  # in the machine's time zone, which is that of its people
        last[snapshot.created_at.astimezone().date()] = snapshot
    return [last[day] for day in sorted(last)[-days:]] if days else []


def too_large(record: SessionRecord, sizes: Mapping[LayerNumber, int]) -> list[Removal]:
    """Return what has to go for the rest to take no more than `max_bytes`.

    Automatic ones go first, and older ones before newer ones, but none that gives nothing back.
    """
    most = record.snapshot_rules.max_bytes
    removals: list[Removal] = []
    while most is not None and (taken := _taken(record, sizes)) > most:
        victim = next(_givers(record), None)
        if victim is None:
            break
        reason = f"snapshots take {taken} bytes, and max_bytes is {most}"
        removals.append(Removal(victim, reason))
        record = record.without_snapshots([victim])
    return removals


def to_make_room(record: SessionRecord) -> list[Removal]:
    """Return the snapshot to go when space is short: the oldest automatic one."""
    victim = next((one for one in _givers(record) if one.automatic), None)
    return [] if victim is None else [Removal(victim, "it is automatic, and space is short")]


def _taken(record: SessionRecord, sizes: Mapping[LayerNumber, int]) -> int:
    """Return the bytes that would be given back if there were no snapshots."""
    mounted = {record.upper, *record.layers}
    return sum(sizes.get(number, 0) for number in record.all_layers - mounted)


def _givers(record: SessionRecord) -> Iterator[SnapshotRecord]:
    """Return those that give something back, and may go: automatic ones first, older ones first."""
    uses = users(record)
    for one in sorted(record.snapshots, key=lambda one: not one.automatic):
        if not one.pinned and exclusive(one, uses):
            yield one


def users(record: SessionRecord) -> Counter[LayerNumber]:
    """Return how many need each layer: of the snapshots, and the merged view."""
    return Counter(chain(*(one.layers for one in record.snapshots), record.layers))


def exclusive(snapshot: SnapshotRecord, uses: Mapping[LayerNumber, int]) -> list[LayerNumber]:
    """Return the layers that are deleted with `snapshot`."""
    return [number for number in snapshot.layers if uses[number] == 1]
