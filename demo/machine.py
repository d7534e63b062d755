"""The machine of the demo: a private message bus, the daemon, and a program at work in the session.

Everything is below one temporary directory. Meant to be run in mount and process namespaces of its
own, as `make demo` does it; what is left over when the demo is killed goes with those.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

READY_WITHIN = 60.0
"""Seconds that a program has to start or to end."""

BUS_CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="false"/>
    <allow receive_sender="*" eavesdrop="false"/>
  </policy>
</busconfig>
"""

CONFIGURATION = """\
[daemon]
state_directory = {state}
runtime_directory = {runtime}

[profile.guest]
image = {image}
storage = "tmpfs"
size = "512M"
inodes = 500000
keep = []
"""

# Reads a line, answers with the note; its working directory is in the session all the time.
BYSTANDER = "while read -r _; do cat note 2>/dev/null || echo no note; done"


class DemoError(Exception):
    """Something is not as the demo tells it."""


class Machine:
    """Starts and stops programs; `cleanup` ends all of them and removes every trace."""

    def __init__(self, image: Path, cleanup: ExitStack) -> None:
        self._cleanup = cleanup
        self._daemon: subprocess.Popen[bytes] | None = None
        self._bystander: subprocess.Popen[str] | None = None
        # On disk, where persistent sessions belong; /tmp may be RAM.
        self._directory = Path(
            tempfile.mkdtemp("", "sessiond-demo-", os.environ.get("TMPDIR", "/var/tmp"))
        )
        cleanup.callback(remove, self._directory)
        self._directory.chmod(0o711)
        self.runtime = self._directory / "run"
        programs = Path(sys.executable).parent
        self._environment = os.environ | {
            "PATH": f"{programs}:{os.environ.get('PATH', os.defpath)}",
            "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={self._directory}/bus",
            "LC_ALL": "C.UTF-8",
        }
        self._configuration = self._directory / "sessiond.toml"
        self._configuration.write_text(
            CONFIGURATION.format(
                state=json.dumps(str(self._directory / "state")),
                runtime=json.dumps(str(self.runtime)),
                image=json.dumps(str(image)),
            )
        )

    def shell(self, command: str, *, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command line and return what it printed."""
        return subprocess.run(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=self._environment,
            check=check,
        )

    def start_bus(self) -> None:
        """Start a bus and wait until it listens."""
        configuration = self._directory / "bus.conf"
        configuration.write_text(BUS_CONFIGURATION.format(socket=self._directory / "bus"))
        log_name = self._directory / "bus.log"
        with open(log_name, "wb") as log:
            bus = subprocess.Popen(
                ["dbus-daemon", "--nofork", "--print-address", f"--config-file={configuration}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._cleanup.callback(stop, bus)
        assert bus.stdout is not None
        if not bus.stdout.readline():
            raise DemoError(f"dbus-daemon does not start. It says:\n{log_name.read_text()}")

    def start_daemon(self) -> None:
        """Start sessiond and wait until it says that it is ready."""
        ready = self._directory / "ready"
        ready.unlink(missing_ok=True)
        log_name = self._directory / "log"
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications,
            open(log_name, "ab") as log,
        ):
            notifications.bind(str(ready))
            daemon = subprocess.Popen(
                ["sessiond", "--config", str(self._configuration)],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=self._environment | {"NOTIFY_SOCKET": str(ready)},
            )
            self._daemon = daemon
            self._cleanup.callback(stop, daemon)
            if not wait_ready(daemon, notifications):
                raise DemoError(f"sessiond does not start. It says:\n{log_name.read_text()}")

    def stop_daemon(self) -> None:
        """End sessiond as systemd does."""
        assert self._daemon is not None
        code = stop(self._daemon)
        if code != 0:
            log = (self._directory / "log").read_text()
            raise DemoError(f"sessiond ended with code {code}. It says:\n{log}")

    def worker(self) -> int:
        """Return the id of the process that serves the one session that there is."""
        assert self._daemon is not None
        below = {self._daemon.pid}
        workers = []
        for status in sorted(
            Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parts[2])
        ):
            with suppress(OSError):  # it has just ended
                name, _, rest = status.read_text().partition("(")[2].rpartition(")")
                if int(rest.split()[1]) in below:
                    below.add(int(status.parts[2]))
                    workers += [int(status.parts[2])] if name == "sessiond-worker" else []
        (worker,) = workers
        return worker

    def start_bystander(self, directory: Path) -> None:
        """Start a program that works in `directory`."""
        self._bystander = subprocess.Popen(
            ["/bin/sh", "-c", BYSTANDER],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._cleanup.callback(stop, self._bystander)

    def ask_bystander(self) -> str:
        """Have the program read the note, and return what it read."""
        program = self._bystander
        assert program is not None
        assert program.stdin is not None
        assert program.stdout is not None
        print(file=program.stdin, flush=True)
        return program.stdout.readline().rstrip("\n")

    def stop_bystander(self) -> None:
        """End the program."""
        assert self._bystander is not None
        stop(self._bystander)


def wait_ready(daemon: subprocess.Popen[bytes], notifications: socket.socket) -> bool:
    """Return True when the daemon says that it is ready, False when it ends or takes too long."""
    ended = os.pidfd_open(daemon.pid)
    messages = notifications.fileno()
    try:
        while True:
            readable, _, _ = select.select([messages, ended], [], [], READY_WITHIN)
            if messages not in readable:
                return False
            if b"READY=1" in notifications.recv(4096).split(b"\n"):
                return True
    finally:
        os.close(ended)


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> int:
    """End a program, by force where it does not go; return its exit code."""
    process.terminate()
    try:
        return process.wait(READY_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def remove(directory: Path) -> None:
    """Unmount what is mounted below `directory` and delete it; never deletes through a mount."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for mount_point in reversed(mounts_below(directory)):
        subprocess.run(["umount", "--lazy", mount_point], check=False)
    left = mounts_below(directory)
    if left:
        print(f"demo: still mounted, so {directory} is not removed: {left}", file=sys.stderr)
    else:
        shutil.rmtree(directory)


def mounts_below(directory: Path) -> list[str]:
    """Return the mount points below `directory`, in the order in which they were mounted."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split(" ")[4] for line in table]
    return [point for point in points if Path(point).is_relative_to(directory)]
