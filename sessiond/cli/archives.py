"""Archives of snapshots, between the daemon and files: through a pipe, which is all that it takes.

So it is sessionctl that opens the file, with the rights of whoever called it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from sessiond.bus.client import Job
from sessiond.cli.progress import carry_out
from sessiond.errors import Failed, SessiondError
from sessiond.words import _

_CHUNK = 1 << 18
STANDARD = Path("-")
"""Stands for standard input or output."""


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        sentence = _("{file} cannot be opened or written: {reason}.")
        raise Failed(sentence.format(file=file, reason=error.strerror)) from error


async def write_archive(export: Callable[[int], Awaitable[Job]], file: Path, title: str) -> None:
    """Carry out `export`, which is given a pipe to write to; what comes out of it goes to `file`.

    The file gets its name when it is complete. Raises `Failed`, and what the job fails with.
    """
    if file == STANDARD:
        await _write(export, sys.stdout.fileno(), _("standard output"), title)
        return
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with _explained(file):
        target = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            await _write(export, target, str(file), title)
            with _explained(file):
                os.fsync(target)
        finally:
            os.close(target)
        with _explained(file):
            part.rename(file)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


async def _write(
    export: Callable[[int], Awaitable[Job]], target: int, name: str, title: str
) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    failures: list[SessiondError] = []

    async def begin() -> Job:
        try:
            return await export(writer)
        finally:
            os.close(writer)

    async def copy() -> None:
        error = await trio.to_thread.run_sync(_copy, reader, target)
        os.close(reader)  # or the daemon would wait for who reads
        if error is not None:
            sentence = _("{file} cannot be written: {reason}.")
            failures.insert(0, Failed(sentence.format(file=name, reason=error.strerror)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy)
        try:
            await carry_out(begin(), title)
        except SessiondError as error:
            failures.append(error)  # raised out here, it is not wrapped into a group
    if failures:
        raise failures[0]


async def read_archive(add: Callable[[int], Awaitable[Job]], file: Path, title: str) -> None:
    """Carry out `add`, which is given a pipe to read from; what goes into it comes from `file`.

    Raises `Failed`, and what the job fails with.
    """
    if file == STANDARD:
        await _read(add, os.dup(sys.stdin.fileno()), _("standard input"), title)
        return
    with _explained(file):
        source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    await _read(add, source, str(file), title)


async def _read(add: Callable[[int], Awaitable[Job]], source: int, name: str, title: str) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    failures: list[SessiondError] = []

    async def begin() -> Job:
        try:
            return await add(reader)
        finally:
            os.close(reader)

    def feed() -> OSError | None:
        try:
            return _copy(source, writer)
        finally:
            os.close(source)
            os.close(writer)

    async def copy() -> None:
        # Abandoned where it waits for a terminal, and the job has ended.
        error = await trio.to_thread.run_sync(feed, abandon_on_cancel=True)
        if error is not None and not isinstance(error, BrokenPipeError):
            sentence = _("{file} cannot be read: {reason}.")
            failures.insert(0, Failed(sentence.format(file=name, reason=error.strerror)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy)
        try:
            await carry_out(begin(), title)
        except SessiondError as error:
            failures.append(error)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]


def _copy(source: int, target: int) -> OSError | None:
    """Copy all that there is; return what has prevented it."""
    try:
        while data := os.read(source, _CHUNK):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(target, rest) :]
    except OSError as error:
        return error
    return None
