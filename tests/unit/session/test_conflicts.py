"""Programs that use a merged view: named, and ended before it is reset."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sessiond.errors import Failed, SnapshotExists
from sessiond.session import conflicts, process_scan, processes
from sessiond.session.conflicts import Program
from sessiond.session.memory import DEVICE
from sessiond.session.model import LayerNumber, Manner, SnapshotName, Uid
from sessiond.session.processes import Process, SystemProcesses
from sessiond.session.schedule import Due, Why
from sessiond.session.surroundings import Surroundings
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

ROOT, ALICE, BOB = Uid(0), Uid(1000), Uid(1001)
FIRST, SECOND, THIRD = range(1 << 22, (1 << 22) + 3)
"""Pids above the kernel's PID_MAX_LIMIT: of no process, so never of the one that runs the tests."""


class FakeProcess:
    """One that ends at a signal of `obeys`."""

    def __init__(
        self,
        pid: int,
        *,
        uid: Uid = ALICE,
        obeys: Sequence[int] = (15, 9),
        rights: Uid = ALICE,
        uses: Collection[str] = ("cwd",),
    ) -> None:
        self.pid = pid
        self.program = "editor"
        self.uid = uid
        self.unit = "session-2.scope"
        self.uses = uses
        self.files = ()
        self.got: list[int] = []
        self.ended = trio.Event()
        self._obeys = obeys
        self._rights = rights

    def is_of(self, uid: Uid) -> bool:
        return uid == self.uid == self._rights

    def signal(self, number: signal.Signals) -> None:
        self.got.append(number)
        if number in self._obeys:
            self.ended.set()

    async def wait_ended(self) -> None:
        await self.ended.wait()


class FakeProcesses:
    """Those that have not ended are found."""

    def __init__(self, *there: FakeProcess) -> None:
        self.there = list(there)
        self.failure: Failed | None = None
        self.looked = 0

    @asynccontextmanager
    async def using(
        self, device: str, files: Collection[int] = ()
    ) -> AsyncIterator[Sequence[Process]]:
        assert device == DEVICE
        await trio.lowlevel.checkpoint()
        self.looked += 1
        if self.failure is not None:
            raise self.failure
        yield [one for one in self.there if not one.ended.is_set()]


async def terminate(
    processes: FakeProcesses, asked_by: Uid = ALICE, grace: float = 10, owner: Uid = ALICE
) -> list[Program]:
    told: list[Program] = []
    await conflicts.terminate(
        processes, DEVICE, owner=owner, asked_by=asked_by, grace=grace, report=told.extend
    )
    return told


async def test_programs_are_summed_up_by_name_user_and_unit() -> None:
    processes = FakeProcesses(FakeProcess(SECOND), FakeProcess(FIRST), FakeProcess(THIRD, uid=BOB))
    assert await conflicts.find(processes, DEVICE) == (
        Program("editor", (FIRST, SECOND), ALICE, "session-2.scope"),
        Program("editor", (THIRD,), BOB, "session-2.scope"),
    )


async def test_who_ends_when_asked_is_not_killed(autojump_clock: trio.testing.MockClock) -> None:
    one = FakeProcess(FIRST)
    assert await terminate(FakeProcesses(one)) == [
        Program("editor", (FIRST,), ALICE, "session-2.scope")
    ]
    assert one.got == [signal.SIGTERM]
    assert trio.current_time() < 1


async def test_who_does_not_is_killed_after_the_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    obeying, deaf = FakeProcess(FIRST), FakeProcess(SECOND, obeys=(9,))
    start = trio.current_time()
    await terminate(FakeProcesses(obeying, deaf), grace=7)
    assert obeying.got == [signal.SIGTERM]
    assert deaf.got == [signal.SIGTERM, signal.SIGKILL]
    assert 7 <= trio.current_time() - start < 8


async def test_who_comes_meanwhile_is_asked_as_well(autojump_clock: trio.testing.MockClock) -> None:
    child = FakeProcess(SECOND)
    processes = FakeProcesses(FakeProcess(FIRST))
    processes.there[0].signal = lambda number: (  # type: ignore[method-assign]
        processes.there.append(child),
        processes.there[0].ended.set(),
    )
    await terminate(processes)
    assert child.got == [signal.SIGTERM]


async def test_owners_end_only_what_is_theirs_alone(autojump_clock: trio.testing.MockClock) -> None:
    theirs, other = FakeProcess(FIRST), FakeProcess(SECOND, uid=BOB, rights=BOB)
    setuid = FakeProcess(THIRD, rights=ROOT)
    told = await terminate(FakeProcesses(theirs, other, setuid))
    assert (theirs.got, other.got, setuid.got) == ([signal.SIGTERM], [], [])
    assert {pid for program in told for pid in program.pids} == {FIRST, SECOND, THIRD}


async def test_root_ends_all_but_init_and_the_manager(
    autojump_clock: trio.testing.MockClock,
) -> None:
    theirs, init, ourselves = FakeProcess(FIRST), FakeProcess(1), FakeProcess(os.getpid())
    await terminate(FakeProcesses(theirs, init, ourselves), asked_by=ROOT)
    assert (theirs.got, init.got, ourselves.got) == ([signal.SIGTERM], [], [])


@pytest.mark.parametrize(
    ("owner", "whose", "uses", "ended"),
    [
        (ALICE, ALICE, {"file"}, True),
        (ALICE, BOB, {"file", "map"}, False),
        (ALICE, ROOT, {"file"}, False),
        (ALICE, BOB, {"cwd"}, True),
        (ALICE, ROOT, {"root", "file"}, True),
        (ALICE, BOB, {"exe", "map"}, True),
        (ROOT, ROOT, {"file"}, False),
        (ROOT, ROOT, {"cwd"}, True),
    ],
)
async def test_root_ends_others_only_where_they_work_there(
    autojump_clock: trio.testing.MockClock,
    owner: Uid,
    whose: Uid,
    uses: Collection[str],
    ended: bool,
) -> None:
    """Open files can be given to anybody."""
    one = FakeProcess(FIRST, uid=whose, rights=whose, uses=uses)
    told = await terminate(FakeProcesses(one), asked_by=ROOT, owner=owner)
    assert one.got == [signal.SIGTERM] * ended
    assert [program.pids for program in told] == [(FIRST,)]


async def test_what_cannot_be_ended_does_not_hold_it_up(
    autojump_clock: trio.testing.MockClock, expect_log: Callable[[str], None]
) -> None:
    processes = FakeProcesses(FakeProcess(FIRST, obeys=()))
    await terminate(processes, grace=0)
    assert trio.current_time() < 60
    expect_log("Not all programs could be ended")


# In a session


def world_with(world: World, *there: FakeProcess) -> FakeProcesses:
    processes = FakeProcesses(*there)
    world.surroundings = Surroundings(processes=processes)
    return processes


async def test_a_reset_ends_programs_before_the_layers_are_exchanged(world: World) -> None:
    process = FakeProcess(FIRST, uid=Uid(UID), rights=Uid(UID))
    world_with(world, process)
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        before = session.record.upper
        seen: list[LayerNumber] = []
        process.signal = lambda _: (  # type: ignore[method-assign]
            seen.append(session.record.upper),
            process.ended.set(),
        )
        job = session.reset(started_by=Uid(UID), manner=Manner(terminate=True))
        await job.wait()
        assert seen == [before]
        assert session.record.upper != before
        assert [program.pids for program in job.conflicts] == [(FIRST,)]


async def test_a_reset_by_itself_ends_the_owners_and_tells_of_others(world: World) -> None:
    """Its timer asks as root does."""
    nobody = Uid(pwd.getpwnam("nobody").pw_uid)
    owners = FakeProcess(FIRST, uid=nobody, rights=nobody, uses={"file"})
    others = FakeProcess(SECOND, uid=BOB, rights=BOB, uses={"file"})
    world_with(world, owners, others)
    async with world.manager() as manager:
        session = await manager.create("nobody", "volatile", session_id="s")
        due = Due(Why.DAILY, None, 0, 0, manner=Manner(terminate=True))
        await session.reset_when_idle(due)
        assert (owners.got, others.got) == ([signal.SIGTERM], [])
        job = session.turn.last_job
        assert job is not None
        assert {program.pids for program in job.conflicts} == {(FIRST,), (SECOND,)}


async def test_a_job_cancelled_while_programs_end_changes_nothing(world: World) -> None:
    world_with(world, FakeProcess(FIRST, uid=Uid(UID), rights=Uid(UID), obeys=()))
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        before = session.record
        job = session.reset(started_by=Uid(UID), manner=Manner(terminate=True, grace=600))
        await until(lambda: job.conflicts)
        job.cancel()
        with pytest.raises(Exception, match="cancelled"):
            await job.wait()
        assert session.record == before


async def test_a_reset_goes_on_when_processes_cannot_be_found(
    world: World, expect_log: Callable[[str], None]
) -> None:
    world_with(world).failure = Failed("There are too many processes.")
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        await session.reset(started_by=Uid(UID), manner=Manner(terminate=True)).wait()
        assert session.last_reset is not None
        expect_log("too many processes")


@pytest.mark.parametrize("operation", ["reset", "restore"])
async def test_a_snapshot_is_made_first(world: World, operation: str) -> None:
    manner = Manner(snapshot=SnapshotName("before"))
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        await session.snapshots.make("other")
        (world.mount("s").stack.upper.fs / "file").touch()
        if operation == "reset":
            await session.reset(started_by=Uid(UID), manner=manner).wait()
        else:
            await session.restore("other", started_by=Uid(UID), manner=manner).wait()
        assert not any(
            (layer / "file").exists()
            for layer in (world.mount("s").stack.upper.fs, *world.mount("s").stack.lowers)
        )
        await session.restore("before", started_by=Uid(UID)).wait()
        assert (world.mount("s").stack.lowers[0] / "file").exists()


async def test_an_automatic_snapshot_has_a_name_of_its_time(world: World) -> None:
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        await session.reset(started_by=Uid(UID), manner=Manner(snapshot=True)).wait()
        await session.reset(started_by=Uid(UID), manner=Manner(snapshot=True)).wait()
        assert len(session.snapshots) == 2
        assert all(one.automatic for one in session.snapshots.values())
        assert all(name.startswith("before-reset-2") for name in session.snapshots)
        assert world.mount("s").frozen_times == 2, "nothing is written between"


async def test_without_the_snapshot_there_is_no_reset(world: World) -> None:
    async with world.manager() as manager:
        session = await manager.create(USER, "volatile", session_id="s")
        taken = await session.snapshots.make("taken")
        manner = Manner(snapshot=taken.name)
        with pytest.raises(SnapshotExists):
            session.reset(started_by=Uid(UID), manner=manner)
        world.mounter.injected["swap"] = [Failed("The disk is on fire.")]
        before = session.record.layers
        with pytest.raises(Failed, match="fire"):
            await session.reset(
                started_by=Uid(UID), manner=Manner(snapshot=SnapshotName("new"))
            ).wait()
        assert session.record.layers == before
        assert session.last_reset is None


# Real processes


@pytest.fixture
def device(real: Path) -> Iterator[str]:
    """A tmpfs, and what it is called in /proc."""
    subprocess.run(["mount", "-t", "tmpfs", "test", str(real)], check=True)
    try:
        number = real.stat().st_dev
        yield f"{os.major(number)}:{os.minor(number)}"
    finally:
        subprocess.run(["umount", "-l", str(real)], check=True)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a Python program that runs a line and then waits; it is ended after the test."""
    running: list[subprocess.Popen[bytes]] = []

    def start(line: str, *arguments: Path, **settings: object) -> subprocess.Popen[bytes]:
        script = f"import os, signal, sys\n{line}\nprint(flush=True)\nsignal.pause()"
        process = subprocess.Popen(  # type: ignore[call-overload]
            [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, **settings
        )
        running.append(process)
        assert process.stdout.readline() == b"\n"
        return process  # type: ignore[no-any-return]

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@pytest.mark.root
@pytest.mark.parametrize(
    ("line", "there"),
    [
        ("os.chdir(sys.argv[1])", True),
        ("os.chroot(sys.argv[1])", True),
        ("f = os.open(sys.argv[1] + '/file', os.O_RDONLY)", True),
        ("f = os.open(sys.argv[1] + '/file', os.O_PATH)", True),
        (
            "import ctypes; f = os.open(sys.argv[1] + '/file', os.O_RDONLY); "
            "libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p; "
            "libc.mmap(None, 4096, 1, 1, f, 0); os.close(f)",
            True,
        ),
        ("f = os.open(sys.argv[1] + '/file', os.O_RDONLY); os.close(f)", False),
    ],
)
async def test_each_kind_of_use_is_found(
    real: Path,
    device: str,
    start: Callable[..., subprocess.Popen[bytes]],
    line: str,
    there: bool,
) -> None:
    (real / "file").write_bytes(b"x" * 4096)
    process = start(line, real)
    async with SystemProcesses().using(device) as found:
        assert (process.pid in {one.pid for one in found}) == there


@pytest.mark.root
async def test_which_files_a_program_writes_is_found(
    real: Path, device: str, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """By what it has open, and what it has mapped for others to see."""
    files = [real / name for name in ("open", "shared", "private", "closed")]
    for file in files:
        file.write_bytes(b"x" * 4096)
    process = start(
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "_, *others = fds = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]\n"
        "for fd, flags in zip(others, (1, 2)): libc.mmap(None, 4096, 1, flags, fd, 0)\n"
        "for fd in others: os.close(fd)",
        *files,
    )
    wanted = [file.stat().st_ino for file in files]
    async with SystemProcesses().using(device, wanted) as found:
        (files_of,) = [set(one.files) for one in found if one.pid == process.pid]
    assert files_of == set(wanted[:2])


@pytest.mark.root
@pytest.mark.parametrize(
    ("name", "told"), [(b"\xff\x1b[31m", "\\xff\x1b[31m"), (b"a\nb\n", "a\nb\n"), (b'"}', '"}')]
)
async def test_a_program_may_have_any_name(
    real: Path,
    device: str,
    start: Callable[..., subprocess.Popen[bytes]],
    name: bytes,
    told: str,
) -> None:
    start(f"os.write(os.open('/proc/self/comm', os.O_WRONLY), {name!r})", cwd=real)
    assert [one.name for one in await conflicts.find(SystemProcesses(), device)] == [told]


@pytest.mark.root
async def test_a_program_that_runs_from_there_is_found(real: Path, device: str) -> None:
    program = real / "sleep"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    with subprocess.Popen([program, "100"]) as process:
        try:
            found: tuple[Program, ...] = ()
            while not found:  # until it has executed the program
                found = await conflicts.find(SystemProcesses(), device)
            assert found[0].pids == (process.pid,)
            assert found[0].name == "sleep"
        finally:
            process.kill()


@pytest.mark.root
async def test_a_real_process_is_ended_and_another_users_is_not(
    real: Path, device: str, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    processes = {
        "obeying": start("", cwd=real, user=65534),
        "deaf": start(deaf, cwd=real, user=65534),
        "root's": start("", cwd=real),
    }
    told: list[Program] = []
    await conflicts.terminate(
        SystemProcesses(),
        device,
        owner=Uid(65534),
        asked_by=Uid(65534),
        grace=0.2,
        report=told.extend,
    )
    assert {pid for one in told for pid in one.pids} == {one.pid for one in processes.values()}
    assert processes["obeying"].wait(10) == -signal.SIGTERM
    assert processes["deaf"].wait(10) == -signal.SIGKILL
    assert processes["root's"].poll() is None


@pytest.mark.root
async def test_who_was_passed_a_descriptor_is_not_ended_for_it(
    real: Path, device: str, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """As a service of the machine may be, by the session's user, just before root resets it."""
    receive = "import socket; _, fds, *_ = socket.recv_fds(socket.socket(fileno=0), 1, 1)"

    def given(**settings: object) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        with ours, theirs, (real / "file").open("w") as file:
            socket.send_fds(ours, [b"x"], [file.fileno()])
            return start(receive, stdin=theirs, cwd="/", **settings)

    service, owners, shell = given(), given(user=65534), start("", cwd=real)
    told: list[Program] = []
    await conflicts.terminate(
        SystemProcesses(),
        device,
        owner=Uid(65534),
        asked_by=ROOT,
        grace=600,
        report=told.extend,
    )
    assert {pid for one in told for pid in one.pids} == {service.pid, owners.pid, shell.pid}
    assert owners.wait(10) == shell.wait(10) == -signal.SIGTERM
    assert service.poll() is None


@pytest.mark.root
async def test_a_process_that_cannot_be_looked_at_holds_nothing_up(
    real: Path,
    device: str,
    start: Callable[..., subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As when its memory map is locked for ever."""
    text = Path(process_scan.__file__).read_text()
    stuck = tmp_path.parent / "stuck_scan.py"
    stuck.write_text(
        text.replace(
            "mapped = self._mapped", "threading.Event().wait()\n            mapped = b'' #"
        ).replace("STUCK_LIMIT = 30", "STUCK_LIMIT = 2")
    )
    monkeypatch.setattr(processes, "_SCAN", stuck)
    process = start("", cwd=real)
    async with SystemProcesses().using(device) as found:
        assert [one.pid for one in found] == [process.pid]
