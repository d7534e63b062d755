"""What sessiond publishes of sessions, snapshots and jobs: their properties, as of one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

RUNNING = "running"
SUCCEEDED = "succeeded"


@dataclass(frozen=True)
class Published:
    """Properties of one object; what a daemon of another version does not have is empty."""

    path: str

    @classmethod
    def of(cls, path: str, properties: Mapping[str, Any]) -> Self:
        """Return what `properties`, by their names on the bus, say of the object at `path`."""
        known = {
            field.name: properties[name]
            for field in fields(cls)
            if (name := _published_name(field.name)) in properties
        }
        return cls(path, **known)


@dataclass(frozen=True)
class Session(Published):
    """A session. Times are microseconds since 1970, and 0 is never, as everywhere here."""

    id: str = ""
    user: str = ""
    uid: int = 0
    profile: str = ""
    storage: str = ""
    state: str = ""
    failure: str = ""
    bytes_used: int = 0
    """As it was when the session was read; it is not announced."""
    bytes_limit: int = 0
    space_level: str = "normal"
    created_at: int = 0
    last_reset: int = 0
    next_reset: int = 0
    next_reset_reason: str = ""
    snapshots: Sequence[str] = ()
    """Object paths, oldest first."""
    last_job: str = "/"

    @property
    def is_mounted(self) -> bool:
        """Whether there is something to be seen in it."""
        return self.state not in {"starting", "failed", "inactive"}


@dataclass(frozen=True)
class Snapshot(Published):
    """A snapshot of a session."""

    name: str = ""
    description: str = ""
    created_at: int = 0
    automatic: bool = False
    size: int = 0
    """Bytes that it takes on disk, if that is known."""
    size_valid: bool = False


@dataclass(frozen=True)
class Job(Published):
    """A long operation. `error_name` is empty unless it has failed."""

    operation: str = ""
    progress: float = 0.0
    progress_valid: bool = False
    state: str = RUNNING
    error_name: str = ""
    error_message: str = ""


class Program(NamedTuple):
    """Processes of one name that use a session."""

    name: str
    pids: Sequence[int]
    uid: int
    unit: str


@dataclass(frozen=True)
class Changes:
    """How much of a session differs from its image."""

    added: int = 0
    changed: int = 0
    deleted: int = 0
    renamed: int = 0
    bytes: int = 0
    largest: Sequence[tuple[str, str, int]] = ()
    """Path, kind and size of the largest files."""

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Self:
        """Return what the daemon answers to `Changes`."""
        return cls(**{f.name: summary[f.name] for f in fields(cls) if f.name in summary})

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.deleted or self.renamed)


def of_user(sessions: Sequence[Session], uid: int) -> Session | None:
    """Return the oldest session of a user, as `GetSessionByUser` does; None if there is none."""
    own = (one for one in sessions if one.uid == uid)
    return min(own, key=lambda one: one.created_at, default=None)


def _published_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))
