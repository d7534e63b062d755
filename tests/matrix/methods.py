"""Every method of the D-Bus interfaces: how it is called, and what is to come of it in bad moments.

The tests beside this module call each of them on a full disk, during each operation, in each state
of a session, as each kind of caller, and from a session that does its worst. A method without an
entry here fails `test_each_method_is_here`; one that has an entry is tried in all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from sessiond.bus.interface import Interface
from sessiond.bus.objects import JobObject, ManagerObject, SessionObject, SnapshotObject
from sessiond.bus.wire import Variant
from tests.matrix.stage import DONE, Stage

INTERFACES: tuple[type[Interface], ...] = (
    ManagerObject,
    SessionObject,
    SnapshotObject,
    JobObject,
)


class By(Enum):
    """Who may call a method, where there is no polkit."""

    ANYONE = auto()
    OWNER = auto()
    ROOT = auto()


class Meanwhile(Enum):
    """What becomes of a call while something is done to the session."""

    REFUSED = auto()
    """With `Busy`, which names the job."""
    AT_ONCE = auto()
    """It is carried out, and what goes on goes on."""
    ENDS_IT = auto()
    """It is carried out once what goes on has been ended for it."""


class Full(Enum):
    """Where no space is left."""

    UPPER = auto()
    """In the tmpfs of a session."""
    RUN = auto()
    """Where the records of volatile sessions are; the session is one."""
    STATE = auto()
    """On the disk; the session is volatile."""
    DISK = auto()
    """On the disk, and the session is there."""


Arguments = Callable[[Stage], Sequence[object]]
Shortage = dict[tuple[Full, str], str]


@dataclass(frozen=True)
class Entry:
    """A method, and what is to be expected of it."""

    interface: type[Interface]
    name: str
    by: By = By.OWNER
    arguments: Arguments = lambda _: ({},)
    meanwhile: Meanwhile = Meanwhile.REFUSED
    maintenance: bool = False
    """It is about the session of a maintenance, and is tried with one."""
    before: Entry | None = None
    """What is called first, and has to do what it does."""
    full: Shortage = field(default_factory=dict)
    """What comes of it where no bytes or no inodes are left; `DONE` where it is not said."""
    unmounted: str = DONE
    """What comes of it while the session is not mounted, and cannot be."""
    mounts: bool = False
    """It mounts a session that is not mounted, if that can be."""
    closing: str = "NoSuchSession"
    """What comes of it once the session is about to end."""
    harmless: bool = False
    """With polkit, the owner needs no password for it, from wherever they call."""
    replaces: bool = False
    """What is in the merged view is not, after it."""
    keeps: bool = False
    """It is about what outlives resets, as nothing does of the session of a maintenance."""
    closes: bool = False
    """There is no session after it."""
    lives: Sequence[str] = ()
    """Those in `tests.crash.lives` that do it, and die; none if it changes nothing on a disk."""

    def __str__(self) -> str:
        return f"{self.interface.__name__.removesuffix('Object')}.{self.name}"


def no_space(*where: Full, without: Sequence[tuple[Full, str]] = ()) -> Shortage:
    """Return that there is no space for it there, but for what it can do `without`."""
    everywhere = [(place, what) for place in where for what in ("bytes", "inodes")]
    return {one: "NoSpace" for one in everywhere if one not in without}


def _string(text: str) -> Variant:
    return Variant("s", text)


_NONE: Arguments = lambda _: ()  # noqa: E731
_NEW_LAYER = no_space(Full.UPPER, Full.DISK, without=[(Full.UPPER, "bytes")])
"""A directory of a tmpfs takes an inode only."""
_NEW_IMAGE = no_space(Full.STATE, Full.DISK, Full.RUN, without=[(Full.RUN, "bytes")])
"""The same for the directory that an image is mounted at."""

_SCHEDULE = Entry(
    SessionObject,
    "ScheduleReset",
    arguments=lambda _: (0, {"in": Variant("u", 3600)}),
    lives=("schedule_reset",),
)
_COMMIT = Entry(
    SessionObject,
    "Commit",
    arguments=lambda _: (["/mine"], {}),
    full=no_space(Full.STATE, Full.DISK),
    unmounted="Failed",
    keeps=True,
    lives=("commit",),
)
_RESET = Entry(
    SessionObject,
    "Reset",
    unmounted="Failed",
    mounts=True,
    replaces=True,
    lives=("reset",),
)
_SNAPSHOT = Entry(
    SessionObject,
    "Snapshot",
    arguments=lambda _: ("second", {"description": _string("x"), "pinned": Variant("b", True)}),
    full=_NEW_LAYER,
    unmounted="Failed",
    mounts=True,
    lives=("snapshot",),
)
_PERSIST = Entry(
    SessionObject,
    "Persist",
    full=no_space(Full.STATE) | {(Full.UPPER, "inodes"): "NoSpace"},
    unmounted="Failed",
    mounts=True,
    lives=("persist",),
)
_CLOSE = Entry(SessionObject, "Close", meanwhile=Meanwhile.ENDS_IT, closes=True, lives=("close",))


_FIRST = Entry(SessionObject, "Snapshot", arguments=lambda stage: (stage.snapshot, {}))


async def prepare(stage: Stage, entry: Entry) -> None:
    """Have what `entry` needs, as far as the caller may, and it is not there."""
    if entry.interface is SnapshotObject or entry.name == "Restore":
        await stage.outcome(_FIRST)
    if entry.before is not None:
        await stage.outcome(entry.before)


def _by_id(name: str, entry: Entry) -> Entry:
    """Return the manager's method that does to a session what that one of its own does."""
    values = vars(entry) | {
        "interface": ManagerObject,
        "name": name,
        "arguments": lambda stage: (stage.session, *entry.arguments(stage)),
    }
    return Entry(**values)


def _looks(
    name: str,
    arguments: Arguments = lambda _: ({},),
    *,
    unmounted: str = "Failed",
    closing: str = "NoSuchSession",
) -> Entry:
    return Entry(
        SessionObject,
        name,
        arguments=arguments,
        meanwhile=Meanwhile.AT_ONCE,
        unmounted=unmounted,
        closing=closing,
        harmless=True,
    )


_GUEST = Entry(
    ManagerObject,
    "CreateGuest",
    By.ROOT,
    _NONE,
    meanwhile=Meanwhile.AT_ONCE,
    full=no_space(Full.STATE, Full.DISK),
    closing=DONE,
    lives=("create_guest",),
)

METHODS = (
    Entry(
        ManagerObject,
        "CreateSession",
        By.ROOT,
        lambda stage: (stage.user, stage.profile, {"id": _string("new")}),
        meanwhile=Meanwhile.AT_ONCE,
        full=no_space(Full.RUN, Full.DISK),
        closing=DONE,
        lives=("create_volatile", "create_lasting"),
    ),
    Entry(
        ManagerObject,
        "GetSession",
        By.ANYONE,
        lambda stage: (stage.session,),
        meanwhile=Meanwhile.AT_ONCE,
        closing=DONE,
    ),
    Entry(
        ManagerObject,
        "GetSessionByUser",
        By.ANYONE,
        lambda stage: (stage.uid,),
        meanwhile=Meanwhile.AT_ONCE,
        closing=DONE,
    ),
    Entry(
        ManagerObject, "ListSessions", By.ANYONE, _NONE, meanwhile=Meanwhile.AT_ONCE, closing=DONE
    ),
    _by_id("ResetSession", _RESET),
    _by_id("SnapshotSession", _SNAPSHOT),
    _by_id("PersistSession", _PERSIST),
    _by_id("CloseSession", _CLOSE),
    Entry(
        ManagerObject,
        "Login",
        By.ROOT,
        lambda stage: (stage.uid, 0),
        meanwhile=Meanwhile.AT_ONCE,
        closing=DONE,
    ),
    Entry(
        ManagerObject,
        "Logout",
        By.ROOT,
        lambda stage: (stage.uid,),
        meanwhile=Meanwhile.AT_ONCE,
        closing=DONE,
    ),
    Entry(
        ManagerObject,
        "BeginMaintenance",
        By.ROOT,
        lambda _: ("packed", "Back at noon.", {}),
        meanwhile=Meanwhile.AT_ONCE,
        full=_NEW_IMAGE,
        closing=DONE,
        lives=("begin_maintenance",),
    ),
    Entry(
        ManagerObject,
        "FinishMaintenance",
        By.ROOT,
        maintenance=True,
        full=_NEW_IMAGE,
        closes=True,
        lives=("finish_maintenance",),
    ),
    Entry(
        ManagerObject,
        "CancelMaintenance",
        By.ROOT,
        maintenance=True,
        meanwhile=Meanwhile.ENDS_IT,
        closes=True,
        lives=("cancel_maintenance",),
    ),
    _GUEST,
    Entry(
        ManagerObject,
        "RemoveGuest",
        By.ROOT,
        lambda stage: (stage.guest,),
        meanwhile=Meanwhile.AT_ONCE,
        before=_GUEST,
        closing=DONE,
        lives=("remove_guest",),
    ),
    _RESET,
    _SCHEDULE,
    Entry(
        SessionObject,
        "CancelScheduledReset",
        arguments=_NONE,
        before=_SCHEDULE,
        lives=("cancel_scheduled_reset",),
    ),
    Entry(
        SessionObject,
        "Inhibit",
        arguments=lambda _: ("Player", "A film"),
        meanwhile=Meanwhile.AT_ONCE,
        harmless=True,
    ),
    _looks("Conflicts", arguments=_NONE),
    _SNAPSHOT,
    Entry(
        SessionObject,
        "Restore",
        arguments=lambda stage: (stage.snapshot, {}),
        full=_NEW_LAYER,
        unmounted="Failed",
        mounts=True,
        replaces=True,
        lives=("restore",),
    ),
    _PERSIST,
    Entry(
        SessionObject,
        "Rebase",
        arguments=lambda _: ({"remount": Variant("b", True)},),
        unmounted="Failed",
        mounts=True,
        lives=("rebase",),
    ),
    _COMMIT,
    Entry(
        SessionObject,
        "Uncommit",
        arguments=lambda _: (["/mine"], {"delete": Variant("b", True)}),
        before=_COMMIT,
        keeps=True,
        lives=("uncommit",),
    ),
    Entry(
        SessionObject,
        "SetKeep",
        By.ROOT,
        lambda _: (["/home/*/notes"], {}),
        keeps=True,
        lives=("set_keep",),
    ),
    _CLOSE,
    Entry(
        SessionObject,
        "Import",
        By.ROOT,
        lambda stage: (stage.archive(), "imported", {}),
        meanwhile=Meanwhile.AT_ONCE,
        full=no_space(Full.UPPER, Full.DISK),
        lives=("import_snapshot",),
    ),
    _looks("Changes"),
    _looks("OpenDiff", closing="Failed"),
    _looks("PendingFiles", unmounted=DONE, closing=DONE),
    _looks("Committed", unmounted=DONE),
    _looks("OpenShadowed", unmounted=DONE, closing=DONE),
    Entry(SnapshotObject, "Delete", arguments=_NONE, lives=("delete_snapshot",)),
    Entry(SnapshotObject, "Rename", arguments=lambda _: ("stale",), lives=("rename_snapshot",)),
    Entry(
        SnapshotObject, "Describe", arguments=lambda _: ("as it was",), lives=("describe_snapshot",)
    ),
    Entry(SnapshotObject, "Pin", arguments=lambda _: (True,), lives=("pin_snapshot",)),
    Entry(
        SnapshotObject,
        "Export",
        By.ROOT,
        lambda stage: (stage.drain(), {}),
        meanwhile=Meanwhile.AT_ONCE,
    ),
    Entry(
        JobObject,
        "Cancel",
        arguments=_NONE,
        meanwhile=Meanwhile.AT_ONCE,
        before=_RESET,
        closing=DONE,
        harmless=True,
    ),
)
