"""systemd, as a service sees it: notifications, the watchdog, and descriptors kept over restarts.

The protocol is that of sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3). Where the
environment names no systemd, everything here does nothing.
"""

from __future__ import annotations

import array
import logging
import os
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence

import trio

from sessiond.descriptors import DescriptorStore, NoDescriptorStore

log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
_PATIENCE = 10.0
"""Seconds that systemd may be too busy to take a message."""


class Systemd:
    """The service manager that has started this process, if one has."""

    descriptors: DescriptorStore

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Take from `environment` what is meant for this process.

        What names descriptors is removed: a child has nothing to do with them.
        """
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_seconds = _watchdog_seconds(environment)
        inherited = _inherited(environment)
        # Set for the process that systemd itself executes; children only inherit it.
        started_by_systemd = environment.get("SYSTEMD_EXEC_PID") == str(os.getpid())
        self.descriptors = (
            _Store(self, inherited) if self._address and started_by_systemd else NoDescriptorStore()
        )

    def ready(self, status: str) -> None:
        """Tell that the service has started or reloaded; `status` is a sentence for people."""
        self.tell(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """Tell that the configuration is being read again."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def stopping(self, status: str) -> None:
        """Tell that the service is about to end."""
        self.tell(f"STOPPING=1\nSTATUS={status}")

    async def feed_watchdog(self) -> None:
        """Tell, again and again, that trio's loop runs; returns at once if nobody wants to know."""
        while self._watchdog_seconds > 0:
            self.tell("WATCHDOG=1")
            await trio.sleep(self._watchdog_seconds / 2)

    def tell(self, state: str, descriptors: Sequence[int] = ()) -> None:
        """Send one message; that it cannot be sent is logged."""
        if not self._address:
            return
        rights = array.array("i", descriptors).tobytes()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(_PATIENCE)
                channel.sendmsg([state.encode()], ancillary, 0, self._address)
        except OSError as error:
            log.warning("systemd could not be told %s: %s", state.partition("\n")[0], error)


class _Store:
    """Implements `DescriptorStore`: systemd's file descriptor store.

    A message that was sent is as good as carried out, even if this process is killed next: systemd
    reads what its children have sent before it looks at which of them have died. So there is no
    need for BARRIER=1, which waits for it.
    """

    def __init__(self, systemd: Systemd, inherited: Mapping[str, int]) -> None:
        self.inherited = inherited
        self._systemd = systemd
        self._kept = set(inherited)

    def keep(self, name: str, descriptor: int) -> None:
        self.drop(name)  # or systemd would keep both
        self._kept.add(name)
        # Unless told not to, systemd polls what it keeps; then each request of the kernel to a FUSE
        # device would wake it.
        self._systemd.tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])

    def drop(self, name: str) -> None:
        if name in self._kept:
            self._kept.remove(name)
            self._systemd.tell(f"FDSTOREREMOVE=1\nFDNAME={name}")


def _watchdog_seconds(environment: MutableMapping[str, str]) -> float:
    """Return the seconds after which systemd takes this process for dead, 0 if it never does."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(environment.get("WATCHDOG_USEC", "0")) / 1e6


def _inherited(environment: MutableMapping[str, str]) -> dict[str, int]:
    """Return the descriptors that were passed to this process, by name.

    If two have one name, which `_Store` never asks for, the last counts and others are closed.
    """
    pid = environment.pop("LISTEN_PID", "")
    number = int(environment.pop("LISTEN_FDS", "0"))
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()):
        return {}
    found: dict[str, int] = {}
    for position in range(number):
        descriptor = _FIRST_DESCRIPTOR + position
        os.set_inheritable(descriptor, False)
        name = names[position] if position < len(names) else ""
        if name in found:
            os.close(found[name])
        found[name] = descriptor
    return found
