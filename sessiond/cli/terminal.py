"""Run a function in a child process with a terminal session of its own.

A process that shares its caller's terminal can push input into it (TIOCSTI), so a command of
another user's gets a pseudo-terminal where it would have had the caller's terminal, and none at all
where the caller's streams go elsewhere. Synchronous; one at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import tty
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

_STDIN, _STDOUT = 0, 1
_CHUNK = 64 * 1024
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def run_apart(child: Callable[[], NoReturn], *, terminal_owner: int) -> int:
    """Fork, call `child` there, and return its exit code, or 128 + n after signal n.

    `child` must not return or raise. A pseudo-terminal is given to the user id `terminal_owner`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if all(os.isatty(stream) for stream in (0, 1, 2)):
        return _run_on_pty(child, terminal_owner)
    with _holding_signals() as held:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            child()
        with _forwarding_signals(pid, held):
            return _exit_code(pid)


def _run_on_pty(child: Callable[[], NoReturn], owner: int) -> int:
    settings = termios.tcgetattr(_STDIN)
    size = _window_size()
    with _holding_signals() as held:
        pid, master = pty.fork()
        if pid == 0:
            os.fchown(_STDIN, owner, -1)
            termios.tcsetattr(_STDIN, termios.TCSANOW, settings)
            fcntl.ioctl(_STDIN, termios.TIOCSWINSZ, size)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            child()

        def resize(_number: int, _frame: FrameType | None) -> None:
            fcntl.ioctl(master, termios.TIOCSWINSZ, _window_size())

        previous = signal.signal(signal.SIGWINCH, resize)
        try:
            tty.setraw(_STDIN)
            with _forwarding_signals(pid, held):
                _relay(pid, master)
                return _exit_code(pid)
        finally:
            termios.tcsetattr(_STDIN, termios.TCSAFLUSH, settings)
            signal.signal(signal.SIGWINCH, previous)
            os.close(master)


def _relay(pid: int, master: int) -> None:
    """Copy between the caller's terminal and `master` until `pid` has ended and all is read.

    What is typed waits in `typed` while the child does not read: to block there would deadlock with
    a child that itself waits for its output to be read.
    """
    os.set_blocking(master, False)
    ended = os.pidfd_open(pid)
    typed = b""
    sources = {ended, master, _STDIN}
    try:
        while True:
            ready = _poll(sources - {_STDIN} if typed else sources, {master} if typed else set())
            if ready.get(_STDIN):
                typed = os.read(_STDIN, _CHUNK)
                if not typed:
                    sources.discard(_STDIN)
            if ready.get(master, 0) & select.POLLOUT:
                with suppress(BlockingIOError):
                    typed = typed[os.write(master, typed) :]
            output = b""
            if ready.get(master, 0) & ~select.POLLOUT:
                output = _read(master)
                _write_all(_STDOUT, output)
                if not output:  # nobody has the other side open any more
                    sources -= {master, _STDIN}
                    typed = b""
            if ready.get(ended) and not output:
                return
    finally:
        os.close(ended)


def _poll(readable: set[int], writable: set[int]) -> dict[int, int]:
    poller = select.poll()
    for descriptor in readable | writable:
        events = (select.POLLIN if descriptor in readable else 0) | (
            select.POLLOUT if descriptor in writable else 0
        )
        poller.register(descriptor, events)
    return dict(poller.poll())


def _read(master: int) -> bytes:
    try:
        return os.read(master, _CHUNK)
    except OSError as error:
        if error.errno == errno.EIO:
            return b""
        raise


def _write_all(stream: int, data: bytes) -> None:
    while data:
        data = data[os.write(stream, data) :]


def _window_size() -> bytes:
    return fcntl.ioctl(_STDIN, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))


@contextmanager
def _holding_signals() -> Iterator[Collection[int]]:
    """Have what is to be forwarded wait until it is, or the child would be left alone; hand out
    what is held otherwise.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        yield held
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def _forwarding_signals(pid: int, held: Collection[int]) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has yet to get as far as its own group, or has ended
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_code(pid: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code
