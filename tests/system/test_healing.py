"""What a daemon finds at its start, and has to put in order: dead mounts, leftovers, damage."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import libc
from tests.support.daemon import Daemon, wait_until


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def leave_dead_mount(target: Path, *, fs_type: str = "fuse.sessiond") -> None:
    """Mount what answers every access with "Transport endpoint is not connected"."""
    device = os.open("/dev/fuse", os.O_RDWR)
    libc.mount("left", str(target), fs_type, 0, f"fd={device},rootmode=40000,user_id=0,group_id=0")
    os.close(device)
    with pytest.raises(OSError, match="Transport endpoint"):
        os.stat(target)


def write(daemon: Daemon, session: str) -> None:
    (daemon.root(session) / "etc/motd").write_text(f"This is {session}.\n")


def assert_served(daemon: Daemon, *sessions: str) -> None:
    found = daemon.sessions()
    for session in sessions:
        assert found[session]["state"] == "active", found[session]["failure"]
        assert (daemon.root(session) / "etc/motd").read_text() == f"This is {session}.\n"
        assert daemon.mounts().count(str(daemon.root(session))) == 1


def configure_mount_point(daemon: Daemon) -> Path:
    """Have a profile ``outside``, whose sessions are mounted outside the runtime directory."""
    target = daemon.directory / "home"
    with open(daemon.configuration, "a") as configuration:
        image = json.dumps(str(daemon.directory / "image"))
        place = json.dumps(str(target))
        configuration.write(f"[profile.outside]\nimage = {image}\nmount_point = {place}\n")
    return target


def test_dead_mounts(idle_daemon: Daemon) -> None:
    daemon = idle_daemon
    home = configure_mount_point(daemon)
    daemon.start()
    daemon.sessionctl("create", "root", "guest", "--id", "inside")
    daemon.sessionctl("create", "root", "outside", "--id", "outside")
    write(daemon, "inside")
    (home / "etc/motd").write_text("This is outside.\n")
    mount("--bind", daemon.directory / "image", daemon.root("inside") / "home")
    daemon.kill_all()
    leave_dead_mount(home)
    leave_dead_mount(home)
    leave_dead_mount(daemon.root("inside"))
    (daemon.runtime / "sessions/stranger/root").mkdir(parents=True)
    leave_dead_mount(daemon.runtime / "sessions/stranger/root")

    daemon.start()
    assert_served(daemon, "inside")
    assert (home / "etc/motd").read_text() == "This is outside.\n"
    assert daemon.mounts().count(str(home)) == 1
    assert not any("stranger" in target for target in daemon.mounts())
    assert "is unmounted: another sessiond has left it there" in daemon.log()


def test_a_mount_of_others_at_a_mount_point_stays(idle_daemon: Daemon) -> None:
    daemon = idle_daemon
    home = configure_mount_point(daemon)
    daemon.start()
    daemon.sessionctl("create", "root", "outside", "--id", "one")
    (home / "etc/motd").write_text("Kept.\n")
    daemon.kill_all()
    leave_dead_mount(home, fs_type="fuse.sshfs")
    daemon.start()
    session = daemon.sessions()["one"]
    assert session["state"] == "failed"
    assert "a fuse.sshfs is mounted there" in str(session["failure"])
    assert "fuse.sshfs is mounted there" in daemon.sessionctl("status", "one").stdout
    subprocess.run(["umount", "--lazy", home], check=True)
    daemon.reload()
    wait_until(lambda: daemon.sessions()["one"]["state"] == "active")
    assert (home / "etc/motd").read_text() == "Kept.\n"


def test_leftovers_of_images_and_of_half_made_sessions(daemon: Daemon) -> None:
    daemon.sessionctl("create", "root", "guest", "--id", "one")
    write(daemon, "one")
    daemon.kill_all()
    images = daemon.runtime / "images"
    for name in ("half-mounted", "not-mounted"):
        (images / name).mkdir()
    mount("-t", "tmpfs", "image", images / "half-mounted")
    (images / "foreign").write_text("no image")
    half_made = daemon.runtime / "sessions/half/storage"
    half_made.mkdir(parents=True)
    (half_made.parent / "session.new").touch()
    mount("-t", "tmpfs", "session", half_made)
    (half_made / "layers/1/fs").mkdir(parents=True)
    copied = daemon.state / "sessions/one/layers/1/fs"
    copied.mkdir(parents=True)
    (copied / "file").write_text("copied half-way")
    (daemon.state / "sessions/one/session.new").write_text('{"form')
    trash = daemon.state / "trash/deleted"
    (trash / "deep/deeper").mkdir(parents=True)

    daemon.start()
    assert_served(daemon, "one")
    wait_until(lambda: not trash.exists() and not half_made.exists())
    wait_until(lambda: not (daemon.state / "sessions/one").exists())
    assert not any("half" in target for target in daemon.mounts())
    assert sorted(path.name for path in images.iterdir())[1:] == ["foreign"]
    assert f"{images}/foreign is left where images are mounted" in daemon.log()
    assert "What was left of session half" in daemon.log()
    daemon.sessionctl("persist", "one")
    assert_served(daemon, "one")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def claim_newer_format(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1000, "new": True}))


def repeat_number(file: Path) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"next_layer": record["upper"]}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "EOF while parsing"),
    "empty": (lambda file: os.truncate(file, 0), "EOF while parsing"),
    "binary": (lambda file: file.write_bytes(bytes(range(256)) * 64), "expected value"),
    "lost": (lambda file: file.unlink(), "session.json, is missing"),
    "fifo": (replace_by_fifo, "no regular file"),
    "link": (replace_by_link, "no regular file"),
    "foreign": (lambda file: os.chown(file, 1000, 1000), "belongs to uid 1000"),
    "huge": (lambda file: os.truncate(file, 1 << 34), "more than 16777216 bytes"),
    "repeating": (repeat_number, "would be the next"),
}
"""What may happen to a record, and what is said of it."""


def test_damaged_records(daemon: Daemon) -> None:
    for name in ("good", "newer", *DAMAGE):
        daemon.sessionctl("create", "root", "lasting", "--id", name)
        write(daemon, name)
    good = (daemon.state / "sessions/truncated/session.json").read_bytes()
    daemon.stop()
    sessions = daemon.state / "sessions"
    for name, (damage, _) in DAMAGE.items():
        damage(sessions / name / "session.json")
    claim_newer_format(sessions / "newer/session.json")
    newer = (sessions / "newer/session.json").read_bytes()
    (sessions / "file").write_text("none of ours")
    (sessions / "dangling").symlink_to("nowhere")
    (sessions / "linked").symlink_to("good")
    (sessions / "lost+found").mkdir()

    daemon.start()
    assert set(daemon.sessions()) == {"good"}
    assert_served(daemon, "good")
    aside = {path.name.rpartition("-")[0]: path for path in (daemon.state / "set-aside").iterdir()}
    assert set(aside) == set(DAMAGE)
    for name, (_, complaint) in DAMAGE.items():
        (said,) = [line for line in daemon.log().splitlines() if f"Session {name} cannot" in line]
        assert complaint in said
        assert str(aside[name]) in said
        assert (aside[name] / "layers/1/fs/etc/motd").read_text() == f"This is {name}.\n"
    assert (sessions / "newer/session.json").read_bytes() == newer
    assert "Session newer is left as it is: " in daemon.log()
    for name in ("file", "dangling", "linked", "lost+found"):
        assert os.path.lexists(sessions / name)
        assert f"{sessions / name} is no directory of a session" in daemon.log()

    # A person can do what the log says.
    daemon.stop()
    (aside["truncated"] / "session.json").write_bytes(good)
    aside["truncated"].rename(sessions / "truncated")
    daemon.start()
    assert_served(daemon, "good", "truncated")


def test_an_image_that_is_missing_or_another(idle_daemon: Daemon) -> None:
    daemon = idle_daemon
    image, away = daemon.directory / "root.squashfs", daemon.directory / "away"
    pack = ["mksquashfs", daemon.directory / "image", image, "-quiet", "-no-progress"]
    subprocess.run(pack, check=True, capture_output=True)
    with open(daemon.configuration, "a") as configuration:
        configuration.write(f'[profile.packed]\nimage = "{image}"\nstorage = "persistent"\n')
    daemon.start()
    daemon.sessionctl("create", "root", "packed", "--id", "one")
    write(daemon, "one")
    daemon.stop()
    image.rename(away)
    (daemon.state / "sessions/one").stat()
    for replace, complaint in (
        (lambda: None, "No such file or directory"),
        (lambda: image.write_bytes(away.read_bytes()), "is not the one that session one"),
        (lambda: (image.unlink(), image.mkdir()), "is not the one that session one"),
    ):
        replace()
        daemon.start()
        session = daemon.sessions()["one"]
        assert session["state"] == "failed"
        assert complaint in str(session["failure"])
        assert complaint in daemon.sessionctl("status", "one").stdout
        daemon.stop()
    daemon.start()
    image.rmdir()
    away.rename(image)
    daemon.reload()
    wait_until(lambda: daemon.sessions()["one"]["state"] == "active")
    assert_served(daemon, "one")


@pytest.mark.parametrize("done", [True, False])
def test_jobs_that_ran_when_the_daemon_died(daemon: Daemon, done: bool) -> None:
    daemon.sessionctl("create", "root", "guest", "--id", "one")
    for _ in range(2):
        daemon.sessionctl("reset", "one")
    daemon.kill_all()
    note = daemon.runtime / "sessions/one/job.json"
    job = json.loads(note.read_text())
    assert (job["number"], job["finished"]) == (2, True)
    # As it was when the reset had begun; a reset is done once there is another upper.
    begun = job | {"finished": False, "upper": job["upper"] + (0 if done else 1)}
    note.write_text(json.dumps(begun))

    daemon.start()
    for _ in range(2):
        told = json.loads(daemon.sessionctl("status", "one", "--json").stdout)["last_job"]
        assert told["operation"] == "reset"
        assert told["state"] == ("succeeded" if done else "failed")
        assert ("was running when sessiond ended, and was undone" in told["error_message"]) != done
        properties = ("/org/sessiond/Overlay1/job/2", "org.sessiond.Overlay1.Job", "ErrorName")
        name = daemon.busctl("get-property", "org.sessiond.Overlay1", *properties)
        assert ("Interrupted" in name) != done
        daemon.kill_all()
        daemon.start()
    daemon.sessionctl("reset", "one")
    assert json.loads(note.read_text())["number"] == 3
    assert ("reset of session one for uid 0 is not done" in daemon.log()) != done
