"""The ``a{sv}`` options that methods take: which there are, and their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sessiond.errors import InvalidOption
from sessiond.session.model import (
    AT_ONCE,
    GRACE_LIMIT,
    SECONDS_LIMIT,
    Manner,
    kept_paths,
    snapshot_name,
)

DEPTH_LIMIT = 4096
"""More levels than a path can have."""


class NoOptions(BaseModel):
    """None are known yet; callers pass an empty dictionary."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CreateOptions(NoOptions):
    """Options of CreateSession."""

    id: str | None = Field(None, description="a string: the session's id")


class SnapshotOptions(NoOptions):
    """Options of Snapshot and SnapshotSession."""

    description: str = Field("", description="a string for people")
    pinned: bool = Field(False, description="a boolean: whether rules may not delete it")


class CompareOptions(NoOptions):
    """Options of Changes and OpenDiff."""

    start: str = Field(
        "", alias="from", description="a string: the name of a snapshot, or '' for the image"
    )
    end: str = Field(
        "", alias="to", description="a string: the name of a snapshot, or '' for the state now"
    )


class ChangesOptions(CompareOptions):
    """Options of Changes."""

    directories: int = Field(
        0, ge=0, le=100, description="a number from 0 to 100: directories that are told of"
    )
    depth: int = Field(
        1,
        ge=0,
        le=DEPTH_LIMIT,
        description=f"a number from 0 to {DEPTH_LIMIT}: levels below the root down to which they "
        "are told of",
    )


class DiffOptions(CompareOptions):
    """Options of OpenDiff."""

    content: bool = Field(False, description="a boolean: whether to tell what text has changed")


class PersistOptions(NoOptions):
    """Options of Persist and PersistSession."""

    verify: bool = Field(True, description="a boolean: whether to read back what was written")


class RebaseOptions(NoOptions):
    """Options of Rebase."""

    conflicts: Literal["keep", "drop", "save"] | None = Field(
        None, description="'keep', 'drop' or 'save': what becomes of files that are shadowed"
    )
    remount: bool = Field(
        False, description="a boolean: unmount the session for it, if it is mounted"
    )


class UncommitOptions(NoOptions):
    """Options of Uncommit."""

    delete: bool = Field(False, description="a boolean: whether to delete what is kept there")


class ExportOptions(NoOptions):
    """Options of Export."""

    format: Literal["oci", "squashfs"] = Field("oci", description="'oci' or 'squashfs'")


class ImportOptions(SnapshotOptions):
    """Options of Import."""


class SwitchOptions(NoOptions):
    """Options that Reset and Restore have in common."""

    terminate: bool = Field(False, description="a boolean: end the programs that use it first")
    grace: float = Field(
        AT_ONCE.grace,
        ge=0,
        le=GRACE_LIMIT,
        description=f"a number from 0 to {GRACE_LIMIT}: seconds that they have for that",
    )
    snapshot_first: str | bool = Field(
        False,
        alias="snapshot-first",
        description="a boolean, or a string: the name of a snapshot to be made first",
    )

    def manner(self) -> Manner:
        """Return how to go about it. Raises `InvalidName`."""
        first = self.snapshot_first
        return Manner(
            terminate=self.terminate,
            grace=self.grace,
            snapshot=first if isinstance(first, bool) else snapshot_name(first),
        )


class ResetOptions(SwitchOptions):
    """Options of Reset."""

    keep: list[str] = Field([], description="an array of strings: paths that stay as they are")

    def manner(self) -> Manner:
        """Return how to go about it. Raises `InvalidName`, `InvalidOption`."""
        return super().manner().model_copy(update={"keep": kept_paths(self.keep)})


class RestoreOptions(SwitchOptions):
    """Options of Restore."""

    undo: bool = Field(True, description="a boolean: whether to keep what is replaced")


class ScheduleOptions(ResetOptions):
    """Options of ScheduleReset."""

    after: float | None = Field(
        None,
        alias="in",
        ge=0,
        le=SECONDS_LIMIT,
        description="a number: seconds from now until the reset",
    )
    idle: float | None = Field(
        None,
        ge=0,
        le=SECONDS_LIMIT,
        description="a number: seconds for which the session's user has not been there",
    )
    warning: float | None = Field(
        None, ge=0, le=SECONDS_LIMIT, description="a number: seconds for which it is announced"
    )


_O = TypeVar("_O", bound=NoOptions)


def parse(model: type[_O], options: Mapping[str, object]) -> _O:
    """Return `options` as `model`. Raises `InvalidOption`, naming the key and what is allowed."""
    try:
        return model.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
    key = problem["loc"][0]
    known = {field.alias or name: field for name, field in model.model_fields.items()}
    if key in known:
        raise InvalidOption(f"Option {key!r} has to be {known[str(key)].description}.")
    allowed = "; ".join(f"{name!r}, {field.description}" for name, field in known.items())
    raise InvalidOption(f"There is no option {key!r} here. Allowed: {allowed or 'none'}.")
