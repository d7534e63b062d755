"""Wherever a manager dies, the next one finds all in order; see `death`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.machine import CHECKOUT

each_operation = pytest.mark.parametrize(
    "operation",
    ["create", "close", "reset", "restore", "snapshot_and_reset", "partial_reset", "persist"],
)
each_profile = pytest.mark.parametrize("profile", ["volatile", "lasting"])


def deaths(module: str, *arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.unit.session.{module}", *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@each_operation
@each_profile
def test_death_at_some_changes(operation: str, profile: str) -> None:
    assert deaths("death", operation, profile, "7") >= 1


@pytest.mark.soak
@pytest.mark.timeout(300)
@each_operation
@each_profile
def test_death_at_every_change(operation: str, profile: str) -> None:
    # A session that is persistent already is only synced.
    assert deaths("death", operation, profile, "1") >= (
        4 if (operation, profile) == ("persist", "lasting") else 10
    )


root = pytest.mark.skipif(os.geteuid() != 0, reason="a maintenance is root's")


@root
def test_death_at_some_changes_of_a_maintenance() -> None:
    assert deaths("maintenance_death", "9") >= 4


@root
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_death_at_every_change_of_a_maintenance() -> None:
    assert deaths("maintenance_death", "1") >= 40


each_way = pytest.mark.parametrize("operation", ["create_guest", "remove_guest"])


@root
@each_way
def test_death_at_some_changes_of_guests(operation: str) -> None:
    assert deaths("guest_death", operation, "3") >= 4


@root
@pytest.mark.soak
@pytest.mark.timeout(300)
@each_way
def test_death_at_every_change_of_guests(operation: str) -> None:
    assert deaths("guest_death", operation, "1") >= 12
