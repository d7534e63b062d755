"""A CD or a stick that firmware starts, as on people's machines: with a screen, keys, a pointer.

Nothing on it is for the test: what gives the test a shell comes with the machine (SMBIOS), as in
systemd.system-credentials(7).
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CREDENTIALS = {
    "getty.ttys.serial": "ttyS0",
    "systemd.unit-dropin.debug-shell.service": "[Service]\nTTYPath=/dev/ttyS1\n",
    "systemd.unit-dropin.sysinit.target": "[Unit]\nWants=debug-shell.service\n",
}
WIDTH, HEIGHT = 1280, 800
"""Of the screen, in pixels."""
_UEFI = Path("/usr/share/ovmf/OVMF.fd")


@dataclass(frozen=True)
class LiveMedium:
    """A machine that has nothing but this; see `virtual_machine.Startable`."""

    image: Path
    spare_bytes: int | None = None
    """None: a CD, which BIOS starts. Else a stick of so much more, which UEFI starts."""
    sign_of_life = (b"login: ", 120.0)

    def prepare(self, directory: Path) -> str:
        """Copy a stick: it is written to."""
        if self.spare_bytes is not None:
            stick = directory / "disk"
            shutil.copyfile(self.image, stick)
            with open(stick, "r+b") as file:
                file.truncate(self.image.stat().st_size + self.spare_bytes)
        return "true"

    def qemu_options(self, directory: Path) -> list[str]:
        """Return those for its devices."""
        options = ["-device", f"VGA,xres={WIDTH},yres={HEIGHT}", "-device", "qemu-xhci"]
        options += ["-device", "usb-kbd", "-device", "usb-tablet"]
        options += ["-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"]
        for name, value in _CREDENTIALS.items():
            encoded = base64.b64encode(value.encode()).decode()
            options += [
                "-smbios",
                f"type=11,value=io.systemd.credential.binary:{name}={encoded}",
            ]
        if self.spare_bytes is None:
            return [*options, "-drive", f"file={self.image},media=cdrom,readonly=on"]
        drive = f"file={directory / 'disk'},format=raw,if=none,id=stick"
        return [
            *options,
            "-bios",
            str(_UEFI),
            "-drive",
            drive,
            "-device",
            "usb-storage,drive=stick",
        ]


class Screen:
    """What the machine shows, and the keys and the pointer before it (QEMU's QMP)."""

    def __init__(self, directory: Path) -> None:
        self._dump = directory / "screen"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(directory / "qmp"))
        self._lines = self._socket.makefile("rb")
        json.loads(self._lines.readline())  # its greeting
        self._do("qmp_capabilities")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def photograph(self, picture: Path) -> None:
        """Write what is shown to a PNG file."""
        self._do("screendump", filename=str(picture), format="png")

    def colour(self, x: int, y: int) -> tuple[int, int, int]:
        """Return red, green and blue of a pixel."""
        self._do("screendump", filename=str(self._dump), format="ppm")
        _, size, _, pixels = self._dump.read_bytes().split(b"\n", 3)
        start = 3 * (y * int(size.split()[0]) + x)
        red, green, blue = pixels[start : start + 3]
        return red, green, blue

    def press(self, *keys: str) -> None:
        """Press keys together, by the names that QEMU has for them (QKeyCode), and release them."""
        self._do("send-key", keys=[{"type": "qcode", "data": key} for key in keys])

    def click(self, x: int, y: int) -> None:
        """Click at a pixel."""
        there = [
            {"type": "abs", "data": {"axis": axis, "value": at * 0x7FFF // size}}
            for axis, at, size in (("x", x, WIDTH), ("y", y, HEIGHT))
        ]
        self._do("input-send-event", events=there)
        for down in (True, False):
            button = {"type": "btn", "data": {"button": "left", "down": down}}
            self._do("input-send-event", events=[button])

    def _do(self, command: str, **arguments: Any) -> None:
        asked = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(asked).encode() + b"\n")
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        assert "return" in answer, (asked, answer)
