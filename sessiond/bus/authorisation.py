"""Who may do what: root everything, owners what concerns their own sessions, others nothing.

Lists and properties are open to all and never come here; every other decision is made here.
"""

from __future__ import annotations

from enum import StrEnum

from sessiond.bus.interface import Caller
from sessiond.bus.limits import ROOT
from sessiond.errors import NotAuthorized
from sessiond.session.model import Uid


class Action(StrEnum):
    """What a caller wants to do; the values complete the sentence "you may not ..."."""

    CREATE = "create sessions"
    RESET = "reset this session"
    SNAPSHOT = "take a snapshot of this session"
    RESTORE = "restore this session"
    EDIT_SNAPSHOT = "change or delete a snapshot of this session"
    PERSIST = "make this session persistent"
    CLOSE = "close this session"
    COMPARE = "see what has changed in this session"
    CANCEL = "cancel a job of this session"


async def authorise(caller: Caller, action: Action, owner: Uid | None = None) -> Uid:
    """Return the caller's uid when it may do `action` to a session of `owner`, if there is one yet.

    Raises `NotAuthorized`, or `BusError` when the caller has left the bus.
    """
    uid = await caller.uid()
    if uid in (ROOT, owner):
        return Uid(uid)
    others = "" if owner is None else f" and its owner, uid {owner},"
    raise NotAuthorized(f"As uid {uid} you may not {action}; only root{others} may.")
