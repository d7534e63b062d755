"""Programs that use a merged view: named, and ended politely before its layers are exchanged.

A program that has files open goes on with them after a reset, and may write what it had in memory
over what it finds then; so people may want it to end first.

This is a courtesy, no barrier: a program of the session's user can come back at any moment, and
nothing here is waited for without limit.

Nor may it be a weapon: any program can be given an open file of the session, in a message to a
service of the machine, say. So that alone ends no program of others than the session's user.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from sessiond.session.model import ROOT, Uid
from sessiond.session.processes import Process, Processes

log = logging.getLogger(__name__)

_INIT = 1
_WORKS_THERE = frozenset({"cwd", "root", "exe"})
"""Uses of `Process` that a program has by itself, or from who has started it."""
_KILL_ROUNDS = 3
"""Of looking for those that have come meanwhile."""
_KILL_SECONDS = 5.0
"""For all that are killed to be gone; a process that waits for a disk may take longer."""


@dataclass(frozen=True, slots=True)
class Program:
    """Processes of one name, user and unit that use a merged view."""

    name: str
    pids: tuple[int, ...]
    uid: Uid
    """The real user of them."""
    unit: str
    """As `Process.unit`."""

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.pids))}) of uid {self.uid}"


def programs(processes: Iterable[Process]) -> tuple[Program, ...]:
    """Sum up processes, by name."""
    pids: dict[tuple[str, Uid, str], list[int]] = defaultdict(list)
    for process in processes:
        pids[process.program, process.uid, process.unit].append(process.pid)
    return tuple(
        Program(name, tuple(sorted(numbers)), uid, unit)
        for (name, uid, unit), numbers in sorted(pids.items())
    )


async def find(processes: Processes, device: str) -> tuple[Program, ...]:
    """Return the programs that use the merged view on `device`. Raises `Failed`."""
    async with processes.using(device) as found:
        return programs(found)


async def terminate(
    processes: Processes,
    device: str,
    *,
    owner: Uid,
    asked_by: Uid,
    grace: float,
    report: Callable[[Sequence[Program]], None],
) -> None:
    """End what uses the merged view on `device`: SIGTERM, and SIGKILL after `grace` seconds.

    `owner`: the session's user. Root ends what is theirs alone, and whatever works there, but init;
    other users only what is theirs alone. `report` is told of all that was found first. Returns
    also when something could not be ended. Raises `Failed`.
    """
    deadline = trio.current_time() + grace
    asked: set[int] = set()
    reported = False
    while not reported or trio.current_time() < deadline:
        async with processes.using(device) as found:
            if not reported:
                report(programs(found))
                reported = True
            ours = _ours(found, owner, asked_by)
            if not ours:
                return
            # A pid that is used again meanwhile is another process's, which is killed unasked.
            _send(signal.SIGTERM, [one for one in ours if one.pid not in asked])
            asked |= {one.pid for one in ours}
            with trio.move_on_at(deadline):
                await _wait_ended(ours)
    for _ in range(_KILL_ROUNDS):
        async with processes.using(device) as found:
            ours = _ours(found, owner, asked_by)
            if not ours:
                return
            _send(signal.SIGKILL, ours)
            with trio.move_on_after(_KILL_SECONDS):
                await _wait_ended(ours)
    log.warning("Not all programs could be ended; they go on with the files that they have open.")


def _ours(found: Iterable[Process], owner: Uid, asked_by: Uid) -> list[Process]:
    """Return those that whoever has asked may end."""
    return [
        one
        for one in found
        if one.pid not in {_INIT, os.getpid()} and _may_end(one, owner, asked_by)
    ]


def _may_end(process: Process, owner: Uid, asked_by: Uid) -> bool:
    if asked_by != ROOT:
        return process.is_of(asked_by)
    if not _WORKS_THERE.isdisjoint(process.uses):
        return True
    # The services of the machine are root's, and in a session of root's others may open files, too.
    return owner != ROOT and process.is_of(owner)


def _send(number: signal.Signals, processes: Sequence[Process]) -> None:
    for program in programs(processes):
        log.info("%s is sent to %s.", number.name, program)
    for process in processes:
        process.signal(number)


async def _wait_ended(processes: Sequence[Process]) -> None:
    async with trio.open_nursery() as nursery:
        for process in processes:
            nursery.start_soon(process.wait_ended)
