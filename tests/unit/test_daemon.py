"""The daemon as a process: how it starts, reloads, ends, and says why it cannot."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sessiond import daemon as sessiond_daemon
from sessiond.config import DaemonTable, Profile
from sessiond.journal import SOCKET
from sessiond.session.mounts import SystemMounts
from sessiond.session.tree import remove_tree
from tests.support.bus import start_private_bus
from tests.support.journal import Journal

BOUND = 30.0
"""Seconds after which what is waited for counts as never happening."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users can look into, as they cannot into pytest's."""
    directory = Path(tempfile.mkdtemp(prefix="sessiond-daemon-"))
    directory.chmod(0o755)
    (directory / "image" / "etc").mkdir(parents=True)
    configure(directory, "")
    yield directory
    if os.geteuid() == 0:
        for target in SystemMounts().mounted_below(directory):
            SystemMounts().detach(target)
    remove_tree(directory)


@pytest.fixture
def bus(place: Path) -> Iterator[str]:
    with start_private_bus(place) as address:
        yield address


def configure(place: Path, more: str, daemon: str = "") -> None:
    (place / "sessiond.toml").write_text(
        f"""
        [daemon]
        state_directory = "{place}/state"
        runtime_directory = "{place}/run"
        {daemon}
        [profile.p]
        image = "{place}/image"
        size = "16M"
        {more}
        """
    )


def command(place: Path, *options: str) -> list[str]:
    program = [sys.executable, "-m", "sessiond.daemon"]
    return [*program, "--config", str(place / "sessiond.toml"), *options]


def run(place: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(place, *options),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND,
    )


class Systemd:
    """The end of sd_notify at which systemd listens."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(BOUND)
        self.address = str(path)

    def receive(self) -> list[str]:
        """Return the assignments of the next message."""
        return self._socket.recv(4096).decode().split("\n")

    def close(self) -> None:
        self._socket.close()


@contextmanager
def daemon(place: Path, bus: str, **more: str) -> Iterator[tuple[subprocess.Popen[str], Systemd]]:
    """A daemon that is ready; killed if the test does not end it."""
    with suppress(FileNotFoundError):
        (place / "notify").unlink()
    systemd = Systemd(place / "notify")
    environment = {"DBUS_SYSTEM_BUS_ADDRESS": bus, "NOTIFY_SOCKET": systemd.address}
    # A file, since workers that outlive it would keep a pipe open.
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            command(place), env=os.environ | environment | more, stderr=log, text=True
        )
    try:
        while systemd.receive()[0] != "READY=1":
            pass
        yield process, systemd
    finally:
        systemd.close()
        process.kill()
        process.wait()


def end(
    place: Path, process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM
) -> str:
    process.send_signal(number)
    assert process.wait(timeout=BOUND) == 0
    return (place / "log").read_text()


def test_check(place: Path) -> None:
    result = run(place, "--check")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{place}/sessiond.toml: the configuration is valid.\n"


def test_a_bad_configuration_is_a_line_for_each_mistake(place: Path) -> None:
    configure(place, 'storage = "disk"\ncolour = 1')
    for options in ((), ("--check",)):
        result = run(place, *options)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            f"sessiond: {place}/sessiond.toml: profile.p.storage: input should be 'tmpfs' or "
            "'persistent'.\n"
            f"sessiond: {place}/sessiond.toml: profile.p.colour: is unknown; allowed are: "
            f"{', '.join(Profile.model_fields)}.\n"
        )


def test_a_bad_configuration_leaves_nobody_stopped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of whom the daemon before has left a note, as a guess, in the default directory."""
    note = tmp_path / "halted/session"
    note.parent.mkdir()
    note.touch()
    monkeypatch.setattr(
        sessiond_daemon, "DaemonTable", lambda: DaemonTable(runtime_directory=tmp_path)
    )
    monkeypatch.setattr(sessiond_daemon, "log_to_journal_or_stderr", lambda: None)
    monkeypatch.setattr("faulthandler.enable", lambda: None)
    (place / "sessiond.toml").write_text("mistake = 1\n")
    arguments = ["--config", str(place / "sessiond.toml")]
    assert sessiond_daemon.main([*arguments, "--check"]) == 2
    assert note.exists()
    assert sessiond_daemon.main(arguments) == 2
    assert not note.exists()


def test_drop_ins_from_elsewhere(place: Path) -> None:
    (place / "more").mkdir()
    (place / "more" / "1.toml").write_text("x = 1")
    result = run(place, "--check", "--config-directory", str(place / "more"))
    assert result.returncode == 2
    assert result.stderr.startswith(f"sessiond: {place}/more/1.toml: x: is unknown")


def test_no_configuration(place: Path) -> None:
    (place / "sessiond.toml").unlink()
    result = run(place)
    assert result.returncode == 2
    assert re.fullmatch(r"sessiond: .*: cannot be read: No such file .*--config\.\n", result.stderr)


@pytest.mark.root
def test_not_root(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    result = subprocess.run(
        command(place), user=65534, capture_output=True, text=True, check=False, timeout=BOUND
    )
    assert result.returncode == 1
    assert re.fullmatch(r"sessiond: .* run as root; .*\n", result.stderr)


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")


@pytest.mark.root
@pytest.mark.usefixtures("as_root")
class TestAsRoot:
    def test_without_a_bus_sessions_are_served_all_the_same(self, place: Path) -> None:
        configure(place, '[session.kiosk]\nuser = "nobody"\nprofile = "p"')
        with daemon(place, f"unix:path={place}/bus") as (process, _):
            assert (place / "run" / "sessions" / "kiosk" / "root" / "etc").is_dir()
            stderr = end(place, process)
        assert f"There is no message bus at unix:path={place}/bus" in stderr
        assert SystemMounts().mounted_below(place) == []

    def test_one_line_without_dev_fuse(self, place: Path, bus: str) -> None:
        script = 'mount -t tmpfs none /dev && exec "$@"'
        result = subprocess.run(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "-", *command(place)],
            capture_output=True,
            text=True,
            check=False,
            timeout=BOUND,
        )
        assert result.returncode == 1
        assert re.fullmatch(r"sessiond: /dev/fuse cannot be opened: .*modprobe.*\n", result.stderr)

    def test_ready_reloading_stopping(self, place: Path, bus: str) -> None:
        configure(place, '[session.kiosk]\nuser = "nobody"\nprofile = "p"')
        root = place / "run" / "sessions" / "kiosk" / "root"
        with daemon(place, bus) as (process, systemd):
            # READY is not told before the configured sessions are mounted.
            assert SystemMounts().file_system(root) == "fuse.sessiond"
            configure(place, '[session.second]\nuser = "nobody"\nprofile = "p"')
            process.send_signal(signal.SIGHUP)
            reloading, now = systemd.receive()
            assert reloading == "RELOADING=1"
            assert re.fullmatch(r"MONOTONIC_USEC=\d+", now)
            assert systemd.receive()[0] == "READY=1"
            assert SystemMounts().file_system(root.parents[1] / "second" / "root") is not None
            configure(place, "colour = 1")
            process.send_signal(signal.SIGHUP)
            assert systemd.receive()[0] == "RELOADING=1"
            assert systemd.receive()[0] == "READY=1"
            stderr = end(place, process)
            assert systemd.receive() == ["STOPPING=1", "STATUS=Ending 2 sessions."]
        assert "colour: is unknown" in stderr
        assert "The configuration is kept as it was" in stderr
        assert SystemMounts().mounted_below(place) == []

    def test_a_second_daemon_touches_nothing(self, place: Path, bus: str) -> None:
        configure(place, '[session.kiosk]\nuser = "nobody"\nprofile = "p"')
        with daemon(place, bus) as (process, _):
            before = SystemMounts().mounted_below(place)
            result = run(place, DBUS_SYSTEM_BUS_ADDRESS=bus)
            assert result.returncode == 1
            assert re.fullmatch(r"sessiond: Another sessiond uses .*\n", result.stderr)
            assert SystemMounts().mounted_below(place) == before
            end(place, process, signal.SIGINT)

    def test_a_killed_daemon_is_succeeded(self, place: Path, bus: str) -> None:
        configure(place, '[session.kiosk]\nuser = "nobody"\nprofile = "p"')
        root = place / "run" / "sessions" / "kiosk" / "root"
        with daemon(place, bus):
            (root / "etc" / "file").write_text("kept")
        with daemon(place, bus) as (process, _):
            assert (root / "etc" / "file").read_text() == "kept"
            end(place, process)

    def test_a_restart_keeps_volatile_sessions(self, place: Path, bus: str) -> None:
        configure(place, '[session.kiosk]\nuser = "nobody"\nprofile = "p"')
        root = place / "run" / "sessions" / "kiosk" / "root"
        with daemon(place, bus) as (process, systemd):
            (root / "etc" / "file").write_text("kept")
            stderr = end(place, process, signal.SIGUSR1)
            assert systemd.receive()[0] == "STOPPING=1"
        assert "because of SIGUSR1; 1 sessions are left" in stderr
        with daemon(place, bus) as (process, _):
            assert (root / "etc" / "file").read_text() == "kept"
            end(place, process)

    def test_the_watchdog_is_fed(self, place: Path, bus: str) -> None:
        with daemon(place, bus, WATCHDOG_USEC="20000") as (process, systemd):
            for _ in range(3):
                assert systemd.receive() == ["WATCHDOG=1"]
            end(place, process)

    def test_a_missing_image_stops_nothing_else(self, place: Path, bus: str) -> None:
        configure(
            place,
            f"""
            [profile.broken]
            image = "{place}/missing.squashfs"
            [session.broken]
            user = "nobody"
            profile = "broken"
            [session.kiosk]
            user = "nobody"
            profile = "p"
            """,
        )
        with daemon(place, bus) as (process, _):
            assert (place / "run" / "sessions" / "kiosk" / "root" / "etc").is_dir()
            stderr = end(place, process)
        assert "Session broken is not created: Image" in stderr

    def test_what_is_logged_goes_to_the_journal(self, place: Path) -> None:
        (place / "journal").mkdir()
        journal = Journal(place / "journal" / "socket")
        try:
            assert self.log_beside_journal(place) == ""
            fields = dict(journal.receive())
        finally:
            journal.close()
        assert re.fullmatch(rb".*/run cannot be used.*", fields["MESSAGE"])
        assert fields["PRIORITY"] == b"2"
        assert fields["CODE_FUNC"] == b"_say"

    def test_lines_for_the_journal_have_priorities(self, place: Path) -> None:
        (place / "journal").mkdir()
        assert re.fullmatch(r"<2>.*/run cannot be used.*\n", self.log_beside_journal(place))

    def log_beside_journal(self, place: Path) -> str:
        """Run a daemon that fails, with stderr connected to the journal, whose directory is
        `place`/journal; return what it writes there.
        """
        script = (
            'mount -t tmpfs none /run; mkdir -p "$2"; mount --bind "$1" "$2"; shift 2; exec "$@"'
        )
        private = ["unshare", "-m", "--propagation", "private", "sh", "-euc", script, "-"]
        places = [str(place / "journal"), str(SOCKET.parent)]
        log = place / "log"
        with log.open("w") as stream:
            inode = os.fstat(stream.fileno())
            environment = {"JOURNAL_STREAM": f"{inode.st_dev}:{inode.st_ino}"}
            (place / "run").write_text("in the way")
            subprocess.run(
                [*private, *places, *command(place)],
                env=os.environ | environment,
                stderr=stream,
                timeout=BOUND,
            )
        return log.read_text()

    def test_metrics_are_there_while_it_runs(self, place: Path, bus: str) -> None:
        file = place / "sessiond.prom"
        for number, stays in ((signal.SIGUSR1, True), (signal.SIGTERM, False)):
            file.unlink(missing_ok=True)
            configure(
                place, '[session.kiosk]\nuser = "nobody"\nprofile = "p"', f'metrics = "{file}"'
            )
            with daemon(place, bus) as (process, _):
                deadline = time.monotonic() + BOUND
                while not file.exists():
                    assert time.monotonic() < deadline
                assert "# TYPE sessiond_sessions gauge" in file.read_text()
                end(place, process, number)
            assert file.exists() == stays
