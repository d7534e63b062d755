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


def start_with(daemon: Daemon, **profiles: str) -> None:
    """Start a daemon that makes sessions of these profiles, and write into each.

    Configured sessions, since that is quick; the next daemon is not told of them.
    """
    text = daemon.configuration.read_text()
    with open(daemon.configuration, "a") as configuration:
        configuration.writelines(
            f'[session.{name}]\nuser = "root"\nprofile = "{profile}"\n'
            for name, profile in profiles.items()
        )
    daemon.start()
    daemon.configuration.write_text(text)
    for name in profiles:
        write(daemon, name)


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
    os.truncate(file, len(file.read_bytes().rstrip()) // 2)


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


def test_damaged_records(idle_daemon: Daemon) -> None:
    daemon = idle_daemon
    start_with(daemon, **dict.fromkeys(("good", "newer", *DAMAGE), "lasting"))
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
    start_with(daemon, one="packed")
    daemon.stop()

    def fails(complaint: str) -> bool:
        session = daemon.sessions()["one"]
        return session["state"] == "failed" and complaint in str(session["failure"])

    image.rename(away)
    daemon.start()
    assert fails("No such file or directory")
    assert "No such file or directory" in daemon.sessionctl("status", "one").stdout
    image.write_bytes(away.read_bytes())
    daemon.reload()
    wait_until(lambda: fails("is not the one that session one"))
    image.write_bytes(b"")
    daemon.reload()
    wait_until(lambda: fails("holds no squashfs"))
    image.unlink()
    image.mkdir()
    daemon.reload()
    wait_until(lambda: fails("is not the one that session one"))
    image.rmdir()
    away.rename(image)
    daemon.reload()
    wait_until(lambda: daemon.sessions()["one"]["state"] == "active")
    assert_served(daemon, "one")


def test_jobs_that_ran_when_the_daemon_died(idle_daemon: Daemon) -> None:
    daemon = idle_daemon
    start_with(daemon, done="guest", undone="guest")
    notes = {name: daemon.runtime / "sessions" / name / "job.json" for name in ("done", "undone")}
    for name in notes:
        daemon.sessionctl("reset", name)
    daemon.kill_all()
    for number, (name, note) in enumerate(notes.items(), 1):
        job = json.loads(note.read_text())
        assert (job["number"], job["finished"]) == (number, True)
        # As it was when the reset had begun; it is done once there is another upper.
        upper = {"done": job["upper"], "undone": job["upper"] + 1}[name]
        note.write_text(json.dumps(job | {"finished": False, "upper": upper}))

    daemon.start()
    for _ in range(2):
        done, undone = (
            json.loads(daemon.sessionctl("status", name, "--json").stdout)["last_job"]
            for name in notes
        )
        assert (done["operation"], done["state"], done["error_message"]) == (
            "reset",
            "succeeded",
            "",
        )
        assert (undone["operation"], undone["state"]) == ("reset", "failed")
        assert "was running when sessiond ended, and was undone" in undone["error_message"]
        job = ("/org/sessiond/Overlay1/job/2", "org.sessiond.Overlay1.Job", "ErrorName")
        name = daemon.busctl("get-property", "org.sessiond.Overlay1", *job)
        assert name == 's "org.sessiond.Overlay1.Error.Interrupted"\n'
        daemon.kill_all()
        daemon.start()
    daemon.sessionctl("reset", "done")
    assert json.loads(notes["done"].read_text())["number"] == 3
    assert "The reset of session done for uid 0 is done" in daemon.log()
    assert "The reset of session undone for uid 0 is not done" in daemon.log()
