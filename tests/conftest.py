"""What concerns all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from sessiond.session.mounts import mount_for_oneself

# The same examples each time, however long the machine takes for one: `make soak` tries others.
settings.register_profile(
    "sessiond",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sessiond")


def pytest_configure(config: pytest.Config) -> None:
    """Let tests that run at the same time not share a mount namespace.

    A worker of one test, which begins in a copy of the namespace, would hold the disk of another
    for a moment after that has unmounted it.
    """
    if hasattr(config, "workerinput") and os.geteuid() == 0:
        mount_for_oneself()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what makes tests fail that run programs of this checkout as other users."""
    closed = [path for path in config.rootpath.parents if not path.stat().st_mode & 0o001]
    if closed and os.geteuid() == 0 and terminalreporter.stats.get("failed"):
        terminalreporter.write_line(
            f"Other users cannot get into {closed[-1]}, but some tests run programs of this "
            "checkout as other users: clone it to where everyone can, such as /srv."
        )
