"""Fixtures: the daemon over a small image, and over this machine's own root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import trees
from tests.support.daemon import Daemon, own_daemon
from tests.support.debian import NoArchive, install, made_once, pack, suite

IMAGE: trees.Tree = {
    "etc": {"motd": b"Welcome.\n", "hosts": b"::1 localhost\n"},
    "home": {},
    "srv": {"data": {f"file{number}": b"x" * number for number in range(50)}},
}

_PACKAGES = (
    "systemd-sysv,dbus,fuse3,libnss-systemd,libpam-systemd,polkitd,procps,python3,openssh-server,"
    "pamtester"
)
_STACKS_OF_LIGHTDM = """
chroot "$1" sh -euc 'cd /tmp; apt-get download lightdm; dpkg --fsys-tarfile *.deb >files.tar'
tar -x -C "$1" -f "$1/tmp/files.tar" ./etc/pam.d
rm "$1"/tmp/*
"""
"""How a display manager lets people in, without all that it would bring along."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these mount file systems, and some of them wait until a Debian is downloaded."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root"))
            if "debian" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.timeout(900))


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
    image = Path(request.config.cache.mkdir("images")) / f"{suite()}-seats.squashfs"
    try:
        return made_once(image, _make_squashfs)
    except NoArchive as error:
        pytest.skip(f"no Debian archive in reach: {error}")


def _make_squashfs(image: Path) -> None:
    archive = image.with_suffix(".tar")
    install(archive, _PACKAGES, f"--customize-hook={_STACKS_OF_LIGHTDM}")
    pack(archive, image)
    archive.unlink()
