"""The page with all that was changed: a list that is read from a pipe as it is shown."""

from __future__ import annotations

import json
import os

from gi.repository import Adw, Gio, GLib, GObject, Gtk, Pango

from sessiond.desktop import phrases
from sessiond.desktop.daemon import Daemon, Failure
from sessiond.desktop.state import Session
from sessiond.desktop.widgets import SPACE, WIDTH, name
from sessiond.words import _, ngettext

LIMIT = 10_000
"""Paths that are shown: nobody reads more, and each takes memory."""
_CHUNK = 64 * 1024


class _Difference(GObject.Object):
    """A line of the list."""

    def __init__(self, path: str, told: str) -> None:
        super().__init__()
        self.path = path
        self.told = told


class Differences(Gtk.Box):
    """Lists the paths that differ. `stop` gives the list up, if it has not ended."""

    def __init__(self, daemon: Daemon, session: Session) -> None:
        super().__init__(orientation=Gtk.Orientation.VERTICAL)
        self._lines = Gio.ListStore(item_type=_Difference)
        self._cancellable = Gio.Cancellable()
        self._stream: Gio.InputStream | None = None
        self._rest = b""
        self._status = Gtk.Label(label=_("Reading…"), wrap=True, xalign=0.0)
        self._status.add_css_class("dim-label")
        for side in ("top", "bottom", "start", "end"):
            self._status.set_property(f"margin-{side}", SPACE)
        factory = Gtk.SignalListItemFactory()
        factory.connect("setup", _set_up)
        factory.connect("bind", _bind)
        view = Gtk.ListView(model=Gtk.NoSelection(model=self._lines), factory=factory)
        name(view, _("All changes"))
        self.append(Adw.Clamp(child=self._status, maximum_size=WIDTH))
        self.append(
            Gtk.ScrolledWindow(
                child=Adw.ClampScrollable(child=view, maximum_size=WIDTH), vexpand=True
            )
        )
        nothing = GLib.Variant("(a{sv})", ({},))
        daemon.call_for_descriptor(session, "OpenDiff", nothing, self._opened, self._failed)

    def stop(self) -> None:
        """Read no more of it."""
        self._cancellable.cancel()
        if self._stream is not None:
            self._stream.close_async(GLib.PRIORITY_DEFAULT, None, None)
            self._stream = None

    def _opened(self, descriptor: int) -> None:
        if self._cancellable.is_cancelled():
            os.close(descriptor)
            return
        self._stream = Gio.UnixInputStream.new(descriptor, True)
        self._read()

    def _read(self) -> None:
        assert self._stream is not None
        self._stream.read_bytes_async(
            _CHUNK, GLib.PRIORITY_DEFAULT, self._cancellable, self._received
        )

    def _received(self, stream: Gio.InputStream, result: Gio.AsyncResult) -> None:
        try:
            part = stream.read_bytes_finish(result).get_data()
        except GLib.Error as error:
            if not error.matches(Gio.io_error_quark(), Gio.IOErrorEnum.CANCELLED):
                self._end_early(error.message)
            return
        if not part:
            self._end_early("")
            return
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            if not self._add(line):
                self.stop()
                return
        self._read()

    def _add(self, line: bytes) -> bool:
        """Show one line, and say whether another one may follow."""
        try:
            told = json.loads(line)
        except ValueError:  # the line that was being written when the list ended
            self._end_early("")
            return False
        if "complete" in told:
            count = len(self._lines)
            self._status.set_label(
                ngettext("{count} path differs.", "{count} paths differ.", count).format(
                    count=count
                )
            )
            return False
        if "error" in told:
            self._end_early(told["error"])
            return False
        self._lines.append(_Difference(phrases.shown(told["path"]), phrases.difference(told)))
        if len(self._lines) == LIMIT:
            self._status.set_label(
                _("These are the first {count} paths; there are more.").format(count=LIMIT)
            )
            return False
        return True

    def _end_early(self, text: str) -> None:
        self._status.set_label(" ".join((_("This list is not complete."), phrases.shown(text))))

    def _failed(self, failure: Failure) -> None:
        self._status.set_label(f"{phrases.failure(failure.name)}\n{phrases.shown(failure.text)}")


def _set_up(_factory: Gtk.SignalListItemFactory, item: Gtk.ListItem) -> None:
    path = Gtk.Label(xalign=0.0, ellipsize=Pango.EllipsizeMode.MIDDLE)
    told = Gtk.Label(xalign=0.0, ellipsize=Pango.EllipsizeMode.MIDDLE)
    told.add_css_class("dim-label")
    told.add_css_class("caption")
    box = Gtk.Box(orientation=Gtk.Orientation.VERTICAL)
    for side in ("top", "bottom", "start", "end"):
        box.set_property(f"margin-{side}", SPACE // 2)
    box.append(path)
    box.append(told)
    item.set_child(box)


def _bind(_factory: Gtk.SignalListItemFactory, item: Gtk.ListItem) -> None:
    difference = item.get_item()
    path = item.get_child().get_first_child()
    path.set_label(difference.path)
    path.set_tooltip_text(difference.path)
    path.get_next_sibling().set_label(difference.told)
