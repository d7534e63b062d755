"""A desktop's notification service: prints each call as a line of JSON, obeys lines that it reads.

The lines: ``["invoke", NUMBER, ACTION]`` presses a button, ``["close", NUMBER]`` closes by hand.
"""

from __future__ import annotations

import json
import sys

from gi.repository import Gio, GLib

BUS = "org.freedesktop.Notifications"
PATH = "/org/freedesktop/Notifications"
INTERFACE = """
<node><interface name="org.freedesktop.Notifications">
  <method name="Notify">
    <arg type="s" direction="in"/><arg type="u" direction="in"/><arg type="s" direction="in"/>
    <arg type="s" direction="in"/><arg type="s" direction="in"/><arg type="as" direction="in"/>
    <arg type="a{sv}" direction="in"/><arg type="i" direction="in"/>
    <arg type="u" direction="out"/>
  </method>
  <method name="CloseNotification"><arg type="u" direction="in"/></method>
</interface></node>
"""


class Service:
    """Numbers what it is told, and shows nothing."""

    def __init__(self, bus: Gio.DBusConnection) -> None:
        self._bus = bus
        self._last = 0
        interface = Gio.DBusNodeInfo.new_for_xml(INTERFACE).interfaces[0]
        bus.register_object(PATH, interface, self._called, None, None)

    def _called(self, *call: object) -> None:
        _bus, _sender, _path, _interface, method, arguments, invocation = call
        values = arguments.unpack()
        if method == "Notify":
            _name, replaced, _icon, title, body, actions, hints, _expiry = values
            if not replaced:
                self._last += 1
            number = replaced or self._last
            tell("shown", number, title, body, actions[::2], hints["urgency"])
            invocation.return_value(GLib.Variant("(u)", (number,)))
        else:
            tell("taken back", *values)
            invocation.return_value(None)

    def obey(self, channel: GLib.IOChannel, _condition: GLib.IOCondition) -> bool:
        """Do what a line says."""
        line = channel.readline()
        if not line:
            loop.quit()
            return False
        what, number, *rest = json.loads(line)
        if what == "invoke":
            self._emit("ActionInvoked", GLib.Variant("(us)", (number, *rest)))
        else:
            self._emit("NotificationClosed", GLib.Variant("(uu)", (number, 2)))
        return True

    def _emit(self, signal: str, values: GLib.Variant) -> None:
        self._bus.emit_signal(None, PATH, BUS, signal, values)


def tell(*what: object) -> None:
    """Print a line."""
    print(json.dumps(what), flush=True)


loop = GLib.MainLoop()
service = Service(Gio.bus_get_sync(Gio.BusType.SESSION))
GLib.io_add_watch(GLib.IOChannel.unix_new(sys.stdin.fileno()), GLib.IOCondition.IN, service.obey)
Gio.bus_own_name(
    Gio.BusType.SESSION, BUS, Gio.BusNameOwnerFlags.NONE, None, lambda *_: tell("ready"), None
)
loop.run()
