"""The life of the Debian packages on a machine with systemd: install, upgrade, remove, purge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.machine import Machine

pytestmark = pytest.mark.timeout(900)

APT = "DEBIAN_FRONTEND=noninteractive apt-get --yes"
CONFIGURATION = """\
[profile.guest]
image = "/"
size = "64M"
[profile.lasting]
image = "/srv/image"
storage = "persistent"
"""
HOOK = "grep --quiet sessiond-login /etc/pam.d/common-account"
NOTE = "/var/lib/sessiond/sessions/notes/layers/*/fs/note"

# Each line tells its number, and is written by one call: one that is lost, or comes twice, is seen.
WRITER = """\
import itertools, os, sys
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in itertools.count():
    line = b"%015d\\n" % number
    assert os.write(out, line) == len(line)
    if number % 64 == 0:
        os.fsync(out)
        other = sys.argv[1] + ".new"
        open(other, "x").close()
        os.rename(other, sys.argv[1] + ".last")
"""
LINE = 16


def install(machine: Machine, version: str = "present") -> None:
    machine.run(f"{APT} install /srv/{version}/*.deb")


@pytest.fixture
def installed(machine: Machine) -> Machine:
    """The machine with the packages, a configuration of the administrator's, and two sessions.

    They are `desk` in RAM and `notes` on disk, which has a note.
    """
    install(machine)
    machine.run("mkdir /srv/image")
    (machine.root / "etc/sessiond/sessiond.toml").write_text(CONFIGURATION)
    machine.run("systemctl reload sessiond")
    machine.run("sessionctl create alice guest --id desk")
    machine.run("sessionctl create alice lasting --id notes")
    machine.run("echo mine >/run/sessiond/sessions/notes/root/note")
    machine.run("sync --file-system /var/lib/sessiond")
    return machine


def refused(machine: Machine, *names: str) -> None:
    """Removal is refused, with what there is, and changes nothing."""
    told = machine.run(f"{APT} remove sessiond 2>&1", code=100)
    for name in names:
        assert name in told
    machine.run(HOOK)
    machine.run("sessionctl --version")


def test_installed_it_runs(machine: Machine) -> None:
    machine.run(f"! {HOOK}")
    install(machine)
    assert machine.run("systemctl is-active sessiond").strip() == "active"
    assert machine.run("systemctl is-enabled sessiond").strip() == "enabled"
    machine.run("busctl --quiet tree org.sessiond.Overlay1")
    machine.run(HOOK)
    machine.run("su - alice -c true")
    machine.run("sessionctl create alice guest --id desk")
    words = "LANG=de_DE.UTF-8 sessionctl list --help"
    assert "Alle Sitzungen" in machine.run(words)
    machine.run("sessiond-reset --version")
    machine.run("test -e /usr/share/cockpit/sessiond/manifest.json")
    machine.run("python3 -c 'import sessiond.fuse._kernel_io'")
    assert machine.run("dpkg --verify sessiond") == ""


def test_an_upgrade_is_not_noticed(installed: Machine) -> None:
    (installed.root / "srv/writer.py").write_text(WRITER)
    for session in ("desk", "notes"):
        target = f"/run/sessiond/sessions/{session}/root/log"
        installed.run(f"systemd-run --unit writer-{session} python3 /srv/writer.py {target}")
        installed.wait(f"test -s {target}.last -o -e {target}.last")
    before = installed.run("systemctl show --property MainPID --value sessiond")
    mounts = installed.run("grep fuse.sessiond /proc/self/mountinfo")
    install(installed, "next")
    assert installed.run("systemctl show --property MainPID --value sessiond") != before
    assert ".0.1" in installed.run("sessiond --version")
    assert installed.run("grep fuse.sessiond /proc/self/mountinfo") == mounts
    assert (installed.root / "etc/sessiond/sessiond.toml").read_text() == CONFIGURATION
    for session in ("desk", "notes"):
        log = f"/run/sessiond/sessions/{session}/root/log"
        size = int(installed.run(f"stat --format %s {log}"))
        installed.wait(f"test $(stat --format %s {log}) -gt {size}")
        assert installed.run(f"systemctl is-active writer-{session}").strip() == "active"
        installed.run(f"systemctl stop writer-{session}")
        check = (
            f'text = open("{log}", "rb").read(); '
            f'assert text == b"".join(b"%015d\\n" % n for n in range(len(text) // {LINE}))'
        )
        installed.run(f"python3 -c '{check}'")
        installed.run(f"sessionctl reset {session}")
        installed.run(f"test ! -e {log}")


def test_removal_waits_for_the_end_of_sessions(installed: Machine) -> None:
    refused(installed, "session desk", "session notes")
    assert installed.run("systemctl is-active sessiond").strip() == "active"
    installed.run("sessionctl status desk && sessionctl status notes")
    # So it does when nobody serves them.
    installed.run("mkdir /run/systemd/system/sessiond.service.d")
    installed.run(
        "printf '[Service]\\nRestart=no\\n' >/run/systemd/system/sessiond.service.d/x.conf"
    )
    installed.run("systemctl daemon-reload")
    installed.run("systemctl kill --signal KILL sessiond")
    installed.wait("systemctl is-failed sessiond")
    refused(installed, "session desk", "session notes")
    installed.wait("systemctl is-active sessiond")
    assert "mine" in installed.run("cat /run/sessiond/sessions/notes/root/note")
    guest = installed.run("sessionctl guest add").strip()
    installed.run("sessionctl close desk")
    installed.run("systemctl stop sessiond")
    refused(installed, guest)
    installed.run("systemctl start sessiond")
    installed.run(f"sessionctl guest remove {guest}")
    installed.run("systemctl stop sessiond")
    # What pam-auth-update does not touch, since others have changed it.
    mine = "account optional pam_permit.so"
    installed.run(f"sed -i '/sessiond-login/i {mine}' /etc/pam.d/common-account")
    assert "PAM calls sessiond-login" in installed.run(f"{APT} remove sessiond 2>&1", code=100)
    installed.run("su - alice -c true")
    installed.run(f"sed -i '/{mine}/d' /etc/pam.d/common-account; systemctl stop sessiond")

    told = installed.run(f"{APT} remove sessiond 2>&1")
    assert "/var/lib/sessiond" in told
    assert installed.run(f"cat {NOTE}") == "mine\n"
    installed.run(f"! {HOOK}")
    installed.run("su - alice -c true")
    installed.run("! systemctl cat sessiond")
    installed.run("! busctl --quiet tree org.sessiond.Overlay1")
    installed.run("test -e /etc/sessiond/sessiond.toml")

    told = installed.run(f"{APT} purge sessiond 2>&1")
    assert "/var/lib/sessiond" in told
    installed.run("test ! -e /etc/sessiond")
    assert installed.run(f"cat {NOTE}") == "mine\n"

    # And it is theirs again.
    install(installed)
    installed.wait("test -e /run/sessiond/sessions/notes/root/note")


def test_a_purge_leaves_nothing_that_is_nobodys(machine: Machine) -> None:
    before = listing(machine)
    install(machine)
    machine.run("sessionctl create alice guest --id desk")
    machine.run("sessionctl close desk")
    told = machine.run(
        f"{APT} purge {' '.join(('sessiond', 'sessiond-desktop', 'sessiond-cockpit'))}"
    )
    assert "stay in" not in told
    assert listing(machine) - before == set()


def listing(machine: Machine) -> set[str]:
    """Return all that is below the directories which packages put files into."""
    found = machine.run(
        "find /etc /usr /var/lib/sessiond -name '*sessiond*' -o -path '*/sessiond/*'"
    )
    return set(map(str, map(Path, found.split())))
