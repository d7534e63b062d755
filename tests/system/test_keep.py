"""What outlives resets, with the whole daemon: configured, committed, found again after deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from sessiond.cli.exit_codes import ExitCode
from tests.support.daemon import Daemon, wait_until

RULES = ("/home/*/docs", "/etc/motd")


def configure(daemon: Daemon, *rules: str, **more: str) -> None:
    daemon.configure(
        {
            "profile.guest": {
                "image": str(daemon.directory / "image"),
                "size": "64M",
                "keep": rules,  # type: ignore[dict-item]
                **more,
            }
        }
    )


@pytest.fixture
def daemon(idle_daemon: Daemon) -> Daemon:
    """A daemon whose profile ``guest`` keeps something, running."""
    configure(idle_daemon, *RULES)
    idle_daemon.start()
    return idle_daemon


def create(daemon: Daemon, session: str, user: str = "root") -> Path:
    daemon.sessionctl("create", user, "guest", "--id", session)
    return daemon.root(session)


def test_from_session_to_session(daemon: Daemon) -> None:
    root = create(daemon, "one")
    (root / "home/guest/docs").mkdir(parents=True)
    (root / "home/guest/docs/letter").write_text("letter\n")
    (root / "etc/motd").write_text("Kept.\n")
    (root / "etc/hosts").write_text("lost\n")
    (root / "srv/data/file1").unlink()
    (root / "srv/new").write_text("committed\n")
    assert daemon.differences("one") == {  # what a reset would throw away
        "/home/guest": "added",
        "/etc/hosts": "contents",
        "/srv/data/file1": "deleted",
        "/srv/new": "added",
    }
    daemon.sessionctl("commit", "one", "/srv")
    assert daemon.differences("one").keys() == {"/home/guest", "/etc/hosts"}
    assert daemon.sessions()["one"]["keep"] == [*RULES, "/srv"]
    daemon.sessionctl("reset", "one")
    assert (root / "home/guest/docs/letter").read_text() == "letter\n"
    daemon.sessionctl("close", "one")
    daemon.stop()
    daemon.start()
    root = create(daemon, "two")
    assert (root / "etc/motd").read_text() == "Kept.\n"
    assert (root / "etc/hosts").read_text() == "::1 localhost\n"
    assert (root / "home/guest/docs/letter").read_text() == "letter\n"
    assert not (root / "srv/data/file1").exists()
    assert (root / "srv/data/file2").exists()
    assert (root / "srv/new").read_text() == "committed\n"
    assert "/home/*/docs" in daemon.sessionctl("status", "two").stdout
    refused = daemon.sessionctl("create", "root", "guest", code=ExitCode.EXISTS)
    assert "is in use by session two" in refused.stderr


@pytest.mark.soak
def test_rules_are_reloaded(daemon: Daemon) -> None:
    root = create(daemon, "one")
    (root / "srv/data/file1").write_text("not kept when it was written")
    configure(daemon, "/srv")
    daemon.reload()
    wait_until(lambda: daemon.sessions()["one"]["keep"] == ["/srv", *RULES])
    (root / "srv/data/file2").write_text("kept")
    (root / "etc/motd").write_text("Kept until the reset.\n")
    daemon.sessionctl("reset", "one")
    assert daemon.sessions()["one"]["keep"] == ["/srv"]
    assert (root / "srv/data/file1").read_text() == "x"
    assert (root / "srv/data/file2").read_text() == "kept"
    assert (root / "etc/motd").read_text() == "Welcome.\n"
    daemon.sessionctl("keep", "one", "/etc/*")
    assert (root / "etc/motd").read_text() == "Kept until the reset.\n"  # as it was kept


@pytest.mark.parametrize("who", ["manager", "worker", pytest.param("both", marks=pytest.mark.soak)])
def test_deaths(daemon: Daemon, who: str) -> None:
    root = create(daemon, "one")
    with open(root / "etc/motd", "w") as file:
        file.write("Kept")
        file.flush()
        if who == "worker":
            (worker,) = daemon.workers()
            os.kill(worker, signal.SIGKILL)
        else:
            daemon.kill() if who == "manager" else daemon.kill_all()
            daemon.start()
        if who != "both":  # without systemd, nobody has kept the connection
            file.write(" by the next worker")
    if who == "both":
        assert (root / "etc/motd").read_text() == "Kept"
    else:
        assert (root / "etc/motd").read_text() == "Kept by the next worker"
    daemon.sessionctl("reset", "one")
    assert (root / "etc/motd").read_text().startswith("Kept")


def test_a_reset_that_leaves_a_path_as_it_is(idle_daemon: Daemon) -> None:
    """Of a session that keeps nothing otherwise."""
    daemon = idle_daemon
    daemon.configure({"profile.guest": {"image": str(daemon.directory / "image"), "size": "64M"}})
    daemon.start()
    root = create(daemon, "one")
    (root / "home/guest").mkdir(parents=True)
    (root / "etc/motd").write_text("lost")
    (root / "srv/data/file1").unlink()
    with open(root / "home/guest/log", "w") as log:
        print("before", file=log, flush=True)
        options = ["--keep", "/home/guest", "--keep", "/srv/data/file1", "--keep", "/none"]
        daemon.sessionctl("reset", "one", *options, "--snapshot-as", "all")
        print("after", file=log, flush=True)
        daemon.sessionctl("reset", "one", *options)
        print("again", file=log, flush=True)
    assert (root / "home/guest/log").read_text() == "before\nafter\nagain\n"
    assert (root / "etc/motd").read_text() == "Welcome.\n"
    assert "file1" not in os.listdir(root / "srv/data")
    assert daemon.differences("one").keys() == {
        "/home/guest",
        "/home/guest/log",
        "/srv/data/file1",
    }
    daemon.sessionctl("restore", "one", "all")
    assert (root / "etc/motd").read_text() == "lost"


def test_commit_when_the_manager_is_killed_meanwhile(daemon: Daemon) -> None:
    root = create(daemon, "one")
    for number in range(600):
        (root / f"srv/data/new{number}").write_text("new")
    before = sorted(os.listdir(root / "srv/data"))
    work = daemon.state / "kept/0/guest/work/work"
    with daemon.calling("commit", "one", "/srv/data") as calling:
        wait_until(lambda: os.listdir(work) != [] or calling.poll() is not None)
        daemon.kill()
    daemon.start()
    daemon.wait_idle("one")
    (root / "srv/data/goes-on").write_text("")
    assert sorted(os.listdir(root / "srv/data")) == sorted([*before, "goes-on"])
    wait_until(lambda: os.listdir(work) == [])
    job = json.loads(daemon.sessionctl("status", "one", "--json").stdout)["last_job"]
    assert job["operation"] == "commit"
    assert job["state"] == ("succeeded" if daemon.sessions()["one"]["keep"][2:] else "failed")  # type: ignore[index]
    daemon.sessionctl("commit", "one", "/srv/data")
    daemon.sessionctl("reset", "one")
    assert sorted(os.listdir(root / "srv/data")) == sorted([*before, "goes-on"])


def test_commit_is_cancelled_in_the_middle(daemon: Daemon) -> None:
    """The worker stands still, so that it is in the middle for as long as that takes."""
    root = create(daemon, "one")
    for number in range(100):
        (root / f"srv/data/new{number}").write_bytes(bytes(4096))
    before = sorted(os.listdir(root / "srv/data"))
    work = daemon.state / "kept/0/guest/work/work"
    (worker,) = daemon.workers()
    with daemon.calling("commit", "one", "/srv/data") as calling:
        wait_until(lambda: os.listdir(work) != [] or calling.poll() is not None)
        os.kill(worker, signal.SIGSTOP)
        try:
            daemon.sessionctl("cancel", "one")
            ended = calling.wait()
        finally:
            os.kill(worker, signal.SIGCONT)
    assert ended in {ExitCode.CANCELLED, ExitCode.OK}
    daemon.wait_idle("one")
    committed = [*RULES, "/srv/data"] if ended == ExitCode.OK else [*RULES]
    assert daemon.sessions()["one"]["keep"] == committed
    wait_until(lambda: os.listdir(work) == [])
    assert sorted(os.listdir(root / "srv/data")) == before
    (root / "srv/data/goes-on").write_text("")


def test_uncommit(daemon: Daemon) -> None:
    root = create(daemon, "one")
    for name in ("first", "second"):
        (root / f"srv/{name}").write_bytes(bytes(50_000))
    daemon.sessionctl("commit", "one", "/srv/first", "/srv/second")
    told = json.loads(daemon.sessionctl("committed", "one", "--json").stdout)
    assert [file["path"] for file in told] == ["/srv/first", "/srv/second"]
    assert all(50_000 <= file["bytes"] < 100_000 for file in told)
    refused = daemon.sessionctl("uncommit", "one", "/srv/third", code=ExitCode.USAGE)
    assert "What was: /srv/first, /srv/second." in refused.stderr
    daemon.sessionctl("uncommit", "one", "/srv/first")
    daemon.sessionctl("uncommit", "one", "/srv/second", "--delete")
    assert json.loads(daemon.sessionctl("committed", "one", "--json").stdout) == []
    (root / "srv/first").write_text("goes on\n")
    fs = daemon.state / "kept/0/guest/fs/srv"
    daemon.kill()
    daemon.start()
    assert (root / "srv/second").stat().st_size == 50_000
    daemon.sessionctl("reset", "one")
    assert os.listdir(root / "srv") == ["data"]
    wait_until(lambda: os.listdir(fs) == ["first"])
    daemon.sessionctl("keep", "one", *RULES, "/srv/first")
    assert (root / "srv/first").read_text() == "goes on\n"


def test_a_full_disk(daemon: Daemon) -> None:
    """What is kept has run out of space: a commit fails, and nothing has changed."""
    kept = daemon.state / "kept"
    kept.mkdir(mode=0o700)
    disk = daemon.directory / "disk.img"
    with open(disk, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m0", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, kept], check=True)
    root = create(daemon, "one")
    (root / "srv/large").write_bytes(bytes(16 << 20))
    done = daemon.sessionctl("commit", "one", "/srv", code=ExitCode.NO_SPACE)
    assert "full" in done.stderr
    assert daemon.sessions()["one"]["keep"] == [*RULES]
    with pytest.raises(OSError, match="No space"):
        (root / "etc/motd").write_bytes(bytes(16 << 20))
    daemon.sessionctl("keep", "one", *RULES, "/home/*/new")
    daemon.sessionctl("reset", "one")
    assert (root / "srv/data/file1").exists()
    (root / "etc/motd").write_text("There is space.\n")
    (root / "srv/small").write_text("written on")
    daemon.sessionctl("commit", "one", "/srv/small")
    daemon.sessionctl("reset", "one")
    assert (root / "etc/motd").read_text() == "There is space.\n"
    assert (root / "srv/small").read_text() == "written on"
    daemon.sessionctl("close", "one")


def test_the_sessions_user_is_hostile(daemon: Daemon) -> None:
    root = create(daemon, "one", "nobody")
    (root / "home/nobody").mkdir()
    os.chown(root / "home/nobody", 65534, 65534)
    script = """
        ln -s /etc docs; echo evil > docs/evil 2>/dev/null || true
        rm docs; mkdir docs; ln -s ../../../../../../../etc docs/etc
        ln -s / ../nobody/x; mkdir -p a/b/c; mv a docs/a
    """
    subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script],
        cwd=root / "home/nobody",
        check=True,
    )
    fs = daemon.state / "kept/65534/guest/fs"
    assert not (fs / "etc/evil").exists()
    assert (fs / "home/nobody/docs/a/b/c").is_dir()
    assert os.readlink(fs / "home/nobody/docs/etc") == "../../../../../../../etc"
    for path in ("/home/nobody/docs/etc/motd", "/home/nobody/x/etc"):  # through symlinks
        refused = daemon.sessionctl("commit", "one", path, code=ExitCode.FAILED)
        assert f"{path}: there is no directory" in refused.stderr
    daemon.sessionctl("commit", "one", "/../../etc", code=ExitCode.USAGE)
    daemon.sessionctl("reset", "one")
    assert (root / "home/nobody").stat().st_uid == 65534
    assert sorted(os.listdir(root / "home/nobody/docs")) == ["a", "etc"]


@pytest.mark.soak
def test_the_checker_looks_at_what_is_kept(daemon: Daemon) -> None:
    root = create(daemon, "one")
    (root / "home/guest/docs/below").mkdir(parents=True)
    (root / "home/guest/docs/letter").write_text("letter\n")
    (root / "etc/motd").unlink()
    (root / "srv/data/file1").rename(root / "srv/data/renamed")
    daemon.sessionctl("commit", "one", "/srv/data")
    daemon.leave()
    for worker in daemon.workers():
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: daemon.workers() == [])
    arguments = ("check", "--config", str(daemon.configuration), "--json")
    assert "error" not in daemon.sessionctl(*arguments).stdout.replace('"errors"', "")
    os.mkfifo(daemon.state / "kept/0/guest/fs/home/guest/docs/fifo")
    os.setxattr(daemon.state / "kept/0/guest/fs/home", "trusted.overlay.redirect", b"/a/../b")
    found = daemon.sessionctl(*arguments, code=ExitCode.DAMAGED).stdout
    assert "redirect" in found
    daemon.start()
