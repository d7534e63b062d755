"""``python process_scan.py MAJOR:MINOR INODE...``: the processes that use a file system, and which
of these files of it each has open.

A program of its own, of the standard library alone, since looking at processes can hang: one may
keep its memory map locked, or have a file of a network that is down. It is killed then, at no cost
to whoever started it. They are told on standard input, a socket for packets: each is one process as
JSON, with a descriptor of it (pidfd); an empty object ends the list.

The file system itself is never asked for anything: the processes that serve it may be dead, and a
request would wait for them. statx(2) without a field and with ``AT_STATX_DONT_SYNC`` says where a
file is by what the kernel has in memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress

PATIENCE = 0.3
"""Seconds that looking at one process may take; it is then told of by what is known already."""
STUCK_LIMIT = 30
"""Processes that may take longer, before no memory map is looked at any more."""

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_DEVICE = struct.Struct("=II")
_DEVICE_OFFSET = 136  # of stx_dev_major in struct statx


class Process:
    """One process, and how it uses the file system."""

    def __init__(self, pid: int, device: tuple[int, int], wanted: Collection[int]) -> None:
        """`wanted`: inode numbers of the files that are to be found."""
        self.pid = pid
        self.uses: set[str] = set()
        self.files: set[int] = set()
        """Those of the wanted ones that it has open, or mapped as shared."""
        self._proc = f"/proc/{pid}"
        self._device = device
        self._wanted = wanted
        self._mapped = f"{device[0]:02x}:{device[1]:02x}"

    def look_at_files(self) -> None:
        """Working directory, root, program and open files."""
        for name in ("cwd", "root", "exe"):
            if self._is_there(f"{self._proc}/{name}"):
                self.uses.add(name)
        for number in self._descriptors():
            if not self._is_there(f"{self._proc}/fd/{number}"):
                continue
            self.uses.add("file")
            if not self._wanted:
                break
            self._note(self._inode(number))

    def look_at_map(self) -> None:
        """Mapped files; those that are still open are known already."""
        with suppress(OSError), open(f"{self._proc}/maps", "rb") as table:
            mapped = self._mapped.encode()
            for line in table:
                _, mode, _, where, inode, *_ = line.split(maxsplit=5)
                if where == mapped:
                    self.uses.add("map")
                    if mode.endswith(b"s"):
                        self._note(int(inode))

    def description(self) -> dict[str, object]:
        """What there is to be told of it. Raises `OSError` when it has ended."""
        with open(f"{self._proc}/comm", "rb") as stream:
            # Whatever bytes it has chosen.
            program = stream.read().removesuffix(b"\n").decode(errors="backslashreplace")
        return {
            "pid": self.pid,
            "program": program,
            "uids": uids(self.pid),
            "unit": _unit(self._proc),
            "uses": sorted(self.uses),
            "files": sorted(self.files),
        }

    def _descriptors(self) -> list[str]:
        try:
            return os.listdir(f"{self._proc}/fd")
        except OSError:
            return []

    def _note(self, inode: int) -> None:
        if inode in self._wanted:
            self.files.add(inode)

    def _inode(self, descriptor: str) -> int:
        """Return the inode number of an open file; see proc_pid_fdinfo(5)."""
        with suppress(OSError), open(f"{self._proc}/fdinfo/{descriptor}", "rb") as stream:
            for line in stream:
                if line.startswith(b"ino:"):
                    return int(line.split()[1])
        return 0  # it is closed

    def _is_there(self, path: str) -> bool:
        """Say whether a symbolic link of /proc leads into the file system."""
        buffer = ctypes.create_string_buffer(256)
        flags = _AT_STATX_DONT_SYNC
        if _libc.statx(_AT_FDCWD, path.encode(), flags, ctypes.c_uint(0), buffer) != 0:
            return False
        return _DEVICE.unpack_from(buffer, _DEVICE_OFFSET) == self._device


def uids(pid: int) -> list[int]:
    """Return the real, effective, saved and file system user id. Raises `OSError`."""
    with open(f"/proc/{pid}/status", "rb") as stream:
        for line in stream:
            if line.startswith(b"Uid:"):
                return [int(uid) for uid in line.split()[1:]]
    raise ProcessLookupError


def _unit(proc: str) -> str:
    """Return the innermost unit of systemd's, or scope of a login session, that it belongs to."""
    with open(f"{proc}/cgroup", encoding="utf-8", errors="backslashreplace") as stream:
        for line in stream:
            hierarchy, controllers, path = line.rstrip("\n").split(":", 2)
            # systemd uses the one or the other; a container may have both, one of the host.
            if hierarchy == "0" or controllers == "name=systemd":
                units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
                if units:
                    return units[-1]
    return ""


def scan(
    device: tuple[int, int], wanted: Collection[int]
) -> Iterator[tuple[dict[str, object], int]]:
    """Yield the description and a pidfd, to be closed, of each process that uses `device`."""
    stuck = 0
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            # Held from the beginning on: that it is alive at the end means that all that was seen
            # meanwhile was this very process.
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue  # it has ended
        process = Process(int(name), device, wanted)
        steps = [process.look_at_files, process.look_at_map][: 2 if stuck < STUCK_LIMIT else 1]
        looking = threading.Thread(target=lambda steps=steps: [step() for step in steps])
        looking.daemon = True
        looking.start()
        looking.join(PATIENCE)
        stuck += looking.is_alive()
        with suppress(OSError):
            if process.uses:
                description = process.description()
                if not select.select([pidfd], [], [], 0)[0]:
                    yield description, pidfd
        os.close(pidfd)


def main() -> None:
    major, minor = sys.argv[1].split(":")
    wanted = frozenset(map(int, sys.argv[2:]))
    channel = socket.socket(fileno=0)
    with suppress(BrokenPipeError):  # whoever asked has ended
        for description, pidfd in scan((int(major), int(minor)), wanted):
            socket.send_fds(channel, [json.dumps(description).encode()], [pidfd])
        channel.send(b"{}")
    os._exit(0)  # threads may be stuck


if __name__ == "__main__":
    main()
