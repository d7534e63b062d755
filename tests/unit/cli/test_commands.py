"""Each command, as a process of its own, against the real D-Bus service."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import trio

from sessiond.bus.objects import SessionObject
from sessiond.bus.transport import ADDRESS_VARIABLE
from sessiond.cli.exit_codes import ExitCode
from sessiond.cli.main import main
from sessiond.errors import Cancelled, Interrupted, NoSpace
from sessiond.session.conflicts import Program
from sessiond.session.model import (
    Breakdown,
    Conflicts,
    Manner,
    PendingFile,
    SessionId,
    SessionState,
    SnapshotName,
    Uid,
)
from sessiond.session.schedule import Why
from sessiond.session.upkeep import SnapshotSize
from tests.bus.fake_manager import FakeManager
from tests.support.users import NOBODY
from tests.support.waiting import BOUND, until
from tests.unit.cli.conftest import Sessionctl

STRANGER = 1
"""Another user who is on record; the bus does not speak with others."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's identity")


async def test_list(manager: FakeManager, sessionctl: Sessionctl) -> None:
    manager.add("other", "root", 0)
    head, first, second = await sessionctl.lines("list")
    assert head.split() == ["ID", "USER", "PROFILE", "STORAGE", "STATE", "USED", "MOUNT", "POINT"]
    mount_point = "/run/sessiond/sessions/live/root"
    used = "4.0 KiB of 1.0 TiB (0%)"
    assert first.split() == [
        "live",
        "nobody",
        "live",
        "tmpfs",
        "active",
        *used.split(),
        mount_point,
    ]
    assert second.split()[:2] == ["other", "root"]


@pytest.mark.parametrize("command", ["list", "top"])
async def test_characters_that_the_locale_does_not_have(
    manager: FakeManager, sessionctl: Sessionctl, command: str
) -> None:
    manager.add("other", "Zoë→", 1000)
    sessionctl.environment["PYTHONIOENCODING"] = "latin1"
    printed = (await sessionctl(command)).stdout
    assert "Zoë\\u2192 ".encode("latin1") in printed


async def test_list_for_programs(manager: FakeManager, sessionctl: Sessionctl) -> None:
    assert await sessionctl.json("list") == [
        {
            "id": "live",
            "user": "nobody",
            "uid": 65534,
            "profile": "live",
            "image": "/images/root.squashfs",
            "mount_point": "/run/sessiond/sessions/live/root",
            "storage": "tmpfs",
            "state": "active",
            "failure": "",
            "bytes_used": 4096,
            "bytes_limit": 1 << 40,
            "inodes_used": 3,
            "inodes_limit": 1000,
            "space_level": "normal",
            "pending": 0,
            "created_at": "2024-05-06T07:08:09.123456Z",
            "last_reset": None,
            "next_reset": None,
            "next_reset_reason": "",
            "inhibitors": [],
            "keep": ["/home/*/Documents"],
        }
    ]


async def test_status(manager: FakeManager, sessionctl: Sessionctl) -> None:
    await sessionctl("snapshot", "live", "good", "--description", "works")
    lines = await sessionctl.lines("status", "live")
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["Session"] == "live"
    assert facts["User"] == "nobody (65534)"
    assert facts["Inodes"] == "3 of 1000"
    assert facts["Snapshots"] == "good"
    assert facts["Changes"] == "1 added, 2 changed, 3 deleted, 4 renamed; 1.0 TiB in files"
    told = await sessionctl.json("status", "live")
    assert isinstance(told, dict)
    assert told["changes"] == {
        "added": 1,
        "changed": 2,
        "deleted": 3,
        "renamed": 4,
        "bytes": 1 << 40,
        "largest": [{"path": "/film", "kind": "added", "size": 1 << 39}],
    }
    assert [snapshot["name"] for snapshot in told["snapshots"]] == ["good"]
    assert told["last_job"] is None
    assert "Last job" not in facts


async def test_status_tells_of_the_last_job(manager: FakeManager, sessionctl: Sessionctl) -> None:
    job = manager.sessions[SessionId("live")].reset(started_by=Uid(0))
    assert "Last job     reset running" in await sessionctl.lines("status", "live")
    job.finish(Interrupted("It was undone."))
    lines = await sessionctl.lines("status", "live")
    assert "Last job     reset failed: It was undone." in lines
    told = await sessionctl.json("status", "live")
    assert isinstance(told, dict)
    assert told["last_job"]["state"] == "failed"
    assert told["last_job"]["error_name"] == "org.sessiond.Overlay1.Error.Interrupted"


async def test_status_of_a_session_that_has_failed(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    session = manager.sessions[SessionId("live")]
    session.state, session.failure = SessionState.FAILED, "The image is missing."
    lines = await sessionctl.lines("status", "live")
    assert "State        failed: The image is missing." in lines
    assert not any(line.startswith("Changes") for line in lines)
    assert any(" failed " in line for line in await sessionctl.lines("list"))


@as_root
async def test_status_shows_strangers_no_changes(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    done = await sessionctl("status", "live", "--json", user=STRANGER)
    assert json.loads(done.stdout)["changes"] is None
    assert b"Changes" not in (await sessionctl("status", "live", user=STRANGER)).stdout
    assert b"Changes" in (await sessionctl("status", "live", user=NOBODY)).stdout


async def test_create(manager: FakeManager, sessionctl: Sessionctl) -> None:
    lines = await sessionctl.lines("create", "nobody", "live")
    mount_point = "/run/sessiond/sessions/nobody-1/root"
    assert lines == [f"Session nobody-1 of nobody is mounted at {mount_point}."]
    told = await sessionctl.json("create", "nobody", "live", "--id", "second")
    assert isinstance(told, dict)
    assert told["id"] == "second"
    assert set(manager.sessions) == {"live", "nobody-1", "second"}


@pytest.mark.parametrize("option", ["--no-verify", None])
async def test_persist(manager: FakeManager, sessionctl: Sessionctl, option: str | None) -> None:
    session = manager.get("live")
    manager.jobs_finish_at_once = True
    await sessionctl("persist", "live", *filter(None, [option]))
    assert session.verified is (option is None)


async def test_persist_names_what_is_not_on_disk_yet(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    session = manager.get("live")
    manager.jobs_finish_at_once = True
    session.files = [PendingFile("/var/log", ("cat", "dog")), PendingFile("/etc/motd", ())]
    session.pending = 2
    lines = await sessionctl.lines("persist", "live")
    assert lines[1:] == ["/var/log  (cat, dog)", "/etc/motd  (by whom cannot be seen)"]
    lines = await sessionctl.lines("status", "live")
    assert any("what is written to 2 files" in line for line in lines)
    assert any("/var/log  (cat, dog)" in line for line in lines)
    told = await sessionctl.json("status", "live")
    assert isinstance(told, dict)
    assert told["pending"] == 2
    assert told["pending_files"][0] == {"path": "/var/log", "programs": ["cat", "dog"]}


@pytest.mark.parametrize("arguments", [["reset", "live"], ["persist", "live"]])
async def test_jobs_are_waited_for(
    arguments: list[str], manager: FakeManager, sessionctl: Sessionctl, nursery: trio.Nursery
) -> None:
    result: list[subprocess.CompletedProcess[bytes]] = []

    async def run() -> None:
        result.append(await sessionctl(*arguments))

    nursery.start_soon(run)
    await until(lambda: manager.jobs)
    manager.jobs[0].move(0.5)
    assert not result
    manager.jobs[0].finish()
    await until(lambda: result)
    assert (result[0].stdout, result[0].stderr) == (b"", b"")


async def test_jobs_show_their_progress_on_a_terminal(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    master, slave = pty.openpty()
    process = await trio.lowlevel.open_process(
        sessionctl.command("persist", "live"),
        stderr=slave,
        env=sessionctl.environment | {"TERM": "xterm"},
    )
    os.close(slave)
    async with trio.lowlevel.FdStream(master) as stream:
        await until(lambda: manager.jobs)
        manager.jobs[0].move(0.5)
        shown = b""
        with trio.fail_after(BOUND):
            while b" 50%" not in shown:
                shown += await stream.receive_some()
        manager.jobs[0].finish()
        assert await process.wait() == 0
    assert b"Moving live to disk" in shown


async def test_a_job_that_fails_gives_its_reason(
    manager: FakeManager, sessionctl: Sessionctl, nursery: trio.Nursery
) -> None:
    nursery.start_soon(partial(sessionctl, "persist", "live", code=ExitCode.NO_SPACE))
    await until(lambda: manager.jobs)
    manager.jobs[0].finish(NoSpace("The disk is full."))


async def test_cancel_cancels_what_somebody_else_has_started(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    await sessionctl("cancel", "live")
    job = manager.sessions["live"].reset(started_by=Uid(0))
    await sessionctl("cancel", "live")
    assert isinstance(job.error, Cancelled)


async def test_an_interrupt_cancels_the_job(manager: FakeManager, sessionctl: Sessionctl) -> None:
    process = await trio.lowlevel.open_process(
        sessionctl.command("reset", "live"), stderr=subprocess.PIPE, env=sessionctl.environment
    )
    await until(lambda: manager.jobs)
    process.send_signal(signal.SIGINT)
    assert await process.wait() == ExitCode.CANCELLED
    assert manager.jobs[0].finished
    assert process.stderr is not None
    async with process.stderr as stream:
        assert await stream.receive_some() == b"sessionctl: The reset was cancelled.\n"


async def test_snapshots(manager: FakeManager, sessionctl: Sessionctl) -> None:
    manager.jobs_finish_at_once = True
    await sessionctl("snapshot", "live", "first", "--description", "all is well")
    told = await sessionctl.json("snapshot", "live", "second")
    assert isinstance(told, dict)
    assert told["name"] == "second"
    head, first, second = await sessionctl.lines("snapshots", "live")
    assert head.split() == ["NAME", "CREATED", "SIZE", "GIVES", "BACK", "KIND", "DESCRIPTION"]
    assert "8.0 KiB  4.0 KiB" in first
    assert first.startswith("first")
    assert first.endswith("all is well")
    assert second.startswith("second")
    session = manager.sessions[SessionId("live")]
    await sessionctl("restore", "live", "first", "--no-undo")
    assert not session.undo
    await sessionctl("restore", "live", "first")
    assert session.undo
    await sessionctl("restore", "live", "third", code=ExitCode.NOT_FOUND)
    await sessionctl("delete-snapshot", "live", "first")
    listed = await sessionctl.json("snapshots", "live")
    assert isinstance(listed, list)
    assert [snapshot["name"] for snapshot in listed] == ["second"]


async def test_what_is_noted_of_a_snapshot_is_edited(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    await sessionctl("snapshot", "live", "first", "--pin")
    session = manager.sessions[SessionId("live")]
    session.size = SnapshotSize(0, 0, known=False)
    _, line = await sessionctl.lines("snapshots", "live")
    assert line.split()[-2:] == ["counting", "pinned"]
    text = "all is\nwell"
    change = ("edit-snapshot", "live", "first")
    await sessionctl(*change, "--no-pin", "--description", text, "--name", "good")
    listed = await sessionctl.json("snapshots", "live")
    assert isinstance(listed, list)
    (told,) = listed
    assert (told["name"], told["description"], told["pinned"]) == ("good", text, False)
    await sessionctl(*change, "--pin", code=ExitCode.NOT_FOUND)


DIFFERENCES: tuple[dict[str, object], ...] = (
    {"path": "/new\udcff\n", "kind": "added", "type": "file", "size": 2048, "old_size": 0},
    {"path": "/etc", "kind": "metadata", "type": "directory", "size": 0, "old_size": 0},
    {"path": "/etc/motd", "kind": "contents", "type": "file", "size": 1, "old_size": 12},
    {"path": "/etc/group", "kind": "deleted", "type": "file", "size": 0, "old_size": 500},
    {"path": "/etc/x/y/z", "kind": "type", "type": "symlink", "size": 0, "old_size": 3},
    {
        "path": "/b",
        "kind": "renamed",
        "type": "file",
        "size": 2,
        "old_size": 2,
        "from": "/a",
        "changed": "metadata",
    },
)


async def test_export(manager: FakeManager, sessionctl: Sessionctl, tmp_path: Path) -> None:
    manager.jobs_finish_at_once = True
    await sessionctl("snapshot", "live", "good")
    assert (await sessionctl("export", "live", "good", "-")).stdout == b"the archive"
    await sessionctl("export", "live", "good", str(tmp_path / "good.tar"))
    assert [path.name for path in tmp_path.iterdir()] == ["good.tar"]
    assert (tmp_path / "good.tar").read_bytes() == b"the archive"


async def test_an_export_that_fails_leaves_no_file(
    manager: FakeManager, sessionctl: Sessionctl, tmp_path: Path
) -> None:
    file = tmp_path / "file.tar"
    await sessionctl("export", "live", "missing", str(file), code=ExitCode.NOT_FOUND)
    await sessionctl("snapshot", "live", "good")
    manager.jobs_finish_with = NoSpace("There is none.")
    await sessionctl("export", "live", "good", str(file), code=ExitCode.NO_SPACE)
    done = await sessionctl("export", "live", "good", "/no/such/file", code=ExitCode.FAILED)
    assert b"/no/such/file cannot be opened or written" in done.stderr
    assert list(tmp_path.iterdir()) == []


async def test_an_export_as_squashfs(
    manager: FakeManager, sessionctl: Sessionctl, tmp_path: Path
) -> None:
    manager.jobs_finish_at_once = True
    await sessionctl("snapshot", "live", "good")
    for file, options, begins in (
        ("a.squashfs", [], b"hsqs"),
        ("a.tar", ["--format", "squashfs"], b"hsqs"),
        ("b.squashfs", ["--format", "oci"], b"the archive"),
    ):
        await sessionctl("export", "live", "good", str(tmp_path / file), *options)
        assert (tmp_path / file).read_bytes() == begins


async def test_import(manager: FakeManager, sessionctl: Sessionctl, tmp_path: Path) -> None:
    manager.jobs_finish_at_once = True
    (tmp_path / "file.tar").write_bytes(b"the archive")
    await sessionctl("import", "live", "old", str(tmp_path / "file.tar"))
    assert manager.sessions[SessionId("live")].imported == {"old": b"the archive"}
    done = await sessionctl("import", "live", "old", str(tmp_path), code=ExitCode.FAILED)
    assert b"cannot be read: Is a directory" in done.stderr


async def test_archives_are_for_root(
    manager: FakeManager, sessionctl: Sessionctl, tmp_path: Path
) -> None:
    await sessionctl("snapshot", "live", "good")
    owner, refused = 65534, ExitCode.NOT_AUTHORIZED
    done = await sessionctl("export", "live", "good", "-", user=owner, code=refused)
    assert b"only root may" in done.stderr
    await sessionctl("import", "live", "new", "/dev/null", user=owner, code=refused)
    assert manager.jobs == []


def tell(manager: FakeManager, *told: dict[str, object]) -> bytes:
    body = b"".join(json.dumps(one).encode() + b"\n" for one in told)
    manager.sessions[next(iter(manager.sessions))].diff_body = lambda target: os.write(target, body)
    return body


async def test_diff(manager: FakeManager, sessionctl: Sessionctl) -> None:
    body = tell(manager, *DIFFERENCES)
    assert await sessionctl.lines("diff", "live", "--list") == [
        "added     file          2.0 KiB  /new\\xff\\n",
        "metadata  directory              /etc",
        "contents  file       12 B -> 1 B  /etc/motd",
        "deleted   file            500 B  /etc/group",
        "type      symlink                /etc/x/y/z",
        "renamed   file              2 B  /b (from /a)",
        "1 added, 3 changed, 1 deleted, 1 renamed; 2.0 KiB in files",
    ]
    assert (await sessionctl("diff", "live", "--json")).stdout == body


async def test_diff_as_a_tree(manager: FakeManager, sessionctl: Sessionctl) -> None:
    tell(manager, *DIFFERENCES)
    assert await sessionctl.lines("diff", "live", "--depth", "2") == [
        "/  (1 added, 3 changed, 1 deleted, 1 renamed; 2.0 KiB in files)",
        "├── b  renamed from /a, metadata, 2 B",
        "├── etc/  metadata  (3 changed, 1 deleted; 1 B in files)",
        "│   ├── group  deleted, 500 B",
        "│   ├── motd  contents, 12 B -> 1 B",
        "│   └── x/  (1 changed; 0 B in files)",
        "└── new\\xff\\n  added, 2.0 KiB",
        "1 added, 3 changed, 1 deleted, 1 renamed; 2.0 KiB in files",
    ]


async def test_where_most_has_changed(manager: FakeManager, sessionctl: Sessionctl) -> None:
    session = manager.sessions[next(iter(manager.sessions))]
    assert await sessionctl.lines("diff", "live", "--directories", "5") == [
        "IN FILES  ADDED  CHANGED  DELETED  RENAMED  BELOW",
        "1.0 TiB   1      2        3        4        /",
    ]
    assert session.breakdown.directories == 5
    assert session.breakdown.depth > 1000
    told = await sessionctl.json("diff", "live", "--directories", "1", "--depth", "2", "--json")
    assert session.breakdown == Breakdown(1, 2)
    assert told == {
        "path": "/",
        "added": 1,
        "changed": 2,
        "deleted": 3,
        "renamed": 4,
        "bytes": 1 << 40,
    }


async def test_diff_of_contents(manager: FakeManager, sessionctl: Sessionctl) -> None:
    motd, new, old, *_ = ({**one} for one in (DIFFERENCES[2], DIFFERENCES[0], DIFFERENCES[3]))
    motd["content"] = {"old": "a\nb\n", "new": "a\n\x1b\n"}
    new["content"] = "binary"
    old["content"] = "forbidden"
    tell(manager, motd, new, old, DIFFERENCES[1])
    assert await sessionctl.lines("diff", "live", "--content") == [
        "--- a/etc/motd",
        "+++ b/etc/motd",
        "@@ -1,2 +1,2 @@",
        " a",
        "-b",
        "+\\x1b",
        "Binary files differ: /new\\xff\\n",
        "Not shown, since you may not read it: /etc/group",
        "1 added, 2 changed, 1 deleted; 2.0 KiB in files",
    ]
    assert manager.sessions[next(iter(manager.sessions))].diff_reader == os.getuid()


async def test_diff_of_a_pristine_session(manager: FakeManager, sessionctl: Sessionctl) -> None:
    manager.sessions[next(iter(manager.sessions))].diff_body = lambda target: None
    assert await sessionctl.lines("diff", "live") == ["None: nothing differs."]
    assert (await sessionctl("diff", "live", "--json")).stdout == b""


async def test_diff_between_snapshots(manager: FakeManager, sessionctl: Sessionctl) -> None:
    session = manager.sessions[next(iter(manager.sessions))]
    await sessionctl("snapshot", "live", "one")
    await sessionctl("snapshot", "live", "two")
    await sessionctl("diff", "live", "--from", "one", "--to", "two")
    assert session.compared == ("one", "two")
    await sessionctl("diff", "live", "--from", "none", code=ExitCode.NOT_FOUND)


async def test_a_diff_that_breaks_off_is_a_failure(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    body = json.dumps(DIFFERENCES[0]).encode() + b"\n"
    session = manager.sessions[next(iter(manager.sessions))]
    session.diff_body = lambda target: os.write(target, body)
    session.diff_end = b'{"path": "/half'
    await sessionctl("diff", "live", code=ExitCode.FAILED)
    for option in ("--list", "--json"):
        done = await sessionctl("diff", "live", option, code=ExitCode.FAILED)
        assert b"The list of changes ends early" in done.stderr
        assert b"added" in done.stdout
        assert b"1 added" not in done.stdout


@pytest.mark.parametrize("options", [(), ("--list",)])
async def test_a_reader_that_has_seen_enough_is_no_failure(
    manager: FakeManager, sessionctl: Sessionctl, options: tuple[str, ...]
) -> None:
    body = b"".join(json.dumps(one).encode() + b"\n" for one in DIFFERENCES * 50)
    manager.sessions[next(iter(manager.sessions))].diff_body = lambda target: os.write(target, body)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as broken:
        done = await trio.run_process(
            sessionctl.command("diff", "live", *options),
            stdout=broken,
            capture_stderr=True,
            check=False,
            env=sessionctl.environment,
        )
    assert (done.returncode, done.stderr) == (141, b"")


async def test_rebase_and_what_is_shadowed(manager: FakeManager, sessionctl: Sessionctl) -> None:
    manager.jobs_finish_at_once = True
    session = manager.sessions[SessionId("live")]
    source = manager.source_of(session)
    await sessionctl("rebase", "live")
    assert session.rebased_with == (source, None, False)
    await sessionctl("rebase", "live", "--conflicts", "save", "--remount")
    assert session.rebased_with == (source, Conflicts.SAVE, True)
    (line,) = await sessionctl.lines("shadowed", "live")
    assert line == "saved    file       /etc/motd as /etc/motd.sessiond-old  (now, monday)"
    told = await sessionctl.json("shadowed", "live")
    assert told == {
        "path": "/etc/motd",
        "type": "file",
        "outcome": "saved",
        "now": True,
        "snapshots": ["monday"],
        "saved_as": "/etc/motd.sessiond-old",
    }


async def test_a_reset_with_manners(manager: FakeManager, sessionctl: Sessionctl) -> None:
    manager.jobs_finish_at_once = True
    await sessionctl("reset", "live", "--terminate", "--grace", "3", "--snapshot-as", "kept")
    await sessionctl("reset", "live", "--snapshot-first")
    assert manager.jobs[0].manner == Manner(terminate=True, grace=3, snapshot=SnapshotName("kept"))
    assert manager.jobs[1].manner == Manner(snapshot=True)
    await sessionctl("reset", "live", "--keep", "/home/a b", "--keep", "/srv/")
    assert manager.jobs[2].manner == Manner(keep=("/home/a b", "/srv"))
    done = await sessionctl("reset", "live", "--keep", "../srv", code=ExitCode.USAGE)
    assert b"an absolute path of the session is needed" in done.stderr


async def test_conflicts(manager: FakeManager, sessionctl: Sessionctl) -> None:
    manager.sessions[SessionId("live")].programs = (
        Program("editor", (11, 12), Uid(1000), "session-2.scope"),
    )
    assert await sessionctl.lines("conflicts", "live") == [
        "PROGRAM  PIDS   UID   UNIT",
        "editor   11 12  1000  session-2.scope",
    ]
    assert await sessionctl.json("conflicts", "live") == [
        {"name": "editor", "pids": [11, 12], "uid": 1000, "unit": "session-2.scope"}
    ]


async def test_resets_are_scheduled(manager: FakeManager, sessionctl: Sessionctl) -> None:
    asked = manager.sessions[SessionId("live")].timer.asked
    await sessionctl("schedule-reset", "live", "--at", "2026-01-02T03:04:05+00:00")
    await sessionctl("schedule-reset", "live", "--at", "18:30", "--terminate")
    await sessionctl("schedule-reset", "live", "--in", "2h", "--warning", "90s")
    await sessionctl("schedule-reset", "live", "--idle", "10min")
    await sessionctl("cancel-reset", "live")
    assert asked[0][1]["at"] == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    at = asked[1][1]["at"]
    assert isinstance(at, datetime)
    assert (at.astimezone().hour, at.astimezone().minute) == (18, 30)
    assert at > datetime.now(UTC)
    assert (asked[2][1]["after"], asked[2][1]["warning"]) == (7200, 90)
    assert asked[3][1]["idle"] == 600
    assert asked[4] == (Uid(os.getuid()), {})


async def test_a_command_holds_resets_back(manager: FakeManager, sessionctl: Sessionctl) -> None:
    inhibitors = manager.sessions[SessionId("live")].timer.inhibitors
    held = []
    status = [*sessionctl.command("status", "live", "--json")]
    done = await sessionctl("inhibit", "live", "--why", "A film", "--", *status)
    held = json.loads(done.stdout)["inhibitors"]
    assert [one[:2] for one in held] == [[status[0], "A film"]]
    assert len(inhibitors.all) == 1, "nobody has looked since"
    process = await trio.run_process(
        sessionctl.command("inhibit", "live", "--", "sh", "-c", "exit 7"),
        env=sessionctl.environment,
        check=False,
    )
    assert process.returncode == 7
    await sessionctl("inhibit", "live", "--", "/no/such/command", code=ExitCode.FAILED)


async def test_status_tells_of_the_next_reset(manager: FakeManager, sessionctl: Sessionctl) -> None:
    timer = manager.sessions[SessionId("live")].timer
    timer.next_reset, timer.reason = datetime(2026, 1, 2, tzinfo=UTC), Why.DAILY
    os.close(timer.inhibitors.add(Uid(0), "Player", "A film"))
    printed = await sessionctl.lines("status", "live")
    assert any(line.startswith("Next reset    2026-01-0") for line in printed), printed
    assert "Held back by  Player: A film" in printed


async def test_close(manager: FakeManager, sessionctl: Sessionctl) -> None:
    await sessionctl("close", "live")
    assert not manager.sessions
    await sessionctl("close", "live", code=ExitCode.NOT_FOUND)


async def test_guests(manager: FakeManager, sessionctl: Sessionctl) -> None:
    assert await sessionctl.lines("guest", "add") == ["guest-2"]
    assert await sessionctl.json("guest", "add") == {"name": "guest-3", "uid": 2_100_000_003}
    assert await sessionctl.lines("guest", "list") == ["guest-1", "guest-2", "guest-3"]
    await sessionctl("guest", "remove", "guest-2")
    assert await sessionctl.json("guest", "list") == ["guest-1", "guest-3"]
    await sessionctl("guest", "remove", "root", code=ExitCode.USAGE)
    assert manager.guests.names == ["guest-1", "guest-3"]


async def test_wait(manager: FakeManager, sessionctl: Sessionctl) -> None:
    await sessionctl("wait", "live")
    await sessionctl("wait", "none", code=ExitCode.NOT_FOUND)
    session = manager.sessions[SessionId("live")]
    session.state, session.failure = SessionState.FAILED, "The image is missing."
    done = await sessionctl("wait", "live", code=ExitCode.FAILED)
    assert b"The image is missing." in done.stderr


async def test_wait_for_what_goes_on(
    manager: FakeManager, sessionctl: Sessionctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = manager.sessions[SessionId("live")]
    session.state = SessionState.BUSY
    manager.tell("session_changed", session)
    asked = trio.Event()
    values = SessionObject.property_values

    def property_values(self: SessionObject) -> dict[str, object]:
        asked.set()
        return values(self)

    monkeypatch.setattr(SessionObject, "property_values", property_values)
    process = await trio.lowlevel.open_process(
        sessionctl.command("wait", "live"), env=sessionctl.environment
    )
    await asked.wait()
    assert process.poll() is None
    session.state = SessionState.ACTIVE
    manager.tell("session_changed", session)
    assert await process.wait() == 0


async def test_monitor(manager: FakeManager, sessionctl: Sessionctl) -> None:
    """One line for each signal, at once, also into a pipe."""
    process = await trio.lowlevel.open_process(
        sessionctl.command("monitor", "--json"), stdout=subprocess.PIPE, env=sessionctl.environment
    )
    assert process.stdout is not None
    seen = b""
    number = 0
    async with process.stdout as stream:
        while not seen.endswith(b"\n"):
            # Until it listens, it misses what happens.
            number += 1
            manager.add(f"new-{number}")
            with trio.move_on_after(0.05):
                seen += await stream.receive_some()
        process.send_signal(signal.SIGINT)
    assert await process.wait() == 128 + signal.SIGINT
    assert len(seen) < 4096, "events are not kept back until a buffer is full"
    event = json.loads(seen.splitlines()[0])
    assert set(event) == {"time", "session", "path", "interface", "member", "arguments"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "none"], ExitCode.NOT_FOUND),
        (["reset", "none"], ExitCode.NOT_FOUND),
        (["diff", "none"], ExitCode.NOT_FOUND),
        (["snapshots", "none"], ExitCode.NOT_FOUND),
        (["delete-snapshot", "live", "none"], ExitCode.NOT_FOUND),
        (["create", "nobody", "none"], ExitCode.NOT_FOUND),
        (["create", "nobody", "live", "--id", "live"], ExitCode.EXISTS),
        (["create", "nobody", "live", "--id", "../etc"], ExitCode.USAGE),
        (["create", "nobody", "broken"], ExitCode.FAILED),
        (["snapshot", "live", "a/b"], ExitCode.USAGE),
        (["snapshot", "live", "\x1b[31m"], ExitCode.USAGE),
        (["status", "\n"], ExitCode.USAGE),
        (["status", "a" * 100], ExitCode.USAGE),
        (["status", "\udcff"], ExitCode.USAGE),
    ],
)
async def test_failures_have_their_codes(
    arguments: list[str],
    code: ExitCode,
    manager: FakeManager,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLE, address)
    assert await trio.to_thread.run_sync(main, arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sessionctl: ")
    assert printed.err.count("\n") == 1, "one line says all"
    assert "\x1b" not in printed.err


async def test_a_busy_session(manager: FakeManager, sessionctl: Sessionctl) -> None:
    session = manager.sessions[next(iter(manager.sessions))]
    session.persist(started_by=session.uid)
    done = await sessionctl("reset", "live", code=ExitCode.BUSY)
    assert b"persist" in done.stderr


@as_root
@pytest.mark.parametrize(
    "arguments", [["reset", "live"], ["diff", "live"], ["create", "nobody", "live"]]
)
async def test_strangers_are_refused(
    arguments: list[str], manager: FakeManager, sessionctl: Sessionctl
) -> None:
    await sessionctl(*arguments, code=ExitCode.NOT_AUTHORIZED, user=STRANGER)


@as_root
@pytest.mark.parametrize("arguments", [["shell", "live"], ["run", "live", "--", "id"]])
async def test_entering_takes_root(
    arguments: list[str], manager: FakeManager, sessionctl: Sessionctl
) -> None:
    await sessionctl(*arguments, code=ExitCode.NOT_AUTHORIZED, user=NOBODY)


@as_root
async def test_a_session_that_is_not_mounted_is_not_entered(
    manager: FakeManager, sessionctl: Sessionctl
) -> None:
    session = manager.sessions[next(iter(manager.sessions))]
    session.state, session.failure = SessionState.FAILED, "The image is gone."
    done = await sessionctl("run", "live", "--", "id", code=ExitCode.FAILED)
    assert b"Session live cannot be entered, it is failed. The image is gone.\n" in done.stderr
    assert "State        failed: The image is gone." in await sessionctl.lines("status", "live")


async def test_without_a_daemon(sessionctl: Sessionctl) -> None:
    done = await sessionctl("list", code=ExitCode.UNREACHABLE)
    assert b"systemctl start sessiond" in done.stderr


async def test_without_a_bus() -> None:
    done = await Sessionctl("unix:path=/nonexistent/bus")("list", code=ExitCode.UNREACHABLE)
    assert b"There is no message bus at unix:path=/nonexistent/bus" in done.stderr
