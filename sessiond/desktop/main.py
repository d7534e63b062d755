"""The program `sessiond-reset`: what it is told, and which of its faces it shows."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from sessiond import __version__
from sessiond.desktop.state import Session, of_user
from sessiond.words import _

APPLICATION = "org.sessiond.Reset"
UNUSABLE = 1


def main() -> int:
    """Run the program, and return its exit code."""
    arguments = _parsed(sys.argv[1:])
    # Not in the session itself: who works in a directory of it is one of the programs that use it.
    os.chdir("/")
    try:
        import gi  # noqa: F401
    except ImportError:
        return _complain(_("This takes PyGObject; on Debian: python3-gi and gir1.2-adw-1."))
    choose = _chooser(arguments.session)
    if arguments.now:
        from sessiond.desktop.now import reset_now

        return reset_now(
            choose, terminate=not arguments.leave_programs, snapshot=arguments.snapshot
        )
    if arguments.watch:
        from sessiond.desktop.watch import watch

        shown = [sys.argv[0]]
        if arguments.session:
            shown += ["--session", arguments.session]
        return watch(choose, shown)
    return _show_window()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sessiond-reset",
        description=_("Reset a session of sessiond, or go back to a snapshot."),
    )
    parser.add_argument(
        "--session", metavar="ID", help=_("this session, rather than the oldest of yours")
    )
    parser.add_argument("--version", action="version", version=__version__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--now", action="store_true", help=_("reset at once: without a window, and without asking")
    )
    mode.add_argument(
        "--watch",
        action="store_true",
        help=_("stay in the background, and announce resets and a lack of space"),
    )
    parser.add_argument(
        "--snapshot", action="store_true", help=_("with --now: keep a snapshot first")
    )
    parser.add_argument(
        "--leave-programs",
        action="store_true",
        help=_("with --now: do not close the programs that use the session"),
    )
    return parser


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if (parsed.snapshot or parsed.leave_programs) and not parsed.now:
        parser.error(_("--snapshot and --leave-programs go with --now."))
    return parsed


def _chooser(session_id: str | None) -> Callable[[list[Session]], Session | None]:
    """Return what finds the session among all: by its id, or the oldest of the user's own."""
    if session_id is None:
        return lambda sessions: of_user(sessions, os.getuid())
    return lambda sessions: next((one for one in sessions if one.id == session_id), None)


def _show_window() -> int:
    import gi

    try:
        for library, version in (("Gtk", "4.0"), ("Adw", "1")):
            gi.require_version(library, version)
        from gi.repository import Adw, Gdk, Gio, GLib, Gtk
    except (ImportError, ValueError):
        return _complain(_("A window takes GTK 4 and libadwaita; on Debian: gir1.2-adw-1."))
    if Gdk.Display.get_default() is None:
        return _complain(_("There is no display for a window; see sessiond-reset --help."))
    from sessiond.desktop.daemon import Daemon
    from sessiond.desktop.window import Window

    GLib.set_prgname(APPLICATION)  # what X11's desktops find the .desktop file by
    GLib.set_application_name(_("Reset Session"))
    Gtk.Window.set_default_icon_name(APPLICATION)
    # One instance: a second click shows the window that there is.
    application = Adw.Application(
        application_id=APPLICATION, flags=Gio.ApplicationFlags.HANDLES_COMMAND_LINE
    )
    windows: dict[str | None, Gtk.Window] = {}
    daemon = Daemon()

    def start(_application: Adw.Application) -> None:
        for action, keys in (
            ("win.back", ["Escape", "<Alt>Left"]),
            ("win.look-again", ["F5", "<Control>r"]),
            ("win.session", ["<Alt>1"]),
            ("win.snapshots", ["<Alt>2"]),
            ("window.close", ["<Control>w", "<Control>q"]),
        ):
            application.set_accels_for_action(action, keys)
        daemon.start()

    def show(_application: Adw.Application, command: Gio.ApplicationCommandLine) -> int:
        session_id = _parsed(command.get_arguments()[1:]).session
        if session_id not in windows:
            window = Window(application, daemon, _chooser(session_id))
            windows[session_id] = window
            window.connect("destroy", lambda _window: windows.pop(session_id))
        windows[session_id].present()
        return 0

    application.connect("startup", start)
    application.connect("command-line", show)
    return int(application.run(sys.argv))


def _complain(text: str) -> int:
    print(f"sessiond-reset: {text}", file=sys.stderr)
    return UNUSABLE
