"""A machine of a test's own: a Debian root, booted with its own systemd by systemd-nspawn(1)."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.mounts import detach

CHECKOUT = Path(__file__).parents[2]
BOUND = 60.0
"""Seconds within which the machine boots, ends, or obeys a command, or else the test fails."""

_DISK_BYTES = 64 << 20

_PROGRAMS = {
    "sessiond": "sessiond.daemon",
    "sessionctl": "sessiond.cli.main",
}
SOURCE = "/opt/sessiond"
"""Where the machine sees this checkout."""
_LIBRARIES = Path(SOURCE) / Path(sysconfig.get_path("purelib")).relative_to(CHECKOUT)
PYTHON = f"/usr/bin/env PYTHONPATH={SOURCE}:{_LIBRARIES} PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3"
"""The command for a Python there that finds this project and what it needs."""


class Machine:
    """One that runs; `root` is its root directory, and `leader` its first process."""

    def __init__(self, root: Path, leader: int) -> None:
        self.root = root
        self._leader = leader

    def run(self, command: str, *, code: int = 0) -> str:
        """Run a shell command there as root; it has to end with `code`. Return what it printed."""
        done = subprocess.run(
            ["nsenter", "-t", str(self._leader), "-a", "/bin/sh", "-euc", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BOUND,
        )
        assert done.returncode == code, (command, done.returncode, done.stdout)
        return done.stdout

    def wait(self, command: str) -> None:
        """Return once a shell command succeeds."""
        deadline = time.monotonic() + BOUND
        while subprocess.call(
            ["nsenter", "-t", str(self._leader), "-a", "/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ):
            assert time.monotonic() < deadline, f"it does not come about: {command}"


@contextmanager
def booted(
    image: Path, directory: Path, install: Callable[[Path], None] | None = None
) -> Iterator[Machine]:
    """Boot the file system in the file `image`, with sessiond installed but not enabled.

    Or else with what `install` does in its root. What it writes is gone with it: to RAM, or of
    sessiond to a disk. Its files are in `directory`, and its processes in a cgroup of their own.
    Raises `CannotBoot`.
    """
    points = [directory / name for name in ("image", "ram", "root", "disk")]
    for point in points:
        point.mkdir()
    console, group = directory / "console", f"sessiond-test-{secrets.token_hex(4)}"
    try:
        _mount("-o", "loop,ro", image, points[0])
        _mount("-t", "tmpfs", "machine", points[1])
        upper, work = points[1] / "upper", points[1] / "work"
        upper.mkdir()
        work.mkdir()
        layers = f"lowerdir={points[0]},upperdir={upper},workdir={work}"
        _mount("-t", "overlay", "-o", layers, "machine", points[2])
        (install or install_project)(points[2])
        _mount_disk(directory / "disk.ext4", points[3])
        fuse = points[1] / "fuse"
        os.mknod(fuse, 0o666 | 0o020000, os.makedev(10, 229))
        with open(console, "wb") as log:
            process = subprocess.Popen(
                [*_START, group, points[2], fuse, CHECKOUT, SOURCE, points[3]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            machine = Machine(points[2], _leader(process, console))
            machine.wait("test -S /run/dbus/system_bus_socket")
            # Whether all its own units can run in a container is no matter here.
            machine.run("systemctl is-system-running --wait || true")
            yield machine
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(BOUND)
    finally:
        for point in reversed(points):
            detach(str(point))
        for group_directory in Path("/sys/fs/cgroup").glob(f"**/{group}"):
            _remove_group(group_directory)
        with suppress(FileNotFoundError):
            Path(f"/run/systemd/nspawn/propagate/{group}").rmdir()
        print(console.read_text(errors="replace") if console.exists() else "")


class CannotBoot(Exception):
    """This machine cannot start another one; the message is why."""


# In the hierarchies of systemd, wherever they are, since it may manage only what is its own.
_BOOT = """
for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
    [ -e "$hierarchy/cgroup.procs" ] || continue
    mkdir "$hierarchy/$1"
    echo $$ >"$hierarchy/$1/cgroup.procs"
done
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
exec systemd-nspawn --quiet --boot --machine="$1" --directory="$2" --bind="$3:/dev/fuse" \
    --bind-ro="$4:$5" --bind="$6:/var/lib/sessiond" --capability=all --private-network \
    --register=no --keep-unit --console=read-only
"""


_START = ("/bin/sh", "-euc", _BOOT, "boot")


def _mount_disk(file: Path, target: Path) -> None:
    """Mount what persistent sessions can be on; the machine's root is no such thing."""
    with open(file, "wb") as image:
        image.truncate(_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", file], check=True, timeout=BOUND)
    _mount("-o", "loop", file, target)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=BOUND)


def install_project(root: Path) -> None:
    """Do what packaging/install does, except that the programs run from this checkout."""
    units = "usr/local/lib/systemd/system"
    installed = {
        "units/sessiond.service": units,
        "units/sessiond-kiosk@.service": units,
        "units/sessiond-user@.service": units,
        "units/user@.service.d/50-sessiond.conf": f"{units}/user@.service.d",
        "packaging/dbus/org.sessiond.Overlay1.service": "usr/local/share/dbus-1/system-services",
        "packaging/dbus/org.sessiond.Overlay1.conf": "etc/dbus-1/system.d",
        "packaging/polkit/org.sessiond.overlay1.policy": "usr/share/polkit-1/actions",
        "packaging/pam/sessiond": "usr/share/pam-configs",
        "packaging/pam/sessiond-login": "usr/local/sbin",
    }
    for directory in (*installed.values(), "etc/sessiond", "usr/local/bin"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    for file, directory in installed.items():
        shutil.copy(CHECKOUT / file, root / directory)
    for name, module in _PROGRAMS.items():
        program = root / "usr/local/bin" / name
        program.write_text(f'#!/bin/sh\nexec {PYTHON} -m {module} "$@"\n')
        program.chmod(0o755)


def _leader(process: subprocess.Popen[bytes], console: Path) -> int:
    """Return the pid of the machine's init."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + BOUND
    while process.poll() is None:
        # Others come and go before it, and cannot be looked at once they are dead.
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                if os.readlink(f"/proc/{child}/ns/pid") != os.readlink("/proc/self/ns/pid"):
                    return child
        assert time.monotonic() < deadline, console.read_text(errors="replace")
    raise CannotBoot(console.read_text(errors="replace"))


def _remove_group(directory: Path) -> None:
    for below in sorted(directory.rglob("*/"), reverse=True):
        below.rmdir()
    directory.rmdir()
