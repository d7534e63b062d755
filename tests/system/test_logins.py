"""Logins through PAM on a machine with systemd: who comes gets a session, which goes with them."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import CannotBoot, Machine, booted

CONFIGURATION = """\
[profile.home]
image = "/home/{user}"
mount_point = "/home/{user}"
size = "16M"
[profile.lasting]
image = "/home/{user}"
mount_point = "/home/{user}"
storage = "persistent"
[profile.broken]
image = "/srv/none"
[login.bob]
user = "bob"
profile = "lasting"
[login.carol]
user = "carol"
profile = "broken"
[login.dave]
user = "dave"
profile = "broken"
otherwise = "unprotected"
[login.guests]
class = "guest"
profile = "home"
[login.staff]
group = "staff"
[login.people]
profile = "home"
"""
KEY = "/srv/key"
SSH = f"ssh -o StrictHostKeyChecking=no -i {KEY} -o ControlMaster=no"

UNITS = ".config/systemd/user"

IS_IN = 'test "$(stat -f -c %T ~)" = fuseblk'
"""Succeeds in a session: what `stat` calls all of FUSE."""


@pytest.fixture(scope="module")
def machine(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if shutil.which("systemd-nspawn") is None:
        pytest.skip("systemd-nspawn is missing")
    try:
        with booted(debian, tmp_path_factory.mktemp("machine")) as machine:
            logind = machine.root / "etc/systemd/logind.conf.d/here.conf"
            logind.parent.mkdir()
            logind.write_text("[Login]\nUserStopDelaySec=0\n")
            (machine.root / "etc/sessiond/sessiond.toml").write_text(CONFIGURATION)
            machine.run("pam-auth-update --package; systemctl restart systemd-logind")
            for user in ("alice", "bob", "carol", "dave", "erin"):
                machine.run(f"useradd -m -s /bin/sh -p '*' {user}")
            machine.run("usermod --append --groups staff erin")
            machine.run(f"ssh-keygen -q -t ed25519 -N '' -f {KEY}")
            machine.run("systemctl start ssh sessiond; mkfifo /srv/fifo")
            yield machine
            print(machine.run("journalctl --quiet --no-pager"))
    except CannotBoot as error:
        pytest.skip(f"no machine can be booted here: {error}")


def assert_gone(machine: Machine, user: str) -> None:
    machine.wait(f"! sessionctl list | grep --quiet {user}")
    machine.wait(f"! findmnt /home/{user}")
    machine.run(f"! test -e /home/{user}/new")


def test_su(machine: Machine) -> None:
    """From root, and the user's own manager sees the same."""
    script = f"{IS_IN}; echo contents >new; systemctl --user start see; cat seen"
    unit = "[Service]\\nType=oneshot\\nExecStart=/bin/sh -c 'cat ~/new >~/seen'"
    install = f'printf "{unit}" >$(mkdir -p {UNITS}; cd {UNITS}; pwd)/see.service'
    said = machine.run(f"su - alice -c {shlex.quote(f'{install}; {script}')}")
    assert said == "contents\n"
    assert_gone(machine, "alice")


def test_login_on_a_terminal(machine: Machine) -> None:
    program = (
        "import os, pty, sys\n"
        "def read(fd):\n"
        "    data = os.read(fd, 1024)\n"
        "    return data\n"
        "pid, fd = pty.fork()\n"
        "if not pid: os.execvp('login', ['login', '-f', 'alice'])\n"
        f"os.write(fd, b'{IS_IN} && echo is\"\"in; echo x >new; exit\\n')\n"
        "said = b''\n"
        "try:\n"
        "    while part := os.read(fd, 1024): said += part\n"
        "except OSError: pass\n"
        "print(said.decode())\n"
    )
    assert "isin" in machine.run(f"python3 -c {shlex.quote(program)}")
    assert_gone(machine, "alice")


def test_ssh(machine: Machine) -> None:
    """Two at a time: the session goes with the last."""
    machine.run(f"mkdir /home/alice/.ssh && cp {KEY}.pub /home/alice/.ssh/authorized_keys")
    # What goes on without a terminal would keep the user here.
    first = f"{IS_IN} && echo x >new; while test -e /proc/$PPID; do sleep 0.1; done"
    machine.run(f"systemd-run --quiet --unit ssh-alice {SSH} alice@127.0.0.1 '{first}'")
    machine.wait("test -s /home/alice/new")
    assert machine.run(f"{SSH} alice@127.0.0.1 'cat new'") == "x\n"
    assert machine.run("sessionctl list | grep --count alice") == "1\n"
    machine.run("systemctl stop ssh-alice")
    assert_gone(machine, "alice")


def test_nothing_that_is_left_changes_the_image(machine: Machine) -> None:
    """It is the home itself, and the user's own; this process neither uses it nor is a login."""
    machine.run("systemd-run --quiet --unit stray -p User=alice sleep infinity")
    machine.run(f"su - alice -c '{IS_IN}'")
    machine.wait("! systemctl is-active --quiet stray")
    assert_gone(machine, "alice")


def test_a_display_manager(machine: Machine) -> None:
    phases = "authenticate acct_mgmt open_session"
    machine.run(f"pamtester lightdm-autologin alice {phases} close_session >/srv/said 2>&1")
    machine.wait("test -e /srv/said")
    assert_gone(machine, "alice")


def test_what_is_on_disk_waits_for_its_user(machine: Machine) -> None:
    machine.run("su - bob -c 'echo contents >new'")
    machine.wait("sessionctl list | grep --quiet 'bob.*inactive'")
    machine.run("! findmnt /home/bob; ! test -e /home/bob/new")
    machine.run("systemctl restart sessiond")
    machine.run("sessionctl list | grep --quiet 'bob.*inactive'")
    assert machine.run("su - bob -c 'cat new'") == "contents\n"
    machine.wait("sessionctl list | grep --quiet 'bob.*inactive'")


def test_a_guest_goes_with_the_last_login(machine: Machine) -> None:
    name = machine.run("sessionctl guest add").strip()
    leaves = "(trap '' TERM HUP; touch /tmp/left; sleep infinity) >/dev/null 2>&1 &"
    machine.run(f"pamtester lightdm-autologin {name} acct_mgmt open_session close_session")
    machine.wait(f"! getent passwd {name}")
    name = machine.run("sessionctl guest add").strip()
    uid = machine.run(f"id -u {name}").strip()
    login = f"systemd-run --quiet --unit guest -p PAMName=login -p User={name}"
    machine.run(f"{login} sh -c {shlex.quote(f'{IS_IN}; echo x >~/new; {leaves} cat /srv/fifo')}")
    machine.wait(f"test -e /home/{name}/new -a -e /tmp/left")
    machine.run("systemctl stop guest")
    machine.wait(f"! getent passwd {name}")
    machine.wait("grep --quiet '\"guests\":\\[\\]' /var/lib/sessiond/guests.json")
    assert machine.run(
        f"find / -xdev -uid {uid}; ls /home; ps -o pid= -u {uid} || true"
    ).split() == [
        "alice",
        "bob",
        "carol",
        "dave",
        "erin",
    ]
    assert name not in machine.run("sessionctl list")


def test_who_is_refused_can_read_why(machine: Machine) -> None:
    said = machine.run("su - carol -c id", code=1)
    assert "There is no session for you, so you cannot log in. Image /srv/none" in said
    assert "uid=" not in said
    for phase in ("login", "lightdm", "sshd"):
        said = machine.run(f"pamtester {phase} carol acct_mgmt", code=1)
        assert "There is no session for you" in said
    # Where the phase before does not come to it, as with an expired password.
    said = machine.run("pamtester login carol open_session", code=1)
    assert "There is no session for you" in said


def test_who_is_let_in_unprotected_can_read_that(machine: Machine) -> None:
    said = machine.run("su - dave -c id")
    assert "You work without a session: what you do stays. Image /srv/none" in said
    assert "uid=" in said


def test_whom_no_rule_names(machine: Machine) -> None:
    assert machine.run("su - erin -c 'stat -f -c %T ~'") != "fuseblk\n"
    assert machine.run("su - -c 'stat -f -c %T ~'") != "fuseblk\n"


def test_a_user_who_is_there_over_a_restart(machine: Machine) -> None:
    """And goes while sessiond does not run, which does not wait for each other."""
    machine.run("systemd-run --quiet --unit here -p PAMName=su-l -p User=alice sleep infinity")
    machine.wait("sessionctl list | grep --quiet alice")
    machine.run("echo contents >/home/alice/new; systemctl restart sessiond")
    assert machine.run("cat /home/alice/new") == "contents\n"
    uid = machine.run("id --user alice").strip()
    machine.run("systemctl kill --signal KILL sessiond; systemctl stop here")
    assert_gone(machine, "alice")
    machine.run(f"! systemctl is-failed --quiet sessiond-user@{uid}")


def test_without_the_daemon_the_configuration_counts(machine: Machine) -> None:
    machine.run("systemctl mask --now --quiet sessiond")
    try:
        said = machine.run("su - alice -c id", code=1)
        assert "cannot log in. sessiond does not run" in said
        assert "uid=" in machine.run("su - erin -c id")
        said = machine.run("su - dave -c id")
        assert "what you do stays. sessiond does not run" in said
        assert "uid=" in said
        machine.run("cd /etc/sessiond; mv sessiond.toml good; echo nonsense >sessiond.toml")
        machine.run("sessiond-login open 0")
        machine.run("sessiond-login open $(id -u erin)", code=1)
        machine.run("cd /etc/sessiond; mv good sessiond.toml")
    finally:
        machine.run("systemctl unmask --quiet sessiond; systemctl start sessiond")
