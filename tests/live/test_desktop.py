"""From the firmware to the desktop, and the reset button there, pressed.

Each test goes on where the one before has ended. Pictures of the screen are kept below ``build``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.live_medium import HEIGHT, WIDTH, LiveMedium, Screen
from tests.support.machine import CHECKOUT, CannotBoot
from tests.support.virtual_machine import BOUND, VirtualMachine, booted

pytestmark = [pytest.mark.live, pytest.mark.timeout(6 * BOUND)]

BUILT = CHECKOUT / "build/live"
MEDIA = {
    "iso": LiveMedium(BUILT / "iso/sessiond.iso"),
    "stick": LiveMedium(BUILT / "stick/sessiond.raw", spare_bytes=1 << 30),
}
PANEL = "pgrep --uid user --exact xfce4-panel"


# Where these are on the screen.
CORNER = (WIDTH - 29, HEIGHT - 18)
"""Of the panel: the reset button, which is blue."""
FOLDER = (50, 50)
"""On the desktop, which is drawn after the panel: blue as well."""
RESET = (260, 633)
"""The button of its window, which is at the left, at the top."""
CONFIRM = (350, 629)
"""The button of the question."""


@dataclass
class Desktop:
    machine: VirtualMachine
    screen: Screen
    pictures: Path

    def wait_for(self, colour: str, place: tuple[int, int]) -> None:
        """Return once a place of the screen is `red` or `blue`."""
        deadline = time.monotonic() + BOUND
        while True:
            red, green, blue = self.screen.colour(*place)
            if {"red": red - max(green, blue), "blue": blue - max(red, green)}[colour] > 25:
                return
            assert time.monotonic() < deadline, f"it is not {colour} at {place}"
            self.machine.run("sleep 1")  # of its own time: it may be slow

    def photograph(self, name: str) -> None:
        self.screen.photograph(self.pictures / f"{name}.png")


@pytest.fixture(scope="module", params=MEDIA)
def desktop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desktop]:
    medium, directory = MEDIA[request.param], tmp_path_factory.mktemp("machine")
    if not medium.image.exists():
        pytest.skip(f"'make live LIVE={request.param}' makes {medium.image}")
    try:
        with booted(medium, directory) as machine:
            screen = Screen(directory)
            try:
                yield Desktop(machine, screen, medium.image.parent)
            finally:
                screen.close()
    except CannotBoot as error:
        pytest.fail(f"no machine can be started here: {error}")


def test_the_desktop_comes_by_itself(desktop: Desktop) -> None:
    machine = desktop.machine
    desktop.wait_for("blue", CORNER)
    desktop.wait_for("blue", FOLDER)
    desktop.photograph("desktop")
    print(machine.run("systemd-analyze time"))
    print(machine.run("sessionctl list"))
    assert machine.run("findmnt --noheadings --output FSTYPE /home/user") == "fuse.sessiond\n"
    assert machine.run("systemctl --failed --quiet") == ""


def test_the_button_resets_the_session(desktop: Desktop) -> None:
    machine, screen = desktop.machine, desktop.screen
    machine.run("runuser --user user -- sh -c 'echo essay >~/essay; rm ~/.bashrc'")
    panel = machine.run(PANEL).strip()

    screen.click(*CORNER)
    desktop.wait_for("red", RESET)
    desktop.photograph("button")
    screen.press("alt", "r")
    desktop.wait_for("red", CONFIRM)
    desktop.photograph("question")
    screen.press("alt", "r")
    machine.wait("test -e /home/user/.bashrc && ! test -e /home/user/essay")

    # The desktop was among the programs that used the session: it is a new one.
    machine.wait(f'test "$({PANEL} || echo {panel})" != {panel}')
    desktop.wait_for("blue", CORNER)
    desktop.wait_for("blue", FOLDER)
    desktop.photograph("after")
