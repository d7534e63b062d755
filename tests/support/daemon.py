"""The whole daemon on a bus of its own, below one directory; started as often as a test wants."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.bus import start_private_bus
from tests.support.mounts import detach

BOUND = 60.0
"""Seconds within which a program starts, ends or answers, or else the test fails."""

MANAGER = (
    "org.sessiond.Overlay1",
    "/org/sessiond/Overlay1",
    "org.sessiond.Overlay1.Manager",
)


class Daemon:
    """sessiond with its directories, its bus and its clients."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory = directory
        self.runtime = directory / "run"
        self.state = directory / "state"
        self.configuration = directory / "sessiond.toml"
        self.environment = os.environ | {
            "DBUS_SYSTEM_BUS_ADDRESS": address,
            "LC_ALL": "C.UTF-8",
        }
        self._sessionctl = (sys.executable, "-m", "sessiond.cli.main")
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, tables: Mapping[str, Mapping[str, str | int]]) -> None:
        """Write the configuration: tables by their full names, such as ``profile.guest``.

        Unless it says where, no guests can be made: they would be the machine's.
        """
        directories = {
            "state_directory": str(self.state),
            "runtime_directory": str(self.runtime),
        }
        daemon = {**directories, **tables.get("daemon", {})}
        guests = {"home": str(self.directory / "nowhere"), **tables.get("guests", {})}
        lines = []
        for name, table in {**tables, "daemon": daemon, "guests": guests}.items():
            lines.append(f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        self.configuration.write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start it and wait until it is ready."""
        ready = self.directory / "ready"
        ready.unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications,
            open(self._log, "ab") as log,
        ):
            notifications.bind(str(ready))
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=self.environment | {"NOTIFY_SOCKET": str(ready)},
            )
            self._wait_ready(self._process, notifications)

    def command(self) -> list[str]:
        """Return the command line of the daemon."""
        return [sys.executable, "-m", "sessiond.daemon", "--config", str(self.configuration)]

    def _wait_ready(self, process: subprocess.Popen[bytes], notifications: socket.socket) -> None:
        ended = os.pidfd_open(process.pid)
        messages = notifications.fileno()
        waiting = select.poll()  # a test run may have more than select(2) takes
        waiting.register(messages, select.POLLIN)
        waiting.register(ended, select.POLLIN)
        try:
            while True:
                readable = [fd for fd, _ in waiting.poll(BOUND * 1000)]
                assert messages in readable, f"sessiond did not start: {self.log()}"
                if b"READY=1" in notifications.recv(4096).split(b"\n"):
                    return
        finally:
            os.close(ended)

    def stop(self) -> None:
        """End it as systemd does; it has to end well."""
        code = self._end(signal.SIGTERM)
        assert code == 0, f"sessiond ended with code {code}: {self.log()}"

    def leave(self) -> None:
        """End it as systemd does to start another: sessions stay."""
        code = self._end(signal.SIGUSR1)
        assert code == 0, f"sessiond ended with code {code}: {self.log()}"

    def reload(self) -> None:
        """Have it read its configuration again; that goes on when this returns."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """End the manager without a chance to do anything; its workers live on."""
        self._end(signal.SIGKILL)

    def kill_all(self) -> None:
        """The same, and the workers with it."""
        workers = self.workers()
        self.kill()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

    def workers(self) -> list[int]:
        """Return the pids of all workers that serve sessions of its runtime directory."""
        found = []
        bus = f"DBUS_SYSTEM_BUS_ADDRESS={self.environment['DBUS_SYSTEM_BUS_ADDRESS']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                # A zombie, which nobody has waited for yet, has no environment; and those of tests
                # that run at the same time have another bus.
                if (process / "comm").read_text() == "sessiond-worker\n" and bus in (
                    process / "environ"
                ).read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return sorted(found)

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(number)
        return process.wait(BOUND)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Return what it has said so far."""
        return self._log.read_text() if self._log.exists() else ""

    def root(self, session: str) -> Path:
        """Return where the merged view of a session is."""
        return self.runtime / "sessions" / session / "root"

    def sessionctl(
        self, *arguments: str, code: int = 0, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run sessionctl with `typed` for its input; it has to end with `code`."""
        done = subprocess.run(
            [*self._sessionctl, *arguments],
            input=typed,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env=self.environment,
            timeout=BOUND,
        )
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done

    @contextmanager
    def calling(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Have sessionctl run meanwhile, whatever comes of it."""
        with subprocess.Popen(
            [*self._sessionctl, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        ) as process:
            yield process

    def record(self, session: str) -> bytes:
        """Return what is recorded of a volatile session."""
        return (self.runtime / "sessions" / session / "session.json").read_bytes()

    def run(self, session: str, script: str, *, code: int = 0) -> str:
        """Run a shell script in a session, and return what it printed."""
        return self.sessionctl("run", session, "--", "sh", "-euc", script, code=code).stdout

    @contextmanager
    def inside(self, session: str, script: str) -> Iterator[subprocess.Popen[bytes]]:
        """Have a shell script run in a session, with pipes to its input and output."""
        process = subprocess.Popen(
            [*self._sessionctl, "run", session, "--", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
        )
        with process:
            try:
                yield process
            finally:
                process.terminate()

    def differences(self, session: str) -> dict[str, str]:
        """Return how each path differs from the image."""
        lines = self.sessionctl("diff", session, "--json").stdout.splitlines()
        return {one["path"]: one["kind"] for one in map(json.loads, lines)}

    def sessions(self) -> dict[str, dict[str, object]]:
        """Return the sessions by their ids."""
        listed = json.loads(self.sessionctl("list", "--json").stdout)
        return {session["id"]: session for session in listed}

    def snapshots(self, session: str) -> list[str]:
        """Return the names of a session's snapshots, oldest first."""
        listed = json.loads(self.sessionctl("snapshots", session, "--json").stdout)
        return [snapshot["name"] for snapshot in listed]

    def wait_idle(self, session: str) -> None:
        """Wait until no job runs on a session."""
        wait_until(lambda: self.sessions()[session]["state"] == "active")

    def busctl(self, *arguments: str, code: int = 0) -> str:
        """Call busctl, and return what it printed."""
        done = subprocess.run(
            ["busctl", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=BOUND,
        )
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def mounts(self) -> list[str]:
        """Return what is mounted below its directory."""
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            points = [line.split(" ")[4] for line in table]
        return [point for point in points if Path(point).is_relative_to(self.directory)]

    def clean_up(self) -> None:
        """End it, and undo whatever is left mounted."""
        if self._process is not None:
            self._end(signal.SIGKILL)
        for mount_point in reversed(self.mounts()):
            detach(mount_point)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; each attempt has to take its time, as calls of programs do."""
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"


@contextmanager
def own_daemon() -> Iterator[Daemon]:
    """Yield a daemon that is neither configured nor started yet; leave no trace of it."""
    # On disk, where persistent sessions belong; and open to users, as pytest's directories are not.
    directory = Path(tempfile.mkdtemp(prefix="sessiond-test-", dir="/var/tmp"))
    directory.chmod(0o711)
    with start_private_bus(directory) as address:
        daemon = Daemon(directory, address)
        try:
            yield daemon
        finally:
            daemon.clean_up()
            print(daemon.log())  # pytest shows it when the test fails
    assert daemon.mounts() == []
    assert "Traceback" not in daemon.log()
    # Workers may still be removing what is theirs, which shutil.rmtree does not put up with.
    subprocess.run(["rm", "-rf", directory], check=True)
