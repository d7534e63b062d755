"""Entering a session's root: as whom, with what, and what a hostile tree can do about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.cli.enter import Account
from sessiond.errors import Failed
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.users import NOBODY

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="entering a session takes root"),
]

DRIVER = """
import sys
from sessiond.cli.enter import Account, enter
from sessiond.errors import SessiondError
root, uid, *arguments = sys.argv[1:]
try:
    enter(root, Account.of(int(uid)), arguments[0], arguments)
except SessiondError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """This machine's root file system, writable: what is changed goes to a tmpfs."""
    writable, merged = tmp_path / "writable", tmp_path / "merged"
    for directory in (writable, merged):
        directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", writable], check=True)
    try:
        for name in ("upper", "work"):
            (writable / name).mkdir()
        layers = Layers(("/",), f"{writable}/upper", f"{writable}/work")
        with KernelOverlay().mounted(layers, str(merged)):
            yield merged
    finally:
        subprocess.run(["umount", writable], check=True)


def run(
    root: Path, *command: str, uid: int = NOBODY, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, root, str(uid), *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={
            "PATH": "/opt/elsewhere",
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
            "SECRET": "the caller's",
        },
        pass_fds=pass_fds,
        timeout=60,
    )


def test_the_command_runs_as_the_user_in_the_users_home(root: Path) -> None:
    account = Account.of(NOBODY)
    done = run(root, "sh", "-c", "id -u; id -g; id -G; pwd; umask")
    assert done.stderr == ""
    groups = " ".join(str(group) for group in account.groups)
    assert done.stdout.splitlines() == [str(NOBODY), str(account.gid), groups, "/", "0022"]


def test_a_user_that_the_host_does_not_know_is_refused() -> None:
    with pytest.raises(Failed, match="no user with the id 3999999"):
        Account.of(3999999)


def test_what_is_changed_stays_in_the_session(root: Path) -> None:
    done = run(root, "sh", "-c", "echo changed >/etc/motd && rm /etc/hostname", uid=0)
    assert done.returncode == 0, done.stderr
    assert (root / "etc/motd").read_text() == "changed\n"
    assert not (root / "etc/hostname").exists()
    assert Path("/etc/hostname").exists()


def test_devices_and_the_kernels_file_systems_are_the_hosts(root: Path) -> None:
    script = "test -c /dev/null && test -e /proc/self/status && test -d /sys/kernel && ls -id /run"
    done = run(root, "sh", "-c", script)
    assert done.stdout.split() == [str(Path("/run").stat().st_ino), "/run"], done.stderr


def test_the_host_sees_none_of_the_mounts(root: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    assert run(root, "true").returncode == 0
    assert Path("/proc/self/mountinfo").read_text() == before


def test_the_environment_is_that_of_a_login(root: Path) -> None:
    account = Account.of(NOBODY)
    done = run(root, "env")
    assert dict(line.split("=", 1) for line in done.stdout.splitlines()) == {
        "HOME": account.home,
        "LC_ALL": "C.UTF-8",
        "LOGNAME": account.name,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "SHELL": account.shell,
        "TERM": "dumb",
        "USER": account.name,
    }


def test_no_descriptor_of_the_caller_is_passed_on(root: Path) -> None:
    with open("/etc/passwd", "rb") as secret:
        done = run(root, "sh", "-c", "ls /proc/$$/fd", pass_fds=(secret.fileno(),))
    assert done.stdout.split() == ["0", "1", "2"]


def test_signals_that_python_ignores_are_not_ignored_by_the_command(root: Path) -> None:
    done = run(root, "grep", "^SigIgn", "/proc/self/status")
    ignored = int(done.stdout.split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not ignored & 1 << number - 1


def test_groups_are_the_hosts_whatever_the_session_says(root: Path) -> None:
    name = Account.of(NOBODY).name
    (root / "etc/group").write_text(f"root:x:0:{name}\n")
    done = run(root, "grep", "^Groups", "/proc/self/status")
    assert "0" not in done.stdout.split()[1:]


@pytest.mark.parametrize("name", ["dev", "proc", "run", "sys"])
def test_a_symlink_in_place_of_a_mount_target_is_refused(root: Path, name: str) -> None:
    (root / name).rename(root / "moved")
    (root / name).symlink_to("/etc")
    done = run(root, "true")
    assert done.returncode == 1
    assert done.stderr.startswith(f"NotSupported: /{name} of the session is no directory")


def test_a_file_in_place_of_a_mount_target_is_refused(root: Path) -> None:
    (root / "sys").rmdir()
    (root / "sys").touch()
    assert "NotSupported: /sys of the session is no directory" in run(root, "true").stderr


def test_a_missing_mount_target_is_left_out(root: Path) -> None:
    (root / "sys").rmdir()
    done = run(root, "sh", "-c", "test ! -e /sys && test -c /dev/null")
    assert done.returncode == 0, done.stderr


def test_a_symlink_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to("/")
    done = run(tmp_path / "root", "true")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Failed: The session's root {tmp_path}/root cannot be entered")
