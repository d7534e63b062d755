"""A live system's life: started, worked in, switched off in the middle of it, and started again.

Each test goes on where the one before has ended.
"""

from __future__ import annotations

import re

import pytest

from tests.support.live import PASSWORD, USER
from tests.support.virtual_machine import BOUND, VirtualMachine

pytestmark = pytest.mark.timeout(6 * BOUND)

SESSIONS = "/run/sessiond/sessions"
DESK = f"{SESSIONS}/desk/root"
DOCUMENTS = f"{DESK}/home/{USER}/Documents"

WRITER = f"""\
import hashlib, itertools, os, sys

def contents(number):
    return hashlib.sha256(str(number).encode()).digest() * (number % 7 + 1) * 999

def synchronise(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)

def write():
    os.makedirs("{DOCUMENTS}", exist_ok=True)
    os.makedirs("{DESK}/srv/work", exist_ok=True)
    rest = open("{DESK}/srv/rest", "wb")
    for number in itertools.count():
        for directory in ("{DOCUMENTS}", "{DESK}/srv/work"):
            with open(f"{{directory}}/new", "wb") as file:
                file.write(contents(number))
                file.flush()
                os.fsync(file.fileno())
            os.rename(f"{{directory}}/new", f"{{directory}}/{{number}}")
            synchronise(directory)
        print(f"synchronised {{number}}.", flush=True)
        rest.write(contents(number))

def check(last):
    for directory in ("{DOCUMENTS}", "{DESK}/srv/work"):
        for number in range(last + 1):
            assert open(f"{{directory}}/{{number}}", "rb").read() == contents(number), number

check(int(sys.argv[1])) if sys.argv[1:] else write()
"""
WRITTEN = 12
"""Files in each of two places, before the power is cut."""
INSTALL_WRITER = f"cat >/root/writer.py <<'END'\n{WRITER}END"


def monotonic(machine: VirtualMachine, unit: str, name: str) -> float:
    """Return when that was, in seconds from the start of the kernel."""
    stamp = machine.run(f"systemctl show --value --property={name}TimestampMonotonic {unit}")
    assert int(stamp) > 0, (unit, name)
    return int(stamp) / 1e6


def test_it_is_ready_before_anyone_can_log_in(virtual: VirtualMachine) -> None:
    begun = monotonic(virtual, "sessiond", "InactiveExit")
    ready = monotonic(virtual, "sessiond", "ActiveEnter")
    for login in ("systemd-user-sessions", "serial-getty@ttyS0", "getty@tty1"):
        assert ready <= monotonic(virtual, login, "InactiveExit"), login
    assert virtual.run(f"cat {SESSIONS}/kiosk/root/etc/hostname") == "live\n"
    print()
    print(virtual.run("systemd-analyze time").strip())
    print(virtual.run("systemd-analyze --no-pager critical-chain sessiond.service").strip())
    print(f"From the start of the kernel until sessiond was ready: {ready:.1f} s")
    print(f"of which sessiond itself took:                         {ready - begun:.1f} s")


def test_no_device_but_its_own_is_open_to_it(virtual: VirtualMachine) -> None:
    """Which takes a kernel that enforces the unit's policy, unlike in a container."""
    join = "echo $$ >/sys/fs/cgroup/system.slice/sessiond.service/cgroup.procs"

    def can(redirection: str, device: str) -> bool:
        done = f"sh -c '{join}; : {redirection}{device}' 2>&1 && echo can || true"
        return virtual.run(done).endswith("can\n")

    for device in ("/dev/mem", "/dev/vcsa", "/dev/kmsg", "/dev/ttyS0"):
        assert virtual.run(f": <{device}; echo can") == "can\n", "nothing is proved by it"
        assert not can("<", device), device
    assert can("<", "/dev/vdb")
    assert can("<>", "/dev/fuse")
    virtual.run(f"sh -c '{join}; mknod /run/node c 1 1'; rm /run/node")


def test_a_user_logs_in_and_has_a_session(virtual: VirtualMachine) -> None:
    virtual.run("dmesg --console-level 1")  # the console is theirs
    console = virtual.console
    console.log_in(USER, PASSWORD)
    assert console.run('findmnt --noheadings --output FSTYPE "$HOME"') == "fuse.sessiond\n"
    console.run('echo volatile >"$HOME/note"')
    name = re.findall(rf"^(\S+) +{USER}", console.run("sessionctl list"), flags=re.MULTILINE)[0]
    path = f"/org/sessiond/Overlay1/session/{name.replace('-', '_2d')}"
    asked = f"busctl get-property org.sessiond.Overlay1 {path} org.sessiond.Overlay1.Session State"
    assert console.run(asked) == 's "active"\n'
    assert path in console.run("busctl tree --list org.sessiond.Overlay1")

    # Hers, but from a serial line: she is asked for her password, by polkit's agent.
    console.send(f"sessionctl reset {name}; echo ended $?.")
    console.until(rb"Password: ", BOUND)
    console.send(PASSWORD)
    console.until(rb"ended 0\.", BOUND)
    console.run('! test -e "$HOME/note"; echo volatile >"$HOME/note"')


def test_reset_snapshot_and_persist(virtual: VirtualMachine) -> None:
    virtual.run("sessionctl create root live --id made")
    root = f"{SESSIONS}/made/root"
    virtual.run(f"echo first >{root}/srv/note; sessionctl snapshot made first")
    virtual.run(f"rm -r {root}/etc; sessionctl reset made; ls {root}/etc/hostname")
    virtual.run(f"! test -e {root}/srv/note; sessionctl restore made first")
    assert virtual.run(f"cat {root}/srv/note") == "first\n"
    virtual.run("sessionctl persist made")
    virtual.run(f"echo second >>{root}/srv/note; sync")
    virtual.run(f"echo volatile >{SESSIONS}/kiosk/root/srv/note")
    virtual.run("sessionctl create root live --id forgotten")


def test_a_power_cut_in_the_middle_of_writing(virtual: VirtualMachine) -> None:
    virtual.run(f"sessionctl create {USER} lasting --id desk")
    virtual.run(f"{INSTALL_WRITER}\nsystemd-run --quiet --unit writer --property "
                "StandardOutput=file:/dev/ttyS0 python3 /root/writer.py")  # fmt: skip
    told = virtual.console.until(rb"synchronised %d\.\r?\n" % WRITTEN, BOUND)
    virtual.cut_power()
    (last,) = re.findall(r"synchronised (\d+)\.\s*$", told)
    virtual.run(f"{INSTALL_WRITER}\npython3 /root/writer.py {last}")
    listed = virtual.run("sessionctl list")
    active = re.findall(r"^(\w+) .* active ", listed, flags=re.MULTILINE)
    assert sorted(active) == ["desk", "kiosk", "made"]
    assert virtual.run(f"cat {SESSIONS}/made/root/srv/note") == "first\nsecond\n"
    virtual.run(f"! test -e {SESSIONS}/kiosk/root/srv/note; ! test -e /home/{USER}/note")
    virtual.run("sessionctl restore made first")
    assert virtual.run(f"cat {SESSIONS}/made/root/srv/note") == "first\n"


def test_nothing_is_damaged_by_that(virtual: VirtualMachine) -> None:
    virtual.run("systemctl stop sessiond")
    assert virtual.run("findmnt --noheadings --types fuse.sessiond || true") == ""
    print(virtual.run("sessionctl check"))
    virtual.run("systemctl start sessiond")


def test_what_is_kept_outlives_a_reset_too(virtual: VirtualMachine) -> None:
    virtual.run("sessionctl reset desk")
    virtual.run(f"! test -e {DESK}/srv/work; test -e {DOCUMENTS}/{WRITTEN}")


def test_a_shutdown_loses_nothing(virtual: VirtualMachine) -> None:
    """What nobody has synchronised is on the disk, and nothing holds the machine up."""
    virtual.run(f"echo unsynchronised >{DESK}/srv/note")
    virtual.run(f"cd {DESK}; systemd-run --quiet --unit waiting --same-dir sleep infinity")
    virtual.power_off()
    assert virtual.run(f"cat {DESK}/srv/note") == "unsynchronised\n"
    assert virtual.run("journalctl --quiet --unit sessiond --grep 'ERROR|WARNING' || true") == ""


def test_a_soft_reboot_ends_sessions_too(virtual: VirtualMachine) -> None:
    virtual.run(f"echo volatile >{SESSIONS}/kiosk/root/srv/note; echo still >{DESK}/srv/note")
    virtual.soft_reboot()
    virtual.run(f"! test -e {SESSIONS}/kiosk/root/srv/note")
    assert virtual.run(f"cat {DESK}/srv/note") == "still\n"
