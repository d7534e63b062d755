"""What desktops are told of the program, as it is installed."""

from __future__ import annotations

import os
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.support.desktop import CHECKOUT

pytestmark = pytest.mark.skipif(
    not Path("/usr/bin/desktop-file-validate").exists(), reason="takes desktop-file-utils"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root that it is installed into."""
    root = tmp_path_factory.mktemp("root")
    subprocess.run(
        [CHECKOUT / "packaging/install-files", "desktop"],
        check=True,
        env=os.environ | {"DESTDIR": str(root), "PREFIX": "/usr", "PACKAGES": str(CHECKOUT)},
    )
    return root


def entry(file: Path) -> dict[str, str]:
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(file)
    return dict(parser["Desktop Entry"])


def test_the_menu_entry(installed: Path) -> None:
    file = installed / "usr/share/applications/org.sessiond.Reset.desktop"
    subprocess.run(["desktop-file-validate", file], check=True)
    told = entry(file)
    assert told["Name[de]"] == "Sitzung zurücksetzen"
    for language in ("de", "es", "fr", "zh_CN"):
        for key in ("Name", "GenericName", "Comment", "Keywords"):
            assert f"{key}[{language}]" in told


def test_what_is_started_at_login(installed: Path) -> None:
    file = installed / "etc/xdg/autostart/org.sessiond.Reset.Watch.desktop"
    subprocess.run(["desktop-file-validate", file], check=True)
    assert entry(file)["Exec"] == "sessiond-reset --watch"


def test_the_software_centre(installed: Path) -> None:
    file = installed / "usr/share/metainfo/org.sessiond.Reset.metainfo.xml"
    validate = ["appstreamcli", "validate", "--no-net", "--no-color", file]
    told = subprocess.run(validate, stdout=subprocess.PIPE, text=True).stdout
    complaints = [line for line in told.splitlines() if line.startswith(("E:", "W:"))]
    # There is no homepage; newer versions complain about that.
    assert [line for line in complaints if "url-homepage-missing" not in line] == []
    assert '<name xml:lang="fr">Réinitialiser la session</name>' in file.read_text()


def test_the_program_and_its_icons(installed: Path) -> None:
    program = installed / "usr/bin/sessiond-reset"
    told = subprocess.run(
        [program, "--version"], check=True, capture_output=True, text=True, env={}
    ).stdout
    assert told.strip()
    icons = installed / "usr/share/icons/hicolor"
    assert (icons / "scalable/apps/org.sessiond.Reset.svg").exists()
    assert (icons / "symbolic/apps/org.sessiond.Reset-symbolic.svg").exists()
