"""The words of the session layer as types: ids, states, records and what is told about them.

Records (`SessionRecord`, `SnapshotRecord`) are what the store keeps on disk; the rest lives in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple, NewType, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from sessiond.config import NAME, NAME_LIMIT, TIME_OF_DAY, cgroup_path
from sessiond.errors import InvalidName, InvalidOption, NoSuchSnapshot
from sessiond.keep_rules import RULES_LIMIT, checked_path, checked_rule
from sessiond.overlay.rebase import Conflicts as Conflicts
from sessiond.session.clock import Instant
from sessiond.session.faults import quoted

SessionId = NewType("SessionId", str)
SnapshotName = NewType("SnapshotName", str)
LayerNumber = NewType("LayerNumber", int)
Uid = NewType("Uid", int)

ROOT = Uid(0)
"""Who may do everything."""

GRACE_LIMIT = 600
"""Most seconds that a reset waits for programs to end by themselves."""

SECONDS_LIMIT = 1e9
"""Most seconds until a reset that comes by itself."""

RECORD_FORMAT = 1
"""Written into each record; a record of a higher format is left alone."""


def _without_nul(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path without NUL is needed")
    return path


# What records are held to when they are read.
_NAME = Field(pattern=f"^{NAME.pattern}$", max_length=NAME_LIMIT)
_Uid = Annotated[Uid, Field(ge=0, lt=2**32 - 1)]  # the highest one is chown's "leave it"
_Layer = Annotated[LayerNumber, Field(ge=1)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Seconds = Annotated[float, Field(ge=0, le=SECONDS_LIMIT)]
_Percent = Annotated[int, Field(ge=1, le=100)]
_Path = Annotated[Path, AfterValidator(_without_nul)]
_Rule = Annotated[str, AfterValidator(checked_rule)]
_Moment = Annotated[AwareDatetime, Field(ge=datetime.fromtimestamp(0, UTC))]  # D-Bus has no earlier


def session_id(text: str) -> SessionId:
    """Return `text` as a session id.

    Raises `InvalidName` unless it is 1 to 64 of ``A-Z a-z 0-9 _ . -``, starting with a letter or
    digit: ids become file names, D-Bus object paths and unit names.
    """
    return SessionId(_checked(text, "session id"))


def snapshot_name(text: str) -> SnapshotName:
    """Return `text` as a snapshot name; the same rule and error as for `session_id`."""
    return SnapshotName(_checked(text, "snapshot name"))


def kept_paths(paths: list[str]) -> tuple[str, ...]:
    """Return `paths` as those that a reset is to leave as they are. Raises `InvalidOption`."""
    if len(paths) > RULES_LIMIT:
        raise InvalidOption(f"At most {RULES_LIMIT} paths can be kept; name directories instead.")
    try:
        return tuple(checked_path(path) for path in paths)
    except ValueError as error:
        raise InvalidOption(f"{error}.") from None


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


class ImageChange(StrEnum):
    """What becomes of a session when it starts and finds another image than it was built on."""

    REFUSE = "refuse"
    """It is FAILED until the old one is back, or something is done about it."""
    DISCARD = "discard"
    """Its changes and snapshots are deleted."""
    REBASE = "rebase"
    """They are put over the new image; see `sessiond.overlay.rebase`."""


class SessionState(StrEnum):
    """What a session is doing; published as the `State` property."""

    STARTING = "starting"
    ACTIVE = "active"
    BUSY = "busy"
    INACTIVE = "inactive"
    """Not mounted, since its user is not logged in."""
    FAILED = "failed"
    CLOSING = "closing"


class Operation(StrEnum):
    """What a job does; published as `Job.Operation`."""

    RESET = "reset"
    RESTORE = "restore"
    PERSIST = "persist"
    REBASE = "rebase"
    MAINTENANCE = "maintenance"
    EXPORT = "export"
    IMPORT = "import"
    COMMIT = "commit"


class ArchiveKind(StrEnum):
    """What a snapshot is exported as."""

    OCI = "oci"
    """A tar, as OCI image layers are."""
    SQUASHFS = "squashfs"
    """A file system image, as overlayfs's layers are."""


class Manner(BaseModel):
    """How a reset or restore is gone about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    terminate: bool = False
    """End the programs that use the merged view first."""
    grace: Annotated[float, Field(ge=0, le=GRACE_LIMIT)] = 10.0
    """Seconds that they have, from SIGTERM to SIGKILL."""
    snapshot: Annotated[SnapshotName, _NAME] | bool = False
    """Keep what there is first, under this name or, if it is true, as an automatic snapshot."""
    keep: tuple[Annotated[str, AfterValidator(checked_path)], ...] = ()
    """Of a reset: paths that it leaves as they are."""


AT_ONCE = Manner()
"""Nothing is done first."""


class ResetRules(BaseModel):
    """When a session is reset by itself, as its profile had it; in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    idle: _Seconds | None = None
    """Since its user was there last."""
    after: _Seconds | None = None
    """Since it was made or last reset."""
    daily: Annotated[str, Field(pattern=f"^{TIME_OF_DAY}$")] | None = None
    """At that time of day, by the machine's time zone."""
    warning: _Seconds = 60
    """For which it is announced."""
    inhibit: _Seconds = 3600
    """For which it can be held back, by others than root."""
    terminate: bool = False
    """See `Manner`."""
    grace: Annotated[float, Field(ge=0, le=GRACE_LIMIT)] = AT_ONCE.grace


class ScheduledReset(BaseModel):
    """A reset that somebody has asked for, to come at one of these three times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: _Uid
    asked: Instant
    """When they have."""
    at: Annotated[_Moment, Field(lt=datetime(2200, 1, 1, tzinfo=UTC))] | None = None
    after: _Seconds | None = None
    """Seconds since they have asked."""
    idle: _Seconds | None = None
    """Seconds since the session's user was there last."""
    warning: _Seconds | None = None
    """For which it is announced; None: as the profile has it."""
    manner: Manner = AT_ONCE


class ImageSource(BaseModel):
    """Where an image is, and what must be true of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: _Path
    verity_root_hash: Annotated[str, Field(pattern="^[0-9a-f]+$")] | None = None
    verity_hash_device: _Path | None = None


class Quota(BaseModel):
    """Limits of a session on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: _Count
    inodes: _Count


class SpaceThresholds(BaseModel):
    """Percent of bytes or inodes in use from which on the storage is at a level; see `space`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warning: _Percent = 80
    critical: _Percent = 95


class SnapshotRecord(BaseModel):
    """A committed layer, and all below it: the stack that was frozen when the snapshot was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[SnapshotName, _NAME]
    description: str = ""
    created_at: _Moment
    layers: tuple[_Layer, ...]
    """Topmost first, without the image."""
    automatic: bool = False
    """Made by sessiond, and not because a person had asked for it."""
    pinned: bool = False
    """To be kept until a person deletes it, whatever the rules say."""
    inexact: tuple[str, ...] = ()
    """Paths of files that are of a moment later than the rest: see `Mount.swap`."""


class SnapshotRules(BaseModel):
    """Which snapshots are made by themselves, and which are kept: all, where no rule says else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: Annotated[int, Field(ge=1)] | None = None
    """The newest so many."""
    daily: Annotated[int, Field(ge=1)] | None = None
    """The last of each of so many days on which there is any."""
    max_bytes: _Count | None = None
    """As many as take no more than this beside what the merged view is built on."""
    every: Annotated[int, Field(ge=60, lt=2**31)] | None = None
    """Seconds from one automatic one to the next."""


class SessionRecord(BaseModel):
    """All that must be known of a session to mount it again, even without its profile.

    Never changed in place: a method per operation returns the record as it is to be afterwards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=1)] = RECORD_FORMAT
    id: Annotated[SessionId, _NAME]
    user: str
    uid: _Uid
    profile: str
    source: ImageSource
    image: str
    """Digest of the image that the upper was built on."""
    image_built: _Moment | None = None
    """When that image was made, by its superblock."""
    image_changed: ImageChange = ImageChange.REFUSE
    rebase_conflicts: Conflicts = Conflicts.KEEP
    rebasing: bool = False
    """Some layers are those of another image already: that has to be gone on with first."""
    mount_point: _Path
    """Absolute, without symlinks."""
    nosuid: bool
    nodev: bool
    data_path: DataPath = DataPath.PASSTHROUGH
    cgroup: Annotated[str, AfterValidator(cgroup_path)] | None = None
    """That of the session's programs, from the root of the hierarchy; None: it is not known."""
    storage: StorageKind
    quota: Quota | None = None
    """What it may take on disk, now or once it is moved there; None: as much as there is."""
    thresholds: SpaceThresholds = SpaceThresholds()
    snapshot_rules: SnapshotRules = SnapshotRules()
    flatten_above: Annotated[int, Field(ge=0)] = 16
    """Committed layers of the merged view that are left alone; see `flattening`."""
    keep: tuple[_Rule, ...] | None = None
    """What outlives resets (`sessiond.keep_rules`); None: nothing ever will."""
    keep_quota: Quota | None = None
    """What that may take; None: as much as there is."""
    kept_still: tuple[_Rule, ...] = ()
    """Rules that were taken back, which hold until the next reset."""
    commits: tuple[_Rule, ...] = ()
    """Rules of what was committed, as far as it is known."""
    created_at: _Moment
    last_reset: _Moment | None = None
    maintenance: bool = False
    """It is that of a maintenance, and ends with it."""
    login: bool = False
    """It is mounted while its user is logged in; see `logins`."""
    began: Instant | None = None
    """When it was made or last reset, by all clocks."""
    reset_rules: ResetRules = ResetRules()
    scheduled: ScheduledReset | None = None
    next_layer: _Layer = LayerNumber(2)
    """No layer has had this number or a higher one: numbers are never used again."""
    upper: _Layer = LayerNumber(1)
    layers: tuple[_Layer, ...] = ()
    """Committed layers between the upper and the image, topmost first."""
    snapshots: tuple[SnapshotRecord, ...] = ()
    restoring: Annotated[SnapshotName, _NAME] | None = None
    """The automatic snapshot of a restore that has begun: of no use if that is not completed."""

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        if not self.mount_point.is_absolute() or ".." in self.mount_point.parts:
            raise ValueError(f"the mount point {self.mount_point} is no absolute path")
        committed = self.all_layers - {self.upper}
        if self.upper in self.layers or len(self.layers) != len(set(self.layers)):
            raise ValueError("a layer is in the stack twice")
        if any(self.upper in snapshot.layers for snapshot in self.snapshots):
            raise ValueError(f"the upper, layer {self.upper}, belongs to a snapshot")
        if self.next_layer <= max(self.upper, *committed, 0):
            raise ValueError(f"layer {self.next_layer} would be the next, and is there already")
        if len({snapshot.name for snapshot in self.snapshots}) != len(self.snapshots):
            raise ValueError("two snapshots have the same name")
        return self

    @property
    def keep_rules(self) -> tuple[str, ...]:
        """All rules in force."""
        return tuple(dict.fromkeys((*(self.keep or ()), *self.kept_still, *self.commits)))

    @property
    def lasting_rules(self) -> tuple[str, ...]:
        """Those of them that outlive a reset."""
        return tuple(dict.fromkeys((*(self.keep or ()), *self.commits)))

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
                "restoring": None,
            }
        )

    def committed(self) -> Self:
        """The upper becomes the topmost committed layer, under a new one."""
        return self.with_new_upper((self.upper, *self.layers))

    def reset(self, at: Instant, *, scheduled: bool = False, partly: bool = False) -> Self:
        """Nothing but a new upper over the image; snapshots stay.

        With `scheduled`, it is what was scheduled, which is over then. `partly`: something of what
        was there stays, so the session is as old as before, or it could be made to last for ever.
        """
        return self.with_new_upper(()).model_copy(
            update={
                "last_reset": at.wall,
                "began": self.began if partly else at,
                "kept_still": (),
                "scheduled": None if scheduled else self.scheduled,
            }
        )

    def rebased(self, source: ImageSource, image: str, built: datetime | None) -> Self:
        """The same layers over another image."""
        return self.model_copy(
            update={"source": source, "image": image, "image_built": built, "rebasing": False}
        )

    def discarded(self, at: Instant) -> Self:
        """Nothing but a new upper, and no snapshots."""
        return self.reset(at).model_copy(update={"snapshots": (), "rebasing": False})

    def stacks(self) -> list[tuple[LayerNumber, tuple[LayerNumber, ...]]]:
        """Each layer once, with what is below it; all that are above one come before it."""
        stacks = [(self.upper, *self.layers), *(one.layers for one in self.snapshots)]
        below = {number: stack[depth:] for stack in stacks for depth, number in enumerate(stack, 1)}
        return sorted(below.items(), key=lambda layer: len(layer[1]), reverse=True)

    def with_imported(self, snapshot: Callable[..., SnapshotRecord], at: datetime) -> Self:
        """Another snapshot, of one new layer right over the image."""
        imported = snapshot(created_at=at, layers=(self.next_layer,))
        return self.model_copy(
            update={
                "next_layer": LayerNumber(self.next_layer + 1),
                "snapshots": (*self.snapshots, imported),
            }
        )

    def without_layer(self, number: LayerNumber) -> Self:
        """The same without a committed layer that is empty."""

        def rest(layers: tuple[LayerNumber, ...]) -> tuple[LayerNumber, ...]:
            return tuple(layer for layer in layers if layer != number)

        snapshots = [
            snapshot.model_copy(update={"layers": rest(snapshot.layers)})
            for snapshot in self.snapshots
        ]
        return self.with_snapshots(snapshots).model_copy(update={"layers": rest(self.layers)})

    def with_keep(self, rules: tuple[str, ...]) -> Self:
        """Other rules; what is kept by those of before is so until the next reset."""
        gone = [rule for rule in (*(self.keep or ()), *self.kept_still) if rule not in rules]
        return self.model_copy(
            update={"keep": rules, "kept_still": tuple(dict.fromkeys(gone))[:RULES_LIMIT]}
        )

    def without_commits(self, rules: tuple[str, ...]) -> Self:
        """The same, but that `rules` hold until the next reset only."""
        commits = tuple(rule for rule in self.commits if rule not in rules)
        still = tuple(dict.fromkeys((*self.kept_still, *rules)))
        return self.model_copy(update={"commits": commits, "kept_still": still})

    def with_snapshots(self, snapshots: Collection[SnapshotRecord]) -> Self:
        """The same layers, other snapshots."""
        return self.model_copy(update={"snapshots": tuple(snapshots)})

    def without_snapshots(self, gone: Collection[SnapshotRecord]) -> Self:
        """The same layers and snapshots but for those."""
        return self.with_snapshots([one for one in self.snapshots if one not in gone])

    def with_restore_undone(self) -> Self:
        """The same, without what a restore that was not completed has kept."""
        snapshots = [one for one in self.snapshots if one.name != self.restoring]
        return self.with_snapshots(snapshots).model_copy(update={"restoring": None})

    def gone_back_to(self, before: Self) -> Self:
        """The record `before`, except that no layer number made since is used again."""
        return before.model_copy(update={"next_layer": self.next_layer})


class JobRecord(BaseModel):
    """What a restarted manager has to know of a session's last job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Annotated[int, Field(ge=1, lt=2**63)]
    operation: Operation
    started_by: _Uid
    storage: StorageKind
    """What the session was kept on when the job began."""
    upper: _Layer
    """Its upper then."""
    layers: tuple[_Layer, ...] | None = None
    """Committed layers of the merged view once it is done; None: as they are."""
    image: str = ""
    """The digest of its image then."""
    committing: tuple[str, ...] = ()
    """The rules that it adds, if it is a commit."""
    finished: bool = False
    error: str = ""
    """The name of the class of the error of a job that has failed; else empty."""
    message: str = ""

    def was_done(self, record: SessionRecord) -> bool:
        """Say whether the job, unfinished when its manager died, had its effect on `record`.

        Each job has it by the writing of one record, or not at all. A snapshot that it makes first
        is kept either way.
        """
        if self.operation is Operation.PERSIST:
            return record.storage is not self.storage
        if self.operation is Operation.MAINTENANCE:
            return False  # the session would have ended with it
        if self.operation is Operation.REBASE:
            return record.rebasing or record.image != self.image
        if self.operation is Operation.COMMIT:
            return set(self.committing) <= set(record.commits)
        # A snapshot that was made first, so that it can be undone, has changed the upper, too.
        return record.upper != self.upper and self.layers in {None, record.layers}


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
    former: Path | None = None
    """The same, in RAM, of a session that has moved from there to disk; may be missing."""


@dataclass(frozen=True, slots=True)
class PendingWrites:
    """What is still written to storage that a session has left; see `Mount.pending`."""

    files: Mapping[int, str]
    """Paths in the merged view, by inode number there; only some, if they are very many."""
    count: int
    """Of all such files."""
    in_use: bool
    """Something is there; also true of files that were removed while they were open."""


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A file of which the disk has what it contained a moment ago."""

    path: str
    """In the merged view."""
    programs: tuple[str, ...]
    """Names of those that have it open; none if that cannot be seen."""


NOTHING_PENDING = PendingWrites({}, 0, in_use=False)


@dataclass(frozen=True, slots=True)
class Lowers:
    """Layers that are only read, topmost first: a merged view as a snapshot has kept it."""

    paths: tuple[Path, ...]
    indexes: tuple[Path, ...] = ()
    """As of a `Stack`."""


@dataclass(frozen=True, slots=True)
class Span:
    """The two states of a session that are compared."""

    start: Lowers | None = None
    """None: the image, the bottom-most lower of what is served."""
    end: Lowers | None = None
    """None: the merged view, as it is now."""


WHOLE = Span()
"""All that was changed since the image."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """For which directories differences are summed up."""

    directories: int = 0
    """For so many, those with most bytes; at most 100."""
    depth: int = 0
    """Levels below the root; 0: for the root alone."""


NO_BREAKDOWN = Breakdown()


class DirectoryChanges(NamedTuple):
    """What differs below a directory, as of a `ChangeSummary`."""

    path: str
    """As of a `LargeFile`."""
    added: int
    changed: int
    deleted: int
    renamed: int
    bytes: int


class LargeFile(NamedTuple):
    """A file that differs."""

    path: str
    """For people: bytes that are not UTF-8 are escaped."""
    kind: str
    """What has happened to it, as in the list of differences."""
    size: int
    """In bytes."""


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """What outlives resets of a session: an upper of its own, and which paths belong there."""

    upper: UpperDirectories
    orphans: Path
    """As `Stack.orphans`."""
    rules: tuple[str, ...]
    """See `sessiond.keep_rules`."""


@dataclass(frozen=True, slots=True)
class ChangeSummary:
    """How far one state of a session is from another: its merged view from its image, for one."""

    added: int
    changed: int
    deleted: int
    bytes: int
    """Apparent size of the added, changed and renamed regular files."""
    renamed: int = 0
    largest: tuple[LargeFile, ...] = ()
    """Of these files, the largest, first of all."""
    directories: tuple[DirectoryChanges, ...] = ()
    """Those with most bytes below them, most first, if they were asked for."""
