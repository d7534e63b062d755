"""Metrics, as a file in Prometheus's text format for node_exporter's textfile collector.

A file, since the daemon has no network, and the collector is there where machines are watched. The
format (https://prometheus.io/docs/instrumenting/exposition_formats/) is too little for a library,
and prometheus_client's writer follows symbolic links in a directory that need not be root's.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from itertools import product
from pathlib import Path

import trio

import sessiond
from sessiond.session.jobs import Job
from sessiond.session.manager import Manager, Session
from sessiond.session.model import Operation, SessionState, SnapshotRecord, StorageKind

log = logging.getLogger(__name__)

INTERVAL = 15.0
"""Seconds from one file to the next; the usual time between two looks of Prometheus."""

_Labels = Mapping[str, str]
_Sample = tuple[str, _Labels, float]
"""What is added to the name of the metric, and the labels and the value."""


class Metrics:
    """An `Observer` that counts; sessions are looked at when asked for."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._started = time.time()
        outcomes = ("succeeded", "failed", "cancelled")
        self._jobs = Counter(dict.fromkeys(product(Operation, outcomes), 0))
        self._requests: Counter[tuple[str, str]] = Counter()
        self._deaths = Counter({"recovered": 0, "remounted": 0})
        self._recovery_seconds = 0.0
        manager.observe(self)

    # What is counted

    def request_answered(self, operation: str, outcome: str) -> None:
        """A call has ended that took permission."""
        self._requests[operation, outcome] += 1

    def job_completed(self, job: Job) -> None:
        self._jobs[job.operation, job.outcome] += 1

    def worker_died(self, session: Session, recovered_in: float | None) -> None:
        self._deaths["remounted" if recovered_in is None else "recovered"] += 1
        self._recovery_seconds += recovered_in or 0.0

    def session_added(self, session: Session) -> None: ...
    def session_removed(self, session: Session) -> None: ...
    def session_changed(self, session: Session) -> None: ...
    def reset_done(self, session: Session) -> None: ...
    def reset_scheduled(self, session: Session, when: datetime, why: str) -> None: ...
    def space_low(self, session: Session, level: str, used: int, limit: int) -> None: ...
    def snapshot_added(self, session: Session, snapshot: SnapshotRecord) -> None: ...
    def snapshot_removed(self, session: Session, snapshot: SnapshotRecord) -> None: ...
    def job_added(self, job: Job) -> None: ...
    def job_changed(self, job: Job) -> None: ...
    def maintenance_changed(self, *, begun: bool) -> None: ...

    # What is told

    def text(self) -> str:
        """Return all metrics as they are now."""
        return "".join(self._families())

    def _families(self) -> Iterator[str]:
        yield _family("build_info", "gauge", "The version that runs.", [("", _version(), 1)])
        yield _family(
            "start_time_seconds",
            "gauge",
            "When the manager started, in seconds since 1970.",
            [("", {}, self._started)],
        )
        yield _family("sessions", "gauge", "Sessions there are.", self._sessions())
        yield from self._space()
        yield _family(
            "jobs_total",
            "counter",
            "Jobs that have ended.",
            [
                ("", {"operation": operation, "outcome": outcome}, number)
                for (operation, outcome), number in self._jobs.items()
            ],
        )
        yield _family(
            "requests_total",
            "counter",
            "Calls over D-Bus that took permission, and were answered.",
            [
                ("", {"operation": operation, "outcome": outcome}, number)
                for (operation, outcome), number in sorted(self._requests.items())
            ],
        )
        yield _family(
            "worker_deaths_total",
            "counter",
            "Workers that died; another went on unnoticed, or the session was mounted again.",
            [("", {"outcome": outcome}, number) for outcome, number in self._deaths.items()],
        )
        yield _family(
            "worker_recovery_seconds",
            "summary",
            "From the death of a worker to when another went on for it.",
            [("_sum", {}, self._recovery_seconds), ("_count", {}, self._deaths["recovered"])],
        )

    def _sessions(self) -> Iterator[_Sample]:
        found = Counter((s.state, s.storage) for s in self._manager.sessions.values())
        for state, storage in product(SessionState, StorageKind):
            yield "", {"state": state, "storage": storage}, found[state, storage]

    def _space(self) -> Iterator[str]:
        usages = [
            ({"session": s.id, "user": s.user, "profile": s.profile}, s.usage)
            for s in self._manager.sessions.values()
        ]
        used = "used by the session; without a limit, of the whole file system it is on."
        limit = "the session may use; missing where it has no limit."
        told = (
            ("session_used_bytes", f"Bytes {used}", [u.bytes_used for _, u in usages]),
            ("session_limit_bytes", f"Bytes {limit}", [u.bytes_limit or None for _, u in usages]),
            ("session_used_inodes", f"Inodes {used}", [u.inodes_used for _, u in usages]),
            (
                "session_limit_inodes",
                f"Inodes {limit}",
                [u.inodes_limit or None for _, u in usages],
            ),
        )
        for name, help_text, values in told:
            samples = [
                ("", labels, value)
                for (labels, _), value in zip(usages, values, strict=True)
                if value is not None
            ]
            yield _family(name, "gauge", help_text, samples)


def _version() -> _Labels:
    return {"version": sessiond.__version__}


def _family(name: str, kind: str, help_text: str, samples: Iterable[_Sample]) -> str:
    full = f"sessiond_{name}"
    lines = [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"]
    for suffix, labels, value in samples:
        pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(
            f"{full}{suffix}{{{pairs}}} {value:.15g}" if pairs else f"{full}{suffix} {value:.15g}"
        )
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# The file


async def write_metrics(metrics: Metrics, file: Path) -> None:
    """Keep `file` up to date until cancelled. That it cannot be written is logged, once."""
    complaint = ""
    while True:
        try:
            await trio.to_thread.run_sync(_replace, file, metrics.text())
            complaint = ""
        except OSError as error:
            if str(error) != complaint:
                complaint = str(error)
                log.warning("The metrics cannot be written: %s", complaint)
        await trio.sleep(INTERVAL)


def remove_metrics(file: Path) -> None:
    """Take away what would look as if it went on for ever."""
    with suppress(OSError):
        file.unlink()


def _replace(file: Path, text: str) -> None:
    """Have `file` hold `text`, for everyone to read; readers see the old or the new one, whole."""
    new = file.with_name(f".{file.name}.new")
    with suppress(FileNotFoundError):
        new.unlink()  # a death has left it
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(new, flags, 0o644), "wb") as target:
        os.fchmod(target.fileno(), 0o644)
        target.write(text.encode(errors="backslashreplace"))
    new.replace(file)
