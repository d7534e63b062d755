"""The live system's root in a container: quicker than a virtual machine, with this kernel."""

from __future__ import annotations

import pytest

from tests.support.machine import Machine

pytestmark = pytest.mark.timeout(300)

SESSIONS = "/run/sessiond/sessions"
KIOSK = f"{SESSIONS}/kiosk/root"
NAME = "org.sessiond.Overlay1"
OBJECT = "/org/sessiond/Overlay1/session/kiosk"


def test_from_the_start_to_a_persistent_session(contained: Machine) -> None:
    run = contained.run
    contained.wait("systemctl is-active sessiond multi-user.target")
    stamps = "systemctl show --value --property={}TimestampMonotonic {}"
    ready = int(run(stamps.format("ActiveEnter", "sessiond")))
    assert ready <= int(run(stamps.format("InactiveExit", "systemd-user-sessions")))

    assert run("su - alice -c 'findmnt --noheadings --output FSTYPE ~'") == "fuse.sessiond\n"
    assert run(f"busctl get-property {NAME} {OBJECT} {NAME}.Session State") == 's "active"\n'
    run(f"echo first >{KIOSK}/note; sessionctl snapshot kiosk first; sessionctl reset kiosk")
    assert run(f"ls {KIOSK}") == "motd\n"
    run("sessionctl restore kiosk first; sessionctl persist kiosk")
    run("systemctl kill --signal KILL sessiond && systemctl reset-failed sessiond || true")
    contained.wait("systemctl is-active sessiond")
    assert run(f"cat {KIOSK}/note") == "first\n"
    assert "persistent" in run("sessionctl list --json")
    assert run("systemctl stop sessiond; findmnt --types fuse.sessiond || true") == ""
