"""Fixtures: a daemon with real sessions, and a desktop for the user of one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import trees
from tests.support.daemon import MANAGER, Daemon, own_daemon
from tests.support.desktop import CHECKOUT, USER, Desktop, own_desktop

# sessiond-reset runs in the distribution's Python; so do those of its modules that tests import.
sys.path.append("/usr/lib/python3/dist-packages")
with warnings.catch_warnings(), suppress(ImportError):
    warnings.simplefilter("ignore", ImportWarning)  # of how PyGObject imports
    from gi.repository import Gio, GLib, GObject  # noqa: F401

SCREENSHOTS = CHECKOUT / "build" / "screenshots"

IMAGE: trees.Tree = {
    "etc": {"motd": b"Welcome.\n"},
    "home": {USER: {".profile": b"umask 022\n"}},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those with a daemon mount file systems."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "daemon" in getattr(
            item, "fixturenames", ()
        ):
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root"))


@pytest.fixture(scope="module")
def one_daemon() -> Iterator[Daemon]:
    """A daemon for all tests of a module."""
    with own_daemon() as daemon:
        image = daemon.directory / "image"
        image.mkdir()
        trees.build(IMAGE, str(image))
        file = daemon.directory / "image.squashfs"
        subprocess.run(["mksquashfs", image, file, "-quiet", "-no-progress"], check=True)
        daemon.configure(
            {
                "profile.guest": {"image": str(image), "size": "16M"},
                "profile.kiosk": {"image": str(file), "storage": "persistent"},
            }
        )
        daemon.start()
        yield daemon


@pytest.fixture(scope="module")
def one_desktop(one_daemon: Daemon) -> Iterator[Desktop]:
    """A desktop for all tests of a module; its system bus is the daemon's."""
    directory = one_daemon.directory / "desktop"
    directory.mkdir(mode=0o755)
    with own_desktop(directory, SCREENSHOTS) as desktop:
        address = one_daemon.environment["DBUS_SYSTEM_BUS_ADDRESS"]
        desktop.environment["DBUS_SYSTEM_BUS_ADDRESS"] = address
        yield desktop


@pytest.fixture
def daemon(one_daemon: Daemon) -> Iterator[Daemon]:
    """The daemon, running and without sessions."""
    if not one_daemon.runs:
        one_daemon.start()
    yield one_daemon
    if not one_daemon.runs:
        one_daemon.start()
    for session in os.listdir(one_daemon.runtime / "sessions"):
        one_daemon.busctl("call", *MANAGER, "CloseSession", "sa{sv}", session, "0")


@pytest.fixture
def desktop(daemon: Daemon, one_desktop: Desktop) -> Iterator[Desktop]:
    """The desktop, on which no program of ours runs."""
    yield one_desktop
    one_desktop.end_programs()


def create(daemon: Daemon, user: str, session: str, profile: str = "guest") -> None:
    """Make a session."""
    arguments = ("ssa{sv}", user, profile, "1", "id", "s", session)
    daemon.busctl("call", *MANAGER, "CreateSession", *arguments)


@pytest.fixture
def home(daemon: Daemon) -> Path:
    """The user's home in a session of theirs, ``desk``, with some changes."""
    create(daemon, USER, "desk")
    root = daemon.root("desk")
    directory = root / "home" / USER
    (directory / "notes & <b>plans.txt").write_bytes(b"x" * 100_000)
    (directory / "draft.txt").write_bytes(b"x" * 2_000)
    (root / "etc/motd").write_text("Hello.\n")
    (directory / ".profile").unlink()
    return directory
