"""`sessiond-overlay` as a file system under test: the real program, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mounts import Layers, MountError, detach, wait_mounted

REPOSITORY = str(Path(__file__).parents[2])

COMMAND = (sys.executable, "-m", "sessiond.fuse.mount")

_MORTAL = (sys.executable, "-m", "tests.support.mortal", "sessiond.fuse.mount")
_LONGEST_END_SECONDS = 30


class SessiondOverlay:
    """Each mount is served by a worker in the foreground, which must end well and in silence."""

    name = "sessiond"

    # What others may do is decided by modes and owners, as everywhere else.
    _OPTIONS = ("allow_other",)

    def __init__(self, data_path: str = "passthrough") -> None:
        self._environment = {**os.environ, "SESSIOND_DATAPATH": data_path}
        self.descriptors_follow_changes = data_path != "passthrough"
        self.copy_up_makes_another_inode = data_path == "passthrough"

    @contextmanager
    def mounted(self, layers: Layers, mount_point: str, *options: str) -> Iterator[None]:
        """Mount `layers`; raises `MountError` with the program's message."""
        wanted = ",".join((layers.options(), *(options or self._OPTIONS)))
        with tempfile.TemporaryFile() as said:
            worker = subprocess.Popen(
                [*_MORTAL, "-f", "-o", wanted, mount_point],
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            try:
                if not wait_mounted(mount_point, worker.pid):
                    raise MountError(_text(said.fileno()))
                yield
            finally:
                detach(mount_point)
                status = _end(worker)
            words = _text(said.fileno())
            assert status == 0, f"sessiond-overlay ended with {status}: {words}"
            assert not words, f"sessiond-overlay had something to complain about: {words}"


def run(*arguments: str, seconds: float = 30) -> subprocess.CompletedProcess[str]:
    """Run `sessiond-overlay` to its end, as a shell would."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


def _end(worker: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a worker; it stays if a descriptor still holds its mount."""
    try:
        return worker.wait(_LONGEST_END_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace")
