"""Snapshots of sessions that are in use: restores and their undoing, sizes, comparisons, rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, wait_until

_CREATE = """
import itertools, sys
for number in itertools.count():
    open(f"{sys.argv[1]}/{number}", "x").close()
    if number == 0:
        print("ready", flush=True)
"""


def snapshots(daemon: Daemon, session: str = "one") -> dict[str, dict[str, object]]:
    listed = json.loads(daemon.sessionctl("snapshots", session, "--json").stdout)
    return {one["name"]: one for one in listed}


def automatic(daemon: Daemon) -> list[str]:
    return [name for name, one in snapshots(daemon).items() if one["automatic"]]


@contextmanager
def creating_files(directory: Path) -> Iterator[None]:
    """A program makes one file after the other, named by numbers."""
    command = [sys.executable, "-c", _CREATE, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        program.stdout.readline()
        yield
        program.terminate()


def numbers(directory: Path) -> set[int]:
    return {int(name) for name in os.listdir(directory) if name.isdecimal()}


@pytest.mark.parametrize("profile", [pytest.param("guest", marks=pytest.mark.soak), "lasting"])
def test_nothing_is_lost_between_what_is_kept_and_what_comes_then(
    daemon: Daemon, profile: str
) -> None:
    daemon.sessionctl("create", "root", profile, "--id", "one")
    etc = daemon.root("one") / "etc"
    daemon.sessionctl("snapshot", "one", "start")
    with open(etc / "open", "a+b", buffering=0) as file:
        file.write(b"before")
        with creating_files(etc):
            daemon.sessionctl("restore", "one", "start")
            wait_until(lambda: bool(numbers(etc)))
        file.write(b" and after")
        file.seek(0)
        assert file.read() == b"before and after"
    later = numbers(etc)
    assert not (etc / "open").exists()
    (kept,) = automatic(daemon)
    daemon.sessionctl("restore", "one", kept)
    earlier = numbers(etc)
    assert earlier | later == set(range(max(later) + 1))
    assert max(earlier) + 1 == min(later)
    assert (etc / "open").read_bytes() == b"before"


def test_sizes_and_marks_outlive_the_daemon(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "lasting", "--id", "one")
    (daemon.root("one") / "etc/large").write_bytes(b"x" * (1 << 20))
    daemon.sessionctl("snapshot", "one", "good", "--pin", "--description", "works")
    daemon.sessionctl("reset", "one")
    wait_until(lambda: bool(snapshots(daemon)["good"]["size_valid"]))
    before = snapshots(daemon)["good"]
    assert before["size"] == before["exclusive"]
    (line,) = daemon.sessionctl("diff", "one", "--from", "good", "--json").stdout.splitlines()
    assert json.loads(line)["kind"] == "deleted"
    assert 1 << 20 <= int(str(before["size"])) < 2 << 20
    daemon.kill()
    daemon.start()
    wait_until(lambda: bool(snapshots(daemon)["good"]["size_valid"]))
    assert snapshots(daemon)["good"] == before
    assert before["pinned"]
    assert before["description"] == "works"
