"""The fork server: workers are forked from a small process that has everything imported.

A worker so started costs a few megabytes of its own and no time for imports; and nothing ever forks
inside a running trio loop. The server is a child of the manager, and goes, quietly, when the
manager goes.
"""

from __future__ import annotations

import array
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from sessiond.control import MESSAGE_LIMIT, Start

log = logging.getLogger(__name__)

_PAUSES = (0.1, 0.3, 1.0, 3.0)
"""Seconds after which a fork that has failed is tried again."""


class Spawner:
    """A running fork server. `start` it before trio runs, and before there are threads."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    @classmethod
    def start(cls, private: Iterable[int] = ()) -> Spawner:
        """Fork the server; the descriptors `private` stay the manager's alone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            for descriptor in private:
                os.close(descriptor)
            _serve(theirs)
        theirs.close()
        return cls(ours)

    def close(self) -> None:
        """End the server; workers live on."""
        self._channel.close()

    def spawn(
        self,
        start: Start,
        device: int,
        journal: int,
        control: socket.socket,
        listener: socket.socket,
    ) -> None:
        """Start a worker on the FUSE connection `device`. Raises OSError when the server is gone.

        It reports on the other end of `control` when it is ready; see `worker.run`. The caller
        closes its own copies of the descriptors.
        """
        rights = array.array("i", [device, journal, control.fileno(), listener.fileno()]).tobytes()
        self._channel.sendmsg(
            [start.model_dump_json().encode()],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
        )


def _serve(channel: socket.socket) -> None:
    """Fork a worker for each message. Never returns."""
    status = 0
    try:
        os.setsid()  # an interrupt at the terminal is for the manager
        _name_process("sessiond-fork")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: nobody waits for workers
        from sessiond.fuse import worker

        with suppress(OSError):  # /tmp may be full; then workers share less memory
            worker.rehearse()
        gc.collect()
        gc.freeze()  # or the first collection would copy all pages that are shared
        while packet := _receive(channel):
            try:
                child = _fork()
            except OSError:
                # To the manager that is one more worker that has died.
                log.exception("no worker can be started")
                child = -1
            if child == 0:
                channel.close()
                _become_worker(packet)
            for descriptor in packet.descriptors:
                os.close(descriptor)
    except BaseException:
        log.exception("the fork server failed")
        status = 1
    finally:
        logging.shutdown()
        os._exit(status)


def _fork() -> int:
    """As os.fork(), with patience: a worker was perhaps killed for the memory that is lacking."""
    for pause in _PAUSES:
        try:
            return os.fork()
        except OSError:
            time.sleep(pause)
    return os.fork()


def _name_process(name: str) -> None:
    """Tell it from the manager in ps(1) and the journal; at most 15 characters (proc(5), comm)."""
    with open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(name)


class _Birth(NamedTuple):
    """What a worker is started with; see `worker.run` for the descriptors."""

    start: Start
    descriptors: tuple[int, ...]


def _receive(channel: socket.socket) -> _Birth | None:
    descriptors = array.array("i")
    packet, ancillary, _, _ = channel.recvmsg(
        MESSAGE_LIMIT, socket.CMSG_SPACE(4 * descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    if not packet:
        return None
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return _Birth(Start.model_validate_json(packet), tuple(descriptors))


def _become_worker(birth: _Birth) -> None:
    """Run a worker in this fresh child. Never returns."""
    from sessiond.fuse import worker

    status = 0
    try:
        _name_process("sessiond-worker")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        device, journal, control, listener = birth.descriptors
        worker.run(
            birth.start,
            device,
            journal,
            socket.socket(fileno=control),
            socket.socket(fileno=listener),
        )
    except BaseException:
        log.exception("worker failed")
        status = 1
    finally:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)
