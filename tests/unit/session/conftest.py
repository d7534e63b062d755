from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sessiond.session.mounts import SystemMounts
from sessiond.session.space import Space
from tests.support.sessions import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """As sessiond's unit has it: what others are to read is given its mode by name."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture(autouse=True)
def roomy_disk() -> Iterator[None]:
    """Sessions of which no test says otherwise are on a disk that does not fill up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sessiond.session.session.measure", lambda _: Space(0, 100, 0, 0))
        yield


@pytest.fixture(autouse=True)
def no_unexpected_logs(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Fail a test in which something was logged, unless the test looks at the log itself."""
    caplog.set_level(logging.WARNING)
    yield
    if "expect_log" not in request.fixturenames:
        assert [record.getMessage() for record in caplog.get_records("call")] == []


@pytest.fixture
def expect_log(caplog: pytest.LogCaptureFixture) -> Callable[[str], None]:
    """Check that something of that kind was logged; other warnings are allowed in that test."""

    def check(text: str) -> None:
        messages = [record.getMessage() for record in caplog.records]
        assert any(text in message for message in messages), messages

    return check


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Path]:
    """A directory in which file systems may be mounted for real; nothing stays mounted there."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    yield tmp_path
    mounts = SystemMounts()
    for target in mounts.mounted_below(tmp_path):
        mounts.detach(target)
