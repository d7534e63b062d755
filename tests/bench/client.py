"""The client does small operations in great numbers, where Python would be what is measured."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.bench.peers import LONGEST_SECONDS

SOURCE = Path(__file__).with_name("client.c")


class ClientError(Exception):
    """An operation failed, or not all the work was done; the message says which."""


class Client:
    """`client.c`, compiled."""

    def __init__(self, program: Path) -> None:
        """Compile it as `program`; raises `subprocess.CalledProcessError`."""
        self._program = program
        flags = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
        subprocess.run(["gcc", *flags, "-o", program, SOURCE], check=True)

    def __call__(
        self, directory: Path, mode: str, *arguments: str, names: Sequence[str] = ()
    ) -> int:
        """Do the work of `mode` in `directory`, on `names` below it, and return nanoseconds.

        Raises `ClientError`.
        """
        done = subprocess.run(
            [self._program, mode, *arguments],
            cwd=directory,
            input="".join(f"{name}\n" for name in names),
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
        )
        if done.returncode != 0:
            raise ClientError(done.stderr.strip() or f"{mode} ended with {done.returncode}")
        took, count = map(int, done.stdout.split())
        if names and count != len(names):
            raise ClientError(f"{mode} dealt with {count} names instead of {len(names)}")
        return took
