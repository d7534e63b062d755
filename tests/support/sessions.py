"""A machine in memory for tests of sessions: managers run on it, crash, and run again."""

from __future__ import annotations

import getpass
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from sessiond.config import Config
from sessiond.session.jobs import Job
from sessiond.session.manager import Manager, Session, open_manager
from sessiond.session.memory import MemoryMount, MemoryMounter, MemoryMounts
from sessiond.session.model import SessionId, SnapshotRecord
from sessiond.session.surroundings import Surroundings
from tests.support.guests import FewBelongings, UnknownUserRecords, guests_table

USER = getpass.getuser()
UID = os.getuid()


class Recorder:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def session_added(self, session: Session) -> None:
        self.events.append(f"added {session.id} {session.state}")

    def session_removed(self, session: Session) -> None:
        self.events.append(f"removed {session.id}")

    def session_changed(self, session: Session) -> None:
        self.events.append(f"changed {session.id} {session.state}")

    def reset_done(self, session: Session) -> None:
        self.events.append(f"reset {session.id}")

    def reset_scheduled(self, session: Session, when: datetime, why: str) -> None:
        self.events.append(f"reset of {session.id} scheduled: {why}")

    def space_low(self, session: Session, level: str, used: int, limit: int) -> None:
        self.events.append(f"space {session.id} {level}")

    def snapshot_added(self, session: Session, snapshot: SnapshotRecord) -> None:
        self.events.append(f"snapshot {session.id} {snapshot.name}")

    def snapshot_removed(self, session: Session, snapshot: SnapshotRecord) -> None:
        self.events.append(f"no snapshot {session.id} {snapshot.name}")

    def job_added(self, job: Job) -> None:
        self.events.append(f"job {job.operation}")

    def job_changed(self, job: Job) -> None:
        self.events.append(f"progress {job.operation}")

    def job_completed(self, job: Job) -> None:
        self.events.append(f"done {job.operation} {type(job.error).__name__}")

    def worker_died(self, session: Session, recovered_in: float | None) -> None:
        self.events.append(f"worker of {session.id}")

    def maintenance_changed(self, *, begun: bool) -> None:
        self.events.append(f"maintenance {'begun' if begun else 'ended'}")

    def without_changes(self) -> list[str]:
        return [event for event in self.events if not event.startswith(("changed", "progress"))]


@dataclass
class World:
    """A machine on which nothing is really mounted; it outlives the daemons that run on it."""

    directory: Path
    mounter: MemoryMounter = field(default_factory=MemoryMounter)
    mounts: MemoryMounts = field(default_factory=MemoryMounts)
    recorder: Recorder = field(default_factory=Recorder)
    surroundings: Surroundings = field(default_factory=Surroundings)

    def __post_init__(self) -> None:
        for name in ("image", "homes", "skeleton"):
            (self.directory / name).mkdir(exist_ok=True)
        self.surroundings = replace(
            self.surroundings,
            user_records=UnknownUserRecords(self.directory / "userdb"),
            belongings=FewBelongings(),
        )

    @property
    def runtime(self) -> Path:
        return self.directory / "run"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def image(self) -> Path:
        return self.directory / "image"

    def config(self, **sessions: str) -> Config:
        """Profiles ``volatile`` and ``lasting``; `sessions` are configured, by their profile."""
        profile = {"image": str(self.image)}
        return Config.model_validate(
            {
                "daemon": {
                    "runtime_directory": str(self.runtime),
                    "state_directory": str(self.state),
                    "volatile_limit": "none",
                },
                "profile": {"volatile": profile, "lasting": {**profile, "storage": "persistent"}},
                "guests": guests_table(self.directory),
                "session": {
                    name: {"user": USER, "profile": profile} for name, profile in sessions.items()
                },
            }
        )

    @asynccontextmanager
    async def manager(self, config: Config | None = None) -> AsyncIterator[Manager]:
        """A daemon, from its start to a clean end."""
        async with open_manager(
            config or self.config(),
            self.mounter,
            mounts=self.mounts,
            surroundings=self.surroundings,
        ) as manager:
            manager.observe(self.recorder)
            await manager.start()
            yield manager
            await manager.shut_down()

    @asynccontextmanager
    async def crashing_manager(self) -> AsyncIterator[Manager]:
        """A daemon that is killed in the end."""
        async with open_manager(
            self.config(), self.mounter, mounts=self.mounts, surroundings=self.surroundings
        ) as manager:
            await manager.start()
            yield manager

    def remember_mounts(self) -> None:
        """Know of the tmpfs of sessions that a manager in another process has made."""
        for storage in self.runtime.glob("sessions/*/storage"):
            self.mounts.mounted[storage] = "tmpfs"

    def mount(self, session: str) -> MemoryMount:
        return self.mounter.mounts[SessionId(session)]

    def storage(self, session: str) -> Path:
        return self.runtime / "sessions" / session / "storage"

    def disk(self, session: str) -> Path:
        return self.state / "sessions" / session

    def layers(self, storage: Path) -> list[str]:
        return sorted(path.name for path in (storage / "layers").iterdir())
