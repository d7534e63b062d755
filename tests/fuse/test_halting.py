"""Programs stand still while a snapshot is made: real ones, in a real cgroup."""

from __future__ import annotations

import math
import os
import random
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from sessiond import cgroups
from sessiond.cgroups import Freezer
from sessiond.errors import Failed
from sessiond.fuse.mounter import FuseMount, FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.session.model import DataPath, Stack
from tests.fuse.conftest import Playground
from tests.support.cgroups import (
    COUNTER,
    OwnCgroup,
    is_of_one_moment,
    own_cgroup,
    prepare_counter,
)
from tests.support.soak import factor
from tests.support.waiting import until

_STAT = """
print(flush=True)
os.stat(sys.argv[1])
print(flush=True)
"""
_WRITE = """
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print(flush=True)
while os.write(file, b"x" * 4096):
    os.lseek(file, 0, os.SEEK_SET)
"""
_CHANGE = """
import itertools
print(flush=True)
for number in itertools.count():
    path = f"{sys.argv[1]}/{number % 20}"
    with open(path, "xb") as file:
        file.write(b"x" * 5000)
    os.rename(path, path + "-renamed")
    assert os.stat(path + "-renamed").st_size == 5000
    os.mkdir(path)
    os.rmdir(path)
    os.unlink(path + "-renamed")
"""
"""Ends at the first error."""
_CREATE = """
import itertools
print(flush=True)
for number in itertools.count():
    os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink(f"{sys.argv[1]}/{number}")
"""


PATIENCE = 5.0
"""Seconds for all programs to stand still: on a busy machine it takes more than half a one."""


@pytest.fixture(scope="module")
def mounter() -> Iterator[FuseMounter]:
    """One whose workers have that patience, and let programs stand still for longer after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroups, "PATIENCE", PATIENCE)
        patch.setattr(cgroups, "LONGEST", 6 * PATIENCE)
        spawner = Spawner.start()
    with tempfile.TemporaryDirectory() as sockets:
        yield FuseMounter(spawner, Path(sockets))
    spawner.close()


@pytest.fixture
def cgroup() -> Iterator[OwnCgroup]:
    with own_cgroup() as cgroup:
        yield cgroup


@pytest.fixture
def playground(mounter: FuseMounter) -> Iterator[Playground]:
    with tempfile.TemporaryDirectory() as directory:
        yield Playground(Path(directory), mounter, DataPath.PASSTHROUGH)


@pytest.fixture
def other_playground(mounter: FuseMounter) -> Iterator[Playground]:
    with tempfile.TemporaryDirectory() as directory:
        yield Playground(Path(directory), mounter, DataPath.PLAIN)


async def snapshot(mount: FuseMount, playground: Playground, stack: Stack) -> tuple[Stack, ...]:
    """Commit the upper of `stack`; return the next stack, alone if all is exact."""
    after = playground.stack(stack.upper.fs, *stack.lowers[:-1])
    assert await mount.swap(after) == ()
    return (after,)


async def test_files_that_are_mapped_are_of_one_moment(
    playground: Playground, cgroup: OwnCgroup
) -> None:
    async with playground.mounted(stack := playground.stack()) as mount:
        cgroup.start(COUNTER, *prepare_counter(playground.root))
        cgroup.start(_WRITE, playground.root / "written")
        with cgroup.freezer() as freezer:
            for _ in range(5):
                await mount.halt(freezer)
                before, (stack,) = stack, await snapshot(mount, playground, stack)
                assert not cgroup.is_stopped
                assert is_of_one_moment(before.upper.fs)


async def test_it_takes_a_halt(playground: Playground, cgroup: OwnCgroup) -> None:
    """Or what the test above asserts would be true of any snapshot."""
    async with playground.mounted(stack := playground.stack()) as mount:
        cgroup.start(COUNTER, *prepare_counter(playground.root))
        for _ in range(60):
            after = playground.stack(stack.upper.fs, *stack.lowers[:-1])
            await mount.swap(after)
            if not is_of_one_moment(stack.upper.fs):
                return
            stack = after
        pytest.fail("all snapshots are of one moment")


async def test_who_waits_for_an_answer_is_given_it_first(
    playground: Playground, cgroup: OwnCgroup
) -> None:
    async with playground.mounted(stack := playground.stack()) as mount:
        for number in range(3):
            (playground.root / str(number)).mkdir()
            cgroup.start(_CREATE, playground.root / str(number))
        with cgroup.freezer() as freezer:
            for _ in range(5):
                await mount.halt(freezer)
                async with mount.frozen():
                    assert cgroup.stands_still
                    (stack,) = await snapshot(mount, playground, stack)
                    assert not cgroup.is_stopped


async def test_nobody_is_stopped_where_all_that_is_written_is_a_request(
    other_playground: Playground, cgroup: OwnCgroup
) -> None:
    async with other_playground.mounted(other_playground.stack()) as mount:
        with cgroup.freezer() as freezer:
            await mount.halt(freezer)
            async with mount.frozen():
                assert not cgroup.is_stopped


async def test_a_program_that_cannot_be_stopped_holds_nothing_up(
    playground: Playground, other_playground: Playground, cgroup: OwnCgroup
) -> None:
    """It waits for a file system whose server does not answer."""
    async with (
        playground.mounted(stack := playground.stack()) as mount,
        other_playground.mounted(other_playground.stack()) as other,
    ):
        os.kill(other.worker, signal.SIGSTOP)
        try:
            waiting = cgroup.start(_STAT, other_playground.root / "missing")
            cgroup.start(COUNTER, *prepare_counter(playground.root))
            await until(lambda: "request_wait_answer" in _stack_of(waiting.pid))
            with cgroup.freezer() as freezer:
                await mount.halt(freezer)
                await snapshot(mount, playground, stack)
                assert not cgroup.is_stopped
                assert is_of_one_moment(stack.upper.fs)
        finally:
            os.kill(other.worker, signal.SIGCONT)


def _stack_of(process: int) -> str:
    return Path(f"/proc/{process}/stack").read_text()


async def test_programs_go_on_when_the_worker_dies(
    playground: Playground, cgroup: OwnCgroup
) -> None:
    async with playground.mounted(playground.stack()) as mount:
        cgroup.start(_CREATE, playground.root)
        with cgroup.freezer() as freezer:
            with freezer.limited():
                await mount.halt(freezer)
                async with mount.frozen():
                    os.kill(mount.worker, signal.SIGKILL)
                    await mount.wait_died()
                    assert cgroup.stands_still
            await until(lambda: not cgroup.stands_still)
        await mount.recover()


async def test_programs_go_on_when_the_worker_hangs(
    playground: Playground, cgroup: OwnCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "LONGEST", 0.2)
    async with playground.mounted(playground.stack()) as mount:
        cgroup.start(_CREATE, playground.root)
        with cgroup.freezer() as freezer, freezer.limited():
            await mount.halt(freezer)
            os.kill(mount.worker, signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_hold, mount)
                await until(lambda: not cgroup.stands_still)
                os.kill(mount.worker, signal.SIGCONT)


async def _hold(mount: FuseMount) -> None:
    async with mount.frozen():
        pass


@pytest.fixture(params=[1000.0, 0.2])
def longest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """For how many seconds programs may stand still."""
    seconds: float = request.param
    monkeypatch.setattr(cgroups, "LONGEST", seconds)
    monkeypatch.setattr(cgroups, "PATIENCE", PATIENCE)
    return seconds


@pytest.fixture
def bounded_playground(longest: float, tmp_path: Path) -> Iterator[Playground]:
    """One whose workers obey that, too."""
    spawner = Spawner.start()
    yield Playground(tmp_path, FuseMounter(spawner, tmp_path / "sockets"), DataPath.PASSTHROUGH)
    spawner.close()


async def test_programs_go_on_when_the_manager_is_gone(
    bounded_playground: Playground, cgroup: OwnCgroup, longest: float
) -> None:
    """At once; or, if it is there and does not answer any more, after a while."""
    playground, ended = bounded_playground, longest > 1
    async with playground.mounted(playground.stack()) as mount:
        cgroup.start(_CREATE, playground.root)
        with cgroup.freezer() as freezer:
            await mount.halt(freezer)
            async with mount.frozen():
                if ended:
                    assert cgroup.stands_still
                    assert mount._channel is not None
                    mount._channel.close()
                await until(lambda: not cgroup.is_stopped)
                if ended:
                    os.kill(mount.worker, signal.SIGKILL)
                    await mount.wait_died()


@pytest.mark.soak
async def test_deaths_at_random(playground: Playground) -> None:
    """No program has an error, none stands still afterwards."""
    generator = random.Random(5)
    for _ in range(math.ceil(10 * factor())):
        async with playground.mounted(stack := playground.stack()) as mount:
            with own_cgroup() as cgroup, cgroup.freezer() as freezer:
                programs = [cgroup.start(COUNTER, *prepare_counter(playground.root, 1 << 20))]
                for number in range(3):
                    (playground.root / str(number)).mkdir()
                    programs.append(cgroup.start(_CHANGE, playground.root / str(number)))
                for _ in range(20):
                    stack = await _die_during_snapshot(
                        playground, mount, stack, freezer, generator.uniform(0, 0.01)
                    )
                    assert not cgroup.is_stopped
                assert [program.poll() for program in programs] == [None] * len(programs)


async def _die_during_snapshot(
    playground: Playground, mount: FuseMount, stack: Stack, freezer: Freezer, seconds: float
) -> Stack:
    """Kill the worker that many seconds from now; return what the next one serves."""
    after = playground.stack(stack.upper.fs, *stack.lowers[:-1])
    killer = threading.Timer(seconds, os.kill, (mount.worker, signal.SIGKILL))
    killer.start()
    with suppress(Failed), freezer.limited():
        await mount.halt(freezer)
        await mount.swap(after)
        stack = after
    await mount.wait_died()
    await mount.recover()
    return stack
