"""What concerns all tests."""

from __future__ import annotations

import os

import pytest

from sessiond.session.mounts import mount_for_oneself


def pytest_configure(config: pytest.Config) -> None:
    """Let tests that run at the same time not share a mount namespace.

    A worker of one test, which begins in a copy of the namespace, would hold the disk of another
    for a moment after that has unmounted it.
    """
    if hasattr(config, "workerinput") and os.geteuid() == 0:
        mount_for_oneself()
