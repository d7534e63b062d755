"""A live system of Debian 13, with sessiond as its package has it, that really starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import machine as container
from tests.support.debian import NoArchive
from tests.support.live import live_system
from tests.support.machine import CannotBoot, Machine
from tests.support.virtual_machine import VirtualMachine, booted

CONFIGURATION = """\
[profile.guest]
image = "/srv/image"
size = "16M"
[profile.lasting]
image = "/srv/image"
storage = "persistent"
[session.kiosk]
user = "root"
profile = "guest"
[session.desk]
user = "alice"
profile = "lasting"
[profile.home]
image = "/home/{user}"
mount_point = "/home/{user}"
size = "16M"
[login.people]
profile = "home"
"""
# As a disk that /etc/fstab names is: it is there again after all file systems were unmounted.
_DISK_STAYS = "[Unit]\nDefaultDependencies=no\nConditionVirtualization=\n"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In `make test` are those in a container, where the system has been made."""
    for item in items:
        ours = Path(__file__).parent in item.path.parents
        if ours and "virtual" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.boot)


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualMachine]:
    """It in QEMU, for all tests of one file, which are about one life of it."""
    directory = tmp_path_factory.mktemp("machine")
    try:
        live = live_system()
    except NoArchive as error:
        pytest.fail(f"no Debian archive in reach: {error}")
    assert live is not None
    try:
        with booted(live.system, directory) as machine:
            yield machine
    except CannotBoot as error:
        pytest.fail(f"no machine can be started here: {error}")


@pytest.fixture
def contained(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """It in a container, with its kernel this machine's."""
    all_are_run = not request.config.option.markexpr
    live = live_system(make=all_are_run)
    if live is None:
        pytest.skip("'make boot-test' makes the system")

    def configure(root: Path) -> None:
        (root / "srv/image").mkdir()
        (root / "srv/image/motd").write_text("Welcome.\n")
        (root / "etc/sessiond/sessiond.conf.d/live.toml").write_text(CONFIGURATION)
        drop_in = root / "etc/systemd/system/var-lib-sessiond.mount.d/stays.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(_DISK_STAYS)

    try:
        with container.booted(live.root, tmp_path, configure) as machine:
            try:
                yield machine
            finally:
                print(machine.run("journalctl --quiet --no-pager --unit sessiond"))
    except CannotBoot as error:
        pytest.fail(f"no machine can be booted here: {error}")
