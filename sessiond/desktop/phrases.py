"""What is said to people: failures, sizes, times and amounts, in their language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gi.repository import GLib

from sessiond.desktop.state import Changes, Job, Program
from sessiond.words import _, ngettext, pgettext

_SESSIOND = "org.sessiond.Overlay1.Error."
_DBUS = "org.freedesktop.DBus.Error."

_NOT_ALLOWED = _("You are not allowed to do this.")
_NOT_THERE = _("This is not there any more.")
_SILENT = _("sessiond does not answer. It may be starting; try again in a moment.")

_NO_BUS = _("The message bus of this machine cannot be used.")

_SPACES = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
"""What is between numbers and units, and not printable by Python's rule."""

_FAILURES = {
    f"{_SESSIOND}NoSuchSession": _("There is no such session, or it has been closed."),
    f"{_SESSIOND}NoSuchSnapshot": _("There is no such snapshot, or it has been deleted."),
    f"{_SESSIOND}NoSuchProfile": _("The profile of this session is no longer configured."),
    f"{_SESSIOND}SessionExists": _("There is such a session already."),
    f"{_SESSIOND}SnapshotExists": _(
        "There is a snapshot of this name already. Choose another name."
    ),
    f"{_SESSIOND}Busy": _(
        "Something else is being done to the session. Try again when that has finished."
    ),
    f"{_SESSIOND}NotAuthorized": _NOT_ALLOWED,
    f"{_SESSIOND}NoSpace": _(
        "There is not enough space. Delete files or snapshots that you do not need, and try again."
    ),
    f"{_SESSIOND}InvalidName": _(
        "This name cannot be used. Use the letters a to z, digits, hyphens, dots and underscores, "
        "and begin with a letter or digit."
    ),
    f"{_SESSIOND}InvalidOption": _("sessiond does not accept what was asked for."),
    f"{_SESSIOND}ImageUnavailable": _(
        "The image of this session is missing or damaged. Ask your administrator for help."
    ),
    f"{_SESSIOND}NotSupported": _("This is not possible with this session."),
    f"{_SESSIOND}Cancelled": _("It was cancelled. The session is as it was."),
    f"{_SESSIOND}Interrupted": _(
        "It was interrupted, and the session is as it was. You can start it again."
    ),
    f"{_SESSIOND}Failed": _("It did not succeed."),
    f"{_SESSIOND}ConfigError": _NO_BUS,
    "": _NO_BUS,
    f"{_SESSIOND}Unreachable": _SILENT,
    f"{_DBUS}InteractiveAuthorizationRequired": _(
        "This takes a password, and you could not be asked for it."
    ),
    f"{_DBUS}AccessDenied": _NOT_ALLOWED,
    f"{_DBUS}LimitsExceeded": _("That was too much at once. Wait a moment, and try again."),
    f"{_DBUS}UnknownObject": _NOT_THERE,
    f"{_DBUS}UnknownMethod": _NOT_THERE,  # what GDBus and others answer for an object without any
    f"{_DBUS}Failed": _("There is a fault in sessiond. Its log has the details."),
    **{
        f"{_DBUS}{reason}": _SILENT
        for reason in ("Disconnected", "NameHasNoOwner", "NoReply", "ServiceUnknown", "TimedOut")
    },
}

_BEGUN = {
    "reset": _("Resetting the session…"),
    "restore": _("Restoring a snapshot…"),
    "persist": _("Moving the session to disk…"),
    "rebase": _("Moving the session to another image…"),
    "maintenance": _("Making a new image…"),
    "commit": _("Saving files…"),
}
_DONE = {
    "reset": _("The session has been reset"),
    "restore": _("The snapshot has been restored"),
}
_FAILED = {
    "reset": _("The session could not be reset"),
    "restore": _("The snapshot could not be restored"),
}

_KINDS = {
    "added": pgettext("file", "new"),
    "contents": pgettext("file", "changed"),
    "metadata": pgettext("file", "owner, mode or time changed"),
    "deleted": pgettext("file", "deleted"),
    "type": pgettext("file", "replaced"),
    "renamed": pgettext("file", "renamed"),
}

_REASONS = {
    "scheduled": _("It was scheduled."),
    "after": _("The session has lasted as long as it may."),
    "daily": _("It is reset every day at this time."),
    "idle": _("Nobody has used it for a while."),
}


def failure(name: str) -> str:
    """Return what the D-Bus error of that name means."""
    if name.startswith(f"{_DBUS}Spawn."):
        return _SILENT
    return _FAILURES.get(name, _FAILURES[f"{_SESSIOND}Failed"])


def begun(operation: str) -> str:
    """Return what is being done to a session by a job of that kind."""
    return _BEGUN.get(operation, _("Something is being done to the session…"))


def ended(job: Job) -> str:
    """Return what has come of a job, as a heading."""
    if not job.error_name:
        return _DONE.get(job.operation, _("Done"))
    if job.error_name == f"{_SESSIOND}Cancelled":
        return _("Cancelled")
    return _FAILED.get(job.operation, _("This did not succeed"))


def kind(published: str) -> str:
    """Return how a file differs, for one of the kinds of a list of differences."""
    return _KINDS.get(published, published)


def reason(published: str) -> str:
    """Return why a session is reset by itself."""
    return _REASONS.get(published, "")


def size(octets: int) -> str:
    """Return a number of bytes for people."""
    return str(GLib.format_size(octets))


def difference(line: Mapping[str, Any]) -> str:
    """Return what a line of a list of differences says of its path: how it differs, its size."""
    told = kind(line["kind"])
    if line["kind"] == "renamed":
        told = _("renamed from {path}").format(path=shown(line.get("from", "")))
    return _("{kind}, {size}").format(kind=told, size=size(line["size"])) if line["size"] else told


def changes(found: Changes) -> str:
    """Return how much differs."""
    amounts = [
        ngettext("{number} added", "{number} added", found.added).format(number=found.added),
        ngettext("{number} changed", "{number} changed", found.changed).format(
            number=found.changed
        ),
        ngettext("{number} deleted", "{number} deleted", found.deleted).format(
            number=found.deleted
        ),
        ngettext("{number} renamed", "{number} renamed", found.renamed).format(
            number=found.renamed
        ),
    ]
    numbers = (found.added, found.changed, found.deleted, found.renamed)
    told = [amount for amount, number in zip(amounts, numbers, strict=True) if number]
    if not told:
        return _("Nothing has been changed")
    return pgettext("between parts of a list", ", ").join(told)


def program(found: Program) -> str:
    """Return the name of a program, and how many of it there are."""
    name = shown(found.name)
    if len(found.pids) == 1:
        return name
    return _("{program} ({count} processes)").format(program=name, count=len(found.pids))


def moment(microseconds: int) -> str:
    """Return a time of day, with the date unless it is today's."""
    when = GLib.DateTime.new_from_unix_local(microseconds // 1_000_000)
    now = GLib.DateTime.new_now_local()
    if when.format("%F") == now.format("%F"):
        # Translators: a time of day as strftime(3) has it.
        # xgettext:no-python-format
        return str(when.format(_("today, %H:%M")))
    # Translators: a date and time of day as strftime(3) has it.
    # xgettext:no-python-format
    return str(when.format(_("%-d %B %Y, %H:%M")))


def remaining(seconds: float) -> str:
    """Return how long there is still to wait, in steps that people want to know."""
    if seconds > 90:
        minutes = round(seconds / 60)
        return ngettext("in {number} minute", "in {number} minutes", minutes).format(number=minutes)
    rounded = max(10, round(seconds / 10) * 10)
    return ngettext("in {number} second", "in {number} seconds", rounded).format(number=rounded)


def shown(text: str) -> str:
    """Return names that programs have chosen, without what would act on a display, or mislead."""
    return "".join(
        c if c.isprintable() or c in _SPACES else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def programs(found: Sequence[Program]) -> str:
    """Return the names of programs, in one line."""
    return pgettext("between parts of a list", ", ").join(map(program, found))
