"""Sums of what differs below each directory."""

from __future__ import annotations

from sessiond.overlay.by_directory import ByDirectory, DirectorySums


def test_what_is_below_counts_for_all_above_down_to_a_depth() -> None:
    sums = ByDirectory(10, 2)
    sums.add(b"home/alice/.cache/browser", (3, 0), 3000)
    sums.add(b"home/alice", (1, 0), 500)
    sums.add(b"home/bob", (0, 2), 0)
    sums.add(b"", (1, 0), 7)
    assert sums.largest() == (
        DirectorySums(b"", (5, 2), 3507),
        DirectorySums(b"home", (4, 2), 3500),
        DirectorySums(b"home/alice", (4, 0), 3500),
        DirectorySums(b"home/bob", (0, 2), 0),
    )


def test_the_largest_come_first_and_after_those_above_them() -> None:
    sums = ByDirectory(3, 99)
    for path in (b"z/y/x", b"a", b"b/c"):
        sums.add(path, (1,), 10)
    sums.add(b"b", (1,), 5)
    assert [one.path for one in sums.largest()] == [b"", b"b", b"a"]
    assert [one.path for one in ByDirectory(5, 1).largest()] == []


def test_what_is_taken_back_is_nothing() -> None:
    sums = ByDirectory(10, 0)
    sums.add(b"a/b", (1, 0), 0)
    sums.add(b"a", (-1, 0), 0)
    assert sums.largest() == ()
