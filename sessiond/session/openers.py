"""Who has files of a merged view open: found in /proc, without a look at the view itself.

A look there, even stat(2), would wait for its worker, which may be dead.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from sessiond.session.mounts import mount_table


def programs_with(mount_point: Path, inodes: Collection[int]) -> dict[int, set[str]]:
    """Return the names of the programs that have each of these files open, or mapped as shared.

    `inodes` are their numbers in what is mounted at `mount_point`. Blocks. Programs that end
    meanwhile may be missing.
    """
    found: dict[int, set[str]] = defaultdict(set)
    devices = [mount.device for mount in mount_table() if mount.target == mount_point]
    if not devices or not inodes:
        return found
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            for inode in (
                *_opened(process, devices[-1], inodes),
                *_mapped(process, devices[-1], inodes),
            ):
                found[inode].add(_name(process))
    return found


def _opened(process: str, device: tuple[int, int], inodes: Collection[int]) -> Iterator[int]:
    mounts: set[int] | None = None
    for fd in os.listdir(f"/proc/{process}/fdinfo"):
        with suppress(OSError):  # it is closed
            facts = _facts(Path(f"/proc/{process}/fdinfo/{fd}").read_bytes())
            inode = facts.get(b"ino", 0)
            if inode not in inodes:
                continue
            if mounts is None:  # each mount namespace has numbers of its own
                mounts = {mount.number for mount in mount_table(process) if mount.device == device}
            if facts.get(b"mnt_id") in mounts:
                yield inode


def _facts(fdinfo: bytes) -> dict[bytes, int]:
    """Return those that are decimal numbers; see proc_pid_fdinfo(5)."""
    lines = (line.partition(b":") for line in fdinfo.splitlines())
    return {name: int(value) for name, _, value in lines if value.strip().isdigit()}


def _mapped(process: str, device: tuple[int, int], inodes: Collection[int]) -> Iterator[int]:
    wanted = b"%02x:%02x" % device
    with open(f"/proc/{process}/maps", "rb") as maps:
        for line in maps:
            _, mode, _, where, inode, *_ = line.split(maxsplit=5)
            if where == wanted and mode.endswith(b"s") and int(inode) in inodes:
                yield int(inode)


def _name(process: str) -> str:
    name = Path(f"/proc/{process}/comm").read_bytes()
    return name.rstrip(b"\n").decode(errors="backslashreplace")
