"""What the checker can find in an upper and its workdir: kinds, how bad each is, and what a repair
does.

The words follow the kernel's documentation of overlayfs, and fsck.overlay where that has one.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import NamedTuple


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The merged view lacks something or cannot be mounted."""
    WARNING = "warning"
    """The merged view is whole, but not what was meant, or the kernel would show another one."""
    NOTE = "note"
    """Harmless. A crash leaves nothing worse."""


class Place(StrEnum):
    """Which tree a path is in."""

    UPPER = "upper"
    WORKDIR = "workdir"


class Description(NamedTuple):
    """What there is to be said of a kind."""

    id: str
    """For programs; it never changes."""
    severity: Severity
    meaning: str
    """A sentence for people."""
    repair: str = ""
    """What a repair gets it, as a participle; empty where it does nothing."""


class FindingKind(Enum):
    """What can be wrong; the values are `Description`."""

    @property
    def description(self) -> Description:
        value = self.value
        assert isinstance(value, Description)
        return value

    @property
    def id(self) -> str:
        return self.description.id

    @property
    def severity(self) -> Severity:
        return self.description.severity


_E, _W, _N = Severity


class Kind(FindingKind):
    """What can be wrong. No repair changes what the merged view shows."""

    UNREADABLE = Description("unreadable", _E, "It cannot be read, or an attribute of it.")
    REDIRECT_MALFORMED = Description(
        "redirect-malformed",
        _E,
        "Its redirect is neither a name nor an absolute path, so it cannot be opened.",
    )
    REDIRECT_DANGLING = Description(
        "redirect-dangling",
        _E,
        "The directory was renamed, and the lowers do not have what it was: entries are missing.",
    )
    METACOPY_WITHOUT_DATA = Description(
        "metacopy-without-data",
        _E,
        "Only the file's metadata was copied up, and no lower has its contents.",
    )
    METACOPY_MALFORMED = Description(
        "metacopy-malformed",
        _E,
        "Its metacopy attribute makes no sense, so the kernel refuses to open the file.",
    )
    INDEX_MISMATCH = Description(
        "index-mismatch", _E, "The index has another file under this name than the name says."
    )
    VOLATILE = Description(
        "volatile",
        _E,
        "The upper was mounted as volatile and not unmounted: it may lack data, and is not mounted "
        "again until this directory is removed.",
    )
    INCOMPATIBLE = Description(
        "incompatible",
        _E,
        "The upper uses a feature of overlayfs that is unknown here.",
    )
    WORKDIR_BLOCKED = Description(
        "workdir-blocked", _E, "This has to be a directory, or nothing can be mounted."
    )
    REDIRECT_DUPLICATE = Description(
        "redirect-duplicate",
        _W,
        "Another directory stands for the same directory of the lowers: its entries show twice.",
    )
    REDIRECT_ORIGIN_SHOWN = Description(
        "redirect-origin-shown",
        _W,
        "The directory was renamed, but also shows under its old name.",
    )
    WHITEOUT_IGNORED = Description(
        "whiteout-ignored",
        _W,
        "It is marked as a whiteout, but its directory is not marked as one that has such files: "
        "it shows as a file.",
    )
    OPAQUE_ON_FILE = Description(
        "opaque-on-file", _W, "Only a directory can be opaque.", "freed of the attribute"
    )
    ATTRIBUTE_MALFORMED = Description(
        "attribute-malformed", _W, "An attribute of overlayfs has a value that makes no sense."
    )
    ATTRIBUTE_UNKNOWN = Description(
        "attribute-unknown", _W, "It has an attribute of overlayfs that is unknown here."
    )
    ORIGIN_MALFORMED = Description(
        "origin-malformed",
        _W,
        "What it was copied up from is noted in no known form.",
        "noted as of unknown origin",
    )
    ORIGIN_WRONG_TYPE = Description(
        "origin-wrong-type",
        _W,
        "It is not of the type of what it was copied up from, so its inode number may be wrong.",
    )
    IMPURE_MISSING = Description(
        "impure-missing",
        _W,
        "The directory has entries that were copied up, and is not marked so: the kernel would "
        "list wrong inode numbers.",
        "marked",
    )
    INDEX_NAME_MALFORMED = Description(
        "index-name-malformed",
        _W,
        "It is no name of an index entry: the kernel refuses to mount the upper with index=on.",
    )
    INDEX_LINK_COUNT = Description(
        "index-link-count", _W, "The number of its hard links cannot be right."
    )
    FOREIGN_BRANCH = Description(
        "foreign-branch",
        _W,
        "The upper seems to be written by aufs, or unpacked from a container image: marks in that "
        "form mean nothing here.",
    )
    MOUNT_POINT = Description(
        "mount-point", _W, "Something is mounted here; it was not looked into."
    )
    WHITEOUT_OVER_NOTHING = Description(
        "whiteout-over-nothing", _N, "It hides nothing: no lower has this name.", "removed"
    )
    WHITEOUT_IN_OPAQUE = Description(
        "whiteout-in-opaque",
        _N,
        "It hides nothing: its directory, or one above, is opaque.",
        "removed",
    )
    ORIGIN_GONE = Description(
        "origin-gone",
        _N,
        "What it was copied up from is not in the lowers any more: its inode number is another.",
    )
    FOREIGN_MARKS = Description(
        "foreign-marks",
        _N,
        "It has a mark of another kind of overlay, which means nothing here.",
    )
    INDEX_ORPHAN = Description(
        "index-orphan",
        _N,
        "The file's last name was removed before its entry in the index was.",
        "removed",
    )
    INDEX_FOR_NFS = Description(
        "index-for-nfs", _N, "The kernel wrote it to export the view by NFS; it is not used."
    )
    WORKDIR_LEFTOVER = Description(
        "workdir-leftover",
        _N,
        "It was left by a crash, or by the kernel.",
        "removed",
    )
    WORKDIR_FOREIGN = Description("workdir-foreign", _N, "It is not overlayfs's.")


class Finding(NamedTuple):
    """One thing found."""

    kind: Kind
    place: Place
    path: bytes
    """From the root of that tree, which itself is ``.``."""
    detail: str = ""
    """More than the kind's meaning, in a few words."""
    number: int = 1
    """How many there are of a kind that is told once; `path` is the first."""
    repaired: bool = False
