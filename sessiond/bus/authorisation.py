"""Who may do what: root everything; others what polkit says, or, without one, what is their own.

Lists and properties are open to all and never come here; every other decision is made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sessiond.bus.audit import Attempt
from sessiond.bus.interface import Caller
from sessiond.bus.limits import ROOT
from sessiond.bus.polkit import Verdict
from sessiond.bus.wire import shown
from sessiond.errors import AuthorizationRequired, NotAuthorized
from sessiond.session.model import Uid

POLKIT_PREFIX = "org.sessiond.overlay1."


class Action(StrEnum):
    """What a caller wants to do; the values complete the sentence "you may not ...".

    Each has to be in packaging/polkit/org.sessiond.overlay1.policy; see `polkit_action`.
    """

    CREATE = "create sessions"
    MAINTAIN = "maintain images"
    GUESTS = "make and remove guests"
    LOG_IN = "open and end sessions of who logs in and out"
    RESET = "reset this session"
    SNAPSHOT = "take a snapshot of this session"
    RESTORE = "restore this session"
    EDIT_SNAPSHOT = "change or delete a snapshot of this session"
    PERSIST = "make this session persistent"
    REBASE = "rebase this session"
    COMMIT = "save files of this session for later ones"
    KEEP = "change what outlives resets of this session"
    CLOSE = "close this session"
    COMPARE = "see what has changed in this session"
    EXPORT = "export a snapshot of this session"
    IMPORT = "import a snapshot into this session"
    INHIBIT = "hold back resets of this session"
    LIST_CONFLICTS = "see which programs use this session"
    CANCEL = "cancel a job of this session"

    @property
    def id(self) -> str:
        """Its name for programs."""
        return self.name.lower().replace("_", "-")


class Target(Protocol):
    """A session, as far as permission depends on it."""

    @property
    def id(self) -> str: ...
    @property
    def user(self) -> str: ...
    @property
    def uid(self) -> Uid | None: ...
    @property
    def profile(self) -> str: ...


@dataclass(frozen=True, slots=True)
class NewSession:
    """The `Target` that is yet to be made, in the words of whoever asks for it, or has no owner."""

    id: str
    user: str
    profile: str
    uid: None = None


def apart_from_owner(session: Target) -> Target:
    """Return `session` as the target of what its owner may do no sooner than others."""
    return NewSession(session.id, session.user, session.profile)


def polkit_action(action: Action, target: Target | None, caller: Uid) -> str:
    """Return the name that polkit knows `action` by.

    polkit knows who calls, but not whose session it is: that is a part of the name.
    """
    if target is None or target.uid is None:
        return f"{POLKIT_PREFIX}{action.id}"
    return f"{POLKIT_PREFIX}{action.id}-{'own' if target.uid == caller else 'other'}"


async def authorise(caller: Caller, action: Action, target: Target | None = None) -> Uid:
    """Return the caller's uid when it may do `action` to `target`.

    It may take as long as a person takes to type a password; the session may be another one, or
    gone, after that. Raises `NotAuthorized`, `AuthorizationRequired`, or `BusError` when the caller
    has left the bus, or is being asked too much.
    """
    uid = Uid(await caller.uid())
    owner = None if target is None else target.uid
    caller.attempt = Attempt(
        uid,
        action.id,
        session="" if target is None else target.id,
        user="" if target is None else target.user,
        looks_only=action in (Action.COMPARE, Action.LIST_CONFLICTS) and uid in (ROOT, owner),
    )
    if uid == ROOT:
        return uid
    name = polkit_action(action, target, uid)
    match await caller.ask_polkit(name, _details(target)):
        case Verdict.YES:
            return uid
        case Verdict.ABSENT:
            if uid == owner:
                return uid
            others = "" if owner is None else f" and its owner, uid {owner},"
            raise NotAuthorized(f"As uid {uid} you may not {action}; only root{others} may.")
        case Verdict.NO:
            raise NotAuthorized(f"As uid {uid} you may not {action}; polkit refuses {name}.")
        case Verdict.AUTHENTICATE:
            raise AuthorizationRequired(
                f"As uid {uid} you may {action} after authentication only ({name}), and there is "
                "nobody to ask. Try it on a desktop or with sessionctl at a terminal, or as root."
            )
        case Verdict.UNKNOWN:
            raise NotAuthorized(
                f"As uid {uid} you may not {action}: polkit does not answer for {name}. See the "
                "log of sessiond, and whether its policy file is installed."
            )


def _details(target: Target | None) -> dict[str, str]:
    """Return what rules can look up, and messages name."""
    if target is None:
        return {}
    return {
        "session": shown(target.id),
        "user": shown(target.user),
        "profile": shown(target.profile),
    }
