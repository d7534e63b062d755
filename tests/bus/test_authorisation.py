"""Who may do what, asked by processes of other users."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sessiond.bus import names, service
from sessiond.bus.transport import ADDRESS_VARIABLE
from sessiond.errors import Cancelled
from tests.bus.fake_manager import FakeManager
from tests.support.bus import start_private_bus

pytestmark = pytest.mark.root

OWNER = pwd.getpwnam("nobody").pw_uid
STRANGER = pwd.getpwnam("daemon").pw_uid
"""A bus lets nobody in whom the user database does not know."""
POLICY = Path(__file__).parents[2] / "packaging/dbus/org.sessiond.Overlay1.conf"

BUSCTL_CALL = ["busctl", "--no-pager", "call"]

ROOT = names.ROOT_PATH
SESSION = f"{ROOT}/session/live"
SNAPSHOT = f"{SESSION}/snapshot/fresh"
JOB = f"{ROOT}/job/1"

Call = tuple[str, str, str, tuple[str, ...]]
"""Path, interface, member, and the arguments as busctl takes them."""

QUERIES: list[Call] = [
    (ROOT, names.MANAGER, "ListSessions", ()),
    (ROOT, names.MANAGER, "GetSession", ("s", "live")),
    (ROOT, names.MANAGER, "GetSessionByUser", ("u", "65534")),
    (ROOT, names.OBJECT_MANAGER, "GetManagedObjects", ()),
    (SESSION, names.PROPERTIES, "GetAll", ("s", names.SESSION)),
    (SESSION, names.INTROSPECTABLE, "Introspect", ()),
    (SESSION, names.PEER, "Ping", ()),
]

OWNERS_OPERATIONS: list[Call] = [
    (ROOT, names.MANAGER, "ResetSession", ("sa{sv}", "live", "0")),
    (ROOT, names.MANAGER, "SnapshotSession", ("ssa{sv}", "live", "more", "0")),
    (ROOT, names.MANAGER, "PersistSession", ("sa{sv}", "live", "0")),
    (ROOT, names.MANAGER, "CloseSession", ("sa{sv}", "live", "0")),
    (SESSION, names.SESSION, "Reset", ("a{sv}", "0")),
    (SESSION, names.SESSION, "Conflicts", ()),
    (SESSION, names.SESSION, "ScheduleReset", ("ta{sv}", "0", "1", "in", "u", "60")),
    (SESSION, names.SESSION, "CancelScheduledReset", ()),
    (SESSION, names.SESSION, "Inhibit", ("ss", "Player", "A film")),
    (SESSION, names.SESSION, "Snapshot", ("sa{sv}", "more", "0")),
    (SESSION, names.SESSION, "Restore", ("sa{sv}", "fresh", "0")),
    (SESSION, names.SESSION, "Persist", ("a{sv}", "0")),
    (SESSION, names.SESSION, "Commit", ("asa{sv}", "1", "/etc", "0")),
    (SESSION, names.SESSION, "Uncommit", ("asa{sv}", "1", "/etc", "0")),
    (SESSION, names.SESSION, "Committed", ("a{sv}", "0")),
    (SESSION, names.SESSION, "Changes", ("a{sv}", "0")),
    (SESSION, names.SESSION, "OpenDiff", ("a{sv}", "0")),
    (SESSION, names.SESSION, "PendingFiles", ("a{sv}", "0")),
    (SESSION, names.SESSION, "Rebase", ("a{sv}", "0")),
    (SESSION, names.SESSION, "OpenShadowed", ("a{sv}", "0")),
    (SESSION, names.SESSION, "Close", ("a{sv}", "0")),
    (SNAPSHOT, names.SNAPSHOT, "Describe", ("s", "as it was")),
    (SNAPSHOT, names.SNAPSHOT, "Pin", ("b", "true")),
    (SNAPSHOT, names.SNAPSHOT, "Rename", ("s", "stale")),
    (SNAPSHOT, names.SNAPSHOT, "Delete", ()),
]

ROOTS_OPERATIONS: list[Call] = [
    (ROOT, names.MANAGER, "CreateSession", ("ssa{sv}", "nobody", "live", "0")),
    (ROOT, names.MANAGER, "BeginMaintenance", ("ssa{sv}", "live", "Soon.", "0")),
    (ROOT, names.MANAGER, "CreateGuest", ()),
    (ROOT, names.MANAGER, "RemoveGuest", ("s", "guest-1")),
    (ROOT, names.MANAGER, "Login", ("uu", "65534", "0")),
    (ROOT, names.MANAGER, "Logout", ("u", "65534")),
    (SESSION, names.SESSION, "SetKeep", ("asa{sv}", "1", "/etc", "0")),
]

ROOTS_ENDINGS: list[Call] = [
    (ROOT, names.MANAGER, "FinishMaintenance", ("a{sv}", "0")),
    (ROOT, names.MANAGER, "CancelMaintenance", ("a{sv}", "0")),
]


@pytest.fixture
def guarded_bus(bus_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bus with the policy that is shipped, as the system bus."""
    with start_private_bus(bus_directory, policy_files=[POLICY]) as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        yield


@pytest.fixture
async def guarded(guarded_bus: None, manager: FakeManager, nursery: trio.Nursery) -> FakeManager:
    """A session with a snapshot, served on that bus."""
    await manager.sessions["live"].snapshots.make("fresh")
    await nursery.start(service.serve, manager)
    return manager


async def call(
    uid: int, path: str, interface: str, member: str, arguments: tuple[str, ...]
) -> tuple[int, str]:
    """Call as another user; return the exit code and what busctl says."""
    done = await trio.run_process(
        [*BUSCTL_CALL, names.BUS, path, interface, member, *arguments],
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
        user=uid,
        group=uid,
        extra_groups=[],
    )
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query[2])
async def test_everyone_may_ask(query: Call, guarded: FakeManager) -> None:
    code, said = await call(STRANGER, *query)
    assert code == 0, said


@pytest.mark.parametrize("operation", OWNERS_OPERATIONS, ids=lambda operation: operation[2])
async def test_owners_may_change_what_is_theirs(operation: Call, guarded: FakeManager) -> None:
    code, said = await call(OWNER, *operation)
    assert code == 0, said


@pytest.mark.parametrize("operation", OWNERS_OPERATIONS, ids=lambda operation: operation[2])
async def test_strangers_may_not(operation: Call, guarded: FakeManager) -> None:
    code, said = await call(STRANGER, *operation)
    assert code != 0
    assert f"As uid {STRANGER} you may not" in said
    assert f"only root and its owner, uid {OWNER}, may" in said
    assert not guarded.jobs
    assert list(guarded.sessions["live"].snapshots) == ["fresh"]


@pytest.mark.parametrize("uid", [OWNER, STRANGER])
@pytest.mark.parametrize(
    "operation", ROOTS_OPERATIONS + ROOTS_ENDINGS, ids=lambda operation: operation[2]
)
async def test_only_root_may(operation: Call, uid: int, guarded: FakeManager) -> None:
    code, said = await call(uid, *operation)
    assert code != 0
    assert f"As uid {uid} you may not " in said
    assert "; only root may" in said
    assert list(guarded.sessions) == ["live"]


@pytest.mark.parametrize("ending", ROOTS_ENDINGS, ids=lambda operation: operation[2])
async def test_root_may_end_a_maintenance(ending: Call, guarded: FakeManager) -> None:
    await guarded.begin_maintenance("live", "", started_by=0)
    code, said = await call(os.geteuid(), *ending)
    assert code == 0, said


@pytest.mark.parametrize(
    "operation", OWNERS_OPERATIONS + ROOTS_OPERATIONS, ids=lambda operation: operation[2]
)
async def test_root_may_all(operation: Call, guarded: FakeManager) -> None:
    code, said = await call(os.geteuid(), *operation)
    assert code == 0, said


async def test_the_session_of_a_login_is_not_closed_by_its_owner(guarded: FakeManager) -> None:
    """They could change what it covers, such as the home that every login begins with."""
    guarded.sessions["live"].of_login = True
    close = (SESSION, names.SESSION, "Close", ("a{sv}", "0"))
    for path, interface, member, arguments in (
        close,
        (ROOT, names.MANAGER, "CloseSession", ("sa{sv}", "live", "0")),
    ):
        code, said = await call(OWNER, path, interface, member, arguments)
        assert code != 0
        assert "only root may" in said
    assert list(guarded.sessions) == ["live"]
    code, said = await call(os.geteuid(), *close)
    assert code == 0, said


async def test_jobs_are_cancelled_by_their_owners(guarded: FakeManager) -> None:
    job = guarded.sessions["live"].reset(started_by=0)
    code, said = await call(STRANGER, JOB, names.JOB, "Cancel", ())
    assert code != 0
    assert "you may not cancel a job of this session" in said
    assert not job.finished
    code, said = await call(OWNER, JOB, names.JOB, "Cancel", ())
    assert code == 0, said
    assert isinstance(job.error, Cancelled)


async def test_whoever_started_a_job_is_told(guarded: FakeManager) -> None:
    await call(OWNER, SESSION, names.SESSION, "Reset", ("a{sv}", "0"))
    assert guarded.jobs[0].started_by == OWNER


async def test_nobody_else_can_be_sessiond(guarded_bus: None) -> None:
    taken = await trio.run_process(
        [
            *BUSCTL_CALL,
            names.DBUS,
            names.DBUS_PATH,
            names.DBUS,
            "RequestName",
            "su",
            names.BUS,
            "0",
        ],
        capture_stderr=True,
        check=False,
        user=STRANGER,
    )
    assert taken.returncode != 0
    assert b"Access denied" in taken.stderr
