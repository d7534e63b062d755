"""What the kernel is told of directories that a swap has taken away, and when not."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from sessiond.fuse import device
from sessiond.fuse.vanished import Vanished
from sessiond.overlay.view import View
from tests.support.waiting import until

GONE, BACK, FORGOTTEN, ALSO_GONE = 10, 11, 12, 13


class Kernel:
    """Drops a directory when it is told to go on."""

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self.go_on = threading.Semaphore(0)
        self.waiting = 0

    def drop_directory(self, parent: int, name: bytes, number: int) -> None:
        assert (parent, name) == (1, b"name")
        self.waiting += 1
        self.go_on.acquire()
        self.dropped.append(number)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(device, "drop_directory", kernel.drop_directory)
    return kernel


def vanished(nursery: trio.Nursery) -> Vanished:
    nodes = {number: SimpleNamespace(linked=number == BACK) for number in (GONE, BACK, ALSO_GONE)}
    view = SimpleNamespace(nodes=nodes, node=nodes.__getitem__)
    return Vanished(cast("View", view), nursery)


def named(*numbers: int) -> list[tuple[int, bytes, int]]:
    return [(1, b"name", number) for number in numbers]


async def test_only_what_is_gone_is_dropped(kernel: Kernel) -> None:
    kernel.go_on.release(9)
    async with trio.open_nursery() as nursery:
        directories = vanished(nursery)
        directories.drop(named(GONE, BACK))
        directories.drop(named(FORGOTTEN, ALSO_GONE))
    assert sorted(kernel.dropped) == [GONE, ALSO_GONE]


async def test_before_the_next_swap_it_ends(kernel: Kernel) -> None:
    async with trio.open_nursery() as nursery:
        directories = vanished(nursery)
        directories.drop(named(GONE, ALSO_GONE))
        await until(lambda: kernel.waiting == 1)
        left = trio.Event()

        async def leave() -> None:
            await directories.leave()
            left.set()

        nursery.start_soon(leave)
        await trio.testing.wait_all_tasks_blocked()
        assert not left.is_set()
        kernel.go_on.release()
        await left.wait()
    assert kernel.dropped == [ALSO_GONE]
