"""Names, records, jobs' small parts."""

from __future__ import annotations

import os
import pwd

import pytest

from sessiond.errors import Failed, InvalidName, NoSpace
from sessiond.session.accounts import Account, find_account, session_ids
from sessiond.session.faults import explained, quoted
from sessiond.session.model import Uid, session_id


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "x" * 64])
def test_good_ids(name: str) -> None:
    assert session_id(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "a\0", "a\n", "ä", "x" * 65])
def test_bad_ids(name: str) -> None:
    with pytest.raises(InvalidName):
        session_id(name)


def test_accounts() -> None:
    own = pwd.getpwuid(os.getuid())
    assert find_account(own.pw_name) == Account(own.pw_name, Uid(own.pw_uid))
    with pytest.raises(InvalidName, match="getent passwd"):
        find_account("no such user")


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("alice", "alice-1"),
        ("_apt", "apt-1"),
        ("DOMAIN\\bob$", "DOMAINbob-1"),
        ("ä", "uid7-1"),
        ("x" * 80, "x" * 62 + "-1"),
    ],
)
def test_ids_made_of_user_names_are_valid(user: str, expected: str) -> None:
    made = next(session_ids(Account(user, Uid(7))))
    assert made == expected
    assert session_id(made) == made


def test_errors_become_sentences() -> None:
    full = OSError(28, "No space left on device", "/f")
    with (
        pytest.raises(NoSpace, match=r"^Could not do it: no space is left \(/f\); delete"),
        explained("do it"),
    ):
        raise full
    with (
        pytest.raises(Failed, match=r"^Could not do it: Input/output error\.$"),
        explained("do it"),
    ):
        raise OSError(5, "Input/output error")
    assert quoted("x\n") == "'x\\n'"
    assert len(quoted("x" * 1000)) < 80
