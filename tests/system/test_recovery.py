"""Deaths of the manager and of workers, as programs in a session see them: not at all."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support.daemon import Daemon, wait_until

HOLDER = """
import os, sys
held, removed = (os.open(f"/srv/{name}", os.O_RDWR | os.O_CREAT) for name in ("held", "removed"))
os.unlink("/srv/removed")
print("ready", flush=True)
for line in sys.stdin.buffer:
    os.write(held, line)
    os.write(removed, line)
    os.mkdir(b"/srv/" + line.strip())
    lines = os.pread(removed, 4096, 0) + open("/srv/held", "rb").read()
    print(lines.count(b"line"), os.fstat(removed).st_nlink, flush=True)
"""
"""For each line, it writes to an open file and to a removed one, and makes a directory."""


class Holder:
    """That program, at work in a session."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout
        self._lines = 0
        assert self._output.readline() == b"ready\n"

    def works(self) -> None:
        """It has all that it had, and can do all that it could."""
        self._lines += 1
        self._input.write(b"line%d\n" % self._lines)
        self._input.flush()
        assert self._output.readline() == b"%d 0\n" % (2 * self._lines)


@contextmanager
def holder(daemon: Daemon) -> Iterator[Holder]:
    with daemon.inside("one", f"exec python3 -c '{HOLDER}'") as process:
        program = Holder(process)
        program.works()
        yield program


def test_a_worker(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "machine", "--id", "one")
    with holder(daemon) as program:
        for times in range(1, 4):
            (worker,) = daemon.workers()
            os.kill(worker, signal.SIGKILL)
            program.works()
            wait_until(lambda times=times: daemon.log().count("goes on for it") == times)  # type: ignore[misc]
        assert daemon.sessions()["one"]["state"] == "active"
        assert daemon.differences("one")["/srv/held"] == "added"
    assert "The worker of session one ended unexpectedly; another goes on for it." in daemon.log()


def test_the_manager(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "machine", "--id", "one")
    daemon.sessionctl("create", "root", "lasting", "--id", "two")
    with holder(daemon) as program:
        daemon.sessionctl("snapshot", "one", "first")
        workers = daemon.workers()
        daemon.kill()
        program.works()
        daemon.start()
        assert daemon.workers() == workers
        assert {session["state"] for session in daemon.sessions().values()} == {"active"}
        program.works()
        # It is the manager of these sessions now, and looks after their workers.
        daemon.sessionctl("snapshot", "one", "second")
        os.kill(workers[0], signal.SIGKILL)
        os.kill(workers[1], signal.SIGKILL)
        program.works()
        wait_until(lambda: len(daemon.workers()) == 2)
        daemon.sessionctl("restore", "one", "first")
    assert daemon.mounts().count(str(daemon.root("one"))) == 1
    daemon.stop()
    assert daemon.mounts() == []
    wait_until(lambda: daemon.workers() == [])


def test_the_manager_and_then_a_worker(daemon: Daemon) -> None:
    """Without systemd, nobody keeps the connection then: the session is mounted anew."""
    for session in ("one", "two"):
        daemon.sessionctl("create", "root", "guest", "--id", session)
        (daemon.root(session) / "note").write_text("kept")
    lost, kept = daemon.workers()
    daemon.kill()
    os.kill(lost, signal.SIGKILL)
    daemon.start()
    assert kept in daemon.workers()
    assert lost not in daemon.workers()
    for session in ("one", "two"):
        assert daemon.sessions()[session]["state"] == "active"
        assert (daemon.root(session) / "note").read_text() == "kept"
        assert daemon.mounts().count(str(daemon.root(session))) == 1


def test_a_restart(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "machine", "--id", "one")
    with holder(daemon) as program:
        daemon.leave()
        program.works()
        daemon.start()
        program.works()
        daemon.sessionctl("reset", "one")
    assert daemon.differences("one") == {}


def test_the_manager_while_it_exchanges_layers(daemon: Daemon) -> None:
    """The record says what is to be served; whatever the worker served then, it serves that."""
    daemon.sessionctl("create", "root", "machine", "--id", "one")
    (worker,) = daemon.workers()
    with holder(daemon) as program:
        os.kill(worker, signal.SIGSTOP)
        with daemon.calling("snapshot", "one", "first") as call:
            wait_until(lambda: b'"first"' in daemon.record("one"))
            daemon.kill()
            call.wait()
        os.kill(worker, signal.SIGCONT)
        daemon.start()
        program.works()
    assert "first" in daemon.sessionctl("status", "one").stdout
    daemon.sessionctl("reset", "one")
    assert daemon.differences("one") == {}
    daemon.sessionctl("restore", "one", "first")
    assert daemon.differences("one")["/srv/held"] == "added"


WRITER = """
import os, sys
files = [os.open(f"/srv/{name}", os.O_RDWR | os.O_CREAT) for name in ("log", "removed")]
os.unlink("/srv/removed")
print("ready", flush=True)
for line in sys.stdin.buffer:
    for file in files:
        os.write(file, line)
    print(*(os.pread(file, 4096, 0).count(b"line") for file in files), flush=True)
"""
"""For each line, it writes to an open file and to a removed one, from before a move to disk."""


@pytest.mark.parametrize("profile", ["machine", pytest.param("cached", marks=pytest.mark.soak)])
def test_files_that_are_open_over_persist(daemon: Daemon, profile: str) -> None:
    """Whatever dies: what is written to them is read, and on disk in the end; RAM is given back."""
    daemon.sessionctl("create", "root", profile, "--id", "one")
    in_ram = daemon.runtime / "sessions/one/storage"
    with daemon.inside("one", f"exec python3 -c '{WRITER}'") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        lines = 0

        def works() -> None:
            nonlocal lines
            lines += 1
            process.stdin.write(b"line%d\n" % lines)
            process.stdin.flush()
            assert process.stdout.readline() == b"%d %d\n" % (lines, lines)

        works()
        told = daemon.sessionctl("persist", "one").stdout
        assert ("/srv/log  (python3)" in told) == (profile == "machine")
        assert [path.name for path in in_ram.iterdir()] == ["orphans"]
        works()
        for times in range(1, 3):
            (worker,) = daemon.workers()
            os.kill(worker, signal.SIGKILL)
            works()
            wait_until(lambda times=times: daemon.log().count("goes on for it") == times)  # type: ignore[misc]
        daemon.kill()
        works()
        daemon.start()
        works()
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        works()
        wait_until(lambda: daemon.log().count("goes on for it") == 3)
        wait_until(lambda: daemon.sessions()["one"]["pending"] == (profile == "machine"))
        assert (daemon.root("one") / "srv/log").read_bytes().count(b"line") == lines
    wait_until(lambda: not in_ram.exists())
    assert str(in_ram) not in daemon.mounts()
    log = max(daemon.state.glob("sessions/one/layers/*/fs/srv/log"))  # of the upper
    assert log.read_bytes().count(b"line") == lines
    daemon.stop()
    daemon.start()
    assert daemon.sessions()["one"]["storage"] == "persistent"
    assert (daemon.root("one") / "srv/log").read_bytes().count(b"line") == lines


def test_a_session_that_has_moved_to_disk_keeps_no_ram(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "guest", "--id", "one")
    in_ram = os.stat(daemon.runtime / "sessions/one/storage").st_dev
    (worker,) = daemon.workers()

    def devices() -> set[int]:
        found = set()
        for fd in os.listdir(f"/proc/{worker}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.stat(f"/proc/{worker}/fd/{fd}").st_dev)
        return found

    assert in_ram in devices()
    daemon.sessionctl("persist", "one")
    wait_until(lambda: in_ram not in devices())  # what counts changes may have it for a moment
