"""The main job of sessiond, done for real and told step by step. `make demo` runs this.

Everything is real: a message bus of its own, the daemon, FUSE mounts over a whole root file system.
Each step checks what it says; the first thing that is not as told ends the demo with code 1. All
that is made lies in one temporary directory, which is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from machine import DemoError, Machine

WIDTH = 96
COLOUR = sys.stdout.isatty()

MANAGER = "org.sessiond.Overlay1 /org/sessiond/Overlay1 org.sessiond.Overlay1.Manager"

BREAK = ("etc", "usr/bin", "usr/sbin")


def tell(text: str) -> None:
    """Print a paragraph of the story."""
    print(f"\n\x1b[1m{text}\x1b[0m" if COLOUR else f"\n# {text}", flush=True)


def check(truth: bool, claim: str) -> None:
    """End the demo unless what it claims is so."""
    if not truth:
        raise DemoError(f"This should be so, but is not: {claim}")


class Demo:
    """One session of root's, called demo."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.root = machine.runtime / "sessions/demo/root"

    def type(self, command: str, *, code: int = 0, show: bool = True) -> str:
        """Run a command as one would type it, show it with its output, and return the output."""
        print(f"\x1b[36m$ {command}\x1b[0m" if COLOUR else f"$ {command}", flush=True)
        began = time.monotonic()
        done = self.machine.shell(command)
        took = time.monotonic() - began
        for line in (done.stdout + done.stderr).splitlines() if show else ():
            print(f"  {line[:WIDTH].rstrip()}")
        if done.returncode != code:
            raise DemoError(
                f"{command!r} ended with {done.returncode}, not {code}.\n{done.stdout}{done.stderr}"
            )
        print(f"  ({took:.2f} s)", flush=True)
        return done.stdout

    def query(self, command: str) -> object:
        """Return what a command with --json tells, unseen by the audience."""
        return json.loads(self.machine.shell(command, check=True).stdout)

    def differences(self) -> dict[str, str]:
        """Return how each path differs from the image."""
        lines = self.machine.shell("sessionctl diff demo --json", check=True).stdout.splitlines()
        found = (json.loads(line) for line in lines)
        return {one["path"]: one["kind"] for one in found}

    def create(self) -> None:
        tell("An administrator makes a session for root over it. The interface is D-Bus.")
        self.type(f"busctl call {MANAGER} CreateSession 'ssa{{sv}}' root guest 1 id s demo")
        self.type("sessionctl list")
        check(os.path.ismount(self.root), f"{self.root} is a mount point")
        check(self.differences() == {}, "a new session shows its image")

    def change(self) -> None:
        tell("Its root is a whole system. A program in it creates, changes and deletes files.")
        self.type(
            "sessionctl run demo -- sh -c 'echo Hello. >/note; echo >>/etc/passwd; rm /etc/group'"
        )
        self.type("sessionctl diff demo")
        found = self.differences()
        check(found.get("/note") == "added", "/note was added")
        check(found.get("/etc/passwd") == "contents", "/etc/passwd was changed")
        check(found.get("/etc/group") == "deleted", "/etc/group was deleted")

    def snapshot(self) -> None:
        tell("This state is worth keeping. It is an archive that other tools read, too.")
        self.type("sessionctl snapshot demo good --description 'with a note'")
        self.type("sessionctl snapshots demo")
        listed = self.type("sessionctl export demo good - | tar --list")
        check("note" in listed.splitlines(), "the archive has the note")
        check("etc/.wh.group" in listed.splitlines(), "and that /etc/group was deleted")

    def kill_worker(self) -> None:
        tell(
            "Meanwhile a program works in the session. The process that serves its files is killed."
        )
        self.machine.start_bystander(self.root)
        check(self.machine.ask_bystander() == "Hello.", "the program reads the note")
        before = self.machine.worker()
        self.type(f"kill -KILL {before}")
        check(self.machine.ask_bystander() == "Hello.", "the program reads on")
        check(self.machine.worker() != before, "another process serves them")
        print("  Another has gone on for it; the program has noticed nothing but a pause.")

    def break_it(self) -> None:
        tell("Somebody breaks everything.")
        # From outside: should the mount ever be missing, nothing else is in reach.
        self.type(f"cd {shlex.quote(str(self.root))} && rm -rf {' '.join(BREAK)}")
        self.type("sessionctl run demo -- ls", code=127)
        check(not (self.root / "usr/bin").exists(), "usr/bin is gone")

    def reset(self) -> None:
        tell("Reset: pristine again, without unmounting, while the other program goes on.")
        self.type("sessionctl reset demo")
        check(self.differences() == {}, "the session shows its image again")
        self.type("sessionctl run demo -- ls -ld /usr/bin /etc/group")
        check(self.machine.ask_bystander() == "no note", "the program goes on, and sees no note")
        print("  The program that was working there has noticed nothing but that the note is gone.")

    def restore(self) -> None:
        tell("Restore: the snapshot has outlived the reset.")
        self.type("sessionctl restore demo good")
        self.type("sessionctl run demo -- cat /note")
        check(self.differences().get("/etc/group") == "deleted", "/etc/group is deleted again")
        check(self.machine.ask_bystander() == "Hello.", "the program reads the note again")
        self.machine.stop_bystander()

    def commit(self) -> None:
        tell("One file is to outlive resets, and this session, although the rest does not.")
        self.type("sessionctl commit demo /note")
        self.type("sessionctl reset demo --snapshot-as before")
        self.type("sessionctl run demo -- cat /note")
        check((self.root / "etc/group").exists(), "/etc/group is that of the image")
        check((self.root / "note").read_text() == "Hello.\n", "the note is still there")
        tell("And the reset can be taken back.")
        self.type("sessionctl restore demo before")
        check(not (self.root / "etc/group").exists(), "/etc/group is deleted again")

    def persist(self) -> None:
        tell("So far all of it was in RAM. Persist: it moves to disk, while mounted.")
        self.type("sessionctl persist demo")
        self.type("sessionctl status demo")
        status = self.query("sessionctl status demo --json")
        check(isinstance(status, dict) and status["storage"] == "persistent", "it is persistent")
        check((self.root / "note").read_text() == "Hello.\n", "the note is still there")

    def restart(self) -> None:
        tell("Restart the daemon, as a reboot would.")
        self.machine.stop_daemon()
        check(not os.path.ismount(self.root), "nothing is left mounted")
        print("  The daemon has ended, and the session is unmounted.")
        self.machine.start_daemon()
        self.type("sessionctl list")
        self.type("sessionctl run demo -- cat /note")
        check(self.differences().get("/etc/group") == "deleted", "/etc/group is still deleted")

    def close(self) -> None:
        tell("Close the session: its files go with it. The image was only ever read.")
        self.type("sessionctl close demo")
        self.type("sessionctl list")
        check(not os.path.ismount(self.root), "nothing is left mounted")
        tell("In the user's next session there is what was to outlive this one.")
        self.type("sessionctl create root guest --id next")
        self.type("sessionctl diff next")
        self.type("sessionctl run next -- cat /note")
        self.type("sessionctl close next")


def fingerprint(image: Path) -> object:
    """Return what would be different if what the demo deletes and changes had been touched."""
    changed = ("etc/group", "etc/passwd", *BREAK)
    paths = [image] if image.is_file() else [image / name for name in changed]
    found = [path.stat() for path in paths]
    return [(status.st_ino, status.st_size, status.st_ctime_ns) for status in found]


def run(image: Path) -> None:
    """Tell the whole story over `image`."""
    before = fingerprint(image)
    with ExitStack() as cleanup:
        machine = Machine(image, cleanup)
        tell(f"A message bus of its own, and the daemon. The image is {image}, which is only read.")
        machine.start_bus()
        machine.start_daemon()
        print("  sessiond is ready.")
        demo = Demo(machine)
        steps: list[Callable[[], None]] = [
            demo.create,
            demo.change,
            demo.snapshot,
            demo.kill_worker,
            demo.break_it,
            demo.reset,
            demo.restore,
            demo.commit,
            demo.persist,
            demo.restart,
            demo.close,
        ]
        for step in steps:
            step()
        machine.stop_daemon()
    after = fingerprint(image)
    check(before == after, f"the files of {image} are as they were")
    tell("Everything was as told.")


def main() -> int:
    """Parse the command line, run the demo, and return the exit code."""
    parser = argparse.ArgumentParser(description="Show what sessiond does, for real.")
    parser.add_argument("--image", type=Path, default=Path("/"), help="directory or image file")
    image = parser.parse_args().image.absolute()
    if os.geteuid() != 0:
        print("The demo mounts file systems, so it needs root.", file=sys.stderr)
        return 1
    missing = [name for name in ("busctl", "dbus-daemon") if shutil.which(name) is None]
    if missing or not image.exists():
        lacking = ", ".join(missing) or f"the image {image}"
        print(f"This is missing: {lacking}.", file=sys.stderr)
        return 1
    try:
        run(image)
    except (DemoError, OSError, subprocess.SubprocessError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
