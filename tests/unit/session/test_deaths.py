"""Wherever a manager dies, the next one finds all in order; see `death`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.machine import CHECKOUT

pytestmark = [
    pytest.mark.parametrize(
        "operation",
        ["create", "close", "reset", "restore", "snapshot_and_reset", "partial_reset", "persist"],
    ),
    pytest.mark.parametrize("profile", ["volatile", "lasting"]),
]


def deaths(operation: str, profile: str, step: int) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.session.death", operation, profile, str(step)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_death_at_some_changes(operation: str, profile: str) -> None:
    assert deaths(operation, profile, 7) >= 1


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_death_at_every_change(operation: str, profile: str) -> None:
    # A session that is persistent already is only synced.
    assert deaths(operation, profile, 1) >= (
        4 if (operation, profile) == ("persist", "lasting") else 10
    )
