"""The page of snapshots: to make one, go back to one, describe or delete it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gi.repository import Gtk

from sessiond.desktop import phrases
from sessiond.desktop.state import Snapshot
from sessiond.desktop.widgets import (
    Rows,
    button,
    icon_button,
    page,
    plain,
    row,
    with_buttons,
)
from sessiond.words import _, pgettext


class Wishes(NamedTuple):
    """What is called when somebody wants something of a snapshot."""

    make: Callable[[], None]
    restore: Callable[[Snapshot], None]
    edit: Callable[[Snapshot], None]
    delete: Callable[[Snapshot], None]


class Snapshots(Gtk.Box):
    """The snapshots of a session, the newest first."""

    def __init__(self, wishes: Wishes) -> None:
        super().__init__()
        self._wishes = wishes
        self._shown: list[Snapshot] | None = None
        self._rows = Rows(
            _("Snapshots"), _("States of the session that were kept, and can be restored.")
        )
        make = button(_("_Keep a snapshot…"), wishes.make, "suggested-action")
        self.append(with_buttons(page(self._rows), make))

    def show_snapshots(self, snapshots: list[Snapshot]) -> None:
        """Show these, which are given oldest first."""
        if snapshots == self._shown:
            return  # whoever is using one of the rows keeps it
        self._shown = snapshots
        rows = [self._row(one) for one in reversed(snapshots)]
        self._rows.show_rows(rows or [row(_("There are no snapshots"))])

    def _row(self, snapshot: Snapshot) -> Gtk.Widget:
        facts = [phrases.moment(snapshot.created_at)]
        if snapshot.size_valid:
            facts.append(phrases.size(snapshot.size))
        if snapshot.automatic:
            facts.append(_("automatic"))
        lines = [pgettext("between parts of a list", ", ").join(facts)]
        if snapshot.description:
            lines.insert(0, snapshot.description)
        made = row(snapshot.name)
        made.set_subtitle("\n".join(map(plain, lines)))
        made.set_subtitle_lines(3)
        for icon, label, wish in (
            ("document-edit-symbolic", _("Edit snapshot {name}"), self._wishes.edit),
            ("edit-undo-symbolic", _("Restore snapshot {name}"), self._wishes.restore),
            ("user-trash-symbolic", _("Delete snapshot {name}"), self._wishes.delete),
        ):
            made.add_suffix(_button(icon, label.format(name=snapshot.name), wish, snapshot))
        return made


def _button(
    icon: str, label: str, wish: Callable[[Snapshot], None], snapshot: Snapshot
) -> Gtk.Button:
    return icon_button(icon, label, lambda: wish(snapshot))
