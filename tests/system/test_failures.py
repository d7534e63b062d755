"""What goes wrong is said in one line, and breaks nothing else."""

from __future__ import annotations

import subprocess

import pytest

from sessiond.cli.exit_codes import ExitCode
from tests.support.daemon import BOUND, MANAGER, Daemon


def add(daemon: Daemon, text: str) -> None:
    with open(daemon.configuration, "a") as configuration:
        configuration.write(text + "\n")


def test_a_full_upper(idle_daemon: Daemon) -> None:
    image = idle_daemon.directory / "image"
    add(idle_daemon, f'[profile.small]\nimage = "{image}"\nsize = "2M"')
    idle_daemon.start()
    idle_daemon.sessionctl("create", "root", "small", "--id", "one")
    root = idle_daemon.root("one")
    filled = subprocess.run(
        ["dd", "if=/dev/zero", f"of={root}/fill", "bs=64k"], capture_output=True, text=True
    )
    assert "No space left on device" in filled.stderr
    assert (root / "etc/motd").read_text() == "Welcome.\n"
    with pytest.raises(OSError, match="No space left on device"):
        (root / "etc/motd").write_bytes(b"x" * 100000)
    idle_daemon.sessionctl("reset", "one")
    assert idle_daemon.differences("one") == {}
    (root / "etc/motd").write_text("There is room again.\n")


@pytest.mark.parametrize("content", [b"", b"hsqs" + bytes(8192), b"no image at all" * 1000])
def test_a_corrupt_image(idle_daemon: Daemon, content: bytes) -> None:
    image = idle_daemon.directory / "corrupt.squashfs"
    image.write_bytes(content)
    add(idle_daemon, f'[profile.corrupt]\nimage = "{image}"')
    add(idle_daemon, '[session.bad]\nuser = "root"\nprofile = "corrupt"')
    add(idle_daemon, '[session.good]\nuser = "root"\nprofile = "guest"')
    idle_daemon.start()
    assert idle_daemon.sessions()["good"]["state"] == "active"
    done = idle_daemon.sessionctl("create", "root", "corrupt", code=ExitCode.IMAGE_UNAVAILABLE)
    assert str(image) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_image(idle_daemon: Daemon) -> None:
    add(idle_daemon, '[profile.missing]\nimage = "/nonexistent.squashfs"')
    idle_daemon.start()
    done = idle_daemon.sessionctl("create", "root", "missing", code=ExitCode.IMAGE_UNAVAILABLE)
    assert "/nonexistent.squashfs" in done.stderr


def test_malformed_ids_over_the_bus(daemon: Daemon) -> None:
    for name in ("a/b", "..", "", "new\nline", "-dash", "größe", "x" * 65):
        arguments = ("ssa{sv}", "root", "guest", "1", "id", "s", name)
        said = daemon.busctl("call", "--", *MANAGER, "CreateSession", *arguments, code=1)
        assert "session id" in said
    assert daemon.sessions() == {}


def test_an_unknown_user(daemon: Daemon) -> None:
    done = daemon.sessionctl("create", "no-such-user", "guest", code=ExitCode.USAGE)
    assert "no-such-user" in done.stderr


def test_a_closed_session(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "guest", "--id", "one")
    daemon.sessionctl("close", "one")
    for command in ("reset", "status", "diff", "close", "persist"):
        daemon.sessionctl(command, "one", code=ExitCode.NOT_FOUND)


def start_in_vain(daemon: Daemon) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        daemon.command(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=daemon.environment,
        timeout=BOUND,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str, code: int) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_second_daemon(daemon: Daemon) -> None:
    assert_one_line(start_in_vain(daemon), "Another sessiond", code=1)
    daemon.sessionctl("list")


def test_a_mistake_in_the_configuration(idle_daemon: Daemon) -> None:
    add(idle_daemon, '[profile.wrong]\nimage = "/"\nstorge = "tmpfs"')
    done = start_in_vain(idle_daemon)
    assert_one_line(done, str(idle_daemon.configuration), "profile.wrong.storge", code=2)
