"""The files that are installed beside the program."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sessiond import config
from sessiond.bus import names
from sessiond.bus.authorisation import POLKIT_PREFIX, Action

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "units").iterdir())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    # The unit names the program without a directory; systemd looks for it where it gets installed.
    copy = tmp_path / unit.name
    installed = Path(sys.executable).parent
    copy.write_text(unit.read_text().replace("ExecStart=", f"ExecStart={installed}/"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy],
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )
    # systemd before 254 warns of this one, and goes on without it.
    unknown = "Unknown key 'FileDescriptorStorePreserve'"
    said = [line for line in done.stderr.splitlines() if unknown not in line]
    assert (done.returncode, done.stdout, said) == (0, "", [])


def test_the_bus_starts_the_unit() -> None:
    activation = configparser.ConfigParser(interpolation=None)
    activation.read(ROOT / "packaging/dbus/org.sessiond.Overlay1.service")
    assert activation["D-BUS Service"]["Name"] == names.BUS
    assert activation["D-BUS Service"]["SystemdService"] in [unit.name for unit in UNITS]


POLKIT = {
    action.attrib["id"].removeprefix(POLKIT_PREFIX): action
    for action in ElementTree.parse(ROOT / "packaging/polkit/org.sessiond.overlay1.policy").iter(
        "action"
    )
}
"""What polkit knows, by the end of the name."""


def test_polkit_knows_all_actions() -> None:
    # Those that are about a session have two names, others one; `polkit_action` makes them.
    known = {name.removesuffix("-own").removesuffix("-other") for name in POLKIT}
    assert known == {action.id for action in Action}
    for name in known - POLKIT.keys():
        assert {f"{name}-own", f"{name}-other"} <= POLKIT.keys()


@pytest.mark.parametrize("name", POLKIT)
def test_one_s_own_takes_no_administrator_and_all_else_does(name: str) -> None:
    action = POLKIT[name]
    for text in ("description", "message", "icon_name"):
        assert action.findtext(text), text
    any_, inactive, active = (
        action.findtext(f"defaults/allow_{where}") for where in ("any", "inactive", "active")
    )
    if name.endswith("-own"):
        assert active == "yes"
        assert any_ == inactive
        assert any_ in ("yes", "auth_self_keep")
    else:
        assert (any_, inactive) == ("auth_admin", "auth_admin")
        assert active in ("auth_admin", "auth_admin_keep")


def test_the_example_configuration_is_valid() -> None:
    assert config.load(ROOT / "packaging/sessiond.toml").profile.keys() == {"guest"}


def test_the_example_configuration_is_valid_with_all_its_suggestions(tmp_path: Path) -> None:
    lines = (ROOT / "packaging/sessiond.toml").read_text().splitlines()
    everything = tmp_path / "sessiond.toml"
    everything.write_text("\n".join(line.removeprefix("#") for line in lines if line[:2] != "# "))
    loaded = config.load(everything)
    assert loaded.profile.keys() == {"guest", "desktop"}
    assert loaded.session.keys() == {"kiosk"}
