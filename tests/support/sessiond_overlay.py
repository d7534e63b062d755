"""`sessiond-overlay` as a file system under test: the real program, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sessiond.fuse import mount
from tests.support.mortal import die_in_time
from tests.support.mounts import Layers, MountError, detach, wait_mounted

REPOSITORY = str(Path(__file__).parents[2])

COMMAND = (sys.executable, "-m", "sessiond.fuse.mount")

_LONGEST_END_SECONDS = 30

# There are a thousand mounts, and to start Python for each would take longer than all the tests.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([mount.__name__])


class SessiondOverlay:
    """Each mount is served by a worker in the foreground, which must end well and in silence."""

    name = "sessiond"

    # What others may do is decided by modes and owners, as everywhere else.
    _OPTIONS = ("allow_other",)

    def __init__(self, data_path: str = "passthrough") -> None:
        self._data_path = data_path
        self.descriptors_follow_changes = data_path != "passthrough"
        self.copy_up_makes_another_inode = data_path == "passthrough"

    @contextmanager
    def mounted(self, layers: Layers, mount_point: str, *options: str) -> Iterator[None]:
        """Mount `layers`; raises `MountError` with the program's message."""
        wanted = ",".join((layers.options(), *(options or self._OPTIONS)))
        arguments = ["-f", "-o", wanted, mount_point]
        with tempfile.NamedTemporaryFile() as said:
            worker = _forks.Process(target=_serve, args=(arguments, self._data_path, said.name))
            worker.start()
            assert worker.pid is not None
            try:
                if not wait_mounted(mount_point, worker.pid):
                    raise MountError(_text(said.fileno()))
                yield
            finally:
                detach(mount_point)
                worker.join(_LONGEST_END_SECONDS)
                worker.kill()  # it stays if a descriptor still holds its mount
                worker.join()
            words = _text(said.fileno()).replace(_UNMOUNTED, "")
            assert worker.exitcode == 0, f"sessiond-overlay ended with {worker.exitcode}: {words}"
            assert not words, f"sessiond-overlay had something to complain about: {words}"


_UNMOUNTED = "fuse: reading device: Software caused connection abort\n"
"""What libfuse says if the mount goes while it reads a request; it is no failure of the worker's,
which ends as always."""


def _serve(arguments: list[str], data_path: str, said: str) -> None:
    die_in_time()
    os.environ["SESSIOND_DATAPATH"] = data_path
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(mount.main(arguments))


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


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace")
