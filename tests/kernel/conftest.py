"""A virtual machine with the kernel of Debian, for what depends on that, or on a real start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.debian import NoArchive
from tests.support.machine import CannotBoot
from tests.support.virtual_machine import System, VirtualMachine, booted, debian_disk


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """None of these is for `make test`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="session")
def system(request: pytest.FixtureRequest) -> System:
    """Debian's disk and kernel; made once, and kept with pytest's cache."""
    try:
        return debian_disk(Path(request.config.cache.mkdir("images")))
    except NoArchive as error:
        pytest.fail(f"no Debian archive in reach: {error}")


@pytest.fixture(scope="module")
def machine(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualMachine]:
    """The machine, for all tests of one file."""
    try:
        with booted(system, tmp_path_factory.mktemp("machine")) as machine:
            yield machine
    except CannotBoot as error:
        pytest.fail(f"no machine can be started here: {error}")
