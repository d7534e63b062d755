"""Cgroups of a test's own, and programs in them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sessiond.cgroups import Freezer
from sessiond.session.mounts import mount_table
from tests.support.waiting import BOUND


class OwnCgroup:
    """One that exists; `name` is its path below the root of the hierarchy."""

    def __init__(self, directory: Path) -> None:
        self.name = directory.name
        self.directory = directory
        self._programs = ExitStack()

    def start(self, script: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start a Python script there; return when it has said something."""
        enter = (
            "import os, sys\n"
            f"with open('{self.directory}/cgroup.procs', 'w') as group: group.write('0')\n"
        )
        process = self._programs.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", enter + script, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
        )
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    @contextmanager
    def freezer(self) -> Iterator[Freezer]:
        """Its freezer, open as long as the context is."""
        directory = os.open(self.directory, os.O_PATH)
        freezer = Freezer.open(directory)
        os.close(directory)
        try:
            yield freezer
        finally:
            freezer.close()

    @property
    def is_stopped(self) -> bool:
        """Whether someone has stopped its programs."""
        return (self.directory / "cgroup.freeze").read_text() == "1\n"

    @property
    def stands_still(self) -> bool:
        """Whether all of them stand still."""
        return "frozen 1" in (self.directory / "cgroup.events").read_text().splitlines()

    def close(self) -> None:
        """End its programs, and remove it."""
        (self.directory / "cgroup.kill").write_text("1")
        self._programs.close()
        with open(self.directory / "cgroup.events") as events:
            changed = select.poll()
            changed.register(events, select.POLLPRI)
            while "populated 1" in events.read():  # by what they have started
                assert changed.poll(BOUND * 1000), "programs do not end"
                events.seek(0)
        self.directory.rmdir()


@contextmanager
def own_cgroup() -> Iterator[OwnCgroup]:
    """Yield one; skip the test where none can be made."""
    hierarchies = [one.target for one in mount_table() if one.kind == "cgroup2"]
    if not hierarchies:
        pytest.skip("there are no cgroups of version 2")
    try:
        directory = tempfile.mkdtemp(prefix="sessiond-test-", dir=hierarchies[0])
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    group = OwnCgroup(Path(directory))
    try:
        yield group
    finally:
        group.close()


COUNTER = """
import mmap
views = []
for path in sys.argv[1:]:
    with open(path, "r+b") as file:
        views.append(memoryview(mmap.mmap(file.fileno(), 0)).cast("Q"))
one, two = views
print(flush=True)
number = 0
while True:
    number += 1
    one[0] = number
    one[-1] = number
    two[0] = number
"""
"""Counts in the first and last word of a mapped file, and then in the first of another."""


def prepare_counter(directory: Path, size: int = 8 << 20) -> tuple[Path, Path]:
    """Make the files that `COUNTER` is given; the first one of `size` bytes."""
    one, two = directory / "one", directory / "two"
    one.write_bytes(bytes(size))
    two.write_bytes(bytes(4096))
    return one, two


def is_of_one_moment(directory: Path) -> bool:
    """Say whether these files, as they are in `directory`, can have been so at any moment."""
    one, two = ((directory / name).read_bytes() for name in ("one", "two"))
    first, last, other = (
        int.from_bytes(word, sys.byteorder) for word in (one[:8], one[-8:], two[:8])
    )
    return first - 1 <= other <= last <= first
