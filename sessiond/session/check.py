"""What the checker tells of sessions: findings in the store and in layers, and how many there are.

`check_store` has the check of the store.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from sessiond.errors import Busy, Failed, SessiondError
from sessiond.overlay.check import checker
from sessiond.overlay.check.checker import Target
from sessiond.overlay.check.findings import Description, FindingKind, Severity
from sessiond.overlay.lowerdir import parse_lowers

__all__ = ["Found", "Report", "Severity", "StoreKind", "Target", "check_layers", "parse_lowers"]

_E, _W, _N = Severity


class StoreKind(FindingKind):
    """What can be wrong with the store. A repair removes what the daemon would at its start."""

    RECORD_UNREADABLE = Description(
        "record-unreadable",
        _E,
        "The record cannot be read or makes no sense, so the session is not served.",
    )
    RECORD_MISSING = Description(
        "record-missing",
        _E,
        "The session has layers and no record; sessiond sets it aside when it starts.",
    )
    LAYER_MISSING = Description("layer-missing", _E, "The record names a layer that is not there.")
    LAYER_UNREADABLE = Description("layer-unreadable", _E, "The layer cannot be checked.")
    IMAGE_UNAVAILABLE = Description(
        "image-unavailable",
        _E,
        "The image is missing or another one, so the session is not served; what depends on the "
        "image was not checked.",
    )
    EXPOSED = Description(
        "exposed",
        _W,
        "Others than root can look into it or change it, or own it.",
        "made root's alone",
    )
    RECORD_NEWER = Description(
        "record-newer",
        _W,
        "A later sessiond wrote the record; this one can neither serve nor check the session.",
    )
    SET_ASIDE = Description(
        "set-aside",
        _W,
        "A session whose record could not be read was put here: take from it what is needed, and "
        "delete it.",
    )
    SERVED = Description("served", _N, "The session is in use, so its upper was not checked.")
    RECORD_TWICE = Description(
        "record-twice",
        _N,
        "The session was just being moved to disk: this record does not count any more, and is "
        "removed when sessiond starts.",
    )
    STORAGE_GONE = Description(
        "storage-gone", _N, "The session was in RAM, and ended with the last boot."
    )
    HALF_MADE = Description(
        "half-made",
        _N,
        "It has no record: it was not made, or is not removed, to the end.",
        "removed",
    )
    LAYER_UNREFERENCED = Description(
        "layer-unreferenced", _N, "No record names the layer.", "removed"
    )
    ORPHAN = Description(
        "orphan", _N, "The file was removed while it was open, and is open no more.", "removed"
    )
    JOB_UNREADABLE = Description(
        "job-unreadable", _N, "What the session's last job was cannot be read.", "removed"
    )
    TRASH = Description("trash", _N, "It was about to be deleted.", "removed")
    LEFTOVER = Description("leftover", _N, "It was left by a crash.", "removed")
    FOREIGN = Description("foreign", _N, "It is not sessiond's.")


class Found(NamedTuple):
    """A finding, with where it is."""

    kind: FindingKind
    path: bytes
    """From the root of the upper or workdir; in the store absolute."""
    place: str = "store"
    """``upper``, ``workdir`` or ``store``."""
    session: str | None = None
    layer: int | None = None
    detail: str = ""
    number: int = 1
    """How many of them there are; `path` is the first."""
    repaired: bool = False

    @property
    def left(self) -> bool:
        """Whether something is wrong that is still there."""
        return not self.repaired and self.kind.severity is not Severity.NOTE


Tell = Callable[[Found], None]


@dataclass
class Report:
    """Passes findings on, and counts."""

    tell: Tell
    sessions: int = 0
    layers: int = 0
    counts: dict[Severity, int] = field(default_factory=lambda: dict.fromkeys(Severity, 0))
    """Of findings, repaired ones included."""
    repaired: int = 0
    left: int = 0
    """Errors and warnings that were not repaired."""
    mended: int = 0
    """Errors and warnings that were."""

    def add(self, found: Found) -> None:
        """Take one finding."""
        self.counts[found.kind.severity] += found.number
        self.repaired += found.repaired
        self.left += found.left
        self.mended += found.repaired and found.kind.severity is not Severity.NOTE
        self.tell(found)


def check_layers(target: Target, report: Report, *, repair: bool) -> None:
    """Check one upper and workdir. Raises `Busy` when they are mounted, `Failed`."""
    allow_descriptors()
    try:
        check_layer(target, report, repair=repair)
    except OSError as error:
        raise failure(error) from error


def check_layer(
    target: Target,
    report: Report,
    *,
    repair: bool,
    session: str | None = None,
    layer: int | None = None,
) -> None:
    """Pass on what the overlay's checker finds. Raises OSError, as that does."""
    for one in checker.check(target, repair=repair):
        report.add(
            Found(
                kind=one.kind,
                path=one.path,
                place=one.place,
                session=session,
                layer=layer,
                detail=one.detail,
                number=one.number,
                repaired=one.repaired,
            )
        )
    report.layers += 1


def failure(error: OSError) -> SessiondError:
    """Return an error of the overlay's checker in words for people."""
    named = isinstance(error.filename, str | bytes)
    where = f"{os.fsdecode(error.filename)}: " if named else ""
    if error.errno == errno.EBUSY:
        return Busy(f"{where}{error.strerror}; unmount it, then try again.")
    return Failed(f"{where}{error.strerror or error}.")


def allow_descriptors() -> None:
    """Let this process have as many files open as it may: some hundred for each layer."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
