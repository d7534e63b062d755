"""Swaps of the stack, by a worker that dies in them: files that are being written lose nothing."""

from __future__ import annotations

import os
from itertools import count

import pytest

from sessiond.overlay.exchange import Exchange
from sessiond.overlay.overlay import Overlay
from tests.crash.layers import Bench, assert_name_by_name
from tests.crash.selection import sample
from tests.crash.writers import WRITTEN, Writers, stack_of, view_of
from tests.support import core_views, fault_points, trees
from tests.support.core_views import find
from tests.support.mounts import Layers


@pytest.fixture(scope="module")
def bench(scratch: str) -> Bench:
    return Bench.make(scratch)


@pytest.mark.parametrize(
    "written", sample(["indexed", "new", "plain", "copied", "pair", "hard"], 4)
)
def test_snapshot(bench: Bench, written: str) -> None:
    for point in count():
        old = bench.make_layers()
        with bench.overlay(old) as overlay:  # what is to be written is in the upper already
            overlay.make_writable(find(overlay, written))
        before = view_of(stack_of(old, bench), bench)
        new = bench.make_layers(empty=True)

        def open_files(old: Layers = old) -> Overlay:
            programs = Writers()
            overlay = Overlay(stack_of(old, bench), programs)
            programs.open(overlay, written)
            return overlay

        def push(overlay: Overlay, new: Layers = new, old: Layers = old) -> None:
            Exchange(overlay).swap(stack_of(new, bench, old))

        lived = fault_points.run(push, open_files, die_at=point)
        # The manager has recorded the new stack, and goes back to the old one if the worker dies.
        for found in (
            view_of(stack_of(new, bench, old), bench),
            view_of(stack_of(old, bench), bench),
        ):
            what = f"killed before change {point}, {lived.calls[-1]}"
            # The names of a file are exchanged one after another.
            assert_name_by_name(before, before, found, what)
        if not lived.died:
            break


@pytest.mark.parametrize(
    "written", ["new", "plain", "copied", "pair", "hard", "indexed", "lower/indexed"]
)
def test_a_snapshot_stays_as_it_is(bench: Bench, written: str) -> None:
    old, new, restored = (
        bench.make_layers(),
        bench.make_layers(empty=True),
        bench.make_layers(empty=True),
    )
    programs = Writers()
    overlay = Overlay(stack_of(old, bench), programs)
    file = programs.open(overlay, written)
    frozen = core_views.snapshot(overlay, recent_ns=bench.start_ns)
    Exchange(overlay).swap(stack_of(new, bench, old))
    os.pwrite(file, WRITTEN, 0)
    overlay.chmod(find(overlay, written), 0o600)
    live = core_views.snapshot(overlay, recent_ns=bench.start_ns)
    assert core_views.contents(overlay, find(overlay, written)).startswith(WRITTEN)
    overlay.close()
    trees.assert_same(live, view_of(stack_of(new, bench, old), bench), "the new layer")
    trees.assert_same(frozen, view_of(stack_of(restored, bench, old), bench), "the snapshot")


@pytest.mark.parametrize("written", sample(["indexed", "new", "copied", "pair"], 3))
def test_contents_that_are_kept(bench: Bench, written: str) -> None:
    for point in count():
        old = bench.make_layers()
        moved = bench.copy(old, bench.directory)
        before = view_of(stack_of(moved, bench), bench)

        def move(old: Layers = old, moved: Layers = moved) -> Overlay:
            programs = Writers()
            overlay = Overlay(stack_of(old, bench), programs)
            file = programs.open(overlay, written)
            Exchange(overlay).swap(stack_of(moved, bench), moved=True)
            os.pwrite(file, WRITTEN * 1000, 0)
            return overlay

        lived = fault_points.run(
            lambda overlay: overlay.pending.renew(find(overlay, written)), move, die_at=point
        )
        found = view_of(stack_of(moved, bench), bench)
        if not lived.died:
            assert found[written.encode()].size == len(WRITTEN) * 1000
            break
        content = found[written.encode()]
        assert content.size in (before[written.encode()].size, len(WRITTEN) * 1000), lived
        assert content.mtime_ns == trees.RECENT or content == before[written.encode()]
