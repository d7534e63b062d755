"""Programs that use a session of a running daemon: named, and ended before a reset."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sessiond.bus import names
from tests.support.daemon import BOUND, MANAGER, Daemon

NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
def box(daemon: Daemon) -> Path:
    """The root of a session of nobody's."""
    daemon.sessionctl("create", "nobody", "guest", "--id", "box")
    return daemon.root("box")


@contextmanager
def program(root: Path, user: int, line: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A program of `user` that works in `root`."""
    script = f"import signal\n{line}\nprint(flush=True)\nsignal.pause()"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, user=user, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()


def conflicting(daemon: Daemon) -> set[int]:
    programs = json.loads(daemon.sessionctl("conflicts", "box", "--json").stdout)
    return {pid for one in programs for pid in one["pids"]}


def test_programs_are_named_though_the_worker_hangs(daemon: Daemon, box: Path) -> None:
    with program(box, 0) as one, program(box, NOBODY.pw_uid) as other:
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGSTOP)
        try:
            assert conflicting(daemon) == {one.pid, other.pid}
        finally:
            os.kill(worker, signal.SIGCONT)
    assert conflicting(daemon) == set()


def test_an_owner_ends_their_own_and_root_all(daemon: Daemon, box: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    with program(box, 0) as roots, program(box, NOBODY.pw_uid, deaf) as own:
        (box / "file").write_text("changed")
        options = ("2", "terminate", "b", "true", "grace", "d", "0.1")
        subprocess.run(
            ["busctl", "call", *MANAGER, "ResetSession", "sa{sv}", "box", *options],
            user=NOBODY.pw_uid,
            env=daemon.environment,
            check=True,
            timeout=BOUND,
        )
        assert own.wait(BOUND) == -signal.SIGKILL
        daemon.wait_idle("box")
        assert not (box / "file").exists()
        assert conflicting(daemon) == {roots.pid}
        job = daemon.busctl(
            "get-property", names.BUS, f"{names.ROOT_PATH}/job/1", names.JOB, "Conflicts"
        )
        assert f" 1 {roots.pid} 0 " in job
        assert f" 1 {own.pid} {NOBODY.pw_uid} " in job
        assert roots.poll() is None

        (box / "file").write_text("kept")
        said = daemon.sessionctl("reset", "box", "--terminate", "--snapshot-as", "kept").stdout
        assert roots.wait(BOUND) == -signal.SIGTERM
        assert f"({roots.pid}) of uid 0" in said
    assert not (box / "file").exists()
    daemon.sessionctl("restore", "box", "kept")
    assert (box / "file").read_text() == "kept"


def test_who_resets_from_within_gets_an_answer(daemon: Daemon, box: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sessiond.cli.main", "reset", "box", "--terminate"],
        cwd=box,
        env=daemon.environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=BOUND,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
