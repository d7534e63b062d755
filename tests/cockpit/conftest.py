"""Fixtures: the page in a browser, on the real daemon."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import trees
from tests.support.browser import Browser, start_browser
from tests.support.cockpit import install_page, start_cockpit
from tests.support.daemon import MANAGER, Daemon, own_daemon

SCREENSHOTS = Path(__file__).parents[2] / "build/screenshots"

IMAGE: trees.Tree = {
    "etc": {"motd": b"Welcome.\n"},
    **{name: {} for name in ("dev", "home", "proc", "root", "run", "sys")},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these mount file systems."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root"))


@pytest.fixture(scope="module")
def one_daemon() -> Iterator[Daemon]:
    """A daemon with the page in its directory, below ``data``.

    The profile ``guest`` is over an image file, and ``machine`` over the machine's root.
    """
    with own_daemon() as daemon:
        content, image = daemon.directory / "content", daemon.directory / "image.squashfs"
        content.mkdir()
        trees.build(IMAGE, str(content))
        subprocess.run(["mksquashfs", content, image, "-quiet", "-no-progress"], check=True)
        daemon.configure(
            {
                "profile.guest": {"image": str(image), "size": "64M"},
                "profile.machine": {"image": "/", "size": "512M"},
            }
        )
        install_page(daemon.directory / "data")
        daemon.start()
        yield daemon


@pytest.fixture
def daemon(one_daemon: Daemon) -> Iterator[Daemon]:
    """The same, with no sessions before and after a test."""
    yield one_daemon
    listed = json.loads(one_daemon.busctl("--json=short", "call", *MANAGER, "ListSessions"))
    for session, *_ in listed["data"][0]:
        one_daemon.busctl("call", *MANAGER, "CloseSession", "sa{sv}", session, "0")


@pytest.fixture
def page(daemon: Daemon) -> Iterator[str]:
    """The address of the page, for root."""
    # Without a login it serves one visit only.
    with start_cockpit(daemon.directory / "data", daemon.environment) as address:
        yield address


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


@pytest.fixture
def browser(one_browser: Browser) -> Iterator[Browser]:
    """A browser, in which the scripts of the page go without a complaint."""
    one_browser.begin_anew()
    yield one_browser
    assert one_browser.complaints == []


@pytest.fixture
def keep_screenshot(browser: Browser) -> Callable[[str], None]:
    """Take a picture of the page, for people to look at."""

    def take(name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        browser.screenshot(SCREENSHOTS / f"cockpit-{name}.png")

    return take
