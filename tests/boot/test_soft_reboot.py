"""`systemctl soft-reboot`: sessions end as at a reboot; docs/design/service-hardening.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.daemon import wait_until
from tests.support.machine import Machine

pytestmark = pytest.mark.timeout(600)

SESSIONS = "/run/sessiond/sessions"
KIOSK, DESK = f"{SESSIONS}/kiosk/root", f"{SESSIONS}/desk/root"
BUSY = "while :; do echo x >>log; mv log log.old; mv log.old log; done"


def prepare(machine: Machine) -> None:
    """A program is at work in each session, and a user is logged in."""
    machine.wait("systemctl is-active sessiond")
    machine.run(f"echo gone >{KIOSK}/note; echo stays >{DESK}/note")
    for session in ("kiosk", "desk"):
        where = f"--unit busy-{session} --working-directory {SESSIONS}/{session}/root"
        machine.run(f"systemd-run --quiet {where} sh -c '{BUSY}'")
    login = "--unit login --property PAMName=login --property User=alice"
    machine.run(
        f"systemd-run --quiet {login} sh -c 'echo here >~/note; exec cat /dev/zero >/dev/null'"
    )
    machine.wait("test -s /home/alice/note && systemctl is-active user@$(id --user alice)")


def soft_reboot(machine: Machine, console: Path) -> None:
    """Have it done; `console` has what the machine says.

    It has less time for it than systemd gives what does not end.
    """
    machine.run("systemctl soft-reboot --no-block")
    # Commands that are run there from outside are not ended by it, but may wait for ever.
    wait_until(lambda: b"Welcome to" in console.read_bytes().partition(b"Soft-rebooting")[2])
    machine.wait("systemctl is-active sessiond")
    machine.run("systemctl is-system-running --wait || true")
    assert machine.run("systemctl show --property SoftRebootsCount") == "SoftRebootsCount=1\n"


def assert_as_after_a_reboot(machine: Machine) -> None:
    assert machine.run(f"cat {DESK}/note; ls {KIOSK}") == "stays\nmotd\n"
    assert machine.run("systemctl show --value --property=SubState busy-kiosk login").split() == [
        "dead",
        "dead",
    ]
    machine.run("! findmnt /home/alice; ! test -e /home/alice/note")
    targets = machine.run("findmnt --noheadings --list --output TARGET --types fuse.sessiond")
    assert sorted(targets.split()) == [DESK, KIOSK]
    # A connection and a journal of each session.
    assert machine.run("systemctl show --value --property=NFileDescriptorStore sessiond") == "4\n"
    machine.run(f"echo works >>{DESK}/note; sessionctl reset kiosk; sessionctl snapshot desk one")
    machine.run("su - alice -c 'findmnt /home/alice'")


def test_sessions_end_and_those_on_disk_are_there_again(contained: Machine, tmp_path: Path) -> None:
    prepare(contained)
    soft_reboot(contained, tmp_path / "console")
    assert_as_after_a_reboot(contained)
    said = contained.run("journalctl --quiet --unit sessiond --output cat")
    assert "Ending, because of SIGTERM, and with it" in said
    assert contained.run("systemctl --failed --quiet") == ""
    # The next one finds nothing that it would have to put in order.
    start = said.rpartition("Starting sessiond.service")[2]
    assert "WARNING" not in start
    assert "ERROR" not in start
    assert "another sessiond" not in start
