"""The words of the session layer as types: ids, states, records and what is told about them.

Records (`SessionRecord`, `SnapshotRecord`) are what the store keeps on disk; the rest lives in
memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import NewType, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict

from sessiond.config import NAME, NAME_LIMIT
from sessiond.errors import InvalidName, NoSuchSnapshot
from sessiond.session.faults import quoted

SessionId = NewType("SessionId", str)
SnapshotName = NewType("SnapshotName", str)
LayerNumber = NewType("LayerNumber", int)
Uid = NewType("Uid", int)

RECORD_FORMAT = 1
"""Written into each record; a record of a higher format is left alone."""


def session_id(text: str) -> SessionId:
    """Return `text` as a session id.

    Raises `InvalidName` unless it is 1 to 64 of ``A-Z a-z 0-9 _ . -``, starting with a letter or
    digit: ids become file names, D-Bus object paths and unit names.
    """
    return SessionId(_checked(text, "session id"))


def snapshot_name(text: str) -> SnapshotName:
    """Return `text` as a snapshot name; the same rule and error as for `session_id`."""
    return SnapshotName(_checked(text, "snapshot name"))


def _checked(text: str, what: str) -> str:
    if len(text) > NAME_LIMIT:
        raise InvalidName(
            f"The {what} is {len(text)} characters long; at most {NAME_LIMIT} are allowed."
        )
    if not NAME.fullmatch(text):
        raise InvalidName(
            f"{quoted(text)} is no {what}: use letters, digits, '_', '.' and '-', "
            "beginning with a letter or digit."
        )
    return text


class StorageKind(StrEnum):
    """Where a session's changes are kept."""

    TMPFS = "tmpfs"
    PERSISTENT = "persistent"


class DataPath(StrEnum):
    """How the contents of files get from the layers to programs; see docs/design/data-path.md."""

    PASSTHROUGH = "passthrough"
    """The kernel reads and writes open files by itself."""
    CACHED = "cached"
    """The kernel opens files without asking, and caches what it reads."""
    PLAIN = "plain"
    """The worker is asked for everything."""


class SessionState(StrEnum):
    """What a session is doing; published as the `State` property."""

    STARTING = "starting"
    ACTIVE = "active"
    BUSY = "busy"
    FAILED = "failed"
    CLOSING = "closing"


class Operation(StrEnum):
    """What a job does; published as `Job.Operation`."""

    RESET = "reset"
    RESTORE = "restore"
    PERSIST = "persist"


class ImageSource(BaseModel):
    """Where an image is, and what must be true of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    verity_root_hash: str | None = None
    verity_hash_device: Path | None = None


class SnapshotRecord(BaseModel):
    """A committed layer, and all below it: the stack that was frozen when the snapshot was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SnapshotName
    description: str = ""
    created_at: AwareDatetime
    layers: tuple[LayerNumber, ...]
    """Topmost first, without the image."""


class SessionRecord(BaseModel):
    """All that must be known of a session to mount it again, even without its profile.

    Never changed in place: a method per operation returns the record as it is to be afterwards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = RECORD_FORMAT
    id: SessionId
    user: str
    uid: Uid
    profile: str
    source: ImageSource
    image: str
    """Digest of the image that the upper was built on."""
    mount_point: Path
    """Absolute, without symlinks."""
    nosuid: bool
    nodev: bool
    data_path: DataPath = DataPath.PASSTHROUGH
    storage: StorageKind
    created_at: AwareDatetime
    last_reset: AwareDatetime | None = None
    next_layer: LayerNumber = LayerNumber(2)
    """No layer has had this number or a higher one: numbers are never used again."""
    upper: LayerNumber = LayerNumber(1)
    layers: tuple[LayerNumber, ...] = ()
    """Committed layers between the upper and the image, topmost first."""
    snapshots: tuple[SnapshotRecord, ...] = ()

    @property
    def all_layers(self) -> frozenset[LayerNumber]:
        """Every layer that has to be kept: those mounted, and those of snapshots."""
        return frozenset(
            {self.upper, *self.layers}.union(*(snapshot.layers for snapshot in self.snapshots))
        )

    def snapshot(self, name: str) -> SnapshotRecord:
        """Return the snapshot `name`; raises `NoSuchSnapshot`."""
        for snapshot in self.snapshots:
            if snapshot.name == name:
                return snapshot
        known = ", ".join(snapshot.name for snapshot in self.snapshots) or "none"
        raise NoSuchSnapshot(
            f"Session {self.id} has no snapshot {quoted(name)}; its snapshots are: {known}."
        )

    def with_new_upper(self, layers: tuple[LayerNumber, ...]) -> Self:
        """A new, empty upper on top of the committed `layers`."""
        return self.model_copy(
            update={
                "upper": self.next_layer,
                "next_layer": LayerNumber(self.next_layer + 1),
                "layers": layers,
            }
        )

    def committed(self) -> Self:
        """The upper becomes the topmost committed layer, under a new one."""
        return self.with_new_upper((self.upper, *self.layers))

    def reset(self, at: datetime) -> Self:
        """Nothing but a new upper over the image; snapshots stay."""
        return self.with_new_upper(()).model_copy(update={"last_reset": at})

    def with_snapshots(self, snapshots: Collection[SnapshotRecord]) -> Self:
        """The same layers, other snapshots."""
        return self.model_copy(update={"snapshots": tuple(snapshots)})

    def gone_back_to(self, before: Self) -> Self:
        """The record `before`, except that no layer number made since is used again."""
        return before.model_copy(update={"next_layer": self.next_layer})


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes and inodes of a session's storage.

    A limit of 0 means that the session has none of its own: then the numbers are those of the file
    system that it shares with others.
    """

    bytes_used: int
    bytes_limit: int
    inodes_used: int
    inodes_limit: int


@dataclass(frozen=True, slots=True)
class UpperDirectories:
    """The writable layer: its tree, and its workdir on the same file system."""

    fs: Path
    work: Path


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of one mount, topmost first."""

    upper: UpperDirectories
    lowers: tuple[Path, ...]
    indexes: tuple[Path, ...] = ()
    """Hard links that lowers have kept that were uppers once, topmost first; may be missing."""
    orphans: Path | None = None
    """Where removed files are kept while they are open, beside the upper; made if missing."""


@dataclass(frozen=True, slots=True)
class ChangeSummary:
    """How far a session's merged view is from its image."""

    added: int
    changed: int
    deleted: int
    bytes: int
    """Apparent size of the added and changed regular files."""
