"""Parts that several pages are made of, each with the words that a screen reader needs."""

from __future__ import annotations

from collections.abc import Callable

from gi.repository import Adw, GLib, Gtk

from sessiond.desktop.phrases import shown

SPACE = 12
"""Pixels between things that belong together."""
WIDTH = 560
"""Pixels that a page takes at most, however wide the window is."""


def plain(text: str) -> str:
    """Return markup that shows `text`, whatever is in it."""
    return str(GLib.markup_escape_text(shown(text)))


def row(title: str, subtitle: str = "") -> Adw.ActionRow:
    """Return a row of a list."""
    return Adw.ActionRow(title=plain(title), subtitle=plain(subtitle))


def switch_row(title: str, subtitle: str, active: bool) -> tuple[Adw.ActionRow, Gtk.Switch]:
    """Return a row with a switch; in the title, an underscore is before the mnemonic."""
    switch = Gtk.Switch(active=active, valign=Gtk.Align.CENTER)
    describe(switch, subtitle)
    switching = row(title, subtitle)
    switching.set_use_underline(True)
    switching.add_suffix(switch)
    switching.set_activatable_widget(switch)
    return switching, switch


def button(label: str, pressed: Callable[[], None], *styles: str) -> Gtk.Button:
    """Return a button; in its label, an underscore is before the mnemonic."""
    made = Gtk.Button(label=label, use_underline=True)
    # The label in it is its name; GTK 4.8 would say it twice, once with the underscore.
    made.reset_property(Gtk.AccessibleProperty.LABEL)
    for style in styles:
        made.add_css_class(style)
    made.connect("clicked", lambda _button: pressed())
    return made


def icon_button(icon: str, label: str, pressed: Callable[[], None]) -> Gtk.Button:
    """Return a button that shows an icon, and says `label` otherwise."""
    made = Gtk.Button(icon_name=icon, tooltip_text=label, valign=Gtk.Align.CENTER)
    made.add_css_class("flat")
    name(made, label)
    made.connect("clicked", lambda _button: pressed())
    return made


def name(widget: Gtk.Widget, label: str) -> None:
    """Say to screen readers what a widget is, which has no words of its own."""
    widget.update_property([Gtk.AccessibleProperty.LABEL], [label])


def describe(widget: Gtk.Widget, description: str) -> None:
    """Say to screen readers what there is to know of a widget beside its name."""
    widget.update_property([Gtk.AccessibleProperty.DESCRIPTION], [description])


def page(*groups: Gtk.Widget) -> Gtk.ScrolledWindow:
    """Return a page that scrolls, with one group below the other."""
    box = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, spacing=2 * SPACE)
    for side in ("top", "bottom", "start", "end"):
        box.set_property(f"margin-{side}", 2 * SPACE)
    for group in groups:
        box.append(group)
    clamp = Adw.Clamp(child=box, maximum_size=WIDTH)
    return Gtk.ScrolledWindow(child=clamp, hscrollbar_policy=Gtk.PolicyType.NEVER, vexpand=True)


def with_buttons(content: Gtk.Widget, *buttons: Gtk.Button) -> Gtk.Box:
    """Return a page with buttons below it, which do not scroll."""
    bar = Gtk.Box(spacing=SPACE, halign=Gtk.Align.CENTER, homogeneous=True)
    bar.set_margin_top(SPACE)
    bar.set_margin_bottom(2 * SPACE)
    for one in buttons:
        one.add_css_class("pill")
        bar.append(one)
    box = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, hexpand=True)
    box.append(content)
    box.append(bar)
    return box


class Rows(Adw.PreferencesGroup):
    """A group of rows that are replaced all at once."""

    def __init__(self, title: str, description: str = "") -> None:
        super().__init__(title=plain(title), description=plain(description))
        self._shown: list[Gtk.Widget] = []

    def show_rows(self, rows: list[Gtk.Widget]) -> None:
        """Show these, in place of those before."""
        for old in self._shown:
            self.remove(old)
        for new in rows:
            self.add(new)
        self._shown = rows
