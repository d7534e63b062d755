"""The service as busctl, gdbus and a typed client see it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import trio

from sessiond.bus import names, service
from sessiond.bus.client import Client
from sessiond.bus.connection import Connection, connect
from sessiond.bus.objects import JobObject, ManagerObject, SessionObject, SnapshotObject
from sessiond.bus.operations import Operations
from sessiond.bus.signals import Match, Signals
from sessiond.bus.wire import BusError
from sessiond.errors import Failed, NoSuchSession
from sessiond.session.model import SessionState, Uid, Usage
from tests.bus.fake_manager import FakeJob, FakeManager
from tests.support.bus import start_private_bus
from tests.support.waiting import until

MANAGER = [names.BUS, names.ROOT_PATH, names.MANAGER]
SESSION_PATH = f"{names.ROOT_PATH}/session/live"


async def busctl(*arguments: str) -> str:
    """Return what busctl prints; the test fails where it fails."""
    done = await trio.run_process(["busctl", "--no-pager", *arguments], capture_stdout=True)
    return done.stdout.decode()


async def busctl_fails(*arguments: str) -> str:
    """Return what busctl complains of."""
    done = await trio.run_process(
        ["busctl", "--no-pager", *arguments], capture_stdout=True, capture_stderr=True, check=False
    )
    assert done.returncode != 0
    return done.stderr.decode()


async def next_signal(signals: Signals, member: str) -> tuple[str, tuple[object, ...]]:
    """Return path and arguments of the next signal of that name."""
    async for message in signals:
        if message.member == member:
            return message.path, message.values()
    raise AssertionError


async def test_busctl_tour(serving: FakeManager) -> None:
    created = await busctl("call", *MANAGER, "CreateSession", "ssa{sv}", "alice", "live", "0")
    assert created == 'o "/org/sessiond/Overlay1/session/alice_2d1"\n'
    listed = await busctl("call", *MANAGER, "ListSessions")
    assert listed.startswith('a(susso) 2 "live" 65534 "nobody" "live" ')
    found = await busctl("call", *MANAGER, "GetSessionByUser", "u", "65534")
    assert found == f'o "{SESSION_PATH}"\n'
    options = ("sa{sv}", "fresh", "1", "description", "s", "as it was")
    taken = await busctl("call", names.BUS, SESSION_PATH, names.SESSION, "Snapshot", *options)
    assert taken == f'o "{SESSION_PATH}/snapshot/fresh"\n'
    started = await busctl("call", *MANAGER, "ResetSession", "sa{sv}", "live", "0")
    assert started == f'o "{names.ROOT_PATH}/job/1"\n'
    closed = await busctl("call", *MANAGER, "CloseSession", "sa{sv}", "alice-1", "0")
    assert closed == ""
    state = await busctl("get-property", names.BUS, SESSION_PATH, names.SESSION, "State", "Uid")
    assert state == 's "active"\nu 65534\n'


async def test_busctl_shows_all_members(serving: FakeManager) -> None:
    shown = await busctl("introspect", names.BUS, SESSION_PATH, names.SESSION)
    for line in (
        r"\.Restore +method +sa\{sv\} +o",
        r"\.OpenDiff +method +a\{sv\} +h",
        r'\.Id +property +s +"live" +const',
        r"\.BytesUsed +property +t +4096 +-",
        r"\.BytesLimit +property +t +\d+ +emits-change",
        r"\.SpaceLow +signal +stt +-",
    ):
        assert re.search(line, shown), line


async def test_gdbus_shows_argument_names_and_annotations(serving: FakeManager) -> None:
    done = await trio.run_process(
        ["gdbus", "introspect", "--system", "--dest", names.BUS, "--object-path", SESSION_PATH],
        capture_stdout=True,
    )
    shown = " ".join(done.stdout.decode().split())
    assert "Snapshot(in s name, in a{sv} options, out o snapshot);" in shown
    assert "SpaceLow(s level, t used, t limit);" in shown
    assert '@org.freedesktop.DBus.Property.EmitsChangedSignal("const") readonly s Id' in shown


async def test_the_tree_leads_to_all_objects(serving: FakeManager) -> None:
    await serving.sessions["live"].snapshots.make("fresh")
    serving.sessions["live"].reset(started_by=Uid(0))
    listed = await busctl("tree", "--list", names.BUS)
    for path in (names.ROOT_PATH, SESSION_PATH, f"{SESSION_PATH}/snapshot/fresh"):
        assert path in listed.splitlines()
    assert f"{names.ROOT_PATH}/job/1" in listed.splitlines()


async def test_an_inner_node_has_its_children_and_nothing_else(sessiond: Client) -> None:
    (xml,) = await sessiond._connection.call(names.BUS, "/org", names.INTROSPECTABLE, "Introspect")
    root = ElementTree.fromstring(str(xml))
    assert [node.get("name") for node in root.findall("node")] == ["sessiond"]
    assert {i.get("name") for i in root.findall("interface")} == {
        names.INTROSPECTABLE,
        names.PEER,
    }


@pytest.mark.parametrize(
    ("path", "interface", "member", "arguments", "error"),
    [
        ("/nowhere", names.INTROSPECTABLE, "Introspect", (), names.UNKNOWN_OBJECT),
        ("/org", names.PROPERTIES, "GetAll", ("s", ""), names.UNKNOWN_INTERFACE),
        (names.ROOT_PATH, "no.Interface", "Get", (), names.UNKNOWN_INTERFACE),
        (names.ROOT_PATH, names.MANAGER, "Explode", (), names.UNKNOWN_METHOD),
        (names.ROOT_PATH, "", "Explode", (), names.UNKNOWN_METHOD),
        (names.ROOT_PATH, names.MANAGER, "GetSession", ("u", 3), names.INVALID_ARGUMENTS),
        (names.ROOT_PATH, names.MANAGER, "GetSession", (), names.INVALID_ARGUMENTS),
        (SESSION_PATH, names.PROPERTIES, "Get", ("ss", names.SESSION, "X"), names.UNKNOWN_PROPERTY),
        (SESSION_PATH, names.PROPERTIES, "Get", ("ss", "a.b", "Id"), names.UNKNOWN_PROPERTY),
    ],
)
async def test_what_does_not_exist_is_told_apart(
    sessiond: Client,
    path: str,
    interface: str,
    member: str,
    arguments: tuple[object, ...],
    error: str,
) -> None:
    with pytest.raises(BusError) as caught:
        await sessiond._connection.call(names.BUS, path, interface, member, *arguments)
    assert caught.value.name == error


async def test_the_interface_of_a_call_may_be_left_out(sessiond: Client) -> None:
    call = sessiond._connection.call
    assert await call(names.BUS, names.ROOT_PATH, "", "GetSession", "s", "live") == (SESSION_PATH,)
    assert await call(names.BUS, names.ROOT_PATH, "", "Ping") == ()


async def test_properties_can_only_be_read(serving: FakeManager) -> None:
    complaint = await busctl_fails(
        "set-property", names.BUS, SESSION_PATH, names.SESSION, "State", "s", "failed"
    )
    assert "can only be read" in complaint


async def test_the_machine_id_is_told(sessiond: Client) -> None:
    if not Path("/etc/machine-id").exists():
        pytest.skip("this machine has no /etc/machine-id")
    (told,) = await sessiond._connection.call(
        names.BUS, names.ROOT_PATH, names.PEER, "GetMachineId"
    )
    assert told == Path("/etc/machine-id").read_text().strip()


def test_each_declared_property_has_a_value(manager: FakeManager) -> None:
    operations = Operations(manager, str)
    session = manager.sessions["live"]
    job = session.reset(started_by=Uid(0))
    for interface in (
        ManagerObject(manager, operations),
        SessionObject(session, operations),
        JobObject(job, Uid(3)),
    ):
        declared = [declared.name for declared in interface.properties]
        assert set(interface.property_values()) == set(declared)
        assert len(declared) == len(set(declared))


async def test_snapshots_know_their_parents(manager: FakeManager) -> None:
    session = manager.sessions["live"]
    parents = []
    for name in ("one", "two", "three"):
        record = await session.snapshots.make(name)
        snapshot = SnapshotObject(session, record.name, Operations(manager, str))
        parents.append(snapshot.property_values()["Parent"])
    assert parents == ["/", f"{SESSION_PATH}/snapshot/one", f"{SESSION_PATH}/snapshot/two"]


async def test_changes_are_announced_and_nothing_else(
    sessiond: Client, serving: FakeManager
) -> None:
    session = serving.sessions["live"]
    match = Match(names.BUS, path=SESSION_PATH, interface=names.PROPERTIES)
    async with sessiond._connection.signals(match) as heard:
        serving.tell("session_changed", session)
        session.usage = Usage(8192, 1 << 40, 3, 1000)
        serving.tell("session_changed", session)
        session.state, session.failure = SessionState.FAILED, "The worker died."
        serving.tell("session_changed", session)
        session.usage = Usage(8192, 0, 3, 0)
        serving.tell("session_changed", session)
        changes = [(await anext(heard)).values() for _ in range(2)]
    assert changes == [
        (names.SESSION, {"State": "failed", "Failure": "The worker died."}, []),
        (names.SESSION, {"BytesLimit": 0, "InodesLimit": 0}, []),
    ]


async def test_objects_are_announced_by_the_manager(sessiond: Client, serving: FakeManager) -> None:
    match = Match(names.BUS, path=names.ROOT_PATH)
    async with sessiond._connection.signals(match) as heard:
        session = serving.add("new")
        await session.snapshots.make("fresh")
        await session.snapshots.rename("fresh", "old")
        await serving.close("new")
        seen = [await anext(heard) for _ in range(8)]
    path = f"{names.ROOT_PATH}/session/new"
    told = [(message.member, *message.values()[:2]) for message in seen]
    assert [event[:2] for event in told] == [
        ("InterfacesAdded", path),
        ("SessionNew", "new"),
        ("InterfacesAdded", f"{path}/snapshot/fresh"),
        ("InterfacesRemoved", f"{path}/snapshot/fresh"),
        ("InterfacesAdded", f"{path}/snapshot/old"),
        ("InterfacesRemoved", f"{path}/snapshot/old"),
        ("InterfacesRemoved", path),
        ("SessionRemoved", "new"),
    ]
    added = told[0][2]
    assert isinstance(added, dict)
    assert added[names.SESSION]["User"] == "nobody"


async def test_signals_of_a_session(sessiond: Client, serving: FakeManager) -> None:
    session = serving.sessions["live"]
    match = Match(names.BUS, interface=names.SESSION)
    async with sessiond._connection.signals(match) as heard:
        serving.tell("reset_done", session)
        serving.tell("space_low", session, "warning", 900, 1000)
        assert await next_signal(heard, "ResetDone") == (SESSION_PATH, ())
        assert await next_signal(heard, "SpaceLow") == (SESSION_PATH, ("warning", 900, 1000))


async def test_managed_objects_are_those_below_the_root(
    sessiond: Client, serving: FakeManager
) -> None:
    await serving.sessions["live"].snapshots.make("fresh")
    objects = await sessiond.managed_objects()
    assert set(objects) == {SESSION_PATH, f"{SESSION_PATH}/snapshot/fresh"}
    assert objects[SESSION_PATH][names.SESSION]["Snapshots"] == [f"{SESSION_PATH}/snapshot/fresh"]


async def test_finished_jobs_stay_for_a_while(sessiond: Client, serving: FakeManager) -> None:
    serving.jobs_finish_at_once = True
    serving.add("other")
    session = await sessiond.session("live")
    last = await (await sessiond.session("other")).reset()
    # The last job of each session is kept besides.
    jobs = [await session.reset() for _ in range(service.FINISHED_JOBS_KEPT + 2)]
    for job in [last, *jobs[1:]]:
        assert (await job.info()).state == "succeeded"
    with pytest.raises(Failed, match="forgotten"):
        await jobs[0].info()


async def test_completion_is_a_signal(sessiond: Client, serving: FakeManager) -> None:
    job = await (await sessiond.session("live")).reset()
    async with sessiond._connection.signals(Match(names.BUS, interface=names.JOB)) as heard:
        serving.jobs[0].finish(Failed("The disk is on fire."))
        path, arguments = await next_signal(heard, "Completed")
    assert (path, arguments) == (job.path, (False, "The disk is on fire."))


async def test_many_steps_are_few_signals(sessiond: Client, serving: FakeManager) -> None:
    job = await (await sessiond.session("live")).persist()
    heard = 0
    async with sessiond._connection.signals(Match(names.BUS, path=job.path)) as signals:
        for step in range(100_000):
            serving.jobs[0].move(step / 100_000)
        serving.jobs[0].finish()
        async for message in signals:
            if message.member == "Completed":
                break
            heard += 1
    assert heard < 120


async def test_a_session_that_was_just_closed(sessiond: Client, serving: FakeManager) -> None:
    session = await sessiond.session("live")
    await serving.close("live")
    with pytest.raises(NoSuchSession, match="no session 'live'"):
        await session.reset()
    complaint = await busctl_fails("call", *MANAGER, "ResetSession", "sa{sv}", "live", "0")
    assert "There is no session 'live'" in complaint
    complaint = await busctl_fails(
        "call", names.BUS, SESSION_PATH, names.SESSION, "Reset", "a{sv}", "0"
    )
    assert "There is no object /org/sessiond/Overlay1/session/live" in complaint


async def test_a_caller_that_vanishes_in_the_middle(serving: FakeManager, private_bus: str) -> None:
    session = serving.sessions["live"]
    session.snapshot_gate = trio.Event()
    busctl = await trio.lowlevel.open_process(
        ["busctl", "call", *MANAGER, "SnapshotSession", "ssa{sv}", "live", "late", "0"]
    )
    await until(lambda: session.snapshot_gate.statistics().tasks_waiting)
    busctl.kill()
    await busctl.wait()
    session.snapshot_gate.set()
    await until(lambda: "late" in session.snapshots)
    async with connect() as other:
        assert await other.call(names.BUS, names.ROOT_PATH, names.PEER, "Ping") == ()


async def test_a_job_outlives_who_started_it(serving: FakeManager, private_bus: str) -> None:
    await busctl("call", *MANAGER, "PersistSession", "sa{sv}", "live", "0")
    serving.jobs[0].move(0.5)
    path = f"{names.ROOT_PATH}/job/1"
    shown = await busctl("get-property", names.BUS, path, names.JOB, "State", "Progress")
    assert shown == 's "running"\nd 0.5\n'


def open_pipes() -> int:
    return sum(
        os.readlink(f"/proc/self/fd/{entry}").startswith("pipe:")
        for entry in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{entry}")
    )


async def test_a_reader_that_hangs_up_ends_the_diff(sessiond: Client, serving: FakeManager) -> None:
    def endless(target: int) -> object:
        line = json.dumps({"path": "x", "kind": "added", "type": "file", "size": 1}) + "\n"

        async def write() -> None:
            while True:
                await trio.lowlevel.wait_writable(target)
                try:
                    os.write(target, line.encode())
                except BrokenPipeError:
                    return

        return write()

    serving.sessions["live"].diff_body = endless
    session = await sessiond.session("live")
    before = open_pipes()
    for _ in range(20):
        async with session.diff() as differences:
            assert (await anext(differences)).path == "x"
        await until(lambda: open_pipes() == before)


async def test_a_reader_that_never_reads_gets_no_reason_and_keeps_nothing(
    sessiond: Client, serving: FakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    def fill_and_fail(target: int) -> None:
        try:
            while True:
                os.write(target, b"{}\n" * 1000)
        except BlockingIOError:
            raise Failed("nothing of the list was read") from None

    serving.sessions["live"].diff_body = fill_and_fail
    before = open_pipes()
    (descriptor,) = await sessiond._connection.call(
        names.BUS, SESSION_PATH, names.SESSION, "OpenDiff", "a{sv}", {}
    )
    assert isinstance(descriptor, int)
    await until(lambda: open_pipes() == before + 1)
    assert "Session live: the list of changes ends early: nothing of the list" in caplog.text
    os.close(descriptor)


async def test_a_diff_of_busctl_is_a_descriptor(serving: FakeManager) -> None:
    shown = await busctl("call", names.BUS, SESSION_PATH, names.SESSION, "OpenDiff", "a{sv}", "0")
    assert re.fullmatch(r"h \d+\n", shown)


async def test_another_service_is_not_pushed_aside(
    sessiond: Client, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    await nursery.start(service.serve, FakeManager())
    assert "Another process is org.sessiond.Overlay1" in caplog.text
    assert [session.id for session in await sessiond.sessions()] == ["live"]


async def test_a_bus_that_is_not_there_at_start_is_found_later(
    bus_directory: Path,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(service, "RECONNECT_INTERVAL", 0.01)
    caplog.set_level("INFO", "sessiond.bus")
    address = f"unix:path={bus_directory}/bus"
    await nursery.start(lambda **kwargs: service.serve(FakeManager(), address=address, **kwargs))
    assert "no message bus" in caplog.text
    with start_private_bus(bus_directory, address=address):
        await until(lambda: "The message bus is back" in caplog.text)
    assert caplog.text.count("no message bus") == 1


async def test_a_bus_that_comes_back_is_found(
    bus_directory: Path,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(service, "RECONNECT_INTERVAL", 0.01)
    caplog.set_level("INFO", "sessiond.bus")
    manager = FakeManager()
    manager.add("before")

    async def sessions(connection: Connection) -> list[object]:
        (listed,) = await connection.call(names.BUS, names.ROOT_PATH, names.MANAGER, "ListSessions")
        assert isinstance(listed, list)
        return [session[0] for session in listed]

    with start_private_bus(bus_directory) as address:
        await nursery.start(lambda **kwargs: service.serve(manager, address=address, **kwargs))
        async with connect(address) as caller:
            assert await sessions(caller) == ["before"]
    await until(lambda: "Sessions go on" in caplog.text)
    manager.add("meanwhile")
    (bus_directory / "bus").unlink(missing_ok=True)
    with start_private_bus(bus_directory) as address:
        await until(lambda: "The message bus is back" in caplog.text)
        async with connect(address) as caller:
            assert await sessions(caller) == ["before", "meanwhile"]


async def test_a_bus_without_our_policy_is_reported(
    bus_directory: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    policy = bus_directory / "empty.conf"
    policy.write_text("<busconfig/>")
    with start_private_bus(bus_directory, policy_files=[policy]) as address:
        await nursery.start(
            lambda **kwargs: service.serve(FakeManager(), address=address, **kwargs)
        )
        assert "org.sessiond.Overlay1.conf in /usr/share/dbus-1/system.d" in caplog.text


async def test_errors_keep_their_sentence_whatever_is_in_it(
    sessiond: Client, serving: FakeManager
) -> None:
    job = await (await sessiond.session("live")).reset()
    broken: FakeJob = serving.jobs[0]
    broken.finish(Failed("File 'a\udcffb' is broken."))
    with pytest.raises(Failed, match=r"File 'a\\udcffb' is broken"):
        await job.wait()
