"""A program on a terminal, and what that terminal shows."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pyte
import trio

from tests.support.waiting import until


class Terminal:
    """A terminal with a program on it."""

    def __init__(self, master: int, process: trio.Process, columns: int, lines: int) -> None:
        self.process = process
        self.written = b""
        """All that the program has sent."""
        self._master = master
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def lines(self) -> list[str]:
        """What it shows, line by line."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def marked(self) -> str:
        """The first line that is shown in reverse and is not the last of the screen."""
        for number in range(self._screen.lines - 1):
            if self._screen.buffer[number][0].reverse:
                return self.lines[number]
        return ""

    @property
    def settings(self) -> list[object]:
        """Its modes, as `termios.tcgetattr` tells them."""
        return termios.tcgetattr(self._master)

    async def shows(self, *texts: str) -> None:
        """Wait until it shows all of these."""
        try:
            await until(lambda: all(text in "\n".join(self.lines) for text in texts))
        except trio.TooSlowError:
            raise AssertionError(f"{texts} are not shown: {self.lines}") from None

    async def type(self, keys: bytes) -> None:
        await trio.lowlevel.wait_writable(self._master)
        os.write(self._master, keys)

    def resize(self, columns: int, lines: int) -> None:
        self._screen.resize(lines, columns)
        set_size(self._master, columns, lines)

    async def read(self) -> None:
        """Show what the program sends, as long as somebody has the terminal open."""
        while True:
            await trio.lowlevel.wait_readable(self._master)
            try:
                sent = os.read(self._master, 1 << 16)
            except OSError:
                return
            self.written += sent
            self._stream.feed(sent)


def set_size(terminal: int, columns: int, lines: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


@asynccontextmanager
async def on_terminal(
    command: Sequence[str], environment: Mapping[str, str], *, columns: int = 100, lines: int = 24
) -> AsyncIterator[Terminal]:
    """Run a program on a terminal of its own, while the context is open."""
    overruling = ("COLUMNS", "LINES", "NO_COLOR")
    environment = {key: environment[key] for key in environment if key not in overruling}
    master, slave = pty.openpty()
    set_size(master, columns, lines)
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            ["setsid", "--ctty", *command],  # so that Ctrl-C is its signal
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
        )
        terminal = Terminal(master, process, columns, lines)
        nursery.start_soon(terminal.read)
        try:
            yield terminal
        finally:
            process.kill()
            await process.wait()
            nursery.cancel_scope.cancel()
    os.close(slave)
    os.close(master)
