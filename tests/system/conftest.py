"""Fixtures: the daemon over a small image, and over this machine's own root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import trees
from tests.support.daemon import Daemon, own_daemon

IMAGE: trees.Tree = {
    "etc": {"motd": b"Welcome.\n", "hosts": b"::1 localhost\n"},
    "home": {},
    "srv": {"data": {f"file{number}": b"x" * number for number in range(50)}},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these mount file systems."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root"))


@pytest.fixture
def idle_daemon() -> Iterator[Daemon]:
    """A daemon with three profiles, not started yet.

    ``guest`` and ``lasting`` are over a small directory, ``machine`` is over the machine's root.
    """
    with own_daemon() as daemon:
        image = daemon.directory / "image"
        image.mkdir()
        trees.build(IMAGE, str(image))
        daemon.configure(
            {
                "profile.guest": {"image": str(image), "size": "64M"},
                "profile.lasting": {"image": str(image), "storage": "persistent"},
                "profile.machine": {"image": "/", "size": "512M"},
            }
        )
        yield daemon


@pytest.fixture
def daemon(idle_daemon: Daemon) -> Daemon:
    """The daemon, running."""
    idle_daemon.start()
    return idle_daemon
