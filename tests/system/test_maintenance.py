"""Maintenance: root changes an image in a session, and all that can come in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sessiond.cli.exit_codes import ExitCode
from sessiond.session.images import digest_of
from tests.support import trees
from tests.support.daemon import BOUND, Daemon, own_daemon, wait_until

IMAGE: trees.Tree = {
    "etc": {"motd": b"Welcome.\n", "old": b"x" * 100_000},
    "bin": {"a": b"#!", "b": trees.Link("bin/a")},
    **{name: {} for name in ("dev", "proc", "run", "sys", "root")},
}

CHANGE = """
import os, sys
os.chdir(sys.argv[1])
open("etc/motd", "w").write("Better.\\n")
os.remove("etc/old")
os.mkdir("srv", 0o751)
open("srv/new", "wb").write(bytes(range(256)) * 4096)
os.chown("srv/new", 7, 8)
os.chmod("srv/new", 0o6750)
os.setxattr("srv/new", "user.colour", b"green")
os.symlink("../etc/motd", "srv/link")
os.mkfifo("srv/fifo")
open("bin/a", "w").write("#!/bin/sh")
"""


def pack(directory: Path, kind: str) -> Path:
    content, image = directory / "content", directory / f"image.{kind}"
    content.mkdir()
    trees.build(IMAGE, str(content))
    command = {
        "squashfs": ["mksquashfs", content, image, "-quiet", "-no-progress", "-comp", "xz"],
        "erofs": ["mkfs.erofs", "--quiet", image, content],
        "ext4": ["mke2fs", "-q", "-t", "ext4", "-d", content, image, "8M"],
    }[kind]
    subprocess.run(command, check=True, capture_output=True)
    return image


@pytest.fixture(params=["squashfs"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon whose profiles are over an image file."""
    with own_daemon() as daemon:
        image = str(pack(daemon.directory, request.param))
        daemon.configure(
            {
                "profile.guest": {"image": image, "size": "64M"},
                "profile.desk": {
                    "image": image,
                    "storage": "persistent",
                    "image_changed": "rebase",
                },
                "profile.machine": {"image": "/"},
            }
        )
        daemon.start()
        yield daemon


def image_of(daemon: Daemon) -> Path:
    (image,) = (path for path in daemon.directory.glob("image.*") if path.suffix != ".old")
    return image


def status(daemon: Daemon) -> object:
    return json.loads(daemon.sessionctl("maintenance", "status", "--json").stdout)


def change(daemon: Daemon) -> None:
    """Change the image in the session, as an administrator would."""
    script = ["python3", "-c", CHANGE, str(daemon.root("maintenance"))]
    subprocess.run(script, check=True)


def contents(daemon: Daemon, session: str, path: str) -> str:
    return (daemon.root(session) / path).read_text()


def assert_over(daemon: Daemon) -> None:
    """Nothing is left of a maintenance."""
    assert status(daemon) is None
    assert not (daemon.state / "maintenance.json").exists()
    wait_until(lambda: "maintenance" not in daemon.sessions())
    assert "maintenance" not in os.listdir(daemon.state / "sessions")
    assert list(daemon.directory.glob(".image.*")) == []
    daemon.sessionctl("create", "nobody", "guest", "--id", "after")


@pytest.mark.parametrize(
    "daemon",
    ["squashfs", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("erofs", "ext4"))],
    indirect=True,
)
def test_an_image_is_changed(daemon: Daemon) -> None:
    image = image_of(daemon)
    before = image.read_bytes()
    image.chmod(0o640)
    daemon.sessionctl("create", "nobody", "guest", "--id", "at-work")
    daemon.sessionctl("create", "root", "desk", "--id", "desk")
    (daemon.root("desk") / "etc/own").write_text("mine")
    begun = daemon.sessionctl("maintenance", "begin", "guest", "--message", "Back at noon.")
    assert "Session maintenance is mounted" in begun.stdout
    assert status(daemon) == {
        "profile": "guest",
        "session": "maintenance",
        "message": "Back at noon.",
    }
    refused = daemon.sessionctl("create", "nobody", "guest", code=ExitCode.BUSY)
    assert "and no sessions are made meanwhile: Back at noon.\n" in refused.stderr
    again = daemon.sessionctl("maintenance", "begin", "guest", code=ExitCode.BUSY)
    assert "is being maintained" in again.stderr
    change(daemon)
    daemon.root("maintenance").chmod(0o751)
    daemon.sessionctl("maintenance", "finish")
    old = image.with_name(f"{image.name}.old")
    assert old.read_bytes() == before
    assert image.stat().st_mode & 0o7777 == 0o640
    assert (digest_of(image) or "").startswith(image.suffix.removeprefix("."))
    # Who is at work goes on with the old image, and others come on the new one.
    assert contents(daemon, "at-work", "etc/motd") == "Welcome.\n"
    assert_over(daemon)
    root = daemon.root("after")
    assert root.stat().st_mode & 0o7777 == 0o751
    assert (root / "etc/motd").read_text() == "Better.\n"
    assert not (root / "etc/old").exists()
    new = (root / "srv/new").stat()
    assert (new.st_mode & 0o7777, new.st_uid, new.st_gid, new.st_size) == (0o6750, 7, 8, 1 << 20)
    assert os.getxattr(root / "srv/new", "user.colour") == b"green"
    assert os.readlink(root / "srv/link") == "../etc/motd"
    assert (root / "srv/fifo").is_fifo()
    assert (root / "bin/b").read_text() == "#!/bin/sh"
    # At its next start, the persistent session is on the new one as well.
    daemon.stop()
    daemon.start()
    assert contents(daemon, "desk", "etc/motd") == "Better.\n"
    assert contents(daemon, "desk", "etc/own") == "mine"


def test_it_can_be_given_up(daemon: Daemon) -> None:
    image = image_of(daemon)
    before = image.read_bytes()
    daemon.sessionctl("maintenance", "begin", "guest")
    change(daemon)
    daemon.sessionctl("close", "maintenance")
    assert_over(daemon)
    assert image.read_bytes() == before
    said = daemon.sessionctl("maintenance", "cancel", code=ExitCode.FAILED).stderr
    assert said == "sessionctl: No maintenance is going on.\n"
    said = daemon.sessionctl("maintenance", "finish", code=ExitCode.FAILED).stderr
    assert said == "sessionctl: No maintenance is going on.\n"


@pytest.mark.soak
def test_what_cannot_be_maintained(daemon: Daemon) -> None:
    said = daemon.sessionctl("maintenance", "begin", "machine", code=ExitCode.NOT_SUPPORTED)
    assert "is a directory, which is changed where it is" in said.stderr
    daemon.sessionctl("maintenance", "begin", "none", code=ExitCode.NOT_FOUND)
    daemon.sessionctl("maintenance", "begin", code=ExitCode.USAGE)
    daemon.sessionctl("maintenance", "cancel", "guest", code=ExitCode.USAGE)
    assert_over(daemon)


@pytest.mark.soak
def test_an_image_that_was_replaced_meanwhile_is_left_alone(daemon: Daemon) -> None:
    image = image_of(daemon)
    daemon.sessionctl("maintenance", "begin", "guest")
    other = image.with_name("other")
    shutil.copyfile(image, other)
    other.rename(image)
    said = daemon.sessionctl("maintenance", "finish", code=ExitCode.FAILED).stderr
    assert "was replaced since the maintenance began" in said
    assert status(daemon) is not None
    daemon.sessionctl("maintenance", "cancel")
    assert_over(daemon)


@pytest.mark.soak
def test_an_image_that_is_not_what_the_session_shows_is_not_used(daemon: Daemon) -> None:
    image = image_of(daemon)
    before = image.read_bytes()
    daemon.sessionctl("maintenance", "begin", "guest")
    # What this kind of image cannot keep.
    motd = daemon.root("maintenance") / "etc/motd"
    os.setxattr(motd, "system.posix_acl_access", trees.acl(*ACL))
    said = daemon.sessionctl("maintenance", "finish", code=ExitCode.FAILED).stderr
    assert "etc/motd has other extended attributes or another ACL" in said
    assert image.read_bytes() == before
    os.removexattr(motd, "system.posix_acl_access")
    daemon.sessionctl("maintenance", "finish")
    assert_over(daemon)


ACL = [("u", None, 6), ("u", 7, 6), ("g", None, 4), ("m", None, 6), ("o", None, 4)]


NAP = 1000 + os.getpid()
"""Seconds for which no other process of a test run sleeps."""


def slow_tool(daemon: Daemon) -> None:
    """Have the image be made by a program that does not come to an end."""
    tools = daemon.directory / "tools"
    tools.mkdir()
    slow = tools / "mksquashfs"
    slow.write_text(f'#!/bin/sh\necho part >"$2"\nexec sleep {NAP}\n')
    slow.chmod(0o755)
    daemon.environment["PATH"] = f"{tools}:{os.environ['PATH']}"


def end_tools() -> None:
    """End what the dead have left."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cmdline").read_bytes() == b"sleep\0%d\0" % NAP:
                os.kill(int(process.name), signal.SIGKILL)


def test_the_daemon_is_killed_while_it_makes_the_image(daemon: Daemon) -> None:
    """Its death at any other moment: `tests.unit.session.maintenance_death`."""
    image = image_of(daemon)
    before = image.read_bytes()
    daemon.stop()
    slow_tool(daemon)
    daemon.start()
    daemon.sessionctl("maintenance", "begin", "guest")
    change(daemon)
    with daemon.calling("maintenance", "finish") as finishing:
        wait_until(lambda: list(daemon.directory.glob(".image.*")))
        daemon.kill()
        finishing.wait(BOUND)
    end_tools()
    daemon.environment["PATH"] = os.environ["PATH"]
    daemon.start()
    assert image.read_bytes() == before
    # It goes on, with all that was done in it.
    assert list(daemon.directory.glob(".image.*")) == []
    assert contents(daemon, "maintenance", "etc/motd") == "Better.\n"
    daemon.sessionctl("create", "nobody", "guest", code=ExitCode.BUSY)
    daemon.sessionctl("maintenance", "finish")
    assert_over(daemon)
    assert contents(daemon, "after", "etc/motd") == "Better.\n"


def test_it_is_cancelled_while_the_image_is_made(daemon: Daemon) -> None:
    daemon.stop()
    slow_tool(daemon)
    daemon.start()
    daemon.sessionctl("maintenance", "begin", "guest")
    with daemon.calling("maintenance", "finish") as finishing:
        wait_until(lambda: list(daemon.directory.glob(".image.*")))
        daemon.sessionctl("snapshot", "maintenance", "one", code=ExitCode.BUSY)
        daemon.sessionctl("maintenance", "cancel")
        assert finishing.wait(BOUND) == ExitCode.CANCELLED
    assert_over(daemon)


def test_a_state_that_makes_no_sense_ends_it(daemon: Daemon) -> None:
    daemon.sessionctl("maintenance", "begin", "guest")
    daemon.kill_all()
    (daemon.state / "maintenance.json").write_text("{")
    daemon.start()
    assert "makes no sense" in daemon.log()
    assert_over(daemon)
