"""Other people's programs on files that are not to be trusted: without rights, and with limits.

They run as a user that owns nothing, with no privileges to be had, in memory that is limited, with
one file, which has no name: with the last descriptor of it, its space is given back, whoever dies.
Functions block, and are called in threads; `check` is called again and again, and stops them by
raising.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sessiond.errors import Failed, NoSpace, NotSupported
from sessiond.session.pipes import Pipe

UID = 1582628864
"""Of no user and no service, by the ranges that systemd has for both."""
_MEMORY = 2 << 30
"""Bytes of addresses."""
_SAID = 4096
"""Bytes of what a program says that are told."""
_PATH = re.compile("/proc/self/fd/[0-9]+:? *")
_GLANCE = 0.1
"""Seconds between two calls of `check`."""


@contextmanager
def nameless_file(directory: Path) -> Iterator[int]:
    """Make a file on the file system of `directory`, which the programs can read and write.

    It has gone when the context ends. Raises `OSError`.
    """
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        os.fchown(file.fileno(), UID, UID)
        yield file.fileno()


def path_of(descriptor: int) -> str:
    """Return a path by which a program that is given the descriptor opens the same file."""
    return f"/proc/self/fd/{descriptor}"


class Program:
    """One that runs; a context, which ends it."""

    def __init__(
        self, command: list[str], file: int, check: Callable[[], None], *, reads: bool
    ) -> None:
        """Start `command` with the descriptor `file`. `reads`: `pipe` is its standard input, else
        its standard output.

        Raises `NotSupported` if it is not installed, `OSError`.
        """
        if shutil.which(command[0]) is None:
            raise NotSupported(
                f"The program {command[0]} is not installed; it is in Debian's squashfs-tools-ng."
            )
        self._name = command[0]
        self._check = check
        self._said = os.memfd_create("said", os.MFD_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                [*_confinement(), *command],
                stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if reads else subprocess.PIPE,
                stderr=self._said,
                pass_fds=(file,),
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                bufsize=0,
            )
        except BaseException:
            os.close(self._said)
            raise
        stream = self._process.stdin if reads else self._process.stdout
        assert stream is not None
        self._stream: IO[bytes] = stream
        os.set_blocking(stream.fileno(), False)
        self.pipe = Pipe(stream.fileno(), check)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._process.kill()
        self._process.wait()
        os.close(self._said)

    def end(self) -> None:
        """Close `pipe`, and wait for the end. Raises `Failed`, `NoSpace` with what it has said."""
        self._stream.close()
        while True:
            self._check()
            try:
                status = self._process.wait(_GLANCE)
                break
            except subprocess.TimeoutExpired:
                continue
        if status == 0:
            return
        said = os.pread(self._said, _SAID, 0).decode(errors="replace")
        if "No space left" in said or "quota exceeded" in said:
            raise NoSpace("There is no space for the image; make room on the disk of sessiond.")
        lines = [line.strip().rstrip(".") for line in said.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"it ended with status {status}"
        # It may have names from the image in it.
        reason = "".join(one if one.isprintable() else "?" for one in reason)
        raise Failed(f"{self._name} has failed: {_PATH.sub('', reason)}.")

    @property
    def has_ended(self) -> bool:
        """Whether its end of `pipe` is closed, so that `end` says why."""
        if self._stream.closed:
            return True
        poll = select.poll()
        poll.register(self._stream.fileno(), 0)
        return bool(poll.poll(0))


def _confinement() -> list[str]:
    identity = ["--reuid", str(UID), "--regid", str(UID), "--clear-groups"]
    rights = ["--no-new-privs", "--inh-caps=-all", "--pdeathsig", "KILL"]
    limits = [f"--as={_MEMORY}", "--core=0", "--nofile=64"]
    return ["setpriv", *identity, *rights, "--", "prlimit", *limits, "--"]
