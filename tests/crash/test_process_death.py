"""Each operation, by a process that dies before and after each call that changes the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path

import pytest

from sessiond.overlay import syscalls
from sessiond.overlay.orphans import Orphans
from sessiond.overlay.overlay import Overlay
from tests.crash.layers import Bench, assert_one_of, top_of, without_links
from tests.crash.operations import (
    FILES,
    SPECIAL,
    Operation,
    metacopy_operations,
    operations,
    place,
)
from tests.crash.selection import sample
from tests.crash.writers import Writers, stack_of
from tests.support import fault_points
from tests.support.core_views import find
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.trees import Snapshot

OPERATIONS = list(operations())


def name_of(operation: Operation) -> str:
    return operation.name


@pytest.fixture(scope="module")
def bench(scratch: str) -> Bench:
    return Bench.make(scratch)


def die_everywhere(
    operation: Operation,
    make: Callable[[], AbstractContextManager[Layers]],
    start: Callable[[Layers], Overlay],
    find_out: Callable[[Layers, str], Snapshot],
) -> None:
    """Fail unless `operation` leaves one of two states, wherever its process dies.

    `make` provides layers, `start` is what the process does first, and `find_out` returns the state
    of layers, in which there may be one superfluous whiteout.
    """
    with make() as layers:
        before = find_out(layers, "")
    with make() as layers:
        whole = fault_points.run(operation.run, lambda: start(layers))
        after = find_out(layers, "")
    assert after != before
    for point, call in enumerate(whole.calls):
        with make() as layers:
            lived = fault_points.run(operation.run, lambda: start(layers), die_at=point)
            assert lived.died
            found = find_out(layers, operation.spare_whiteout)
        assert_one_of(before, after, found, f"killed before change {point}, {call}")


@pytest.mark.parametrize("operation", sample(OPERATIONS, 27), ids=name_of)
def test_operation(bench: Bench, operation: Operation) -> None:
    die_everywhere(operation, bench.layers, bench.open, bench.found)


@pytest.fixture
def no_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lowers on a file system without file handles, where a copy-up ends hard links."""
    monkeypatch.setattr(syscalls, "file_handle", lambda _: None)


@pytest.mark.soak
@pytest.mark.usefixtures("no_handles")
@pytest.mark.parametrize("operation", OPERATIONS[::7], ids=name_of)
def test_operation_without_index(bench: Bench, operation: Operation) -> None:
    def find_out(layers: Layers, spare_whiteout: str) -> Snapshot:
        return without_links(bench.found_here(layers, spare_whiteout))

    die_everywhere(operation, bench.layers, bench.open, find_out)


def of_open_files() -> list[Operation]:
    """Return those that remove the file that they name last."""
    found = []
    for operation in OPERATIONS:
        verb, *_, last = operation.name.split()
        if verb in {"unlink", "rename"} and last in FILES and last not in SPECIAL:
            found.append(operation)
    return found


@pytest.mark.parametrize("operation", sample(of_open_files(), 31), ids=name_of)
def test_operation_that_removes_an_open_file(bench: Bench, operation: Operation) -> None:
    """For a successor of its process, an open file gets a name among the orphans."""
    path = operation.name.split()[-1]

    @contextmanager
    def make() -> Iterator[Layers]:
        with bench.layers() as layers:
            with bench.overlay(layers) as overlay:
                overlay.make_writable(find(overlay, path))
            os.mkdir(f"{top_of(layers)}/orphans")
            yield layers

    def orphans(layers: Layers) -> Orphans:
        return Orphans(os.fsencode(f"{top_of(layers)}/orphans"))

    def start(layers: Layers) -> Overlay:
        programs = Writers(recorded=True)
        overlay = Overlay(stack_of(layers, bench), programs)
        overlay.view.stack.orphans = orphans(layers)
        programs.open(overlay, path)
        return overlay

    def find_out(layers: Layers, spare_whiteout: str) -> Snapshot:
        orphans(layers).remove_others(())  # as who mounts without being a successor
        return bench.found(layers, spare_whiteout)

    die_everywhere(operation, make, start, find_out)


@pytest.mark.parametrize("operation", sample(list(metacopy_operations()), 4), ids=name_of)
def test_operation_on_a_metadata_only_copy(
    bench: Bench, tmp_path: Path, operation: Operation
) -> None:
    """The kernel makes these, if it is told to; they are completed in place."""
    options = ("metacopy=on", "redirect_dir=on", "index=on")

    @contextmanager
    def make() -> Iterator[Layers]:
        with bench.layers() as layers:
            with KernelOverlay().mounted(layers, str(tmp_path), *options):
                for path in ("plain", "hard"):
                    os.chown(f"{tmp_path}/{path}", 21, 22)
            yield layers

    def find_out(layers: Layers, spare_whiteout: str) -> Snapshot:
        """Without times, which completing a copy changes and sets back."""
        found = bench.found_here(layers, spare_whiteout)
        return {path: entry._replace(mtime_ns=0) for path, entry in found.items()}

    die_everywhere(operation, make, bench.open, find_out)


@pytest.mark.parametrize("name", ["chmod deep/er/file", "rename merged to emptied", "unlink last"])
def test_mount(bench: Bench, name: str) -> None:
    """What cleans up after a death dies, too."""
    (interrupted,) = [operation for operation in OPERATIONS if operation.name == name]
    with bench.layers() as layers:
        before = bench.found(layers)
    with bench.layers() as layers:
        whole = fault_points.run(interrupted.run, lambda: bench.open(layers))
        after = bench.found(layers)
    for point in count():
        first = len(whole.calls) - 1 - point % len(whole.calls)
        with bench.layers() as layers:
            fault_points.run(interrupted.run, lambda: bench.open(layers), die_at=first)
            lived = fault_points.run(lambda _: bench.open(layers), lambda: None, die_at=point)
            found = bench.found(layers)
        assert_one_of(before, after, found, f"killed at {first}, and at {point} of the mount")
        if not lived.died:
            break


def test_unmount(bench: Bench) -> None:
    def unlink_and_unmount(overlay: Overlay) -> None:
        overlay.unlink(*place(overlay, "plain"))
        overlay.close()

    operation = Operation("unlink and unmount", unlink_and_unmount, ())
    die_everywhere(operation, bench.layers, bench.open, bench.found)
