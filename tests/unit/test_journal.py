"""What is logged, as the journal takes it."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.journal import Event, JournalHandler, event
from tests.support.journal import Journal

SOCKET = "journal"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / SOCKET)
    yield journal
    journal.close()


@pytest.fixture
def stderr() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(tmp_path: Path, stderr: io.StringIO) -> Iterator[logging.Logger]:
    """A logger that sends to the journal, if it is there."""
    handler = JournalHandler(tmp_path / SOCKET, logging.StreamHandler(stderr))
    log = logging.Logger("test")
    log.addHandler(handler)
    yield log
    handler.close()


def test_lines_have_their_priority_and_origin(journal: Journal, log: logging.Logger) -> None:
    log.warning("The %s is low.", "sun")
    fields = dict(journal.receive())
    assert fields["MESSAGE"] == b"The sun is low."
    assert fields["PRIORITY"] == b"4"
    assert fields["SYSLOG_IDENTIFIER"] == b"sessiond"
    assert fields["CODE_FILE"] == __file__.encode()
    assert fields["CODE_FUNC"] == b"test_lines_have_their_priority_and_origin"
    assert int(fields["CODE_LINE"]) > 0


def test_events_have_fields(journal: Journal, log: logging.Logger) -> None:
    facts = event(Event.JOB_ENDED, session="desk", caller_uid=0, error=None)
    log.info("It is done.", extra=facts)
    fields = dict(journal.receive())
    assert fields["MESSAGE_ID"] == Event.JOB_ENDED.value.encode()
    assert fields["SESSIOND_SESSION"] == b"desk"
    assert fields["SESSIOND_CALLER_UID"] == b"0"
    assert "SESSIOND_ERROR" not in fields


def test_no_value_makes_a_field(journal: Journal, log: logging.Logger) -> None:
    forged = "x\nSESSIOND_CALLER_UID=0\nPRIORITY\n\x01\0\0\0\0\0\0\0" + "0\n\udcff"
    log.info("%s", forged, extra=event(Event.REQUEST, session=forged))
    fields = journal.receive()
    names = [name for name, _ in fields]
    assert len(names) == len(set(names))
    assert "SESSIOND_CALLER_UID" not in names
    written = forged.encode(errors="backslashreplace")
    assert dict(fields)["SESSIOND_SESSION"] == dict(fields)["MESSAGE"] == written


def test_long_values_are_cut(journal: Journal, log: logging.Logger) -> None:
    log.info("x" * 1_000_000)
    assert dict(journal.receive())["MESSAGE"] == b"x" * (64 << 10)


def test_a_journal_that_is_away_is_not_missed(
    tmp_path: Path, log: logging.Logger, stderr: io.StringIO
) -> None:
    log.info("one")
    journal = Journal(tmp_path / SOCKET)
    log.info("two")
    assert dict(journal.receive())["MESSAGE"] == b"two"
    journal.close()
    log.info("three")
    assert stderr.getvalue() == "one\nthree\n"


def test_a_journal_that_hangs_holds_nobody_up(
    journal: Journal,
    log: logging.Logger,
    stderr: io.StringIO,
) -> None:
    (handler,) = log.handlers
    assert isinstance(handler, JournalHandler)
    handler._socket.settimeout(0)
    while not stderr.getvalue():
        log.info("x" * 10_000)


def test_children_write_to_stderr(
    journal: Journal, log: logging.Logger, stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    log.info("a worker's")
    assert stderr.getvalue() == "a worker's\n"


def test_events_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
    for kind in Event:
        assert f"`{kind.value}`" in text
