"""What is said to people, without a display."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("gi", reason="the distribution's PyGObject is not there, or for another Python")

from sessiond.bus import names
from sessiond.cli.exit_codes import EXIT_CODES
from sessiond.desktop import phrases
from sessiond.desktop.daemon import Failure
from sessiond.desktop.now import exit_code
from sessiond.desktop.state import Changes, Job, Program, Session, of_user

CONTRACT = (Path(__file__).parents[2] / "docs/dbus.md").read_text()


def test_each_error_of_the_contract_has_a_sentence() -> None:
    table = CONTRACT.partition("## Errors")[2]
    documented = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert len(documented) > 15
    for error in documented:
        prefix = names.DBUS if error == "InteractiveAuthorizationRequired" else names.BUS
        name = f"{prefix}.Error.{error}"
        if error != "Failed":
            assert phrases.failure(name) != "It did not succeed.", error


def test_each_error_of_the_daemon_has_a_sentence_and_the_exit_code_of_sessionctl() -> None:
    for kind, name in names.ERRORS.items():
        assert name in phrases._FAILURES
        if kind.__name__ not in ("InvalidName", "InvalidOption", "Unreachable"):
            # Those are never told of a reset; and who is not there is told by the bus.
            assert exit_code(Failure(name, "")) == EXIT_CODES[kind], name
    assert exit_code(Failure(f"{names.DBUS}.Error.Spawn.ChildExited", "")) == 7
    assert exit_code(Failure("", "")) == 7
    assert exit_code(Failure("com.example.Error", "")) == 1


def test_unknown_errors_have_a_sentence() -> None:
    assert phrases.failure("com.example.Error") == "It did not succeed."
    assert "does not answer" in phrases.failure(f"{names.DBUS}.Error.Spawn.ChildExited")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (3600, "in 60 minutes"),
        (120, "in 2 minutes"),
        (91, "in 2 minutes"),
        (90, "in 90 seconds"),
        (44, "in 40 seconds"),
        (3, "in 10 seconds"),
        (-5, "in 10 seconds"),
    ],
)
def test_a_countdown_has_steps(seconds: float, told: str) -> None:
    assert phrases.remaining(seconds) == told


def test_changes_are_told_in_one_line() -> None:
    assert phrases.changes(Changes()) == "Nothing has been changed"
    assert phrases.changes(Changes(added=1, renamed=2)) == "1 added, 2 renamed"


def test_lines_of_the_list_of_differences() -> None:
    line = {"path": "/a", "kind": "renamed", "size": 0, "from": "/b\n"}
    assert phrases.difference(line) == "renamed from /b\N{REPLACEMENT CHARACTER}"
    added = {"path": "/a", "kind": "added", "size": 5}
    assert phrases.difference(added).startswith("new, 5")
    assert phrases.difference({"path": "/a", "kind": "of the future", "size": 0}) == "of the future"


def test_names_cannot_mislead() -> None:
    assert phrases.shown("a\u202eb\x1b[0m\udcff é 文") == "a�b�[0m� é 文"
    assert phrases.program(Program("a\nb", [1, 2], 0, "")) == "a�b (2 processes)"


def test_what_came_of_a_job() -> None:
    assert phrases.ended(Job("/j", operation="reset")) == "The session has been reset"
    cancelled = Job("/j", operation="reset", error_name=f"{names.BUS}.Error.Cancelled")
    assert phrases.ended(cancelled) == "Cancelled"
    failed = Job("/j", operation="restore", error_name=f"{names.BUS}.Error.NoSpace")
    assert phrases.ended(failed) == "The snapshot could not be restored"
    assert phrases.ended(Job("/j", operation="of the future")) == "Done"


def test_a_session_is_what_its_properties_say() -> None:
    told = Session.of("/s", {"Id": "desk", "Uid": 5, "LastReset": 7, "OfTheFuture": 1})
    assert (told.id, told.uid, told.last_reset, told.user) == ("desk", 5, 7, "")


def test_a_user_has_the_oldest_session_of_theirs() -> None:
    sessions = [
        Session("/a", uid=1, created_at=1),
        Session("/b", uid=2, created_at=3),
        Session("/c", uid=2, created_at=2),
    ]
    assert of_user(sessions, 2) == sessions[2]
    assert of_user(sessions, 3) is None
