"""Carrying out jobs: a progress bar on a terminal, and cancellation by Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sessiond.bus.client import Job, JobInfo
from sessiond.cli.output import printable
from sessiond.errors import SessiondError


async def carry_out(start: Awaitable[Job], title: str) -> None:
    """Start a job and wait for its end, showing its progress; raise its error when it fails.

    An interrupt, from the start on, asks the daemon to cancel the job: it then fails with
    `Cancelled`.
    """
    failure: SessiondError | None = None
    with trio.open_signal_receiver(signal.SIGINT) as interrupts:
        job = await start  # there may be a question at the terminal first, so no bar yet
        with _bar(title) as show:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_interrupt, job, interrupts)
                try:
                    await job.wait(show)
                except SessiondError as error:
                    failure = error  # raised out here, it is not wrapped into a group
                nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _cancel_on_interrupt(job: Job, interrupts: AsyncIterator[int]) -> None:
    async for _ in interrupts:
        await job.cancel()


@contextmanager
def _bar(title: str) -> Iterator[Callable[[JobInfo], None] | None]:
    """Yield what draws a bar on stderr, for as long as the context is open; None off a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn(printable(title), markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(info: JobInfo) -> None:
            if info.progress_valid:
                progress.update(task, total=1, completed=info.progress)

        yield show
