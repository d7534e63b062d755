"""Fixtures: the daemon over a small image, and over this machine's own root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import trees
from tests.support.daemon import Daemon, own_daemon
from tests.support.debian import NoArchive, install, made_once, suite

IMAGE: trees.Tree = {
    "etc": {"motd": b"Welcome.\n", "hosts": b"::1 localhost\n"},
    "home": {},
    "srv": {"data": {f"file{number}": b"x" * number for number in range(50)}},
}

_PACKAGES = "systemd-sysv,dbus,fuse3,libpam-systemd,polkitd,procps,python3"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these mount file systems."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root"))


@pytest.fixture
def idle_daemon() -> Iterator[Daemon]:
    """A daemon with four profiles, not started yet.

    ``guest`` and ``lasting`` are over a small directory, ``machine`` and ``cached`` over the
    machine's root.
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
                "profile.cached": {"image": "/", "size": "512M", "data_path": "cached"},
            }
        )
        yield daemon


@pytest.fixture
def daemon(idle_daemon: Daemon) -> Daemon:
    """The daemon, running."""
    idle_daemon.start()
    return idle_daemon


@pytest.fixture(scope="session")
def debian(request: pytest.FixtureRequest) -> Path:
    """A squashfs of a Debian root that can be booted; made once, and kept with pytest's cache."""
    image = Path(request.config.cache.mkdir("images")) / f"{suite()}-polkit.squashfs"
    try:
        return made_once(image, _make_squashfs)
    except NoArchive as error:
        pytest.skip(f"no Debian archive in reach: {error}")


def _make_squashfs(image: Path) -> None:
    archive = image.with_suffix(".tar")
    install(archive, _PACKAGES)
    with open(archive, "rb") as tar:
        # With file handles, as mksquashfs makes images: they keep hard links together.
        options = ["-quiet", "-no-progress", "-exports", "-root-mode", "755"]
        pack = ["sqfstar", *options, str(image)]
        subprocess.run(pack, stdin=tar, check=True, capture_output=True)
    archive.unlink()
