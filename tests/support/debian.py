"""Roots of Debian, for machines of the tests' own: made by mmdebstrap(1), kept for the next run."""

from __future__ import annotations

import fcntl
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path


class NoArchive(Exception):
    """No Debian archive is in reach; the message is what mmdebstrap said."""


def suite() -> str:
    """Return the name of this machine's own release, as that in archives."""
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def made_once(image: Path, make: Callable[[Path], None]) -> Path:
    """Return `image`; if it is not there, have `make` write it to another path first."""
    with open(image.with_suffix(".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not image.exists():
            part = image.with_suffix(".part")
            part.unlink(missing_ok=True)
            make(part)
            part.rename(image)
    return image


def install(target: Path, packages: str, *options: str, release: str | None = None) -> None:
    """Install Debian into `target`: a new ``*.tar`` file, or else an empty directory.

    `packages`: with commas between them. `release`: its name, by default that of this machine's
    own. Raises `NoArchive`.
    """
    kind = "tar" if target.suffix == ".tar" else "directory"
    make = ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt", f"--format={kind}", *options]
    done = subprocess.run(
        [*make, f"--include={packages}", release or suite(), str(target)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode != 0:
        raise NoArchive(done.stderr.strip()[-200:])


def pack(archive: Path, image: Path) -> None:
    """Make a squashfs of a tar file, with file handles, as mksquashfs makes them: they keep hard
    links together."""
    with open(archive, "rb") as tar:
        options = ["-quiet", "-no-progress", "-exports", "-root-mode", "755"]
        command = ["sqfstar", *options, str(image)]
        subprocess.run(command, stdin=tar, check=True, capture_output=True)
