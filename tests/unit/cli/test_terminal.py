"""Commands in a session of their own: exit codes, signals, and the pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

DRIVER = """
import os, sys
from sessiond.cli.terminal import run_apart
sys.exit(run_apart(lambda: os.execvp("sh", ["sh", "-c", sys.argv[1]]), terminal_owner=os.getuid()))
"""


def arguments(script: str) -> list[str]:
    return [sys.executable, "-c", DRIVER, script]


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)])
def test_the_exit_code_is_the_commands(script: str, code: int) -> None:
    done = subprocess.run(arguments(script), stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == code


def test_streams_are_passed_through_without_a_terminal() -> None:
    script = "cat; echo error >&2"
    done = subprocess.run(arguments(script), input=b"in\0\xff", capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"in\0\xff", b"error\n")


def test_a_command_without_a_terminal_has_none_to_open() -> None:
    script = "(true </dev/tty) 2>/dev/null && echo one || echo none"
    with terminal() as (_, slave):
        done = subprocess.run(
            arguments(script),
            stdin=slave,
            stdout=subprocess.PIPE,
            start_new_session=True,
            timeout=60,
        )
    assert done.stdout == b"none\n"


def test_signals_reach_the_command() -> None:
    script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    with subprocess.Popen(arguments(script), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 5


EARLY = """
import os, signal, sys, time
from sessiond.cli import terminal
fork = os.fork
def slow_fork():
    parent = os.getpid()
    pid = fork()
    if pid == 0:
        os.kill(parent, signal.SIGTERM)  # before it can have got anywhere
    return pid
os.fork = slow_fork
sys.exit(terminal.run_apart(lambda: os.execvp("sleep", ["sleep", "1000"]), terminal_owner=0))
"""


def test_a_signal_that_comes_before_the_command_has_begun() -> None:
    command = [sys.executable, "-c", EARLY]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60).returncode == 128 + 15


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


@contextmanager
def on_terminal(script: str) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """Run `script` on a terminal; yield the process, and the terminal's sides."""
    with terminal() as (master, slave):
        process = subprocess.Popen(
            arguments(script), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        try:
            yield process, master, slave
        finally:
            process.kill()
            process.wait(60)


def read_until(master: int, end: bytes) -> bytes:
    """Return what is written, to `end` and a little further."""
    seen = b""
    while end not in seen:
        seen += os.read(master, 65536)
    return seen


def test_a_command_on_a_terminal_gets_another_of_the_same_size() -> None:
    with on_terminal("tty; stty size; exit 3") as (process, master, slave):
        output = read_until(master, b"33 77\r\n").split()
        assert process.wait(60) == 3
        assert output[0].startswith(b"/dev/pts/")
        assert output[0].decode() != os.ttyname(slave)


def test_what_is_typed_reaches_the_command_and_the_terminal_is_restored() -> None:
    with terminal() as (_, another):
        before = termios.tcgetattr(another)  # as each has at first
    with on_terminal("stty -echo; echo ready; read line; echo got $line") as (
        process,
        master,
        slave,
    ):
        read_until(master, b"ready\r\n")
        os.write(master, b"hello\n")
        assert read_until(master, b"got hello\r\n") == b"got hello\r\n"
        assert process.wait(60) == 0
        assert termios.tcgetattr(slave) == before


def test_an_interrupt_key_reaches_the_command() -> None:
    script = "trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.1; done"
    with on_terminal(script) as (process, master, _):
        read_until(master, b"ready\r\n")
        os.write(master, b"\x03")
        read_until(master, b"caught\r\n")
        assert process.wait(60) == 4


def test_a_resize_is_passed_on() -> None:
    script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.1; done"
    with on_terminal(script) as (process, master, _):
        read_until(master, b"ready\r\n")
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 11, 22, 0, 0))
        process.send_signal(signal.SIGWINCH)
        read_until(master, b"11 22\r\n")
        assert process.wait(60) == 0


def test_all_output_is_read_before_the_end() -> None:
    with on_terminal("stty -opost; head -c 1000000 /dev/zero") as (process, master, _):
        size = 0
        while size < 1000000:
            size += len(os.read(master, 65536))
        assert size == 1000000
        assert process.wait(60) == 0


def test_a_command_that_does_not_read_blocks_no_output() -> None:
    """More is typed than a terminal holds while the command writes more than it holds, too."""
    script = "stty raw -echo; echo ready; head -c 300000 /dev/zero; head -c 65536 >/dev/null"
    with on_terminal(script) as (process, master, _):
        size, typed = len(read_until(master, b"ready\n")) - len(b"ready\n"), 0
        os.set_blocking(master, False)
        while size < 300000 or typed < 65536:
            if typed < 65536:
                with suppress(BlockingIOError):
                    typed += os.write(master, bytes(65536 - typed))
            with suppress(BlockingIOError):
                size += len(os.read(master, 65536))
        assert process.wait(60) == 0
