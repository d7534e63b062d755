"""The Debian packages as `make deb` has built them, and a Debian 13 machine to install them on."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.debian import NoArchive, install, made_once, pack
from tests.support.machine import CHECKOUT, CannotBoot, Machine, booted

BUILT = CHECKOUT / "build/deb"
OURS = ("sessiond", "sessiond-cockpit", "sessiond-desktop")

_BASE = {"login", "passwd", "systemd-sysv", "libnss-systemd", "libpam-systemd", "polkitd", "procps"}
_CONTROL = "DEBIAN/control"
_MODULE = "usr/lib/python3/dist-packages/sessiond/__init__.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """None of these is for `make test`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.package)


class Packages(NamedTuple):
    """Two versions of all packages: files in a directory each."""

    present: list[Path]
    next: list[Path]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    built = sorted(BUILT.glob("*.deb"))
    assert len(built) == len(OURS), f"'make deb' puts {len(OURS)} packages into {BUILT}: {built}"
    directory = tmp_path_factory.mktemp("next")
    return Packages(built, [raised(package, directory) for package in built])


def raised(package: Path, directory: Path) -> Path:
    """Make the same package of a higher version, which its program tells, too."""
    tree, new = directory / package.stem, directory / package.name
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = (tree / _CONTROL).read_text()
    (tree / _CONTROL).write_text(re.sub(r"^(Version: .*)$", r"\1.0.1", control, flags=re.MULTILINE))
    module = tree / _MODULE
    if module.exists():
        module.write_text(re.sub(r'(__version__ = ".*)"', r'\1.0.1"', module.read_text()))
    subprocess.run(["dpkg-deb", "--build", tree, new], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return new


@pytest.fixture(scope="session")
def trixie(packages: Packages) -> Path:
    """A squashfs of Debian 13 with what the packages depend on; made once, and kept."""
    needed = sorted(_BASE | {name for package in packages.present for name in depends(package)})
    key = hashlib.sha256(" ".join(needed).encode()).hexdigest()[:16]
    try:
        return made_once(
            CHECKOUT / f"build/trixie-{key}.squashfs", lambda image: _make_squashfs(image, needed)
        )
    except NoArchive as error:
        pytest.fail(f"no Debian archive in reach: {error}")


def _make_squashfs(image: Path, packages: list[str]) -> None:
    archive = image.with_suffix(".tar")
    install(archive, ",".join(packages), release="trixie")
    pack(archive, image)
    archive.unlink()


def depends(package: Path) -> Iterator[str]:
    """Yield the packages that one depends on: of alternatives the first, and none of ours."""
    field = ["dpkg-deb", "--field", package, "Depends"]
    told = subprocess.run(field, check=True, capture_output=True, text=True).stdout
    for alternatives in told.strip().split(","):
        name = re.split(r"[ (|:]", alternatives.strip())[0]
        if name not in OURS:
            yield name


@pytest.fixture
def machine(trixie: Path, packages: Packages, tmp_path: Path) -> Iterator[Machine]:
    """A machine without sessiond and network; both versions of the packages are in /srv."""

    def bring(root: Path) -> None:
        for name, files in packages._asdict().items():
            (root / "srv" / name).mkdir()
            for file in files:
                shutil.copy(file, root / "srv" / name)

    try:
        with booted(trixie, tmp_path, bring) as machine:
            machine.run("useradd --create-home alice")
            yield machine
    except CannotBoot as error:
        pytest.fail(f"no machine can be started here: {error}")
