"""Programs of a session stand still for its snapshots, and go on whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cgroups import COUNTER, OwnCgroup, is_of_one_moment, own_cgroup, prepare_counter
from tests.support.daemon import Daemon, wait_until

_STAT = "print(flush=True)\nos.stat(sys.argv[1])"


@pytest.fixture
def cgroup() -> Iterator[OwnCgroup]:
    with own_cgroup() as cgroup:
        yield cgroup


@pytest.fixture
def daemon(idle_daemon: Daemon, cgroup: OwnCgroup) -> Daemon:
    """A running daemon with the session ``one``, whose programs are those of the cgroup."""
    with open(idle_daemon.configuration, "a") as configuration:
        image = json.dumps(str(idle_daemon.directory / "image"))
        configuration.write(f'[profile.halting]\nimage = {image}\ncgroup = "{cgroup.name}"\n')
    idle_daemon.start()
    idle_daemon.sessionctl("create", "root", "halting", "--id", "one")
    return idle_daemon


def test_each_snapshot_is_of_one_moment(daemon: Daemon, cgroup: OwnCgroup) -> None:
    for operation in (
        ("snapshot", "one", "first"),
        ("restore", "one", "first"),
        ("reset", "one", "--snapshot-first"),
    ):
        counter = cgroup.start(COUNTER, *prepare_counter(daemon.root("one")))
        daemon.sessionctl(*operation)
        assert not cgroup.is_stopped
        counter.kill()
    made = json.loads(daemon.sessionctl("snapshots", "one", "--json").stdout)
    assert [one["inexact"] for one in made] == [[], [], []]
    storage = daemon.runtime / "sessions/one/storage"
    kept = [path.parent for path in storage.glob("layers/*/fs/two")]
    assert [is_of_one_moment(layer) for layer in kept] == [True, True, True]


@pytest.mark.parametrize("killed", ["worker", "manager", "both"])
def test_programs_go_on_whoever_is_killed(daemon: Daemon, cgroup: OwnCgroup, killed: str) -> None:
    """While it is waited for one that cannot be stopped, since it waits for another session."""
    (worker,) = daemon.workers()
    daemon.sessionctl("create", "root", "guest", "--id", "hung")
    (other,) = set(daemon.workers()) - {worker}
    os.kill(other, signal.SIGSTOP)
    waiting = cgroup.start(_STAT, daemon.root("hung") / "missing")
    wait_until(lambda: "fuse" in Path(f"/proc/{waiting.pid}/stack").read_text())
    with daemon.calling("snapshot", "one", "first"):
        wait_until(lambda: cgroup.is_stopped)
        if killed == "worker":
            os.kill(worker, signal.SIGKILL)
        elif killed == "manager":
            daemon.kill()
        else:
            for process in (daemon.pid, worker):
                os.kill(process, signal.SIGSTOP)
            os.kill(worker, signal.SIGKILL)
            daemon.kill()
            assert cgroup.is_stopped
    if killed == "both":
        assert cgroup.is_stopped
        os.kill(other, signal.SIGCONT)
        daemon.start()
        assert "another sessiond had stopped them" in daemon.log()
        assert not cgroup.is_stopped
    else:
        wait_until(lambda: not cgroup.is_stopped)
        os.kill(other, signal.SIGCONT)
    assert waiting.wait(60) == 1
    if killed == "manager":
        daemon.start()
    assert daemon.sessions()["one"]["state"] == "active"
    assert (daemon.root("one") / "etc/motd").read_text() == "Welcome.\n"
    assert os.listdir(daemon.runtime / "halted") == []
