"""Print what AT-SPI says of all programs, whenever a line is read. Run by `desktop.py`.

One line of JSON for each widget that has a place on the screen, and what is in it; then an empty
line.
"""

from __future__ import annotations

import json
import sys

import gi

gi.require_version("Atspi", "2.0")
from gi.repository import Atspi, GLib  # noqa: E402

_OLDER_NAMES = {"button": "push button", "switch": "check box"}
"""What newer versions of AT-SPI call roles, and what older ones do."""


def tell(widget: Atspi.Accessible, window: tuple[int, int] = (0, 0)) -> None:
    """Print a widget, and all in it; `window`: where what it is in says to be itself."""
    states = [state.value_nick for state in widget.get_state_set().get_states()]
    name, role = widget.get_name(), widget.get_role_name()
    place = place_of(widget) if "visible" in states else None
    if role == "frame" and place:
        window = (place.x, place.y)  # newer versions of GTK count from inside its shadow
    if name and place:
        where = [place.x - window[0], place.y - window[1], place.width, place.height]
        description = widget.get_description() or ""
        print(json.dumps([_OLDER_NAMES.get(role, role), name, description, states, where]))
    for number in range(widget.get_child_count()):
        child = widget.get_child_at_index(number)
        if child is not None:
            tell_if_there(child, window)


def place_of(widget: Atspi.Accessible) -> Atspi.Rect | None:
    """Return where a widget is; nothing for one that is nowhere, as on another page of a stack."""
    try:
        box = Atspi.Component.get_extents(widget, Atspi.CoordType.WINDOW)
    except GLib.Error:
        return None
    return box if box.width > 0 else None


def tell_if_there(widget: Atspi.Accessible, window: tuple[int, int] = (0, 0)) -> None:
    """Print a widget, unless it has just gone."""
    try:
        tell(widget, window)
    except GLib.Error:
        return


Atspi.init()
desktop = Atspi.get_desktop(0)
desktop.set_cache_mask(Atspi.Cache.NONE)
events = GLib.MainContext.default()
for _line in sys.stdin:
    # Else children are remembered that have gone, and new ones are not seen.
    while events.iteration(False):
        pass
    desktop.clear_cache()
    tell_if_there(desktop)
    print(flush=True)
