"""A page that asks before something is done, and says why it could not be begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gi.repository import Gtk

from sessiond.desktop import phrases
from sessiond.desktop.daemon import Failure
from sessiond.desktop.widgets import SPACE, button, describe, page, with_buttons
from sessiond.words import _

Act = Callable[[Callable[[], None], Callable[[Failure], None]], None]
"""Begins what was confirmed, and calls the first when that has been begun, or else the second."""


class Question(Gtk.Box):
    """Asks; stays until what was confirmed has begun, or somebody leaves it."""

    def __init__(
        self,
        heading: str,
        text: str,
        details: Sequence[Gtk.Widget],
        confirm: tuple[str, str],
        act: Act,
        leave: Callable[[], None],
    ) -> None:
        """Make the page. `confirm` is the label of the button that confirms, and its style."""
        super().__init__()
        label, style = confirm
        self.pending = False
        """Whether what was confirmed is being begun; who left meanwhile would miss the answer."""
        self._act = act
        self._leave = leave
        self.cancel_button = button(_("_Cancel"), leave)
        self.confirm_button = button(label, self.confirm, style)
        self._failure = Gtk.Label(wrap=True, xalign=0.0, css_classes=["error", "heading"])
        self._details = Gtk.Label(wrap=True, xalign=0.0, css_classes=["error"])
        trouble = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, spacing=SPACE // 2, visible=False)
        trouble.append(self._failure)
        trouble.append(self._details)
        self._trouble = trouble
        introduction = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, spacing=SPACE)
        title = Gtk.Label(
            label=heading,
            wrap=True,
            justify=Gtk.Justification.CENTER,
            accessible_role=Gtk.AccessibleRole.HEADING,
            css_classes=["title-1"],
        )
        introduction.append(title)
        introduction.append(Gtk.Label(label=text, wrap=True, justify=Gtk.Justification.CENTER))
        self.append(
            with_buttons(
                page(trouble, introduction, *details),
                self.cancel_button,
                self.confirm_button,
            )
        )

    def confirm(self) -> None:
        """Begin what was asked about, unless that is being begun."""
        if not self.pending:
            self._set_pending(True)
            self._act(self._begun, self._failed)

    def _set_pending(self, pending: bool) -> None:
        self.pending = pending
        self.confirm_button.set_sensitive(not pending)
        self.cancel_button.set_sensitive(not pending)

    def _begun(self) -> None:
        self._set_pending(False)
        self._leave()

    def _failed(self, failure: Failure) -> None:
        self._set_pending(False)
        self._failure.set_label(phrases.failure(failure.name))
        self._details.set_label(phrases.shown(failure.text))
        self._trouble.set_visible(True)
        describe(self.cancel_button, self._failure.get_label())
        self.cancel_button.grab_focus()
