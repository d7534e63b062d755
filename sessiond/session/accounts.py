"""The users of this machine, as the system knows them."""

from __future__ import annotations

import pwd
import re
from collections.abc import Iterator
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


def session_ids(account: Account) -> Iterator[SessionId]:
    """Yield ids for sessions of a user: ``alice-1``, ``alice-2`` and so on."""
    # Names like _apt or DOMAIN\\alice$ are allowed for users, and not for sessions.
    stem = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9_.-]", "", account.name) or f"uid{account.uid}"
    for number in count(1):
        suffix = f"-{number}"
        yield SessionId(stem[: NAME_LIMIT - len(suffix)] + suffix)
