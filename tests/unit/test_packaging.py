"""The files that are installed beside the program."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sessiond import config
from sessiond.bus import names
from sessiond.bus.authorisation import POLKIT_PREFIX, Action
from tests.support.polkit import translated_policy

LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
ROOT = Path(__file__).parents[2]
PROGRAMS = (ROOT / "packaging/pam/sessiond-login", Path(sys.executable).parent / "sessiond")
UNITS = sorted((ROOT / "units").glob("*.service"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    # Units name programs without a directory; systemd looks for them where they get installed.
    copy = tmp_path / unit.name
    text = unit.read_text()
    for program in PROGRAMS:
        text = re.sub(rf"^(Exec\w+)={program.name}\b", rf"\1={program}", text, flags=re.MULTILINE)
    copy.write_text(text)
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


EXPOSURE = dict(
    re.findall(
        r"^\| `(.*)` \| ([0-9.]+) \|",
        (ROOT / "docs/design/service-hardening.md").read_text(),
        flags=re.MULTILINE,
    )
)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_is_no_more_exposed_than_is_said(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = re.findall(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert float(found) <= float(EXPOSURE[unit.name])


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


@pytest.mark.skipif(shutil.which("msgfmt") is None, reason="gettext is missing")
def test_polkit_asks_in_all_languages(tmp_path: Path) -> None:
    installed = translated_policy(tmp_path)
    languages = {None, *(ROOT / "sessiond/locale/LINGUAS").read_text().split()}
    actions = list(ElementTree.parse(installed).iter("action"))
    assert len(actions) == len(POLKIT)
    for action in actions:
        for said in ("description", "message"):
            found = {one.get(LANGUAGE): one.text or "" for one in action.findall(said)}
            assert found.keys() == languages
            names = [set(re.findall(r"\$\(\w+\)", text)) for text in found.values()]
            assert all(some == names[0] for some in names), found


class Hook:
    """The login hook, as installed, with a sessiond that cannot open the session."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "sbin/sessiond-login"
        self.environment = {
            "PATH": f"{directory}:{os.environ['PATH']}",
            "PAM_TYPE": "account",
            "PAM_USER": "nobody",
            "LOCPATH": str(directory),
            "OUTPUT_CHARSET": "UTF-8",
        }
        self.program.parent.mkdir()
        shutil.copy(PROGRAMS[0], self.program)
        catalogue = directory / "share/locale/de/LC_MESSAGES/sessiond.mo"
        catalogue.parent.mkdir(parents=True)
        source = ROOT / "sessiond/locale/de.po"
        subprocess.run(["msgfmt", "-o", catalogue, source], check=True)
        bus = directory / "dbus-send"
        bus.write_text(
            "#!/bin/sh\necho 'Error org.sessiond.Overlay1.Error.Busy: It is busy.'\nexit 1"
        )
        bus.chmod(0o755)
        # The C library's only one is that of C, which has no language.
        (directory / "source").write_text("LC_CTYPE\nEND LC_CTYPE\n")
        make = ["localedef", "--no-archive", "-c", "-i", directory / "source", directory / "de_DE"]
        subprocess.run(make, check=False, capture_output=True)  # 1 for what is left out

    def said(self, *arguments: str, before: str = ":", **environment: str) -> str:
        """Return what it prints in a mount namespace of its own, where `before` was run."""
        command = [*PRIVATE, "sh", "-euc", f'{before}; exec "$@"', "sh", self.program, *arguments]
        done = subprocess.run(
            command, env=self.environment | environment, stdout=subprocess.PIPE, text=True
        )
        assert done.returncode == 1
        return done.stdout


PRIVATE = ("unshare", "--mount", "--propagation", "private")
ENGLISH = "There is no session for you, so you cannot log in. It is busy.\n"
GERMAN = "Es gibt keine Sitzung für Sie, deshalb können Sie sich nicht anmelden. It is busy.\n"


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    if os.geteuid() != 0 or shutil.which("gettext") is None:
        pytest.skip("takes root and gettext")
    return Hook(tmp_path)


def test_logins_are_refused_in_the_language_of_who_logs_in(hook: Hook) -> None:
    assert hook.said(LANG="de_DE") == GERMAN
    assert hook.said(LANG="C") == ENGLISH
    assert hook.said("open", "65534", LANG="de_DE") == ENGLISH, "that is for the journal"


@pytest.mark.parametrize("line", ["LANG=de_DE", 'LANG="de_DE"'])
def test_logins_are_refused_in_the_machines_language(hook: Hook, tmp_path: Path, line: str) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    for name in ("passwd", "nsswitch.conf"):
        shutil.copy(f"/etc/{name}", etc)
    (etc / "locale.conf").write_text(f"# Not a shell's: ' (\n{line}\n")
    bind = f"mount --bind {etc} /etc"
    assert hook.said(before=bind) == GERMAN
    (etc / "locale.conf").unlink()
    assert hook.said(before=bind) == ENGLISH


def test_without_gettext_logins_are_refused_in_english(hook: Hook, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "id", "sed", "head"):
        program = shutil.which(name)
        assert program is not None
        (tools / name).symlink_to(program)
    assert hook.said(before=f"PATH={tmp_path}:{tools}", LANG="de_DE") == ENGLISH
