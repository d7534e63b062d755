"""Each operation, by a process that dies before and after each call that changes the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from sessiond.overlay import syscalls
from sessiond.overlay.overlay import Overlay
from tests.crash.layers import Bench, assert_one_of
from tests.crash.operations import Operation, metacopy_operations, operations, place
from tests.crash.selection import sample
from tests.support import fault_points
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.trees import Snapshot

OPERATIONS = list(operations())


def name_of(operation: Operation) -> str:
    return operation.name


@pytest.fixture(scope="module")
def bench(scratch: str) -> Bench:
    return Bench.make(scratch)


@pytest.fixture(scope="module")
def before(bench: Bench) -> Snapshot:
    with bench.layers() as layers:
        return bench.found(layers)


def die_everywhere(
    bench: Bench, before: Snapshot, operation: Operation, *, by_kernel: bool = True
) -> None:
    """Fail unless `operation` leaves one of two states, wherever its process dies."""
    with bench.layers() as layers:
        whole = fault_points.run(operation.run, lambda: bench.open(layers))
        after = bench.found(layers, by_kernel=by_kernel)
    assert after != before
    for point, call in enumerate(whole.calls):
        with bench.layers() as layers:
            lived = fault_points.run(operation.run, lambda: bench.open(layers), die_at=point)
            assert lived.died
            found = bench.found(
                layers, by_kernel=by_kernel, spare_whiteout=operation.spare_whiteout
            )
        assert_one_of(before, after, found, f"killed before change {point}, {call}")


@pytest.mark.parametrize("operation", sample(OPERATIONS, 23), ids=name_of)
def test_operation(bench: Bench, before: Snapshot, operation: Operation) -> None:
    die_everywhere(bench, before, operation)


@pytest.fixture
def no_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lowers on a file system without file handles, so that there is no index."""
    monkeypatch.setattr(syscalls, "file_handle", lambda _: None)


@pytest.mark.soak
@pytest.mark.usefixtures("no_handles")
@pytest.mark.parametrize("operation", OPERATIONS[::7], ids=name_of)
def test_operation_without_index(bench: Bench, operation: Operation) -> None:
    with bench.layers() as layers:
        before = bench.found(layers, by_kernel=False)
    die_everywhere(bench, before, operation, by_kernel=False)


@pytest.mark.parametrize("operation", sample(list(metacopy_operations()), 4), ids=name_of)
def test_operation_on_a_metadata_only_copy(
    bench: Bench, tmp_path: Path, operation: Operation
) -> None:
    """The kernel makes these, if it is told to; they are completed in place."""

    def make_layers() -> Layers:
        layers = bench.make_layers()
        with KernelOverlay().mounted(
            layers, str(tmp_path), "metacopy=on", "redirect_dir=on", "index=on"
        ):
            for path in ("plain", "hard"):
                os.chown(f"{tmp_path}/{path}", 21, 22)
        return layers

    before = bench.found(make_layers(), by_kernel=False)
    layers = make_layers()
    whole = fault_points.run(operation.run, lambda: bench.open(layers))
    after = bench.found(layers, by_kernel=False)
    assert after != before
    for point, call in enumerate(whole.calls):
        layers = make_layers()
        fault_points.run(operation.run, lambda layers=layers: bench.open(layers), die_at=point)
        states = before, after, bench.found(layers, by_kernel=False)
        assert_one_of(*map(timeless, states), f"killed before change {point}, {call}")


def timeless(view: Snapshot) -> Snapshot:
    """Leave out times, which completing a copy changes and sets back."""
    return {path: entry._replace(mtime_ns=0) for path, entry in view.items()}


@pytest.fixture(params=["chmod deep/er/file", "rename merged to emptied", "unlink last"])
def interrupted(request: pytest.FixtureRequest) -> Operation:
    return {operation.name: operation for operation in OPERATIONS}[request.param]


def test_mount(bench: Bench, before: Snapshot, interrupted: Operation) -> None:
    """What cleans up after a death dies, too."""
    with bench.layers() as layers:
        whole = fault_points.run(interrupted.run, lambda: bench.open(layers))
        after = bench.found(layers)
    for first, point in deaths(len(whole.calls)):
        with bench.layers() as layers:
            fault_points.run(interrupted.run, lambda: bench.open(layers), die_at=first)
            lived = fault_points.run(lambda _: bench.open(layers), lambda: None, die_at=point)
            found = bench.found(layers)
        assert_one_of(before, after, found, f"killed at {first}, and at {point} of the mount")
        if not lived.died:
            break


def deaths(calls: int) -> Iterator[tuple[int, int]]:
    """Return at which change the operation dies, and then the mount: each at all of them."""
    for point in count():
        yield calls - 1 - point % calls, point


def test_unmount(bench: Bench) -> None:
    def unlink_and_unmount(overlay: Overlay) -> None:
        overlay.unlink(*place(overlay, "plain"))
        overlay.close()

    with bench.layers() as layers:
        fault_points.run(unlink_and_unmount, lambda: bench.open(layers))
        after = bench.found(layers)
    for point in count():
        with bench.layers() as layers:
            before = bench.found(layers)
            lived = fault_points.run(unlink_and_unmount, lambda: bench.open(layers), die_at=point)
            assert_one_of(before, after, bench.found(layers), f"killed at {point}")
        if not lived.died:
            break
