"""A desktop of a test's own: an X server without a screen, a session bus, a pointer and a keyboard.

Widgets are found as a screen reader finds them, by role and name, so that a click that works proves
that those are told. No window manager runs: windows are at the upper left corner.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.bus import start_private_bus

BOUND = 20.0
"""Seconds within which a desktop shows what it has been told, or else the test fails."""

CHECKOUT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"
STUBBORN = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("ready", flush=True)
sys.stdin.read()
"""
"""A program of Python's that is ready at once, and says when it is asked to end, but does not."""
USER, UID = "nobody", 65534
_LAUNCHERS = ("/usr/libexec/at-spi-bus-launcher", "/usr/lib/at-spi2-core/at-spi-bus-launcher")
_READER, NOTIFICATION_SERVER = "accessible.py", "notification_server.py"
"""Programs beside this module, which are run by the user."""
_SIZE = "520x690"


@dataclass(frozen=True)
class Widget:
    """What a screen reader is told of a widget, and where it is on the screen."""

    role: str
    name: str
    description: str
    states: frozenset[str]
    x: int
    y: int
    width: int
    height: int


class Desktop:
    """One user's."""

    def __init__(self, directory: Path, display: str, bus: str, screenshots: Path) -> None:
        self.directory = directory
        self._framebuffer = directory / "Xvfb_screen0"
        self.screenshots = screenshots
        self.program = str(directory / "sessiond-reset")
        self._reader: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []
        home = directory / "home"
        settings = home / ".config/gtk-4.0/settings.ini"
        settings.parent.mkdir(parents=True)
        settings.write_text("[Settings]\ngtk-enable-animations=0\n")
        for made in (home, settings.parent.parent, settings.parent):
            os.chown(made, UID, UID)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "DISPLAY": display,
            "DBUS_SESSION_BUS_ADDRESS": bus,
            "GDK_BACKEND": "x11",
            "GSK_RENDERER": "cairo",
            "GSETTINGS_BACKEND": "memory",
            "GTK_A11Y": "atspi",
            "ADW_DISABLE_PORTAL": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LC_ALL": "C.UTF-8",
        }

    def start(
        self, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start sessiond-reset as the user; `end_programs` ends it."""
        process = self.start_program([self.program, *arguments], environment or {}, **options)
        self._started.append(process)
        return process

    def end_programs(self) -> None:
        """End what `start` has started."""
        while self._started:
            process = self._started.pop()
            process.terminate()
            process.communicate(timeout=BOUND)

    def start_program(
        self, command: Sequence[str], environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        """Start a program as the user."""
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            command,
            text=True,
            env=self.environment | environment,
            user=UID,
            group=UID,
            extra_groups=[],
            **options,
        )

    def close(self) -> None:
        """End what reads the screen."""
        if self._reader is not None:
            self._reader.communicate(timeout=BOUND)

    def widgets(self) -> list[Widget]:
        """Return all widgets of all programs that show, in the order in which they are read."""
        if self._reader is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._reader = self.start_program([PYTHON, str(self.directory / _READER)], {}, **pipes)
        assert self._reader.stdin is not None
        assert self._reader.stdout is not None
        self._reader.stdin.write("\n")
        self._reader.stdin.flush()
        found = []
        for line in iter(self._reader.stdout.readline, "\n"):
            assert line, "what reads the screen has ended"
            role, name, description, states, place = json.loads(line)
            found.append(Widget(role, name, description, frozenset(states), *place))
        return found

    def find(self, role: str, name: str) -> Widget:
        """Return the widget of that role and name, as soon as it shows."""
        seen: list[Widget] = []

        def look() -> Widget | None:
            seen[:] = self.widgets()
            return next((w for w in seen if (w.role, w.name) == (role, name)), None)

        return wait_for(look, lambda: f"no {role} {name!r} in {describe(seen)}")

    def wait_text(self, text: str) -> None:
        """Return once something that has `text` in its name shows."""
        seen: list[Widget] = []

        def look() -> bool:
            seen[:] = self.widgets()
            return any(text in one.name for one in seen)

        wait_for(look, lambda: f"no {text!r} in {describe(seen)}")

    def wait_focus(self, name: str) -> None:
        """Return once the keyboard is at the widget of that name."""
        seen: list[Widget] = []

        def look() -> bool:
            seen[:] = [one for one in self.widgets() if "focused" in one.states]
            return any(one.name == name for one in seen)

        wait_for(look, lambda: f"not at {name!r} but {describe(seen)}")

    def click(self, role: str, name: str) -> None:
        """Move the pointer to a widget, and press its first button."""
        widget = self.find(role, name)
        x, y = widget.x + widget.width // 2, widget.y + widget.height // 2
        self._xdotool("mousemove", str(x), str(y), "click", "1")

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, given as X names them."""
        self._xdotool("key", *keys)

    def write(self, text: str) -> None:
        """Type in place of all that is in the entry that has the keyboard."""
        self._xdotool("key", "ctrl+a")
        self._xdotool("type", text)

    def focus(self) -> None:
        """Give the keyboard to the window, as a window manager would."""
        window = ["search", "--sync", "--onlyvisible", "--class", "sessiond"]
        self._xdotool(*window, "windowfocus", "--sync")

    def close_window(self) -> None:
        """Close the window that has the keyboard, and return when it is gone."""
        self.focus()
        self.press("ctrl+w")
        wait_for(lambda: not self.widgets(), lambda: describe(self.widgets()))

    def screenshot(self, name: str) -> Path:
        """Keep what the screen shows, once it has been drawn; what moves is kept as it is then."""
        before, end = b"", time.monotonic() + 1.0
        while (now := _png(self._framebuffer.read_bytes())) != before and time.monotonic() < end:
            before = now
            time.sleep(0.1)  # some frames
        self.screenshots.mkdir(parents=True, exist_ok=True)
        target = self.screenshots / f"{name}.png"
        target.write_bytes(now)
        return target

    def _xdotool(self, *arguments: str) -> None:
        subprocess.run(
            ["xdotool", *arguments],
            env=self.environment,
            check=True,
            timeout=BOUND,
            stdout=subprocess.DEVNULL,
        )


@contextmanager
def working_in(directory: Path, *command: str, uid: int = UID) -> Iterator[subprocess.Popen[bytes]]:
    """Have a program use the session meanwhile; it ends when its input does."""
    with subprocess.Popen(
        command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=uid, group=uid
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def describe(widgets: Sequence[Widget]) -> str:
    return "\n".join(f"{w.role}: {w.name!r} {w.x},{w.y}" for w in widgets)


def wait_for(look: Callable[[], Any], complaint: Callable[[], str]) -> Any:
    """Return what `look` returns as soon as that is true."""
    deadline = time.monotonic() + BOUND
    while not (found := look()):
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.02)  # what is looked at has to run, too
    return found


def install(directory: Path) -> None:
    """Put sessiond-reset below `directory`, as a package has it, and without the rest of sessiond.

    The checkout may be where only root can read.
    """
    package = directory / "packages" / "sessiond"
    for part in ("desktop", "locale"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / "sessiond" / part, package / part, ignore=ignored)
    for module in ("__init__.py", "words.py"):
        shutil.copy(CHECKOUT / "sessiond" / module, package)
    script = (CHECKOUT / "packaging/desktop/sessiond-reset").read_text()
    for reader in (_READER, NOTIFICATION_SERVER):
        shutil.copy(Path(__file__).with_name(reader), directory)
    program = directory / "sessiond-reset"
    program.write_text(script.replace("@packages@", str(package.parent)))
    program.chmod(0o755)


def _png(window_dump: bytes) -> bytes:
    """Return a picture in the format of xwd(1), 24 bits deep, as a PNG."""
    header = struct.unpack(">20I", window_dump[:80])
    size, width, height, line, colours = (header[n] for n in (0, 4, 5, 12, 19))
    start = size + 12 * colours
    rows = bytearray()
    for offset in range(start, start + height * line, line):
        pixels = window_dump[offset : offset + 4 * width]
        row = bytearray(3 * width)
        row[0::3], row[1::3], row[2::3] = pixels[2::4], pixels[1::4], pixels[0::4]
        rows += b"\0" + row

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(rows), 6))
        + chunk(b"IEND", b"")
    )


@contextmanager
def own_desktop(directory: Path, screenshots: Path) -> Iterator[Desktop]:
    """Yield a desktop with its files in `directory`, which everybody has to be able to search."""
    install(directory)
    (directory / "session").mkdir()
    with _x_server(directory) as display, start_private_bus(directory / "session") as bus:
        desktop = Desktop(directory, display, bus, screenshots)
        launcher = next(filter(os.path.exists, _LAUNCHERS))
        with desktop.start_program(
            [launcher, "--launch-immediately"], {}, stderr=subprocess.DEVNULL
        ) as accessibility:
            try:
                # A program that does not find it when it starts tells screen readers nothing.
                wait = ["gdbus", "wait", "--session", "--timeout", str(int(BOUND)), "org.a11y.Bus"]
                subprocess.run(wait, env=desktop.environment, check=True)
                desktop.widgets()
                yield desktop
            finally:
                desktop.close()
                accessibility.terminate()


@contextmanager
def _x_server(directory: Path) -> Iterator[str]:
    options = ["-screen", "0", f"{_SIZE}x24", "-ac", "-noreset"]
    reading, writing = os.pipe()
    with subprocess.Popen(
        ["Xvfb", *options, "-displayfd", str(writing), "-fbdir", str(directory)],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        os.close(writing)
        try:
            with open(reading) as told:
                number = told.readline().strip()
            assert number, "Xvfb did not start"
            yield f":{number}"
        finally:
            server.terminate()
