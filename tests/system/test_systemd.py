"""The unit on a machine with systemd: started, restarted, killed, hung, and stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sessiond.journal import Event
from tests.matrix.methods import METHODS, By
from tests.support.cgroups import COUNTER, is_of_one_moment, prepare_counter
from tests.support.machine import PYTHON, SOURCE, CannotBoot, Machine, booted

CONFIGURATION = """\
[profile.guest]
image = "/srv/image"
size = "16M"
[session.kiosk]
user = "root"
profile = "guest"
"""
ROOT = "/run/sessiond/sessions/kiosk/root"

KEEPER = """\
import os, signal
from sessiond.systemd import Systemd
systemd = Systemd(os.environ)
kept = systemd.descriptors
if "note" not in kept.inherited:
    note = os.memfd_create("note")
    os.write(note, b"kept")
    kept.keep("old", note)
    kept.drop("old")
    kept.keep("note", 0)
    kept.keep("note", note)
    os.kill(os.getpid(), signal.SIGKILL)
note = kept.inherited["note"]
print("inherited", dict(kept.inherited), os.pread(note, 9, 0), os.get_inheritable(note), flush=True)
systemd.ready("Has what was kept.")
signal.pause()
"""


@pytest.fixture(scope="module")
def machine(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if shutil.which("systemd-nspawn") is None:
        pytest.skip("systemd-nspawn is missing")
    try:
        with booted(debian, tmp_path_factory.mktemp("machine")) as machine:
            yield machine
    except CannotBoot as error:
        pytest.skip(f"no machine can be booted here: {error}")


@pytest.fixture
def service(machine: Machine) -> Iterator[Machine]:
    """The machine with the service running, and a note in its session."""
    (machine.root / "srv/image").mkdir(exist_ok=True)
    (machine.root / "srv/image/motd").write_text("Welcome.\n")
    (machine.root / "etc/sessiond/sessiond.toml").write_text(CONFIGURATION)
    try:
        machine.run("systemctl start sessiond")
        machine.run(f"echo note >{ROOT}/note")
        yield machine
        machine.run("systemctl stop sessiond; systemctl reset-failed")
    finally:
        print(machine.run("journalctl --quiet --no-pager --unit sessiond"))


@pytest.fixture
def bystander(service: Machine) -> Iterator[Callable[[], None]]:
    """Call it to have a program that works in the session show that nothing has happened to it."""
    service.run("mkfifo /srv/ask")
    script = (
        f"cd {ROOT} && exec 3>gone 4<motd && rm gone"
        "; while :; do read -r command </srv/ask && eval $command; done"
    )
    service.run(f"systemd-run --quiet --unit bystander sh -c '{script}'")
    number = 0

    def ask() -> None:
        nonlocal number
        number += 1
        # An open file that is removed, one of the image, and the working directory.
        command = f"echo {number} >&3 && cat note motd /dev/fd/4 >/srv/answer; echo >/srv/done"
        service.run(f"rm -f /srv/answer /srv/done; echo '{command}' >/srv/ask")
        service.wait("test -e /srv/done")
        assert service.run("cat /srv/answer") == "note\nWelcome.\nWelcome.\n"
        size = "stat --format %s --dereference /proc/$pid/fd/3"
        pid = "pid=$(systemctl show --value --property=MainPID bystander)"
        assert service.run(f"{pid}; {size}") == f"{2 * number}\n"

    ask()
    yield ask
    service.run("systemctl stop bystander; rm /srv/ask")


def show(machine: Machine, name: str) -> str:
    return machine.run(f"systemctl show --value --property={name} sessiond").strip()


def assert_serves_on(machine: Machine) -> None:
    assert_mounted(machine)
    assert " active " in machine.run("sessionctl list")


def assert_mounted(machine: Machine) -> None:
    assert show(machine, "ActiveState") == "active"
    assert machine.run(f"cat {ROOT}/motd {ROOT}/note") == "Welcome.\nnote\n"
    assert machine.run("findmnt --noheadings --list --output TARGET").split().count(ROOT) == 1


def test_it_starts(service: Machine) -> None:
    assert_serves_on(service)
    assert show(service, "StatusText") == "1 sessions were mounted at start."
    service.run("systemctl reload sessiond")
    service.wait("journalctl --unit sessiond | grep --quiet 'configuration is read again'")


def test_it_sees_programs_of_other_users(service: Machine) -> None:
    """Which takes capabilities that the unit has to leave."""
    service.run(
        f"systemd-run --quiet --unit guest --property User=nobody sh -c 'cd {ROOT}; sleep 99'"
    )
    service.wait("sessionctl conflicts kiosk | grep --quiet guest.service")
    service.run("sessionctl reset kiosk --terminate")
    service.wait("! systemctl is-active --quiet guest")


@pytest.fixture
def halting(service: Machine) -> Machine:
    """The machine with a session whose programs are those of a slice."""
    with open(service.root / "etc/sessiond/sessiond.toml", "a") as configuration:
        configuration.write('[profile.halting]\nimage = "/srv/image"\ncgroup = "guests.slice"\n')
    service.run("systemctl reload sessiond")
    service.wait("sessionctl create root halting --id halting")
    return service


def test_programs_of_a_slice_stand_still(halting: Machine) -> None:
    """And systemd does not take that slice for one that it has frozen."""
    (halting.root / "srv/counter.py").write_text("import os, sys\n" + COUNTER)
    prepare_counter(halting.root / "srv")
    root = "/run/sessiond/sessions/halting/root"
    halting.run(f"cp /srv/one /srv/two {root}")
    counter = f"/usr/bin/python3 /srv/counter.py {root}/one {root}/two"
    halting.run(f"systemd-run --quiet --slice guests --unit counter {counter}")
    halting.wait(f"cmp --bytes=8 {root}/two /dev/zero; test $? = 1")
    state = "systemctl show --value --property=FreezerState guests.slice counter.service"
    for name in ("first", "second"):
        halting.run(f"sessionctl snapshot halting {name}")
        assert halting.run("cat /sys/fs/cgroup/guests.slice/cgroup.freeze") == "0\n"
        assert halting.run(state).split() == ["running", "running"]
    halting.run("systemctl stop counter; mkdir /srv/kept")
    said = halting.run("journalctl --sync; journalctl --quiet --unit sessiond")
    assert "Snapshot second" in said
    assert "not stopped" not in said
    assert "no cgroup" not in said
    for name in ("first", "second"):
        halting.run(f"sessionctl restore halting {name} --no-undo; cp {root}/* /srv/kept")
        assert is_of_one_moment(halting.root / "srv/kept")


def test_programs_go_on_when_systemd_has_killed_all_of_it(halting: Machine) -> None:
    """Which the manager and the worker of a session leave to the next ones."""
    worker = "$(pgrep --newest --exact sessiond-worker)"
    halting.run(f"sessionctl create root guest --id hung; kill -STOP {worker}")
    wait = "stat /run/sessiond/sessions/hung/root/missing"
    halting.run(f"systemd-run --quiet --slice guests --unit waiting {wait}")
    halting.run(
        "main=$(systemctl show --value --property=MainPID sessiond)\n"
        "(sessionctl snapshot halting first || true) >/dev/null 2>&1 &\n"
        "until grep --quiet 1 /sys/fs/cgroup/guests.slice/cgroup.freeze; do :; done\n"
        "kill -KILL $main"
    )
    halting.wait("grep --quiet 0 /sys/fs/cgroup/guests.slice/cgroup.freeze")
    halting.wait("sessionctl status halting | grep --quiet active")
    halting.run("rmdir /run/sessiond/halted; ! systemctl is-active waiting")


def test_logind_knows_who_is_idle(service: Machine) -> None:
    """Root has not logged in there, so nobody is at the session."""
    service.run(f"touch {ROOT}/file")
    service.run("sessionctl schedule-reset kiosk --idle 1s --warning 0s")
    service.wait(f"! test -e {ROOT}/file")


def test_it_is_started_by_the_bus(machine: Machine, service: Machine) -> None:
    service.run("systemctl stop sessiond")
    assert "kiosk" in service.run("sessionctl list")


def test_the_bus_may_come_and_go(service: Machine) -> None:
    service.run("systemctl stop dbus.socket dbus.service")
    assert_mounted(service)
    service.run("systemctl restart sessiond")
    assert_mounted(service)
    service.run("systemctl start dbus.socket")
    service.wait("sessionctl list")
    assert_serves_on(service)


def test_a_restart_leaves_sessions_alone(service: Machine, bystander: Callable[[], None]) -> None:
    service.run("systemctl restart sessiond")
    assert_serves_on(service)
    bystander()
    assert show(service, "NRestarts") == "0"


def test_restarts_under_load_lose_nothing(service: Machine) -> None:
    """Programs compare what they find with what they have written, mapped, locked and removed."""
    with open(service.root / "etc/sessiond/sessiond.toml", "a") as configuration:
        configuration.write('[profile.load]\nimage = "/srv/image"\nsize = "128M"\n')
    service.run("systemctl reload sessiond")
    service.wait("sessionctl create root load --id load")
    root = ROOT.replace("kiosk", "load")
    program = f"{PYTHON} -m tests.support.load {root}"
    service.run(f"systemd-run --quiet --unit load --working-directory {SOURCE} {program}")
    service.wait(f"test -s {root}/database")
    for _ in range(3):
        before = service.run(f"stat --format %Z {root}/database")
        service.run("systemctl restart sessiond")
        service.wait(f"test $(stat --format %Z {root}/database) != {before}")
    service.run("systemctl is-active load; systemctl stop load")
    # A unit that has failed would still be there, with its status.
    told = "systemctl show --property=ExecMainStatus --property=Result load"
    assert service.run(told).split() == ["Result=success", "ExecMainStatus=0"]


def test_a_stop_leaves_nothing_mounted(service: Machine) -> None:
    service.run("systemctl stop sessiond")
    assert show(service, "Result") == "success"
    assert "/run/sessiond" not in service.run("findmnt --noheadings --list --output TARGET")
    assert service.run("ls /run/sessiond/sessions /run/sessiond/trash").split() == [
        "/run/sessiond/sessions:",
        "/run/sessiond/trash:",
    ]
    service.run("systemctl start sessiond")
    service.run(f"test ! -e {ROOT}/note")


@pytest.mark.parametrize("number", ["KILL", "SEGV", "USR1"])
def test_it_is_started_again_whatever_kills_it(
    service: Machine, bystander: Callable[[], None], number: str
) -> None:
    service.run(f"systemctl kill --kill-who=main --signal={number} sessiond")
    service.wait("test $(systemctl show --value --property=NRestarts sessiond) != 0")
    service.wait("systemctl is-active sessiond")
    assert_serves_on(service)
    bystander()


def test_the_watchdog_ends_a_manager_that_hangs(
    service: Machine, bystander: Callable[[], None]
) -> None:
    service.run(
        "mkdir --parents /run/systemd/system/sessiond.service.d;"
        "printf '[Service]\\nWatchdogSec=1s\\nTimeoutAbortSec=1s\\n'"
        " >/run/systemd/system/sessiond.service.d/soon.conf;"
        "systemctl daemon-reload; systemctl restart sessiond;"
        "kill -STOP $(systemctl show --value --property=MainPID sessiond)"
    )
    service.wait("test $(systemctl show --value --property=NRestarts sessiond) != 0")
    service.wait("systemctl is-active sessiond")
    service.run("rm --recursive /run/systemd/system/sessiond.service.d; systemctl daemon-reload")
    assert "watchdog" in service.run("journalctl --unit sessiond").lower()
    assert_serves_on(service)
    bystander()


def test_a_mistake_in_the_configuration_costs_no_session(
    service: Machine, bystander: Callable[[], None]
) -> None:
    configuration = service.root / "etc/sessiond/sessiond.toml"
    configuration.write_text("[profile.guest]\nimage = 1\n")
    service.run("systemctl restart sessiond", code=1)
    assert show(service, "ExecMainStatus") == "2"
    assert show(service, "NRestarts") == "0"
    configuration.write_text(CONFIGURATION)
    service.run("systemctl start sessiond")
    assert_serves_on(service)
    if int(service.run("systemctl --version").split()[1]) >= 254:  # FileDescriptorStorePreserve=
        bystander()


def in_a_session(machine: Machine, command: str, *, code: int = 0, seat: str = "") -> str:
    """Run a command as alice, logged in anew: at a seat of the machine, or from elsewhere."""
    login = "--quiet --wait --pipe --property=PAMName=login --property=User=alice"
    where = f"--setenv=XDG_SEAT={seat} --setenv=XDG_SESSION_TYPE=tty" if seat else ""
    return machine.run(f"systemd-run {login} {where} {command}", code=code)


def journal(machine: Machine, *matches: str) -> list[dict[str, str]]:
    """Return the fields of the lines that match, those of the journal's own among them."""
    lines = machine.run(f"journalctl --sync; journalctl --output=json {' '.join(matches)}")
    return [json.loads(line) for line in lines.splitlines()]


def test_polkit_knows_who_is_at_the_machine(service: Machine) -> None:
    since = f"--since={service.run('date +@%s.%6N').strip()}"
    service.run("id alice || useradd --create-home alice; sessionctl create alice guest --id hers")
    reset, uid = "sessionctl reset", service.run("id --user alice").strip()
    in_a_session(service, f"{reset} hers", seat="seat0")
    said = in_a_session(service, f"{reset} hers", code=4)
    assert "after authentication only (org.sessiond.overlay1.reset-own)" in said
    said = in_a_session(service, f"{reset} kiosk", code=4, seat="seat0")
    assert "after authentication only (org.sessiond.overlay1.reset-other)" in said
    service.run("cat /run/sessiond/sessions/kiosk/root/note")

    requests = journal(service, since, f"MESSAGE_ID={Event.REQUEST}", f"SESSIOND_CALLER_UID={uid}")
    assert [
        (one["SESSIOND_SESSION"], one["SESSIOND_USER"], one["SESSIOND_OPERATION"])
        for one in requests
    ] == [("hers", "alice", "reset")] * 2 + [("kiosk", "root", "reset")]
    outcomes = [one["SESSIOND_OUTCOME"] for one in requests]
    assert outcomes == ["started", "refused", "refused"]
    assert {one["_SYSTEMD_UNIT"] for one in requests} == {"sessiond.service"}
    (ended,) = journal(
        service, since, f"MESSAGE_ID={Event.JOB_ENDED}", f"SESSIOND_CALLER_UID={uid}"
    )
    assert (ended["SESSIOND_JOB"], ended["SESSIOND_OUTCOME"]) == (
        requests[0]["SESSIOND_JOB"],
        "succeeded",
    )


@pytest.fixture
def alice(service: Machine) -> Iterator[str]:
    """A user who can log in, with four sessions; and her uid."""
    service.run("id alice || useradd --create-home alice")
    for number in range(4):
        service.run(f"sessionctl create alice guest --id hers-{number}")
    yield service.run("id --user alice").strip()
    service.run("sessionctl close hers-0")  # persisted, it would outlive the service


def test_each_method_of_who_is_at_the_machine(service: Machine, alice: str) -> None:
    """She may all that is hers without a password, and nothing else."""

    def called(*sessions: str) -> dict[str, list[str]]:
        visit = f"{PYTHON} -m tests.matrix.visit {' '.join(sessions)}"
        found = json.loads(in_a_session(service, visit, seat="seat0"))
        assert found
        return found  # type: ignore[no-any-return]

    service.run(f"sessionctl reset kiosk; echo note >{ROOT}/note; sessionctl snapshot kiosk first")
    service.run("sessionctl snapshot hers-0 first")
    own, others = called("hers-0", "hers-1", "hers-2"), called("kiosk", "kiosk", "kiosk")
    assert own.keys() == others.keys()
    refused = {"InteractiveAuthorizationRequired", "NotAuthorized"}
    for entry in METHODS:
        if entry.by is By.ANYONE:
            continue
        (outcome, said) = own[str(entry)]
        assert (outcome in refused) is (entry.by is By.ROOT), f"{entry}: {outcome}: {said}"
        assert others[str(entry)][0] in refused, str(entry)
    service.run("cat /run/sessiond/sessions/kiosk/root/note")


def test_logind_knows_that_a_user_is_idle_who_is_logged_in(service: Machine, alice: str) -> None:
    login = "--property=PAMName=login --property=User=alice"
    seat = "--setenv=XDG_SEAT=seat0 --setenv=XDG_SESSION_TYPE=x11"
    service.run(f"systemd-run --quiet --unit desktop {login} {seat} sleep infinity")
    service.wait("loginctl show-user alice --property=State | grep --quiet active")
    session = service.run("loginctl show-user alice --value --property=Display").strip()
    path = service.run(
        "busctl --json=short call org.freedesktop.login1 /org/freedesktop/login1 "
        f"org.freedesktop.login1.Manager GetSession s {session}"
    )
    (path,) = json.loads(path)["data"]

    def next_reset(*, idle: bool) -> str:
        # As her desktop says it.
        hint = f"org.freedesktop.login1.Session SetIdleHint b {str(idle).lower()}"
        service.run(f"busctl call org.freedesktop.login1 {path} {hint}")
        service.run("sessionctl schedule-reset hers-3 --idle 1h")
        return 'sessionctl status hers-3 --json | grep --quiet \'"next_reset": "\''

    service.run(f"{next_reset(idle=False)} && exit 1; exit 0")
    service.wait(next_reset(idle=True))
    file = ROOT.replace("kiosk", "hers-3") + "/file"
    service.run(f"touch {file}; sessionctl schedule-reset hers-3 --idle 1s --warning 0s")
    service.wait(f"! test -e {file}")
    service.run("systemctl stop desktop")


def test_descriptors_outlive_the_process(machine: Machine) -> None:
    (machine.root / "srv/keeper.py").write_text(KEEPER)
    (machine.root / "etc/systemd/system/keeper.service").write_text(
        "[Service]\nType=notify\nFileDescriptorStoreMax=3\nRestart=always\n"
        f"ExecStart={PYTHON} /srv/keeper.py\n"
    )
    expected = "inherited {'note': 3} b'kept' False"
    machine.run("systemctl daemon-reload; systemctl start --no-block keeper")
    machine.wait("systemctl is-active keeper")
    assert (
        machine.run("journalctl --sync; journalctl --output=cat --unit keeper").count(expected) == 1
    )
    machine.run("systemctl restart keeper")
    assert (
        machine.run("journalctl --sync; journalctl --output=cat --unit keeper").count(expected) == 2
    )
    machine.run("systemctl stop keeper")
