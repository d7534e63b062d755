"""Guests and kiosks, on a machine with systemd and logind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import CannotBoot, Machine, booted

CONFIGURATION = """\
[profile.kiosk]
image = "/"
size = "64M"
[profile.kiosk.reset]
terminate = true
grace = "1s"
[session.lobby]
user = "kiosk"
profile = "kiosk"
"""
ROOT = "/run/sessiond/sessions/lobby/root"
KIOSK = "sessiond-kiosk@lobby"

# What a machine without a screen cannot have, and a program that tells what it finds.
DROP_IN = """\
[Service]
ExecStart=
ExecStart=/usr/bin/env $PROGRAM
ExecStartPost=
TTYPath=
StandardInput=null
UtmpIdentifier=
TTYReset=no
TTYVHangup=no
TTYVTDisallocate=no
Environment=XDG_SEAT= XDG_VTNR=
"""
PROGRAM = """\
say() { echo "$name: $*"; }
name=$1
say "$(id -un) in $(pwd)"
test ! -e written && say pristine
echo once >written
test -w "$XDG_RUNTIME_DIR" && say runtime
test -S /run/dbus/system_bus_socket && say bus
test ! -e /run/sessiond && say hidden
touch /etc/mine 2>/dev/null || say not root
grep -q 'NoNewPrivs:.1' /proc/self/status && say no new rights
exec sleep infinity
"""
FOUND = ["kiosk in /home/kiosk", "pristine", "runtime", "bus", "hidden", "not root"]
LAST = "no new rights"

LEAVES = """\
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for name in ("/tmp/mine", "/var/tmp/mine", "/dev/shm/mine", "/dev/mqueue/mine", "notes"):
    open(name, "w").close()
os.makedirs("/tmp/deep/er")
os.symlink("/etc/passwd", "/tmp/link")
if os.fork() == 0:
    os.setsid()
    open("/tmp/ready", "w").close()
    while True:
        signal.pause()
"""


@pytest.fixture(scope="module")
def machine(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if shutil.which("systemd-nspawn") is None:
        pytest.skip("systemd-nspawn is missing")
    try:
        with booted(debian, tmp_path_factory.mktemp("machine")) as machine:
            (machine.root / "etc/sessiond/sessiond.toml").write_text(CONFIGURATION)
            machine.run("useradd --create-home kiosk")
            (machine.root / "srv/leaves.py").write_text(LEAVES)
            (machine.root / "srv/show").write_text(PROGRAM)
            machine.run("systemctl start sessiond")
            try:
                yield machine
            finally:
                print(machine.run("journalctl --quiet --no-pager --unit 'sessiond*'"))
    except CannotBoot as error:
        pytest.skip(f"no machine can be booted here: {error}")


# Guests


def add(machine: Machine) -> tuple[str, int]:
    found = json.loads(machine.run("sessionctl guest add --json"))
    return found["name"], found["uid"]


def left_of(machine: Machine, uid: int) -> str:
    """Say which files, processes and segments there are of a user."""
    search = f"find / -uid {uid} -not -path '/proc/*' 2>/dev/null || true"
    processes = f"ps -o pid= -u {uid} || true"
    return machine.run(f"{search}; {processes}; grep -w {uid} /proc/sysvipc/* || true")


def test_nothing_is_left_of_a_guest(machine: Machine) -> None:
    name, uid = add(machine)
    for look_up in (f"passwd {name}", f"passwd {uid}", f"group {name}"):
        assert machine.run(f"getent {look_up}").startswith(f"{name}:x:")
    assert machine.run(f"getent shadow {name}").startswith(f"{name}:!*:")
    # Through PAM, and not: in a session of logind's, and out of it.
    machine.run(f"su - {name} -c 'python3 /srv/leaves.py' >/dev/null 2>&1")
    machine.wait("test -e /tmp/ready")
    login = f"systemd-run --quiet --unit login-{name} --property PAMName=login --uid {name}"
    machine.run(f"{login} sh -c 'touch /var/tmp/later; sleep infinity'")
    machine.run(f"su {name} -c 'ipcmk -M 4096; ipcmk -Q; ipcmk -S 1'")
    machine.wait("test -e /var/tmp/later")
    machine.run(
        "mkdir -p /var/spool/cron/crontabs /srv/public; chmod 777 /srv/public\n"
        f"install -o {name} -m 600 /dev/null /var/spool/cron/crontabs/{name}\n"
        f"install -o {name} /dev/null /srv/public/far\n"
        f"install -D /dev/null /var/lib/systemd/linger/{name}"
    )
    assert len(left_of(machine, uid).splitlines()) > 10
    machine.run(f"sessionctl guest remove {name}")
    machine.wait("grep --quiet '\"guests\":\\[\\]' /var/lib/sessiond/guests.json")
    assert left_of(machine, uid) == ""
    assert machine.run("getent passwd root | cut -d: -f1; ls /etc/passwd").split() == [
        "root",
        "/etc/passwd",
    ]
    machine.run(f"getent passwd {name} || getent passwd {uid} || getent group {name}", code=2)
    machine.run(f"ls -d /home/{name} /var/lib/systemd/linger/{name}", code=2)
    machine.wait(f"! test -e /run/user/{uid}")
    assert "could not be removed" not in machine.run("journalctl --quiet --unit sessiond")
    assert machine.run("sessionctl guest list") == ""


def test_a_guest_has_no_password(machine: Machine) -> None:
    name, _ = add(machine)
    said = machine.run(f"su -s /bin/sh nobody -c 'su {name} -c id </dev/null' 2>&1", code=1)
    assert "Authentication failure" in said
    machine.run(f"sessionctl guest remove {name}")


@pytest.mark.soak
def test_a_guest_may_not_remove_guests(machine: Machine) -> None:
    name, _ = add(machine)
    for call in ("guest add", f"guest remove {name}"):
        machine.run(f"su - {name} -c 'sessionctl {call}' </dev/null", code=4)
    assert machine.run("sessionctl guest list").split() == [name]
    machine.run(f"sessionctl guest remove {name}")


@pytest.mark.soak
def test_guests_outlive_the_manager_while_they_are_here(machine: Machine) -> None:
    (here, uid), (gone, _) = add(machine), add(machine)
    machine.run(f"systemd-run --quiet --unit here --uid {here} sleep infinity")
    machine.run("systemctl kill --kill-whom=main --signal=KILL sessiond")
    machine.wait("systemctl is-active --quiet sessiond && sessionctl guest list")
    machine.wait(f"! getent passwd {gone}")
    assert machine.run("sessionctl guest list").split() == [here]
    machine.run("systemctl is-active here")
    machine.run(f"sessionctl guest remove {here}")
    machine.run("! systemctl is-active here")
    machine.run(f"! getent passwd {uid}")


def test_without_nss_systemd_there_are_no_guests(machine: Machine) -> None:
    machine.run("cp /etc/nsswitch.conf /etc/nsswitch.bak; sed -i s/systemd// /etc/nsswitch.conf")
    try:
        assert "libnss-systemd" in machine.run("sessionctl guest add 2>&1", code=10)
        machine.run("! ls -d /home/guest-*; ! ls /run/userdb/guest-*")
    finally:
        machine.run("mv /etc/nsswitch.bak /etc/nsswitch.conf")


# Kiosks


class Kiosk:
    """One that is not started yet; `name` is on each line that its program prints."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.run = machine.run
        self._said = f"journalctl --quiet --output cat | grep '^{name}: '"

    def start(self) -> None:
        self.run(f"systemctl start {KIOSK}")
        self.wait_for_start(1)

    def wait_for_start(self, number: int) -> None:
        """Wait until the program has said all, for that time."""
        self.machine.wait(f"test \"$({self._said} | grep --count '{LAST}')\" -ge {number}")

    @property
    def said(self) -> list[str]:
        """What the program has printed."""
        return [line.partition(": ")[2] for line in self.run(self._said).splitlines()]

    @property
    def pid(self) -> str:
        return self.run(f"systemctl show --value --property=MainPID {KIOSK}")


@pytest.fixture
def kiosk(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Kiosk]:
    name = request.node.name
    directory = machine.root / f"etc/systemd/system/{KIOSK}.service.d"
    for made in (machine.root / "etc/sessiond/kiosk", directory):
        made.mkdir(parents=True, exist_ok=True)
    (directory / "test.conf").write_text(DROP_IN)
    program = f'PROGRAM="sh /srv/show {name}"\n'
    (machine.root / "etc/sessiond/kiosk/lobby.conf").write_text(program)
    machine.run("systemctl daemon-reload; sessionctl reset lobby")
    yield Kiosk(machine, name)
    machine.run(f"systemctl stop {KIOSK}; systemctl reset-failed")


def test_a_reset_starts_the_kiosk_anew(kiosk: Kiosk) -> None:
    kiosk.start()
    assert kiosk.said == [*FOUND, LAST]
    assert kiosk.run(f"cat {ROOT}/home/kiosk/written") == "once\n"
    kiosk.run("test ! -e /home/kiosk/written")
    kiosk.run("sessionctl reset lobby --terminate")
    kiosk.wait_for_start(2)
    assert kiosk.said == 2 * [*FOUND, LAST]


@pytest.mark.soak
def test_a_program_that_ends_is_started_again(kiosk: Kiosk) -> None:
    kiosk.start()
    kiosk.run(f"kill -KILL {kiosk.pid}")
    kiosk.wait_for_start(2)
    assert kiosk.said.count("pristine") == 1


def test_a_kiosk_waits_for_its_session(kiosk: Kiosk) -> None:
    kiosk.run("sessionctl close lobby")
    kiosk.run(f"systemctl start {KIOSK}", code=1)
    kiosk.machine.wait("journalctl --quiet | grep --quiet \"There is no session 'lobby'\"")
    kiosk.run("systemctl reload sessiond")
    kiosk.wait_for_start(1)


@pytest.mark.soak
def test_neither_a_death_nor_a_restart_of_sessiond_is_noticed(kiosk: Kiosk) -> None:
    kiosk.start()
    before = kiosk.pid
    kiosk.run("systemctl kill --kill-whom=main --signal=KILL sessiond")
    kiosk.machine.wait("sessionctl wait lobby")
    kiosk.run("systemctl restart sessiond")
    assert kiosk.pid == before
    assert kiosk.run(f"cat /proc/{before.strip()}/root/home/kiosk/written") == "once\n"


@pytest.mark.soak
def test_somebody_who_is_away_resets_the_kiosk(kiosk: Kiosk) -> None:
    """logind hears it from the kiosk, as swayidle does it there."""
    kiosk.start()
    kiosk.run("sessionctl schedule-reset lobby --idle 1s --warning 0s --terminate")
    kiosk.run(
        "id=$(loginctl list-sessions --no-legend | awk '$3 == \"kiosk\" { print $1; exit }')\n"
        "logind=org.freedesktop.login1\n"
        "path=$(busctl call $logind /org/freedesktop/login1 $logind.Manager GetSession s $id"
        " | cut -d'\"' -f2)\n"
        "busctl call $logind $path $logind.Session SetIdleHint b true"
    )
    kiosk.wait_for_start(2)
    assert kiosk.said.count("pristine") == 2
