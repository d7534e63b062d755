"""The users of this machine, as the system knows them."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import NamedTuple

from sessiond.config import NAME_LIMIT
from sessiond.errors import InvalidName
from sessiond.session.faults import quoted
from sessiond.session.model import SessionId, Uid


class Account(NamedTuple):
    """A user."""

    name: str
    uid: Uid


def find_account(user: str) -> Account:
    """Look `user` up, which may take a while where accounts come from the network.

    Raises `InvalidName` when there is no such user.
    """
    try:
        user.encode()
        found = pwd.getpwnam(user)
    except (KeyError, ValueError):  # ValueError: it holds NUL, or bytes that are not UTF-8
        raise InvalidName(
            f"There is no user {quoted(user)} on this machine; 'getent passwd' lists them."
        ) from None
    if "/" in found.pw_name or found.pw_name in {".", ".."}:
        raise InvalidName(f"The user name {quoted(found.pw_name)} cannot be part of a path.")
    return Account(found.pw_name, Uid(found.pw_uid))


def account_of(uid: Uid) -> Account | None:
    """Look up whose uid it is; None if nobody has it. Takes as long as `find_account`.

    Raises `InvalidName` for a name that cannot be used.
    """
    try:
        return find_account(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return None


def groups_of(account: Account) -> frozenset[str]:
    """Return the names of the groups that a user is in."""
    found = set()
    for gid in os.getgrouplist(account.name, pwd.getpwuid(account.uid).pw_gid):
        with suppress(KeyError):  # a gid that has no name
            found.add(grp.getgrgid(gid).gr_name)
    return frozenset(found)


def session_ids(account: Account) -> Iterator[SessionId]:
    """Yield ids for sessions of a user: ``alice-1``, ``alice-2`` and so on."""
    # Names like _apt or DOMAIN\\alice$ are allowed for users, and not for sessions.
    stem = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9_.-]", "", account.name) or f"uid{account.uid}"
    for number in count(1):
        suffix = f"-{number}"
        yield SessionId(stem[: NAME_LIMIT - len(suffix)] + suffix)
